//! The socket device, driven through its registers and its queues by a guest that keeps the rules, or breaks them.

use std::io::{self, Read, Write};
use std::net::Shutdown;
use std::os::unix::net::{UnixListener, UnixStream};
use std::sync::mpsc;
use std::thread;

use kiln_memory::{Gpa, Span};

use super::connection::CONNECTION_BUFFER_BYTES;
use super::packet::*;
use super::*;
use crate::Transport;
use crate::testing::Driver;

const CID: u64 = 5;
const RAM_BYTES: u64 = 16 << 20;
/// Receive buffers of the guest, one page each as Linux has them; and places for packets it sends.
const RX_BUFFERS: u64 = 0x20_0000;
const RX_BUFFER_BYTES: usize = 4096;
const RX_BUFFER_COUNT: usize = 64;
const TX_BUFFERS: u64 = 0x80_0000;
const TX_BUFFER_BYTES: u64 = 0x1_1000;

/// The guest's vsock driver, one packet at a time.
struct Guest {
    driver: Driver,
    /// The buffer behind each head of the receive queue.
    rx_buffers: HashMap<u16, Gpa>,
    tx_next: u64,
}

impl Guest {
    fn start() -> (Self, VsockPorts) {
        let (mut guest, ports) = Self::without_buffers();
        for n in 0..RX_BUFFER_COUNT {
            guest.give_buffer(Gpa(RX_BUFFERS + (n * RX_BUFFER_BYTES) as u64));
        }
        guest.driver.kick(RX as u32);
        (guest, ports)
    }

    fn without_buffers() -> (Self, VsockPorts) {
        let (device, ports) = Vsock::new(CID);
        let mut driver = Driver::attach(Box::new(device), RAM_BYTES);
        let offered = driver.offered();
        driver.bring_up(offered);
        assert_eq!(driver.read(0x70), 15);
        (Self { driver, rx_buffers: HashMap::new(), tx_next: 0 }, ports)
    }

    fn give_buffer(&mut self, at: Gpa) {
        let head =
            self.driver.queues[RX].submit(&[], &[Span::new(at, RX_BUFFER_BYTES)]).expect("a free descriptor");
        self.rx_buffers.insert(head, at);
    }

    /// The next packet from the device; its buffer goes back.
    fn receive(&mut self) -> (Header, Vec<u8>) {
        let (head, written) = self.driver.wait_used(RX);
        let packet = self.take(head, written);
        self.driver.kick(RX as u32);
        packet
    }

    /// A packet that is there already.
    fn try_receive(&mut self) -> Option<(Header, Vec<u8>)> {
        let (head, written) = self.driver.queues[RX].take_used()?;
        let packet = self.take(head, written);
        self.driver.kick(RX as u32);
        Some(packet)
    }

    fn take(&mut self, head: u16, written: u32) -> (Header, Vec<u8>) {
        let at = self.rx_buffers.remove(&head).expect("a buffer of ours");
        let mut bytes = vec![0; written as usize];
        self.driver.memory.read(at, &mut bytes).expect("RAM");
        let payload = bytes.split_off(HEADER_BYTES);
        let header = Header::decode(&bytes.try_into().expect("a whole header"));
        assert_eq!(header.len as usize, payload.len());
        assert_eq!((header.src_cid, header.dst_cid, header.kind), (HOST_CID, CID, TYPE_STREAM));
        self.give_buffer(at);
        (header, payload)
    }

    fn expect(&mut self, op: u16) -> (Header, Vec<u8>) {
        let packet = self.receive();
        assert_eq!(packet.0.op, op, "{packet:?}");
        packet
    }

    /// Sends a packet and waits until the device has taken it.
    fn send(&mut self, header: &Header, payload: &[u8]) {
        let at = TX_BUFFERS + self.tx_next * TX_BUFFER_BYTES;
        self.tx_next = (self.tx_next + 1) % 32;
        self.driver.memory.write(Gpa(at), &header.encode()).expect("RAM");
        self.driver.memory.write(Gpa(at + 64), payload).expect("RAM");
        let spans = [Span::new(Gpa(at), HEADER_BYTES), Span::new(Gpa(at + 64), payload.len())];
        let spans = if payload.is_empty() { &spans[..1] } else { &spans[..] };
        self.driver.queues[TX].submit(spans, &[]).expect("a free descriptor");
        self.driver.kick(TX as u32);
        self.driver.wait_used(TX);
    }

