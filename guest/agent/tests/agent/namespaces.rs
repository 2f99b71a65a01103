//! Who can see, signal and outlive whom.

use kiln_protocol::{Call, Exec, Outcome, PowerOff, Reason, Started};

use crate::guest::{Guest, exec, sh};

const SIGKILL: u32 = 9;
const SIGTERM: u32 = 15;
const SIGUSR1: u32 = 10;

#[test]
fn the_first_command_is_process_1_and_alone() {
    let guest = Guest::new();
    let (stream, outcome) = guest.try_start(sh("echo $$ $PPID; ls -d /proc/[0-9]*"));
    assert_eq!(outcome, Outcome::Started(Started { pid: 1 }));
    assert_eq!(stream.finish().text(), "1 0\n/proc/1\n");
}

#[test]
fn with_a_reaper_a_command_is_a_process_like_any_other() {
    let guest = Guest::with_reaper();
    let (stream, outcome) = guest.try_start(sh("echo $$ $PPID; readlink /proc/1/exe || echo hidden"));
    assert_eq!(outcome, Outcome::Started(Started { pid: 2 }));
    let finished = stream.finish();
    assert!(finished.text().starts_with("2 0\n"), "{finished:?}");
}

#[test]
fn a_later_command_joins_the_first() {
    let guest = Guest::new();
    let mut first = guest.start(Exec { stdin: true, ..sh("echo > /tmp/mark; echo ready; read line") });
    first.read_until("ready");
    let script = "echo $PPID; tr '\\0' ' ' < /proc/1/cmdline; ls /tmp/mark";
    let second = guest.sh(script);
    assert!(second.text().starts_with("0\n/bin/sh -c echo > /tmp/mark"), "{second:?}");
    assert!(second.text().ends_with("/tmp/mark\n"), "{second:?}");
    first.stdin(b"go\n");
    first.finish();
}

#[test]
fn all_end_with_process_1_and_no_more_is_started() {
    let guest = Guest::new();
    let mut first = guest.start(Exec { stdin: true, ..sh("echo ready; read line") });
    first.read_until("ready");
    let second = guest.start(sh("trap '' TERM; sleep 1000"));
    first.stdin(b"go\n");
    first.finish();
    assert_eq!(second.finish().exited.signal, SIGKILL);
    let (reason, message) = guest.refusal(sh("true"));
    assert_eq!(reason, Reason::Invalid);
    assert!(message.contains("has ended"), "{message}");
}

#[test]
fn a_commands_group_is_the_root_of_all_groups_to_it() {
    for guest in [Guest::new(), Guest::with_reaper()] {
        let finished = guest.sh("sed -n 's/^0:://p' /proc/self/cgroup; readlink /proc/self/ns/cgroup");
        let (path, namespace) = finished.text().split_once('\n').expect("two lines");
        assert_eq!(path, "/");
        let hosts = std::fs::read_link("/proc/self/ns/cgroup").expect("a namespace");
        assert_ne!(namespace.trim(), hosts.to_str().expect("text"));
    }
}

#[test]
fn kernel_settings_are_read_only() {
    let guest = Guest::new();
    let script = "for f in /proc/sys/kernel/core_pattern /proc/sysrq-trigger; do test -w $f && echo $f; done; test -r /proc/sys/kernel/core_pattern";
    assert_eq!(guest.sh(script).text(), "");
}

#[test]
fn the_exit_signal_is_reported() {
    let guest = Guest::with_reaper();
    let exited = guest.sh("kill -USR1 $$").exited;
    assert_eq!((exited.code, exited.signal, exited.timed_out), (0, SIGUSR1, false));
}

#[test]
fn a_signal_reaches_the_whole_group() {
    let guest = Guest::with_reaper();
    let script = "trap 'wait; echo parent; exit 5' TERM; sh -c 'trap \"echo child; exit\" TERM; echo ready; while :; do sleep 0.1; done' & wait";
    let mut stream = guest.start(sh(script));
    stream.read_until("ready");
    stream.signal(SIGTERM);
    let finished = stream.finish();
    assert_eq!((finished.stdout.as_slice(), finished.exited.code), (&b"child\nparent\n"[..], 5));
}

#[test]
fn process_1_is_ended_by_a_signal_it_has_set_up_nothing_for() {
    let guest = Guest::new();
    let mut stream = guest.start(sh("echo ready; exec sleep 1000"));
    stream.read_until("ready");
    stream.signal(SIGTERM);
    let exited = stream.finish().exited;
    assert_eq!((exited.code, exited.signal), (0, SIGTERM));
}

