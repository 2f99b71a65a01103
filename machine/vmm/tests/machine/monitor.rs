//! The monitor program: one process, one machine, one channel.

use std::fs::{File, OpenOptions};
use std::io::Read;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::Path;
use std::process::{Command, ExitStatus};
use std::time::Duration;

use kiln_control::{
    Blame, Channel, ChannelError, Command as Order, Connect, Disk, Do, EndReason, Ended, Event, Extent,
    Failed, Files, Happened, Start, Stop,
};
use kiln_jail::{Child, Launch, Program, SpawnError};
use kiln_testkit::copy_program;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::net::{AddressFamily, SocketFlags, SocketType, socketpair};

use crate::guest::{Guest, file};

const PROGRAM: &str = env!("CARGO_BIN_EXE_kiln-monitor");

/// A monitor process and the host's end of its channel.
pub(crate) struct Monitor {
    child: Child,
    channel: Channel,
}

impl Monitor {
    pub(crate) fn spawn() -> Self {
        Self::spawn_with(std::io::stderr().as_fd())
    }

    fn spawn_with(stderr: BorrowedFd<'_>) -> Self {
        let (ours, theirs) =
            socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None)
                .expect("a pair");
        // One that a program which is executed would inherit, as careless hosts have them.
        let _leaked = rustix::io::dup(File::open(PROGRAM).expect("the program")).expect("a descriptor");
        let child = jailed(&[], theirs.as_fd(), std::io::stdout().as_fd(), stderr);
        Self { child, channel: Channel::new(ours) }
    }

    pub(crate) fn start(kernel: &[u8]) -> Self {
        let monitor = Self::spawn();
        monitor.order(Do::Start(start()), &[file(kernel), file(b"an archive")]);
        monitor
    }

    /// One whose guest says that it is ready, and what it says itself goes to `stderr`.
    pub(crate) fn running_with_stderr(kernel: &[u8], stderr: OwnedFd) -> Self {
        let monitor = Self::spawn_with(stderr.as_fd());
        // It is the monitor's alone, so that it reads to its end when that has ended.
        drop(stderr);
        monitor.order(Do::Start(start()), &[file(kernel), file(b"an archive")]);
        while !matches!(monitor.event(), Happened::Ready(_)) {}
        monitor
    }

    pub(crate) fn order(&self, order: Do, files: &[impl AsFd]) {
        let files: Vec<BorrowedFd<'_>> = files.iter().map(AsFd::as_fd).collect();
        self.channel.send(&Order { call: Some(order) }, &files).expect("the monitor listens");
    }

    pub(crate) fn event(&self) -> Happened {
        let (event, _) = self.channel.receive::<Event>().expect("an event");
        event.happened.expect("a known event")
    }

    pub(crate) fn ended(&self) -> Ended {
        loop {
            if let Happened::Ended(ended) = self.event() {
                return ended;
            }
        }
    }

    pub(crate) fn failed(&self) -> Failed {
        let Happened::Failed(failed) = self.event() else { panic!("a failure") };
        failed
    }

    pub(crate) fn id(&self) -> u32 {
        self.child.id()
    }

    /// How it exits although its host is gone; `None` when it has not in that time.
    pub(crate) fn exit_alone(self, limit: Duration) -> Option<ExitStatus> {
        drop(self.channel);
        let limit = Timespec::try_from(limit).expect("a short time");
        let mut ended = [PollFd::new(&self.child, PollFlags::IN)];
        if poll(&mut ended, Some(&limit)).expect("it is polled") == 0 {
            self.child.kill().expect("it is ours");
        }
        let is_ended = !ended[0].revents().is_empty();
        let status = self.child.wait().expect("it exits");
        is_ended.then_some(status)
    }

    pub(crate) fn exit(self) -> ExitStatus {
        drop(self.channel);
        self.child.wait().expect("it exits")
    }
}

/// The program as its host starts it.
fn jailed(
    arguments: &[&str],
    stdin: BorrowedFd<'_>,
    stdout: BorrowedFd<'_>,
    stderr: BorrowedFd<'_>,
) -> Child {
    jailed_from(Program::Path(Path::new(PROGRAM)), arguments, stdin, stdout, stderr)
}