    /// The packet `op` for the connection of `host` and `guest` ports, from a guest with 64 KiB of room.
    fn packet(host: u32, guest: u32, op: u16) -> Header {
        Header {
            src_cid: CID,
            dst_cid: HOST_CID,
            src_port: guest,
            dst_port: host,
            kind: TYPE_STREAM,
            op,
            buf_alloc: 64 << 10,
            ..Header::default()
        }
    }

    fn data(&mut self, host: u32, guest: u32, payload: &[u8]) {
        let header = Header { len: payload.len() as u32, ..Self::packet(host, guest, OP_RW) };
        self.send(&header, payload);
    }

    /// Answers the device's request for a connection to `port` and gives its host port.
    fn accept(&mut self, port: u32) -> u32 {
        let (request, _) = self.expect(OP_REQUEST);
        assert_eq!(request.dst_port, port);
        assert_eq!(request.buf_alloc, CONNECTION_BUFFER_BYTES);
        self.send(&Self::packet(request.src_port, port, OP_RESPONSE), &[]);
        request.src_port
    }

    /// A connection from the host to guest port 1024, accepted: the host's end and its port.
    fn connected(&mut self, ports: &VsockPorts) -> (UnixStream, u32) {
        let (host, device) = UnixStream::pair().expect("a socket pair");
        ports.connect(1024, device.into()).expect("running");
        let port = self.accept(1024);
        (host, port)
    }

    fn read_data(&mut self, bytes: usize) -> Vec<u8> {
        let mut all = Vec::new();
        while all.len() < bytes {
            all.extend(self.expect(OP_RW).1);
        }
        all
    }
}

/// Whether `stream` was closed by the device.
fn is_closed(mut stream: &UnixStream) -> bool {
    let mut byte = [0];
    matches!(stream.read(&mut byte), Ok(0) | Err(_))
}

fn read_exactly(mut stream: &UnixStream, bytes: usize) -> Vec<u8> {
    let mut data = vec![0; bytes];
    stream.read_exact(&mut data).expect("so many bytes");
    data
}

#[test]
fn the_guest_reads_its_context_id() {
    let (guest, _ports) = Guest::start();
    let words = [0x100, 0x104, 0x108].map(|offset| guest.driver.read(offset));
    assert_eq!(words, [CID as u32, 0, 0]);
}

#[test]
fn bytes_flow_both_ways_on_a_connection_from_the_host() {
    let (mut guest, ports) = Guest::start();
    let (mut host, device) = UnixStream::pair().expect("a socket pair");
    // Written before the guest has accepted, and not lost.
    host.write_all(b"early").expect("written");
    ports.connect(1024, device.into()).expect("running");
    let port = guest.accept(1024);
    assert_eq!(guest.read_data(5), b"early");
    host.write_all(b"later").expect("written");
    assert_eq!(guest.read_data(5), b"later");
    guest.data(port, 1024, b"answer");
    assert_eq!(read_exactly(&host, 6), b"answer");
}

#[test]
fn a_guest_that_refuses_closes_the_socket() {
    let (mut guest, ports) = Guest::start();
    let (host, device) = UnixStream::pair().expect("a socket pair");
    ports.connect(77, device.into()).expect("running");
    let (request, _) = guest.expect(OP_REQUEST);
    guest.send(&Guest::packet(request.src_port, 77, OP_RST), &[]);
    assert!(is_closed(&host));
}

#[test]
fn the_guest_connects_to_a_unix_socket_of_the_host() {
    let folder = tempfile::tempdir().expect("a folder");
    let path = folder.path().join("socket");
    let listener = UnixListener::bind(&path).expect("bound");
    let (mut guest, ports) = Guest::start();
    assert!(ports.listen(80, unix_connector(&path).expect("a short path")));
    guest.send(&Guest::packet(80, 9, OP_REQUEST), &[]);
    let (response, _) = guest.expect(OP_RESPONSE);
    assert_eq!((response.src_port, response.dst_port), (80, 9));
    let (mut host, _) = listener.accept().expect("a connection");
    guest.data(80, 9, b"GET /");
    assert_eq!(read_exactly(&host, 5), b"GET /");
    host.write_all(b"200").expect("written");
    assert_eq!(guest.read_data(3), b"200");
}

