//! A running machine: a thread for each vCPU, and the devices they reach.

use std::os::fd::BorrowedFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;

use kiln_control::EndReason;
use kiln_hypervisor::{Exit, Hypervisor, Msi, Vcpu, Vm};
use kiln_memory::GuestMemory;
use kiln_virtio::Device;

use crate::boot::EntryState;
use crate::clock::{Nanoseconds, monotonic};
use crate::console::{Console, ConsoleInput};
use crate::control::{Control, End};
use crate::devices::{Devices, Effect, Ioapic, power};
use crate::host;
use crate::mailbox;
use crate::paused::{Parking, Paused};
use crate::shell::{Shape, Shell};

/// What the guest kernel prints when it gives up. Linux `kernel/panic.c`.
const PANIC_LINE: &[u8] = b"Kernel panic - not syncing";

/// Something a running machine reports while it goes on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Notice {
    /// The first vCPU is about to enter the guest.
    Entered(Nanoseconds),
    /// The agent rang the doorbell with this phase.
    Doorbell(u32, Nanoseconds),
}

/// Told of each [`Notice`], on the vCPU thread it happens on; it should not take long.
pub type Observer = Box<dyn Fn(Notice) + Send + Sync>;

pub(crate) type VcpuOf<H> = <<H as Hypervisor>::Vm as Vm>::Vcpu;
type Kick<H> = <VcpuOf<H> as Vcpu>::Kick;

/// A running machine. Dropping it ends it.
pub struct Machine<H: Hypervisor> {
    pub(crate) shared: Arc<Shared<Kick<H>>>,
    threads: Vec<JoinHandle<Option<VcpuOf<H>>>>,
    console: Console,
    pub(crate) vm: Arc<H::Vm>,
    pub(crate) memory: GuestMemory,
    pub(crate) shape: Shape,
    pub(crate) tsc_khz: u32,
}

/// What all vCPU threads of a machine share.
pub(crate) struct Shared<K> {
    pub(crate) control: Arc<Control<K>>,
    pub(crate) devices: Devices,
    /// Mail waits for the agent, and until it is taken vCPUs in user mode take no interrupts.
    pub(crate) has_mail: AtomicBool,
    observer: Observer,
}

impl<H: Hypervisor> Machine<H> {
    /// Starts the guest in `shell` at `entry`.
    ///
    /// `virtio` are its devices in the order of their windows, at most [`MAX_VIRTIO_DEVICES`](crate::layout::MAX_VIRTIO_DEVICES).
    ///
    /// # Errors
    /// What the host says when it has no thread or descriptor left, or the hypervisor refuses the entry state.
    pub fn start(
        shell: Shell<H>,
        entry: &EntryState,
        console: Console,
        virtio: Vec<Box<dyn Device>>,
        observer: Observer,
    ) -> Result<Self, StartError> {
        let mut paused = Paused::assemble(shell, console, observer, |ioapic, memory, console| {
            Ok::<_, StartError>(Devices::new(console, ioapic, memory, virtio))
        })?;
        if let Some(first) = paused.vcpus.first_mut() {
            entry.apply(first)?;
        }
        (paused.machine.shared.observer)(Notice::Entered(monotonic()));
        Ok(paused.resume()?)
    }

    /// Stops every vCPU between two instructions, and every device between two requests.
    ///
    /// # Errors
    /// The machine itself when it has ended meanwhile.
    pub fn pause(mut self) -> Result<Paused<H>, Self> {
        if !self.shared.control.pause() && !self.shared.control.is_paused() {
            return Err(self);
        }
        let vcpus: Vec<_> =
            self.threads.drain(..).filter_map(|thread| thread.join().ok().flatten()).collect();
        if vcpus.len() != usize::from(self.shape.vcpus()) {
            return Err(self);
        }
        self.shared.devices.pause();
        let parking = if self.shared.control.take_parked() { Parking::Doorbell } else { Parking::None };
        Ok(Paused { machine: self, vcpus, parking, addressee: None })
    }

