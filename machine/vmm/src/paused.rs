//! A machine that stands still: what can be saved, and what a saved one becomes.

use std::fs::File;
use std::sync::atomic::Ordering;

use kiln_hypervisor::{Hypervisor, Vcpu, VcpuState, Vm};
use kiln_memory::{GuestMemory, Watch};
use kiln_virtio::Device;

use crate::console::Console;
use crate::devices::{DeviceError, Devices, DevicesState};
use crate::machine::{Machine, Observer, VcpuOf};
use crate::mailbox::{self, Id as MailId, MailError};
use crate::shell::{Shape, Shell};

/// The privilege level of user mode.
pub(crate) const USER_MODE: u8 = 3;
/// By how much a clock may run at another speed: what hosts of one kind differ by, and no program notices.
const TSC_TOLERANCE_PPM: u64 = 250;

/// A machine between two instructions. Dropping it ends it.
pub struct Paused<H: Hypervisor> {
    pub(crate) machine: Machine<H>,
    pub(crate) vcpus: Vec<VcpuOf<H>>,
    pub(crate) parking: Parking,
    /// The vCPU of the agent that mail waits for.
    pub(crate) addressee: Option<usize>,
}

/// Everything a paused machine is, its memory and the files and sockets behind its devices apart.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MachineState {
    /// How large it is.
    pub shape: Shape,
    /// The guest's clock in nanoseconds since it was made.
    pub clock_ns: u64,
    /// The rate of its time stamp counters in kHz.
    pub tsc_khz: u32,
    /// Where its agent is parked.
    pub parking: Parking,
    /// Its vCPUs in order.
    pub vcpus: Vec<VcpuState>,
    /// Its devices.
    pub devices: DevicesState,
}

/// Where the agent of a machine that stands still finds out who it is when it goes on.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Parking {
    /// It is not parked.
    #[default]
    None,
    /// At its doorbell: it looks for mail.
    Doorbell,
    /// At its vsock port, for want of a doorbell: it waits for the host to call.
    Port,
}