fn jailed_from(
    program: Program<'_>,
    arguments: &[&str],
    stdin: BorrowedFd<'_>,
    stdout: BorrowedFd<'_>,
    stderr: BorrowedFd<'_>,
) -> Child {
    let device = OpenOptions::new().read(true).write(true).open("/dev/kvm");
    let device = device.expect("these tests need KVM: a readable and writable /dev/kvm");
    let args: Vec<&str> = ["kiln-monitor"].into_iter().chain(arguments.iter().copied()).collect();
    let fds = [stdin, stdout, stderr, device.as_fd()];
    kiln_jail::spawn(&Launch { program, args: &args, fds: &fds, cgroup: None }).expect("a process")
}

fn start() -> Start {
    Start { memory_mib: 64, vcpus: 1, kernel_fd: 0, initramfs_fd: 1, cid: 3, ..Start::default() }
}

pub(crate) fn no_files() -> [OwnedFd; 0] {
    []
}

#[test]
fn a_machine_boots_gets_ready_and_ends() {
    let monitor = Monitor::start(&Guest::default().ring(1).ring(2).ring(2).power_off(0).elf());
    let Happened::Booted(booted) = monitor.event() else { panic!("booted first") };
    let Happened::Ready(ready) = monitor.event() else { panic!("then ready") };
    let Happened::Ended(ended) = monitor.event() else { panic!("then, after one ready, ended") };
    assert!(booted.spawned_ns <= booted.entered_ns);
    assert!(booted.entered_ns <= ready.agent_started_ns);
    assert!(ready.agent_started_ns <= ready.ready_ns);
    assert_eq!(ended.reason(), EndReason::PowerOff);
    assert!(ended.console.is_empty());
    assert!(matches!(monitor.channel.receive::<Event>(), Err(ChannelError::Closed)));
    assert!(monitor.exit().success());
}

#[test]
fn a_panic_comes_with_the_last_console_lines() {
    let guest = Guest::default().say("Kernel panic - not syncing: it hurts").out(0x64, 0xfe).halt();
    let monitor = Monitor::start(&guest.elf());
    let ended = monitor.ended();
    assert_eq!(ended.reason(), EndReason::Panic);
    assert_eq!(ended.console, b"Kernel panic - not syncing: it hurts");
}

#[test]
fn the_console_is_copied_to_the_hosts_descriptor() {
    let (mut reader, writer) = std::io::pipe().expect("a pipe");
    let monitor = Monitor::spawn();
    let guest = Guest::default().say("for the host").power_off(0);
    let files: [OwnedFd; 3] = [file(&guest.elf()).into(), file(b"").into(), writer.into()];
    monitor.order(Do::Start(Start { console_fd: Some(2), ..start() }), &files);
    drop(files);
    assert_eq!(monitor.ended().reason(), EndReason::PowerOff);
    assert!(monitor.exit().success());
    let mut text = String::new();
    reader.read_to_string(&mut text).expect("text");
    assert_eq!(text, "for the host");
}

#[test]
fn a_stop_ends_a_guest_that_does_nothing() {
    for guest in [Guest::default().ring(2).halt(), Guest::default().ring(2).code(&[0xeb, 0xfe])] {
        let monitor = Monitor::start(&guest.elf());
        while !matches!(monitor.event(), Happened::Ready(_)) {}
        monitor.order(Do::Stop(Stop {}), &no_files());
        assert_eq!(monitor.ended().reason(), EndReason::Stopped);
        assert!(monitor.exit().success());
    }
}

#[test]
fn a_monitor_does_not_outlive_its_host() {
    // Before it got a command, and while its guest runs.
    assert!(Monitor::spawn().exit().success());
    let monitor = Monitor::start(&Guest::default().ring(2).code(&[0xeb, 0xfe]).elf());
    while !matches!(monitor.event(), Happened::Ready(_)) {}
    assert!(monitor.exit().success());
}

#[test]
fn a_bad_kernel_is_the_callers_fault() {
    let monitor = Monitor::start(b"not a kernel");
    let failed = monitor.failed();
    assert_eq!(failed.blame(), Blame::Caller);
    assert!(failed.message.contains("neither an ELF file nor a bzImage"), "{failed:?}");
    assert!(failed.hint.contains("vmlinux"), "{failed:?}");
    assert!(monitor.exit().success());
}

