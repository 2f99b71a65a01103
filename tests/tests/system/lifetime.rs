//! How machines end when something goes wrong inside, and that they cost nothing while nothing happens.

use std::os::unix::fs::symlink;
use std::process::Command;

use kiln_tests::{Outcome, Session, busybox, descendants, from_environment, kiln_run, run, script};
use rustix::process::Signal;

/// A kernel whose process 1 ends panics: here it is the probe, which has nothing to do without arguments.
#[test]
fn a_guest_kernel_panic_is_reported_with_the_console() {
    let guest = tempfile::tempdir().expect("a folder");
    let at = |name: &str| guest.path().join(name);
    symlink(from_environment("KILN_TEST_GUEST").join("vmlinux"), at("vmlinux")).expect("the guest kernel");
    std::fs::copy(from_environment("KILN_PROBE"), at("init")).expect("the probe");
    let mut archive = Command::new("sh");
    archive.args(["-c", "echo init | cpio --quiet -o -H newc >initramfs.cpio"]).current_dir(guest.path());
    Outcome::of(&mut archive).code(0);
    let outcome = Outcome::of(kiln_run(&[], &busybox(), &["true"]).env("KILN_GUEST_DIR", guest.path()));
    outcome.code(125).complains("panic").complains("Attempted to kill init");
}

#[test]
fn a_command_that_takes_all_memory_is_killed_and_the_guest_lives() {
    // The shell is there to tell the tale.
    let outcome =
        script(&["--memory", "160m"], "/probe hog >/dev/null; echo \"hog ended with $?\"; /probe touch 16");
    outcome.code(0);
    assert_eq!(outcome.out(), "hog ended with 137\ntouched 16 MiB\n");
}

#[test]
fn a_command_killed_for_memory_is_137() {
    run(&["--memory", "128m"], &busybox(), &["/probe", "hog"]).code(137);
}

/// Between events every thread waits in the kernel: no sleeping, no polling. The root is read-only, for the guest's ext4
/// commits its journal some seconds after its last change.
#[test]
fn a_quiet_machine_makes_no_system_calls() {
    const SECONDS: &str = "3";
    let mut session =
        Session::start(&mut kiln_run(&["--read-only"], &busybox(), &["sh", "-c", "echo ready; sleep 1000"]));
    session.wait_for("ready");
    let watch = || {
        let mut strace = Command::new("timeout");
        strace.args(["--signal=INT", SECONDS, "strace", "-f", "-qq", "-o", "/dev/stdout"]);
        for pid in descendants(session.pid()).into_iter().chain([session.pid()]) {
            strace.args(["-p", &pid.as_raw_nonzero().to_string()]);
        }
        Outcome::of(&mut strace).out()
    };
    // A guest kernel has things to put in order in the first seconds after a command started.
    watch();
    let trace = watch();
    assert!(!trace.is_empty(), "strace saw nothing at all, not even the waits that it interrupted");
    let sleeps: Vec<&str> = trace.lines().filter(|line| line.contains("nanosleep(")).collect();
    assert!(sleeps.is_empty(), "fixed sleeps:\n{}", sleeps.join("\n"));
    // strace shows each thread's wait once as it attaches, and again as it lets go.
    let calls = trace.lines().filter(|line| !line.contains("resumed") && !line.contains("detached")).count();
    assert!(calls < 60, "{calls} system calls in {SECONDS} quiet seconds:\n{trace}");
    session.signal(Signal::KILL);
    session.finish();
}
