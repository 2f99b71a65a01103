//! The exit code says what happened, and whose doing it was.

use kiln_tests::{busybox, run, script};

#[test]
fn a_commands_exit_code_is_passed_on() {
    run(&[], &busybox(), &["/probe", "exit", "0"]).prints("");
    script(&[], "exit 77").code(77);
}

#[test]
fn a_command_that_is_not_there_is_127() {
    run(&[], &busybox(), &["no-such-command"]).code(127).complains("no-such-command");
}

#[test]
fn a_command_that_cannot_be_executed_is_126() {
    run(&[], &busybox(), &["/etc/passwd"]).code(126).complains("/etc/passwd");
}

#[test]
fn a_command_ended_by_a_signal_is_128_and_the_signal() {
    // Process 1 of a guest is out of reach of signals from inside, so here the command is not it.
    script(&["--init"], "kill -KILL $$").code(137);
}

/// What the command left running holds its streams open; that must not hold up the end.
#[test]
fn a_command_whose_time_is_up_is_124_with_its_whole_process_group() {
    let outcome = script(
        &["--timeout", "20s"],
        "echo started; sh -c 'trap : TERM; sleep 1000; sleep 1000' & sleep 1000",
    );
    outcome.code(124);
    assert_eq!(outcome.out(), "started\n");
}

#[test]
fn what_kiln_cannot_do_is_125() {
    run(&["--pull", "never"], &kiln_testkit::image::Image::new("/nowhere".as_ref(), "latest"), &["true"])
        .code(125)
        .complains("/nowhere");
    run(&["--kernel", "/etc/passwd"], &busybox(), &["true"]).code(125).complains("kernel");
    run(&["--user", "no-such-user"], &busybox(), &["true"]).code(125).complains("no-such-user");
}
