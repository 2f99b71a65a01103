//! A split virtqueue, seen from the device. VIRTIO 1.2 §2.7 "Split Virtqueues".

use std::sync::atomic::{Ordering, fence};

use kiln_memory::{Gpa, GuestMemory, OutOfRange, Span};

/// The most entries of any queue of ours. It bounds the length of a chain and what is in flight.
pub const MAX_QUEUE_ENTRIES: u16 = 256;

const DESCRIPTOR_BYTES: u64 = 16;
const USED_ELEMENT_BYTES: u64 = 8;
/// Offset of the first ring element in the available and in the used ring.
const RING_OFFSET: u64 = 4;

const DESC_F_NEXT: u16 = 1;
const DESC_F_WRITE: u16 = 2;
const DESC_F_INDIRECT: u16 = 4;
const AVAIL_F_NO_INTERRUPT: u16 = 1;
const USED_F_NO_NOTIFY: u16 = 1;

/// What a driver did that it may not do. Its device stops until the driver resets it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Broken {
    /// The queue's size is zero, not a power of two, or more than the device offers.
    #[error("queue of {entries} entries")]
    QueueSize {
        /// The size asked for.
        entries: u32,
    },
    /// A part of the queue is not aligned as VIRTIO 1.2 §2.7 demands, or its parts overlap.
    #[error("queue parts misaligned or overlapping")]
    QueueLayout,
    /// A queue or buffer is not in guest RAM.
    #[error(transparent)]
    OutOfRange(#[from] OutOfRange),
    /// The available index claims more requests than the queue holds.
    #[error("available index jumped from {seen} to {claimed}")]
    AvailableIndex {
        /// What we had taken up to.
        seen: u16,
        /// What the driver wrote.
        claimed: u16,
    },
    /// A head or a next field names a descriptor past the table.
    #[error("descriptor {index} is past the table")]
    DescriptorIndex {
        /// The bad index.
        index: u16,
    },
    /// A descriptor is in a chain twice (a loop), or in two requests at once.
    #[error("descriptor {index} is in use already")]
    DescriptorInUse {
        /// The descriptor.
        index: u16,
    },
    /// A chain has a device-readable buffer after a device-writable one, or an indirect table, which is not offered.
    #[error("descriptor {index} has flags it may not have")]
    DescriptorFlags {
        /// The descriptor.
        index: u16,
    },
    /// The buffers of one chain exceed 4 GiB. VIRTIO 1.2 §2.7.5 "The Virtqueue Descriptor Table".
    #[error("a chain of more than 4 GiB")]
    ChainTooLong,
    /// A request is too short to hold what its device needs to answer at all.
    #[error("a request without room for its header or its answer")]
    RequestTooShort,
    /// The driver started the device with a queue it had not set up, or took a queue away from the running device.
    #[error("queue {index} is not set up")]
    QueueMissing {
        /// The queue.
        index: u16,
    },
    /// The device could not start or go on for want of something of the host's: a thread, a descriptor.
    #[error("the host cannot run the device: {0}")]
    Host(std::io::ErrorKind),
}

/// Where a driver put a queue.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct QueueLayout {
    /// Entries, a power of two.
    pub entries: u32,
    /// The descriptor table, aligned to 16.
    pub descriptors: Gpa,
    /// The available ring ("driver area"), aligned to 2.
    pub available: Gpa,
    /// The used ring ("device area"), aligned to 4.
    pub used: Gpa,
}

impl QueueLayout {
    /// Says whether a device that offers `max_entries` can use this layout.
    fn check(&self, memory: &GuestMemory, max_entries: u16) -> Result<(), Broken> {
        let entries = self.entries;
        if !entries.is_power_of_two() || entries > u32::from(max_entries.min(MAX_QUEUE_ENTRIES)) {
            return Err(Broken::QueueSize { entries });
        }
        let aligned = self.descriptors.is_aligned_to(16)
            && self.available.is_aligned_to(2)
            && self.used.is_aligned_to(4);
        let entries = u64::from(entries);
        // Each ring ends with the event field, in use or not.
        let parts = [
            Span::new(self.descriptors, (DESCRIPTOR_BYTES * entries) as usize),
            Span::new(self.available, (RING_OFFSET + 2 * entries + 2) as usize),
            Span::new(self.used, (RING_OFFSET + USED_ELEMENT_BYTES * entries + 2) as usize),
        ];
        for part in parts {
            memory.check(part)?;
        }
        let apart = |a: Span, b: Span| a.at.0 + a.bytes as u64 <= b.at.0 || b.at.0 + b.bytes as u64 <= a.at.0;
        if !aligned || !apart(parts[0], parts[1]) || !apart(parts[0], parts[2]) || !apart(parts[1], parts[2])
        {
            return Err(Broken::QueueLayout);
        }
        Ok(())
    }
}

