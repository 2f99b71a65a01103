//! A virtqueue whose driver writes anything anywhere, also while the device works on it.

#![no_main]

use kiln_memory::{Gpa, GuestMemory};
use kiln_virtio::{Queue, QueueLayout};
use libfuzzer_sys::fuzz_target;

/// The least a guest has.
const MEMORY_BYTES: u64 = 1 << 20;
/// Chains taken before the input is done with.
const CHAINS_MAX: usize = 1024;

fuzz_target!(|input: (u8, [u16; 3], Vec<(u16, Vec<u8>)>)| {
    let (shape, places, writes) = input;
    let memory = GuestMemory::new(MEMORY_BYTES).expect("guest memory");
    let layout = QueueLayout {
        entries: 1 << (shape & 7),
        descriptors: Gpa(u64::from(places[0]) << 4),
        available: Gpa(u64::from(places[1]) << 1),
        used: Gpa(u64::from(places[2]) << 2),
    };
    let Ok(mut queue) = Queue::new(&memory, layout, 256, shape & 0x80 != 0) else { return };
    let mut writes = writes.into_iter();
    let mut held = Vec::new();
    for number in 0..CHAINS_MAX {
        match writes.next() {
            Some((at, bytes)) => drop(memory.write(Gpa(u64::from(at)), &bytes)),
            None if number > 64 => break,
            None => {}
        }
        let Ok(popped) = queue.pop(&memory) else { return };
        let Some(chain) = popped else { continue };
        for span in chain.readable().iter().chain(chain.writable()) {
            memory.check(*span).expect("a chain's runs are RAM");
        }
        if number % 3 == 0 {
            held.push(chain);
            continue;
        }
        let written = chain.writable_bytes();
        if queue.push(&memory, chain, written).is_err() || queue.wants_interrupt(&memory).is_err() {
            return;
        }
    }
    for chain in held.into_iter().rev() {
        if queue.push(&memory, chain, 0).is_err() {
            return;
        }
    }
});