#[test]
fn impossible_machines_are_refused_before_anything_is_made() {
    let kernel = Guest::default().power_off(0).elf();
    let disk = |disk: Disk| Start { disks: vec![disk], ..start() };
    let extent = Extent { fd: 0, offset: 0, length: 4096, digests_fd: None };
    let cases = [
        (Start { memory_mib: 63, ..start() }, Blame::Caller, "63 MiB"),
        (Start { memory_mib: u32::MAX, ..start() }, Blame::Caller, "MiB of guest memory"),
        (Start { vcpus: 0, ..start() }, Blame::Caller, "0 vCPUs"),
        (Start { vcpus: 17, ..start() }, Blame::Caller, "17 vCPUs"),
        (Start { cmdline: "x".repeat(4000), ..start() }, Blame::Caller, "command line"),
        (Start { cid: 2, ..start() }, Blame::Kiln, "context id"),
        (Start { kernel_fd: 9, ..start() }, Blame::Kiln, "descriptor 9"),
        (Start { console_fd: Some(2), ..start() }, Blame::Kiln, "descriptor 2"),
        (Start { disks: vec![Disk::default(); 18], ..start() }, Blame::Caller, "18 disks"),
        (disk(Disk::default()), Blame::Kiln, "disk 0"),
        (disk(Disk { extents: vec![extent.clone(); 2], ..Disk::default() }), Blame::Kiln, "disk 0"),
        (
            disk(Disk { extents: vec![extent.clone()], serial: "x".repeat(21), ..Disk::default() }),
            Blame::Kiln,
            "serial",
        ),
        (
            disk(Disk {
                read_only: true,
                extents: vec![Extent { digests_fd: Some(1), ..extent }],
                ..Disk::default()
            }),
            Blame::Kiln,
            "digests",
        ),
    ];
    for (start, blame, part) in cases {
        let monitor = Monitor::spawn();
        monitor.order(Do::Start(start), &[file(&kernel), file(b"an archive")]);
        let failed = monitor.failed();
        assert!(failed.message.contains(part), "{part}: {failed:?}");
        assert_eq!(failed.blame(), blame, "{failed:?}");
        assert!(monitor.exit().success());
    }
}

/// More files than a packet carries: those in packets of their own are counted first.
#[test]
fn a_disk_may_have_more_files_than_fit_beside_one_packet() {
    const FILES: u32 = 260;
    let mut files = vec![file(&Guest::default().power_off(0).elf()), file(b"an archive")];
    files.resize_with(FILES as usize, || file(&[7; 4096]));
    let extents = (2..FILES).map(|fd| Extent { fd, offset: 0, length: 4096, digests_fd: None }).collect();
    let disk = Disk { read_only: true, extents, ..Disk::default() };
    let monitor = Monitor::spawn();
    monitor.order(Do::Files(Files {}), &files[..100]);
    monitor.order(Do::Files(Files {}), &files[100..200]);
    monitor.order(Do::Start(Start { disks: vec![disk], ..start() }), &files[200..]);
    assert_eq!(monitor.ended().reason(), EndReason::PowerOff);
}

#[test]
fn a_monitor_takes_no_more_files_than_a_machine_is_made_of() {
    let monitor = Monitor::spawn();
    let files: Vec<_> = (0..240).map(|_| file(b"")).collect();
    monitor.order(Do::Files(Files {}), &files);
    monitor.order(Do::Files(Files {}), &files);
    assert!(!monitor.exit().success());
}

#[test]
fn a_command_out_of_place_ends_the_monitor() {
    let monitor = Monitor::spawn();
    monitor.order(Do::Stop(Stop {}), &no_files());
    assert!(matches!(monitor.channel.receive::<Event>(), Err(ChannelError::Closed)));
    assert_eq!(monitor.exit().code(), Some(125));

    let monitor = Monitor::start(&Guest::default().ring(2).halt().elf());
    while !matches!(monitor.event(), Happened::Ready(_)) {}
    monitor.order(Do::Start(start()), &[file(b""), file(b"")]);
    assert!(matches!(monitor.channel.receive::<Event>(), Err(ChannelError::Closed)));
    assert_eq!(monitor.exit().code(), Some(125));
}

