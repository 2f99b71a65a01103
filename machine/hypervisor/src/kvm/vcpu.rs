//! One vCPU of KVM.

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::sync::Arc;

use kiln_memory::GuestMemory;
use kvm_bindings::{CpuId, Msrs, kvm_cpuid_entry2, kvm_msr_entry, kvm_regs, kvm_sregs};
use kvm_ioctls::{VcpuExit, VcpuFd};

use super::completion::Completion;
use super::kick::KvmKick;
use super::xstate::Layout;
use super::{call, save};
use crate::{CpuidEntry, Error, Exit, InternalError, Msr, Registers, SystemRegisters, Vcpu, VcpuState};

/// One vCPU of KVM.
#[derive(Debug)]
pub struct KvmVcpu {
    // Closed before the memory below is let go: fields drop in this order.
    fd: VcpuFd,
    kick: KvmKick,
    /// Where the guest's XSAVE areas hold what.
    xstate: Layout,
    /// An open vCPU keeps the machine and its memory slots alive in the kernel, so it keeps what they point into.
    memory: GuestMemory,
    /// The model-specific registers that are part of its state.
    msrs: Arc<[u32]>,
    /// It has not run, or its last exit left nothing to be answered.
    rests: bool,
    /// The task priority it had before interrupts were held.
    held: Option<u64>,
}

/// The task priority that no interrupt is above. Intel SDM volume 3 "Task and Processor Priorities".
const HIGHEST_PRIORITY: u64 = 15;

impl KvmVcpu {
    pub(super) fn new(fd: VcpuFd, memory: GuestMemory, msrs: Arc<[u32]>) -> Result<Self, Error> {
        // SAFETY: the descriptor is open: `fd` owns it and outlives the borrow.
        let borrowed = unsafe { BorrowedFd::borrow_raw(fd.as_raw_fd()) };
        let kick = KvmKick::new(borrowed)?;
        Ok(Self { fd, kick, xstate: Layout::default(), memory, msrs, rests: true, held: None })
    }

    /// Refuses what needs a vCPU at rest.
    fn check_rest(&self) -> Result<(), Error> {
        if self.rests {
            return Ok(());
        }
        Err(Error::Order("a vCPU's state is whole only after a run that was ended by a kick"))
    }

    /// Finishes the instruction that KVM could not emulate, or says why it cannot be finished.
    ///
    /// At once, and not when the vCPU runs again: it may write guest memory, which is saved while the vCPU rests.
    fn complete(&self) -> Result<Option<InternalError>, Error> {
        let error = self.kick.internal_error();
        match Completion::of(&error) {
            Some(completion) if completion.finish(&self.fd, &self.memory, &self.xstate)? => Ok(None),
            _ => Ok(Some(error)),
        }
    }
}

impl Vcpu for KvmVcpu {
    type Kick = KvmKick;

    fn set_cpuid(&mut self, entries: &[CpuidEntry]) -> Result<(), Error> {
        let layout = Layout::new(entries);
        let entries: Vec<kvm_cpuid_entry2> = entries.iter().map(Into::into).collect();
        let cpuid = CpuId::from_entries(&entries).map_err(|_| Error::Call {
            call: "KVM_SET_CPUID2",
            source: io::Error::from(io::ErrorKind::InvalidInput),
        })?;
        self.fd.set_cpuid2(&cpuid).map_err(call("KVM_SET_CPUID2"))?;
        self.xstate = layout;
        Ok(())
    }

    fn registers(&self) -> Result<Registers, Error> {
        let regs = self.fd.get_regs().map_err(call("KVM_GET_REGS"))?;
        Ok((&regs).into())
    }

    fn set_registers(&mut self, registers: &Registers) -> Result<(), Error> {
        self.fd.set_regs(&kvm_regs::from(registers)).map_err(call("KVM_SET_REGS"))
    }

    fn system_registers(&self) -> Result<SystemRegisters, Error> {
        let sregs = self.fd.get_sregs().map_err(call("KVM_GET_SREGS"))?;
        Ok((&sregs).into())
    }

