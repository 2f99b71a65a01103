//! Pulling from real registries, and what is then in the store.

use std::path::Path;
use std::process::Command;
use std::sync::{Mutex, mpsc};

use kiln_testkit::http::{Response, Server};
use kiln_testkit::image;
use kiln_testkit::registry::{Access, PASSWORD, Registry, USER, basic_auth};
use kiln_tests::{Outcome, kiln, kiln_run};

/// `kiln ARGS` with a store and a Docker configuration of its own.
fn in_own(own: &Path, args: &[&str]) -> Command {
    let mut command = kiln(args);
    command.env("KILN_ROOT", own.join("store")).env("DOCKER_CONFIG", own);
    command
}

fn log_in(own: &Path, registry: &Registry, password: &str) {
    let auth = basic_auth(USER, password);
    let config = serde_json::json!({"auths": {registry.host(): {"auth": auth}}});
    std::fs::write(own.join("config.json"), config.to_string()).expect("the Docker configuration");
}

#[test]
fn an_image_runs_straight_from_a_registry_with_passwords() {
    let own = tempfile::tempdir().expect("a directory");
    let registry = Registry::start(Access::Password).expect("a registry");
    registry.push(&image::busybox().expect("the image").skopeo(), "tools/busybox:1").expect("pushed");
    let name = registry.image("tools/busybox:1");
    Outcome::of(&mut in_own(own.path(), &["run", &name, "--", "true"])).code(125).complains("busybox");
    log_in(own.path(), &registry, "wrong");
    Outcome::of(&mut in_own(own.path(), &["run", &name, "--", "true"])).code(125);
    log_in(own.path(), &registry, PASSWORD);
    let outcome = Outcome::of(&mut in_own(own.path(), &["run", &name, "--", "echo", "from a registry"]));
    outcome.code(0);
    assert_eq!(outcome.out(), "from a registry\n");
    // What the store has needs no registry.
    drop(registry);
    Outcome::of(&mut in_own(own.path(), &["run", &name, "--", "echo", "again"])).prints("again\n");
}

#[test]
fn a_registry_with_tokens_gives_them_to_anybody_for_what_is_public() {
    let own = tempfile::tempdir().expect("a directory");
    let registry = Registry::start(Access::Token).expect("a registry");
    let scratch = image::scratch().expect("the image").skopeo();
    registry.push(&scratch, "public/scratch:1").expect("pushed");
    registry.push(&scratch, "private/scratch:1").expect("pushed");
    Outcome::of(&mut in_own(own.path(), &["pull", &registry.image("public/scratch:1")])).code(0);
    let refused = Outcome::of(&mut in_own(own.path(), &["pull", &registry.image("private/scratch:1")]));
    assert!(!refused.status.success(), "{}", refused.out());
    log_in(own.path(), &registry, PASSWORD);
    Outcome::of(&mut in_own(own.path(), &["pull", &registry.image("private/scratch:1")])).code(0);
}

/// A tag that moved: `missing` keeps what the store has, `always` asks, `never` does not.
#[test]
fn the_pull_policy_decides_when_a_tag_is_resolved() {
    let own = tempfile::tempdir().expect("a directory");
    let registry = Registry::start(Access::Open).expect("a registry");
    let name = registry.image("moving:latest");
    let run = |pull: &str| {
        Outcome::of(&mut in_own(
            own.path(),
            &["run", "--pull", pull, "--entrypoint", "/probe", &name, "--", "exit", "0"],
        ))
    };
    run("never").code(125).complains("moving");
    let first =
        registry.push(&image::scratch().expect("the image").skopeo(), "moving:latest").expect("pushed");
    run("missing").code(0);
    let second =
        registry.push(&image::busybox().expect("the image").skopeo(), "moving:latest").expect("pushed");
    assert_ne!(first, second);
    let id = || Outcome::of(&mut in_own(own.path(), &["image", "inspect", &name])).code(0).out();
    run("missing").code(0);
    assert!(id().contains(&first) && !id().contains(&second), "{}", id());
    run("always").code(0);
    assert!(id().contains(&second), "{}", id());
    // A digest says which image is meant, wherever the tag is.
    let pinned = format!("{}@{first}", registry.image("moving"));
    Outcome::of(&mut in_own(own.path(), &["run", "--entrypoint", "/probe", &pinned, "--", "exit", "9"]))
        .code(9);
}

#[test]
fn progress_is_for_stderr_and_the_digest_for_stdout() {
    let own = tempfile::tempdir().expect("a directory");
    let registry = Registry::start(Access::Open).expect("a registry");
    let digest = registry.push(&image::busybox().expect("the image").skopeo(), "busybox:1").expect("pushed");
    let outcome = Outcome::of(&mut in_own(own.path(), &["pull", &registry.image("busybox:1")]));
    outcome.code(0);
    assert!(outcome.out().contains(&digest), "{}", outcome.out());
    assert!(!outcome.stderr.contains(&0x1b), "no terminal, so no colours or bars: {}", outcome.err());
}