/// A set of descriptors of one queue.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct DescriptorSet([u64; MAX_QUEUE_ENTRIES as usize / 64]);

impl DescriptorSet {
    /// Adds `index`, below [`MAX_QUEUE_ENTRIES`]; false when it was there.
    fn insert(&mut self, index: u16) -> bool {
        let (word, bit) = (&mut self.0[usize::from(index) / 64], 1 << (index % 64));
        let new = *word & bit == 0;
        *word |= bit;
        new
    }

    fn contains(&self, index: u16) -> bool {
        self.0[usize::from(index) / 64] & (1 << (index % 64)) != 0
    }

    fn add(&mut self, other: &Self) {
        for (word, more) in self.0.iter_mut().zip(other.0) {
            *word |= more;
        }
    }

    fn remove(&mut self, other: &Self) {
        for (word, less) in self.0.iter_mut().zip(other.0) {
            *word &= !less;
        }
    }
}

/// One request: checked runs of guest memory, first those the device reads, then those it writes.
///
/// It holds its descriptors until it goes back by [`Queue::push`] or [`Queue::put_back`].
#[derive(Debug)]
#[must_use = "a chain that is not pushed is lost to the driver"]
pub struct Chain {
    head: u16,
    descriptors: DescriptorSet,
    spans: Vec<Span>,
    readable_spans: usize,
    readable_bytes: u32,
    writable_bytes: u32,
}

impl Chain {
    /// The runs the device reads, in order.
    pub fn readable(&self) -> &[Span] {
        &self.spans[..self.readable_spans]
    }

    /// The runs the device writes, in order.
    pub fn writable(&self) -> &[Span] {
        &self.spans[self.readable_spans..]
    }

    /// How many bytes there are to read.
    pub fn readable_bytes(&self) -> u32 {
        self.readable_bytes
    }

    /// How many bytes there is room for.
    pub fn writable_bytes(&self) -> u32 {
        self.writable_bytes
    }
}

/// The device's half of a split virtqueue.
///
/// The driver can rewrite everything at any time. Each field is read once, checked, and used only from that copy; what
/// it does wrong comes back as [`Broken`], after which the queue must not be used.
#[derive(Debug)]
pub struct Queue {
    layout: QueueLayout,
    /// `layout.entries`, as ring arithmetic needs it.
    entries: u16,
    event_idx: bool,
    /// The available index up to which requests were taken.
    next_available: u16,
    /// The used index published last.
    next_used: u16,
    /// The used index when the driver was last considered for an interrupt.
    considered_used: u16,
    in_flight: DescriptorSet,
}

impl Queue {
    /// A fresh queue at `layout`, of at most `max_entries` entries; `event_idx` when `VIRTIO_F_EVENT_IDX` was agreed.
    ///
    /// # Errors
    /// [`Broken`] when the size, the alignment or the place is not allowed.
    pub fn new(
        memory: &GuestMemory,
        layout: QueueLayout,
        max_entries: u16,
        event_idx: bool,
    ) -> Result<Self, Broken> {
        layout.check(memory, max_entries)?;
        Ok(Self {
            layout,
            entries: layout.entries as u16,
            event_idx,
            next_available: 0,
            next_used: 0,
            considered_used: 0,
            in_flight: DescriptorSet::default(),
        })
    }

