//! What a vCPU's registers hold when it enters the kernel.

use kiln_hypervisor::{DescriptorTable, Error, Msr, Registers, Segment, SystemRegisters, Vcpu};
use kiln_memory::{Gpa, GuestMemory, OutOfRange};

use crate::layout;

/// Bit 1 of RFLAGS is always set.
const RFLAGS_RESERVED: u64 = 1 << 1;
const CR0_PE: u64 = 1 << 0;
const CR0_ET: u64 = 1 << 4;
const CR0_PG: u64 = 1 << 31;
const CR4_PAE: u64 = 1 << 5;
const EFER_LME: u64 = 1 << 8;
const EFER_LMA: u64 = 1 << 10;

const MSR_MISC_ENABLE: u32 = 0x1a0;
const MISC_ENABLE_FAST_STRINGS: u64 = 1;
const MSR_MTRR_DEF_TYPE: u32 = 0x2ff;
/// MTRRs on, everything write-back: what firmware leaves behind on a machine whose memory is all RAM.
const MTRR_ENABLED_WRITE_BACK: u64 = 1 << 11 | 6;

const PAGE_PRESENT_WRITABLE: u64 = 0b11;
const PAGE_LARGE: u64 = 1 << 7;
/// `__BOOT_CS` and `__BOOT_DS` of the Linux boot protocol.
const CODE_SELECTOR: u16 = 0x10;
const DATA_SELECTOR: u16 = 0x18;
/// Null, unused, 64-bit code, data: both flat, present, ring 0.
const GDT: [u64; 4] = [0, 0, 0x00af_9b00_0000_ffff, 0x00cf_9300_0000_ffff];

/// How the first vCPU starts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct EntryState {
    registers: Registers,
    mode: Mode,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Mode {
    Protected,
    Long,
}

impl EntryState {
    /// 32-bit protected mode without paging, as PVH wants it.
    pub(super) fn protected_mode(at: Gpa) -> Self {
        let registers = Registers {
            rip: at.0,
            rbx: layout::START_INFO.0,
            rflags: RFLAGS_RESERVED,
            ..Registers::default()
        };
        Self { registers, mode: Mode::Protected }
    }

    /// 64-bit mode with the first 4 GiB mapped, as the Linux boot protocol wants it.
    pub(super) fn long_mode(at: Gpa) -> Self {
        let registers = Registers {
            rip: at.0,
            rsi: layout::ZERO_PAGE.0,
            rflags: RFLAGS_RESERVED,
            ..Registers::default()
        };
        Self { registers, mode: Mode::Long }
    }

    /// A state for a vCPU that executes nothing.
    #[cfg(test)]
    pub(crate) fn for_tests() -> Self {
        Self::protected_mode(layout::KERNEL_START)
    }

    /// Sets `vcpu` to this state.
    ///
    /// # Errors
    /// What the backend says.
    pub fn apply(&self, vcpu: &mut impl Vcpu) -> Result<(), Error> {
        let mut system = vcpu.system_registers()?;
        match self.mode {
            Mode::Protected => enter_protected_mode(&mut system),
            Mode::Long => enter_long_mode(&mut system),
        }
        vcpu.set_system_registers(&system)?;
        vcpu.set_registers(&self.registers)
    }
}

/// What firmware would have set on every processor.
pub(crate) fn initial_msrs() -> [Msr; 2] {
    [
        Msr { index: MSR_MISC_ENABLE, value: MISC_ENABLE_FAST_STRINGS },
        Msr { index: MSR_MTRR_DEF_TYPE, value: MTRR_ENABLED_WRITE_BACK },
    ]
}

/// A flat code segment; its type is execute, read, accessed.
fn code_segment(selector: u16) -> Segment {
    Segment {
        limit: u32::MAX,
        selector,
        kind: 0xb,
        present: true,
        default_32: true,
        code_or_data: true,
        granular: true,
        ..Segment::default()
    }
}

fn enter_protected_mode(system: &mut SystemRegisters) {
    set_segments(system, code_segment(CODE_SELECTOR));
    system.cr0 = CR0_PE | CR0_ET;
    system.cr4 = 0;
    system.efer = 0;
}

fn enter_long_mode(system: &mut SystemRegisters) {
    set_segments(system, Segment { long: true, default_32: false, ..code_segment(CODE_SELECTOR) });
    system.gdt = DescriptorTable { base: layout::GDT.0, limit: (size_of_val(&GDT) - 1) as u16 };
    system.cr3 = layout::PAGE_TABLES.0;
    system.cr4 = CR4_PAE;
    system.cr0 = CR0_PE | CR0_ET | CR0_PG;
    system.efer = EFER_LME | EFER_LMA;
}

fn set_segments(system: &mut SystemRegisters, code: Segment) {
    // Read, write, accessed.
    let data = Segment { selector: DATA_SELECTOR, kind: 0x3, long: false, default_32: true, ..code };
    system.cs = code;
    system.ds = data;
    system.es = data;
    system.fs = data;
    system.gs = data;
    system.ss = data;
    // A busy task state segment: the processor refuses to run without one.
    system.tr = Segment { limit: 0x67, kind: 0xb, present: true, ..Segment::default() };
    system.ldt = Segment::default();
    system.idt = DescriptorTable::default();
}

/// Writes the GDT and page tables [`EntryState::long_mode`] refers to.
pub(super) fn write_long_mode_tables(memory: &GuestMemory) -> Result<(), OutOfRange> {
    for (index, descriptor) in (0..).zip(GDT) {
        memory.write_u64(Gpa(layout::GDT.0 + index * 8), descriptor)?;
    }
    let level4 = layout::PAGE_TABLES.0;
    let level3 = level4 + 0x1000;
    let level2 = level3 + 0x1000;
    memory.write_u64(Gpa(level4), level3 | PAGE_PRESENT_WRITABLE)?;
    for gib in 0..4 {
        let table = level2 + gib * 0x1000;
        memory.write_u64(Gpa(level3 + gib * 8), table | PAGE_PRESENT_WRITABLE)?;
        for page in 0..512 {
            let target = (gib << 30) + (page << 21);
            memory.write_u64(Gpa(table + page * 8), target | PAGE_PRESENT_WRITABLE | PAGE_LARGE)?;
        }
    }
    Ok(())
}
