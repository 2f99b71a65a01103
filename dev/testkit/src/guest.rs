//! Kiln's own guest in this process: booted, parked, saved, restored, and asked who it is.

use std::fs::File;
use std::io::{self, Read as _, Seek as _, SeekFrom, Write as _};
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::mpsc;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use anyhow::{Context as _, Result, anyhow, bail};
use kiln_hypervisor::{Hypervisor as _, Kvm};
use kiln_memory::Gpa;
use kiln_protocol::frame::{self, Kind};
use kiln_protocol::mailbox::Generation;
use kiln_protocol::{
    AGENT_PORT, Became, Become, Call, Hello, Outcome, Park, READY_PORT, Reply, Request, Welcome, power,
};
use kiln_snapshot::Header;
use kiln_support::digest::Digest;
use kiln_virtio::{Device, OpenStream, Rng, Vsock, VsockPorts};
use kiln_vmm::{Console, Machine, MachineState, Notice, Observer, Parking, Paused, Shape, Shell, boot};
use prost::Message as _;
use rustix::fs::{MemfdFlags, SealFlags};

use crate::initramfs;

/// How long a guest may take to boot or to answer. It stops a test that hangs.
const PATIENCE: Duration = Duration::from_mins(3);
const CID: u64 = 3;
const CONSOLE_TAIL_BYTES: usize = 4096;
const PAGE_BYTES: usize = 4096;

/// A guest that runs.
pub struct Guest {
    machine: Machine<Kvm>,
    ports: VsockPorts,
    console: Console,
    rung: mpsc::Receiver<(u32, Instant)>,
}

/// A guest whose agent is parked.
pub struct Parked {
    paused: Paused<Kvm>,
    ports: VsockPorts,
    console: Console,
    rung: mpsc::Receiver<(u32, Instant)>,
}

/// A parked guest whose way to its first answer has been walked.
pub struct InWait {
    paused: Paused<Kvm>,
    ports: VsockPorts,
    console: Console,
    rung: mpsc::Receiver<(u32, Instant)>,
}

/// Where the time of a claim went: what was ready before it, and the steps from its start.
#[derive(Clone, Copy, Debug)]
pub struct Claimed {
    /// To a machine without a guest.
    pub shell: Duration,
    /// From there to a machine about to run.
    pub state: Duration,
    /// From there to the agent's acknowledgement.
    pub resumed: Duration,
    /// From there to a guest that has taken on its identity.
    pub adopted: Duration,
}

/// A guest that was saved.
pub struct Saved {
    snapshot: Vec<u8>,
    memory: File,
    /// Where its agent is parked.
    pub parking: Parking,
    /// How long it took to take its state.
    pub state_took: Duration,
    /// How long it took to copy its memory.
    pub memory_took: Duration,
    /// How much memory it has touched, in bytes.
    pub memory_bytes: u64,
}

/// Where the time of a restore went.
#[derive(Clone, Copy, Debug)]
pub struct Restored {
    /// To a machine without a guest.
    pub shell: Duration,
    /// From there to a machine about to run.
    pub state: Duration,
    /// From there to all vCPUs running.
    pub resume: Duration,
}

impl Guest {
    /// Boots the kernel and the agent in `folder` and waits until the agent listens.
    ///
    /// # Errors
    /// When the guest does not get there; with its last words.
    pub fn boot(folder: &Path, memory_mib: u32, vcpus: u32) -> Result<Self> {
        Self::boot_kernel(&folder.join("vmlinux"), folder, memory_mib, vcpus)
    }

    /// The same with another kernel.
    ///
    /// # Errors
    /// As [`boot`](Self::boot).
    pub fn boot_kernel(kernel: &Path, folder: &Path, memory_mib: u32, vcpus: u32) -> Result<Self> {
        let open = |path: &Path| File::open(path).with_context(|| path.display().to_string());
        let shape = Shape::new(memory_mib, vcpus)?;
        let shell = Shell::create(&Kvm::open()?, shape)?;
        let kernel = boot::load_kernel(shell.memory(), &open(kernel)?)?;
        let (devices, ports) = devices();
        let initramfs = open(&folder.join("initramfs.cpio"))?;
        let entry = boot::prepare(shell.memory(), &kernel, Some(&initramfs), shape, devices.len(), "")?;
        let console = Console::new(None)?;
        let (observer, knocked, rung) = phases();
        ports.listen(READY_PORT, knocked);
        let machine = Machine::start(shell, &entry, console.clone(), devices, observer)?;
        let guest = Self { machine, ports, console, rung };
        guest.wait_for(power::PHASE_LISTENING)?;
        Ok(guest)
    }

