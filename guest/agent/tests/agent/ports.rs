//! TCP ports of the guest. The tests' guests have the host's network, so the tests listen themselves.

use std::io::{Read as _, Write as _};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::thread::JoinHandle;

use kiln_protocol::{Call, Dial, Outcome, Reason};

use crate::guest::{ANSWERED_WITHIN, Guest, Stream};

/// As many as the agent carries.
const MAX_RELAYS: usize = 64;

/// A listener on a port that the system picks, and the port.
fn listener(address: &str) -> (TcpListener, u16) {
    let listener = TcpListener::bind((address, 0)).expect("a port");
    let port = listener.local_addr().expect("an address").port();
    (listener, port)
}

/// What a server makes of its one connection.
fn serve<T: Send + 'static>(
    listener: TcpListener,
    serve: impl FnOnce(TcpStream) -> T + Send + 'static,
) -> JoinHandle<T> {
    std::thread::spawn(move || {
        let (stream, _) = listener.accept().expect("a connection");
        stream.set_read_timeout(Some(ANSWERED_WITHIN)).expect("a socket");
        serve(stream)
    })
}

fn try_dial(guest: &Guest, port: u32) -> (Stream, Outcome) {
    let mut stream = guest.connect();
    stream.request(Call::Dial(Dial { port }));
    let outcome = stream.reply();
    (stream, outcome)
}

fn dial(guest: &Guest, port: u16) -> Stream {
    let (stream, outcome) = try_dial(guest, port.into());
    assert!(matches!(outcome, Outcome::Done(_)), "{outcome:?}");
    stream
}

fn refusal(outcome: &Outcome) -> Reason {
    match outcome {
        Outcome::Failed(failed) => failed.reason(),
        outcome => panic!("not refused: {outcome:?}"),
    }
}

#[test]
fn bytes_pass_both_ways_and_each_way_ends_by_itself() {
    for address in ["127.0.0.1", "::1"] {
        let guest = Guest::with_reaper();
        let (listener, port) = listener(address);
        let server = serve(listener, |mut stream| {
            stream.write_all(b"hello").expect("a client that reads");
            let mut heard = vec![];
            stream.read_to_end(&mut heard).expect("a client that ends its side");
            // It has, and still hears.
            stream.write_all(&heard).expect("a client that reads");
            heard.len()
        });
        let mut stream = dial(&guest, port);
        let mut greeting = [0; 5];
        stream.socket.read_exact(&mut greeting).expect("a greeting");
        assert_eq!(&greeting, b"hello");
        let sent: Vec<u8> = (0..3_000_000_u32).map(|at| (at % 251) as u8).collect();
        stream.socket.write_all(&sent).expect("a server that reads");
        stream.socket.shutdown(Shutdown::Write).expect("a socket");
        let mut heard = vec![];
        stream.socket.read_to_end(&mut heard).expect("a server that ends");
        assert!(heard == sent);
        assert_eq!(server.join().expect("a server"), sent.len());
    }
}

#[test]
fn a_server_that_has_said_all_still_listens() {
    let guest = Guest::with_reaper();
    let (listener, port) = listener("127.0.0.1");
    let server = serve(listener, |mut stream| {
        stream.shutdown(Shutdown::Write).expect("a socket");
        let mut heard = String::new();
        stream.read_to_string(&mut heard).expect("a client that ends");
        heard
    });
    let mut stream = dial(&guest, port);
    assert_eq!(stream.socket.read(&mut [0]).expect("an end"), 0);
    stream.socket.write_all(b"still").expect("a server that reads");
    stream.socket.shutdown(Shutdown::Write).expect("a socket");
    assert_eq!(server.join().expect("a server"), "still");
}

#[test]
fn a_port_on_which_nothing_listens_is_refused_and_what_is_none_too() {
    let bare = Guest::bare();
    assert_eq!(refusal(&try_dial(&bare, 80).1), Reason::Invalid);
    let guest = Guest::with_reaper();
    let (_, port) = listener("127.0.0.1");
    assert_eq!(refusal(&try_dial(&guest, port.into()).1), Reason::NotListening);
    for port in [0, 1 << 16, u32::MAX] {
        assert_eq!(refusal(&try_dial(&guest, port).1), Reason::Invalid, "{port}");
    }
}

#[test]
fn a_server_that_goes_before_it_takes_a_connection_is_none() {
    let guest = Guest::with_reaper();
    // Many at once, so that between a connection and word of it is time for the server to go.
    for after in 0..100 {
        let (listener, port) = listener("127.0.0.1");
        let mut streams: Vec<_> = (0..MAX_RELAYS / 2).map(|_| guest.connect()).collect();
        for stream in &mut streams {
            stream.request(Call::Dial(Dial { port: port.into() }));
        }
        (0..after * 1000).for_each(|_| std::hint::spin_loop());
        drop(listener);
        for mut stream in streams {
            match stream.reply() {
                Outcome::Done(_) => {}
                outcome => assert_eq!(refusal(&outcome), Reason::NotListening, "{outcome:?}"),
            }
        }
    }
}

#[test]
fn a_client_that_goes_takes_its_connection_along() {
    let guest = Guest::with_reaper();
    let (listener, port) = listener("127.0.0.1");
    let server = serve(listener, |mut stream| {
        let endless = vec![0; 1 << 16];
        // It never reads: what it learns of its client's end it learns by writing.
        while stream.write_all(&endless).is_ok() {}
    });
    let mut stream = dial(&guest, port);
    stream.socket.read_exact(&mut [0; 100]).expect("something");
    drop(stream);
    server.join().expect("a server that learns of it");
}

#[test]
fn floods_that_nobody_reads_leave_commands_their_place() {
    let guest = Guest::with_reaper();
    let (listener, port) = listener("127.0.0.1");
    let server = std::thread::spawn(move || {
        let floods: Vec<_> = (0..MAX_RELAYS)
            .map(|_| {
                let (mut stream, _) = listener.accept().expect("a connection");
                std::thread::spawn(move || {
                    let endless = vec![0; 1 << 16];
                    while stream.write_all(&endless).is_ok() {}
                })
            })
            .collect();
        for flood in floods {
            flood.join().expect("a flood that ends");
        }
    });
    let mut streams: Vec<_> = (0..MAX_RELAYS).map(|_| dial(&guest, port)).collect();
    assert_eq!(refusal(&try_dial(&guest, port.into()).1), Reason::Busy);
    assert_eq!(guest.sh("echo served").text(), "served\n");
    // One that is read all the time takes no more than its turn.
    let mut read = streams.pop().expect("one");
    let reader = std::thread::spawn(move || {
        let mut taken = vec![0; 1 << 16];
        for _ in 0..2000 {
            read.socket.read_exact(&mut taken).expect("an endless stream");
        }
    });
    for _ in 0..20 {
        assert_eq!(guest.sh("echo served").text(), "served\n");
    }
    reader.join().expect("a reader");
    drop(streams);
    server.join().expect("a server");
}