    /// Takes the oldest request the driver has published, or `None` when there is none.
    ///
    /// VIRTIO 1.2 §2.7.6 "The Virtqueue Available Ring". Cost: two guest reads of 2 bytes, one of 16 for each
    /// descriptor, one allocation.
    ///
    /// # Errors
    /// [`Broken`] when the driver claims more than there can be, or its chain is not one the device may follow: past
    /// the table, in a circle, through descriptors in use, outside RAM, writable before readable, indirect.
    pub fn pop(&mut self, memory: &GuestMemory) -> Result<Option<Chain>, Broken> {
        let waiting = self.waiting(memory)?;
        if waiting == 0 {
            return Ok(None);
        }
        let head = memory.read_u16(self.available_element(self.next_available))?;
        let chain = self.follow(memory, head)?;
        self.in_flight.add(&chain.descriptors);
        self.next_available = self.next_available.wrapping_add(1);
        Ok(Some(chain))
    }

    /// Undoes the latest [`pop`](Self::pop): the chain is waiting again, and will be read again.
    #[expect(clippy::needless_pass_by_value, reason = "a chain goes back once")]
    pub fn put_back(&mut self, chain: Chain) {
        self.in_flight.remove(&chain.descriptors);
        self.next_available = self.next_available.wrapping_sub(1);
    }

    /// Gives a request back to the driver, with `written` bytes written from the start of its writable runs.
    ///
    /// VIRTIO 1.2 §2.7.8 "The Virtqueue Used Ring". The driver sees it at once; whether it is to be interrupted too is
    /// for [`wants_interrupt`](Self::wants_interrupt), once for a batch.
    ///
    /// # Errors
    /// [`Broken`] when the ring is not RAM, which cannot be: it was checked and RAM does not go away.
    #[expect(clippy::needless_pass_by_value, reason = "a chain goes back once")]
    pub fn push(&mut self, memory: &GuestMemory, chain: Chain, written: u32) -> Result<(), Broken> {
        debug_assert!(written <= chain.writable_bytes, "more written than there was room for");
        let slot = u64::from(self.next_used % self.entries);
        let element = offset(self.layout.used, RING_OFFSET + slot * USED_ELEMENT_BYTES);
        let value = u64::from(chain.head) | u64::from(written) << 32;
        memory.write_u64(element, value)?;
        self.in_flight.remove(&chain.descriptors);
        self.next_used = self.next_used.wrapping_add(1);
        memory.store_u16(offset(self.layout.used, 2), self.next_used, Ordering::Release)?;
        Ok(())
    }

    /// Whether the driver wants an interrupt for what was pushed since this was last asked.
    ///
    /// VIRTIO 1.2 §2.7.7 "Used Buffer Notification Suppression".
    ///
    /// # Errors
    /// [`Broken`], as for [`push`](Self::push).
    pub fn wants_interrupt(&mut self, memory: &GuestMemory) -> Result<bool, Broken> {
        let (before, now) = (self.considered_used, self.next_used);
        if before == now {
            return Ok(false);
        }
        self.considered_used = now;
        // The driver sets its threshold and then looks at the used index; we the other way round. Without the fence
        // both could miss the other's store.
        fence(Ordering::SeqCst);
        if self.event_idx {
            let event = memory.load_u16(self.used_event(), Ordering::Relaxed)?;
            Ok(passed(event, before, now))
        } else {
            let flags = memory.load_u16(self.layout.available, Ordering::Relaxed)?;
            Ok(flags & AVAIL_F_NO_INTERRUPT == 0)
        }
    }

    /// Asks the driver for a notification when it publishes more; true when it already has, so that the caller goes on
    /// instead of waiting for a notification that will not come.
    ///
    /// VIRTIO 1.2 §2.7.10 "Available Buffer Notification Suppression".
    ///
    /// # Errors
    /// [`Broken`] when the available index is impossible.
    pub fn enable_kicks(&mut self, memory: &GuestMemory) -> Result<bool, Broken> {
        if self.event_idx {
            memory.store_u16(self.available_event(), self.next_available, Ordering::Relaxed)?;
        } else {
            memory.store_u16(self.layout.used, 0, Ordering::Relaxed)?;
        }
        fence(Ordering::SeqCst);
        Ok(self.waiting(memory)? > 0)
    }

    /// Tells the driver that notifications are not needed for now. It may send some all the same.
    ///
    /// With `VIRTIO_F_EVENT_IDX` there is nothing to write: the threshold it passed stays behind it.
    ///
    /// # Errors
    /// [`Broken`], as for [`push`](Self::push).
    pub fn disable_kicks(&mut self, memory: &GuestMemory) -> Result<(), Broken> {
        if !self.event_idx {
            memory.store_u16(self.layout.used, USED_F_NO_NOTIFY, Ordering::Relaxed)?;
        }
        Ok(())
    }

