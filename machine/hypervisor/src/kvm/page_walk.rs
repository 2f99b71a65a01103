//! Where a guest's linear address lies in its physical memory, by the guest's own page tables.
//!
//! `KVM_TRANSLATE` says where, but not whether the page may be written. The tables are the guest's and may say anything,
//! even change while they are read: each entry is read once, and what it leads to is an access to guest RAM or an error.
//! Intel SDM volume 3 §4.5 "4-Level Paging and 5-Level Paging".

use kiln_memory::{Gpa, GuestMemory};

use crate::SystemRegisters;

const CR0_PG: u64 = 1 << 31;
const CR4_LA57: u64 = 1 << 12;
const EFER_LMA: u64 = 1 << 10;

const PRESENT: u64 = 1 << 0;
const WRITABLE: u64 = 1 << 1;
const ACCESSED: u64 = 1 << 5;
const DIRTY: u64 = 1 << 6;
const LARGE: u64 = 1 << 7;
/// Bits 51 to 12 of an entry or of CR3.
const ADDRESS: u64 = 0x000f_ffff_ffff_f000;

const PAGE_SHIFT: u32 = 12;
/// Each level translates so many bits.
const LEVEL_BITS: u32 = 9;
/// Entries of 1 GiB are the largest.
const LARGEST_LEVEL: u32 = 3;

/// What an access wants.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Access {
    Read,
    Write,
}

/// Why there is nothing at an address. The guest's kernel expects to be told, as by the processor.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Fault {
    /// The address cannot be one.
    NotCanonical,
    /// The tables do not allow the access; whether a page is there.
    Page { present: bool },
}