    /// Readable when the guest has parked itself: its vCPUs stand still, or will in moments, and [`pause`](Self::pause) takes
    /// the machine as it is.
    pub fn parked_fd(&self) -> BorrowedFd<'_> {
        self.shared.control.parked_fd()
    }

    /// Readable once the machine has ended.
    pub fn ended_fd(&self) -> BorrowedFd<'_> {
        self.shared.control.ended_fd()
    }

    /// What the guest writes to its console.
    pub fn console(&self) -> &Console {
        &self.console
    }

    /// Ends the machine at once, as pulling the plug would.
    pub fn stop(&self) {
        self.shared.control.end(EndReason::Stopped, "");
    }

    /// Waits until the machine has ended and its devices have stopped. Says how it ended.
    pub fn wait(mut self) -> (End, Console) {
        for thread in self.threads.drain(..) {
            // A thread that panicked has ended the machine, which says so.
            let _ = thread.join();
        }
        self.console.close();
        let mut end =
            self.shared.control.ended().unwrap_or(End { reason: EndReason::Stopped, detail: String::new() });
        let may_be_panic = matches!(end.reason, EndReason::Reset | EndReason::Crash | EndReason::PowerOff);
        if may_be_panic && self.console.contains(PANIC_LINE) {
            end.reason = EndReason::Panic;
        }
        (end, self.console.clone())
    }
}

impl<H: Hypervisor> Drop for Machine<H> {
    fn drop(&mut self) {
        self.stop();
        for thread in self.threads.drain(..) {
            let _ = thread.join();
        }
    }
}

impl<H: Hypervisor> Paused<H> {
    /// A machine of the parts of `shell` with the devices that `devices` makes, its vCPUs at rest.
    ///
    /// # Errors
    /// What `devices` says, or the host when it has no descriptor left.
    pub(crate) fn assemble<E: From<std::io::Error>>(
        shell: Shell<H>,
        console: Console,
        observer: Observer,
        devices: impl FnOnce(Ioapic, &GuestMemory, ConsoleInput) -> Result<Devices, E>,
    ) -> Result<Self, E> {
        let Shell { vm, vcpus, memory, shape, tsc_khz } = shell;
        let control = Arc::new(Control::new(vcpus.iter().map(Vcpu::kick).collect())?);
        let ioapic = Ioapic::new(shape.vcpus(), deliver(Arc::clone(&vm), Arc::clone(&control)));
        let devices = devices(ioapic, &memory, console.input())?;
        let shared = Arc::new(Shared { control, devices, has_mail: AtomicBool::new(false), observer });
        let machine = Machine { shared, threads: Vec::new(), console, vm, memory, shape, tsc_khz };
        Ok(Self { machine, vcpus, parking: Parking::None, addressee: None })
    }

    /// Lets the machine go on where it stopped.
    ///
    /// With mail for its agent, this returns when the agent has taken it, or the machine has ended or parked itself: the vCPU that was in user
    /// mode, which is the agent's, runs on the caller's thread until then, which is sooner than on one that is yet to be made, and alone:
    /// threads of devices take longer to make than the agent to answer. Until this returns, no device serves anybody. Who cannot rely on the
    /// guest sets a limit (`kiln_jail::deadline`).
    ///
    /// # Errors
    /// What the host says when it has no thread left; the machine has ended then.
    pub fn resume(self) -> std::io::Result<Machine<H>> {
        let Self { mut machine, mut vcpus, addressee, .. } = self;
        machine.shared.control.resume();
        if !machine.shared.has_mail.load(Ordering::Acquire) {
            // They were held for mail that has not come.
            machine.shared.let_interrupts_in(&mut vcpus);
        } else if let Some(index) = addressee {
            // Where mail is there is memory for it. As late as can be, for a host may let a thread wait.
            let _ = mailbox::tell_time(&machine.memory);
            match machine.shared.run(index, vcpus.remove(index), Until::MailIsTaken) {
                Some(answered) => vcpus.insert(index, answered),
                // It has ended, which its owner finds out.
                None => return Ok(machine),
            }
        }
        machine.shared.devices.resume();
        for (index, vcpu) in vcpus.into_iter().enumerate() {
            if machine.shared.control.is_paused() {
                // It has parked itself on the way, and used up the kick that went with that.
                machine.shared.control.kick();
            }
            let shared = Arc::clone(&machine.shared);
            let thread = std::thread::Builder::new().name(format!("vcpu {index}"));
            machine.threads.push(thread.spawn(move || shared.run(index, vcpu, Until::Paused))?);
        }
        Ok(machine)
    }
}

