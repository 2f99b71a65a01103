//! A split virtqueue, seen from the device. VIRTIO 1.2 §2.7 "Split Virtqueues".
//!
//! Indirect descriptors are not offered: they are one more shape to get wrong, and cost the guest's kernel an
//! allocation for each request where a queue of 256 has room for what our devices have in flight.

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
    /// The driver had broken the device before the machine was saved.
    #[error("broken before the machine was saved")]
    Before,
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

/// How far a queue has come. Everything else it knows is in guest memory.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct QueueProgress {
    /// The available index up to which requests were taken.
    pub next_available: u16,
    /// The used index published last.
    pub next_used: u16,
    /// The used index when the driver was last considered for an interrupt.
    pub considered_used: u16,
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

    /// A queue that goes on where another was [saved](Self::progress).
    ///
    /// # Errors
    /// [`Broken`], as [`Queue::new`].
    pub fn resume(
        memory: &GuestMemory,
        layout: QueueLayout,
        max_entries: u16,
        event_idx: bool,
        progress: QueueProgress,
    ) -> Result<Self, Broken> {
        let QueueProgress { next_available, next_used, considered_used } = progress;
        let queue = Self::new(memory, layout, max_entries, event_idx)?;
        Ok(Self { next_available, next_used, considered_used, ..queue })
    }

    /// How far the queue has come; `None` while requests are in flight, which no number would bring back.
    pub fn progress(&self) -> Option<QueueProgress> {
        (self.in_flight == DescriptorSet::default()).then_some(QueueProgress {
            next_available: self.next_available,
            next_used: self.next_used,
            considered_used: self.considered_used,
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
        self.ask_for_kick(memory, self.next_available)?;
        Ok(self.waiting(memory)? > 0)
    }

    /// Asks the driver for a notification when it publishes more than waits now, which is left waiting, and says how much
    /// that is.
    ///
    /// # Errors
    /// [`Broken::AvailableIndex`] when the available index is impossible.
    pub fn enable_kicks_past_waiting(&mut self, memory: &GuestMemory) -> Result<u16, Broken> {
        let waiting = self.waiting(memory)?;
        self.ask_for_kick(memory, self.next_available.wrapping_add(waiting))?;
        Ok(waiting)
    }

    /// Asks for a notification when the request of available index `next` is published.
    fn ask_for_kick(&self, memory: &GuestMemory, next: u16) -> Result<(), Broken> {
        if self.event_idx {
            memory.store_u16(self.available_event(), next, Ordering::Relaxed)?;
        } else {
            memory.store_u16(self.layout.used, 0, Ordering::Relaxed)?;
        }
        fence(Ordering::SeqCst);
        Ok(())
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{GuestQueue, RawDescriptor};
    use proptest::prelude::*;

    const ENTRIES: u16 = 8;
    const RAM_BYTES: u64 = 1 << 20;
    const BUFFERS: u64 = 0x8000;

    fn ram() -> GuestMemory {
        GuestMemory::new(RAM_BYTES).expect("mapped")
    }

    fn pair(event_idx: bool) -> (GuestMemory, GuestQueue, Queue) {
        let memory = ram();
        let driver = GuestQueue::new(&memory, Gpa(0x1000), ENTRIES);
        let queue = Queue::new(&memory, driver.layout(), ENTRIES, event_idx).expect("a sane layout");
        (memory, driver, queue)
    }

    fn buffer(at: u64, bytes: usize) -> Span {
        Span::new(Gpa(BUFFERS + at), bytes)
    }

    fn descriptor(flags: u16, next: u16) -> RawDescriptor {
        RawDescriptor { at: BUFFERS, bytes: 16, flags, next }
    }

    /// What the device makes of one published chain of `descriptors`, from the first on.
    fn outcome(descriptors: &[RawDescriptor]) -> Result<(), Broken> {
        let (memory, mut driver, mut queue) = pair(false);
        for (index, &descriptor) in (0..).zip(descriptors) {
            driver.write_descriptor(index, descriptor);
        }
        driver.publish(0);
        queue.pop(&memory).map(|chain| assert!(chain.is_some(), "a request was published"))
    }

    #[test]
    fn a_request_arrives_and_its_answer_returns() {
        let (memory, mut driver, mut queue) = pair(false);
        assert!(queue.pop(&memory).expect("sane").is_none());
        let head = driver.submit(&[buffer(0, 3), buffer(8, 5)], &[buffer(64, 7)]).expect("free descriptors");
        let chain = queue.pop(&memory).expect("sane").expect("a request");
        assert_eq!(chain.readable(), [buffer(0, 3), buffer(8, 5)]);
        assert_eq!(chain.writable(), [buffer(64, 7)]);
        assert_eq!((chain.readable_bytes(), chain.writable_bytes()), (8, 7));
        assert_eq!(driver.take_used(), None);
        queue.push(&memory, chain, 6).expect("RAM");
        assert_eq!(driver.take_used(), Some((head, 6)));
    }

    #[test]
    fn indices_wrap() {
        let (memory, mut driver, mut queue) = pair(false);
        for round in 0..70_000_u32 {
            let head = driver.submit(&[buffer(0, 1)], &[]).expect("a free descriptor");
            let chain = queue.pop(&memory).expect("sane").expect("a request");
            queue.push(&memory, chain, 0).expect("RAM");
            assert_eq!(driver.take_used(), Some((head, 0)), "round {round}");
        }
    }

    #[test]
    fn a_chain_as_long_as_the_queue_is_taken() {
        let (memory, mut driver, mut queue) = pair(false);
        let all: Vec<_> = (0..u64::from(ENTRIES)).map(|n| buffer(n * 64, 64)).collect();
        driver.submit(&all[..3], &all[3..]).expect("all descriptors");
        let chain = queue.pop(&memory).expect("sane").expect("a request");
        assert_eq!((chain.readable().len(), chain.writable().len()), (3, 5));
    }

    #[test]
    fn chain_longer_than_queue_is_refused() {
        // The only way to be longer is to come back.
        let mut ring: Vec<_> = (1..=ENTRIES).map(|next| descriptor(DESC_F_NEXT, next % ENTRIES)).collect();
        assert_eq!(outcome(&ring), Err(Broken::DescriptorInUse { index: 0 }));
        ring[usize::from(ENTRIES) - 1].flags = 0;
        assert_eq!(outcome(&ring), Ok(()));
    }

    #[test]
    fn a_descriptor_that_follows_itself_is_refused() {
        assert_eq!(outcome(&[descriptor(DESC_F_NEXT, 0)]), Err(Broken::DescriptorInUse { index: 0 }));
    }

    #[test]
    fn a_next_past_the_table_is_refused() {
        let chain = [descriptor(DESC_F_NEXT, ENTRIES)];
        assert_eq!(outcome(&chain), Err(Broken::DescriptorIndex { index: ENTRIES }));
    }

    #[test]
    fn a_head_past_the_table_is_refused() {
        let (memory, mut driver, mut queue) = pair(false);
        driver.publish(u16::MAX);
        assert_eq!(queue.pop(&memory).map(drop), Err(Broken::DescriptorIndex { index: u16::MAX }));
    }

    #[test]
    fn readable_after_writable_is_refused() {
        let chain = [descriptor(DESC_F_NEXT | DESC_F_WRITE, 1), descriptor(0, 0)];
        assert_eq!(outcome(&chain), Err(Broken::DescriptorFlags { index: 1 }));
    }

    #[test]
    fn an_indirect_table_is_refused() {
        assert_eq!(outcome(&[descriptor(DESC_F_INDIRECT, 0)]), Err(Broken::DescriptorFlags { index: 0 }));
    }

    #[test]
    fn buffers_outside_ram_are_refused() {
        for (at, bytes) in [
            (RAM_BYTES, 1),
            (RAM_BYTES - 1, 2),
            (u64::MAX, 1),
            (u64::MAX, u32::MAX),
            (u64::MAX - 0xffff, 0x1_0000),
            (0, u32::MAX),
            (0xd000_0000, 4),
        ] {
            let result = outcome(&[RawDescriptor { at, bytes, flags: 0, next: 0 }]);
            assert!(matches!(result, Err(Broken::OutOfRange(_))), "{at:#x}+{bytes:#x}: {result:?}");
        }
    }

    #[test]
    fn more_than_4_gib_in_one_chain_is_refused() {
        let memory = GuestMemory::new(3 << 30).expect("mapped");
        let driver_queue = |flags_of_second| {
            let mut driver = GuestQueue::new(&memory, Gpa(0x1000), ENTRIES);
            let mut queue = Queue::new(&memory, driver.layout(), ENTRIES, false).expect("a sane layout");
            let big = |flags, next| RawDescriptor { at: 0, bytes: 0xb000_0000, flags, next };
            driver.write_descriptor(0, big(DESC_F_NEXT, 1));
            driver.write_descriptor(1, big(flags_of_second, 0));
            driver.publish(0);
            queue.pop(&memory).map(drop)
        };
        assert_eq!(driver_queue(0), Err(Broken::ChainTooLong));
        assert_eq!(driver_queue(DESC_F_WRITE), Err(Broken::ChainTooLong));
    }

    #[test]
    fn two_requests_cannot_share_a_descriptor() {
        let (memory, mut driver, mut queue) = pair(false);
        driver.write_descriptor(0, descriptor(DESC_F_NEXT, 2));
        driver.write_descriptor(1, descriptor(DESC_F_NEXT, 2));
        driver.write_descriptor(2, descriptor(0, 0));
        driver.publish(0);
        driver.publish(1);
        let first = queue.pop(&memory).expect("sane").expect("a request");
        assert_eq!(queue.pop(&memory).map(drop), Err(Broken::DescriptorInUse { index: 2 }));
        queue.push(&memory, first, 0).expect("RAM");
        assert!(queue.pop(&memory).expect("free again").is_some());
    }

    #[test]
    fn the_same_head_twice_is_refused() {
        let (memory, mut driver, mut queue) = pair(false);
        driver.write_descriptor(3, descriptor(0, 0));
        driver.publish(3);
        driver.publish(3);
        let _first = queue.pop(&memory).expect("sane").expect("a request");
        assert_eq!(queue.pop(&memory).map(drop), Err(Broken::DescriptorInUse { index: 3 }));
    }

    #[test]
    fn an_available_index_that_jumps_is_refused() {
        let (memory, mut driver, mut queue) = pair(false);
        driver.write_available_index(ENTRIES);
        assert_eq!(queue.waiting(&memory), Ok(ENTRIES));
        for claimed in [ENTRIES + 1, 0x8000, u16::MAX] {
            driver.write_available_index(claimed);
            assert_eq!(queue.pop(&memory).map(drop), Err(Broken::AvailableIndex { seen: 0, claimed }));
            assert_eq!(queue.enable_kicks(&memory), Err(Broken::AvailableIndex { seen: 0, claimed }));
        }
    }

    #[test]
    fn a_chain_put_back_comes_again() {
        let (memory, mut driver, mut queue) = pair(false);
        let head = driver.submit(&[buffer(0, 1)], &[]).expect("a free descriptor");
        driver.submit(&[buffer(1, 1)], &[]).expect("a free descriptor");
        let first = queue.pop(&memory).expect("sane").expect("a request");
        let second = queue.pop(&memory).expect("sane").expect("a request");
        queue.put_back(second);
        queue.put_back(first);
        let again = queue.pop(&memory).expect("sane").expect("the first");
        queue.push(&memory, again, 0).expect("RAM");
        assert_eq!(driver.take_used(), Some((head, 0)));
        assert_eq!(queue.waiting(&memory), Ok(1));
    }

    #[test]
    fn impossible_sizes_are_refused() {
        let memory = ram();
        let layout = GuestQueue::new(&memory, Gpa(0x1000), ENTRIES).layout();
        for entries in [0, 3, 6, 7, 9, 16, 256, 0x1_0000, 0x1_0008, 0x8000_0000, u32::MAX] {
            let layout = QueueLayout { entries, ..layout };
            let result = Queue::new(&memory, layout, ENTRIES, false).map(drop);
            assert_eq!(result, Err(Broken::QueueSize { entries }));
        }
    }

    #[test]
    fn rings_that_are_misaligned_overlapping_or_outside_ram_are_refused() {
        let memory = ram();
        let good = GuestQueue::new(&memory, Gpa(0x1000), ENTRIES).layout();
        let attempt = |layout| Queue::new(&memory, layout, ENTRIES, false).map(drop);
        assert_eq!(attempt(good), Ok(()));
        let misplaced = [
            QueueLayout { descriptors: Gpa(0x1008), ..good },
            QueueLayout { available: Gpa(good.available.0 + 1), ..good },
            QueueLayout { used: Gpa(good.used.0 + 2), ..good },
            QueueLayout { available: good.descriptors, ..good },
            QueueLayout { used: Gpa(good.descriptors.0 + 16 * u64::from(ENTRIES) - 4), ..good },
            QueueLayout { used: good.available, ..good },
        ];
        for layout in misplaced {
            assert_eq!(attempt(layout), Err(Broken::QueueLayout), "{layout:?}");
        }
        let outside = [
            QueueLayout { descriptors: Gpa(RAM_BYTES - 16), ..good },
            QueueLayout { available: Gpa(RAM_BYTES - 4), ..good },
            QueueLayout { used: Gpa(u64::MAX - 3), ..good },
            QueueLayout { descriptors: Gpa(u64::MAX - 15), ..good },
        ];
        for layout in outside {
            assert!(matches!(attempt(layout), Err(Broken::OutOfRange(_))), "{layout:?}");
        }
    }

    #[test]
    fn without_event_indices_flags_suppress_interrupts_and_kicks() {
        let (memory, mut driver, mut queue) = pair(false);
        let answer = |driver: &mut GuestQueue, queue: &mut Queue| {
            driver.submit(&[buffer(0, 1)], &[]).expect("a free descriptor");
            let chain = queue.pop(&memory).expect("sane").expect("a request");
            queue.push(&memory, chain, 0).expect("RAM");
            driver.take_used().expect("an answer");
            queue.wants_interrupt(&memory).expect("RAM")
        };
        assert!(answer(&mut driver, &mut queue));
        assert!(!queue.wants_interrupt(&memory).expect("RAM"), "nothing new");
        driver.write_available_flags(1);
        assert!(!answer(&mut driver, &mut queue));
        queue.disable_kicks(&memory).expect("RAM");
        assert!(driver.kicks_are_disabled());
        assert!(!queue.enable_kicks(&memory).expect("sane"), "nothing waits");
        assert!(!driver.kicks_are_disabled());
        driver.submit(&[buffer(0, 1)], &[]).expect("a free descriptor");
        assert!(queue.enable_kicks(&memory).expect("sane"), "one came in between");
    }

    #[test]
    fn event_indices_ask_for_an_interrupt_at_a_threshold() {
        let (memory, mut driver, mut queue) = pair(true);
        let answer = |driver: &mut GuestQueue, queue: &mut Queue, count: u16| {
            for _ in 0..count {
                driver.submit(&[buffer(0, 1)], &[]).expect("a free descriptor");
                let chain = queue.pop(&memory).expect("sane").expect("a request");
                queue.push(&memory, chain, 0).expect("RAM");
                driver.take_used().expect("an answer");
            }
            queue.wants_interrupt(&memory).expect("RAM")
        };
        driver.write_used_event(2);
        assert!(!answer(&mut driver, &mut queue, 2), "used index 2 is not past 2");
        assert!(answer(&mut driver, &mut queue, 1));
        assert!(!answer(&mut driver, &mut queue, 5), "the threshold is behind");
        driver.write_used_event(10);
        assert!(answer(&mut driver, &mut queue, 6), "a batch went past it");
        assert!(!queue.enable_kicks(&memory).expect("sane"));
        assert_eq!(driver.available_event(), 14);
    }

    #[test]
    fn a_threshold_is_passed_across_the_wrap() {
        assert!(passed(0, 0, 1));
        assert!(!passed(1, 0, 1));
        assert!(passed(u16::MAX, u16::MAX, 0));
        assert!(passed(u16::MAX, u16::MAX - 3, 2));
        assert!(!passed(2, u16::MAX - 3, 2));
        assert!(!passed(5, 5, 5));
    }

    fn any_descriptor() -> impl Strategy<Value = RawDescriptor> {
        let at = prop_oneof![0..RAM_BYTES, any::<u64>(), RAM_BYTES - 64..RAM_BYTES + 64];
        let bytes = prop_oneof![0..4096_u32, any::<u32>()];
        let flags = prop_oneof![4 => 0..4_u16, 1 => any::<u16>()];
        let next = prop_oneof![8 => 0..ENTRIES, 1 => any::<u16>()];
        (at, bytes, flags, next).prop_map(|(at, bytes, flags, next)| RawDescriptor { at, bytes, flags, next })
    }

    proptest! {
        /// Whatever the table says: a chain that is taken is inside RAM and honest about its sums, no descriptor is in
        /// two of them, and anything else is refused without a panic.
        #[test]
        fn whatever_is_taken_is_sane(
            table in prop::collection::vec(any_descriptor(), usize::from(ENTRIES)),
            heads in prop::collection::vec(prop_oneof![8 => 0..ENTRIES, 1 => any::<u16>()], 1..12),
            index in prop_oneof![4 => Just(None), 1 => any::<u16>().prop_map(Some)],
        ) {
            let (memory, mut driver, mut queue) = pair(true);
            for (index, descriptor) in (0..).zip(table) {
                driver.write_descriptor(index, descriptor);
            }
            for head in heads {
                driver.publish(head);
            }
            if let Some(index) = index {
                driver.write_available_index(index);
            }
            let mut taken = Vec::new();
            while let Ok(Some(chain)) = queue.pop(&memory) {
                let sum = |spans: &[Span]| spans.iter().map(|span| span.bytes as u64).sum::<u64>();
                prop_assert_eq!(sum(chain.readable()), u64::from(chain.readable_bytes()));
                prop_assert_eq!(sum(chain.writable()), u64::from(chain.writable_bytes()));
                prop_assert!(chain.readable().len() + chain.writable().len() <= usize::from(ENTRIES));
                for &span in chain.readable().iter().chain(chain.writable()) {
                    prop_assert_eq!(memory.check(span), Ok(()));
                }
                taken.push(chain);
            }
            let spans: usize = taken.iter().map(|chain| chain.readable().len() + chain.writable().len()).sum();
            prop_assert!(spans <= usize::from(ENTRIES), "a descriptor is in two chains");
            for chain in taken {
                prop_assert_eq!(queue.push(&memory, chain, 0), Ok(()));
            }
            prop_assert_eq!(queue.in_flight, DescriptorSet::default());
        }

        /// An honest driver gets every request answered exactly once, whatever the interleaving.
        #[test]
        fn an_honest_driver_loses_nothing(steps in prop::collection::vec(0..3_u8, 1..300), event_idx: bool) {
            let (memory, mut driver, mut queue) = pair(event_idx);
            let (mut submitted, mut answered) = (Vec::new(), Vec::new());
            let mut held = Vec::new();
            for step in steps {
                match step {
                    0 => submitted.extend(driver.submit(&[buffer(0, 4)], &[buffer(8, 4)])),
                    1 => held.extend(queue.pop(&memory).expect("sane")),
                    _ if !held.is_empty() => {
                        // The newest first: answers need no order.
                        let chain = held.pop().expect("not empty");
                        queue.push(&memory, chain, 4).expect("RAM");
                        answered.extend(driver.take_used().map(|(head, _)| head));
                    }
                    _ => {}
                }
            }
            held.extend(std::iter::from_fn(|| queue.pop(&memory).expect("sane")));
            for chain in held {
                queue.push(&memory, chain, 4).expect("RAM");
            }
            answered.extend(std::iter::from_fn(|| driver.take_used().map(|(head, _)| head)));
            submitted.sort_unstable();
            answered.sort_unstable();
            prop_assert_eq!(submitted, answered);
        }
    }
}
