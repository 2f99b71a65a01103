//! What the agent shares with the monitor, in its own address space: the power device's page and the mailbox.

use core::ptr::{NonNull, null_mut};
use core::sync::atomic::{AtomicPtr, Ordering, compiler_fence};

use kiln_protocol::mailbox::{self, ACKNOWLEDGED_AT, ENTROPY_AT, ENTROPY_BYTES, GENERATION_BYTES, ID_BYTES};
use kiln_protocol::{POWER_GPA, power};
use rustix::fd::{AsFd, OwnedFd};
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
        // O_SYNC makes the mapping uncached.
        let base = map(open(OFlags::SYNC)?, POWER_GPA)?;
        let page = Self { base };
        if page.read(power::MAGIC) != power::MAGIC_VALUE {
            return Err(Errno::NODEV);
        }
        MAPPED.store(base.as_ptr(), Ordering::Relaxed);
        Ok(page)
    }

    /// Stores `value` at the register `offset`, one of [`power`]'s.
    #[inline]
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

    #[inline]
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

/// What lies in a mailbox, taken out of it.
pub type Mail = [u8; GENERATION_BYTES];

/// The mailbox: memory in which the monitor leaves a restored guest its mail, while the guest stands still.
pub struct Mailbox {
    base: NonNull<u32>,
}

impl Mailbox {
    /// Maps the guest's mailbox.
    ///
    /// # Errors
    /// When the kernel gives no access to device memory (`CONFIG_DEVMEM`).
    pub fn map() -> Result<Self, Errno> {
        Ok(Self { base: map(open(OFlags::empty())?, mailbox::GPA)? })
    }

    /// Maps a mailbox at the start of `memory`, which must be a page at least: for tests on a host.
    ///
    /// # Errors
    /// What mmap(2) reports.
    pub fn in_file(memory: impl AsFd) -> Result<Self, Errno> {
        Ok(Self { base: map(memory, 0)? })
    }

    /// Takes the mail into `mail`: wipes the entropy out of the mailbox, so that it is in no snapshot of the time to
    /// come, and acknowledges the id. False, and nothing done, when there is no mail or it has been taken before.
    ///
    /// A restored guest's first instructions: no call, no allocation, no page but the stack's, this code's and the
    /// mailbox's.
    #[inline]
    pub fn take(&self, mail: &mut Mail) -> bool {
        const ID_WORDS: usize = ID_BYTES / 4;
        let (mut is_some, mut is_new) = (false, false);
        for word in 0..ID_WORDS {
            let id = self.read(word);
            is_some |= id != 0;
            is_new |= id != self.read(ACKNOWLEDGED_AT / 4 + word);
        }
        if !(is_some && is_new) {
            return false;
        }
        for (word, bytes) in mail.chunks_exact_mut(4).enumerate() {
            bytes.copy_from_slice(&self.read(word).to_le_bytes());
        }
        for word in 0..ENTROPY_BYTES / 4 {
            self.write(ENTROPY_AT / 4 + word, 0);
        }
        for word in 0..ID_WORDS {
            self.write(ACKNOWLEDGED_AT / 4 + word, self.read(word));
        }
        true
    }

    #[inline]
    fn read(&self, word: usize) -> u32 {
        let word = self.word(word);
        // SAFETY: `word` is inside the mapping, which lives until the process ends and is not memory of Rust's.
        u32::from_le(unsafe { word.read_volatile() })
    }

    #[inline]
    fn write(&self, word: usize, value: u32) {
        let word = self.word(word);
        // SAFETY: as in `read`.
        unsafe { word.write_volatile(value.to_le()) }
    }

    #[inline]
    fn word(&self, word: usize) -> NonNull<u32> {
        debug_assert!(word < GENERATION_BYTES / 4, "a word of a generation");
        // SAFETY: a generation is inside the one mapping `base` points to.
        unsafe { self.base.add(word) }
    }
}

const _: () = assert!(GENERATION_BYTES.is_multiple_of(4) && GENERATION_BYTES <= power::PAGE_BYTES);

/// Overwrites what was secret; the compiler may not leave it out.
pub fn wipe(bytes: &mut [u8]) {
    for byte in bytes {
        // SAFETY: a reference is good for a write.
        unsafe { core::ptr::from_mut(byte).write_volatile(0) }
    }
    compiler_fence(Ordering::SeqCst);
}

/// Opens the memory device.
fn open(flags: OFlags) -> Result<OwnedFd, Errno> {
    let (major, minor) = MEMORY_DEVICE_NUMBER;
    let number = rustix::fs::makedev(major, minor);
    let mode = Mode::RUSR | Mode::WUSR;
    match rustix::fs::mknodat(CWD, MEMORY_DEVICE, FileType::CharacterDevice, mode, number) {
        Ok(()) | Err(Errno::EXIST) => {}
        Err(error) => return Err(error),
    }
    rustix::fs::open(MEMORY_DEVICE, OFlags::RDWR | OFlags::CLOEXEC | flags, Mode::empty())
}

/// Maps one page of `memory`, shared and for good.
fn map(memory: impl AsFd, at: u64) -> Result<NonNull<u32>, Errno> {
    let access = ProtFlags::READ | ProtFlags::WRITE;
    // SAFETY: a new mapping at an address of the kernel's choosing aliases nothing of ours.
    let base =
        unsafe { rustix::mm::mmap(null_mut(), power::PAGE_BYTES, access, MapFlags::SHARED, memory, at) }?;
    NonNull::new(base.cast::<u32>()).ok_or(Errno::NOMEM)
}
