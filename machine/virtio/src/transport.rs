//! The registers of virtio over MMIO. VIRTIO 1.2 §4.2 "Virtio Over MMIO".

mod save;

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use kiln_memory::{Gpa, GuestMemory};

use crate::{Broken, Device, Interrupt, Queue, QueueLayout, Session, Signal};

pub use save::{QueueState, RestoreError, TransportState};

/// How much of the guest's address space one transport takes.
pub const TRANSPORT_BYTES: u64 = 0x1000;

/// Bit 32: the device follows VIRTIO 1.x. A driver that does not accept it is refused.
const VIRTIO_F_VERSION_1: u64 = 1 << 32;
/// Bit 29: both sides say from where on they want to hear of progress.
const VIRTIO_F_EVENT_IDX: u64 = 1 << 29;

const MAGIC: u32 = u32::from_le_bytes(*b"virt");
const VERSION: u32 = 2;
const VENDOR: u32 = u32::from_le_bytes(*b"KILN");

/// Offsets of registers. VIRTIO 1.2 §4.2.2 "MMIO Device Register Layout".
mod register {
    pub(super) const MAGIC_VALUE: u64 = 0x000;
    pub(super) const VERSION: u64 = 0x004;
    pub(super) const DEVICE_ID: u64 = 0x008;
    pub(super) const VENDOR_ID: u64 = 0x00c;
    pub(super) const DEVICE_FEATURES: u64 = 0x010;
    pub(super) const DEVICE_FEATURES_SEL: u64 = 0x014;
    pub(super) const DRIVER_FEATURES: u64 = 0x020;
    pub(super) const DRIVER_FEATURES_SEL: u64 = 0x024;
    pub(super) const QUEUE_SEL: u64 = 0x030;
    pub(super) const QUEUE_SIZE_MAX: u64 = 0x034;
    pub(super) const QUEUE_SIZE: u64 = 0x038;
    pub(super) const QUEUE_READY: u64 = 0x044;
    pub(super) const QUEUE_NOTIFY: u64 = 0x050;
    pub(super) const INTERRUPT_STATUS: u64 = 0x060;
    pub(super) const INTERRUPT_ACK: u64 = 0x064;
    pub(super) const STATUS: u64 = 0x070;
    pub(super) const QUEUE_DESC_LOW: u64 = 0x080;
    pub(super) const QUEUE_DESC_HIGH: u64 = 0x084;
    pub(super) const QUEUE_DRIVER_LOW: u64 = 0x090;
    pub(super) const QUEUE_DRIVER_HIGH: u64 = 0x094;
    pub(super) const QUEUE_DEVICE_LOW: u64 = 0x0a0;
    pub(super) const QUEUE_DEVICE_HIGH: u64 = 0x0a4;
    pub(super) const SHM_LEN_LOW: u64 = 0x0b0;
    pub(super) const SHM_BASE_HIGH: u64 = 0x0bc;
    pub(super) const CONFIG_GENERATION: u64 = 0x0fc;
    pub(super) const CONFIG: u64 = 0x100;
}

/// Bits of the device status. VIRTIO 1.2 §2.1 "Device Status Field".
mod status {
    pub(super) const ACKNOWLEDGE: u32 = 1;
    pub(super) const DRIVER: u32 = 2;
    pub(super) const DRIVER_OK: u32 = 4;
    pub(super) const FEATURES_OK: u32 = 8;
    pub(super) const NEEDS_RESET: u32 = 64;
    pub(super) const FAILED: u32 = 128;
}

/// A device as the guest sees it: a page of registers.
///
/// ```text
///  reset ─▶ ACKNOWLEDGE ─▶ DRIVER ─▶ FEATURES_OK ─▶ DRIVER_OK: Device::start
///    ▲            (features)     (queues)      │
///    └── status := 0, from anywhere: Device::stop ◀── FAILED, or anything broken: stopped, NEEDS_RESET
/// ```
///
/// Each step opens only what belongs to it; a register written out of its step keeps its value. No sequence of
/// accesses does more than stop the device.
pub struct Transport {
    state: Mutex<State>,
    signal: Arc<Signal>,
}

