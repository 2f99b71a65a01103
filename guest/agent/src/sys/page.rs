//! The power device's page in the agent's address space.

use core::ptr::{NonNull, null_mut};
use core::sync::atomic::{AtomicPtr, Ordering};

use kiln_protocol::{POWER_GPA, power};
use rustix::fs::{CWD, FileType, Mode, OFlags};
use rustix::io::Errno;
use rustix::mm::{MapFlags, ProtFlags};

/// The name under which the agent makes the memory device for itself, in its own root, which commands never see.
const MEMORY_DEVICE: &str = "/mem";
/// Character device 1:1, `/dev/mem`. Linux Documentation/admin-guide/devices.txt.
const MEMORY_DEVICE_NUMBER: (u32, u32) = (1, 1);

/// Where the page is, for a panic handler to find.
static MAPPED: AtomicPtr<u32> = AtomicPtr::new(null_mut());

/// The registers of the power device, each 32 bits; a store leaves the guest at once, without the guest kernel.
pub struct PowerPage {
    base: NonNull<u32>,
}

impl PowerPage {
    /// Maps the device, and checks that it is there.
    ///
    /// # Errors
    /// When the kernel gives no access to device memory (`CONFIG_DEVMEM`); `NODEV` when nothing answers at the
    /// address.
    pub fn map() -> Result<Self, Errno> {
        let (major, minor) = MEMORY_DEVICE_NUMBER;
        let number = rustix::fs::makedev(major, minor);
        let mode = Mode::RUSR | Mode::WUSR;
        match rustix::fs::mknodat(CWD, MEMORY_DEVICE, FileType::CharacterDevice, mode, number) {
            Ok(()) | Err(Errno::EXIST) => {}
            Err(error) => return Err(error),
        }
        // O_SYNC makes the mapping uncached.
        let flags = OFlags::RDWR | OFlags::SYNC | OFlags::CLOEXEC;
        let memory = rustix::fs::open(MEMORY_DEVICE, flags, Mode::empty())?;
        let access = ProtFlags::READ | ProtFlags::WRITE;
        // SAFETY: a new mapping at an address of the kernel's choosing aliases nothing of ours.
        let base = unsafe {
            rustix::mm::mmap(null_mut(), power::PAGE_BYTES, access, MapFlags::SHARED, &memory, POWER_GPA)
        }?;
        let base = NonNull::new(base.cast::<u32>()).ok_or(Errno::NOMEM)?;
        let page = Self { base };
        if page.read(power::MAGIC) != power::MAGIC_VALUE {
            return Err(Errno::NODEV);
        }
        MAPPED.store(base.as_ptr(), Ordering::Relaxed);
        Ok(page)
    }

    /// Stores `value` at the register `offset`, one of [`power`]'s.
    pub fn write(&self, offset: usize, value: u32) {
        let register = self.register(offset);
        // SAFETY: `register` is inside the mapping, which lives until the process ends and is not memory of Rust's.
        unsafe { register.write_volatile(value) }
    }

    fn read(&self, offset: usize) -> u32 {
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

/// Tells the monitor that what comes next is no orderly end, from wherever the program is; nothing when there is no
/// power device.
pub fn notice(code: u32) {
    if let Some(base) = NonNull::new(MAPPED.load(Ordering::Relaxed)) {
        PowerPage { base }.write(power::NOTICE, code);
    }
}
