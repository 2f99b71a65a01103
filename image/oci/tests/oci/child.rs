//! A pull in a process of its own, for what a process has one of: its environment, its network.

use std::path::Path;
use std::process::Command;

use kiln_oci::{PullOptions, PullPolicy};

use crate::Place;

const IMAGE: &str = "KILN_OCI_TEST_IMAGE";
const ALLOW_HTTP: &str = "KILN_OCI_TEST_ALLOW_HTTP";

/// Pulls the image named in the environment into a store of its own, and says how it went.
#[tokio::test]
#[ignore = "the part other tests play in a child process"]
async fn pull_child() {
    let image = std::env::var(IMAGE).expect("set by the test that starts this one");
    let allow_http = std::env::var_os(ALLOW_HTTP).is_some();
    let options = PullOptions { policy: PullPolicy::Always, allow_http, ..PullOptions::default() };
    match Place::new().pull_as(&image, &options).await {
        Ok(image) => println!("\n#pulled {}", image.digest),
        Err(error) => println!("\n#failed {error} #hint {}", error.hint().unwrap_or_default()),
    }
}

/// The command that pulls `image` in a child with a home of its own.
pub(crate) fn command(image: &str, home: &Path) -> Command {
    let mut command = Command::new(std::env::current_exe().expect("this test"));
    command.args(["--ignored", "--exact", "child::pull_child", "--nocapture"]);
    command.env(IMAGE, image).env("HOME", home).env_remove("DOCKER_CONFIG");
    for name in ["HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "http_proxy", "https_proxy", "all_proxy"] {
        command.env_remove(name);
    }
    command
}

/// Lets the child speak plain HTTP with any host.
pub(crate) fn allow_http(command: &mut Command) {
    command.env(ALLOW_HTTP, "1");
}

/// Runs the child: the digest of the image, or what went wrong.
pub(crate) fn outcome(command: &mut Command) -> Result<String, String> {
    let output = command.output().expect("a child");
    let said = String::from_utf8_lossy(&output.stdout).into_owned();
    let line = |start: &str| said.lines().find_map(|line| line.strip_prefix(start)).map(ToOwned::to_owned);
    match (line("#pulled "), line("#failed ")) {
        (Some(digest), _) => Ok(digest),
        (None, Some(error)) => Err(error),
        (None, None) => panic!("{said}\n{}", String::from_utf8_lossy(&output.stderr)),
    }
}