/// All that the registers hold; plain values beside the device itself.
struct State {
    device: Box<dyn Device>,
    memory: GuestMemory,
    signal: Arc<Signal>,
    status: u32,
    device_features_sel: u32,
    driver_features_sel: u32,
    driver_features: u64,
    queue_sel: u32,
    queues: Vec<QueueRegisters>,
    /// The session of a device that was running and is paused.
    held: Option<Session>,
}

#[derive(Clone, Copy, Default)]
struct QueueRegisters {
    max_entries: u16,
    layout: QueueLayout,
    ready: bool,
}

impl Transport {
    /// The transport of `device`, which is stopped until the guest's driver has set it up.
    pub fn new(device: Box<dyn Device>, memory: GuestMemory, interrupt: Arc<dyn Interrupt>) -> Self {
        let signal = Arc::new(Signal::new(interrupt));
        let queues = device.queue_entries().iter().map(|&max| QueueRegisters::new(max)).collect();
        let state = State {
            device,
            memory,
            signal: Arc::clone(&signal),
            status: 0,
            device_features_sel: 0,
            driver_features_sel: 0,
            driver_features: 0,
            queue_sel: 0,
            queues,
            held: None,
        };
        Self { state: Mutex::new(state), signal }
    }

    /// The guest reads `data.len()` bytes at `offset` of the page. What is not there reads as zeros.
    ///
    /// Registers answer to aligned reads of 4 bytes, the configuration space to any. VIRTIO 1.2 §4.2.2.2 "Driver
    /// Requirements: MMIO Device Register Layout".
    pub fn read(&self, offset: u64, data: &mut [u8]) {
        data.fill(0);
        if offset >= register::CONFIG {
            self.state().device.read_config(offset - register::CONFIG, data);
        } else if offset.is_multiple_of(4)
            && let Ok(word) = <&mut [u8; 4]>::try_from(data)
        {
            *word = self.read_register(offset).to_le_bytes();
        }
    }

    /// The guest writes `data` at `offset` of the page. What cannot be written, or not now, is ignored.
    pub fn write(&self, offset: u64, data: &[u8]) {
        if offset >= register::CONFIG {
            let mut state = self.state();
            if state.status & status::DRIVER != 0 && !state.needs_reset() {
                state.device.write_config(offset - register::CONFIG, data);
            }
        } else if offset.is_multiple_of(4)
            && let Ok(word) = <[u8; 4]>::try_from(data)
        {
            self.write_register(offset, u32::from_le_bytes(word));
        }
    }

    /// Why the device needs a reset, when it does.
    pub fn fault(&self) -> Option<Broken> {
        self.signal.fault()
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn read_register(&self, offset: u64) -> u32 {
        match offset {
            register::MAGIC_VALUE => MAGIC,
            register::VERSION => VERSION,
            register::VENDOR_ID => VENDOR,
            // On the interrupt path; no lock.
            register::INTERRUPT_STATUS => self.signal.interrupt_status(),
            register::CONFIG_GENERATION => self.signal.config_generation(),
            // No shared memory regions: length and base of all ones. VIRTIO 1.2 §4.2.2.1 "Device Requirements".
            register::SHM_LEN_LOW..=register::SHM_BASE_HIGH => u32::MAX,
            _ => self.state().read(offset),
        }
    }

    fn write_register(&self, offset: u64, value: u32) {
        match offset {
            register::INTERRUPT_ACK => self.signal.acknowledge(value),
            _ => self.state().write(offset, value),
        }
    }
}

impl Drop for Transport {
    fn drop(&mut self) {
        self.state().device.stop();
    }
}

impl QueueRegisters {
    fn new(max_entries: u16) -> Self {
        Self { max_entries, ..Self::default() }
    }
}

impl State {
    fn offered(&self) -> u64 {
        self.device.features() | VIRTIO_F_VERSION_1 | VIRTIO_F_EVENT_IDX
    }

    fn needs_reset(&self) -> bool {
        self.signal.fault().is_some()
    }

