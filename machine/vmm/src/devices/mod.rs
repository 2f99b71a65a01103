//! Everything the guest reaches by I/O port or by an address that is not RAM, and the dispatch to it.
//!
//! Accesses arrive on vCPU threads and are answered there. What nobody answers reads as all ones and ignores writes, as
//! on a PC.

mod ioapic;
pub mod power;
mod serial;

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use kiln_memory::{Gpa, GuestMemory};
use kiln_virtio::{Device, Interrupt, RestoreError, Transport, TransportState};

use crate::console::ConsoleInput;
use crate::layout;

pub(crate) use ioapic::Ioapic;
pub use ioapic::IoapicState;
use serial::Serial;
pub use serial::SerialState;

/// The keyboard controller's command and status port; Kiln has no keyboard, but this is how a PC resets itself.
const KEYBOARD_COMMAND: u16 = 0x64;
const KEYBOARD_PULSE_RESET: u8 = 0xfe;
/// The chipset's reset control register.
const RESET_CONTROL: u16 = 0xcf9;
const RESET_CONTROL_RESET: u8 = 1 << 2;

/// What a write asks of the machine, when it is more than a register changing.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Effect {
    /// Go on.
    None,
    /// Look what there is to do: the vCPU was kicked.
    Look,
    /// The guest resets itself.
    Reset,
    /// A request through the power page.
    Power(power::Request),
}

/// The devices of one machine.
pub(crate) struct Devices {
    serial: Mutex<Serial>,
    console: ConsoleInput,
    ioapic: Arc<Ioapic>,
    transports: Vec<Transport>,
}

/// What the devices of a paused machine are, what is behind them apart.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct DevicesState {
    /// The serial port.
    pub serial: SerialState,
    /// The I/O APIC.
    pub ioapic: IoapicState,
    /// The virtio devices in order.
    pub virtio: Vec<TransportState>,
}

/// A device cannot be restored.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum DeviceError {
    /// There are more or fewer than were saved.
    #[error("{found} virtio devices where {expected} were saved")]
    Count {
        /// How many were saved.
        expected: usize,
        /// How many there are.
        found: usize,
    },
    /// The saved state of one is not one it can have.
    #[error("virtio device {index}: {why}")]
    Virtio {
        /// Which one.
        index: usize,
        /// Why.
        #[source]
        why: RestoreError,
    },
}

impl Devices {
    /// The legacy devices and one transport for each of `virtio`, which must be at most
    /// [`layout::MAX_VIRTIO_DEVICES`].
    pub(crate) fn new(
        console: ConsoleInput,
        ioapic: Ioapic,
        memory: &GuestMemory,
        virtio: Vec<Box<dyn Device>>,
    ) -> Self {
        assert!(virtio.len() <= layout::MAX_VIRTIO_DEVICES, "the caller counts its devices");
        let ioapic = Arc::new(ioapic);
        let transports = (layout::VIRTIO_PIN..)
            .zip(virtio)
            .map(|(pin, device)| Transport::new(device, memory.clone(), Line::new(&ioapic, pin)))
            .collect();
        Self { serial: Mutex::default(), console, ioapic, transports }
    }

    /// The devices as they were saved, paused, with `virtio` in the places of those that were.
    pub(crate) fn restore(
        console: ConsoleInput,
        ioapic: Ioapic,
        memory: &GuestMemory,
        virtio: Vec<Box<dyn Device>>,
        state: &DevicesState,
    ) -> Result<Self, DeviceError> {
        let (expected, found) = (state.virtio.len(), virtio.len());
        if expected != found || found > layout::MAX_VIRTIO_DEVICES {
            return Err(DeviceError::Count { expected, found });
        }
        ioapic.restore(&state.ioapic);
        let ioapic = Arc::new(ioapic);
        let transports = virtio.into_iter().zip(&state.virtio).enumerate().map(|(index, (device, saved))| {
            let line = Line::new(&ioapic, layout::VIRTIO_PIN + index as u8);
            Transport::restore(device, memory.clone(), line, saved)
                .map_err(|why| DeviceError::Virtio { index, why })
        });
        let transports = transports.collect::<Result<_, _>>()?;
        Ok(Self { serial: Mutex::new(Serial::restore(state.serial)), console, ioapic, transports })
    }

    /// Stops all devices; the vCPUs rest.
    pub(crate) fn pause(&self) {
        self.transports.iter().for_each(Transport::begin_pause);
        self.transports.iter().for_each(Transport::pause);
    }

    /// Lets paused devices go on.
    pub(crate) fn resume(&self) {
        self.transports.iter().for_each(Transport::resume);
    }

