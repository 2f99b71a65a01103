//! A driver that speaks to a device through its registers, as a guest kernel does.

use std::sync::{Arc, Condvar, Mutex};
use std::time::Duration;

use kiln_memory::{Gpa, GuestMemory};

use super::GuestQueue;
use crate::{Device, Interrupt, Transport};

/// How long a test waits before it says that nothing came. Reached only by a failure.
const PATIENCE: Duration = Duration::from_mins(1);

/// An interrupt line that counts its edges.
#[derive(Debug, Default)]
pub struct Raised {
    count: Mutex<u64>,
    changed: Condvar,
}

impl Interrupt for Raised {
    fn raise(&self) {
        *self.count.lock().expect("no panic while locked") += 1;
        self.changed.notify_all();
    }
}

impl Raised {
    /// How many edges there were.
    pub fn count(&self) -> u64 {
        *self.count.lock().expect("no panic while locked")
    }

    /// Waits until there were more than `seen` edges, and says how many there were.
    pub fn wait_past(&self, seen: u64) -> u64 {
        let count = self.count.lock().expect("no panic while locked");
        let (count, timeout) = self
            .changed
            .wait_timeout_while(count, PATIENCE, |count| *count <= seen)
            .expect("no panic while locked");
        let now = *count;
        // A panic that held the lock would take the device's thread with it.
        drop(count);
        assert!(!timeout.timed_out(), "no interrupt came");
        now
    }
}

/// A transport with a driver attached.
pub struct Driver {
    /// The registers.
    pub transport: Transport,
    /// Guest RAM. [`Driver::start`] puts the rings at its start; tests have the rest from [`Driver::FREE`].
    pub memory: GuestMemory,
    /// The interrupt line.
    pub raised: Arc<Raised>,
    /// The queues, once set up.
    pub queues: Vec<GuestQueue>,
}

impl Driver {
    /// Where guest memory is free for buffers.
    pub const FREE: Gpa = Gpa(0x10_0000);
    /// `VIRTIO_F_VERSION_1`.
    pub const VERSION_1: u64 = 1 << 32;
    /// `VIRTIO_F_EVENT_IDX`.
    pub const EVENT_IDX: u64 = 1 << 29;

    /// `device` behind a transport, with `memory_bytes` of RAM, untouched.
    pub fn attach(device: Box<dyn Device>, memory_bytes: u64) -> Self {
        let memory = GuestMemory::new(memory_bytes).expect("guest memory");
        let raised = Arc::new(Raised::default());
        let transport = Transport::new(device, memory.clone(), Arc::clone(&raised) as Arc<dyn Interrupt>);
        Self { transport, memory, raised, queues: Vec::new() }
    }

    /// [`attach`](Self::attach), then everything up to "driver ready", with all offered features but event indices.
    pub fn start(device: Box<dyn Device>, memory_bytes: u64) -> Self {
        let mut driver = Self::attach(device, memory_bytes);
        let offered = driver.offered();
        driver.bring_up(offered & !Self::EVENT_IDX);
        driver
    }

    /// Resets the device and sets it up anew with `features`.
    pub fn bring_up(&mut self, features: u64) {
        self.write(0x70, 0);
        self.write(0x70, 1);
        self.write(0x70, 3);
        self.write(0x24, 0);
        self.write(0x20, features as u32);
        self.write(0x24, 1);
        self.write(0x20, (features >> 32) as u32);
        self.write(0x70, 11);
        self.queues.clear();
        let mut base = 0x1000;
        for index in 0.. {
            self.write(0x30, index);
            let entries = self.read(0x34) as u16;
            if entries == 0 {
                break;
            }
            let queue = GuestQueue::new(&self.memory, Gpa(base), entries);
            base = (base + GuestQueue::ring_bytes(entries) as u64).next_multiple_of(4096);
            assert!(base <= Self::FREE.0, "the rings fit");
            self.place(&queue);
            self.queues.push(queue);
        }
        self.write(0x70, 15);
    }

    /// Tells the device where the selected queue is.
    pub fn place(&self, queue: &GuestQueue) {
        let layout = queue.layout();
        self.write(0x38, layout.entries);
        for (low, at) in [(0x80, layout.descriptors), (0x90, layout.available), (0xa0, layout.used)] {
            self.write(low, at.0 as u32);
            self.write(low + 4, (at.0 >> 32) as u32);
        }
        self.write(0x44, 1);
    }

    /// The feature bits the device offers.
    pub fn offered(&self) -> u64 {
        self.write(0x14, 0);
        let low = self.read(0x10);
        self.write(0x14, 1);
        u64::from(low) | u64::from(self.read(0x10)) << 32
    }

    /// Reads a register.
    pub fn read(&self, offset: u64) -> u32 {
        let mut word = [0; 4];
        self.transport.read(offset, &mut word);
        u32::from_le_bytes(word)
    }

    /// Writes a register.
    pub fn write(&self, offset: u64, value: u32) {
        self.transport.write(offset, &value.to_le_bytes());
    }

    /// Tells the device that `queue` has requests.
    pub fn kick(&self, queue: u32) {
        self.write(0x50, queue);
    }

    /// Waits for the next used request of `queue` by interrupts.
    pub fn wait_used(&mut self, queue: usize) -> (u16, u32) {
        loop {
            let seen = self.raised.count();
            // With event indices the device interrupts only past the threshold the driver set.
            self.queues[queue].write_used_event(self.queues[queue].taken());
            if let Some(used) = self.queues[queue].take_used() {
                return used;
            }
            assert!(!self.needs_reset(), "the device stopped: {:?}", self.transport.fault());
            self.raised.wait_past(seen);
        }
    }

    /// Whether the device says it needs a reset.
    pub fn needs_reset(&self) -> bool {
        self.read(0x70) & 64 != 0
    }

    /// Waits until the device says it needs a reset.
    pub fn wait_broken(&self) {
        loop {
            let seen = self.raised.count();
            if self.needs_reset() {
                return;
            }
            self.raised.wait_past(seen);
        }
    }
}
