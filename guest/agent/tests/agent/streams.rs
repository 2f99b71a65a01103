//! stdin, stdout and stderr: whole, apart, and never more than there is room for.

use kiln_protocol::frame::Kind;
use kiln_protocol::{Call, Exec, Hello, INITIAL_CREDIT_BYTES, Outcome};

use crate::guest::{Guest, exec, sh};

#[test]
fn stdout_and_stderr_arrive_apart_and_whole() {
    let finished = Guest::new().sh("printf 'a\\0b'; printf 'c\\377' >&2; exit 7");
    assert_eq!((finished.stdout.as_slice(), finished.stderr.as_slice()), (&b"a\0b"[..], &b"c\xff"[..]));
    assert_eq!((finished.exited.code, finished.exited.signal), (7, 0));
    assert!(finished.exited.peak_rss_kib > 100);
}

#[test]
fn stdin_reaches_the_command_byte_for_byte_and_ends() {
    let bytes: Vec<u8> = (0..1_500_000_u32).map(|number| (number % 251) as u8).collect();
    let guest = Guest::new();
    let mut stream = guest.start(Exec { stdin: true, ..exec(["cat"]) });
    let (mut sent, mut window, mut echoed) = (0, INITIAL_CREDIT_BYTES as usize, vec![]);
    while sent < bytes.len() {
        let piece = (bytes.len() - sent).min(window).min(10_000);
        if piece > 0 {
            stream.stdin(&bytes[sent..sent + piece]);
            (sent, window) = (sent + piece, window - piece);
            continue;
        }
        match stream.frame().expect("the command runs") {
            (Kind::StdinCredit, payload) => {
                window += u64::from_le_bytes(payload.try_into().expect("8 bytes")) as usize;
            }
            (Kind::Stdout, payload) => {
                stream.grant_stdout(payload.len() as u64);
                echoed.extend(payload);
            }
            other => panic!("{other:?}"),
        }
    }
    stream.send(Kind::StdinEnd, &[]);
    let finished = stream.finish();
    echoed.extend(&finished.stdout);
    assert_eq!(finished.exited.code, 0);
    assert!(echoed == bytes, "{} bytes came back of {}", echoed.len(), bytes.len());
}

#[test]
fn without_stdin_a_command_reads_an_end_at_once() {
    assert_eq!(Guest::new().sh("cat; echo over").text(), "over\n");
}

#[test]
fn stdin_nobody_reads_neither_blocks_nor_ends_the_command() {
    let guest = Guest::with_reaper();
    let mut other =
        guest.start(Exec { stdin: true, ..exec(["flock", "/tmp/lock", "sh", "-c", "echo held; read go"]) });
    other.read_until("held");
    let mut stream =
        guest.start(Exec { stdin: true, ..sh("exec <&-; echo closed; flock /tmp/lock true; exit 3") });
    stream.read_until("closed");
    stream.stdin(&vec![7; INITIAL_CREDIT_BYTES as usize]);
    stream.send(Kind::StdinEnd, &[]);
    other.stdin(b"go\n");
    assert_eq!(stream.finish().exited.code, 3);
}

#[test]
fn output_without_a_reader_holds_up_the_command_and_nothing_else() {
    let guest = Guest::new();
    let total = 64 << 20;
    let mut stream = guest.start(sh(&format!("head -c {total} /dev/zero")));
    let mut received = 0;
    while received < INITIAL_CREDIT_BYTES {
        let (kind, payload) = stream.frame().expect("the command runs");
        assert_eq!(kind, Kind::Stdout);
        received += payload.len() as u64;
    }
    // The agent still answers others, and by then would have sent whatever it was going to send.
    assert!(matches!(guest.call(Call::Hello(Hello {})), Outcome::Welcome(_)));
    stream.socket.set_nonblocking(true).expect("a socket");
    let waiting = std::io::Read::read(&mut stream.socket, &mut [0]);
    assert_eq!(waiting.expect_err("nothing waits").kind(), std::io::ErrorKind::WouldBlock);
    stream.socket.set_nonblocking(false).expect("a socket");

    stream.grant_stdout(total);
    let finished = stream.finish();
    assert_eq!(finished.stdout.len() as u64 + received, total);
    assert_eq!(finished.exited.code, 0);
}

#[test]
fn a_reader_that_has_gone_ends_the_writer() {
    let guest = Guest::new();
    // The test's own thread ignores SIGPIPE, which the command would inherit.
    let mut stream = guest.start(exec(["env", "--default-signal=PIPE", "sh", "-c", "yes; exit 9"]));
    stream.read_until("y\n");
    stream.send(Kind::StdoutClose, &[]);
    assert_eq!(stream.finish().exited.code, 9);
}

#[test]
fn closing_stderr_leaves_stdout_alone() {
    let guest = Guest::new();
    let mut stream = guest.start(Exec { stdin: true, ..sh("read go; echo lost >&2; echo kept") });
    stream.send(Kind::StderrClose, &[]);
    stream.stdin(b"go\n");
    let finished = stream.finish();
    assert_eq!((finished.text(), finished.stderr.as_slice()), ("kept\n", &b""[..]));
}

#[test]
fn a_background_process_that_holds_the_output_is_not_waited_for() {
    let guest = Guest::with_reaper();
    let finished = guest.sh("sleep 1000 & echo $!");
    // It lives on, for that is what a reaper is for.
    assert_eq!(guest.sh(&format!("kill -0 {} && echo alive", finished.text().trim())).text(), "alive\n");
}

#[test]
fn all_that_was_written_before_the_end_is_sent() {
    let guest = Guest::with_reaper();
    for _ in 0..20 {
        let finished = guest.sh("head -c 60000 /dev/zero; head -c 60000 /dev/zero >&2; sleep 1000 & exit 4");
        assert_eq!((finished.stdout.len(), finished.stderr.len(), finished.exited.code), (60000, 60000, 4));
    }
}

#[test]
fn stdout_can_be_opened_again_by_a_command_that_is_not_root() {
    let guest = Guest::new();
    let finished = guest.run(Exec { user: "app".into(), ..sh("echo again > /dev/stdout") });
    assert_eq!(finished.text(), "again\n");
}

#[test]
fn many_commands_run_side_by_side() {
    let guest = Guest::with_reaper();
    let mut streams: Vec<_> = (0..20)
        .map(|number| guest.start(Exec { stdin: true, ..sh(&format!("cat; exit {number}")) }))
        .collect();
    for (number, stream) in streams.iter_mut().enumerate() {
        stream.stdin(number.to_string().as_bytes());
        stream.send(Kind::StdinEnd, &[]);
    }
    for (number, stream) in streams.into_iter().enumerate() {
        let finished = stream.finish();
        assert_eq!((finished.stdout, finished.exited.code), (number.to_string().into_bytes(), number as u32));
    }
}