    /// What the paused devices are.
    ///
    /// # Errors
    /// The virtio device that has requests in flight.
    pub(crate) fn save(&self) -> Result<DevicesState, usize> {
        let virtio =
            self.transports.iter().enumerate().map(|(index, transport)| transport.save().ok_or(index));
        Ok(DevicesState {
            virtio: virtio.collect::<Result<_, _>>()?,
            serial: self.serial().save(),
            ioapic: self.ioapic.save(),
        })
    }

    /// The guest writes `data` to `port`; a string instruction writes several elements at once.
    pub(crate) fn write_port(&self, port: u16, data: &[u8]) -> Effect {
        match (port, data.first()) {
            (KEYBOARD_COMMAND, Some(&KEYBOARD_PULSE_RESET)) => return Effect::Reset,
            (RESET_CONTROL, Some(value)) if value & RESET_CONTROL_RESET != 0 => return Effect::Reset,
            (serial::PORT..=serial::LAST_PORT, _) => {
                for &byte in data {
                    self.write_serial(port - serial::PORT, byte);
                }
            }
            _ => {}
        }
        Effect::None
    }

    /// The guest reads from `port` into `data`.
    pub(crate) fn read_port(&self, port: u16, data: &mut [u8]) {
        data.fill(0xff);
        match port {
            serial::PORT..=serial::LAST_PORT => {
                let mut serial = self.serial();
                data.fill_with(|| serial.read(port - serial::PORT));
            }
            // Idle: a guest that wants to reset itself waits for it.
            KEYBOARD_COMMAND => data.fill(0),
            _ => {}
        }
    }

    /// The guest writes `data` at `gpa`.
    pub(crate) fn write_memory(&self, gpa: u64, data: &[u8]) -> Effect {
        let Some((window, offset)) = self.window(gpa) else { return Effect::None };
        match window {
            Window::Virtio(transport) => transport.write(offset, data),
            Window::Power => {
                if let Some(request) = word(data).and_then(|value| power::write(offset, value)) {
                    return Effect::Power(request);
                }
            }
            Window::Ioapic => {
                if let Some(value) = word(data) {
                    self.ioapic.write(offset, value);
                }
            }
        }
        Effect::None
    }

    /// The guest reads at `gpa` into `data`.
    pub(crate) fn read_memory(&self, gpa: u64, data: &mut [u8]) {
        let value = match self.window(gpa) {
            Some((Window::Virtio(transport), offset)) => return transport.read(offset, data),
            Some((Window::Power, offset)) if data.len() == 4 => power::read(offset),
            Some((Window::Ioapic, offset)) if data.len() == 4 => Some(self.ioapic.read(offset)),
            _ => None,
        };
        match value {
            Some(value) => data.copy_from_slice(&value.to_le_bytes()),
            None => data.fill(0xff),
        }
    }

    /// What is at `gpa`, and how far into it.
    fn window(&self, gpa: u64) -> Option<(Window<'_>, u64)> {
        let offset = gpa % layout::WINDOW_BYTES;
        let window = match Gpa(gpa - offset) {
            layout::POWER_PAGE => Window::Power,
            layout::IOAPIC => Window::Ioapic,
            start => {
                let index = start.0.checked_sub(layout::VIRTIO_START.0)? / layout::WINDOW_BYTES;
                Window::Virtio(self.transports.get(usize::try_from(index).ok()?)?)
            }
        };
        Some((window, offset))
    }

    fn write_serial(&self, offset: u16, byte: u8) {
        let effect = self.serial().write(offset, byte);
        if let Some(byte) = effect.output {
            self.console.push(byte);
        }
        if effect.interrupt {
            self.ioapic.raise(layout::SERIAL_PIN);
        }
    }

    fn serial(&self) -> MutexGuard<'_, Serial> {
        self.serial.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

enum Window<'a> {
    Power,
    Ioapic,
    Virtio(&'a Transport),
}

/// One pin of the I/O APIC, as a virtio device sees it.
struct Line {
    ioapic: Arc<Ioapic>,
    pin: u8,
}

impl Line {
    fn new(ioapic: &Arc<Ioapic>, pin: u8) -> Arc<Self> {
        Arc::new(Self { ioapic: Arc::clone(ioapic), pin })
    }
}

impl Interrupt for Line {
    fn raise(&self) {
        self.ioapic.raise(self.pin);
    }
}

/// The value of a 32-bit access.
fn word(data: &[u8]) -> Option<u32> {
    data.try_into().ok().map(u32::from_le_bytes)
}