    fn set_system_registers(&mut self, registers: &SystemRegisters) -> Result<(), Error> {
        self.fd.set_sregs(&kvm_sregs::from(registers)).map_err(call("KVM_SET_SREGS"))
    }

    fn set_msrs(&mut self, msrs: &[Msr]) -> Result<(), Error> {
        let entries: Vec<kvm_msr_entry> = msrs
            .iter()
            .map(|msr| kvm_msr_entry { index: msr.index, data: msr.value, ..kvm_msr_entry::default() })
            .collect();
        let list = Msrs::from_entries(&entries).map_err(|_| Error::Call {
            call: "KVM_SET_MSRS",
            source: io::Error::from(io::ErrorKind::InvalidInput),
        })?;
        let set = self.fd.set_msrs(&list).map_err(call("KVM_SET_MSRS"))?;
        // KVM stops at the first one it refuses and says how many it took.
        msrs.get(set).map_or(Ok(()), |refused| Err(Error::Msr(refused.index)))
    }

    fn tsc_khz(&self) -> Result<u32, Error> {
        self.fd.get_tsc_khz().map_err(call("KVM_GET_TSC_KHZ"))
    }

    fn hold_interrupts(&mut self, hold: bool) -> Result<(), Error> {
        if hold == self.held.is_some() {
            return Ok(());
        }
        let mut sregs = self.fd.get_sregs().map_err(call("KVM_GET_SREGS"))?;
        let priority = self.held.unwrap_or(HIGHEST_PRIORITY);
        self.held = hold.then_some(sregs.cr8);
        sregs.cr8 = priority;
        self.fd.set_sregs(&sregs).map_err(call("KVM_SET_SREGS"))
    }

    fn save(&mut self) -> Result<VcpuState, Error> {
        self.check_rest()?;
        self.hold_interrupts(false)?;
        save::save(&self.fd, &self.msrs)
    }

    fn restore(&mut self, state: &VcpuState, hold: bool) -> Result<(), Error> {
        self.check_rest()?;
        // What was held before is another's.
        self.held = hold.then(|| save::priority_of(state));
        save::restore(&self.fd, state, hold.then_some(HIGHEST_PRIORITY))
    }

    fn kick(&self) -> KvmKick {
        self.kick.clone()
    }

    fn run(&mut self) -> Result<Exit<'_>, Error> {
        self.kick.enter();
        let outcome = loop {
            let fd = &raw mut self.fd;
            // SAFETY: `self` stays borrowed for as long as what is returned; a turn of the loop that returns nothing keeps nothing.
            // (For the borrow checker a borrow that may be returned lives on in either case.)
            let outcome = unsafe { &mut *fd }.run();
            if !matches!(outcome, Ok(VcpuExit::InternalError)) {
                break outcome;
            }
            self.rests = true;
            if let Some(error) = self.complete()? {
                return Ok(Exit::InternalError(error));
            }
        };
        self.rests = matches!(outcome, Ok(VcpuExit::Intr) | Err(_));
        match outcome {
            Ok(VcpuExit::IoOut(port, data)) => Ok(Exit::PortWrite { port, data }),
            Ok(VcpuExit::IoIn(port, data)) => Ok(Exit::PortRead { port, data }),
            Ok(VcpuExit::MmioWrite(gpa, data)) => Ok(Exit::MmioWrite { gpa, data }),
            Ok(VcpuExit::MmioRead(gpa, data)) => Ok(Exit::MmioRead { gpa, data }),
            Ok(VcpuExit::Intr) => Ok(Exit::Kicked),
            Ok(VcpuExit::Shutdown) => Ok(Exit::Shutdown),
            Ok(VcpuExit::FailEntry(reason, _)) => Ok(Exit::FailedEntry { reason }),
            Ok(_) => Ok(Exit::Unknown(self.kick.exit_reason())),
            Err(errno) if errno.errno() == libc::EINTR => {
                self.kick.answered();
                Ok(Exit::Kicked)
            }
            // A vCPU that waits to be started returns this when a signal or the start itself wakes it.
            Err(errno) if errno.errno() == libc::EAGAIN => {
                self.kick.answered();
                Ok(Exit::Kicked)
            }
            Err(errno) => Err(call("KVM_RUN")(errno)),
        }
    }
}
