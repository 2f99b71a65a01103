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

/// Everything a vCPU is while it rests, its CPUID apart: what [`Vcpu::save`](crate::Vcpu::save) finds and
/// [`Vcpu::restore`](crate::Vcpu::restore) makes so again.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct VcpuState {
    /// The general registers.
    pub registers: Registers,
    /// The segment, control and table registers.
    pub system_registers: SystemRegisters,
    /// Which parts of [`VcpuState::xsave`] the guest uses (`XCR0`); 0 where the processor has no XSAVE.
    pub xcr0: u64,
    /// The floating-point and vector registers, as XSAVE's standard form lays them out. Intel SDM volume 1 §13.4 "XSAVE
    /// Area".
    pub xsave: Vec<u8>,
    /// The local APIC's registers as they lie in its page. Intel SDM volume 3 §11.4.1 "The Local APIC Block Diagram".
    pub local_apic: Vec<u8>,
    /// DR0 to DR3, DR6 and DR7.
    pub debug_registers: [u64; 6],
    /// What is about to interrupt it.
    pub events: Events,
    /// Whether it runs, is halted, or waits to be started: `KVM_MP_STATE_*`. Linux `Documentation/virt/kvm/api.rst` §4.38
    /// "`KVM_GET_MP_STATE`".
    pub run_state: u32,
    /// Every model-specific register that can be read, in the order to write them in.
    pub msrs: Vec<Msr>,
}

/// Exceptions and interrupts between being raised and being taken. The names are those of `struct kvm_vcpu_events`, Linux
/// `Documentation/virt/kvm/api.rst` §4.31 "`KVM_GET_VCPU_EVENTS`".
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[expect(missing_docs, reason = "the interface's own names")]
pub struct Events {
    pub flags: u32,
    pub exception_injected: u8,
    pub exception_nr: u8,
    pub exception_has_error_code: u8,
    pub exception_pending: u8,
    pub exception_error_code: u32,
    pub exception_has_payload: u8,
    pub exception_payload: u64,
    pub interrupt_injected: u8,
    pub interrupt_nr: u8,
    pub interrupt_soft: u8,
    pub interrupt_shadow: u8,
    pub nmi_injected: u8,
    pub nmi_pending: u8,
    pub nmi_masked: u8,
    pub sipi_vector: u32,
    pub smi_smm: u8,
    pub smi_pending: u8,
    pub smi_smm_inside_nmi: u8,
    pub smi_latched_init: u8,
    pub triple_fault_pending: u8,
}