    /// Boots the kernel in `folder` with `program`, which is linked statically, as its only process, and `words` as its arguments.
    ///
    /// # Errors
    /// When the machine cannot be made.
    pub fn boot_program(folder: &Path, program: &Path, words: &str) -> Result<Self> {
        let shape = Shape::new(128, 1)?;
        let shell = Shell::create(&Kvm::open()?, shape)?;
        let kernel = boot::load_kernel(shell.memory(), &File::open(folder.join("vmlinux"))?)?;
        let (devices, ports) = devices();
        let initramfs = initramfs::with_init(program)?;
        let words = format!("-- {words}");
        let entry = boot::prepare(shell.memory(), &kernel, Some(&initramfs), shape, devices.len(), &words)?;
        let console = Console::new(None)?;
        let (observer, _, rung) = phases();
        let machine = Machine::start(shell, &entry, console.clone(), devices, observer)?;
        Ok(Self { machine, ports, console, rung })
    }

    /// Waits until the agent rings with `phase`; when that was.
    fn wait_for(&self, phase: u32) -> Result<Instant> {
        let end = Instant::now() + PATIENCE;
        loop {
            let (rung, at) = self
                .rung
                .recv_timeout(end - Instant::now())
                .map_err(|_| self.lost(&format!("it does not reach phase {phase}")))?;
            if rung == phase {
                return Ok(at);
            }
        }
    }

    /// Asks the agent to park, and waits until the machine stands still.
    ///
    /// # Errors
    /// When it does not.
    pub fn park(self) -> Result<Parked> {
        // The connection ends without an answer when it parks at its doorbell.
        let is_at_port = match read_reply(&mut self.ask(Call::Park(Park {}))?) {
            Ok(Outcome::Parked(_)) => true,
            Ok(other) => bail!("it does not park: {other:?}"),
            Err(_) => self.wait_for(power::PHASE_PARKED).map(|_| false)?,
        };
        let mut paused =
            self.machine.pause().map_err(|machine| anyhow!("the guest has ended: {:?}", machine.wait().0))?;
        if is_at_port {
            paused.park_at_port();
        }
        Ok(Parked { paused, ports: self.ports, console: self.console, rung: self.rung })
    }

    /// Connects to the agent.
    fn connect(&self) -> Result<UnixStream> {
        let (ours, theirs) = UnixStream::pair()?;
        ours.set_read_timeout(Some(PATIENCE))?;
        self.ports.connect(AGENT_PORT, OwnedFd::from(theirs))?;
        Ok(ours)
    }

    /// Says at the port of a guest that is parked there who it is, and when it asked and when it had become that.
    fn tell(&self, generation: Option<&Generation>) -> Result<[Instant; 2]> {
        let mut stream = self.connect()?;
        let asking =
            read_reply(&mut stream).map_err(|error| self.lost(&format!("it asks nothing: {error}")))?;
        if !matches!(asking, Outcome::Parked(_)) {
            bail!("{asking:?} where it should ask who it is");
        }
        let asked = Instant::now();
        let now = SystemTime::now().duration_since(UNIX_EPOCH)?.as_nanos() as u64;
        let mail = generation.map(|generation| Generation { realtime_ns: now, ..generation.clone() });
        let mail = mail.map(|generation| generation.encode().to_vec());
        send(&mut stream, Call::Become(Become { generation: mail }))?;
        match (read_reply(&mut stream)?, generation) {
            (Outcome::Done(_), None) => {}
            (Outcome::Became(Became { id }), Some(generation)) if id == generation.id => {}
            (other, _) => bail!("{other:?} where it should say who it is"),
        }
        Ok([asked, Instant::now()])
    }

    /// Sends a request on a connection of its own.
    fn ask(&self, call: Call) -> Result<UnixStream> {
        let mut stream = self.connect()?;
        send(&mut stream, call)?;
        Ok(stream)
    }

