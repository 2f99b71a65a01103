//! Why a vCPU stopped.

use std::fmt;

/// Why a vCPU stopped, and what it waits for.
#[derive(Debug, PartialEq, Eq)]
pub enum Exit<'a> {
    /// The guest wrote to an I/O port. A string instruction arrives as its elements laid end to end.
    PortWrite {
        /// The port.
        port: u16,
        /// What it wrote.
        data: &'a [u8],
    },
    /// The guest reads from an I/O port; the answer goes into `data`.
    PortRead {
        /// The port.
        port: u16,
        /// Where the answer goes.
        data: &'a mut [u8],
    },
    /// The guest wrote to an address no memory slot covers.
    MmioWrite {
        /// The guest physical address.
        gpa: u64,
        /// What it wrote, 1 to 8 bytes.
        data: &'a [u8],
    },
    /// The guest reads from an address no memory slot covers; the answer goes into `data`.
    MmioRead {
        /// The guest physical address.
        gpa: u64,
        /// Where the answer goes, 1 to 8 bytes.
        data: &'a mut [u8],
    },
    /// [`crate::Kick::kick`] was called, or the backend had something of its own to do. Look at what you may have been
    /// kicked for, and run again.
    Kicked,
    /// The processor shut down: a triple fault.
    Shutdown,
    /// The backend cannot go on: most often an instruction it cannot emulate.
    InternalError(InternalError),
    /// The processor refused the vCPU's state.
    FailedEntry {
        /// The hardware's reason, as the vendor's manual lists it.
        reason: u64,
    },
    /// An exit the contract does not know, by the backend's number.
    Unknown(u32),
}

/// What a backend says when it cannot go on.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct InternalError {
    /// `KVM_INTERNAL_ERROR_*`: 1 emulation, 2 simultaneous exceptions, 3 delivery of an event, 4 unexpected exit.
    pub suberror: u32,
    /// The bytes at the instruction pointer, when known.
    pub instruction: [u8; 15],
    /// How many of them there are.
    pub instruction_len: u8,
}

impl InternalError {
    /// The bytes at the instruction pointer, empty when not known.
    pub fn instruction(&self) -> &[u8] {
        self.instruction.get(..usize::from(self.instruction_len)).unwrap_or(&self.instruction)
    }
}

impl fmt::Display for InternalError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.suberror {
            1 => f.write_str("KVM cannot emulate an instruction")?,
            2 => f.write_str("KVM met two exceptions at once")?,
            3 => f.write_str("KVM could not deliver an event")?,
            4 => f.write_str("KVM met an exit it does not know")?,
            other => write!(f, "KVM internal error {other}")?,
        }
        if self.instruction_len > 0 {
            f.write_str(", bytes")?;
            for byte in self.instruction() {
                write!(f, " {byte:02x}")?;
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_internal_error_shows_the_instruction() {
        let mut error = InternalError { suberror: 1, instruction_len: 2, ..InternalError::default() };
        error.instruction[..2].copy_from_slice(&[0x0f, 0x0b]);
        assert_eq!(error.to_string(), "KVM cannot emulate an instruction, bytes 0f 0b");
    }

    #[test]
    fn a_length_beyond_the_bytes_shows_them_all() {
        let error = InternalError { suberror: 1, instruction_len: 200, ..InternalError::default() };
        assert_eq!(error.instruction().len(), 15);
    }
}
