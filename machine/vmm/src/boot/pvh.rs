//! The start info of the PVH boot protocol.
//!
//! Xen `docs/misc/pvh.pandoc`, "x86/HVM direct boot ABI"; the structures are those of `public/arch-x86/hvm/start_info.h`.

use kiln_memory::{Gpa, GuestMemory, OutOfRange};

use super::initramfs::Initramfs;
use super::memory_map;
use crate::layout;

const MAGIC: u32 = 0x336e_c578;
const VERSION: u32 = 1;
const START_INFO_BYTES: u64 = 56;
const MODULE_BYTES: u64 = 32;

/// Writes the start info with its module list and memory map.
pub(super) fn write(memory: &GuestMemory, initramfs: Option<Initramfs>) -> Result<(), OutOfRange> {
    let modules = Gpa(layout::START_INFO.0 + START_INFO_BYTES);
    let map_at = Gpa(modules.0 + MODULE_BYTES);
    let map = memory_map::build(memory);

    let mut bytes = Vec::new();
    bytes.extend(MAGIC.to_le_bytes());
    bytes.extend(VERSION.to_le_bytes());
    bytes.extend(0u32.to_le_bytes()); // flags
    bytes.extend(u32::from(initramfs.is_some()).to_le_bytes());
    bytes.extend(modules.0.to_le_bytes());
    bytes.extend(layout::COMMAND_LINE.0.to_le_bytes());
    bytes.extend(0u64.to_le_bytes()); // no ACPI tables
    bytes.extend(map_at.0.to_le_bytes());
    bytes.extend((map.len() as u32).to_le_bytes());
    bytes.extend(0u32.to_le_bytes());
    debug_assert_eq!(bytes.len() as u64, START_INFO_BYTES);

    let module = initramfs.unwrap_or(Initramfs { at: Gpa(0), bytes: 0 });
    bytes.extend(module.at.0.to_le_bytes());
    bytes.extend(module.bytes.to_le_bytes());
    bytes.extend([0; 16]); // no command line of its own

    for range in map {
        bytes.extend(range.at.0.to_le_bytes());
        bytes.extend(range.bytes.to_le_bytes());
        bytes.extend((range.kind as u32).to_le_bytes());
        bytes.extend(0u32.to_le_bytes());
    }
    memory.write(layout::START_INFO, &bytes)
}