#[test]
fn a_port_nobody_gave_to_the_guest_refuses() {
    let (mut guest, ports) = Guest::start();
    guest.send(&Guest::packet(80, 9, OP_REQUEST), &[]);
    let (reset, _) = guest.expect(OP_RST);
    assert_eq!((reset.src_port, reset.dst_port), (80, 9));
    // One whose socket cannot be opened too.
    assert!(ports.listen(80, Box::new(|| Err(io::ErrorKind::ConnectionRefused.into()))));
    guest.send(&Guest::packet(80, 9, OP_REQUEST), &[]);
    guest.expect(OP_RST);
}

#[test]
fn ports_for_the_guest_are_limited() {
    let (_guest, ports) = Guest::start();
    let nothing = || -> OpenStream { Box::new(|| Err(io::ErrorKind::ConnectionRefused.into())) };
    for port in 0..64 {
        assert!(ports.listen(port, nothing()));
    }
    assert!(!ports.listen(64, nothing()));
    assert!(ports.listen(63, nothing()), "one that is there can be replaced");
}

#[test]
fn connecting_without_a_running_device_is_refused() {
    let (device, ports) = Vsock::new(CID);
    let (_host, end) = UnixStream::pair().expect("a socket pair");
    assert_eq!(ports.connect(1, end.into()), Err(ConnectError::NotRunning));
    drop(device);
    let (guest, ports) = Guest::start();
    guest.driver.write(0x70, 0);
    let (_host, end) = UnixStream::pair().expect("a socket pair");
    assert_eq!(ports.connect(1, end.into()), Err(ConnectError::NotRunning));
}

#[test]
fn a_reset_of_the_device_closes_all_sockets() {
    let (mut guest, ports) = Guest::start();
    let (host, _) = guest.connected(&ports);
    guest.driver.write(0x70, 0);
    assert!(is_closed(&host));
}

#[test]
fn half_close_by_the_host_reaches_the_guest_which_can_still_answer() {
    let (mut guest, ports) = Guest::start();
    let (mut host, port) = guest.connected(&ports);
    host.write_all(b"question").expect("written");
    host.shutdown(Shutdown::Write).expect("half closed");
    assert_eq!(guest.read_data(8), b"question");
    let (shutdown, _) = guest.expect(OP_SHUTDOWN);
    assert_eq!(shutdown.flags, SHUTDOWN_SEND);
    guest.data(port, 1024, b"answer");
    assert_eq!(read_exactly(&host, 6), b"answer");
}

#[test]
fn half_close_by_the_guest_reaches_the_host_which_can_still_answer() {
    let (mut guest, ports) = Guest::start();
    let (mut host, port) = guest.connected(&ports);
    guest.data(port, 1024, b"question");
    guest.send(&Header { flags: SHUTDOWN_SEND, ..Guest::packet(port, 1024, OP_SHUTDOWN) }, &[]);
    let mut question = Vec::new();
    (&host).read_to_end(&mut question).expect("an end");
    assert_eq!(question, b"question");
    host.write_all(b"answer").expect("written");
    assert_eq!(guest.read_data(6), b"answer");
    // Data after the end of data breaks the rules.
    guest.data(port, 1024, b"more");
    guest.expect(OP_RST);
}

#[test]
fn a_host_that_closes_is_told_to_the_guest_after_its_data() {
    let (mut guest, ports) = Guest::start();
    let (mut host, _) = guest.connected(&ports);
    host.write_all(&[7; 10_000]).expect("written");
    drop(host);
    assert_eq!(guest.read_data(10_000), [7; 10_000]);
    let mut flags = 0;
    while flags != SHUTDOWN_SEND | SHUTDOWN_RECEIVE {
        flags |= guest.expect(OP_SHUTDOWN).0.flags;
    }
}