#[test]
fn process_1_handles_the_signals_it_has_set_up() {
    let guest = Guest::new();
    let mut stream =
        guest.start(sh("trap 'echo caught; exit 6' TERM; echo ready; while :; do sleep 0.1; done"));
    stream.read_until("ready");
    stream.signal(SIGTERM);
    let finished = stream.finish();
    assert_eq!((finished.stdout.as_slice(), finished.exited.code), (&b"caught\n"[..], 6));
}

#[test]
fn a_timeout_kills_the_whole_group() {
    let guest = Guest::with_reaper();
    let script = "(trap '' TERM; exec flock /tmp/lock sleep 1000) & flock /tmp/other sleep 1000; exit 3";
    let exited = guest.run(Exec { timeout_ms: 300, ..sh(script) }).exited;
    assert_eq!((exited.signal, exited.timed_out), (SIGKILL, true));
    // The locks are free once their holders are gone.
    assert_eq!(guest.sh("flock /tmp/lock flock /tmp/other echo free").text(), "free\n");
}

#[test]
fn a_timeout_of_process_1_leaves_nobody() {
    let guest = Guest::new();
    let exited = guest.run(Exec { timeout_ms: 300, ..sh("setsid sleep 1000 & sleep 1000") }).exited;
    assert_eq!((exited.signal, exited.timed_out), (SIGKILL, true));
}

#[test]
fn a_command_that_ends_in_time_has_not_timed_out() {
    let exited = Guest::new().run(Exec { timeout_ms: 60_000, ..sh("exit 2") }).exited;
    assert_eq!((exited.code, exited.timed_out), (2, false));
}

#[test]
fn a_command_whose_connection_drops_is_killed() {
    let guest = Guest::with_reaper();
    let mut stream = guest.start(exec(["flock", "/tmp/lock", "sh", "-c", "echo ready; sleep 1000"]));
    stream.read_until("ready");
    drop(stream);
    assert_eq!(guest.sh("flock /tmp/lock echo free").text(), "free\n");
}

#[test]
fn orphans_are_reaped() {
    let guest = Guest::with_reaper();
    guest.sh("for i in 1 2 3 4 5 6 7 8; do (flock -s /tmp/lock sleep 0.1 &); done").text();
    // Exclusive once all have ended.
    let script =
        "flock /tmp/lock true; grep -h '^State:.*zombie' /proc/[0-9]*/status; ls -d /proc/[0-9]* | wc -l";
    let finished = guest.sh(script);
    assert!(!finished.text().contains("zombie"), "{finished:?}");
}

#[test]
fn power_off_asks_first_and_waits() {
    let guest = Guest::with_reaper();
    let mut stream = guest.start(sh("trap 'echo bye; exit 0' TERM; echo ready; while :; do sleep 0.1; done"));
    stream.read_until("ready");
    assert!(matches!(guest.power_off(600_000), Outcome::Done(_)));
    assert_eq!(stream.read_until("bye"), "bye\n");
}

#[test]
fn power_off_ends_a_background_process_too() {
    let guest = Guest::with_reaper();
    guest.sh("setsid sleep 1000 > /dev/null 2>&1 &").text();
    assert!(matches!(guest.power_off(600_000), Outcome::Done(_)));
}

#[test]
fn power_off_kills_who_does_not_listen() {
    for guest in [Guest::new(), Guest::with_reaper()] {
        let mut stream = guest.start(sh("trap '' TERM; echo ready; while :; do sleep 1000; done"));
        stream.read_until("ready");
        assert!(matches!(guest.power_off(200), Outcome::Done(_)));
    }
}

#[test]
fn a_guest_that_powers_off_starts_nothing() {
    let guest = Guest::new();
    let mut stream = guest.start(Exec {
        stdin: true,
        ..sh("trap 'echo asked; read line; exit' TERM; echo ready; while :; do sleep 0.1; done")
    });
    stream.read_until("ready");
    let mut power_off = guest.connect();
    power_off.request(Call::PowerOff(PowerOff { grace_ms: 600_000 }));
    stream.read_until("asked");
    assert_eq!(guest.refusal(sh("true")).0, Reason::Invalid);
    drop(stream);
    assert!(matches!(power_off.reply(), Outcome::Done(_)));
}
