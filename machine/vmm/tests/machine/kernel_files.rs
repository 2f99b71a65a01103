//! Kernel files come from whoever runs Kiln and may be anything.

use kiln_memory::{Gpa, GuestMemory};
use kiln_vmm::boot::{self, BootError, Kernel};
use kiln_vmm::{MIN_MEMORY_MIB, Shape};
use proptest::prelude::*;

use crate::guest::{Guest, LOAD, file};

const MEMORY_BYTES: u64 = (MIN_MEMORY_MIB as u64) << 20;

fn load(bytes: &[u8]) -> Result<Kernel, BootError> {
    let memory = GuestMemory::new(MEMORY_BYTES).expect("a mapping");
    boot::load_kernel(&memory, &file(bytes))
}

fn elf() -> Vec<u8> {
    Guest::default().say("hello").power_off(0).elf()
}

fn bzimage() -> Vec<u8> {
    Guest::default().say("hello").power_off(0).bzimage()
}

fn put(mut file: Vec<u8>, at: usize, bytes: &[u8]) -> Vec<u8> {
    file[at..at + bytes.len()].copy_from_slice(bytes);
    file
}

/// Where fields lie in the ELF file of a [`Guest`].
mod at {
    pub(super) const CLASS: usize = 4;
    pub(super) const MACHINE: usize = 18;
    pub(super) const TABLE: usize = 32;
    pub(super) const COUNT: usize = 56;
    pub(super) const NOTE_OFFSET: usize = 64 + 8;
    pub(super) const NOTE_BYTES: usize = 64 + 32;
    pub(super) const LOAD_OFFSET: usize = 64 + 56 + 8;
    pub(super) const LOAD_AT: usize = 64 + 56 + 24;
    pub(super) const LOAD_BYTES: usize = 64 + 56 + 32;
    pub(super) const LOAD_MEMORY: usize = 64 + 56 + 40;
    pub(super) const NOTE: usize = 64 + 2 * 56;
}

#[test]
fn a_kernel_lands_where_its_file_says() {
    let memory = GuestMemory::new(MEMORY_BYTES).expect("a mapping");
    let guest = Guest::default().say("hello");
    boot::load_kernel(&memory, &file(&guest.elf())).expect("good");
    let mut loaded = vec![0; guest.bytes().len()];
    memory.read(Gpa(LOAD.into()), &mut loaded).expect("RAM");
    assert_eq!(loaded, guest.bytes());
}

#[test]
fn a_file_that_is_no_kernel_is_refused() {
    for bytes in [&b""[..], b"MZ", b"#!/bin/sh\n", &[0; 4096], &[0xff; 9000]] {
        assert!(matches!(load(bytes), Err(BootError::UnknownKernel)), "{} bytes", bytes.len());
    }
}

#[test]
fn a_kernel_without_a_pvh_note_is_named_with_a_hint() {
    for file in [
        put(elf(), at::NOTE + 12, b"Zen\0"),
        put(elf(), at::NOTE + 8, &[17]),
        put(elf(), 64, &[0x70]),
        put(elf(), at::NOTE, &[0xff; 8]),
    ] {
        let error = load(&file).expect_err("no note");
        assert!(matches!(error, BootError::NoPvhNote), "{error:?}");
        assert!(error.hint().is_some_and(|hint| hint.contains("CONFIG_PVH")));
    }
}

#[test]
fn a_kernel_for_another_machine_is_refused() {
    for file in [put(elf(), at::CLASS, &[1]), put(elf(), at::MACHINE, &[183]), put(elf(), 16, &[3])] {
        assert!(matches!(load(&file), Err(BootError::WrongMachine)));
    }
}

#[test]
fn every_truncation_is_an_error() {
    for whole in [elf(), bzimage()] {
        for length in 0..whole.len() {
            let result = load(&whole[..length]);
            // A bzImage does not say how long it is, so one cut inside its code is not noticed.
            assert!(result.is_err() || (whole[0] == 0 && length > 1024 + 0x200), "{length} bytes");
        }
        load(&whole).expect("the whole is good");
    }
}

#[test]
fn segments_that_do_not_fit_are_refused() {
    let huge = (1_u64 << 62).to_le_bytes();
    assert!(matches!(load(&put(elf(), at::LOAD_MEMORY, &huge)), Err(BootError::TooLarge { .. })));
    let at_end = (MEMORY_BYTES - 16).to_le_bytes();
    assert!(matches!(load(&put(elf(), at::LOAD_AT, &at_end)), Err(BootError::TooLarge { .. })));
    let wraps = put(elf(), at::LOAD_AT, &u64::MAX.to_le_bytes());
    assert!(matches!(load(&wraps), Err(BootError::Malformed(_))));
    for below in [0_u64, 0xf_f000] {
        let file = put(elf(), at::LOAD_AT, &below.to_le_bytes());
        assert!(matches!(load(&file), Err(BootError::Malformed(_))), "below 1 MiB");
    }
    assert!(matches!(load(&put(elf(), at::LOAD_BYTES, &huge)), Err(BootError::Malformed(_))));
    for beyond in [1_u64 << 62, u64::MAX] {
        let file = put(elf(), at::LOAD_OFFSET, &beyond.to_le_bytes());
        assert!(matches!(load(&file), Err(BootError::Malformed(_))), "outside the file");
    }
}