    fn read(&self, offset: u64) -> u32 {
        let queue = self.queues.get(self.queue_sel as usize);
        match offset {
            register::DEVICE_ID => self.device.device_type(),
            register::DEVICE_FEATURES => half(self.offered(), self.device_features_sel),
            register::QUEUE_SIZE_MAX => queue.map_or(0, |queue| u32::from(queue.max_entries)),
            register::QUEUE_READY => queue.map_or(0, |queue| u32::from(queue.ready)),
            register::STATUS => self.status | if self.needs_reset() { status::NEEDS_RESET } else { 0 },
            _ => 0,
        }
    }

    fn write(&mut self, offset: u64, value: u32) {
        match offset {
            register::STATUS => self.write_status(value),
            register::DEVICE_FEATURES_SEL => self.device_features_sel = value,
            register::DRIVER_FEATURES_SEL => self.driver_features_sel = value,
            register::QUEUE_SEL => self.queue_sel = value,
            // Broken until reset.
            _ if self.needs_reset() => {}
            register::QUEUE_NOTIFY => self.notify(value),
            register::DRIVER_FEATURES => self.write_features(value),
            register::QUEUE_READY => self.write_ready(value),
            register::QUEUE_SIZE
            | register::QUEUE_DESC_LOW
            | register::QUEUE_DESC_HIGH
            | register::QUEUE_DRIVER_LOW
            | register::QUEUE_DRIVER_HIGH
            | register::QUEUE_DEVICE_LOW
            | register::QUEUE_DEVICE_HIGH => self.write_layout(offset, value),
            _ => {}
        }
    }

    /// VIRTIO 1.2 §3.1.1 "Driver Requirements: Device Initialization", step by step.
    fn write_status(&mut self, value: u32) {
        use status::{ACKNOWLEDGE, DRIVER, DRIVER_OK, FAILED, FEATURES_OK};
        if value == 0 {
            return self.reset();
        }
        if value & FAILED != 0 {
            self.status |= FAILED;
            self.stop();
        }
        if self.status & FAILED != 0 || self.needs_reset() {
            return;
        }
        let new = |state: &Self, bit, after| value & bit != 0 && state.status & (bit | after) == after;
        if new(self, ACKNOWLEDGE, 0) {
            self.status |= ACKNOWLEDGE;
        }
        if new(self, DRIVER, ACKNOWLEDGE) {
            self.status |= DRIVER;
        }
        if new(self, FEATURES_OK, DRIVER) && self.features_are_acceptable() {
            self.status |= FEATURES_OK;
        }
        if new(self, DRIVER_OK, FEATURES_OK) {
            self.status |= DRIVER_OK;
            if let Err(broken) = self.start() {
                self.signal.broken(broken);
            }
        }
    }

    fn features_are_acceptable(&self) -> bool {
        self.driver_features & !self.offered() == 0 && self.driver_features & VIRTIO_F_VERSION_1 != 0
    }

    fn start(&mut self) -> Result<(), Broken> {
        let event_idx = self.driver_features & VIRTIO_F_EVENT_IDX != 0;
        let mut queues = Vec::with_capacity(self.queues.len());
        for (index, registers) in (0..).zip(&self.queues) {
            if !registers.ready {
                return Err(Broken::QueueMissing { index });
            }
            queues.push(Queue::new(&self.memory, registers.layout, registers.max_entries, event_idx)?);
        }
        let session = Session {
            features: self.driver_features,
            memory: self.memory.clone(),
            queues,
            signal: Arc::clone(&self.signal),
            kept: None,
            restored: false,
            lost: false,
        };
        self.device.start(session).map_err(|error| Broken::Host(error.kind()))
    }

    /// Stops the device, for good if it was paused.
    fn stop(&mut self) {
        self.device.stop();
        self.held = None;
    }

    fn reset(&mut self) {
        self.stop();
        self.signal.reset();
        self.status = 0;
        self.device_features_sel = 0;
        self.driver_features_sel = 0;
        self.driver_features = 0;
        self.queue_sel = 0;
        for queue in &mut self.queues {
            *queue = QueueRegisters::new(queue.max_entries);
        }
    }

