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
const USER_MODE: u8 = 3;
/// By how much a clock may run at another speed: what hosts of one kind differ by, and no program notices.
const TSC_TOLERANCE_PPM: u64 = 250;

/// A machine between two instructions. Dropping it ends it.
pub struct Paused<H: Hypervisor> {
    pub(crate) machine: Machine<H>,
    pub(crate) vcpus: Vec<VcpuOf<H>>,
    pub(crate) parking: Parking,
    /// The vCPU of the parked agent, if it is known. It takes no interrupts.
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
        // To be saved, a vCPU lets go of the interrupts that it holds.
        self.addressee = None;
        let clock_ns = self.machine.vm.clock_ns()?;
        let vcpus = self.vcpus.iter_mut().map(Vcpu::save).collect::<Result<_, _>>()?;
        let devices = self.machine.shared.devices.save().map_err(SaveError::InFlight)?;
        Ok(MachineState {
            shape: self.machine.shape,
            clock_ns,
            tsc_khz: self.machine.tsc_khz,
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
        self.hold_for_mail()?;
        Ok(id)
    }

    /// Holds the interrupts of all vCPUs that stand in user mode, and says which is the parked agent's.
    pub(crate) fn hold_for_mail(&mut self) -> Result<Option<usize>, kiln_hypervisor::Error> {
        if self.addressee.is_none() {
            for (index, vcpu) in self.vcpus.iter_mut().enumerate() {
                if vcpu.system_registers()?.cs.dpl == USER_MODE {
                    vcpu.hold_interrupts(true)?;
                    self.addressee.get_or_insert(index);
                }
            }
        }
        Ok(self.addressee)
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
        let (expected, found) = (state.tsc_khz, shell.tsc_khz);
        if u64::from(found.abs_diff(expected)) * 1_000_000 > u64::from(expected) * TSC_TOLERANCE_PPM {
            return Err(RestoreError::Clock { expected, found });
        }
        let mut paused = Self::assemble(shell, console, observer, |ioapic, memory, console| {
            Devices::restore(console, ioapic, memory, virtio, &state.devices).map_err(RestoreError::Device)
        })?;
        paused.parking = state.parking;
        paused.machine.vm.set_clock_ns(state.clock_ns)?;
        for (index, (vcpu, saved)) in paused.vcpus.iter_mut().zip(&state.vcpus).enumerate() {
            // As mail would have it, which is to come.
            let hold = state.parking == Parking::Doorbell && saved.system_registers.cs.dpl == USER_MODE;
            vcpu.restore(saved, hold)?;
            if hold {
                paused.addressee.get_or_insert(index);
            }
        }
        Ok(paused)
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Mutex;
    use std::thread::{self, ThreadId};

    use kiln_control::EndReason;
    use kiln_hypervisor::{Event, Scripted, Step};
    use kiln_virtio::Rng;

    use super::*;
    use crate::devices::power;
    use crate::layout;
    use crate::machine::Notice;

    fn power(offset: u64, value: u32) -> Step {
        Step::MmioWrite { gpa: layout::POWER_PAGE.0 + offset, data: value.to_le_bytes().into() }
    }

    fn ring(phase: u32) -> Step {
        power(power::DOORBELL, phase)
    }

    fn shell(scripted: &Scripted, vcpus: usize) -> Shell<Scripted> {
        let shape = Shape::new(64, vcpus as u32).expect("a shape");
        Shell::create(scripted, shape).expect("a shell")
    }

    fn console() -> Console {
        Console::new(None).expect("a console")
    }

    fn device() -> Vec<Box<dyn Device>> {
        vec![Box::new(Rng::new())]
    }

    /// A machine of which the vCPU `agent` is parked at the doorbell in user mode, and the others are in the kernel.
    fn in_wait(scripts: Vec<Vec<Step>>, agent: usize, observer: Observer) -> (Paused<Scripted>, Scripted) {
        let (vcpus, idle) = (scripts.len(), shell(&Scripted::default(), scripts.len()));
        let like_it = Paused::assemble(idle, console(), Box::new(|_| {}), |ioapic, memory, console| {
            Ok::<_, std::io::Error>(Devices::new(console, ioapic, memory, device()))
        });
        let mut state = like_it.expect("a machine").save().expect("saved");
        state.parking = Parking::Doorbell;
        state.vcpus[agent].system_registers.cs.dpl = USER_MODE;
        let scripted = Scripted::new(scripts);
        let paused = Paused::restore(shell(&scripted, vcpus), &state, console(), device(), observer);
        (paused.expect("restored"), scripted)
    }

    fn put_mail(paused: &mut Paused<Scripted>) {
        paused.put_mail(&[7; mailbox::GENERATION_BYTES]).expect("it is parked");
    }

    /// Where each phase was heard of.
    #[derive(Clone, Default)]
    struct Heard(std::sync::Arc<Mutex<Vec<(u32, ThreadId)>>>);

    impl Heard {
        fn observer(&self) -> Observer {
            let heard = self.clone();
            Box::new(move |notice| {
                if let Notice::Doorbell(phase, _) = notice {
                    heard.0.lock().expect("no panic").push((phase, thread::current().id()));
                }
            })
        }

        fn all(&self) -> Vec<(u32, ThreadId)> {
            self.0.lock().expect("no panic").clone()
        }
    }

    #[test]
    fn whichever_vcpu_the_agent_is_on_answers_before_the_machine_goes_on() {
        for agent in [0, 2] {
            let mut scripts = vec![vec![ring(power::PHASE_READY)]; 3];
            scripts[agent] = vec![ring(power::PHASE_RESUMED), power(power::POWER_OFF, 5)];
            let heard = Heard::default();
            let (mut paused, scripted) = in_wait(scripts, agent, heard.observer());
            put_mail(&mut paused);
            let machine = paused.resume().expect("it goes on");
            assert_eq!(heard.all().first(), Some(&(power::PHASE_RESUMED, thread::current().id())));
            assert_eq!(machine.wait().0.detail, "code 5");
            assert_eq!(scripted.seen(), [true, false].map(|hold| Event::Held(agent as u8, hold)));
        }
    }

    #[test]
    fn a_guest_that_parks_instead_of_answering_finds_its_mail_another_time() {
        let script = vec![ring(power::PHASE_PARKED), ring(power::PHASE_RESUMED)];
        let heard = Heard::default();
        let (mut paused, _) = in_wait(vec![Vec::new(), script], 1, heard.observer());
        put_mail(&mut paused);
        let machine = paused.resume().expect("it goes on");
        let mut paused = machine.pause().unwrap_or_else(|_| panic!("it has not ended"));
        assert_eq!(paused.parking(), Parking::Doorbell);
        assert_eq!(heard.all().len(), 1, "it stands still");
        put_mail(&mut paused);
        let _machine = paused.resume().expect("it goes on");
        assert_eq!(heard.all().last(), Some(&(power::PHASE_RESUMED, thread::current().id())));
    }

    #[test]
    fn a_guest_may_end_instead_of_answering() {
        let (mut paused, _) = in_wait(vec![vec![power(power::POWER_OFF, 6)]], 0, Box::new(|_| {}));
        put_mail(&mut paused);
        let (end, _) = paused.resume().expect("it goes on").wait();
        assert_eq!((end.reason, end.detail.as_str()), (EndReason::PowerOff, "code 6"));
    }

    #[test]
    fn a_guest_may_reset_a_device_before_it_answers() {
        let reset = Step::MmioWrite { gpa: layout::VIRTIO_START.0 + 0x70, data: vec![0; 4] };
        let script = vec![reset, ring(power::PHASE_RESUMED), power(power::POWER_OFF, 7)];
        let (mut paused, _) = in_wait(vec![script], 0, Box::new(|_| {}));
        put_mail(&mut paused);
        assert_eq!(paused.resume().expect("it goes on").wait().0.detail, "code 7");
    }

    #[test]
    fn a_guest_that_was_saved_in_wait_takes_mail_with_its_interrupts_held() {
        let script = vec![ring(power::PHASE_RESUMED), power(power::POWER_OFF, 9)];
        let (mut paused, scripted) = in_wait(vec![script], 0, Box::new(|_| {}));
        paused.save().expect("saved");
        assert_eq!(scripted.seen().last(), Some(&Event::Held(0, false)));
        put_mail(&mut paused);
        assert_eq!(scripted.seen().last(), Some(&Event::Held(0, true)));
        assert_eq!(paused.resume().expect("it goes on").wait().0.detail, "code 9");
    }

    #[test]
    fn a_guest_in_wait_without_mail_goes_on_as_any() {
        let heard = Heard::default();
        let ask = Step::PortRead { port: 0x64, size: 1 };
        let script = vec![ask, ring(power::PHASE_RESUMED), power(power::POWER_OFF, 8)];
        let (paused, scripted) = in_wait(vec![script], 0, heard.observer());
        assert_eq!(scripted.seen(), [Event::Held(0, true)]);
        assert_eq!(paused.resume().expect("it goes on").wait().0.detail, "code 8");
        assert_eq!(scripted.seen()[1], Event::Held(0, false), "before it does anything");
        assert_ne!(heard.all().first().map(|(_, thread)| *thread), Some(thread::current().id()));
    }
}
