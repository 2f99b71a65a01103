//! One virtual machine and its vCPUs behind small traits, with a KVM and a scripted backend.
//!
//! [`Hypervisor`] makes a [`Vm`], a [`Vm`] makes [`Vcpu`]s, a [`Vcpu`] runs until something happens that only the
//! monitor can answer: an [`Exit`]. [`Kvm`] is the real one. [`Scripted`] replays exits from a list, so that what the
//! monitor does with them can be tested without a machine; one contract suite (`tests/contract.rs`) holds both to the
//! same behaviour.
//!
//! The order of the calls is part of the contract, because it decides what they cost on a KVM host:
//!
//! ```text
//! create_vm → map_memory → enable_interrupts → create_vcpu (each) → set_cpuid → set_* → run
//! ```
//!
//! Memory slots come first: a slot that follows the registration of an I/O bus waits for an SRCU grace period, which is
//! milliseconds. There is no in-kernel PIC, PIT, I/O APIC, ioeventfd or irqfd for the same reason; the local APICs are
//! in the kernel, everything above them is the monitor's.

mod exit;
#[expect(unsafe_code, reason = "memory slots, run pages and signals have no safe interface")]
mod kvm;
mod requirements;
mod scripted;
mod state;

use kiln_memory::GuestMemory;

pub use exit::{Exit, InternalError};
pub use kvm::{Kvm, KvmKick, KvmVcpu, KvmVm};
pub use requirements::{REQUIREMENTS, Requirement};
pub use scripted::{Answer, Event, Scripted, ScriptedKick, ScriptedVcpu, ScriptedVm, Step};
pub use state::{
    CpuidEntry, DescriptorTable, Events, Msi, Msr, Registers, Segment, SystemRegisters, VcpuState,
};

/// The most vCPUs one machine has: what the xAPIC ids, the MP table and the tests cover.
pub const MAX_VCPUS: u8 = 16;

/// The input pins of the monitor's I/O APIC, for which the backend reserves routes.
pub const IOAPIC_PINS: u8 = 24;

/// Makes virtual machines.
pub trait Hypervisor {
    /// The machines it makes.
    type Vm: Vm;

    /// Every CPUID leaf the backend can give a guest, before the monitor's own choices.
    ///
    /// # Errors
    /// [`Error::Call`] when the backend fails.
    fn supported_cpuid(&self) -> Result<Vec<CpuidEntry>, Error>;

    /// A machine without memory and vCPUs.
    ///
    /// # Errors
    /// [`Error::Call`] when the backend fails.
    fn create_vm(&self) -> Result<Self::Vm, Error>;
}

/// One virtual machine.
pub trait Vm: Send + Sync + 'static {
    /// Its vCPUs.
    type Vcpu: Vcpu;

    /// Shows `memory` to the guest, one slot a region. Once, before anything else. The machine keeps the memory alive.
    ///
    /// # Errors
    /// [`Error::Order`] when called twice or after [`Vm::enable_interrupts`]; [`Error::Call`] when the backend fails.
    fn map_memory(&mut self, memory: &GuestMemory) -> Result<(), Error>;

    /// Drops what the backend has derived from the memory, while no vCPU runs: to be called before the memory is replaced
    /// behind the guest's back. Where page tables are shadowed, those of the memory before would go on to be used.
    ///
    /// # Errors
    /// [`Error::Order`] before [`Vm::map_memory`]; [`Error::Call`] when the backend fails, after which the machine is of no use.
    fn forget_memory(&self) -> Result<(), Error>;

    /// Gives the machine its local APICs. Once, after memory and before the first vCPU.
    ///
    /// # Errors
    /// [`Error::Order`] when called out of order; [`Error::Call`] when the backend fails.
    fn enable_interrupts(&mut self) -> Result<(), Error>;

    /// A vCPU whose local APIC id is `index`. Index 0 starts running; the others wait for the guest to start them.
    ///
    /// # Errors
    /// [`Error::Order`] before [`Vm::enable_interrupts`] or beyond [`MAX_VCPUS`]; [`Error::Call`] when the backend
    /// fails.
    fn create_vcpu(&self, index: u8) -> Result<Self::Vcpu, Error>;

    /// Delivers a message-signalled interrupt. A message no local APIC takes is dropped, as on a real bus.
    ///
    /// # Errors
    /// [`Error::Call`] when the backend fails.
    fn signal_msi(&self, msi: Msi) -> Result<(), Error>;

    /// The guest's clock (kvm-clock) in nanoseconds since its machine was made.
    ///
    /// # Errors
    /// [`Error::Call`] when the backend fails.
    fn clock_ns(&self) -> Result<u64, Error>;

    /// Lets the guest's clock go on from `clock_ns`.
    ///
    /// # Errors
    /// [`Error::Call`] when the backend fails.
    fn set_clock_ns(&self, clock_ns: u64) -> Result<(), Error>;
}