    /// Asks the agent who it is.
    ///
    /// # Errors
    /// When there is no answer, or not one to this question.
    pub fn hello(&self) -> Result<Welcome> {
        let reply = read_reply(&mut self.ask(Call::Hello(Hello {}))?);
        match reply.map_err(|error| self.lost(&format!("the agent does not answer: {error}")))? {
            Outcome::Welcome(welcome) => Ok(welcome),
            other => bail!("{other:?} where the agent's reply should be"),
        }
    }

    /// Pauses the guest and lets it go on: how long it took to stand still, and to run again.
    ///
    /// # Errors
    /// When it has ended.
    pub fn pause(self) -> Result<(Self, [Duration; 2])> {
        let Self { machine, ports, console, rung } = self;
        let start = Instant::now();
        let paused =
            machine.pause().map_err(|machine| anyhow!("the guest has ended: {:?}", machine.wait().0))?;
        let pause = start.elapsed();
        let start = Instant::now();
        let machine = paused.resume()?;
        Ok((Self { machine, ports, console, rung }, [pause, start.elapsed()]))
    }

    /// Saves the guest while it runs: how long it stood still, and how long all of it took.
    ///
    /// # Errors
    /// When it cannot be saved.
    pub fn save_running(self) -> Result<(Self, [Duration; 2])> {
        let Self { machine, ports, console, rung } = self;
        let memory = File::from(rustix::fs::memfd_create("memory", MemfdFlags::CLOEXEC)?);
        let start = Instant::now();
        let (machine, saved) = machine.save_running(&memory);
        let took = start.elapsed();
        let kiln_vmm::Saved::Running(machine) = machine else { bail!("the guest does not go on") };
        Ok((Self { machine, ports, console, rung }, [saved?.pause, took]))
    }

    /// Pauses the guest, saves it, and lets it go on.
    ///
    /// # Errors
    /// When it has ended, or cannot be saved.
    pub fn save(self) -> Result<(Saved, Self)> {
        let Self { machine, ports, console, rung } = self;
        let mut paused =
            machine.pause().map_err(|machine| anyhow!("the guest has ended: {:?}", machine.wait().0))?;
        let saved = Saved::of(&mut paused)?;
        let machine = paused.resume()?;
        Ok((saved, Self { machine, ports, console, rung }))
    }

    /// Waits until the guest has rung `count` times with `phase`; false when it rings with `other` before.
    ///
    /// # Errors
    /// When it does not go on, with its last words.
    pub fn hears(&self, phase: u32, count: usize, other: u32) -> Result<bool> {
        let mut heard = 0;
        while heard < count {
            let rung = self.rung.recv_timeout(PATIENCE);
            let (rung, _) = rung.map_err(|_| self.lost(&format!("it is silent after {heard} rings")))?;
            if rung == other {
                return Ok(false);
            }
            heard += usize::from(rung == phase);
        }
        Ok(true)
    }

    /// Ends the guest and has the next of `saved` wait in its machine, whatever this one has done to it; how long that took.
    ///
    /// # Errors
    /// When it has ended, or `saved` cannot be restored there.
    pub fn recycle(self, saved: &Saved) -> Result<(InWait, Duration)> {
        let start = Instant::now();
        let paused =
            self.machine.pause().map_err(|machine| anyhow!("the guest has ended: {:?}", machine.wait().0))?;
        let next = saved.wait_in(paused.into_shell()?, &saved.state()?)?;
        Ok((next, start.elapsed()))
    }

    fn lost(&self, what: &str) -> anyhow::Error {
        let console = self.console.tail(CONSOLE_TAIL_BYTES);
        anyhow!("{what}; its last words:\n{}", String::from_utf8_lossy(&console))
    }
}

impl InWait {
    /// Writes to as many pages from 16 MiB on what they have, so that they are the machine's own.
    ///
    /// # Errors
    /// When it has fewer.
    pub fn write_pages(&self, pages: u64) -> Result<()> {
        for page in 0..pages {
            let at = Gpa((16 << 20) + page * PAGE_BYTES as u64);
            let memory = self.paused.memory();
            memory.write(at, &memory.read_array::<8>(at)?)?;
        }
        Ok(())
    }

