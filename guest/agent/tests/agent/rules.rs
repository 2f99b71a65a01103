//! What the agent does not stand for.

use kiln_protocol::frame::{HEADER_BYTES, Kind, header};
use kiln_protocol::{
    Call, Exec, Hello, INITIAL_CREDIT_BYTES, MAX_DATA_BYTES, Outcome, Reason, Request, Setup,
};
use prost::Message as _;
use std::io::Write as _;

use crate::guest::{Guest, Stream, exec, sh};

/// A command that holds a lock until it is gone.
fn holder(guest: &Guest) -> Stream {
    let exec = exec(["flock", "/tmp/lock", "sh", "-c", "echo ready; sleep 1000"]);
    let mut stream = guest.start(Exec { stdin: true, ..exec });
    stream.read_until("ready");
    stream
}

/// The connection has been closed, and the command behind it is gone.
fn assert_ended(guest: &Guest, mut stream: Stream) {
    while let Some((kind, _)) = stream.frame() {
        assert_ne!(kind, Kind::Exited, "a stream out of order has no orderly end");
    }
    assert_eq!(guest.sh("flock /tmp/lock echo free").text(), "free\n");
}

#[test]
fn hello_is_answered_with_who_is_there() {
    match Guest::bare().call(Call::Hello(Hello {})) {
        Outcome::Welcome(welcome) => {
            assert_eq!(welcome.version, env!("CARGO_PKG_VERSION"));
            assert!(welcome.kernel.starts_with(|first: char| first.is_ascii_digit()), "{welcome:?}");
        }
        outcome => panic!("{outcome:?}"),
    }
}

#[test]
fn a_command_before_set_up_and_a_second_set_up_are_refused() {
    let guest = Guest::bare();
    assert_eq!(guest.refusal(sh("true")).0, Reason::Invalid);
    let setup = || Call::Setup(Setup { hostname: "box".into(), ..Setup::default() });
    assert!(matches!(guest.call(setup()), Outcome::Done(_)));
    assert!(matches!(guest.call(setup()), Outcome::Failed(failed) if failed.reason() == Reason::Invalid));
}

#[test]
fn more_stdin_than_there_is_credit_for_ends_the_stream() {
    let guest = Guest::with_reaper();
    let mut stream = holder(&guest);
    for _ in 0..=INITIAL_CREDIT_BYTES as usize / MAX_DATA_BYTES {
        // The agent may have closed the connection before the last.
        let _ = stream.try_send(Kind::Stdin, &vec![0; MAX_DATA_BYTES]);
    }
    assert_ended(&guest, stream);
}

#[test]
fn a_second_request_ends_the_stream() {
    let guest = Guest::with_reaper();
    let mut stream = holder(&guest);
    stream.request(Call::Hello(Hello {}));
    assert_ended(&guest, stream);
}

#[test]
fn what_is_no_frame_ends_the_stream() {
    let guest = Guest::with_reaper();
    for bytes in [vec![0xff; 64], header(Kind::Signal, 2).to_vec(), header(Kind::Exited, 0).to_vec()] {
        let mut stream = holder(&guest);
        stream.socket.write_all(&bytes).expect("the agent reads");
        if bytes.len() == HEADER_BYTES {
            let _ = stream.socket.write_all(&[1, 2]);
        }
        assert_ended(&guest, stream);
    }
}

#[test]
fn a_stream_that_begins_with_anything_but_a_request_is_closed() {
    let guest = Guest::bare();
    for (kind, payload) in [
        (Kind::Stdin, &b"x"[..]),
        (Kind::Request, &[0xff]),
        (Kind::Request, &Request { call: None }.encode_to_vec()),
    ] {
        let mut stream = guest.connect();
        stream.send(kind, payload);
        assert_eq!(stream.frame(), None);
    }
}

#[test]
fn a_connection_too_many_is_closed_and_one_that_ends_makes_room() {
    let guest = Guest::bare();
    let mut idle: Vec<Stream> = (0..128).map(|_| guest.connect()).collect();
    assert_eq!(guest.connect().frame(), None);
    let mut last = idle.pop().expect("128 of them");
    last.request(Call::Hello(Hello {}));
    assert!(matches!(last.reply(), Outcome::Welcome(_)));
    assert_eq!(last.frame(), None);
    assert!(matches!(guest.call(Call::Hello(Hello {})), Outcome::Welcome(_)));
}

#[test]
fn a_signal_that_is_none_is_nothing() {
    let guest = Guest::new();
    let mut stream = guest.start(Exec { stdin: true, ..sh("echo ready; read line; exit 4") });
    stream.read_until("ready");
    for number in [0, 65, 1 << 20, u32::MAX] {
        stream.signal(number);
    }
    stream.stdin(b"\n");
    assert_eq!(stream.finish().exited.code, 4);
}