    fn write_features(&mut self, value: u32) {
        let choosing = self.status & (status::DRIVER | status::FEATURES_OK) == status::DRIVER;
        if choosing {
            match self.driver_features_sel {
                0 => self.driver_features = self.driver_features & !0xffff_ffff | u64::from(value),
                1 => self.driver_features = self.driver_features & 0xffff_ffff | u64::from(value) << 32,
                // No features there; accepting some is accepting what was not offered.
                _ if value != 0 => self.driver_features |= !self.offered(),
                _ => {}
            }
        }
    }

    /// The selected queue while the driver may set it up.
    fn queue_being_set_up(&mut self) -> Option<&mut QueueRegisters> {
        if self.status & (status::FEATURES_OK | status::DRIVER_OK) != status::FEATURES_OK {
            return None;
        }
        self.queues.get_mut(self.queue_sel as usize)
    }

    fn write_layout(&mut self, offset: u64, value: u32) {
        let Some(queue) = self.queue_being_set_up().filter(|queue| !queue.ready) else { return };
        let layout = &mut queue.layout;
        match offset {
            register::QUEUE_SIZE => layout.entries = value,
            register::QUEUE_DESC_LOW => set_low(&mut layout.descriptors, value),
            register::QUEUE_DESC_HIGH => set_high(&mut layout.descriptors, value),
            register::QUEUE_DRIVER_LOW => set_low(&mut layout.available, value),
            register::QUEUE_DRIVER_HIGH => set_high(&mut layout.available, value),
            register::QUEUE_DEVICE_LOW => set_low(&mut layout.used, value),
            register::QUEUE_DEVICE_HIGH => set_high(&mut layout.used, value),
            _ => {}
        }
    }

    fn write_ready(&mut self, value: u32) {
        let running = self.status & status::DRIVER_OK != 0;
        if running && value == 0 && (self.queue_sel as usize) < self.queues.len() {
            // The driver takes the queue's memory back. It gets it: nothing of this device touches it any more.
            self.stop();
            self.queues[self.queue_sel as usize].ready = false;
            return self.signal.broken(Broken::QueueMissing { index: self.queue_sel as u16 });
        }
        let memory = self.memory.clone();
        let Some(queue) = self.queue_being_set_up() else { return };
        queue.ready = value == 1;
        if queue.ready
            && let Err(broken) = Queue::new(&memory, queue.layout, queue.max_entries, false)
        {
            queue.ready = false;
            self.signal.broken(broken);
        }
    }

    fn notify(&self, value: u32) {
        if self.status & status::DRIVER_OK != 0 && (value as usize) < self.queues.len() {
            self.device.kick(value as u16);
        }
    }
}

/// The selected 32 bits of `value`; nothing lies past the second.
fn half(value: u64, selected: u32) -> u32 {
    match selected {
        0 => value as u32,
        1 => (value >> 32) as u32,
        _ => 0,
    }
}

fn set_low(address: &mut Gpa, value: u32) {
    address.0 = address.0 & !0xffff_ffff | u64::from(value);
}

fn set_high(address: &mut Gpa, value: u32) {
    address.0 = address.0 & 0xffff_ffff | u64::from(value) << 32;
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{Driver, Raised};
    use proptest::prelude::*;
    use std::io;
    use std::sync::atomic::{AtomicUsize, Ordering};

    /// A device that does nothing but count.
    #[derive(Default)]
    struct Recorder {
        seen: Arc<Seen>,
        session: Option<Session>,
    }

    #[derive(Default)]
    struct Seen {
        starts: AtomicUsize,
        stops: AtomicUsize,
        kicks: AtomicUsize,
        config_writes: AtomicUsize,
    }

    const FEATURES: u64 = 0b101;

    impl Device for Recorder {
        fn device_type(&self) -> u32 {
            42
        }
        fn features(&self) -> u64 {
            FEATURES
        }
        fn queue_entries(&self) -> &'static [u16] {
            &[16, 256]
        }
        fn read_config(&self, offset: u64, data: &mut [u8]) {
            for (at, byte) in (offset..).zip(data).filter(|(at, _)| *at < 6) {
                *byte = at as u8 + 1;
            }
        }
        fn write_config(&mut self, _offset: u64, _data: &[u8]) {
            self.seen.config_writes.fetch_add(1, Ordering::Relaxed);
        }
        fn start(&mut self, session: Session) -> io::Result<()> {
            assert!(self.session.is_none(), "started twice");
            assert_eq!(session.queues.len(), 2);
            self.seen.starts.fetch_add(1, Ordering::Relaxed);
            self.session = Some(session);
            Ok(())
        }
        fn kick(&self, queue: u16) {
            assert!(self.session.is_none() || queue < 2, "a queue that is not there");
            self.seen.kicks.fetch_add(1, Ordering::Relaxed);
        }
        fn stop(&mut self) -> Option<Session> {
            let session = self.session.take();
            self.seen.stops.fetch_add(usize::from(session.is_some()), Ordering::Relaxed);
            session
        }
    }