/// A machine cannot be started.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    /// The hypervisor refused.
    #[error(transparent)]
    Hypervisor(#[from] kiln_hypervisor::Error),
    /// The host has no thread or descriptor left.
    #[error("cannot start the machine's threads")]
    Host(#[from] std::io::Error),
}

/// Delivers interrupts to the vCPUs. One that cannot be delivered would hang the guest, so it ends the machine.
fn deliver<V: Vm, K: kiln_hypervisor::Kick>(
    vm: Arc<V>,
    control: Arc<Control<K>>,
) -> impl Fn(Msi) + Send + Sync {
    move |msi| {
        if let Err(error) = vm.signal_msi(msi) {
            control.end(EndReason::Crash, format!("an interrupt cannot be delivered: {error}"));
        }
    }
}

/// How long a vCPU runs, unless the machine ends.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Until {
    /// The machine is paused.
    Paused,
    /// That, or the agent has taken its mail.
    MailIsTaken,
}

impl<K: kiln_hypervisor::Kick> Shared<K> {
    /// Runs a vCPU, which is given back then: at rest, or behind an exit that is complete once it runs again.
    fn run<V: Vcpu<Kick = K>>(&self, index: usize, mut vcpu: V, until: Until) -> Option<V> {
        let _guard = EndOnPanic(&self.control);
        while !self.control.has_ended() {
            let effect = match vcpu.run() {
                Ok(Exit::PortWrite { port, data }) => self.devices.write_port(port, data),
                Ok(Exit::PortRead { port, data }) => {
                    self.devices.read_port(port, data);
                    Effect::None
                }
                Ok(Exit::MmioWrite { gpa, data }) => self.devices.write_memory(gpa, data),
                Ok(Exit::MmioRead { gpa, data }) => {
                    self.devices.read_memory(gpa, data);
                    Effect::None
                }
                Ok(Exit::Kicked) if self.control.is_paused() => return Some(vcpu),
                Ok(Exit::Kicked) => Effect::Look,
                Ok(other) => {
                    let cause = crash(&other);
                    self.crashed(index, &vcpu, &cause);
                    return None;
                }
                Err(error) => {
                    self.crashed(index, &vcpu, &error.to_string());
                    return None;
                }
            };
            match effect {
                Effect::None => continue,
                Effect::Look => {}
                Effect::Reset => self.control.end(EndReason::Reset, ""),
                Effect::Power(request) => self.serve(request),
            }
            if self.has_mail.load(Ordering::Acquire) {
                continue;
            }
            if let Err(error) = vcpu.hold_interrupts(false) {
                self.crashed(index, &vcpu, &error.to_string());
                return None;
            }
            if until == Until::MailIsTaken {
                return Some(vcpu);
            }
        }
        None
    }

    /// Ends it that vCPUs hold interrupts.
    fn let_interrupts_in<V: Vcpu<Kick = K>>(&self, vcpus: &mut [V]) {
        for (index, vcpu) in vcpus.iter_mut().enumerate() {
            if let Err(error) = vcpu.hold_interrupts(false) {
                self.crashed(index, vcpu, &error.to_string());
            }
        }
    }

    /// Does what the guest asked for through the power page.
    fn serve(&self, request: power::Request) {
        match request {
            power::Request::PowerOff(0) => self.control.end(EndReason::PowerOff, ""),
            power::Request::PowerOff(code) => self.control.end(EndReason::PowerOff, format!("code {code}")),
            power::Request::Notice(power::NOTICE_NOT_ADOPTED) => {
                self.control.end(EndReason::Panic, "the restored guest could not take on its identity");
            }
            power::Request::Notice(code) => {
                self.control.end(EndReason::Panic, format!("the guest gave up, code {code}"));
            }
            power::Request::Doorbell(phase) => {
                if phase == power::PHASE_PARKED {
                    self.control.park();
                }
                (self.observer)(Notice::Doorbell(phase, monotonic()));
                if phase == power::PHASE_RESUMED && self.has_mail.swap(false, Ordering::AcqRel) {
                    // Others may hold interrupts too.
                    self.control.kick();
                }
            }
        }
    }

