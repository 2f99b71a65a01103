//! The state of a vCPU that a monitor sets, in the processor's own terms.
//!
//! Intel SDM volume 3 and AMD64 APM volume 2 name every field the same way; these types are theirs, not a backend's.

/// The general registers.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[expect(missing_docs, reason = "the processor's own names")]
pub struct Registers {
    pub rax: u64,
    pub rbx: u64,
    pub rcx: u64,
    pub rdx: u64,
    pub rsi: u64,
    pub rdi: u64,
    pub rsp: u64,
    pub rbp: u64,
    pub r8: u64,
    pub r9: u64,
    pub r10: u64,
    pub r11: u64,
    pub r12: u64,
    pub r13: u64,
    pub r14: u64,
    pub r15: u64,
    pub rip: u64,
    pub rflags: u64,
}

/// A segment register with its hidden part.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Segment {
    /// Where the segment starts.
    pub base: u64,
    /// Its last byte, after granularity is applied.
    pub limit: u32,
    /// What a program reads from the register.
    pub selector: u16,
    /// The four type bits.
    pub kind: u8,
    /// The descriptor is in memory and valid.
    pub present: bool,
    /// The privilege level, 0 to 3.
    pub dpl: u8,
    /// 32-bit operands by default.
    pub default_32: bool,
    /// A code or data segment; otherwise a system segment.
    pub code_or_data: bool,
    /// 64-bit code.
    pub long: bool,
    /// The limit counts pages.
    pub granular: bool,
}

/// A descriptor table register.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct DescriptorTable {
    /// Where the table starts.
    pub base: u64,
    /// Its last byte.
    pub limit: u16,
}

/// The segment, control and table registers.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[expect(missing_docs, reason = "the processor's own names")]
pub struct SystemRegisters {
    pub cs: Segment,
    pub ds: Segment,
    pub es: Segment,
    pub fs: Segment,
    pub gs: Segment,
    pub ss: Segment,
    pub tr: Segment,
    pub ldt: Segment,
    pub gdt: DescriptorTable,
    pub idt: DescriptorTable,
    pub cr0: u64,
    pub cr2: u64,
    pub cr3: u64,
    pub cr4: u64,
    pub cr8: u64,
    pub efer: u64,
    pub apic_base: u64,
}

/// One answer of `cpuid`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct CpuidEntry {
    /// What the guest has in EAX when it asks.
    pub leaf: u32,
    /// What it has in ECX, when that matters.
    pub subleaf: u32,
    /// Whether ECX matters.
    pub has_subleaf: bool,
    /// The answer in EAX.
    pub eax: u32,
    /// The answer in EBX.
    pub ebx: u32,
    /// The answer in ECX.
    pub ecx: u32,
    /// The answer in EDX.
    pub edx: u32,
}

/// A model-specific register and its value.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Msr {
    /// Its number.
    pub index: u32,
    /// Its value.
    pub value: u64,
}

/// A message-signalled interrupt. Intel SDM volume 3 §11.11 "Message Signalled Interrupts".
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Msi {
    /// Which local APICs take it.
    pub address: u32,
    /// Vector, delivery mode and trigger.
    pub data: u32,
}
