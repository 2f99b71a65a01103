//! The boot parameters of the Linux boot protocol.
//!
//! Linux `Documentation/arch/x86/zero-page.rst`, "Zero Page".

use kiln_memory::{Gpa, GuestMemory, OutOfRange};

use super::bzimage::{HEADER_START, SetupHeader};
use super::command_line::CommandLine;
use super::initramfs::Initramfs;
use super::memory_map;
use crate::layout;

const BYTES: usize = 4096;
const E820_ENTRIES: usize = 0x1e8;
const E820_TABLE: usize = 0x2d0;
const E820_ENTRY_BYTES: usize = 20;
/// A boot loader without a number of its own.
const LOADER_UNDEFINED: u8 = 0xff;

/// Writes the boot parameters.
pub(super) fn write(
    memory: &GuestMemory,
    header: &SetupHeader,
    initramfs: Option<Initramfs>,
    command_line: &CommandLine,
) -> Result<(), OutOfRange> {
    let mut page = [0; BYTES];
    page[HEADER_START..HEADER_START + header.bytes().len()].copy_from_slice(header.bytes());
    page[0x210] = LOADER_UNDEFINED;
    // Addresses below 4 GiB by construction: the initramfs lies below the MMIO hole.
    let Initramfs { at, bytes } = initramfs.unwrap_or(Initramfs { at: Gpa(0), bytes: 0 });
    page[0x218..0x21c].copy_from_slice(&(at.0 as u32).to_le_bytes());
    page[0x21c..0x220].copy_from_slice(&(bytes as u32).to_le_bytes());
    page[0x228..0x22c].copy_from_slice(&(layout::COMMAND_LINE.0 as u32).to_le_bytes());
    page[0x238..0x23c].copy_from_slice(&(command_line.len() as u32).to_le_bytes());

    let map = memory_map::build(memory);
    page[E820_ENTRIES] = map.len() as u8;
    for (range, entry) in map.iter().zip(page[E820_TABLE..].chunks_exact_mut(E820_ENTRY_BYTES)) {
        entry[0..8].copy_from_slice(&range.at.0.to_le_bytes());
        entry[8..16].copy_from_slice(&range.bytes.to_le_bytes());
        entry[16..20].copy_from_slice(&(range.kind as u32).to_le_bytes());
    }
    memory.write(layout::ZERO_PAGE, &page)
}