    /// How many requests wait to be taken.
    ///
    /// # Errors
    /// [`Broken::AvailableIndex`] when the driver claims more than the queue holds.
    pub fn waiting(&self, memory: &GuestMemory) -> Result<u16, Broken> {
        let claimed = memory.load_u16(offset(self.layout.available, 2), Ordering::Acquire)?;
        let waiting = claimed.wrapping_sub(self.next_available);
        if waiting > self.entries {
            return Err(Broken::AvailableIndex { seen: self.next_available, claimed });
        }
        Ok(waiting)
    }

    /// How many entries the queue has.
    pub fn entries(&self) -> u16 {
        self.entries
    }

    fn follow(&self, memory: &GuestMemory, head: u16) -> Result<Chain, Broken> {
        let mut chain = Chain {
            head,
            descriptors: DescriptorSet::default(),
            spans: Vec::new(),
            readable_spans: 0,
            readable_bytes: 0,
            writable_bytes: 0,
        };
        let mut index = head;
        loop {
            if index >= self.entries {
                return Err(Broken::DescriptorIndex { index });
            }
            // A chain longer than the table must come by a descriptor twice, so this ends it.
            if self.in_flight.contains(index) || !chain.descriptors.insert(index) {
                return Err(Broken::DescriptorInUse { index });
            }
            let descriptor = Descriptor::read(memory, self.layout.descriptors, index)?;
            let writable = descriptor.flags & DESC_F_WRITE != 0;
            let has_written = chain.spans.len() > chain.readable_spans;
            if descriptor.flags & DESC_F_INDIRECT != 0 || (has_written && !writable) {
                return Err(Broken::DescriptorFlags { index });
            }
            memory.check(descriptor.span)?;
            chain.spans.push(descriptor.span);
            let bytes = descriptor.span.bytes as u32;
            let total = if writable { &mut chain.writable_bytes } else { &mut chain.readable_bytes };
            *total = total.checked_add(bytes).ok_or(Broken::ChainTooLong)?;
            if !writable {
                chain.readable_spans += 1;
            }
            if descriptor.flags & DESC_F_NEXT == 0 {
                break;
            }
            index = descriptor.next;
        }
        if chain.readable_bytes.checked_add(chain.writable_bytes).is_none() {
            return Err(Broken::ChainTooLong);
        }
        Ok(chain)
    }

    fn available_element(&self, index: u16) -> Gpa {
        offset(self.layout.available, RING_OFFSET + 2 * u64::from(index % self.entries))
    }

    /// The driver's interrupt threshold, behind the available ring.
    fn used_event(&self) -> Gpa {
        offset(self.layout.available, RING_OFFSET + 2 * u64::from(self.entries))
    }

    /// The device's notification threshold, behind the used ring.
    fn available_event(&self) -> Gpa {
        offset(self.layout.used, RING_OFFSET + USED_ELEMENT_BYTES * u64::from(self.entries))
    }
}

/// One entry of the descriptor table, as it was at one moment.
struct Descriptor {
    span: Span,
    flags: u16,
    next: u16,
}

impl Descriptor {
    fn read(memory: &GuestMemory, table: Gpa, index: u16) -> Result<Self, Broken> {
        let bytes: [u8; 16] = memory.read_array(offset(table, DESCRIPTOR_BYTES * u64::from(index)))?;
        let value = u128::from_le_bytes(bytes);
        Ok(Self {
            span: Span::new(Gpa(value as u64), (value >> 64) as u32 as usize),
            flags: (value >> 96) as u16,
            next: (value >> 112) as u16,
        })
    }
}

/// `bytes` past `base`, inside a part of the queue whose whole extent was checked.
fn offset(base: Gpa, bytes: u64) -> Gpa {
    Gpa(base.0 + bytes)
}

/// Whether a ring index that went from `before` to `now` went past `event`.
fn passed(event: u16, before: u16, now: u16) -> bool {
    now.wrapping_sub(event).wrapping_sub(1) < now.wrapping_sub(before)
}