#[test]
fn a_guest_that_closes_gets_its_reset_at_once_and_its_data_delivered() {
    let (mut guest, ports) = Guest::start();
    let (host, port) = guest.connected(&ports);
    // More than the socket takes, so that some is kept by the device.
    let mut sent = 0_usize;
    let mut header = Guest::packet(port, 1024, OP_RW);
    header.len = 32 << 10;
    let (mut told, mut room) = (0, CONNECTION_BUFFER_BYTES as usize);
    while room >= 32 << 10 {
        guest.send(&header, &vec![sent as u8; 32 << 10]);
        sent += 32 << 10;
        while let Some((update, _)) = guest.try_receive() {
            assert_eq!(update.op, OP_CREDIT_UPDATE);
            told = update.fwd_cnt as usize;
        }
        room = CONNECTION_BUFFER_BYTES as usize - (sent - told);
    }
    let both = SHUTDOWN_SEND | SHUTDOWN_RECEIVE;
    guest.send(&Header { flags: both, ..Guest::packet(port, 1024, OP_SHUTDOWN) }, &[]);
    while guest.receive().0.op != OP_RST {}
    // Impatient guests reset on top of it.
    guest.send(&Guest::packet(port, 1024, OP_RST), &[]);
    let mut data = Vec::new();
    (&host).read_to_end(&mut data).expect("an end");
    assert_eq!(data.len(), sent);
}

#[test]
fn a_reset_by_the_guest_closes_the_socket() {
    let (mut guest, ports) = Guest::start();
    let (host, port) = guest.connected(&ports);
    guest.send(&Guest::packet(port, 1024, OP_RST), &[]);
    assert!(is_closed(&host));
    // Nothing is left of it: more of the same is refused like anything unknown, but for resets.
    guest.send(&Guest::packet(port, 1024, OP_RST), &[]);
    guest.data(port, 1024, b"x");
    guest.expect(OP_RST);
}

#[test]
fn data_stops_at_the_guests_credit_and_goes_on_with_more() {
    let (mut guest, ports) = Guest::start();
    let (host, port) = guest.connected(&ports);
    let writer = thread::spawn(move || {
        (&host).write_all(&vec![1; 200_000]).expect("written");
        host
    });
    assert_eq!(guest.read_data(64 << 10).len(), 64 << 10, "all its buffer and not a byte more");
    // An exchange with the device, to be sure that it had its chance to send more.
    guest.send(&Guest::packet(1, 1, OP_RW), &[]);
    guest.expect(OP_RST);
    let mut taken = 64 << 10;
    while taken < 200_000 {
        let update = Header { fwd_cnt: taken, ..Guest::packet(port, 1024, OP_CREDIT_UPDATE) };
        guest.send(&update, &[]);
        let wanted = (64 << 10).min(200_000 - taken as usize);
        let got = guest.read_data(wanted).len();
        assert_eq!(got, wanted);
        taken += got as u32;
    }
    drop(writer.join().expect("no panic"));
}

#[test]
fn nonsense_credit_is_no_credit() {
    let (mut guest, ports) = Guest::start();
    let (mut host, port) = guest.connected(&ports);
    // It has taken more than it ever got.
    let nonsense =
        Header { fwd_cnt: 1 << 31, buf_alloc: 1000, ..Guest::packet(port, 1024, OP_CREDIT_UPDATE) };
    guest.send(&nonsense, &[]);
    host.write_all(b"x").expect("written");
    guest.send(&Guest::packet(1, 1, OP_RW), &[]);
    guest.expect(OP_RST);
    let sane = Guest::packet(port, 1024, OP_CREDIT_UPDATE);
    guest.send(&sane, &[]);
    assert_eq!(guest.read_data(1), b"x");
}

#[test]
fn a_credit_request_is_answered() {
    let (mut guest, ports) = Guest::start();
    let (host, port) = guest.connected(&ports);
    guest.data(port, 1024, b"12345");
    read_exactly(&host, 5);
    guest.send(&Guest::packet(port, 1024, OP_CREDIT_REQUEST), &[]);
    let (update, _) = guest.expect(OP_CREDIT_UPDATE);
    assert_eq!((update.buf_alloc, update.fwd_cnt), (CONNECTION_BUFFER_BYTES, 5));
}

#[test]
fn a_guest_that_ignores_its_credit_loses_the_connection() {
    let (mut guest, ports) = Guest::start();
    let (host, port) = guest.connected(&ports);
    let mut sent = 0;
    let reset = loop {
        guest.data(port, 1024, &vec![1; 64 << 10]);
        sent += 64 << 10;
        assert!(sent < 16 << 20, "the device takes without end");
        if let Some((header, _)) = guest.try_receive()
            && header.op != OP_CREDIT_UPDATE
        {
            break header;
        }
    };
    assert_eq!(reset.op, OP_RST);
    drop(host);
}

