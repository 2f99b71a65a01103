//! The I/O APIC: turns a device's interrupt line into a message to a local APIC.
//!
//! Intel 82093AA data sheet, §3 "Register Description". It lives in the monitor because in the kernel each pin in use
//! would cost a route, whose registration waits for milliseconds. All inputs are edge-triggered, as the MP table says;
//! an edge that arrives while its pin is masked is kept and delivered when the pin is unmasked, so that a driver cannot
//! lose one.

use std::sync::{Mutex, MutexGuard, PoisonError};

use kiln_hypervisor::{IOAPIC_PINS, Msi};

const PINS: usize = IOAPIC_PINS as usize;

/// The window's two registers.
const SELECT: u64 = 0x00;
const DATA: u64 = 0x10;

const INDEX_ID: u8 = 0;
const INDEX_VERSION: u8 = 1;
const INDEX_ARBITRATION: u8 = 2;
const INDEX_REDIRECTION: u8 = 0x10;
/// Version 0x11, the last pin's number above it.
const VERSION: u32 = 0x11 | (IOAPIC_PINS as u32 - 1) << 16;

const MASKED: u64 = 1 << 16;
const LEVEL_TRIGGERED: u64 = 1 << 15;
const LOGICAL: u64 = 1 << 11;
/// Vector, delivery mode, destination mode, polarity, trigger, mask, destination: what the guest may write.
const WRITABLE: u64 = 0xff00_0000_0001_afff;

const MSI_ADDRESS: u32 = 0xfee0_0000;
const MSI_LOGICAL: u32 = 1 << 2;
const MSI_REDIRECTION_HINT: u32 = 1 << 3;
const DELIVERY_LOWEST_PRIORITY: u64 = 1;

/// The I/O APIC of one machine, shared by its vCPUs and its devices.
pub(crate) struct Ioapic {
    registers: Mutex<IoapicState>,
    send: Box<dyn Fn(Msi) + Send + Sync>,
}

/// The registers of the I/O APIC, and what they remember.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct IoapicState {
    /// The register the guest reads and writes.
    pub select: u8,
    /// Its id.
    pub id: u8,
    /// Where each pin's interrupts go.
    pub redirections: [u64; PINS],
    /// Pins with an edge that waits for its mask to go, a bit each.
    pub waiting: u32,
}

impl Ioapic {
    /// An I/O APIC with all pins masked, which delivers through `send`.
    pub(crate) fn new(id: u8, send: impl Fn(Msi) + Send + Sync + 'static) -> Self {
        let registers = IoapicState { select: 0, id: id & 0x0f, redirections: [MASKED; PINS], waiting: 0 };
        Self { registers: Mutex::new(registers), send: Box::new(send) }
    }

    /// Becomes what was saved, as far as a guest can bring it about.
    pub(crate) fn restore(&self, state: &IoapicState) {
        *self.lock() = IoapicState {
            id: state.id & 0x0f,
            redirections: state.redirections.map(|redirection| redirection & WRITABLE),
            waiting: state.waiting & ((1 << PINS) - 1),
            ..*state
        };
    }

    /// What it is.
    pub(crate) fn save(&self) -> IoapicState {
        *self.lock()
    }

    /// A device's line rises.
    pub(crate) fn raise(&self, pin: u8) {
        let mut registers = self.lock();
        let Some(&redirection) = registers.redirections.get(usize::from(pin)) else { return };
        if redirection & MASKED != 0 {
            registers.waiting |= 1 << pin;
            return;
        }
        drop(registers);
        (self.send)(message(redirection));
    }

    /// The guest reads the register at `offset` of the window.
    pub(crate) fn read(&self, offset: u64) -> u32 {
        let registers = self.lock();
        match offset {
            SELECT => registers.select.into(),
            DATA => registers.selected(),
            _ => 0,
        }
    }

    /// The guest writes the register at `offset` of the window.
    pub(crate) fn write(&self, offset: u64, value: u32) {
        let mut registers = self.lock();
        match offset {
            SELECT => registers.select = value as u8,
            DATA => {
                let unmasked = registers.set_selected(value);
                drop(registers);
                if let Some(redirection) = unmasked {
                    (self.send)(message(redirection));
                }
            }
            _ => {}
        }
    }

