//! Running the real `kiln` from tests: every wait has a limit, and every process that a test starts ends with it.

#![forbid(unsafe_code)]

pub mod library;
mod process;
mod terminal;
mod vm;

use std::ffi::OsStr;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use kiln_testkit::image::Image;

pub use process::{Outcome, Session, descendants, monitor_of, rss_bytes, wait_until_gone};
pub use terminal::Terminal;
pub use vm::Vm;

/// The `kiln` under test: the one that `KILN` names.
pub fn program() -> PathBuf {
    from_environment("KILN")
}

/// The store that the tests share, so that each image is converted once.
pub fn store() -> PathBuf {
    from_environment("KILN_TEST_STORE")
}

/// Whether the tests run where KVM is hardware-style: there, page faults are cheap and stock kernels boot.
pub fn is_hardware_style() -> bool {
    !Path::new("/sys/module/kvm_pvm").exists()
}

/// The path that `cargo xtask test` hands over as `name`.
pub fn from_environment(name: &str) -> PathBuf {
    let value = std::env::var_os(name);
    value.unwrap_or_else(|| panic!("{name} is not set: system tests are run by `cargo xtask test`")).into()
}

/// The guest kernel without the device by which the agent reaches its doorbell.
pub fn without_memory_device() -> tempfile::NamedTempFile {
    let kernel = tempfile::NamedTempFile::new().expect("a file");
    let vmlinux = from_environment("KILN_TEST_GUEST").join("vmlinux");
    let map = from_environment("KILN_TEST_SYSTEM_MAP");
    kiln_testkit::kernel::without_memory_device(&vmlinux, &map, kernel.path()).expect("a kernel");
    kernel
}

/// `kiln` with the tests' store and nothing of the caller's configuration.
pub fn kiln<S: AsRef<OsStr>>(args: impl IntoIterator<Item = S>) -> Command {
    let mut command = Command::new(program());
    command.args(args).env("KILN_ROOT", store()).env_remove("DOCKER_CONFIG").stdin(Stdio::null());
    command
}

/// `kiln run --quiet OPTIONS IMAGE -- COMMAND`, so that what is on stderr is the command's or an error.
pub fn kiln_run(options: &[&str], image: &Image, command: &[&str]) -> Command {
    let mut kiln = kiln(["run", "--quiet"]);
    kiln.args(options).arg(image.reference());
    if !command.is_empty() {
        kiln.arg("--").args(command);
    }
    kiln
}

/// Runs `kiln run OPTIONS IMAGE -- COMMAND` to its end.
pub fn run(options: &[&str], image: &Image, command: &[&str]) -> Outcome {
    Outcome::of(&mut kiln_run(options, image, command))
}

/// Runs a shell script in the busybox image to its end.
pub fn script(options: &[&str], script: &str) -> Outcome {
    run(options, &busybox(), &["sh", "-c", script])
}

/// The image that most tests use.
pub fn busybox() -> Image {
    kiln_testkit::image::busybox().expect("the busybox image")
}