    fn attach() -> (Driver, Arc<Seen>) {
        let device = Recorder::default();
        let seen = Arc::clone(&device.seen);
        (Driver::attach(Box::new(device), 4 << 20), seen)
    }

    fn count(counter: &AtomicUsize) -> usize {
        counter.load(Ordering::Relaxed)
    }

    const ALL: u64 = FEATURES | VIRTIO_F_VERSION_1 | VIRTIO_F_EVENT_IDX;

    #[test]
    fn the_page_says_what_it_is() {
        let (driver, _) = attach();
        let words = [0x0, 0x4, 0x8].map(|offset| driver.read(offset));
        assert_eq!(words, [0x7472_6976, 2, 42]);
        assert_eq!(driver.offered(), ALL);
        driver.write(0x14, 2);
        assert_eq!(driver.read(0x10), 0, "no features past bit 63");
        assert_eq!(driver.read(0xb0), u32::MAX, "no shared memory");
    }

    #[test]
    fn a_driver_that_follows_the_steps_starts_the_device() {
        let (mut driver, seen) = attach();
        driver.bring_up(ALL);
        assert_eq!((driver.read(0x70), count(&seen.starts)), (15, 1));
        driver.kick(0);
        driver.kick(1);
        driver.kick(2);
        driver.kick(u32::MAX);
        assert_eq!(count(&seen.kicks), 2);
        driver.write(0x70, 0);
        assert_eq!((driver.read(0x70), count(&seen.stops)), (0, 1));
        driver.bring_up(ALL);
        assert_eq!((driver.read(0x70), count(&seen.starts)), (15, 2));
    }

    #[test]
    fn dropping_the_transport_stops_the_device() {
        let (mut driver, seen) = attach();
        driver.bring_up(ALL);
        drop(driver);
        assert_eq!(count(&seen.stops), 1);
    }

    #[test]
    fn features_never_offered_are_refused() {
        for features in [ALL | 2, ALL | 1 << 63, ALL | 1 << 28, FEATURES] {
            let (mut driver, seen) = attach();
            driver.bring_up(features);
            assert_eq!(driver.read(0x70) & 8, 0, "{features:#x}");
            assert_eq!(count(&seen.starts), 0);
        }
    }

    #[test]
    fn features_past_the_last_word_are_refused() {
        let (driver, _) = attach();
        driver.write(0x70, 1);
        driver.write(0x70, 3);
        driver.write(0x24, 1);
        driver.write(0x20, 1);
        driver.write(0x24, 2);
        driver.write(0x20, 1);
        driver.write(0x70, 11);
        assert_eq!(driver.read(0x70), 3);
    }

    #[test]
    fn features_are_settled_once_accepted() {
        let (mut driver, seen) = attach();
        driver.bring_up(VIRTIO_F_VERSION_1);
        driver.write(0x24, 0);
        driver.write(0x20, u32::MAX);
        assert_eq!((driver.read(0x70), count(&seen.starts)), (15, 1));
    }

    #[test]
    fn steps_cannot_be_skipped() {
        let (driver, seen) = attach();
        driver.write(0x70, 4);
        assert_eq!(driver.read(0x70), 0);
        driver.write(0x70, 2);
        assert_eq!(driver.read(0x70), 0);
        driver.write(0x70, 1 | 8);
        assert_eq!(driver.read(0x70), 1);
        driver.kick(0);
        assert_eq!((count(&seen.starts), count(&seen.kicks)), (0, 0));
    }

