//! A command on a terminal.

use kiln_tests::{Terminal, busybox, kiln_run};
use rustix::process::Signal;

#[test]
fn a_command_gets_a_terminal_its_size_and_its_keys() {
    let script = "stty size; [ -t 0 ] && [ -t 1 ] && [ -t 2 ] && echo 'all three'; \
                  trap 'stty size' WINCH; trap 'echo interrupted; exit 9' INT; \
                  echo ready; while :; do sleep 0.1; done";
    let mut terminal = Terminal::start(&kiln_run(&["-it"], &busybox(), &["sh", "-c", script]), 33, 77);
    terminal.wait_for("33 77");
    terminal.wait_for("all three");
    terminal.wait_for("ready");
    assert!(!terminal.is_cooked(), "keys go to the guest's terminal raw");
    terminal.resize(44, 111);
    terminal.wait_for("44 111");
    // Ctrl-C is a key for the guest's terminal, which makes a signal of it there.
    terminal.type_in("\x03");
    terminal.wait_for("interrupted");
    assert_eq!(terminal.finish().code(), Some(9));
    assert!(terminal.is_cooked(), "the terminal is as it was");
}

#[test]
fn the_terminal_is_restored_when_kiln_is_stopped() {
    let mut terminal =
        Terminal::start(&kiln_run(&["-it"], &busybox(), &["sh", "-c", "echo ready; exec cat"]), 24, 80);
    terminal.wait_for("ready");
    terminal.type_in("echoed\r");
    terminal.wait_for("echoed");
    terminal.signal(Signal::TERM);
    assert!(!terminal.finish().success());
    assert!(terminal.is_cooked(), "the terminal is as it was");
}
