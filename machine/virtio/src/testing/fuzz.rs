//! One function for each place where a guest's bytes enter: the body of a fuzz target, and of tests.

use std::fs::File;
use std::os::unix::net::UnixStream;
use std::sync::Arc;

use kiln_memory::{Gpa, GuestMemory, Span};

use super::{Driver, GuestQueue, Raised};
use crate::{
    Block, DataFile, Disk, Extent, Interrupt, MAX_QUEUE_ENTRIES, Queue, Rng, Session, Signal, vsock,
};

const RAM_BYTES: u64 = 1 << 20;
const RINGS: Gpa = Gpa(0x1000);
const BUFFERS: Gpa = Gpa(0x1_0000);
const ENTRIES: u16 = 16;

/// Takes all a queue gives whose rings and table hold `bytes`, and panics when a chain is not what it must be.
pub fn fuzz_queue(bytes: &[u8]) {
    let memory = GuestMemory::new(RAM_BYTES).expect("guest memory");
    let driver = GuestQueue::new(&memory, RINGS, ENTRIES);
    let rings = &bytes[..bytes.len().min(GuestQueue::ring_bytes(ENTRIES))];
    memory.write(RINGS, rings).expect("RAM");
    for event_idx in [false, true] {
        let mut queue = Queue::new(&memory, driver.layout(), ENTRIES, event_idx).expect("a sane layout");
        let mut held = Vec::new();
        while let Ok(Some(chain)) = queue.pop(&memory) {
            let spans = || chain.readable().iter().chain(chain.writable());
            assert!(spans().all(|&span| memory.check(span).is_ok()), "a buffer outside RAM");
            assert!((1..=usize::from(ENTRIES)).contains(&spans().count()), "a chain of impossible length");
            let total: u64 = spans().map(|span| span.bytes as u64).sum();
            assert_eq!(total, u64::from(chain.readable_bytes()) + u64::from(chain.writable_bytes()));
            held.push(chain);
        }
        assert!(held.len() <= usize::from(MAX_QUEUE_ENTRIES), "more requests than descriptors");
        for chain in held {
            let written = chain.writable_bytes();
            queue.push(&memory, chain, written).expect("RAM");
            let _ = queue.wants_interrupt(&memory);
        }
        let _ = queue.enable_kicks(&memory);
    }
}

/// Performs the register accesses that `bytes` describe, 14 bytes each: kind, width, offset, value.
pub fn fuzz_registers(bytes: &[u8]) {
    let mut driver = Driver::attach(Box::new(Rng::new()), 4 << 20);
    if bytes.first().is_some_and(|first| first & 0x80 != 0) {
        let offered = driver.offered();
        driver.bring_up(offered);
    }
    for access in bytes.chunks_exact(14) {
        let width = 1_usize << (access[1] % 4);
        let offset = u64::from(u32::from_le_bytes([access[2], access[3], access[4], access[5]]) % 0x1010);
        let mut value: [u8; 8] = access[6..].try_into().expect("8 bytes");
        if access[0] & 1 == 0 {
            driver.transport.write(offset, &value[..width]);
        } else {
            driver.transport.read(offset, &mut value[..width]);
        }
        let status = driver.read(0x70);
        assert_eq!(status & 64 != 0, driver.transport.fault().is_some(), "status {status:#x}");
        assert!(
            status & 4 == 0 || status & 0xb == 0xb,
            "status {status:#x}: running without the steps before"
        );
    }
}