    #[test]
    fn a_queue_of_an_impossible_size_breaks_the_device() {
        for entries in [0_u32, 3, 17, 32, u32::MAX] {
            let (driver, _) = attach();
            for status in [1, 3] {
                driver.write(0x70, status);
            }
            driver.write(0x24, 1);
            driver.write(0x20, 1);
            driver.write(0x70, 11);
            driver.write(0x38, entries);
            driver.write(0x44, 1);
            assert_eq!(driver.read(0x44), 0, "{entries}");
            assert!(driver.needs_reset());
            assert_eq!(driver.read(0x60), 2, "the driver is told");
            assert_eq!(driver.transport.fault(), Some(Broken::QueueSize { entries }));
            driver.write(0x70, 0);
            assert_eq!((driver.read(0x70), driver.read(0x60)), (0, 0), "a reset heals it");
        }
    }

    #[test]
    fn a_missing_queue_breaks_the_device() {
        let (driver, seen) = attach();
        for status in [1, 3] {
            driver.write(0x70, status);
        }
        driver.write(0x24, 1);
        driver.write(0x20, 1);
        driver.write(0x70, 11);
        driver.write(0x70, 15);
        assert!(driver.needs_reset());
        assert_eq!(driver.transport.fault(), Some(Broken::QueueMissing { index: 0 }));
        assert_eq!(count(&seen.starts), 0);
    }

    #[test]
    fn a_running_device_keeps_its_queues() {
        let (mut driver, seen) = attach();
        driver.bring_up(ALL);
        driver.write(0x30, 0);
        driver.write(0x38, 3);
        driver.write(0x80, 0xffff_fff0);
        driver.write(0x44, 1);
        assert!(!driver.needs_reset());
        // Taking one away is allowed, and ends the device.
        driver.write(0x44, 0);
        assert_eq!((driver.read(0x44), count(&seen.stops)), (0, 1));
        assert!(driver.needs_reset());
    }

    #[test]
    fn a_queue_is_saved_where_the_running_device_has_it() {
        let (mut driver, _) = attach();
        driver.bring_up(ALL);
        let layout = driver.queues[0].layout();
        for (register, value) in [(0x30, 0), (0x38, 2), (0x80, 0xf000), (0x90, 0xf000), (0xa0, 0xf000)] {
            driver.write(register, value);
        }
        driver.transport.pause();
        let saved = driver.transport.save().expect("no request is in flight");
        assert_eq!(saved.queues[0].layout, layout);
    }

    #[test]
    fn what_stops_a_paused_device_stops_it_for_good() {
        // A reset, a driver that gives up, and a queue taken away.
        for (register, value) in [(0x70, 0), (0x70, 128), (0x44, 0)] {
            let (mut driver, seen) = attach();
            driver.bring_up(ALL);
            driver.transport.pause();
            driver.write(0x30, 0);
            driver.write(register, value);
            driver.transport.resume();
            assert_eq!(count(&seen.starts), 1, "{register:#x}");
            driver.write(0x70, 0);
            driver.bring_up(ALL);
            assert_eq!((count(&seen.starts), driver.needs_reset()), (2, false), "{register:#x}");
        }
    }

    #[test]
    fn a_broken_device_that_was_paused_does_not_go_on() {
        let (mut driver, seen) = attach();
        driver.bring_up(ALL);
        driver.transport.signal.broken(Broken::QueueMissing { index: 0 });
        driver.transport.pause();
        let saved = driver.transport.save().expect("nothing is in flight");
        driver.transport.resume();
        assert_eq!(count(&seen.starts), 1);
        let (memory, line) = (driver.memory.clone(), driver.raised.clone());
        let restored = Transport::restore(Box::new(Recorder::default()), memory, line, &saved);
        assert!(restored.expect("a state it can be in").fault().is_some());
    }

    #[test]
    fn a_driver_that_gives_up_stops_the_device() {
        let (mut driver, seen) = attach();
        driver.bring_up(ALL);
        driver.write(0x70, 128);
        assert_eq!((driver.read(0x70), count(&seen.stops)), (15 | 128, 1));
        driver.write(0x70, 15);
        assert_eq!(count(&seen.starts), 1, "only a reset starts it anew");
    }