/// One virtual CPU. It may move between threads, but runs on one at a time.
pub trait Vcpu: Send + 'static {
    /// What ends its [`Vcpu::run`] from another thread.
    type Kick: Kick;

    /// What the guest reads from `cpuid`. Before the first [`Vcpu::run`], and before [`Vcpu::set_msrs`].
    ///
    /// # Errors
    /// [`Error::Call`] when the backend refuses the leaves.
    fn set_cpuid(&mut self, entries: &[CpuidEntry]) -> Result<(), Error>;

    /// The general registers.
    ///
    /// # Errors
    /// [`Error::Call`] when the backend fails.
    fn registers(&self) -> Result<Registers, Error>;

    /// Sets the general registers.
    ///
    /// # Errors
    /// [`Error::Call`] when the backend fails.
    fn set_registers(&mut self, registers: &Registers) -> Result<(), Error>;

    /// The segment, control and table registers.
    ///
    /// # Errors
    /// [`Error::Call`] when the backend fails.
    fn system_registers(&self) -> Result<SystemRegisters, Error>;

    /// Sets the segment, control and table registers.
    ///
    /// # Errors
    /// [`Error::Call`] when the backend refuses them.
    fn set_system_registers(&mut self, registers: &SystemRegisters) -> Result<(), Error>;

    /// Sets model-specific registers.
    ///
    /// # Errors
    /// [`Error::Msr`] names the first one the backend refuses.
    fn set_msrs(&mut self, msrs: &[Msr]) -> Result<(), Error>;

    /// How fast the guest's time stamp counter runs, in kHz.
    ///
    /// # Errors
    /// [`Error::Call`] when the backend fails.
    fn tsc_khz(&self) -> Result<u32, Error>;

    /// Keeps all interrupts from the guest, or lets those that came meanwhile and all others reach it again.
    ///
    /// For moments: a guest that is to do one thing first. Saving its state ends it.
    ///
    /// # Errors
    /// [`Error::Call`] when the backend fails.
    fn hold_interrupts(&mut self, hold: bool) -> Result<(), Error>;

    /// All of its state. It rests: it has not run yet, or its last run ended with [`Exit::Kicked`], after which nothing it
    /// asked for is unanswered.
    ///
    /// # Errors
    /// [`Error::Order`] when it does not rest; [`Error::Call`] when the backend fails.
    fn save(&mut self) -> Result<VcpuState, Error>;

    /// Becomes what `state` says, after [`Vcpu::set_cpuid`] with the CPUID of the vCPU it was saved from. With `hold` interrupts are
    /// [held](Self::hold_interrupts) from the beginning.
    ///
    /// # Errors
    /// [`Error::Order`] when it does not rest; [`Error::Msr`] or [`Error::Call`] when the backend refuses a part. The vCPU is
    /// then of no further use.
    fn restore(&mut self, state: &VcpuState, hold: bool) -> Result<(), Error>;

    /// A handle that ends [`Vcpu::run`] from another thread.
    fn kick(&self) -> Self::Kick;

    /// Runs the guest until something happens that the monitor must answer.
    ///
    /// The answer to a read is the bytes left in the exit's slice when `run` is called again.
    ///
    /// # Errors
    /// [`Error::Call`] when the backend fails; the vCPU is then of no further use.
    fn run(&mut self) -> Result<Exit<'_>, Error>;
}

/// Ends a vCPU's run from another thread.
///
/// A kick is never lost: a vCPU that is running returns [`Exit::Kicked`] at once, one that is not returns it from its
/// next run. Several kicks may be answered by one return. So a thread that stores a request, kicks, and lets the vCPU
/// read the request after each [`Exit::Kicked`] needs no other handshake.
pub trait Kick: Clone + Send + Sync + 'static {
    /// Ends the current or next run.
    fn kick(&self);
}

/// What can go wrong in a backend.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The hypervisor cannot be opened. The host is to blame.
    #[error("cannot open {path}: {source}")]
    Open {
        /// The device.
        path: &'static str,
        /// Why.
        source: std::io::Error,
    },
    /// The hypervisor lacks things Kiln is built on. The host is to blame.
    #[error("{}", requirements::describe(.0))]
    Missing(Vec<&'static Requirement>),
    /// A call failed. The host is to blame, or Kiln.
    #[error("{call}: {source}")]
    Call {
        /// The call, by its name in the backend.
        call: &'static str,
        /// Why.
        source: std::io::Error,
    },
    /// The backend refuses a model-specific register.
    #[error("cannot set MSR {0:#x}")]
    Msr(u32),
    /// The calls came in an order the contract excludes. Kiln is to blame.
    #[error("{0}")]
    Order(&'static str),
}