/// REGRESSIONS 13: 1 GiB into a slow reader keeps host memory bounded.
#[test]
fn a_gibibyte_into_a_slow_reader_waits_in_the_guest() {
    const TOTAL: usize = 1 << 30;
    let (mut guest, ports) = Guest::start();
    let (host, port) = guest.connected(&ports);
    // The reader takes a piece each time it is told to: as slow as a reader can be.
    let (take, turns) = mpsc::channel::<usize>();
    let (report, taken) = mpsc::channel::<usize>();
    let reader = thread::spawn(move || {
        let mut buffer = vec![0; 1 << 20];
        let mut checked = 0;
        for bytes in turns {
            let mut left = bytes;
            while left > 0 {
                let room = left.min(buffer.len());
                let count = (&host).read(&mut buffer[..room]).expect("data");
                assert!(count > 0, "the stream ended early");
                left -= count;
                let mut got = &buffer[..count];
                while !got.is_empty() {
                    let run = got.len().min(4096 - checked % 4096);
                    assert!(got[..run] == [(checked / 4096) as u8; 4096][..run], "at byte {checked}");
                    (got, checked) = (&got[run..], checked + run);
                }
            }
            report.send(bytes).expect("the test listens");
        }
    });
    let (mut sent, mut told, mut read, mut most_held) = (0_usize, 0_usize, 0_usize, 0_usize);
    while read < TOTAL {
        // As much as the credit allows.
        while sent < TOTAL && CONNECTION_BUFFER_BYTES as usize - (sent - told) >= 32 << 10 {
            let mut payload = vec![0; 32 << 10];
            for (page, bytes) in payload.chunks_mut(4096).enumerate() {
                bytes.fill((sent / 4096 + page) as u8);
            }
            guest.data(port, 1024, &payload);
            sent += payload.len();
            most_held = most_held.max(sent - read);
            while let Some((header, _)) = guest.try_receive() {
                assert_eq!(header.op, OP_CREDIT_UPDATE);
                told = told & !0xffff_ffff | header.fwd_cnt as usize;
            }
        }
        // No more fits: the reader takes most of it.
        let piece = (sent - read).min(96 << 10);
        take.send(piece).expect("the reader lives");
        read += taken.recv().expect("the reader lives");
        if sent < TOTAL && CONNECTION_BUFFER_BYTES as usize - (sent - told) < 32 << 10 {
            // Answered with what has left since.
            guest.send(&Guest::packet(port, 1024, OP_CREDIT_REQUEST), &[]);
            let (header, _) = guest.expect(OP_CREDIT_UPDATE);
            told = told & !0xffff_ffff | header.fwd_cnt as usize;
            while let Some((header, _)) = guest.try_receive() {
                told = told & !0xffff_ffff | header.fwd_cnt as usize;
            }
        }
    }
    drop(take);
    reader.join().expect("every byte was right");
    assert_eq!(sent, TOTAL);
    // Our buffer, and what the kernel's socket buffer holds (net.core.wmem_default, 208 KiB, and its overhead).
    assert!(most_held <= CONNECTION_BUFFER_BYTES as usize + (1 << 20), "{most_held} bytes held by the host");
}

#[test]
fn one_reader_that_never_reads_stalls_nobody_else() {
    let (mut guest, ports) = Guest::start();
    let (stuck, stuck_port) = guest.connected(&ports);
    // Fill the stuck one to the brim.
    let mut told = 0_u32;
    let mut sent = 0_u32;
    while CONNECTION_BUFFER_BYTES - (sent - told) >= 32 << 10 {
        guest.data(stuck_port, 1024, &vec![1; 32 << 10]);
        sent += 32 << 10;
        while let Some((header, _)) = guest.try_receive() {
            told = header.fwd_cnt;
        }
    }
    let (mut other, port) = guest.connected(&ports);
    for round in 0..50_u8 {
        guest.data(port, 1024, &[round; 1000]);
        assert_eq!(read_exactly(&other, 1000), [round; 1000]);
        other.write_all(&[round; 1000]).expect("written");
        assert_eq!(guest.read_data(1000), [round; 1000]);
    }
    drop(stuck);
}

