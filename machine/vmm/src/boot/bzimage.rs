//! bzImage kernels, entered in 64-bit mode.
//!
//! Linux `Documentation/arch/x86/boot.rst`, "The Linux/x86 Boot Protocol", §"The Real-Mode Kernel Header" and §"64-bit
//! Boot Protocol".

use kiln_memory::{Gpa, GuestMemory};

use super::{BootError, Entry, Image, Kernel, low_ram_end, unknown_if_short};
use crate::layout;

/// Where the set-up header starts in the file and in the boot parameters.
pub(super) const HEADER_START: usize = 0x1f1;
/// Where the header ends at the latest: its own length byte says where.
const HEADER_END: usize = 0x290;
const HEADER_BYTES: usize = HEADER_END - HEADER_START;
const SECTOR_BYTES: u64 = 512;
/// The first version with the fields a 64-bit entry needs (Linux 3.8).
const MIN_VERSION: u16 = 0x020c;
const BOOT_FLAG: u16 = 0xaa55;
const MAGIC: &[u8; 4] = b"HdrS";
const LOADED_HIGH: u8 = 1;
const XLF_KERNEL_64: u16 = 1;
/// The 64-bit entry point lies this far into the protected-mode kernel.
const ENTRY_64: u64 = 0x200;

/// The set-up header of a bzImage as it is in the file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SetupHeader {
    bytes: [u8; HEADER_BYTES],
    len: usize,
}

impl SetupHeader {
    /// The header's bytes, which start at 0x1f1 in the boot parameters.
    pub(super) fn bytes(&self) -> &[u8] {
        &self.bytes[..self.len]
    }

    fn u8(&self, at: usize) -> u8 {
        self.bytes[at - HEADER_START]
    }

    fn u16(&self, at: usize) -> u16 {
        u16::from_le_bytes([self.u8(at), self.u8(at + 1)])
    }

    fn u32(&self, at: usize) -> u32 {
        u32::from(self.u16(at)) | u32::from(self.u16(at + 2)) << 16
    }

    fn u64(&self, at: usize) -> u64 {
        u64::from(self.u32(at)) | u64::from(self.u32(at + 4)) << 32
    }

    /// How many bytes of memory the kernel needs from where it is loaded, to unpack itself.
    fn init_size(&self) -> u32 {
        self.u32(0x260)
    }
}

/// Loads the protected-mode kernel where it prefers to be.
pub(super) fn load(memory: &GuestMemory, image: &Image<'_>) -> Result<Kernel, BootError> {
    let header = read_header(image)?;
    // 0 means 4, for kernels older than any this accepts, and for those that say so.
    let setup_sectors = match header.u8(0x1f1) {
        0 => 4,
        sectors => u64::from(sectors),
    };
    let start = (setup_sectors + 1) * SECTOR_BYTES;
    let bytes = image.bytes.checked_sub(start).ok_or(BootError::Malformed("it ends too early"))?;
    if bytes <= ENTRY_64 {
        return Err(BootError::Malformed("it ends too early"));
    }
    let at = header.u64(0x258);
    if at < layout::KERNEL_START.0 {
        return Err(BootError::Malformed("it wants to be loaded below 1 MiB"));
    }
    let end = at
        .checked_add(bytes.max(header.init_size().into()))
        .ok_or(BootError::Malformed("it wants to be loaded past the end of the address space"))?;
    if end > low_ram_end(memory).0 {
        return Err(BootError::TooLarge { what: "kernel", memory_mib: memory.bytes() >> 20 });
    }
    image.load(memory, start, bytes, Gpa(at))?;
    Ok(Kernel {
        entry: Entry::Linux64 { at: Gpa(at + ENTRY_64), header },
        end: Gpa(end),
        initramfs_max: Gpa(header.u32(0x22c).into()),
    })
}

fn read_header(image: &Image<'_>) -> Result<SetupHeader, BootError> {
    let mut bytes = [0; HEADER_BYTES];
    image.read(HEADER_START as u64, &mut bytes).map_err(unknown_if_short)?;
    let mut header = SetupHeader { bytes, len: HEADER_BYTES };
    if header.u16(0x1fe) != BOOT_FLAG || header.u32(0x202).to_le_bytes() != *MAGIC {
        return Err(BootError::UnknownKernel);
    }
    if header.u16(0x206) < MIN_VERSION {
        return Err(BootError::Not64Bit("its boot protocol is older than 2.12"));
    }
    if header.u8(0x211) & LOADED_HIGH == 0 {
        return Err(BootError::Not64Bit("it is a zImage"));
    }
    if header.u16(0x236) & XLF_KERNEL_64 == 0 {
        return Err(BootError::Not64Bit("it is a 32-bit kernel"));
    }
    // The jump instruction at 0x200 skips the header, so its offset is where the header ends.
    header.len = (0x202 + usize::from(header.u8(0x201))).clamp(0x264, HEADER_END) - HEADER_START;
    Ok(header)
}