    /// Lets the guest go on as another; how long it took to acknowledge, and from there to become it.
    ///
    /// # Errors
    /// When it does not.
    pub fn claim(mut self, generation: &Generation) -> Result<(Guest, [Duration; 2])> {
        let start = Instant::now();
        self.paused.put_mail(&generation.encode())?;
        let Self { paused, ports, console, rung } = self;
        let guest = Guest { machine: paused.resume()?, ports, console, rung };
        let resumed = guest.wait_for(power::PHASE_RESUMED)?;
        let adopted = guest.wait_for(power::PHASE_ADOPTED)?;
        Ok((guest, [resumed - start, adopted - resumed]))
    }

    /// Saves the guest.
    ///
    /// # Errors
    /// When it cannot be saved.
    pub fn save(mut self) -> Result<Saved> {
        Saved::of(&mut self.paused)
    }
}

impl Parked {
    /// Saves the guest.
    ///
    /// # Errors
    /// When it cannot be saved.
    pub fn save(mut self) -> Result<Saved> {
        Saved::of(&mut self.paused)
    }

    /// Where the agent is parked.
    pub fn parking(&self) -> Parking {
        self.paused.parking()
    }

    /// Lets the guest go on as the one it was.
    ///
    /// # Errors
    /// When it does not.
    pub fn go_on(self) -> Result<Guest> {
        let Self { paused, ports, console, rung } = self;
        let is_at_port = paused.parking() == Parking::Port;
        let guest = Guest { machine: paused.resume()?, ports, console, rung };
        if is_at_port {
            guest.tell(None)?;
        }
        Ok(guest)
    }
}

impl Saved {
    fn of(paused: &mut Paused<Kvm>) -> Result<Self> {
        let start = Instant::now();
        let state = paused.save()?;
        let state_took = start.elapsed();
        let start = Instant::now();
        let memory =
            File::from(rustix::fs::memfd_create("memory", MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING)?);
        paused.memory().save(&memory)?;
        rustix::fs::fcntl_add_seals(&memory, SealFlags::WRITE | SealFlags::SHRINK | SealFlags::GROW)?;
        let memory_took = start.elapsed();
        let memory_bytes = std::os::unix::fs::MetadataExt::blocks(&memory.metadata()?) * 512;
        let mut snapshot = Vec::new();
        kiln_snapshot::write(&header(&state), &state.to_sections(), &mut snapshot)?;
        Ok(Self { snapshot, memory, parking: state.parking, state_took, memory_took, memory_bytes })
    }

    /// Writes the snapshot as this host's monitor takes it: its state and its memory, in files of `folder`.
    ///
    /// # Errors
    /// When the file system or KVM fails.
    pub fn write_to(&self, folder: &Path) -> Result<[PathBuf; 2]> {
        let (header, sections) = kiln_snapshot::read(&mut &self.snapshot[..])?;
        let cpu = kiln_vmm::cpu_class(&Kvm::open()?.supported_cpuid()?, kiln_vmm::is_pvm());
        let paths = ["state", "memory"].map(|name| folder.join(name));
        let [state, memory] = &paths;
        kiln_snapshot::write(&Header { cpu, ..header }, &sections, &mut File::create(state)?)?;
        kiln_support::sparse::copy(
            &self.memory,
            &File::options().read(true).write(true).create_new(true).open(memory)?,
        )?;
        Ok(paths)
    }

    /// A guest that goes on where this one was saved.
    ///
    /// # Errors
    /// When it cannot.
    pub fn restore(&self) -> Result<(Guest, Restored)> {
        let start = Instant::now();
        let console = Console::new(None)?;
        let (paused, ports, rung, shell_made) = self.copy(&console)?;
        let ready = Instant::now();
        let machine = paused.resume()?;
        let took = Restored { shell: shell_made - start, state: ready - shell_made, resume: ready.elapsed() };
        Ok((Guest { machine, ports, console, rung }, took))
    }