#[test]
fn a_restored_guest_hears_that_its_connections_are_gone() {
    let (mut guest, ports) = Guest::start();
    let (_host, port) = guest.connected(&ports);
    let event = Gpa(TX_BUFFERS + 0x8000);
    guest.driver.memory.write_u32(event, 7).expect("RAM");
    guest.driver.queues[EVENT_QUEUE].submit(&[], &[Span::new(event, 4)]).expect("free");
    guest.driver.transport.pause();
    let saved = guest.driver.transport.save().expect("nothing is in flight");
    let (device, ports) = Vsock::new(CID);
    let (memory, line) = (guest.driver.memory.clone(), guest.driver.raised.clone());
    guest.driver.transport = Transport::restore(Box::new(device), memory, line, &saved).expect("restored");
    guest.driver.transport.resume();
    let (mut new, device) = UnixStream::pair().expect("a socket pair");
    new.write_all(b"new").expect("written");
    ports.connect(1024, device.into()).expect("running");
    assert_eq!(guest.driver.wait_used(EVENT_QUEUE), (0, 4));
    assert_eq!(guest.driver.memory.read_u32(event), Ok(EVENT_TRANSPORT_RESET));
    // What it still sends on one of them is answered by a reset. A new one waits until it has heard of the event.
    guest.data(port, 1, b"x");
    assert_eq!(guest.expect(OP_RST).0.src_port, port);
    guest.driver.queues[EVENT_QUEUE].submit(&[], &[Span::new(event, 4)]).expect("free");
    guest.driver.kick(EVENT_QUEUE as u32);
    assert_ne!(guest.accept(1024), port, "the guest may not have forgotten the old one");
    assert_eq!(guest.read_data(3), b"new");
}

#[test]
fn a_restored_guest_without_connections_hears_nothing() {
    let (mut guest, _ports) = Guest::start();
    let event = Gpa(TX_BUFFERS + 0x8000);
    guest.driver.queues[EVENT_QUEUE].submit(&[], &[Span::new(event, 4)]).expect("free");
    guest.driver.transport.pause();
    let saved = guest.driver.transport.save().expect("nothing is in flight");
    assert!(!saved.kept);
    let (device, ports) = Vsock::new(CID);
    let (memory, line) = (guest.driver.memory.clone(), guest.driver.raised.clone());
    guest.driver.transport = Transport::restore(Box::new(device), memory, line, &saved).expect("restored");
    guest.driver.transport.resume();
    guest.connected(&ports);
    assert_eq!(guest.driver.queues[EVENT_QUEUE].take_used(), None);
}

#[test]
fn one_writer_without_credit_stalls_nobody_else() {
    let (mut guest, ports) = Guest::start();
    let (mut stuck, _) = guest.connected(&ports);
    stuck.write_all(&vec![1; 100_000]).expect("the socket's buffer takes it");
    guest.read_data(64 << 10);
    let (mut other, port) = guest.connected(&ports);
    other.write_all(b"hello").expect("written");
    let (header, data) = guest.expect(OP_RW);
    assert_eq!((header.src_port, &data[..]), (port, &b"hello"[..]));
}

#[test]
fn a_guest_without_receive_buffers_keeps_nothing_from_being_taken() {
    let (mut guest, ports) = Guest::without_buffers();
    let (mut host, device) = UnixStream::pair().expect("a socket pair");
    host.write_all(b"early").expect("written");
    ports.connect(1024, device.into()).expect("running");
    // Refusals pile up to a limit, and then packets wait in their queue.
    for _ in 0..100 {
        guest.data(1, 1, b"x");
    }
    for n in 0..RX_BUFFER_COUNT {
        guest.give_buffer(Gpa(RX_BUFFERS + (n * RX_BUFFER_BYTES) as u64));
    }
    guest.driver.kick(RX as u32);
    let mut resets = 0;
    let mut requests = 0;
    while resets < 100 || requests < 1 {
        match guest.receive().0.op {
            OP_RST => resets += 1,
            OP_REQUEST => requests += 1,
            other => panic!("operation {other}"),
        }
    }
}

#[test]
fn refusals_are_bounded_and_none_is_lost() {
    let (mut guest, _ports) = Guest::without_buffers();
    let count = 1000_usize;
    let mut published = 0;
    // Not waiting for each: the device stops taking when 256 refusals wait.
    while published < 600 {
        let at = Gpa(TX_BUFFERS);
        guest.driver.memory.write(at, &Guest::packet(1, 1, OP_RW).encode()).expect("RAM");
        if guest.driver.queues[TX].submit(&[Span::new(at, HEADER_BYTES)], &[]).is_some() {
            published += 1;
            guest.driver.kick(TX as u32);
        } else if published >= 512 {
            break;
        } else {
            guest.driver.wait_used(TX);
        }
    }
    assert_eq!(published, 512, "256 refused, 256 waiting in the queue");
    for n in 0..RX_BUFFER_COUNT {
        guest.give_buffer(Gpa(RX_BUFFERS + (n * RX_BUFFER_BYTES) as u64));
    }
    guest.driver.kick(RX as u32);
    for _ in 0..published {
        guest.expect(OP_RST);
    }
    while guest.driver.queues[TX].take_used().is_some() {}
    for _ in published..count {
        guest.data(1, 1, b"");
        guest.expect(OP_RST);
    }
}

