//! A backend that replays exits from a list.
//!
//! It checks the order of the calls as [`crate::Kvm`] does, hands out the exits of its script one a run, records what
//! the monitor answered and which interrupts it sent, and after the script's end waits to be kicked, as a halted guest
//! would.

use std::collections::VecDeque;
use std::io;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};

use kiln_memory::GuestMemory;

use crate::{
    CpuidEntry, Error, Exit, Hypervisor, InternalError, Kick, MAX_VCPUS, Msi, Msr, Registers,
    SystemRegisters, Vcpu, VcpuState, Vm,
};

/// The rate a scripted time stamp counter claims, in kHz.
const TSC_KHZ: u32 = 1_000_000;

/// What a scripted vCPU does next.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Step {
    /// Writes `data` to `port`.
    PortWrite {
        /// The port.
        port: u16,
        /// What is written.
        data: Vec<u8>,
    },
    /// Reads `size` bytes from `port`.
    PortRead {
        /// The port.
        port: u16,
        /// How many bytes.
        size: usize,
    },
    /// Writes `data` to `gpa`.
    MmioWrite {
        /// The guest physical address.
        gpa: u64,
        /// What is written.
        data: Vec<u8>,
    },
    /// Reads `size` bytes from `gpa`.
    MmioRead {
        /// The guest physical address.
        gpa: u64,
        /// How many bytes.
        size: usize,
    },
    /// Shuts down.
    Shutdown,
    /// Stops for an error inside the hypervisor.
    InternalError(InternalError),
    /// Stops because the processor refuses the state.
    FailedEntry {
        /// The hardware's reason.
        reason: u64,
    },
    /// Stops in a way the contract does not know.
    Unknown(u32),
    /// Fails to run, with this errno.
    Fail(i32),
}

/// What the monitor answered to a read.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Answer {
    /// The vCPU that asked.
    pub vcpu: u8,
    /// The bytes it got.
    pub data: Vec<u8>,
}

/// What a scripted machine saw the monitor do.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Event {
    /// It answered a read.
    Answered(Answer),
    /// It sent an interrupt.
    Interrupted(Msi),
    /// It began or ended to hold the interrupts of a vCPU.
    Held(u8, bool),
}

/// Makes one machine that replays scripts.
#[derive(Clone, Debug, Default)]
pub struct Scripted {
    scripts: Vec<Vec<Step>>,
    cpuid: Vec<CpuidEntry>,
    seen: Arc<Mutex<Vec<Event>>>,
}

impl Scripted {
    /// A hypervisor whose vCPU 0 replays the first of `scripts`, vCPU 1 the second, and so on; further ones idle.
    pub fn new(scripts: Vec<Vec<Step>>) -> Self {
        Self { scripts, ..Self::default() }
    }

    /// The same with `cpuid` as the leaves it supports.
    pub fn with_cpuid(mut self, cpuid: Vec<CpuidEntry>) -> Self {
        self.cpuid = cpuid;
        self
    }

    /// Everything the monitor did so far, in order.
    pub fn seen(&self) -> Vec<Event> {
        lock(&self.seen).clone()
    }
}

impl Hypervisor for Scripted {
    type Vm = ScriptedVm;

    fn supported_cpuid(&self) -> Result<Vec<CpuidEntry>, Error> {
        Ok(self.cpuid.clone())
    }

    fn create_vm(&self) -> Result<ScriptedVm, Error> {
        Ok(ScriptedVm {
            scripted: self.clone(),
            memory: None,
            has_interrupts: false,
            clock_ns: Mutex::default(),
        })
    }
}

/// A machine that replays scripts.
#[derive(Debug)]
pub struct ScriptedVm {
    scripted: Scripted,
    memory: Option<GuestMemory>,
    has_interrupts: bool,
    /// It stands still.
    clock_ns: Mutex<u64>,
}

impl Vm for ScriptedVm {
    type Vcpu = ScriptedVcpu;

    fn map_memory(&mut self, memory: &GuestMemory) -> Result<(), Error> {
        if self.memory.is_some() || self.has_interrupts {
            return Err(Error::Order("memory is mapped once, and before interrupts are enabled"));
        }
        self.memory = Some(memory.clone());
        Ok(())
    }

    fn forget_memory(&self) -> Result<(), Error> {
        self.memory.as_ref().map(|_| ()).ok_or(Error::Order("there is no memory to forget"))
    }

    fn enable_interrupts(&mut self) -> Result<(), Error> {
        if self.memory.is_none() || self.has_interrupts {
            return Err(Error::Order("interrupts are enabled once, and after memory is mapped"));
        }
        self.has_interrupts = true;
        Ok(())
    }

    fn create_vcpu(&self, index: u8) -> Result<ScriptedVcpu, Error> {
        if !self.has_interrupts || index >= MAX_VCPUS {
            return Err(Error::Order("a vCPU is made after interrupts are enabled, with an index below 16"));
        }
        let script = self.scripted.scripts.get(usize::from(index)).cloned().unwrap_or_default();
        Ok(ScriptedVcpu {
            index,
            script: script.into(),
            asked: false,
            buffer: Vec::new(),
            state: VcpuState {
                registers: Registers { rflags: 2, ..Registers::default() },
                ..VcpuState::default()
            },
            rests: true,
            holds: false,
            seen: Arc::clone(&self.scripted.seen),
            kick: ScriptedKick::default(),
        })
    }

