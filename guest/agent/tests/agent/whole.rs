//! What is asked of the guest as a whole: a signal to all its processes, and what it uses.

use kiln_protocol::{Call, Hello, Measure, Measured, Outcome, Reason, Signal};

use crate::guest::{Guest, exec, sh};

const USR1: u32 = 10;
const USR2: u32 = 12;
const TERM: u32 = 15;

fn signal(guest: &Guest, number: u32) -> Result<(), Reason> {
    match guest.call(Call::Signal(Signal { number })) {
        Outcome::Done(_) => Ok(()),
        Outcome::Failed(failed) => Err(failed.reason()),
        outcome => panic!("no answer to a signal: {outcome:?}"),
    }
}

fn measured(guest: &Guest) -> Measured {
    match guest.call(Call::Measure(Measure {})) {
        Outcome::Measured(measured) => measured,
        outcome => panic!("no measure: {outcome:?}"),
    }
}

#[test]
fn a_signal_reaches_every_process_but_the_reaper() {
    let guest = Guest::with_reaper();
    // Two that the agent started, and one that is nobody's child any more.
    let script = "trap 'exit 3' USR1; trap 'exit 4' USR2; echo ready; while :; do sleep 0.01; done";
    let mut commands: Vec<_> = (0..2).map(|_| guest.start(sh(script))).collect();
    for command in &mut commands {
        command.read_until("ready");
    }
    let orphan = "(trap 'echo heard >/tmp/orphan; exit' USR1; echo >/tmp/ready; while :; do sleep 0.01; done) >/dev/null 2>&1 &";
    assert_eq!(guest.sh(&format!("{orphan} until [ -e /tmp/ready ]; do sleep 0.01; done")).text(), "");
    assert_eq!(signal(&guest, USR1), Ok(()));
    for command in commands {
        assert_eq!(command.finish().exited.code, 3);
    }
    assert_eq!(guest.sh("until [ -s /tmp/orphan ]; do sleep 0.01; done; cat /tmp/orphan").text(), "heard\n");
    let mut command = guest.start(sh(script));
    command.read_until("ready");
    assert_eq!(signal(&guest, USR2), Ok(()));
    assert_eq!(command.finish().exited.code, 4);
    // A process of the guest's that says it is the agent is not heard: the reaper is process 1 there, and root's.
    assert_eq!(guest.sh("kill -34 1; kill -s TERM 1; sleep 0.05; echo alive").text(), "alive\n");
}

#[test]
fn a_command_that_is_process_1_gets_the_signal_itself() {
    let guest = Guest::new();
    assert_eq!(signal(&guest, TERM), Err(Reason::Invalid), "there is no process");
    let mut command = guest.start(sh("trap 'echo caught' USR1; echo ready; while :; do sleep 0.01; done"));
    command.read_until("ready");
    assert_eq!(signal(&guest, USR1), Ok(()));
    command.read_until("caught");
    assert_eq!(signal(&guest, TERM), Ok(()));
    assert_eq!(command.finish().exited.signal, TERM);
    assert_eq!(signal(&guest, TERM), Err(Reason::Invalid), "there is none any more");
}

#[test]
fn a_signal_that_process_1_has_blocked_for_a_moment_is_not_lost() {
    // A shell blocks all signals whenever it starts a program.
    for _ in 0..20 {
        let guest = Guest::new();
        let mut command = guest.start(sh("echo ready; while :; do sleep 0.001; done"));
        command.read_until("ready");
        assert_eq!(signal(&guest, TERM), Ok(()));
        assert_eq!(command.finish().exited.signal, TERM);
    }
}

#[test]
fn a_signal_that_process_1_keeps_blocked_is_its_own() {
    let guest = Guest::new();
    let command = guest.start(exec(["env", "--block-signal=TERM", "sleep", "1000"]));
    let blocked = "until grep -q 'SigBlk:.*4000$' /proc/1/status; do sleep 0.01; done";
    assert_eq!(guest.sh(blocked).text(), "");
    assert_eq!(signal(&guest, TERM), Ok(()));
    // For longer than anybody looks.
    assert_eq!(
        guest.sh("sleep 2; grep -o 'ShdPnd:.*4000$' /proc/1/status").text(),
        "ShdPnd:\t0000000000004000\n"
    );
    assert_eq!(signal(&guest, USR1), Ok(()));
    assert_eq!(command.finish().exited.signal, USR1);
}

#[test]
fn what_is_no_signal_is_refused() {
    assert_eq!(signal(&Guest::bare(), TERM), Err(Reason::Invalid));
    let guest = Guest::with_reaper();
    for number in [0, 65, u32::MAX] {
        assert_eq!(signal(&guest, number), Err(Reason::Invalid), "{number}");
    }
    assert!(matches!(guest.call(Call::Hello(Hello {})), Outcome::Welcome(_)));
}

#[test]
fn what_a_guest_uses_is_told() {
    let guest = Guest::with_reaper();
    let before = measured(&guest);
    assert!(before.memory_used_bytes > 0 && before.memory_used_bytes < before.memory_bytes, "{before:?}");
    let mut command = guest.start(sh("sleep 1000 & sleep 1000 & echo ready; wait"));
    command.read_until("ready");
    let now = measured(&guest);
    // The reaper, the shell, and what it started.
    assert_eq!(now.processes, 4, "{now:?}");
    assert!(now.uptime_us > before.uptime_us && now.cpu_us > 0, "{now:?}");
    // A /proc of the guest's own making says what it likes.
    assert_eq!(guest.sh("mount -t tmpfs none /proc; mkdir /proc/1 /proc/2; echo 'MemTotal: 18446744073709551615 kB' >/proc/meminfo; echo 'MemAvailable: 18446744073709551615 kB' >>/proc/meminfo; echo 'cpu 18446744073709551615 18446744073709551615' >/proc/stat").text(), "");
    assert_eq!(measured(&guest).processes, 2);
}