#[test]
fn a_connection_the_guest_cannot_take_is_closed() {
    let monitor = Monitor::start(&Guest::default().ring(2).halt().elf());
    while !matches!(monitor.event(), Happened::Ready(_)) {}
    let (ours, theirs) = std::os::unix::net::UnixStream::pair().expect("a pair");
    monitor.order(Do::Connect(Connect { port: 1024 }), &[theirs]);
    monitor.order(Do::Stop(Stop {}), &no_files());
    assert_eq!(monitor.ended().reason(), EndReason::Stopped);
    assert!(monitor.exit().success());
    let mut ours = ours;
    assert_eq!(ours.read(&mut [0]).expect("the end of the stream"), 0);
}

#[test]
fn the_monitor_keeps_no_descriptor_it_was_not_given() {
    let monitor = Monitor::start(&Guest::default().ring(2).halt().elf());
    while !matches!(monitor.event(), Happened::Ready(_)) {}
    let open: Vec<String> = std::fs::read_dir(format!("/proc/{}/fd", monitor.child.id()))
        .expect("its descriptors")
        .filter_map(|entry| std::fs::read_link(entry.expect("an entry").path()).ok())
        .map(|target| target.to_string_lossy().into_owned())
        .collect();
    assert!(!open.iter().any(|target| target == PROGRAM), "{open:?}");
    assert_eq!(open.iter().filter(|target| target.starts_with("socket:")).count(), 1, "{open:?}");
    assert!(monitor.exit().success());
}

#[test]
fn the_probe_says_that_this_host_can_make_a_machine() {
    probe(Program::Path(Path::new(PROGRAM)));
}

#[test]
fn a_program_without_a_name_is_executed_by_its_descriptor() {
    let folder = tempfile::tempdir().expect("a folder");
    let path = folder.path().join("monitor");
    copy_program(Path::new(PROGRAM), &path).expect("a copy");
    let program = File::open(&path).expect("the copy");
    std::fs::remove_file(&path).expect("its name is gone");
    probe(Program::File(program.as_fd()));
}

#[test]
fn a_descriptor_that_is_no_program_is_not_executed() {
    let text = file(b"text");
    let null = File::open("/dev/null").expect("/dev/null");
    let launch = Launch {
        program: Program::File(text.as_fd()),
        args: &["kiln-monitor"],
        fds: &[null.as_fd()],
        cgroup: None,
    };
    let error = kiln_jail::spawn(&launch).expect_err("no program");
    assert!(matches!(error, SpawnError::Execute(_)), "{error:?}");
}

#[track_caller]
fn probe(program: Program<'_>) {
    let (mut reading, stdout) = std::io::pipe().expect("a pipe");
    let (stdin, stderr) = (std::io::stdin(), std::io::stderr());
    let child = jailed_from(program, &["--probe"], stdin.as_fd(), stdout.as_fd(), stderr.as_fd());
    drop(stdout);
    let mut text = String::new();
    reading.read_to_string(&mut text).expect("text");
    assert!(child.wait().expect("it exits").success(), "{text}");
    for line in ["jail=ok", "kvm.open=ok", "kvm.api_version=12", "kvm.create_vm=ok"] {
        assert!(text.lines().any(|have| have == line), "{line} in {text}");
    }
    assert!(!text.contains("kvm.missing"), "{text}");
}

#[test]
fn without_a_channel_the_program_says_so() {
    let null = File::open("/dev/null").expect("/dev/null");
    let (mut reading, stderr) = std::io::pipe().expect("a pipe");
    let fds = [null.as_fd(), null.as_fd(), stderr.as_fd(), null.as_fd()];
    let launch = Launch {
        program: Program::Path(Path::new(PROGRAM)),
        args: &["kiln-monitor"],
        fds: &fds,
        cgroup: None,
    };
    let child = kiln_jail::spawn(&launch).expect("a process");
    drop(stderr);
    let mut text = String::new();
    reading.read_to_string(&mut text).expect("text");
    assert_eq!(child.wait().expect("it exits").code(), Some(125));
    assert!(text.contains("no control channel"), "{text}");
}

#[test]
fn a_monitor_that_was_not_started_into_a_jail_does_not_run() {
    let output = Command::new(PROGRAM).output().expect("it runs");
    assert_eq!(output.status.code(), Some(125));
    assert!(String::from_utf8_lossy(&output.stderr).contains("cannot enter the jail"));
}
