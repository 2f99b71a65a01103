//! What comes with a command: files it finds, and commands that follow it.

use kiln_protocol::{
    Argv, Call, Exec, MAX_CHAIN, MAX_STAGED_FILES, Outcome, PowerOff, Reason, StagedFile, WindowSize,
};

use crate::guest::{Guest, exec, sh};

const USR1: u32 = 10;

fn staged(path: &str, mode: u32, contents: &str) -> StagedFile {
    StagedFile { path: path.into(), mode, contents: contents.into() }
}

/// Shell scripts that follow one another.
fn chain<const N: usize>(scripts: [&str; N]) -> Exec {
    let mut all = scripts.into_iter().map(sh);
    let first = all.next().expect("at least one");
    Exec { chain: all.map(|exec| Argv { words: exec.argv }).collect(), ..first }
}

#[test]
fn a_command_finds_the_files_that_come_with_it() {
    let guest = Guest::with_reaper();
    let files = vec![
        staged("/srv/a/tool", 0o755, "#!/bin/sh\necho ran $(cat /srv/b) $(stat -c %a:%u /srv/b)\n"),
        staged("/srv/b", 0o640, "with"),
    ];
    // A test beside this one that starts a program has its file open for a moment, where an agent is alone.
    let ran =
        "until ran=$(/srv/a/tool 2>/tmp/why); do grep -q busy /tmp/why || exit; done; rm /tmp/why; echo $ran";
    assert_eq!(guest.run(Exec { files, ..sh(ran) }).text(), "ran with 640:0\n");
    let refused = |files| guest.refusal(Exec { files, ..sh("echo >/tmp/ran") }).0;
    assert_eq!(refused(vec![staged("relative", 0o600, "")]), Reason::Invalid);
    assert_eq!(refused(vec![staged("/srv/b/c", 0o600, "")]), Reason::Invalid);
    assert_eq!(refused(vec![staged("/tmp/x", 0o600, ""); MAX_STAGED_FILES + 1]), Reason::Invalid);
    assert_eq!(guest.sh("ls -A /tmp; ls -A /srv").text(), "a\nb\n");
}

#[test]
fn commands_follow_one_another_as_long_as_they_succeed() {
    let guest = Guest::with_reaper();
    let all = guest.run(chain(["echo one", "echo two >&2; echo 2", "echo three; exit 0"]));
    assert_eq!((all.text(), all.stderr.as_slice()), ("one\n2\nthree\n", &b"two\n"[..]));
    let stopped = guest.run(chain(["echo one", "echo two; exit 3", "echo >/tmp/never"]));
    assert_eq!((stopped.exited.code, stopped.stdout.as_slice()), (3, &b"one\ntwo\n"[..]));
    let killed = guest.run(chain(["kill -9 $$", "echo >/tmp/never"]));
    assert_eq!((killed.exited.code, killed.exited.signal), (0, 9));
    assert_eq!(guest.sh("ls -A /tmp").text(), "");
    // They share stdin, and what is left of one's output comes before the next's.
    let mut stream = guest
        .start(Exec { stdin: true, ..chain(["read a; echo $a", "read b; echo $b; yes | head -c 200000"]) });
    stream.stdin(b"first\nsecond\n");
    let said = stream.finish().stdout;
    assert!(said.starts_with(b"first\nsecond\ny\n") && said.len() == 200_013, "{}", said.len());
}

#[test]
fn one_that_cannot_start_ends_them_as_in_a_shell() {
    let guest = Guest::with_reaper();
    let missing = Exec {
        chain: vec![Argv { words: vec![b"/no/such".to_vec()] }, Argv { words: exec(["echo"]).argv }],
        ..sh("echo one")
    };
    let finished = guest.run(missing);
    assert_eq!((finished.exited.code, finished.stdout.as_slice()), (127, &b"one\n"[..]));
    assert_eq!(finished.stderr, b"/no/such: no such file or directory\n");
    let closed = Exec { chain: vec![Argv { words: vec![b"/etc/passwd".to_vec()] }], ..sh("true") };
    assert_eq!(guest.run(closed).exited.code, 126);
}

#[test]
fn a_time_limit_is_for_all_together() {
    let guest = Guest::with_reaper();
    let limited =
        Exec { timeout_ms: 300, ..chain(["sleep 0.1", "sleep 0.1", "echo; sleep 1000", "echo >/tmp/never"]) };
    let finished = guest.run(limited);
    assert!(finished.exited.timed_out, "{finished:?}");
    assert_eq!(guest.sh("ls -A /tmp").text(), "");
}

#[test]
fn a_signal_and_a_lost_connection_reach_the_one_that_runs() {
    let guest = Guest::with_reaper();
    let waits = "trap 'exit 3' USR1; echo ready; while :; do sleep 0.01; done";
    let mut stream = guest.start(chain(["true", waits, "echo >/tmp/never"]));
    stream.read_until("ready");
    stream.signal(USR1);
    assert_eq!(stream.finish().exited.code, 3);
    let mut stream =
        guest.start(chain(["true", "echo $$ >/tmp/pid; echo ready; sleep 1000", "echo >/tmp/never"]));
    stream.read_until("ready");
    drop(stream);
    assert_eq!(
        guest.sh("while kill -0 $(cat /tmp/pid) 2>/dev/null; do sleep 0.01; done; ls -A /tmp").text(),
        "pid\n"
    );
}

#[test]
fn a_guest_that_powers_off_starts_nothing_more() {
    let guest = Guest::with_reaper();
    let next = guest.shared("next");
    let mut stream = guest
        .start(chain(["trap 'exit 0' TERM; echo ready; while :; do sleep 0.01; done", "echo >/host/next"]));
    stream.read_until("ready");
    // What it would do is seen.
    let ran = guest.shared("ran");
    assert_eq!(guest.run(chain(["true", "echo >/host/ran"])).exited.code, 0);
    assert!(ran.exists());
    let off = guest.call(Call::PowerOff(PowerOff { grace_ms: 10_000 }));
    assert!(matches!(off, Outcome::Done(_)), "{off:?}");
    assert!(!next.exists());
    assert_eq!(stream.finish().exited.code, 0);
}

#[test]
fn what_cannot_be_a_chain_is_refused() {
    let refused = |guest: &Guest, exec| guest.refusal(exec).0;
    assert_eq!(refused(&Guest::new(), chain(["true", "true"])), Reason::Invalid);
    let guest = Guest::with_reaper();
    let terminal = Exec { tty: Some(WindowSize::default()), ..chain(["true", "true"]) };
    assert_eq!(refused(&guest, terminal), Reason::Invalid);
    let long = Exec { chain: vec![Argv { words: sh("true").argv }; MAX_CHAIN + 1], ..sh("true") };
    assert_eq!(refused(&guest, long), Reason::Invalid);
    let empty = Exec { chain: vec![Argv::default()], ..sh("echo >/tmp/ran") };
    assert_eq!(refused(&guest, empty), Reason::Invalid);
    assert_eq!(guest.sh("ls -A /tmp").text(), "");
}
