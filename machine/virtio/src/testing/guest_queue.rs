//! The driver's half of a split virtqueue. VIRTIO 1.2 §2.7 "Split Virtqueues".

use std::sync::atomic::{Ordering, fence};

use kiln_memory::{Gpa, GuestMemory, Span};

use crate::QueueLayout;

/// The chain goes on at `next`.
pub const DESC_F_NEXT: u16 = 1;
/// The device writes this buffer.
pub const DESC_F_WRITE: u16 = 2;
/// The buffer holds a table of descriptors.
pub const DESC_F_INDIRECT: u16 = 4;

/// One descriptor, as the driver would write it, sane or not.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct RawDescriptor {
    /// Guest address of the buffer.
    pub at: u64,
    /// Its length.
    pub bytes: u32,
    /// `DESC_F_*`.
    pub flags: u16,
    /// The next descriptor, with [`DESC_F_NEXT`].
    pub next: u16,
}

/// A queue as its driver sees it: builds chains, honest ones and hostile ones, and collects what was used.
#[derive(Debug)]
pub struct GuestQueue {
    memory: GuestMemory,
    layout: QueueLayout,
    free: Vec<u16>,
    /// Next descriptor of each descriptor in a chain of [`submit`](Self::submit), to free it.
    links: Vec<Option<u16>>,
    available: u16,
    used: u16,
}

impl GuestQueue {
    /// Zeroed rings for a queue of `entries` in guest memory from `base`, a multiple of 16.
    pub fn new(memory: &GuestMemory, base: Gpa, entries: u16) -> Self {
        let size = u64::from(entries);
        let available = Gpa(base.0 + 16 * size);
        let used = Gpa((available.0 + 6 + 2 * size).next_multiple_of(4));
        let layout = QueueLayout { entries: u32::from(entries), descriptors: base, available, used };
        memory.write(base, &vec![0; Self::ring_bytes(entries)]).expect("the rings are in RAM");
        Self {
            memory: memory.clone(),
            layout,
            free: (0..entries).rev().collect(),
            links: vec![None; usize::from(entries)],
            available: 0,
            used: 0,
        }
    }

    /// How much guest memory the rings of a queue take.
    pub fn ring_bytes(entries: u16) -> usize {
        usize::from(entries) * 26 + 16
    }

    /// Where the rings are, as the driver tells the device.
    pub fn layout(&self) -> QueueLayout {
        self.layout
    }

    /// Writes one descriptor of the table.
    pub fn write_descriptor(&self, index: u16, descriptor: RawDescriptor) {
        let mut bytes = [0; 16];
        bytes[..8].copy_from_slice(&descriptor.at.to_le_bytes());
        bytes[8..12].copy_from_slice(&descriptor.bytes.to_le_bytes());
        bytes[12..14].copy_from_slice(&descriptor.flags.to_le_bytes());
        bytes[14..].copy_from_slice(&descriptor.next.to_le_bytes());
        self.memory.write(Gpa(self.layout.descriptors.0 + 16 * u64::from(index)), &bytes).expect("RAM");
    }

    /// Publishes `head` as the next request.
    pub fn publish(&mut self, head: u16) {
        let slot = u64::from(self.available) % u64::from(self.layout.entries);
        self.memory.write_u16(Gpa(self.layout.available.0 + 4 + 2 * slot), head).expect("RAM");
        self.write_available_index(self.available.wrapping_add(1));
    }

    /// Sets the available index, honest or not.
    pub fn write_available_index(&mut self, index: u16) {
        self.available = index;
        self.memory.store_u16(Gpa(self.layout.available.0 + 2), index, Ordering::Release).expect("RAM");
    }

    /// Sets the flags of the available ring: 1 asks for no interrupts.
    pub fn write_available_flags(&self, flags: u16) {
        self.memory.store_u16(self.layout.available, flags, Ordering::SeqCst).expect("RAM");
    }

    /// Builds a chain of free descriptors and publishes it; its head, or `None` when too few are free.
    pub fn submit(&mut self, readable: &[Span], writable: &[Span]) -> Option<u16> {
        let count = readable.len() + writable.len();
        if count == 0 || self.free.len() < count {
            return None;
        }
        let chain = self.free.split_off(self.free.len() - count);
        for (position, (&index, span)) in chain.iter().zip(readable.iter().chain(writable)).enumerate() {
            let next = chain.get(position + 1).copied();
            let flags = if next.is_some() { DESC_F_NEXT } else { 0 }
                | if position >= readable.len() { DESC_F_WRITE } else { 0 };
            let bytes = u32::try_from(span.bytes).expect("a buffer below 4 GiB");
            self.write_descriptor(
                index,
                RawDescriptor { at: span.at.0, bytes, flags, next: next.unwrap_or(0) },
            );
            self.links[usize::from(index)] = next;
        }
        self.publish(chain[0]);
        Some(chain[0])
    }

    /// Takes the next used request: its head and how many bytes the device says it wrote.
    pub fn take_used(&mut self) -> Option<(u16, u32)> {
        if self.used_index() == self.used {
            return None;
        }
        let slot = u64::from(self.used) % u64::from(self.layout.entries);
        let element = self.memory.read_u64(Gpa(self.layout.used.0 + 4 + 8 * slot)).expect("RAM");
        self.used = self.used.wrapping_add(1);
        let head = u16::try_from(element & 0xffff_ffff).expect("a head the driver published");
        let mut next = Some(head);
        while let Some(index) = next {
            self.free.push(index);
            next = self.links[usize::from(index)].take();
        }
        Some((head, (element >> 32) as u32))
    }

    /// The used index as the device published it.
    pub fn used_index(&self) -> u16 {
        self.memory.load_u16(Gpa(self.layout.used.0 + 2), Ordering::Acquire).expect("RAM")
    }

    /// The used requests taken so far, modulo 2^16.
    pub fn taken(&self) -> u16 {
        self.used
    }

    /// With event indices: asks for an interrupt when the used index passes `index`.
    pub fn write_used_event(&self, index: u16) {
        let at = Gpa(self.layout.available.0 + 4 + 2 * u64::from(self.layout.entries));
        self.memory.store_u16(at, index, Ordering::SeqCst).expect("RAM");
        fence(Ordering::SeqCst);
    }

    /// With event indices: the available index after which the device wants a kick.
    pub fn available_event(&self) -> u16 {
        fence(Ordering::SeqCst);
        let at = Gpa(self.layout.used.0 + 4 + 8 * u64::from(self.layout.entries));
        self.memory.load_u16(at, Ordering::SeqCst).expect("RAM")
    }

    /// Without event indices: whether the device asks for no kicks.
    pub fn kicks_are_disabled(&self) -> bool {
        fence(Ordering::SeqCst);
        self.memory.load_u16(self.layout.used, Ordering::SeqCst).expect("RAM") & 1 != 0
    }
}
