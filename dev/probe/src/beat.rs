//! A heartbeat on the serial port, straight from user mode.
#![expect(unsafe_code, reason = "a port is written by an instruction of its own")]

use std::arch::asm;
use std::io;

/// The first serial port's data register.
const PORT: u16 = 0x3f8;
/// How many times nothing is done from beat to beat: some 100 us, in which a machine monitor can be spoken to.
const PAUSES: usize = 10_000;

/// Gives this process the right to write the port.
pub(crate) fn take_port() -> io::Result<()> {
    // SAFETY: one port, which nothing else in this process uses.
    if unsafe { libc::ioperm(PORT.into(), 1, 1) } != 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}

/// Writes `byte` to the port, which must have been [taken](take_port).
pub(crate) fn write(byte: u8) {
    // SAFETY: the instruction reads two registers; without the right to the port it ends the process.
    unsafe { asm!("out dx, al", in("dx") PORT, in("al") byte, options(nomem, nostack, preserves_flags)) };
}

/// Writes `!` to the port for ever. Between two beats it does not leave user mode, so a guest that was saved and is restored
/// shows by its next beat that it runs.
pub(crate) fn beat() -> io::Result<()> {
    take_port()?;
    loop {
        write(b'!');
        for _ in 0..PAUSES {
            std::hint::spin_loop();
        }
    }
}