    /// Ends the machine because a vCPU cannot go on.
    fn crashed(&self, index: usize, vcpu: &impl Vcpu, cause: &str) {
        let at = vcpu
            .registers()
            .map_or_else(|_| String::new(), |registers| format!(", RIP {:#x}", registers.rip));
        self.control.end(EndReason::Crash, format!("vCPU {index}: {cause}{at}"));
    }
}

/// Why a vCPU cannot go on.
fn crash(exit: &Exit<'_>) -> String {
    match exit {
        Exit::Shutdown => "triple fault".into(),
        Exit::InternalError(error) if host::is_pvm() => {
            format!("{error} (this host emulates guest kernels; Kiln's own kernel is made for that)")
        }
        Exit::InternalError(error) => error.to_string(),
        Exit::FailedEntry { reason } => format!("the processor refused the vCPU's state, reason {reason:#x}"),
        Exit::Unknown(reason) => format!("KVM exit {reason}, which Kiln does not know"),
        _ => "an exit that needs no answer".into(),
    }
}

/// Ends the machine when a vCPU thread unwinds, so that nobody waits for it forever.
struct EndOnPanic<'a, K: kiln_hypervisor::Kick>(&'a Control<K>);

impl<K: kiln_hypervisor::Kick> Drop for EndOnPanic<'_, K> {
    fn drop(&mut self) {
        if std::thread::panicking() {
            self.0.end(EndReason::Crash, "a vCPU thread panicked");
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc;

    use kiln_hypervisor::{Answer, Event, InternalError, Scripted, Step};
    use proptest::prelude::*;

    use super::*;
    use crate::layout;

    fn start(scripted: &Scripted, vcpus: u32, observer: Observer) -> Machine<Scripted> {
        let shell = Shell::create(scripted, Shape::new(64, vcpus).expect("a shape")).expect("a shell");
        let console = Console::new(None).expect("a console");
        let entry = EntryState::for_tests();
        Machine::start(shell, &entry, console, Vec::new(), observer).expect("it starts")
    }

    fn run(scripts: Vec<Vec<Step>>) -> (End, Vec<Event>) {
        let vcpus = scripts.len() as u32;
        let scripted = Scripted::new(scripts);
        let (end, _) = start(&scripted, vcpus, Box::new(|_| {})).wait();
        (end, scripted.seen())
    }

    fn power(offset: u64, value: u32) -> Step {
        Step::MmioWrite { gpa: layout::POWER_PAGE.0 + offset, data: value.to_le_bytes().into() }
    }

    #[test]
    fn every_way_a_vcpu_cannot_go_on_is_a_crash_that_names_it() {
        let emulation = InternalError { suberror: 1, ..InternalError::default() };
        for (step, part) in [
            (Step::Shutdown, "triple fault"),
            (Step::InternalError(emulation), "cannot emulate"),
            (Step::FailedEntry { reason: 0x21 }, "reason 0x21"),
            (Step::Unknown(99), "KVM exit 99"),
            (Step::Fail(14), "Bad address"),
        ] {
            let (end, _) = run(vec![vec![], vec![step]]);
            assert_eq!(end.reason, EndReason::Crash, "{end:?}");
            assert!(end.detail.starts_with("vCPU 1: "), "{end:?}");
            assert!(end.detail.contains(part), "{end:?}");
            assert!(end.detail.contains("RIP 0x"), "{end:?}");
        }
    }

    #[test]
    fn one_vcpu_ends_all_the_others() {
        // Fifteen of them wait for ever.
        let mut scripts = vec![Vec::new(); 16];
        scripts[7] = vec![power(0, 0)];
        assert_eq!(run(scripts).0.reason, EndReason::PowerOff);
    }

    #[test]
    fn the_first_end_counts() {
        let (end, _) = run(vec![vec![power(0, 5), power(0, 6), Step::Shutdown]]);
        assert_eq!((end.reason, end.detail.as_str()), (EndReason::PowerOff, "code 5"));
    }

    #[test]
    fn a_stop_ends_idle_vcpus() {
        let scripted = Scripted::new(Vec::new());
        let machine = start(&scripted, 4, Box::new(|_| {}));
        machine.stop();
        assert_eq!(machine.wait().0.reason, EndReason::Stopped);
    }

    #[test]
    fn a_dropped_machine_leaves_no_thread() {
        let (sender, ended) = mpsc::channel::<()>();
        let observer = Box::new(move |_| drop(sender.clone()));
        drop(start(&Scripted::new(Vec::new()), 4, observer));
        // The observer, and with it the sender, was dropped by the last thread.
        assert!(ended.recv().is_err());
    }

    #[test]
    fn power_registers_are_words() {
        let at = layout::POWER_PAGE.0;
        let wrong = [
            Step::MmioWrite { gpa: at, data: vec![0] },
            Step::MmioWrite { gpa: at, data: vec![0; 8] },
            Step::MmioWrite { gpa: at + 1, data: vec![0; 4] },
            Step::MmioWrite { gpa: at + 0x10, data: vec![0; 4] },
            Step::MmioRead { gpa: at + 0xc, size: 2 },
            Step::MmioRead { gpa: at + 0xc, size: 4 },
        ];
        let script = wrong.into_iter().chain([power(0, 9)]).collect();
        let (end, seen) = run(vec![script]);
        assert_eq!(end.detail, "code 9");
        let answers = [b"\xff\xff".to_vec(), b"KILN".to_vec()];
        assert_eq!(seen, answers.map(|data| Event::Answered(Answer { vcpu: 0, data })));
    }

    /// Exits of a guest that may do anything but end the machine.
    fn any_access() -> impl Strategy<Value = Step> {
        let gpa = prop_oneof![
            4 => (0_u64..24, 0_u64..0x1000)
                .prop_map(|(window, offset)| layout::POWER_PAGE.0 + 0x1000 + window * 0x1000 + offset),
            2 => (0_u64..0x1000).prop_map(|offset| layout::IOAPIC.0 + offset),
            1 => any::<u64>().prop_filter("not the power page", |gpa| gpa & !0xfff != layout::POWER_PAGE.0),
        ];
        let port = prop_oneof![3 => 0x3f8_u16..0x400, 1 => any::<u16>()]
            .prop_filter("not a reset", |port| ![0x64, 0xcf9].contains(port));
        let data = prop::collection::vec(any::<u8>(), 1..=8);
        prop_oneof![
            (gpa.clone(), data.clone()).prop_map(|(gpa, data)| Step::MmioWrite { gpa, data }),
            (gpa, 1_usize..=8).prop_map(|(gpa, size)| Step::MmioRead { gpa, size }),
            (port.clone(), data).prop_map(|(port, data)| Step::PortWrite { port, data }),
            (port, 1_usize..=64).prop_map(|(port, size)| Step::PortRead { port, size }),
        ]
    }

    proptest! {
        #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::with_cases(64) })]

        #[test]
        fn whatever_a_guest_accesses_the_machine_goes_on(
            mut script in prop::collection::vec(any_access(), 0..400),
        ) {
            let reads = script
                .iter()
                .filter(|step| matches!(step, Step::MmioRead { .. } | Step::PortRead { .. }))
                .count();
            script.push(power(0, 123));
            let scripted = Scripted::new(vec![script]);
            let shell = Shell::create(&scripted, Shape::new(64, 1).expect("a shape")).expect("a shell");
            let virtio: Vec<Box<dyn Device>> = (0..3).map(|_| Box::new(kiln_virtio::Rng::new()) as _).collect();
            let console = Console::new(None).expect("a console");
            let observer = Box::new(|_| {});
            let machine = Machine::start(shell, &EntryState::for_tests(), console, virtio, observer).expect("starts");
            let (end, _) = machine.wait();
            prop_assert_eq!(end.detail, "code 123");
            let answered = scripted.seen().iter().filter(|event| matches!(event, Event::Answered(_))).count();
            prop_assert_eq!(answered, reads);
        }
    }
}