/// Translates `linear` for an access by the kernel of a guest in 64-bit mode; `None` in any other mode or when the tables
/// are not in RAM.
///
/// A page that the guest has not marked as accessed, or as dirty where it is written, is a fault, as on processors that
/// leave these marks to the kernel: so nothing is ever written to the tables.
pub(super) fn translate(
    memory: &GuestMemory,
    system: &SystemRegisters,
    linear: u64,
    access: Access,
) -> Option<Result<Gpa, Fault>> {
    if system.cr0 & CR0_PG == 0 || system.efer & EFER_LMA == 0 {
        return None;
    }
    let levels = if system.cr4 & CR4_LA57 == 0 { 4 } else { 5 };
    let unused_bits = 64 - (PAGE_SHIFT + levels * LEVEL_BITS);
    if (linear << unused_bits).cast_signed() >> unused_bits != linear.cast_signed() {
        return Some(Err(Fault::NotCanonical));
    }
    let mut table = system.cr3 & ADDRESS;
    let mut writable = true;
    for level in (1..=levels).rev() {
        let shift = PAGE_SHIFT + (level - 1) * LEVEL_BITS;
        let index = linear >> shift & ((1 << LEVEL_BITS) - 1);
        let entry = memory.read_u64(Gpa(table + index * 8)).ok()?;
        if entry & PRESENT == 0 {
            return Some(Err(Fault::Page { present: false }));
        }
        writable &= entry & WRITABLE != 0;
        let is_page = level == 1 || (level <= LARGEST_LEVEL && entry & LARGE != 0);
        let marked = match access {
            Access::Write if is_page => ACCESSED | DIRTY,
            _ => ACCESSED,
        };
        if entry & marked != marked || (is_page && access == Access::Write && !writable) {
            return Some(Err(Fault::Page { present: true }));
        }
        if is_page {
            let offset = (1 << shift) - 1;
            // Bit 12 of a large page's entry is no address bit.
            return Some(Ok(Gpa(entry & ADDRESS & !offset | linear & offset)));
        }
        table = entry & ADDRESS;
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    const TABLES: u64 = 0x1_0000;
    const LINEAR: u64 = 0xffff_8880_0123_4567;
    const ALL: u64 = PRESENT | WRITABLE | ACCESSED | DIRTY;

    /// Memory in which each level of [`LINEAR`] is marked with `flags`, and the page is at `page`.
    fn tables(flags: [u64; 4], page: u64) -> (GuestMemory, SystemRegisters) {
        let memory = GuestMemory::new(1 << 20).expect("mapped");
        for (number, flags) in (0_u64..).zip(flags) {
            let index = LINEAR >> (39 - 9 * number) & 0x1ff;
            let next = if number == 3 { page } else { TABLES + (number + 1) * 0x1000 };
            memory.write_u64(Gpa(TABLES + number * 0x1000 + index * 8), next | flags).expect("RAM");
        }
        let system =
            SystemRegisters { cr0: CR0_PG, cr3: TABLES, efer: EFER_LMA, ..SystemRegisters::default() };
        (memory, system)
    }

    fn look(flags: [u64; 4], access: Access) -> Option<Result<Gpa, Fault>> {
        let (memory, system) = tables(flags, 0x8_0000);
        translate(&memory, &system, LINEAR, access)
    }

    #[test]
    fn a_page_is_found_where_its_tables_say() {
        assert_eq!(look([ALL; 4], Access::Write), Some(Ok(Gpa(0x8_0567))));
    }

    #[test]
    fn a_large_page_keeps_the_low_bits_of_the_address() {
        let (memory, system) = tables([ALL; 4], 0);
        let index = LINEAR >> 21 & 0x1ff;
        let entry = 0x4020_0000 | 1 << 12 | LARGE | ALL;
        memory.write_u64(Gpa(TABLES + 0x2000 + index * 8), entry).expect("RAM");
        let at = translate(&memory, &system, LINEAR, Access::Write);
        assert_eq!(at, Some(Ok(Gpa(0x4020_0000 | LINEAR & 0x1f_ffff))));
    }

    #[test]
    fn a_missing_level_is_a_page_that_is_not_there() {
        for level in 0..4 {
            let mut flags = [ALL; 4];
            flags[level] &= !PRESENT;
            assert_eq!(look(flags, Access::Read), Some(Err(Fault::Page { present: false })), "{level}");
        }
    }

    #[test]
    fn one_level_that_may_not_be_written_protects_the_page() {
        for level in 0..4 {
            let mut flags = [ALL; 4];
            flags[level] &= !WRITABLE;
            assert_eq!(look(flags, Access::Write), Some(Err(Fault::Page { present: true })), "{level}");
            assert!(matches!(look(flags, Access::Read), Some(Ok(_))), "{level}");
        }
    }

    #[test]
    fn marks_are_left_to_the_guest() {
        let clean = [ALL, ALL, ALL, ALL & !DIRTY];
        assert!(matches!(look(clean, Access::Read), Some(Ok(_))));
        assert_eq!(look(clean, Access::Write), Some(Err(Fault::Page { present: true })));
        let old = [ALL, ALL, ALL, ALL & !ACCESSED];
        assert_eq!(look(old, Access::Read), Some(Err(Fault::Page { present: true })));
    }

    #[test]
    fn an_address_between_the_halves_is_none() {
        let (memory, mut system) = tables([ALL; 4], 0);
        let between = 0x0000_9000_0000_0000;
        assert_eq!(translate(&memory, &system, between, Access::Read), Some(Err(Fault::NotCanonical)));
        system.cr4 = CR4_LA57;
        assert_ne!(translate(&memory, &system, between, Access::Read), Some(Err(Fault::NotCanonical)));
    }

    #[test]
    fn tables_outside_of_ram_and_other_modes_give_nothing() {
        let (memory, system) = tables([ALL; 4], 0);
        for wrong in [
            SystemRegisters { cr3: 0xc000_0000, ..system },
            SystemRegisters { cr3: ADDRESS, ..system },
            SystemRegisters { efer: 0, ..system },
            SystemRegisters { cr0: 0, ..system },
        ] {
            assert_eq!(translate(&memory, &wrong, LINEAR, Access::Read), None);
        }
    }
}
