//! The registers of virtio over MMIO. VIRTIO 1.2 §4.2 "Virtio Over MMIO".

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use kiln_memory::{Gpa, GuestMemory};

use crate::{Broken, Device, Interrupt, Queue, QueueLayout, Session, Signal};

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
            // Broken until reset.
            _ if self.needs_reset() => {}
            register::QUEUE_NOTIFY => self.notify(value),
            register::DEVICE_FEATURES_SEL => self.device_features_sel = value,
            register::DRIVER_FEATURES_SEL => self.driver_features_sel = value,
            register::DRIVER_FEATURES => self.write_features(value),
            register::QUEUE_SEL => self.queue_sel = value,
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
            self.device.stop();
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
        };
        self.device.start(session).map_err(|error| Broken::Host(error.kind()))
    }

    fn reset(&mut self) {
        self.device.stop();
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
            self.device.stop();
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
