//! Between the processor's terms and KVM's structures.

use kvm_bindings::{
    KVM_CPUID_FLAG_SIGNIFCANT_INDEX, kvm_cpuid_entry2, kvm_dtable, kvm_regs, kvm_segment, kvm_sregs,
    kvm_xsave,
};

use super::xstate::{IMAGE_BYTES, Image};
use crate::{CpuidEntry, DescriptorTable, Registers, Segment, SystemRegisters};

/// The vector registers as bytes.
pub(super) fn image_of(xsave: &kvm_xsave) -> Image {
    let mut image = [0; IMAGE_BYTES];
    for (bytes, word) in image.as_chunks_mut().0.iter_mut().zip(xsave.region) {
        *bytes = word.to_le_bytes();
    }
    image
}

/// The same back.
pub(super) fn xsave_of(image: &Image) -> kvm_xsave {
    let mut xsave = kvm_xsave::default();
    for (word, bytes) in xsave.region.iter_mut().zip(image.as_chunks().0) {
        *word = u32::from_le_bytes(*bytes);
    }
    xsave
}

impl From<&kvm_cpuid_entry2> for CpuidEntry {
    fn from(entry: &kvm_cpuid_entry2) -> Self {
        Self {
            leaf: entry.function,
            subleaf: entry.index,
            has_subleaf: entry.flags & KVM_CPUID_FLAG_SIGNIFCANT_INDEX != 0,
            eax: entry.eax,
            ebx: entry.ebx,
            ecx: entry.ecx,
            edx: entry.edx,
        }
    }
}

impl From<&CpuidEntry> for kvm_cpuid_entry2 {
    fn from(entry: &CpuidEntry) -> Self {
        Self {
            function: entry.leaf,
            index: entry.subleaf,
            flags: if entry.has_subleaf { KVM_CPUID_FLAG_SIGNIFCANT_INDEX } else { 0 },
            eax: entry.eax,
            ebx: entry.ebx,
            ecx: entry.ecx,
            edx: entry.edx,
            ..Self::default()
        }
    }
}

impl From<&kvm_regs> for Registers {
    fn from(regs: &kvm_regs) -> Self {
        let kvm_regs {
            rax,
            rbx,
            rcx,
            rdx,
            rsi,
            rdi,
            rsp,
            rbp,
            r8,
            r9,
            r10,
            r11,
            r12,
            r13,
            r14,
            r15,
            rip,
            rflags,
        } = *regs;
        Self { rax, rbx, rcx, rdx, rsi, rdi, rsp, rbp, r8, r9, r10, r11, r12, r13, r14, r15, rip, rflags }
    }
}

impl From<&Registers> for kvm_regs {
    fn from(regs: &Registers) -> Self {
        let Registers {
            rax,
            rbx,
            rcx,
            rdx,
            rsi,
            rdi,
            rsp,
            rbp,
            r8,
            r9,
            r10,
            r11,
            r12,
            r13,
            r14,
            r15,
            rip,
            rflags,
        } = *regs;
        Self { rax, rbx, rcx, rdx, rsi, rdi, rsp, rbp, r8, r9, r10, r11, r12, r13, r14, r15, rip, rflags }
    }
}

impl From<kvm_segment> for Segment {
    fn from(segment: kvm_segment) -> Self {
        Self {
            base: segment.base,
            limit: segment.limit,
            selector: segment.selector,
            kind: segment.type_,
            // KVM can report an unusable segment as present; the contract has one flag.
            present: segment.present != 0 && segment.unusable == 0,
            dpl: segment.dpl,
            default_32: segment.db != 0,
            code_or_data: segment.s != 0,
            long: segment.l != 0,
            granular: segment.g != 0,
        }
    }
}

impl From<Segment> for kvm_segment {
    fn from(segment: Segment) -> Self {
        Self {
            base: segment.base,
            limit: segment.limit,
            selector: segment.selector,
            type_: segment.kind,
            present: segment.present.into(),
            dpl: segment.dpl,
            db: segment.default_32.into(),
            s: segment.code_or_data.into(),
            l: segment.long.into(),
            g: segment.granular.into(),
            unusable: (!segment.present).into(),
            ..Self::default()
        }
    }
}

impl From<kvm_dtable> for DescriptorTable {
    fn from(table: kvm_dtable) -> Self {
        Self { base: table.base, limit: table.limit }
    }
}

impl From<DescriptorTable> for kvm_dtable {
    fn from(table: DescriptorTable) -> Self {
        Self { base: table.base, limit: table.limit, ..Self::default() }
    }
}

impl From<&kvm_sregs> for SystemRegisters {
    fn from(sregs: &kvm_sregs) -> Self {
        Self {
            cs: sregs.cs.into(),
            ds: sregs.ds.into(),
            es: sregs.es.into(),
            fs: sregs.fs.into(),
            gs: sregs.gs.into(),
            ss: sregs.ss.into(),
            tr: sregs.tr.into(),
            ldt: sregs.ldt.into(),
            gdt: sregs.gdt.into(),
            idt: sregs.idt.into(),
            cr0: sregs.cr0,
            cr2: sregs.cr2,
            cr3: sregs.cr3,
            cr4: sregs.cr4,
            cr8: sregs.cr8,
            efer: sregs.efer,
            apic_base: sregs.apic_base,
        }
    }
}

impl From<&SystemRegisters> for kvm_sregs {
    fn from(registers: &SystemRegisters) -> Self {
        Self {
            cs: registers.cs.into(),
            ds: registers.ds.into(),
            es: registers.es.into(),
            fs: registers.fs.into(),
            gs: registers.gs.into(),
            ss: registers.ss.into(),
            tr: registers.tr.into(),
            ldt: registers.ldt.into(),
            gdt: registers.gdt.into(),
            idt: registers.idt.into(),
            cr0: registers.cr0,
            cr2: registers.cr2,
            cr3: registers.cr3,
            cr4: registers.cr4,
            cr8: registers.cr8,
            efer: registers.efer,
            apic_base: registers.apic_base,
            interrupt_bitmap: [0; 4],
        }
    }
}
