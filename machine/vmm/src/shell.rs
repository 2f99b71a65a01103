//! A machine without a guest: memory, local APICs and vCPUs.
//!
//! Everything here is the same whatever the guest will be, so a shell can be made ahead of its use. The order is the one
//! `kiln_hypervisor` prescribes, for its cost.

use std::sync::Arc;

use kiln_hypervisor::{Error, Hypervisor, MAX_VCPUS, Vcpu, Vm};
use kiln_memory::{GuestMemory, MapError};

use crate::{boot, cpuid, host};

/// The least guest memory, in MiB.
pub const MIN_MEMORY_MIB: u32 = 64;
/// The most guest memory, in MiB: 1 TiB, which the guest's physical addresses can still express on every host.
pub const MAX_MEMORY_MIB: u32 = 1 << 20;

/// How large a machine is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Shape {
    memory_mib: u32,
    vcpus: u8,
}

/// A machine of this shape cannot be made. Whoever chose it is to blame.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ShapeError {
    /// Too little or too much memory.
    #[error("{0} MiB of guest memory; it must be 64 MiB to 1 TiB")]
    Memory(u32),
    /// Too few or too many vCPUs.
    #[error("{0} vCPUs; it must be 1 to 16")]
    Vcpus(u32),
}

impl Shape {
    /// A shape within the limits.
    ///
    /// # Errors
    /// [`ShapeError`]
    pub fn new(memory_mib: u32, vcpus: u32) -> Result<Self, ShapeError> {
        if !(MIN_MEMORY_MIB..=MAX_MEMORY_MIB).contains(&memory_mib) {
            return Err(ShapeError::Memory(memory_mib));
        }
        match u8::try_from(vcpus) {
            Ok(count @ 1..=MAX_VCPUS) => Ok(Self { memory_mib, vcpus: count }),
            _ => Err(ShapeError::Vcpus(vcpus)),
        }
    }

    /// Guest memory in MiB.
    pub fn memory_mib(self) -> u32 {
        self.memory_mib
    }

    /// Guest memory in bytes.
    pub fn memory_bytes(self) -> u64 {
        u64::from(self.memory_mib) << 20
    }

    /// The number of vCPUs.
    pub fn vcpus(self) -> u8 {
        self.vcpus
    }
}

/// A shell cannot be made. The host is to blame.
#[derive(Debug, thiserror::Error)]
pub enum ShellError {
    /// The hypervisor refused.
    #[error(transparent)]
    Hypervisor(#[from] Error),
    /// The memory cannot be mapped.
    #[error(transparent)]
    Memory(#[from] MapError),
}

/// A machine without a guest.
pub struct Shell<H: Hypervisor> {
    pub(crate) vm: Arc<H::Vm>,
    pub(crate) vcpus: Vec<<H::Vm as Vm>::Vcpu>,
    pub(crate) memory: GuestMemory,
    pub(crate) shape: Shape,
    /// The rate of its time stamp counters in kHz.
    pub(crate) tsc_khz: u32,
}

impl<H: Hypervisor> Shell<H> {
    /// Makes the machine.
    ///
    /// # Errors
    /// [`ShellError`]
    pub fn create(hypervisor: &H, shape: Shape) -> Result<Self, ShellError> {
        let memory = GuestMemory::new(u64::from(shape.memory_mib) << 20)?;
        let mut vm = hypervisor.create_vm()?;
        vm.map_memory(&memory)?;
        vm.enable_interrupts()?;
        let vcpus = (0..shape.vcpus).map(|index| vm.create_vcpu(index)).collect::<Result<Vec<_>, _>>()?;
        let tsc_khz = vcpus.first().map_or(Ok(0), Vcpu::tsc_khz)?;
        let mut shell = Self { vm: Arc::new(vm), vcpus, memory, shape, tsc_khz };
        shell.identify_vcpus(hypervisor)?;
        Ok(shell)
    }

    /// The guest's memory.
    pub fn memory(&self) -> &GuestMemory {
        &self.memory
    }

    /// Its shape.
    pub fn shape(&self) -> Shape {
        self.shape
    }

    /// Gives each vCPU its CPUID, and then the registers that depend on it.
    fn identify_vcpus(&mut self, hypervisor: &H) -> Result<(), Error> {
        let supported = hypervisor.supported_cpuid()?;
        let on_pvm = host::is_pvm();
        for (index, vcpu) in (0..).zip(&mut self.vcpus) {
            let leaves = cpuid::for_vcpu(&supported, index, self.shape.vcpus, self.tsc_khz, on_pvm);
            vcpu.set_cpuid(&leaves)?;
            vcpu.set_msrs(&boot::initial_msrs())?;
        }
        Ok(())
    }
}
