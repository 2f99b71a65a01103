//! A heartbeat on the serial port or at a Kiln machine's doorbell, straight from user mode.
#![expect(unsafe_code, reason = "a port is written by an instruction of its own, and a device by a mapping")]

use std::arch::asm;
use std::io;
use std::os::fd::AsRawFd as _;
use std::ptr::null_mut;

/// The first serial port's data register.
const PORT: u16 = 0x3f8;
/// How many times nothing is done from beat to beat: some 100 us, in which a machine monitor can be spoken to.
const PAUSES: usize = 10_000;

/// What is rung to say that all is well; the machine makes nothing of it.
pub(crate) const BEAT: u32 = 0x21;
/// What is rung to say that a register has lost its value.
pub(crate) const LOST: u32 = 0x58;
/// Where the doorbell's page is in the guest's memory, and where the doorbell in it: `kiln_protocol::power`.
const PAGE_AT: libc::off_t = 0xd000_0000;
const DOORBELL_WORD: usize = 2;

/// The doorbell of a Kiln machine.
pub(crate) struct Doorbell(*mut u32);

impl Doorbell {
    /// Maps it by a memory device that is made in the current directory.
    pub(crate) fn map() -> io::Result<Self> {
        const PAGE_BYTES: usize = 4096;
        let device = c"mem";
        // SAFETY: a path that ends in a zero.
        unsafe { libc::mknod(device.as_ptr(), libc::S_IFCHR | 0o600, libc::makedev(1, 1)) };
        let device = std::fs::File::options().read(true).write(true).open("mem")?;
        let access = libc::PROT_READ | libc::PROT_WRITE;
        // SAFETY: a new mapping where the kernel likes.
        let page = unsafe {
            libc::mmap(null_mut(), PAGE_BYTES, access, libc::MAP_SHARED, device.as_raw_fd(), PAGE_AT)
        };
        if page == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        Ok(Self(page.cast::<u32>().wrapping_add(DOORBELL_WORD)))
    }

    /// Its address.
    pub(crate) fn register(&self) -> *mut u32 {
        self.0
    }

    /// Rings it.
    pub(crate) fn ring(&self, value: u32) {
        // SAFETY: it is mapped for good.
        unsafe { self.0.write_volatile(value) }
    }
}

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