#[test]
fn overlapping_segments_are_refused() {
    // The note becomes a second segment with the first one's place.
    let whole = elf();
    let mut file = whole.clone();
    file[64 + 56..64 + 2 * 56].copy_from_slice(&whole[64 + 56..64 + 2 * 56]);
    file.extend(&whole[64 + 56..64 + 2 * 56]);
    file.extend(&whole[64..64 + 56]);
    file.extend(&whole[64 + 56..64 + 2 * 56]);
    let table = (whole.len() as u64).to_le_bytes();
    let file = put(put(file, at::TABLE, &table), at::COUNT, &[3]);
    assert!(matches!(load(&file), Err(BootError::Malformed("two segments overlap"))));
}

#[test]
fn an_entry_point_outside_every_segment_is_refused() {
    let file = put(elf(), at::NOTE + 16, &0x200_0000_u32.to_le_bytes());
    assert!(matches!(load(&file), Err(BootError::Malformed(_))));
}

#[test]
fn impossible_tables_and_notes_are_refused() {
    assert!(matches!(load(&put(elf(), at::COUNT, &[0, 0])), Err(BootError::Malformed(_))));
    assert!(matches!(load(&put(elf(), at::COUNT, &[0xff; 2])), Err(BootError::Malformed(_))));
    assert!(matches!(load(&put(elf(), at::TABLE, &[0xff; 8])), Err(BootError::Malformed(_))));
    assert!(matches!(load(&put(elf(), at::NOTE_BYTES, &[0xff; 8])), Err(BootError::Malformed(_))));
    assert!(matches!(load(&put(elf(), at::NOTE_OFFSET, &[0xff; 8])), Err(BootError::Malformed(_))));
}

#[test]
fn a_segment_with_less_memory_than_file_is_refused() {
    let file = put(elf(), at::LOAD_MEMORY, &1_u64.to_le_bytes());
    assert!(matches!(load(&file), Err(BootError::Malformed(_))));
}

#[test]
fn more_program_headers_than_any_kernel_has_are_refused() {
    // A whole table, in which all but the first two entries are null and would do no harm.
    let table = |count: u16| {
        let mut file = elf();
        let headers = file[64..64 + 2 * 56].to_vec();
        let start = file.len();
        file.extend(headers);
        file.resize(start + usize::from(count) * 56, 0);
        put(put(file, at::TABLE, &(start as u64).to_le_bytes()), at::COUNT, &count.to_le_bytes())
    };
    load(&table(64)).expect("the most there may be");
    assert!(matches!(load(&table(65)), Err(BootError::Malformed(_))));
}

#[test]
fn a_bzimage_that_cannot_be_entered_in_64_bit_mode_is_refused() {
    for (at, bytes) in [(0x206, &[0x0b_u8][..]), (0x211, &[0]), (0x236, &[0])] {
        let error = load(&put(bzimage(), at, bytes)).expect_err("not 64-bit");
        assert!(matches!(error, BootError::Not64Bit(_)), "{error:?}");
    }
}

#[test]
fn a_bzimage_that_does_not_fit_is_refused() {
    assert!(matches!(load(&put(bzimage(), 0x260, &[0xff; 4])), Err(BootError::TooLarge { .. })));
    assert!(matches!(load(&put(bzimage(), 0x258, &[0xff; 8])), Err(BootError::Malformed(_))));
    assert!(matches!(load(&put(bzimage(), 0x258, &[0; 8])), Err(BootError::Malformed(_))));
}

#[test]
fn an_initramfs_that_does_not_fit_is_refused() {
    let memory = GuestMemory::new(MEMORY_BYTES).expect("a mapping");
    let kernel = boot::load_kernel(&memory, &file(&elf())).expect("good");
    let large = tempfile::tempfile().expect("a file");
    large.set_len(MEMORY_BYTES - (1 << 20)).expect("sparse");
    let shape = Shape::new(MIN_MEMORY_MIB, 1).expect("a shape");
    let error = boot::prepare(&memory, &kernel, Some(&large), shape, 0, "").expect_err("too large");
    assert_eq!(error.to_string(), "the initramfs does not fit into 64 MiB of guest memory");
}

#[test]
fn a_directory_is_no_kernel() {
    let directory = std::fs::File::open("/").expect("the root");
    let memory = GuestMemory::new(MEMORY_BYTES).expect("a mapping");
    assert!(matches!(boot::load_kernel(&memory, &directory), Err(BootError::Read { .. })));
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::with_cases(500) })]

    #[test]
    fn no_damage_to_a_kernel_file_panics_or_writes_below_it(
        is_elf in any::<bool>(),
        damage in prop::collection::vec((0_usize..0x300, any::<u8>()), 1..12),
    ) {
        let mut bytes = if is_elf { elf() } else { bzimage() };
        for (at, byte) in damage {
            let at = at % bytes.len();
            bytes[at] = byte;
        }
        let memory = GuestMemory::new(MEMORY_BYTES).expect("a mapping");
        // Good or bad, it ends; and the memory the tables go to is as it was.
        let _ = boot::load_kernel(&memory, &file(&bytes));
        let mut low = vec![0; 0x2_1000];
        memory.read(Gpa(0), &mut low).expect("RAM");
        prop_assert!(low.iter().all(|byte| *byte == 0));
    }
}
