//! A heartbeat on the serial port, straight from user mode.
#![expect(unsafe_code, reason = "a port is written by an instruction of its own")]

use std::arch::asm;
use std::io;

/// The first serial port's data register.
const PORT: u16 = 0x3f8;
/// How many times nothing is done from beat to beat: some 100 us, in which a machine monitor can be spoken to.
const PAUSES: usize = 10_000;

/// Writes `!` to the port for ever. Between two beats it does not leave user mode, so a guest that was saved and is restored
/// shows by its next beat that it runs.
pub(crate) fn beat() -> io::Result<()> {
    // SAFETY: gives this process the right to one port, which nothing else in it uses.
    if unsafe { libc::ioperm(PORT.into(), 1, 1) } != 0 {
        return Err(io::Error::last_os_error());
    }
    loop {
        // SAFETY: the port is this process's to write; memory and flags stay as they are.
        unsafe { asm!("out dx, al", in("dx") PORT, in("al") b'!', options(nomem, nostack, preserves_flags)) };
        for _ in 0..PAUSES {
            std::hint::spin_loop();
        }
    }
}
