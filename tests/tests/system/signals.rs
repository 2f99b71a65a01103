//! Signals reach the command, and a user can always get out.

use kiln_testkit::nasty;
use kiln_tests::{Session, busybox, kiln_run};
use rustix::process::Signal;

/// Waits in steps, as a shell runs its traps between commands.
const WAIT: &str = "echo ready; while :; do sleep 0.1; done";

#[test]
fn signals_are_forwarded_to_the_command() {
    let script = format!("trap 'echo INT' INT; trap 'echo HUP' HUP; trap 'echo TERM; exit 3' TERM; {WAIT}");
    let mut session = Session::start(&mut kiln_run(&[], &busybox(), &["sh", "-c", &script]));
    session.wait_for("ready");
    session.signal(Signal::INT);
    session.wait_for("INT");
    session.signal(Signal::HUP);
    session.wait_for("HUP");
    session.signal(Signal::TERM);
    session.finish().code(3);
}

#[test]
fn a_command_that_is_not_process_1_and_has_no_handler_dies_of_the_signal() {
    let mut session = Session::start(&mut kiln_run(&["--init"], &busybox(), &["sh", "-c", WAIT]));
    session.wait_for("ready");
    session.signal(Signal::INT);
    session.finish().code(130);
}

#[test]
fn sigterm_arrives_as_the_images_stop_signal() {
    let image = nasty::config("stopsignal").expect("the image");
    let mut session = Session::start(&mut kiln_run(&[], &image, &[]));
    session.wait_for("ready");
    session.signal(Signal::TERM);
    session.wait_for("got USR1");
    session.finish().code(0);
}

#[test]
fn a_command_that_ignores_signals_ends_at_the_third() {
    let script = format!("trap 'echo ignored' INT TERM; {WAIT}");
    let mut session = Session::start(&mut kiln_run(&[], &busybox(), &["sh", "-c", &script]));
    session.wait_for("ready");
    // Signals that wait for the same process are one, so each is seen to arrive before the next.
    for _ in 0..2 {
        session.signal(Signal::INT);
        session.wait_for("ignored");
    }
    session.signal(Signal::INT);
    let status = session.finish().status;
    assert!(!status.success(), "{status}");
}