    #[test]
    fn config_is_read_at_any_width_and_written_only_by_a_driver() {
        let (mut driver, seen) = attach();
        let mut bytes = [0xff; 8];
        driver.transport.read(0x100, &mut bytes);
        assert_eq!(bytes, [1, 2, 3, 4, 5, 6, 0, 0]);
        let mut byte = [0xff];
        driver.transport.read(0x105, &mut byte);
        assert_eq!(byte, [6]);
        driver.transport.read(0xfff, &mut byte);
        assert_eq!(byte, [0]);
        driver.transport.write(0x100, &[1]);
        assert_eq!(count(&seen.config_writes), 0);
        driver.bring_up(ALL);
        driver.transport.write(0x100, &[1]);
        assert_eq!(count(&seen.config_writes), 1);
    }

    #[test]
    fn registers_answer_to_aligned_words_only() {
        let (driver, _) = attach();
        for (offset, width) in [(0, 1), (0, 2), (0, 8), (2, 4)] {
            let mut bytes = vec![0xff; width];
            driver.transport.read(offset, &mut bytes);
            assert!(bytes.iter().all(|&byte| byte == 0), "{offset} {width}");
        }
        driver.transport.write(0x70, &[1]);
        driver.transport.write(0x70, &[1, 0, 0, 0, 0, 0, 0, 0]);
        assert_eq!(driver.read(0x70), 0);
    }

    #[test]
    fn acknowledged_interrupts_are_gone_and_others_stay() {
        let raised = Arc::new(Raised::default());
        let signal = Signal::new(Arc::clone(&raised) as Arc<dyn Interrupt>);
        signal.used();
        signal.config_changed();
        assert_eq!((signal.interrupt_status(), signal.config_generation(), raised.count()), (3, 1, 2));
        signal.acknowledge(1);
        assert_eq!(signal.interrupt_status(), 2);
    }

    /// One access: offset, width index, value, and whether it writes. Mostly registers, some of it on the right path.
    fn access() -> impl Strategy<Value = (u64, usize, u64, bool)> {
        let known = prop::sample::select(vec![
            0x10_u64, 0x14, 0x20, 0x24, 0x30, 0x34, 0x38, 0x44, 0x50, 0x60, 0x64, 0x70, 0x80, 0x84, 0x90,
            0x94, 0xa0, 0xa4, 0xac, 0xb0, 0xfc, 0x100,
        ]);
        let offset = prop_oneof![8 => known, 1 => 0..TRANSPORT_BYTES, 1 => any::<u64>()];
        let value = prop_oneof![
            prop::sample::select(vec![0_u64, 1, 3, 8, 11, 15, 16, 128, 0x1000, 0x2000, 0x3000, 0x4000]),
            any::<u64>()
        ];
        (offset, prop_oneof![1 => 0..4_usize, 6 => Just(2)], value, prop::bool::weighted(0.8))
    }

    proptest! {
        /// Any sequence of accesses: no panic, status bits only in their order, a device that runs only between
        /// "driver ready" and its end.
        #[test]
        fn no_sequence_of_accesses_does_more_than_stop_the_device(
            ready: bool,
            accesses in prop::collection::vec(access(), 0..200),
        ) {
            let (mut driver, seen) = attach();
            if ready {
                driver.bring_up(ALL);
            }
            for (offset, width, value, writes) in accesses {
                let width = 1 << width;
                let mut bytes = value.to_le_bytes();
                if writes {
                    driver.transport.write(offset, &bytes[..width]);
                } else {
                    driver.transport.read(offset, &mut bytes[..width]);
                }
                let status = driver.read(0x70);
                let after = |bit, needed| status & bit == 0 || status & needed == needed;
                prop_assert!(after(2, 1) && after(8, 3) && after(4, 11), "status {status:#x}");
                prop_assert_eq!(status & 64 != 0, driver.transport.fault().is_some());
                let running = count(&seen.starts) - count(&seen.stops);
                prop_assert!(running <= usize::from(status & 4 != 0 && status & 128 == 0));
            }
        }
    }
}
