//! A guest in wait: restored, parked, and the way to its first answer walked once.
//!
//! The first touch of a page of a restored guest costs a fault, and where the hypervisor shadows page tables a second one that costs more
//! than all instructions on the way. So a parked agent walks from its mailbox to its acknowledgement and back to the doorbell before
//! anybody waits for it.

use std::sync::Arc;

use kiln_hypervisor::{Exit, Hypervisor, Kick as _, Vcpu, Vm as _};

use crate::devices::{Effect, power};
use crate::machine::VcpuOf;
use crate::mailbox::{self, MailError};
use crate::paused::{Parking, Paused};
use crate::shell::Shell;

/// The most exits of a rehearsal: an agent makes one, and a run may be ended by a kick that was meant for an earlier one.
const EXITS_MAX: usize = 8;

/// A guest cannot be rehearsed; its machine is of no use then. The guest is to blame, or the hypervisor.
#[derive(Debug, thiserror::Error)]
pub enum RehearsalError {
    /// The mail cannot be put.
    #[error(transparent)]
    Mail(#[from] MailError),
    /// The hypervisor fails.
    #[error(transparent)]
    Hypervisor(#[from] kiln_hypervisor::Error),
    /// The guest did something else than to acknowledge its mail and to park.
    #[error("the parked guest does not answer as one of Kiln's agents does")]
    Unexpected,
}

impl<H: Hypervisor> Paused<H> {
    /// Has the parked agent acknowledge mail that says nothing, and park again. The machine stands still as before: no device has run, and no
    /// interrupt has reached the vCPU of the agent.
    ///
    /// # Errors
    /// [`RehearsalError`]
    pub fn rehearse(&mut self) -> Result<(), RehearsalError> {
        if self.parking() != Parking::Doorbell {
            return Err(MailError::NotParked.into());
        }
        let id = mailbox::put_rehearsal(&self.machine.memory)?;
        let agent = self.hold_for_mail()?.and_then(|index| self.vcpus.get_mut(index));
        self.machine.shared.walk::<H>(agent.ok_or(RehearsalError::Unexpected)?)?;
        if mailbox::is_acknowledged(&self.machine.memory, id) {
            return Ok(());
        }
        Err(RehearsalError::Unexpected)
    }

    /// The machine without its guest and its devices, for another guest to be restored into. What the guest has left in memory and registers
    /// stays until then.
    ///
    /// # Errors
    /// The hypervisor's; the machine is of no use then.
    pub fn into_shell(self) -> Result<Shell<H>, kiln_hypervisor::Error> {
        let Self { machine, vcpus, .. } = self;
        machine.vm.forget_memory()?;
        let (vm, memory) = (Arc::clone(&machine.vm), machine.memory.clone());
        Ok(Shell { vm, vcpus, memory, shape: machine.shape, tsc_khz: machine.tsc_khz })
    }
}

impl<K: kiln_hypervisor::Kick> crate::machine::Shared<K> {
    /// Runs a vCPU until it parks, and lets it rest.
    fn walk<H: Hypervisor>(&self, vcpu: &mut VcpuOf<H>) -> Result<(), RehearsalError> {
        for _ in 0..EXITS_MAX {
            match vcpu.run()? {
                Exit::Kicked => {}
                Exit::MmioWrite { gpa, data } => {
                    let effect = self.devices.write_memory(gpa, data);
                    if effect != Effect::Power(power::Request::Doorbell(power::PHASE_PARKED)) {
                        return Err(RehearsalError::Unexpected);
                    }
                    // The store is complete when the vCPU is entered again, which a kick ends before its next instruction.
                    vcpu.kick().kick();
                    return match vcpu.run()? {
                        Exit::Kicked => Ok(()),
                        _ => Err(RehearsalError::Unexpected),
                    };
                }
                _ => return Err(RehearsalError::Unexpected),
            }
        }
        Err(RehearsalError::Unexpected)
    }
}