    /// A parked guest that goes on as another: with `generation` in its mail.
    ///
    /// # Errors
    /// When it cannot, or does not acknowledge.
    pub fn claim(&self, generation: &Generation) -> Result<(Guest, Claimed)> {
        let start = Instant::now();
        let console = Console::new(None)?;
        let (mut paused, ports, rung, shell_made) = self.copy(&console)?;
        let is_at_port = paused.parking() == Parking::Port;
        if !is_at_port {
            paused.put_mail(&generation.encode())?;
        }
        let ready = Instant::now();
        let machine = paused.resume()?;
        let guest = Guest { machine, ports, console, rung };
        let [resumed, adopted] = if is_at_port {
            guest.tell(Some(generation))?
        } else {
            [guest.wait_for(power::PHASE_RESUMED)?, guest.wait_for(power::PHASE_ADOPTED)?]
        };
        let took = Claimed {
            shell: shell_made - start,
            state: ready - shell_made,
            resumed: resumed - ready,
            adopted: adopted - resumed,
        };
        Ok((guest, took))
    }

    /// A parked guest that waits: restored into a machine of its own, and rehearsed.
    ///
    /// # Errors
    /// When it cannot be.
    pub fn in_wait(&self) -> Result<InWait> {
        let state = self.state()?;
        self.wait_in(Shell::create(&Kvm::open()?, state.shape)?, &state)
    }

    /// The same in a shell that there is.
    fn wait_in(&self, shell: Shell<Kvm>, state: &MachineState) -> Result<InWait> {
        let console = Console::new(None)?;
        let (mut paused, ports, rung) = self.copy_in(shell, state, &console)?;
        paused.rehearse()?;
        Ok(InWait { paused, ports, console, rung })
    }

    /// Everything of it but its memory.
    fn state(&self) -> Result<MachineState> {
        let (_, sections) = kiln_snapshot::read(&mut &self.snapshot[..])?;
        Ok(MachineState::from_sections(&sections)?)
    }

    /// In what this guest is another than `other`, apart from clocks, which run: names of parts, and addresses of pages.
    ///
    /// # Errors
    /// When one cannot be read.
    pub fn differences(&self, other: &Self) -> Result<Vec<String>> {
        let read = |saved: &Self| -> Result<(MachineState, Vec<u8>)> {
            let mut memory = Vec::new();
            (&saved.memory).seek(SeekFrom::Start(0))?;
            (&saved.memory).read_to_end(&mut memory)?;
            Ok((without_clocks(saved.state()?), memory))
        };
        let ((ours, our_memory), (theirs, their_memory)) = (read(self)?, read(other)?);
        let mut found = Vec::new();
        if ours.devices != theirs.devices {
            found.push(format!("devices: {:?} and {:?}", ours.devices, theirs.devices));
        }
        for (index, (ours, theirs)) in ours.vcpus.iter().zip(&theirs.vcpus).enumerate() {
            let parts = [
                ("registers", ours.registers == theirs.registers),
                ("system registers", ours.system_registers == theirs.system_registers),
                ("vector registers", (ours.xcr0, &ours.xsave) == (theirs.xcr0, &theirs.xsave)),
                ("local APIC", ours.local_apic == theirs.local_apic),
                ("debug registers", ours.debug_registers == theirs.debug_registers),
                ("events", (ours.run_state, ours.events) == (theirs.run_state, theirs.events)),
            ];
            let others = parts.iter().filter(|(_, same)| !same);
            found.extend(others.map(|(part, _)| format!("vCPU {index}: {part}")));
            let msrs = ours.msrs.iter().zip(&theirs.msrs).filter(|(ours, theirs)| ours != theirs);
            found.extend(msrs.map(|(ours, theirs)| format!("vCPU {index}: {ours:x?} and {theirs:x?}")));
        }
        if ours.vcpus.len() != theirs.vcpus.len() || our_memory.len() != their_memory.len() {
            found.push("another shape".into());
        }
        let pages = our_memory.chunks(PAGE_BYTES).zip(their_memory.chunks(PAGE_BYTES)).enumerate();
        let others = pages.filter(|(_, (ours, theirs))| ours != theirs);
        found.extend(others.map(|(page, _)| format!("page at {:#x}", page * PAGE_BYTES)));
        Ok(found)
    }

    /// A machine like the saved one that stands still, and when there was a shell for it.
    #[expect(clippy::type_complexity, reason = "the parts of a guest that does not run yet")]
    fn copy(
        &self,
        console: &Console,
    ) -> Result<(Paused<Kvm>, VsockPorts, mpsc::Receiver<(u32, Instant)>, Instant)> {
        let state = self.state()?;
        let shell = Shell::create(&Kvm::open()?, state.shape)?;
        let shell_made = Instant::now();
        let (paused, ports, rung) = self.copy_in(shell, &state, console)?;
        Ok((paused, ports, rung, shell_made))
    }

