//! ELF kernels with a PVH note.
//!
//! System V ABI, "Object Files"; the note is `XEN_ELFNOTE_PHYS32_ENTRY` of Xen's `public/elfnote.h`.

use kiln_memory::{Gpa, GuestMemory};

use super::{BootError, Entry, Image, Kernel, low_ram_end};
use crate::layout;

/// The first bytes of every ELF file.
pub(super) const MAGIC: [u8; 4] = *b"\x7fELF";

const HEADER_BYTES: usize = 64;
const PROGRAM_HEADER_BYTES: usize = 56;
/// The most program headers looked at; a Linux kernel has 5 or 6.
const MAX_PROGRAM_HEADERS: u16 = 64;
/// The most bytes of notes looked at; a Linux kernel has under 1 KiB.
const MAX_NOTES_BYTES: u64 = 64 << 10;

const CLASS_64: u8 = 2;
const LITTLE_ENDIAN: u8 = 1;
const TYPE_EXECUTABLE: u16 = 2;
const MACHINE_X86_64: u16 = 62;
const SEGMENT_LOAD: u32 = 1;
const SEGMENT_NOTE: u32 = 4;

const NOTE_NAME: &[u8] = b"Xen\0";
const NOTE_PHYS32_ENTRY: u32 = 18;

/// A program header, as far as loading needs it.
#[derive(Clone, Copy)]
struct Segment {
    kind: u32,
    offset: u64,
    at: u64,
    file_bytes: u64,
    memory_bytes: u64,
}

/// Loads the kernel's segments and finds its PVH entry point.
pub(super) fn load(memory: &GuestMemory, image: &Image<'_>) -> Result<Kernel, BootError> {
    let segments = program_headers(image)?;
    let entry = pvh_entry(image, &segments)?.ok_or(BootError::NoPvhNote)?;

    let mut loaded: Vec<(u64, u64)> = Vec::new();
    for segment in segments.iter().filter(|segment| segment.kind == SEGMENT_LOAD && segment.memory_bytes > 0)
    {
        let range = check_placement(memory, segment)?;
        if loaded.iter().any(|other| range.0 < other.1 && other.0 < range.1) {
            return Err(BootError::Malformed("two segments overlap"));
        }
        loaded.push(range);
    }
    if !loaded.iter().any(|range| (range.0..range.1).contains(&u64::from(entry))) {
        return Err(BootError::Malformed("the entry point is outside every segment"));
    }
    // Everything is checked; only reading the file can fail from here on.
    for segment in segments.iter().filter(|segment| segment.kind == SEGMENT_LOAD && segment.file_bytes > 0) {
        image.load(memory, segment.offset, segment.file_bytes, Gpa(segment.at))?;
    }
    let end = loaded.iter().map(|range| range.1).max().unwrap_or(0);
    Ok(Kernel {
        entry: Entry::Pvh { at: Gpa(entry.into()) },
        end: Gpa(end),
        initramfs_max: Gpa(u32::MAX.into()),
    })
}

/// Where a segment goes: the first address and the one past the last.
fn check_placement(memory: &GuestMemory, segment: &Segment) -> Result<(u64, u64), BootError> {
    if segment.file_bytes > segment.memory_bytes {
        return Err(BootError::Malformed("a segment has more bytes in the file than in memory"));
    }
    if segment.at < layout::KERNEL_START.0 {
        return Err(BootError::Malformed("a segment lies below 1 MiB"));
    }
    let end = segment
        .at
        .checked_add(segment.memory_bytes)
        .ok_or(BootError::Malformed("a segment wraps around the address space"))?;
    if end > low_ram_end(memory).0 {
        return Err(BootError::TooLarge { what: "kernel", memory_mib: memory.bytes() >> 20 });
    }
    Ok((segment.at, end))
}

fn program_headers(image: &Image<'_>) -> Result<Vec<Segment>, BootError> {
    let mut header = [0; HEADER_BYTES];
    image.read(0, &mut header)?;
    let is_ours = header[4] == CLASS_64
        && header[5] == LITTLE_ENDIAN
        && u16_at(&header, 16) == TYPE_EXECUTABLE
        && u16_at(&header, 18) == MACHINE_X86_64;
    if !is_ours {
        return Err(BootError::WrongMachine);
    }
    let table = u64_at(&header, 32);
    let entry_bytes = u16_at(&header, 54);
    let count = u16_at(&header, 56);
    if usize::from(entry_bytes) != PROGRAM_HEADER_BYTES || count == 0 || count > MAX_PROGRAM_HEADERS {
        return Err(BootError::Malformed("its program header table has an impossible shape"));
    }
    let mut bytes = vec![0; usize::from(count) * PROGRAM_HEADER_BYTES];
    image.read(table, &mut bytes)?;
    let segment = |bytes: &[u8]| Segment {
        kind: u32_at(bytes, 0),
        offset: u64_at(bytes, 8),
        at: u64_at(bytes, 24),
        file_bytes: u64_at(bytes, 32),
        memory_bytes: u64_at(bytes, 40),
    };
    Ok(bytes.chunks_exact(PROGRAM_HEADER_BYTES).map(segment).collect())
}

/// The entry point the PVH note names.
fn pvh_entry(image: &Image<'_>, segments: &[Segment]) -> Result<Option<u32>, BootError> {
    for segment in segments.iter().filter(|segment| segment.kind == SEGMENT_NOTE) {
        if segment.file_bytes > MAX_NOTES_BYTES {
            return Err(BootError::Malformed("it has too many notes"));
        }
        let mut notes = vec![0; segment.file_bytes as usize];
        image.read(segment.offset, &mut notes)?;
        if let Some(entry) = find_pvh_note(&notes) {
            return Ok(Some(entry));
        }
    }
    Ok(None)
}

/// Looks through notes: each a header of three words, a name and a description, both padded to 4 bytes.
fn find_pvh_note(mut notes: &[u8]) -> Option<u32> {
    while notes.len() >= 12 {
        let name_bytes = u32_at(notes, 0) as usize;
        let description_bytes = u32_at(notes, 4) as usize;
        let kind = u32_at(notes, 8);
        let name_end = 12usize.checked_add(name_bytes)?;
        let description_start = name_end.checked_next_multiple_of(4)?;
        let description_end = description_start.checked_add(description_bytes)?;
        let name = notes.get(12..name_end)?;
        let description = notes.get(description_start..description_end)?;
        if name == NOTE_NAME && kind == NOTE_PHYS32_ENTRY {
            // 4 bytes by the specification, 8 in Linux.
            let wide = match description.len() {
                4 => u64::from(u32_at(description, 0)),
                8 => u64_at(description, 0),
                _ => return None,
            };
            return u32::try_from(wide).ok();
        }
        notes = notes.get(description_end.checked_next_multiple_of(4)?..)?;
    }
    None
}

fn u16_at(bytes: &[u8], at: usize) -> u16 {
    u16::from_le_bytes([bytes[at], bytes[at + 1]])
}

fn u32_at(bytes: &[u8], at: usize) -> u32 {
    u32::from_le_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]])
}

fn u64_at(bytes: &[u8], at: usize) -> u64 {
    u64::from(u32_at(bytes, at)) | u64::from(u32_at(bytes, at + 4)) << 32
}
