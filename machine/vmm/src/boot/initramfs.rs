//! Where the initramfs goes.

use std::fs::File;

use kiln_memory::{Gpa, GuestMemory, PAGE_BYTES};

use super::{BootError, Image, Kernel, low_ram_end};

/// A loaded initramfs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Initramfs {
    pub(super) at: Gpa,
    pub(super) bytes: u64,
}

/// Loads `file` as high below the MMIO hole as the kernel allows, away from where the kernel unpacks itself. An empty
/// file is no initramfs.
pub(super) fn load(
    memory: &GuestMemory,
    kernel: &Kernel,
    file: &File,
) -> Result<Option<Initramfs>, BootError> {
    let image = Image::open(file, "initramfs")?;
    if image.bytes == 0 {
        return Ok(None);
    }
    let limit = low_ram_end(memory).0.min(kernel.initramfs_max.0.saturating_add(1));
    let at = limit
        .checked_sub(image.bytes)
        .map(|at| at & !(PAGE_BYTES - 1))
        .filter(|at| *at >= kernel.end.0)
        .ok_or(BootError::TooLarge { what: "initramfs", memory_mib: memory.bytes() >> 20 })?;
    image.load(memory, 0, image.bytes, Gpa(at))?;
    Ok(Some(Initramfs { at: Gpa(at), bytes: image.bytes }))
}
