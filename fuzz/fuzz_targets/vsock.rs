//! Packets that a guest sends through its socket device, with a host port that accepts and one that does not.

#![no_main]

use std::cell::RefCell;
use std::os::unix::net::UnixStream;

use kiln_memory::{Gpa, Span};
use kiln_virtio::Vsock;
use kiln_virtio::testing::Driver;
use libfuzzer_sys::fuzz_target;

const GUEST_CID: u64 = 3;
const HOST_CID: u64 = 2;
/// A port on which something listens.
const OPEN_PORT: u32 = 1000;
const TRANSMIT: usize = 1;
const PACKETS_MAX: usize = 32;

thread_local! {
    static DRIVER: RefCell<Driver> = RefCell::new(start());
}

fn start() -> Driver {
    let (vsock, ports) = Vsock::new(GUEST_CID);
    let listens = ports.listen(OPEN_PORT, Box::new(|| UnixStream::pair().map(|(ours, _theirs)| ours.into())));
    assert!(listens, "the port is free");
    Driver::start(Box::new(vsock), 16 << 20)
}

fuzz_target!(|packets: Vec<(u8, [u8; 44], Vec<u8>)>| {
    DRIVER.with_borrow_mut(|driver| {
        let offered = driver.offered();
        driver.bring_up(offered & !Driver::EVENT_IDX);
        for (fixes, mut header, mut payload) in packets.into_iter().take(PACKETS_MAX) {
            payload.truncate(4096);
            // Most random headers are refused at the first field, so a part of the input decides how much is right.
            let mut fix = |bit: u8, at: usize, value: &[u8]| {
                if fixes & 1 << bit == 0 {
                    header[at..at + value.len()].copy_from_slice(value);
                }
            };
            fix(0, 0, &GUEST_CID.to_le_bytes());
            fix(1, 8, &HOST_CID.to_le_bytes());
            fix(2, 16, &7_u32.to_le_bytes());
            fix(3, 20, &OPEN_PORT.to_le_bytes());
            fix(4, 24, &(payload.len() as u32).to_le_bytes());
            fix(5, 28, &1_u16.to_le_bytes());
            if fixes & 0x40 == 0 {
                header[30] %= 9;
                header[31] = 0;
            }
            let packet = [&header[..], &payload].concat();
            driver.memory.write(Driver::FREE, &packet).expect("free memory is RAM");
            let span = Span::new(Gpa(Driver::FREE.0), packet.len());
            if driver.queues[TRANSMIT].submit(&[span], &[]).is_none() || driver.needs_reset() {
                return;
            }
            driver.kick(TRANSMIT as u32);
            // The device answers, or stops itself.
            loop {
                let seen = driver.raised.count();
                if driver.queues[TRANSMIT].take_used().is_some() || driver.needs_reset() {
                    break;
                }
                driver.raised.wait_past(seen);
            }
        }
    });
});