/// Sends `bytes` to the vsock device as packets, each with a length byte before it, and panics when a limit is passed.
///
/// The device runs on this thread. Guest ports 0 to 3 are asked for connections, host ports 0 to 3 take them; some of
/// the host's ends are closed, some full.
pub fn fuzz_vsock(bytes: &[u8]) {
    let memory = GuestMemory::new(RAM_BYTES).expect("guest memory");
    let mut driver = [0, 1, 2].map(|n| GuestQueue::new(&memory, Gpa(RINGS.0 + n * 0x1000), ENTRIES));
    let mut session = Session {
        features: 0,
        memory: memory.clone(),
        queues: driver
            .iter()
            .map(|queue| Queue::new(&memory, queue.layout(), ENTRIES, false).expect("a sane layout"))
            .collect(),
        signal: Arc::new(Signal::new(Arc::new(Raised::default()) as Arc<dyn Interrupt>)),
        kept: None,
        restored: false,
        lost: false,
    };
    let mut device = vsock::Stepped::new(3).expect("an epoll descriptor");
    let mut ends = Vec::new();
    for port in 0..4 {
        let (host, end) = UnixStream::pair().expect("a socket pair");
        device.connect(port, end.into());
        ends.push(host);
    }
    let mut rest = bytes;
    while let Some((&length, after)) = rest.split_first() {
        let (packet, after) = after.split_at(after.len().min(usize::from(length)));
        rest = after;
        memory.write(BUFFERS, packet).expect("RAM");
        // The last bit of the length says whether the guest gives room for an answer.
        if length & 1 == 0 {
            driver[0].submit(&[], &[Span::new(Gpa(BUFFERS.0 + 0x1000), 4096)]);
        }
        if driver[1].submit(&[Span::new(BUFFERS, packet.len())], &[]).is_none() {
            break;
        }
        let mut accept = |port: u32| {
            let (host, end) = UnixStream::pair().expect("a socket pair");
            if port & 1 == 0 && ends.len() < 64 {
                ends.push(host);
            }
            (port < 4).then(|| end.into())
        };
        if device.step(&mut session, &mut accept).is_err() {
            break;
        }
        for queue in &mut driver[..2] {
            while let Some((_, written)) = queue.take_used() {
                assert!(written <= 4096, "more written than there was room for");
            }
        }
        if length & 2 != 0 {
            ends.pop();
        }
    }
}

/// Submits `bytes` to a block device as one request: the first says how much room there is for an answer, the second
/// whether the disk is read-only, the rest is what the device reads.
pub fn fuzz_block(bytes: &[u8]) {
    let [room, read_only, request @ ..] = bytes else { return };
    let request = &request[..request.len().min(0x8000)];
    let file =
        File::from(rustix::fs::memfd_create("fuzz", rustix::fs::MemfdFlags::CLOEXEC).expect("a memfd"));
    file.set_len(1 << 16).expect("a sparse file");
    let extent = Extent { file: Arc::new(DataFile::trusted(file)), offset: 0, bytes: 1 << 16 };
    let disk = if read_only & 1 == 1 { Disk::read_only(vec![extent]) } else { Disk::writable(extent) };
    let disk = disk.expect("a sane disk");
    let memory = GuestMemory::new(RAM_BYTES).expect("guest memory");
    let mut driver = GuestQueue::new(&memory, RINGS, ENTRIES);
    let mut queue = Queue::new(&memory, driver.layout(), ENTRIES, false).expect("a sane layout");
    memory.write(BUFFERS, request).expect("RAM");
    let room = Span::new(Gpa(BUFFERS.0 + 0x1_0000), usize::from(*room) * 17);
    driver.submit(&[Span::new(BUFFERS, request.len())], &[room]).expect("free descriptors");
    let chain = queue.pop(&memory).expect("a sane chain").expect("a request");
    if let Ok(written) = Block::serve_one(&disk, &memory, &chain) {
        assert!(written as usize <= room.bytes, "more written than there was room for");
        queue.push(&memory, chain, written).expect("RAM");
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        /// The bodies of the fuzz targets hold for a first handful of inputs.
        #[test]
        fn no_bytes_of_a_guest_do_harm(bytes in prop::collection::vec(any::<u8>(), 0..2000)) {
            fuzz_queue(&bytes);
            fuzz_registers(&bytes);
            fuzz_block(&bytes);
        }

        /// Packets that are nearly right reach deeper.
        #[test]
        fn no_packets_of_a_guest_do_harm(
            packets in prop::collection::vec(
                (0..4_u32, 0..4_u32, 0..9_u16, any::<u8>(), 0..100_usize, any::<u32>(), any::<u32>()),
                0..60,
            ),
        ) {
            let mut bytes = Vec::new();
            for (host, guest, op, flags, payload, buf_alloc, fwd_cnt) in packets {
                // Connections from the host have ports from 2^30 on.
                let host = if flags & 4 == 0 { host } else { (1 << 30) + guest };
                bytes.push((44 + payload) as u8);
                bytes.extend(3_u64.to_le_bytes());
                bytes.extend(2_u64.to_le_bytes());
                bytes.extend(guest.to_le_bytes());
                bytes.extend(host.to_le_bytes());
                bytes.extend((if op == 5 || flags & 8 != 0 { payload as u32 } else { 0 }).to_le_bytes());
                bytes.extend(1_u16.to_le_bytes());
                bytes.extend(op.to_le_bytes());
                bytes.extend(u32::from(flags & 3).to_le_bytes());
                bytes.extend(buf_alloc.to_le_bytes());
                bytes.extend(fwd_cnt.to_le_bytes());
                bytes.extend(vec![7; payload]);
            }
            fuzz_vsock(&bytes);
        }
    }
}