    fn signal_msi(&self, msi: Msi) -> Result<(), Error> {
        lock(&self.scripted.seen).push(Event::Interrupted(msi));
        Ok(())
    }

    fn clock_ns(&self) -> Result<u64, Error> {
        Ok(*lock(&self.clock_ns))
    }

    fn set_clock_ns(&self, clock_ns: u64) -> Result<(), Error> {
        *lock(&self.clock_ns) = clock_ns;
        Ok(())
    }
}

/// A vCPU that replays a script.
#[derive(Debug)]
pub struct ScriptedVcpu {
    index: u8,
    script: VecDeque<Step>,
    /// The last exit was a read, whose answer is in `buffer`.
    asked: bool,
    buffer: Vec<u8>,
    state: VcpuState,
    /// It has not run, or its last run was ended by a kick.
    rests: bool,
    holds: bool,
    seen: Arc<Mutex<Vec<Event>>>,
    kick: ScriptedKick,
}

impl Vcpu for ScriptedVcpu {
    type Kick = ScriptedKick;

    fn set_cpuid(&mut self, _: &[CpuidEntry]) -> Result<(), Error> {
        Ok(())
    }

    fn registers(&self) -> Result<Registers, Error> {
        Ok(self.state.registers)
    }

    fn set_registers(&mut self, registers: &Registers) -> Result<(), Error> {
        self.state.registers = *registers;
        Ok(())
    }

    fn system_registers(&self) -> Result<SystemRegisters, Error> {
        Ok(self.state.system_registers)
    }

    fn set_system_registers(&mut self, registers: &SystemRegisters) -> Result<(), Error> {
        self.state.system_registers = *registers;
        Ok(())
    }

    fn set_msrs(&mut self, _: &[Msr]) -> Result<(), Error> {
        Ok(())
    }

    fn tsc_khz(&self) -> Result<u32, Error> {
        Ok(TSC_KHZ)
    }

    fn hold_interrupts(&mut self, hold: bool) -> Result<(), Error> {
        // What interrupts do is in the script.
        if std::mem::replace(&mut self.holds, hold) != hold {
            lock(&self.seen).push(Event::Held(self.index, hold));
        }
        Ok(())
    }

    fn save(&mut self) -> Result<VcpuState, Error> {
        self.check_rest()?;
        self.hold_interrupts(false)?;
        Ok(self.state.clone())
    }

    fn restore(&mut self, state: &VcpuState, hold: bool) -> Result<(), Error> {
        self.check_rest()?;
        self.state = state.clone();
        self.hold_interrupts(hold)
    }

    fn kick(&self) -> ScriptedKick {
        self.kick.clone()
    }

    fn run(&mut self) -> Result<Exit<'_>, Error> {
        if std::mem::take(&mut self.asked) {
            let data = std::mem::take(&mut self.buffer);
            lock(&self.seen).push(Event::Answered(Answer { vcpu: self.index, data }));
        }
        self.rests = true;
        if self.kick.take() {
            return Ok(Exit::Kicked);
        }
        let Some(step) = self.script.pop_front() else {
            self.kick.wait();
            return Ok(Exit::Kicked);
        };
        self.rests = false;
        Ok(match step {
            Step::PortWrite { port, data } => {
                self.buffer = data;
                Exit::PortWrite { port, data: &self.buffer }
            }
            Step::PortRead { port, size } => Exit::PortRead { port, data: self.ask(size) },
            Step::MmioWrite { gpa, data } => {
                self.buffer = data;
                Exit::MmioWrite { gpa, data: &self.buffer }
            }
            Step::MmioRead { gpa, size } => Exit::MmioRead { gpa, data: self.ask(size) },
            Step::Shutdown => Exit::Shutdown,
            Step::InternalError(error) => Exit::InternalError(error),
            Step::FailedEntry { reason } => Exit::FailedEntry { reason },
            Step::Unknown(number) => Exit::Unknown(number),
            Step::Fail(errno) => {
                return Err(Error::Call { call: "run", source: io::Error::from_raw_os_error(errno) });
            }
        })
    }
}

impl ScriptedVcpu {
    fn check_rest(&self) -> Result<(), Error> {
        if self.rests {
            return Ok(());
        }
        Err(Error::Order("a vCPU's state is whole only after a run that was ended by a kick"))
    }

    fn ask(&mut self, size: usize) -> &mut [u8] {
        self.asked = true;
        self.buffer = vec![0; size];
        &mut self.buffer
    }
}

/// Ends a scripted vCPU's run from another thread.
#[derive(Clone, Debug, Default)]
pub struct ScriptedKick {
    state: Arc<(Mutex<bool>, Condvar)>,
}

impl ScriptedKick {
    fn take(&self) -> bool {
        std::mem::take(&mut *lock(&self.state.0))
    }

    fn wait(&self) {
        let mut kicked = lock(&self.state.0);
        while !std::mem::take(&mut *kicked) {
            kicked = self.state.1.wait(kicked).unwrap_or_else(PoisonError::into_inner);
        }
    }
}

impl Kick for ScriptedKick {
    fn kick(&self) {
        *lock(&self.state.0) = true;
        self.state.1.notify_one();
    }
}

/// A panic elsewhere leaves nothing half done behind these locks.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