#[test]
fn packets_that_break_the_rules_are_refused() {
    let (mut guest, ports) = Guest::start();
    let good = |op| Guest::packet(80, 9, op);
    let unknown = [
        good(OP_RW),
        good(OP_RESPONSE),
        good(OP_SHUTDOWN),
        good(OP_CREDIT_UPDATE),
        good(OP_CREDIT_REQUEST),
        good(0),
        good(8),
        good(u16::MAX),
        Header { kind: 2, ..good(OP_REQUEST) },
        Header { kind: 0, ..good(OP_RW) },
        Header { len: 5, ..good(OP_RW) },
    ];
    for header in unknown {
        guest.send(&header, &[]);
        let (reset, _) = guest.expect(OP_RST);
        assert_eq!((reset.src_port, reset.dst_port), (80, 9), "{header:?}");
    }
    let (keep, ends) = mpsc::channel();
    let open = move || {
        let (device, host) = UnixStream::pair()?;
        keep.send(host).map_err(io::Error::other)?;
        Ok(device.into())
    };
    assert!(ports.listen(80, Box::new(open)));
    // On a live connection each of these ends it.
    let broken = [
        (good(OP_REQUEST), 0),
        (good(OP_RESPONSE), 0),
        (good(0), 0),
        (good(99), 0),
        (Header { kind: 2, ..good(OP_RW) }, 0),
        (Header { len: 3, ..good(OP_RW) }, 2),
        (Header { len: 2, ..good(OP_RW) }, 3),
        (Header { len: u32::MAX, ..good(OP_RW) }, 4),
        (Header { len: 1, ..good(OP_SHUTDOWN) }, 1),
        (Header { len: 0, ..good(OP_CREDIT_UPDATE) }, 1),
    ];
    for (header, payload) in broken {
        guest.send(&good(OP_REQUEST), &[]);
        guest.expect(OP_RESPONSE);
        guest.send(&header, &vec![0; payload]);
        guest.expect(OP_RST);
        // It is gone.
        guest.send(&good(OP_CREDIT_REQUEST), &[]);
        guest.expect(OP_RST);
        assert!(is_closed(&ends.recv().expect("the host's end")));
    }
}

#[test]
fn packets_of_other_context_ids_reach_nobody() {
    let (mut guest, ports) = Guest::start();
    let (host, port) = guest.connected(&ports);
    for cid in [0, 1, HOST_CID, CID + 1, u64::MAX] {
        // In another's name: no answer at all.
        guest.send(&Header { src_cid: cid, ..Guest::packet(port, 1024, OP_RST) }, &[]);
        // To another: refused in that one's name.
        if cid != HOST_CID {
            let header = Header { dst_cid: cid, ..Guest::packet(port, 1024, OP_RST) };
            guest.send(&header, &[]);
        }
    }
    guest.data(port, 1024, b"still there");
    assert_eq!(read_exactly(&host, 11), b"still there");
}

#[test]
fn a_response_before_the_request_arrived_opens_nothing() {
    // The guest guesses the port the device will use, without having been asked.
    let (mut guest, ports) = Guest::without_buffers();
    let (mut host, device) = UnixStream::pair().expect("a socket pair");
    ports.connect(1024, device.into()).expect("running");
    host.write_all(b"secret").expect("written");
    guest.send(&Guest::packet(1 << 30, 1024, OP_RESPONSE), &[]);
    assert!(is_closed(&host));
}

