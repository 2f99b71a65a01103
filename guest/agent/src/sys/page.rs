//! The power device's page in the agent's address space.

use std::ffi::c_void;
use std::io;
use std::ptr::NonNull;

use kiln_protocol::{POWER_GPA, power};
use rustix::fs::{CWD, FileType, Mode, OFlags};
use rustix::mm::{MapFlags, ProtFlags};

/// The name under which the agent makes the memory device for itself, in its own root, which commands never see.
const MEMORY_DEVICE: &str = "/mem";
/// Character device 1:1, `/dev/mem`. Linux Documentation/admin-guide/devices.txt.
const MEMORY_DEVICE_NUMBER: (u32, u32) = (1, 1);

/// The registers of the power device, each 32 bits; a store leaves the guest at once, without the guest kernel.
pub struct PowerPage {
    base: NonNull<u32>,
}

impl PowerPage {
    /// Maps the device, and checks that it is there.
    ///
    /// # Errors
    /// When the kernel gives no access to device memory (`CONFIG_DEVMEM`), or nothing answers at the address.
    pub fn map() -> io::Result<Self> {
        let (major, minor) = MEMORY_DEVICE_NUMBER;
        let number = rustix::fs::makedev(major, minor);
        match rustix::fs::mknodat(
            CWD,
            MEMORY_DEVICE,
            FileType::CharacterDevice,
            Mode::RUSR | Mode::WUSR,
            number,
        ) {
            Ok(()) | Err(rustix::io::Errno::EXIST) => {}
            Err(error) => return Err(error.into()),
        }
        // O_SYNC makes the mapping uncached.
        let flags = OFlags::RDWR | OFlags::SYNC | OFlags::CLOEXEC;
        let memory = rustix::fs::open(MEMORY_DEVICE, flags, Mode::empty())?;
        // SAFETY: a new mapping at an address of the kernel's choosing aliases nothing of ours.
        let base = unsafe {
            rustix::mm::mmap(
                std::ptr::null_mut::<c_void>(),
                power::PAGE_BYTES,
                ProtFlags::READ | ProtFlags::WRITE,
                MapFlags::SHARED,
                &memory,
                POWER_GPA,
            )
        }?;
        let base = NonNull::new(base.cast::<u32>()).ok_or_else(|| io::Error::other("mapped at address 0"))?;
        let page = Self { base };
        match page.read(power::MAGIC) {
            power::MAGIC_VALUE => Ok(page),
            other => Err(io::Error::other(format!("{other:#x} where a power device should answer"))),
        }
    }

    /// Stores `value` at the register `offset`, one of [`power`]'s.
    pub fn write(&self, offset: usize, value: u32) {
        let register = self.register(offset);
        // SAFETY: `register` is inside the mapping, which lives until the process ends and is not memory of Rust's.
        unsafe { register.write_volatile(value) }
    }

    /// Loads the register `offset`, one of [`power`]'s.
    pub fn read(&self, offset: usize) -> u32 {
        let register = self.register(offset);
        // SAFETY: as in `write`.
        unsafe { register.read_volatile() }
    }

    fn register(&self, offset: usize) -> NonNull<u32> {
        assert!(offset < power::PAGE_BYTES && offset.is_multiple_of(4), "a register of the page");
        // SAFETY: the offset was just checked to be inside the one mapping `base` points to.
        unsafe { self.base.byte_add(offset) }
    }
}
