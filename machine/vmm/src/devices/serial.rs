//! The first serial port: the guest's console.
//!
//! A 16550A as far as Linux's driver uses it: output only, always ready, with the transmitter-empty interrupt. National
//! Semiconductor PC16550D data sheet, §8 "Registers".

/// The port of the first register; eight follow each other.
pub(crate) const PORT: u16 = 0x3f8;

/// The last of them.
pub(crate) const LAST_PORT: u16 = PORT + 7;

const DATA: u16 = 0;
const INTERRUPT_ENABLE: u16 = 1;
const INTERRUPT_IDENTITY: u16 = 2;
const LINE_CONTROL: u16 = 3;
const MODEM_CONTROL: u16 = 4;
const LINE_STATUS: u16 = 5;
const MODEM_STATUS: u16 = 6;
const SCRATCH: u16 = 7;

const ENABLE_TRANSMITTER_EMPTY: u8 = 1 << 1;
const ENABLE_MASK: u8 = 0x0f;
const IDENTITY_NONE: u8 = 0x01;
const IDENTITY_TRANSMITTER_EMPTY: u8 = 0x02;
const IDENTITY_FIFO: u8 = 0xc0;
const FIFO_ENABLE: u8 = 0x01;
const DIVISOR_LATCH: u8 = 0x80;
const LOOP: u8 = 1 << 4;
const TRANSMITTER_IDLE: u8 = 0x60;
/// Carrier, data set ready, clear to send.
const LINE_UP: u8 = 0xb0;

/// What a register write asks of the machine.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Effect {
    /// The guest sent this byte.
    pub(crate) output: Option<u8>,
    /// The interrupt line rose.
    pub(crate) interrupt: bool,
}

/// The port.
#[derive(Debug, Default)]
pub(crate) struct Serial {
    registers: SerialState,
}

/// The registers of the serial port, and what they remember.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct SerialState {
    /// The rate, low byte first.
    pub divisor: [u8; 2],
    /// Which interrupts the guest wants.
    pub interrupt_enable: u8,
    /// The queues are on.
    pub fifo: bool,
    /// The line control register.
    pub line_control: u8,
    /// The modem control register.
    pub modem_control: u8,
    /// The scratch register.
    pub scratch: u8,
    /// The transmitter became empty and nobody has read the interrupt's identity since.
    pub transmitter_pending: bool,
}

impl Serial {
    /// The port as it was saved: any state is one a guest can bring about.
    pub(crate) fn restore(state: SerialState) -> Self {
        Self { registers: state }
    }

    /// What it is.
    pub(crate) fn save(&self) -> SerialState {
        self.registers
    }

    /// The guest reads the register at `offset` from [`PORT`].
    pub(crate) fn read(&mut self, offset: u16) -> u8 {
        match offset {
            DATA if self.latched() => self.registers.divisor[0],
            INTERRUPT_ENABLE if self.latched() => self.registers.divisor[1],
            INTERRUPT_ENABLE => self.registers.interrupt_enable,
            INTERRUPT_IDENTITY => self.identify(),
            LINE_CONTROL => self.registers.line_control,
            MODEM_CONTROL => self.registers.modem_control,
            LINE_STATUS => TRANSMITTER_IDLE,
            MODEM_STATUS if self.registers.modem_control & LOOP != 0 => self.looped_status(),
            MODEM_STATUS => LINE_UP,
            SCRATCH => self.registers.scratch,
            _ => 0,
        }
    }

    /// The guest writes the register at `offset` from [`PORT`].
    pub(crate) fn write(&mut self, offset: u16, value: u8) -> Effect {
        match offset {
            DATA if self.latched() => self.registers.divisor[0] = value,
            INTERRUPT_ENABLE if self.latched() => self.registers.divisor[1] = value,
            DATA => {
                let output = (self.registers.modem_control & LOOP == 0).then_some(value);
                return Effect { output, interrupt: self.transmitter_emptied() };
            }
            INTERRUPT_ENABLE => {
                let was_enabled = self.registers.interrupt_enable & ENABLE_TRANSMITTER_EMPTY != 0;
                self.registers.interrupt_enable = value & ENABLE_MASK;
                if self.registers.interrupt_enable & ENABLE_TRANSMITTER_EMPTY == 0 {
                    self.registers.transmitter_pending = false;
                } else if !was_enabled {
                    return Effect { output: None, interrupt: self.transmitter_emptied() };
                }
            }
            INTERRUPT_IDENTITY => self.registers.fifo = value & FIFO_ENABLE != 0,
            LINE_CONTROL => self.registers.line_control = value,
            MODEM_CONTROL => self.registers.modem_control = value,
            SCRATCH => self.registers.scratch = value,
            _ => {}
        }
        Effect::default()
    }