/// Two processes pull the same image into the same store at once: both succeed, and it is there once.
#[test]
fn pulls_at_once_share_the_store() {
    let own = tempfile::tempdir().expect("a directory");
    let registry = Registry::start(Access::Open).expect("a registry");
    registry.push(&image::python().expect("the image").skopeo(), "python:1").expect("pushed");
    let name = registry.image("python:1");
    let pull = || {
        let mut command = in_own(own.path(), &["pull", &name]);
        std::thread::spawn(move || Outcome::of(&mut command))
    };
    for pull in [pull(), pull(), pull()] {
        pull.join().expect("the thread only waits").code(0);
    }
    let listed = Outcome::of(&mut in_own(own.path(), &["images", "--json"]));
    let listed: serde_json::Value = serde_json::from_slice(&listed.code(0).stdout).expect("JSON");
    assert_eq!(listed.as_array().map(Vec::len), Some(1), "{listed}");
}

/// Killed at any point, a pull leaves nothing that a later one stumbles over.
#[test]
fn a_killed_pull_is_repeated_cleanly() {
    let own = tempfile::tempdir().expect("a directory");
    let reference = image::busybox().expect("the image");
    for _ in 0..5 {
        let mut pull = in_own(own.path(), &["pull", &reference.reference()]).spawn().expect("kiln starts");
        pull.kill().expect("kiln is there");
        pull.wait().expect("kiln is waited for");
    }
    let mut run = kiln_run(&[], &reference, &["echo", "whole"]);
    Outcome::of(run.env("KILN_ROOT", own.path().join("store"))).prints("whole\n");
}

/// A registry that has one image, of which it gives half of a layer and then nothing more; it says when that has happened.
fn half_a_registry() -> (Server, String, mpsc::Receiver<()>, mpsc::Sender<()>) {
    let reference = image::busybox().expect("the image").reference();
    let layout = reference.strip_prefix("oci-layout:").and_then(|rest| rest.rsplit_once(':'));
    let layout = Path::new(layout.expect("a layout in a folder").0).to_owned();
    let index = std::fs::read(layout.join("index.json")).expect("an index");
    let index: serde_json::Value = serde_json::from_slice(&index).expect("JSON");
    let manifest = index["manifests"][0].clone();
    let [digest, media_type] =
        ["digest", "mediaType"].map(|key| manifest[key].as_str().expect("text").to_owned());
    let (reached, stuck) = mpsc::channel();
    let (release, hold) = mpsc::channel::<()>();
    let (reached, hold) = (Mutex::new(reached), Mutex::new(hold));
    let server = Server::start("127.0.0.1", move |request| {
        if request.range_start().is_some_and(|start| start > 0) {
            reached.lock().expect("one at a time").send(()).expect("the test waits");
            // Until the test lets go of it.
            let _ = hold.lock().expect("one at a time").recv();
        }
        if request.path.contains("/manifests/") {
            let bytes =
                std::fs::read(layout.join("blobs").join(digest.replace(':', "/"))).expect("a manifest");
            return Response::new(200, bytes).header("content-type", media_type.clone());
        }
        let Some((_, digest)) = request.path.split_once("/blobs/") else { return Response::new(200, "") };
        let bytes = std::fs::read(layout.join("blobs").join(digest.replace(':', "/"))).expect("a blob");
        let half = bytes.len() / 2;
        let response = Response::new(200, bytes);
        if half > HALF_A_LAYER_BYTES_MIN { response.cut_after(half) } else { response }
    });
    let server = server.expect("a server");
    let name = format!("{}/tools/busybox:1", server.address());
    (server, name, stuck, release)
}

/// Half of anything longer is half of a layer.
const HALF_A_LAYER_BYTES_MIN: usize = 64 << 10;

#[test]
fn what_a_killed_pull_left_is_removed_and_told_once() {
    let own = tempfile::tempdir().expect("a directory");
    let (_server, name, stuck, _release) = half_a_registry();
    let pull = || {
        let mut pull = in_own(own.path(), &["pull", "--quiet", &name]).spawn().expect("kiln starts");
        stuck.recv().expect("half of the layer has come");
        pull.kill().expect("kiln is there");
        pull.wait().expect("kiln is waited for");
    };
    let listed = |words: &[&str]| Outcome::of(&mut in_own(own.path(), words)).code(0).err();
    pull();
    let told = listed(&["images"]);
    assert!(told.starts_with("note: removed what 1 interrupted command left ("), "{told}");
    assert!(told.ends_with(" MiB)\n") && !told.contains("(0 file"), "{told}");
    assert_eq!(listed(&["images"]), "");
    assert_eq!(std::fs::read_dir(own.path().join("store/tmp")).expect("a folder").count(), 0);
    pull();
    assert_eq!(listed(&["images", "--quiet"]), "");
}