/// A paused machine cannot be saved.
#[derive(Debug, thiserror::Error)]
pub enum SaveError {
    /// The hypervisor does not say what a part of it is.
    #[error(transparent)]
    Hypervisor(#[from] kiln_hypervisor::Error),
    /// A device still works on something. Kiln is to blame.
    #[error("device {0} has requests in flight")]
    InFlight(usize),
}

/// A saved machine cannot be restored. Whoever chose what it is restored from, or into, is to blame, unless it is the host.
#[derive(Debug, thiserror::Error)]
pub enum RestoreError {
    /// The shell is of another size.
    #[error("a machine of {expected:?} cannot be restored into one of {found:?}")]
    Shape {
        /// What was saved.
        expected: Shape,
        /// What there is.
        found: Shape,
    },
    /// Its clocks would run at another speed.
    #[error("the machine's time stamp counter ran at {expected} kHz and would run at {found} kHz here")]
    Clock {
        /// Before.
        expected: u32,
        /// Here.
        found: u32,
    },
    /// There is not one saved state for each vCPU.
    #[error("{0} saved vCPUs")]
    Vcpus(usize),
    /// A device is not the one that was saved.
    #[error(transparent)]
    Device(#[from] DeviceError),
    /// The hypervisor refuses a part of the state.
    #[error(transparent)]
    Hypervisor(#[from] kiln_hypervisor::Error),
    /// The host has no descriptor left.
    #[error("cannot make the machine's devices")]
    Host(#[from] std::io::Error),
}

impl<H: Hypervisor> Paused<H> {
    /// Whether its agent has parked it, and where: only then it can become another.
    pub fn parking(&self) -> Parking {
        self.parking
    }

    /// Takes note that its agent has said that it is parked at its port. One that is at its doorbell is there.
    pub fn park_at_port(&mut self) {
        if self.parking == Parking::None {
            self.parking = Parking::Port;
        }
    }

    /// The guest's memory, which stands still too.
    pub fn memory(&self) -> &GuestMemory {
        &self.machine.memory
    }

    /// Writes to `file`, which has the memory as it was saved ahead, what `watch` tells was written since; without one nothing
    /// was saved ahead, and all of the memory is written.
    ///
    /// # Errors
    /// The host's; the file is of no use then.
    pub fn save_rest(&self, file: &File, watch: Option<Watch>) -> std::io::Result<()> {
        match watch {
            Some(watch) => self.memory().save_pages(file, &watch.take()?),
            None => self.memory().save(file),
        }
    }

    /// Everything but the memory.
    ///
    /// # Errors
    /// [`SaveError`]
    pub fn save(&mut self) -> Result<MachineState, SaveError> {
        let clock_ns = self.machine.vm.clock_ns()?;
        let vcpus = self.vcpus.iter_mut().map(Vcpu::save).collect::<Result<_, _>>()?;
        let devices = self.machine.shared.devices.save().map_err(SaveError::InFlight)?;
        let tsc_khz = self.vcpus.first().map_or(Ok(0), Vcpu::tsc_khz)?;
        Ok(MachineState {
            shape: self.machine.shape,
            clock_ns,
            tsc_khz,
            parking: self.parking,
            vcpus,
            devices,
        })
    }

    /// Leaves `generation`, as `kiln_protocol::mailbox` has it, for the parked agent to find when the machine goes on.
    ///
    /// Until the agent says that it has found it, no interrupt reaches a vCPU that stands in user mode, as the agent's does: a timer that
    /// ran out while the machine stood still would have the guest kernel run first.
    ///
    /// # Errors
    /// [`MailError`]
    pub fn put_mail(&mut self, generation: &[u8]) -> Result<MailId, MailError> {
        if self.parking != Parking::Doorbell {
            return Err(MailError::NotParked);
        }
        let id = mailbox::put(&self.machine.memory, generation)?;
        self.machine.shared.has_mail.store(true, Ordering::Release);
        for (index, vcpu) in self.vcpus.iter_mut().enumerate() {
            if vcpu.system_registers()?.cs.dpl == USER_MODE {
                vcpu.hold_interrupts(true)?;
                self.addressee.get_or_insert(index);
            }
        }
        Ok(id)
    }

    /// Makes of `shell`, whose memory has what was saved, the machine that `state` describes. `virtio` are devices like its own,
    /// in the same order.
    ///
    /// # Errors
    /// [`RestoreError`]
    pub fn restore(
        shell: Shell<H>,
        state: &MachineState,
        console: Console,
        virtio: Vec<Box<dyn Device>>,
        observer: Observer,
    ) -> Result<Self, RestoreError> {
        if shell.shape() != state.shape {
            return Err(RestoreError::Shape { expected: state.shape, found: shell.shape() });
        }
        if state.vcpus.len() != usize::from(state.shape.vcpus()) {
            return Err(RestoreError::Vcpus(state.vcpus.len()));
        }
        let tsc_khz = shell.vcpus.first().map_or(Ok(0), Vcpu::tsc_khz)?;
        if u64::from(tsc_khz.abs_diff(state.tsc_khz)) * 1_000_000
            > u64::from(state.tsc_khz) * TSC_TOLERANCE_PPM
        {
            return Err(RestoreError::Clock { expected: state.tsc_khz, found: tsc_khz });
        }
        let mut paused = Self::assemble(shell, console, observer, |ioapic, memory, console| {
            Devices::restore(console, ioapic, memory, virtio, &state.devices).map_err(RestoreError::Device)
        })?;
        paused.parking = state.parking;
        paused.machine.vm.set_clock_ns(state.clock_ns)?;
        for (vcpu, state) in paused.vcpus.iter_mut().zip(&state.vcpus) {
            vcpu.restore(state)?;
        }
        Ok(paused)
    }
}