    /// The transmitter has nothing left to send. Says whether the interrupt line rose for it.
    fn transmitter_emptied(&mut self) -> bool {
        let rises = self.registers.interrupt_enable & ENABLE_TRANSMITTER_EMPTY != 0
            && !self.registers.transmitter_pending;
        self.registers.transmitter_pending |= rises;
        rises
    }

    /// Reading the identity of the transmitter's interrupt ends it.
    fn identify(&mut self) -> u8 {
        let identity = if std::mem::take(&mut self.registers.transmitter_pending) {
            IDENTITY_TRANSMITTER_EMPTY
        } else {
            IDENTITY_NONE
        };
        identity | if self.registers.fifo { IDENTITY_FIFO } else { 0 }
    }

    fn latched(&self) -> bool {
        self.registers.line_control & DIVISOR_LATCH != 0
    }

    /// In loop-back the modem's inputs are its outputs: RTS → CTS, DTR → DSR, OUT1 → RI, OUT2 → DCD.
    fn looped_status(&self) -> u8 {
        let control = self.registers.modem_control;
        (control & 2) << 3 | (control & 1) << 5 | (control & 4) << 4 | (control & 8) << 4
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_byte_written_is_a_byte_sent() {
        let mut serial = Serial::default();
        assert_eq!(serial.write(DATA, b'x'), Effect { output: Some(b'x'), interrupt: false });
        assert_eq!(serial.read(LINE_STATUS), TRANSMITTER_IDLE);
    }

    #[test]
    fn the_divisor_is_not_sent() {
        let mut serial = Serial::default();
        serial.write(LINE_CONTROL, DIVISOR_LATCH);
        assert_eq!(serial.write(DATA, 1), Effect::default());
        assert_eq!(serial.read(DATA), 1);
    }

    #[test]
    fn the_transmitter_interrupt_rises_once_until_it_is_identified() {
        let mut serial = Serial::default();
        assert!(serial.write(INTERRUPT_ENABLE, ENABLE_TRANSMITTER_EMPTY).interrupt);
        assert!(!serial.write(DATA, b'a').interrupt, "the line is high already");
        assert_eq!(serial.read(INTERRUPT_IDENTITY), IDENTITY_TRANSMITTER_EMPTY);
        assert_eq!(serial.read(INTERRUPT_IDENTITY), IDENTITY_NONE);
        assert!(serial.write(DATA, b'b').interrupt);
    }

    #[test]
    fn enabling_again_raises_again() {
        let mut serial = Serial::default();
        serial.write(INTERRUPT_ENABLE, ENABLE_TRANSMITTER_EMPTY);
        serial.write(INTERRUPT_ENABLE, 0);
        assert_eq!(serial.read(INTERRUPT_IDENTITY), IDENTITY_NONE);
        assert!(serial.write(INTERRUPT_ENABLE, ENABLE_TRANSMITTER_EMPTY).interrupt);
    }

    #[test]
    fn loop_back_shows_the_outputs_and_sends_nothing() {
        let mut serial = Serial::default();
        serial.write(MODEM_CONTROL, LOOP | 0b1010);
        assert_eq!(serial.read(MODEM_STATUS), 0x90);
        assert_eq!(serial.write(DATA, b'x').output, None);
    }

    #[test]
    fn no_sequence_of_accesses_panics() {
        let mut serial = Serial::default();
        for value in 0..=u8::MAX {
            for offset in 0..16 {
                serial.write(offset, value);
                serial.read(offset);
            }
        }
    }
}