    /// The same in a shell that there is.
    #[expect(clippy::type_complexity, reason = "likewise")]
    fn copy_in(
        &self,
        shell: Shell<Kvm>,
        state: &MachineState,
        console: &Console,
    ) -> Result<(Paused<Kvm>, VsockPorts, mpsc::Receiver<(u32, Instant)>)> {
        shell.memory().overlay(&self.memory)?;
        let (devices, ports) = devices();
        let (observer, _, rung) = phases();
        let paused = Paused::restore(shell, state, console.clone(), devices, observer)?;
        Ok((paused, ports, rung))
    }
}

fn send(stream: &mut UnixStream, call: Call) -> Result<()> {
    let mut request = Vec::new();
    frame::append_message(&mut request, Kind::Request, &Request { call: Some(call) });
    Ok(stream.write_all(&request)?)
}

fn read_reply(stream: &mut UnixStream) -> Result<Outcome> {
    let mut header = [0; frame::HEADER_BYTES];
    stream.read_exact(&mut header)?;
    let (kind, bytes) = frame::parse_header(header)?;
    let mut reply = vec![0; bytes];
    stream.read_exact(&mut reply)?;
    let reply = (kind == Kind::Reply).then(|| Reply::decode(&reply[..])).transpose()?;
    reply.and_then(|reply| reply.outcome).context("what comes is no reply")
}

/// The state of a machine with all its clocks at 0, and with its timers neither running nor run out.
fn without_clocks(mut state: MachineState) -> MachineState {
    /// `IA32_TIME_STAMP_COUNTER`, `IA32_MPERF`, `IA32_APERF` and `IA32_TSC_DEADLINE`. Intel SDM volume 4 "Model-Specific Registers".
    const CLOCKS: [u32; 4] = [0x10, 0xe7, 0xe8, 0x6e0];
    // The local APIC: its timer's vector, its count, and the interrupts that wait, 32 in each 16 bytes. Intel SDM volume 3 §11.4.1
    // "The Local APIC Block Diagram".
    const TIMER_VECTOR: usize = 0x320;
    const TIMER_COUNT: usize = 0x390;
    const WAITING: usize = 0x200;
    state.clock_ns = 0;
    for vcpu in &mut state.vcpus {
        for msr in vcpu.msrs.iter_mut().filter(|msr| CLOCKS.contains(&msr.index)) {
            msr.value = 0;
        }
        let vector = usize::from(vcpu.local_apic[TIMER_VECTOR]);
        vcpu.local_apic[WAITING + vector / 32 * 16 + vector % 32 / 8] &= !(1 << (vector % 8));
        vcpu.local_apic[TIMER_COUNT..TIMER_COUNT + 4].fill(0);
    }
    state
}

/// Hears what phases the agent rings, and when; and when one without a doorbell knocks.
fn phases() -> (Observer, OpenStream, mpsc::Receiver<(u32, Instant)>) {
    let (sender, rung) = mpsc::channel();
    let knocks = sender.clone();
    let knocked = move || {
        let _ = knocks.send((power::PHASE_LISTENING, Instant::now()));
        Err(io::ErrorKind::ConnectionRefused.into())
    };
    let observer = move |notice| {
        if let Notice::Doorbell(phase, _) = notice {
            // Nobody may listen any more.
            let _ = sender.send((phase, Instant::now()));
        }
    };
    (Box::new(observer), Box::new(knocked), rung)
}

fn devices() -> (Vec<Box<dyn Device>>, VsockPorts) {
    let (vsock, ports) = Vsock::new(CID);
    (vec![Box::new(vsock), Box::new(Rng::new())], ports)
}

fn header(state: &MachineState) -> Header {
    Header {
        memory_bytes: u64::from(state.shape.memory_mib()) << 20,
        vcpus: state.shape.vcpus().into(),
        vmm: env!("CARGO_PKG_VERSION").into(),
        cpu: Digest::EMPTY,
        kernel: Digest::EMPTY,
        initramfs: Digest::EMPTY,
        memory: Digest::EMPTY,
    }
}
