//! Files that the host writes into the guest, and what it waits for.

use std::io::Read as _;

use kiln_protocol::frame::Kind;
use kiln_protocol::{
    Await, Awaited, Call, MAX_FILE_BYTES, MAX_FILE_PART_BYTES, Outcome, RemoveFile, WriteFile,
};

use crate::guest::{Guest, Stream, sh};

fn part(path: &str, offset: u64, contents: &[u8]) -> Call {
    Call::WriteFile(WriteFile { path: path.into(), mode: 0o751, offset, contents: contents.into() })
}

fn refusal(outcome: Outcome) -> String {
    match outcome {
        Outcome::Failed(failed) => failed.message,
        outcome => panic!("not refused: {outcome:?}"),
    }
}

fn done(outcome: &Outcome) {
    assert!(matches!(outcome, Outcome::Done(_)), "{outcome:?}");
}

#[test]
fn a_file_is_there_for_commands_and_gone_when_removed() {
    let guest = Guest::with_reaper();
    let first = vec![b'x'; MAX_FILE_PART_BYTES];
    done(&guest.call(part("/srv/deep/file", 0, &first)));
    done(&guest.call(part("/srv/deep/file", MAX_FILE_PART_BYTES as u64, b"end")));
    let found = guest.sh("stat -c '%a %u %s' /srv/deep/file; tail -c 4 /srv/deep/file");
    assert_eq!(found.text(), format!("751 0 {}\nxend", MAX_FILE_PART_BYTES + 3));
    for _ in 0..2 {
        done(&guest.call(Call::RemoveFile(RemoveFile { path: "/srv/deep/file".into() })));
    }
    assert_eq!(guest.sh("ls /srv/deep").text(), "");
}

#[test]
fn what_is_no_place_for_a_file_is_refused() {
    let refused = refusal(Guest::bare().call(part("/early", 0, b"x")));
    assert!(refused.contains("not been set up"), "{refused}");
    let guest = Guest::with_reaper();
    for path in ["", "relative", "/tmp/", "/nul\0", &format!("/{}", "a".repeat(5000))] {
        assert!(refusal(guest.call(part(path, 0, b"x"))).contains("absolute path"), "{path}");
    }
    assert!(refusal(guest.call(part("/tmp", 0, b"x"))).contains("is a directory"));
    assert!(refusal(guest.call(part("/etc/passwd/x", 0, b"x"))).contains("not a directory"));
    assert!(refusal(guest.call(part("/tmp/x", 7, b"x"))).contains("no such file"));
    assert!(refusal(guest.call(part("/tmp/x", MAX_FILE_BYTES, b"x"))).contains("more than"));
    assert!(refusal(guest.call(part("/tmp/x", u64::MAX, b"x"))).contains("more than"));
    let large = vec![0; MAX_FILE_PART_BYTES + 1];
    assert!(refusal(guest.call(part("/tmp/x", 0, &large))).contains("more than"));
    assert_eq!(guest.sh("ls /tmp").text(), "");
}

#[test]
fn links_of_the_image_end_inside_it() {
    let guest = Guest::with_reaper();
    assert_eq!(
        guest.sh("mkdir /srv; ln -s ../../../../../../srv /tmp/up; ln -s /etc/passwd /tmp/link").text(),
        ""
    );
    done(&guest.call(part("/tmp/up/file", 0, b"inside")));
    done(&guest.call(part("/tmp/link", 0, b"not passwd")));
    let found = guest.sh("cat /srv/file; echo; cat /tmp/link; echo; head -c 4 /etc/passwd");
    assert_eq!(found.text(), "inside\nnot passwd\nroot");
    assert!(!std::path::Path::new("/srv/file").exists());
}

fn wait_for(guest: &Guest, awaited: Awaited) -> Stream {
    let mut stream = guest.connect();
    stream.request(Call::Await(Await { awaited: Some(awaited) }));
    stream
}

#[test]
fn a_port_and_a_file_are_told_when_they_are_there() {
    let guest = Guest::with_reaper();
    // The tests' guests have the host's network: a port of the test's own is one that the system picks.
    let free =
        std::net::TcpListener::bind("127.0.0.1:0").expect("a port").local_addr().expect("a port").port();
    let mut port = wait_for(&guest, Awaited::Port(free.into()));
    let mut file = wait_for(&guest, Awaited::File("/tmp/a/ready".into()));
    assert_eq!(guest.sh("mkdir /tmp/a; echo >/tmp/a/other; mv /tmp/a/other /tmp/a/ready").text(), "");
    done(&file.reply());
    let listener = std::net::TcpListener::bind(("127.0.0.1", free)).expect("the port is still free");
    done(&port.reply());
    drop(listener);
    // What is there already is told at once.
    done(&wait_for(&guest, Awaited::File("/tmp/a/ready".into())).reply());
}

#[test]
fn who_waits_can_go_and_says_nothing_more() {
    let guest = Guest::with_reaper();
    drop(wait_for(&guest, Awaited::File("/tmp/never".into())));
    let mut stream = wait_for(&guest, Awaited::Port(1));
    stream.send(Kind::StdinEnd, &[]);
    let read = stream.socket.read(&mut [0]).expect("a frame out of place ends the stream");
    assert_eq!(read, 0);
    assert_eq!(guest.run(sh("echo served")).text(), "served\n");
}