#[test]
fn connections_are_limited_and_their_places_used_again() {
    let (mut guest, ports) = Guest::start();
    assert!(ports.listen(80, Box::new(|| Ok(UnixStream::pair()?.0.into()))));
    for round in 0..2 {
        let most = MAX_CONNECTIONS as u32;
        for port in 0..most {
            guest.send(&Guest::packet(80, port, OP_REQUEST), &[]);
            assert_eq!(guest.receive().0.op, OP_RESPONSE, "round {round}, connection {port}");
            // The other end is closed already, which it is told.
            let mut flags = 0;
            while flags != SHUTDOWN_SEND | SHUTDOWN_RECEIVE {
                flags |= guest.expect(OP_SHUTDOWN).0.flags;
            }
        }
        guest.send(&Guest::packet(80, most, OP_REQUEST), &[]);
        guest.expect(OP_RST);
        // The host's are refused too.
        let (host, device) = UnixStream::pair().expect("a socket pair");
        ports.connect(1, device.into()).expect("queued");
        assert!(is_closed(&host));
        for port in 0..most {
            guest.send(&Guest::packet(80, port, OP_RST), &[]);
        }
    }
}

#[test]
fn a_packet_without_a_header_and_a_buffer_without_room_break_the_device() {
    let (mut guest, _ports) = Guest::start();
    guest.driver.queues[TX].submit(&[Span::new(Gpa(TX_BUFFERS), 43)], &[]).expect("free");
    guest.driver.kick(TX as u32);
    guest.driver.wait_broken();
    assert_eq!(guest.driver.transport.fault(), Some(Broken::RequestTooShort));

    let (mut guest, ports) = Guest::without_buffers();
    guest.driver.queues[RX].submit(&[], &[Span::new(Gpa(RX_BUFFERS), 44)]).expect("free");
    let (host, device) = UnixStream::pair().expect("a socket pair");
    ports.connect(1, device.into()).expect("running");
    guest.driver.wait_broken();
    assert_eq!(guest.driver.transport.fault(), Some(Broken::RequestTooShort));
    // It refuses from then on.
    let (_other, device) = UnixStream::pair().expect("a socket pair");
    let refused = loop {
        // The driver is told a moment before.
        let (_, end) = UnixStream::pair().expect("a socket pair");
        if ports.connect(1, end.into()).is_err() {
            break ports.connect(1, device.into());
        }
    };
    assert_eq!(refused, Err(ConnectError::NotRunning));
    guest.driver.write(0x70, 0);
    assert!(is_closed(&host));
}

#[test]
fn a_pause_keeps_connections() {
    let (mut device, ports) = Vsock::new(CID);
    let memory = kiln_memory::GuestMemory::new(RAM_BYTES).expect("mapped");
    let mut queues: Vec<_> = [0x1000, 0x4000, 0x8000]
        .map(|base| crate::testing::GuestQueue::new(&memory, Gpa(base), 8))
        .into_iter()
        .collect();
    let raised = Arc::new(crate::testing::Raised::default());
    let session = Session {
        features: 0,
        memory: memory.clone(),
        queues: queues
            .iter()
            .map(|queue| crate::Queue::new(&memory, queue.layout(), 8, false).expect("a queue"))
            .collect(),
        signal: Arc::new(crate::Signal::new(Arc::clone(&raised) as Arc<dyn crate::Interrupt>)),
        kept: None,
        restored: false,
        lost: false,
    };
    for n in 0..4_u64 {
        queues[RX].submit(&[], &[Span::new(Gpa(RX_BUFFERS + n * 4096), 4096)]).expect("free");
    }
    device.start(session).expect("started");
    let (mut host, end) = UnixStream::pair().expect("a socket pair");
    ports.connect(1024, end.into()).expect("running");
    let next = |queues: &mut Vec<crate::testing::GuestQueue>| loop {
        let seen = raised.count();
        if let Some((_, written)) = queues[RX].take_used() {
            break written as usize;
        }
        raised.wait_past(seen);
    };
    assert_eq!(next(&mut queues), HEADER_BYTES);
    let session = device.stop().expect("was running");
    assert_eq!(ports.connect(1, UnixStream::pair().expect("a pair").1.into()), Err(ConnectError::NotRunning));
    host.write_all(b"while paused").expect("written");
    let answer = Guest::packet(1 << 30, 1024, OP_RESPONSE);
    memory.write(Gpa(TX_BUFFERS), &answer.encode()).expect("RAM");
    queues[TX].submit(&[Span::new(Gpa(TX_BUFFERS), HEADER_BYTES)], &[]).expect("free");
    device.start(session).expect("started again");
    assert_eq!(next(&mut queues), HEADER_BYTES + 12);
    drop(device);
    assert!(is_closed(&host));
}