    fn lock(&self) -> MutexGuard<'_, IoapicState> {
        self.registers.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl IoapicState {
    fn selected(&self) -> u32 {
        match self.select {
            INDEX_ID | INDEX_ARBITRATION => u32::from(self.id) << 24,
            INDEX_VERSION => VERSION,
            index => Self::redirection(index).map_or(0, |(pin, high)| {
                let word = self.redirections[pin];
                (if high { word >> 32 } else { word }) as u32
            }),
        }
    }

    /// Sets the selected register. An edge that waited for this write is returned as its pin's redirection.
    fn set_selected(&mut self, value: u32) -> Option<u64> {
        if self.select == INDEX_ID {
            self.id = (value >> 24) as u8 & 0x0f;
            return None;
        }
        let (pin, high) = Self::redirection(self.select)?;
        let old = self.redirections[pin];
        let new = if high {
            old & 0xffff_ffff | u64::from(value) << 32
        } else {
            old & !0xffff_ffff | u64::from(value)
        } & WRITABLE;
        self.redirections[pin] = new;
        let waits = self.waiting & 1 << pin != 0;
        if waits && new & MASKED == 0 {
            self.waiting &= !(1 << pin);
            return Some(new);
        }
        None
    }

    /// Which pin's redirection entry `index` selects, and whether its upper half.
    fn redirection(index: u8) -> Option<(usize, bool)> {
        let index = usize::from(index.checked_sub(INDEX_REDIRECTION)?);
        (index / 2 < PINS).then_some((index / 2, index % 2 == 1))
    }
}

/// The message a redirection entry stands for.
fn message(redirection: u64) -> Msi {
    let delivery = redirection >> 8 & 7;
    let destination = (redirection >> 56) as u32;
    let mut address = MSI_ADDRESS | destination << 12;
    if redirection & LOGICAL != 0 {
        address |= MSI_LOGICAL;
    }
    if delivery == DELIVERY_LOWEST_PRIORITY {
        address |= MSI_REDIRECTION_HINT;
    }
    // A level trigger would wait for an end-of-interrupt that never reaches the monitor, so all go out as edges.
    let vector_and_delivery = redirection & 0x7ff & !LEVEL_TRIGGERED;
    Msi { address, data: vector_and_delivery as u32 }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::Arc;

    fn recorded() -> (Arc<Mutex<Vec<Msi>>>, Ioapic) {
        let sent = Arc::new(Mutex::new(Vec::new()));
        let sink = Arc::clone(&sent);
        (sent, Ioapic::new(1, move |msi| sink.lock().expect("no panic").push(msi)))
    }

    fn program(ioapic: &Ioapic, pin: u8, low: u32, high: u32) {
        ioapic.write(SELECT, u32::from(INDEX_REDIRECTION + pin * 2 + 1));
        ioapic.write(DATA, high);
        ioapic.write(SELECT, u32::from(INDEX_REDIRECTION + pin * 2));
        ioapic.write(DATA, low);
    }

    #[test]
    fn a_raised_pin_sends_its_vector_to_its_destination() {
        let (sent, ioapic) = recorded();
        program(&ioapic, 5, 0x31, 3 << 24);
        ioapic.raise(5);
        assert_eq!(*sent.lock().expect("no panic"), [Msi { address: 0xfee0_3000, data: 0x31 }]);
    }

    #[test]
    fn logical_lowest_priority_goes_out_as_such() {
        let (sent, ioapic) = recorded();
        program(&ioapic, 7, 0x0931, 0xff << 24);
        ioapic.raise(7);
        assert_eq!(*sent.lock().expect("no panic"), [Msi { address: 0xfeef_f00c, data: 0x131 }]);
    }

    #[test]
    fn an_edge_on_a_masked_pin_is_delivered_once_when_unmasked() {
        let (sent, ioapic) = recorded();
        ioapic.raise(5);
        ioapic.raise(5);
        assert!(sent.lock().expect("no panic").is_empty());
        program(&ioapic, 5, 0x31, 0);
        program(&ioapic, 5, 0x31, 0);
        assert_eq!(sent.lock().expect("no panic").len(), 1);
    }

    #[test]
    fn a_level_trigger_goes_out_as_an_edge() {
        let (sent, ioapic) = recorded();
        program(&ioapic, 5, 0x8031, 0);
        ioapic.raise(5);
        assert_eq!(sent.lock().expect("no panic")[0].data, 0x31);
    }

    #[test]
    fn pins_and_registers_that_do_not_exist_do_nothing() {
        let (sent, ioapic) = recorded();
        ioapic.raise(IOAPIC_PINS);
        ioapic.raise(u8::MAX);
        for index in 0..=u32::from(u8::MAX) {
            ioapic.write(SELECT, index);
            ioapic.write(DATA, MASKED as u32);
            ioapic.read(DATA);
        }
        for offset in 0..0x1000 {
            ioapic.read(offset);
            ioapic.write(offset, u32::MAX);
        }
        assert!(sent.lock().expect("no panic").is_empty());
    }

    #[test]
    fn the_version_says_how_many_pins_there_are() {
        let (_, ioapic) = recorded();
        ioapic.write(SELECT, 1);
        assert_eq!(ioapic.read(DATA) >> 16, 23);
    }
}
