//! The jail around the real monitor, seen from outside, and attacked from inside while its guest runs.
//!
//! An attack is a system call that is put into the monitor's mouth (`kiln_testkit::inject`). What the list of system calls forbids ends
//! the process. To see that each other layer holds by itself, the same is tried with the list out of force. They need
//! root, for only root may look into such a process.

use std::collections::BTreeSet;
use std::fs;
use std::os::unix::fs::MetadataExt as _;
use std::os::unix::process::ExitStatusExt as _;
use std::path::Path;

use kiln_control::Happened;
use kiln_testkit::inject::Hostage;
use libc::{c_int, c_long};

use crate::guest::Guest;
use crate::monitor::Monitor;

/// The namespaces there are to share with a host.
const NAMESPACES: [&str; 7] = ["cgroup", "ipc", "mnt", "net", "pid", "user", "uts"];
/// What the one guest memory of these tests has.
const MEMORY_BYTES: u64 = 64 << 20;
/// The most threads a monitor has.
const THREADS_MAX: u32 = 64;

/// A monitor whose guest runs and does nothing.
fn running() -> Monitor {
    let monitor = Monitor::start(&Guest::default().ring(2).halt().elf());
    while !matches!(monitor.event(), Happened::Ready(_)) {}
    monitor
}

fn proc(monitor: &Monitor, file: &str) -> String {
    format!("/proc/{}/{file}", monitor.id())
}

/// The thread that hears the host, which waits for orders.
fn hostage(monitor: &Monitor) -> Hostage {
    Hostage::take(monitor.id().cast_signed()).expect("a thread that waits")
}

fn hostage_without_filter(monitor: &Monitor) -> Hostage {
    Hostage::take_without_filter(monitor.id().cast_signed()).expect("a thread that waits")
}

#[test]
fn a_monitor_has_no_privileges() {
    let monitor = running();
    for task in fs::read_dir(proc(&monitor, "task")).expect("its threads") {
        let status = fs::read_to_string(task.expect("a thread").path().join("status")).expect("its status");
        let field = |name: &str| {
            let line = status.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':'));
            line.unwrap_or_else(|| panic!("{name} in {status}")).trim().to_owned()
        };
        for set in ["CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb"] {
            assert_eq!(field(set), "0000000000000000", "{set}");
        }
        assert_eq!(field("NoNewPrivs"), "1");
        assert_eq!(field("Seccomp"), "2");
        for ids in ["Uid", "Gid"] {
            assert!(!field(ids).split_whitespace().any(|id| id == "0"), "{ids} {}", field(ids));
        }
        assert_eq!(field("Groups"), "");
    }
}

#[test]
fn a_monitor_shares_no_namespace_with_its_host() {
    let monitor = running();
    for name in NAMESPACES {
        let of = |process: &str| fs::read_link(format!("/proc/{process}/ns/{name}")).expect("a namespace");
        assert_ne!(of(&monitor.id().to_string()), of("self"), "{name}");
    }
    assert_eq!(fs::read_to_string(proc(&monitor, "uid_map")).expect("a map"), "", "ids mean nothing there");
}

#[test]
fn a_monitor_has_an_empty_root_that_nobody_can_write_to() {
    let monitor = running();
    let root = proc(&monitor, "root");
    assert_eq!(fs::read_dir(&root).expect("a folder").count(), 0);
    let error = fs::write(format!("{root}/file"), "x").expect_err("read-only").kind();
    assert_eq!(error, std::io::ErrorKind::ReadOnlyFilesystem);
    let mounts = fs::read_to_string(proc(&monitor, "mountinfo")).expect("its mounts");
    assert_eq!(mounts.lines().count(), 1, "{mounts}");
}

#[test]
fn a_monitor_has_only_what_it_was_given() {
    let monitor = running();
    let mut open = BTreeSet::new();
    for fd in fs::read_dir(proc(&monitor, "fd")).expect("its descriptors") {
        let target = fs::read_link(fd.expect("a descriptor").path()).expect("a link");
        let target = target.to_string_lossy().into_owned();
        open.insert(target.split([':', '(']).next().unwrap_or_default().trim().to_owned());
    }
    let known = ["/dev/kvm", "socket", "anon_inode", "pagemap"];
    let streams = [1, 2].map(|fd| fs::read_link(format!("/proc/self/fd/{fd}")).expect("this test's output"));
    for target in &open {
        let is_known = known.iter().any(|known| target.contains(known))
            // The files of this machine, and the streams of this test, of which output may go anywhere.
            || target.starts_with("/tmp/") || target.starts_with("/dev/") || target.starts_with("pipe")
            || streams.iter().any(|stream| stream == Path::new(target));
        assert!(is_known, "{target} of {open:?}");
    }
    assert!(!fs::metadata(proc(&monitor, "environ")).is_ok_and(|_| {
        fs::read(proc(&monitor, "environ")).is_ok_and(|environment| !environment.is_empty())
    }));
    // Nobody but root looks into it.
    assert_eq!(fs::metadata(proc(&monitor, "mem")).expect("a file").uid(), 0);
}

#[test]
fn a_monitor_is_bounded() {
    let monitor = running();
    let limits = fs::read_to_string(proc(&monitor, "limits")).expect("its limits");
    let limit = |name: &str| {
        let line = limits.lines().find_map(|line| line.strip_prefix(name)).expect("a limit");
        let mut values = line.split_whitespace().map(ToOwned::to_owned);
        [(); 2].map(|()| values.next().expect("a value"))
    };
    let memory = (MEMORY_BYTES + kiln_jail::OVERHEAD_BYTES).to_string();
    assert_eq!(limit("Max data size"), [memory.clone(), memory]);
    assert_eq!(limit("Max core file size"), ["0", "0"]);
    assert_eq!(limit("Max locked memory"), ["0", "0"]);
    assert_eq!(limit("Max file size"), [MEMORY_BYTES.to_string(), MEMORY_BYTES.to_string()]);
    assert_eq!(limit("Max processes"), ["64", "64"]);
    for unbounded in ["Max address space", "Max open files"] {
        assert_ne!(limit(unbounded)[1], "unlimited", "{unbounded}");
    }
}

/// What a monitor that was taken over would try, and no monitor needs.
const FORBIDDEN: &[(&str, c_long, &[u64])] = &[
    ("open a file", libc::SYS_openat, &[AT_FDCWD, 0, 0]),
    ("open a file the old way", libc::SYS_open, &[]),
    ("make a socket", libc::SYS_socket, &[libc::AF_INET as u64, libc::SOCK_STREAM as u64, 0]),
    ("make a local socket", libc::SYS_socket, &[libc::AF_UNIX as u64, libc::SOCK_STREAM as u64, 0]),
    ("connect a socket", libc::SYS_connect, &[0]),
    ("kill everybody", libc::SYS_kill, &[u64::MAX, libc::SIGKILL as u64]),
    ("signal another thread group", libc::SYS_tgkill, &[2, 2, libc::SIGKILL as u64]),
    ("kill itself by a thread's signal", libc::SYS_tgkill, &[1, 1, libc::SIGKILL as u64]),
    ("trace its parent", libc::SYS_ptrace, &[libc::PTRACE_ATTACH as u64, 1]),
    ("read another's memory", libc::SYS_process_vm_readv, &[1]),
    ("fork", libc::SYS_fork, &[]),
    ("fork with shared memory", libc::SYS_vfork, &[]),
    ("clone a process", libc::SYS_clone, &[libc::SIGCHLD as u64]),
    ("clone into namespaces", libc::SYS_clone, &[(libc::CLONE_NEWUSER | libc::SIGCHLD) as u64]),
    ("execute a program", libc::SYS_execve, &[]),
    ("execute a file it holds", libc::SYS_execveat, &[0, 0, 0, 0, libc::AT_EMPTY_PATH as u64]),
    ("mount", libc::SYS_mount, &[]),
    ("change its root", libc::SYS_pivot_root, &[]),
    ("unshare", libc::SYS_unshare, &[libc::CLONE_NEWUSER as u64]),
    ("enter a namespace", libc::SYS_setns, &[]),
    ("become root", libc::SYS_setuid, &[0]),
    ("take capabilities", libc::SYS_capset, &[]),
    (
        "make memory executable",
        libc::SYS_mprotect,
        &[0x10000, 4096, (libc::PROT_READ | libc::PROT_EXEC) as u64],
    ),
    ("map executable memory", libc::SYS_mmap, &[0, 4096, EXECUTABLE, PRIVATE, u64::MAX, 0]),
    ("map memory past its bounds", libc::SYS_mmap, &[0, 4096, 3, SHARED, u64::MAX, 0]),
    ("make memory executable by a key", libc::SYS_pkey_mprotect, &[]),
    ("load a program into the kernel", libc::SYS_bpf, &[]),
    ("queue system calls", libc::SYS_io_uring_setup, &[8, 0]),
    ("stop the kernel at a page", libc::SYS_userfaultfd, &[0]),
    ("count events", libc::SYS_perf_event_open, &[]),
    ("use the kernel's keys", libc::SYS_keyctl, &[]),
    ("add a key", libc::SYS_add_key, &[]),
    ("load a module", libc::SYS_finit_module, &[]),
    ("reboot", libc::SYS_reboot, &[]),
    ("see the host's name", libc::SYS_uname, &[]),
    ("make a file in memory", libc::SYS_memfd_create, &[]),
    ("use shared memory", libc::SYS_shmget, &[]),
    ("take another's descriptor", libc::SYS_pidfd_getfd, &[]),
    ("let others look into it", libc::SYS_prctl, &[libc::PR_SET_DUMPABLE as u64, 1]),
    ("handle its own violations", libc::SYS_rt_sigaction, &[libc::SIGSYS as u64]),
    ("another filter", libc::SYS_seccomp, &[]),
    ("more descriptors", libc::SYS_prlimit64, &[0, libc::RLIMIT_NOFILE as u64]),
    ("another's limits", libc::SYS_prlimit64, &[2, libc::RLIMIT_AS as u64]),
    ("type into the terminal", libc::SYS_ioctl, &[0, libc::TIOCSTI]),
    ("a request that no monitor makes", libc::SYS_ioctl, &[0, 0xae03]),
];
const AT_FDCWD: u64 = libc::AT_FDCWD as u64;
const EXECUTABLE: u64 = (libc::PROT_READ | libc::PROT_WRITE | libc::PROT_EXEC) as u64;
const PRIVATE: u64 = (libc::MAP_PRIVATE | libc::MAP_ANONYMOUS) as u64;
const SHARED: u64 = (libc::MAP_SHARED | libc::MAP_ANONYMOUS) as u64;

/// How a monitor ends that makes a system call.
fn end_by(hostage: Hostage, monitor: Monitor, call: c_long, arguments: &[u64]) -> Option<c_int> {
    hostage.leave_with(call, arguments).expect("it is there");
    monitor.exit().signal()
}

#[test]
fn what_no_monitor_needs_ends_it() {
    for (what, call, arguments) in FORBIDDEN {
        let monitor = running();
        assert_eq!(end_by(hostage(&monitor), monitor, *call, arguments), Some(libc::SIGSYS), "{what}");
    }
}

/// Also when it is ready for it: nothing in the process can put off its end.
#[test]
fn a_violation_cannot_be_blocked() {
    let monitor = running();
    let hostage = hostage(&monitor);
    let all = hostage.put(&u64::MAX.to_ne_bytes()).expect("room");
    let blocked = hostage.call(libc::SYS_rt_sigprocmask, &[libc::SIG_BLOCK as u64, all, 0, 8]);
    assert_eq!(blocked.expect("it is there"), 0);
    assert_eq!(end_by(hostage, monitor, libc::SYS_getppid, &[]), Some(libc::SIGSYS));
}

#[test]
fn a_monitor_gets_no_more_memory_than_its_bound() {
    let monitor = running();
    let hostage = hostage(&monitor);
    let map = |bytes: u64| hostage.call(libc::SYS_mmap, &[0, bytes, 3, PRIVATE, u64::MAX, 0]).expect("there");
    assert!(map(kiln_jail::OVERHEAD_BYTES) == -i64::from(libc::ENOMEM));
    assert!(map(1 << 20) != -i64::from(libc::ENOMEM));
    // By the piece neither.
    let mut got = 0;
    while got <= kiln_jail::OVERHEAD_BYTES && map(4 << 20) != -i64::from(libc::ENOMEM) {
        got += 4 << 20;
    }
    assert!(got < kiln_jail::OVERHEAD_BYTES, "{got}");
}

#[test]
fn limits_are_not_raised() {
    let monitor = running();
    let hostage = hostage(&monitor);
    let limit = [u64::MAX; 2].map(u64::to_ne_bytes).concat();
    let limit = hostage.put(&limit).expect("room");
    for resource in [libc::RLIMIT_AS, libc::RLIMIT_DATA, libc::RLIMIT_FSIZE] {
        let raised = hostage.call(libc::SYS_prlimit64, &[0, resource.into(), limit, 0]).expect("there");
        assert!(raised == -i64::from(libc::EPERM), "{resource}: {raised}");
    }
}

fn refused(hostage: &Hostage, call: c_long, arguments: &[u64], errno: c_int) {
    let answer = hostage.call(call, arguments).expect("it is there");
    assert!(answer == -i64::from(errno), "call {call} {arguments:?}: {answer}");
}

fn socket(hostage: &Hostage, family: c_int, kind: c_int) -> u64 {
    match hostage.call(libc::SYS_socket, &[family as u64, kind as u64, 0]).expect("it is there") {
        socket @ 0.. => socket.cast_unsigned(),
        error => panic!("no socket: {error}"),
    }
}

/// Landlock denies a folder that is there, and a port that nobody has.
#[test]
fn without_the_filter_there_is_still_landlock() {
    let monitor = running();
    let hostage = hostage_without_filter(&monitor);
    let root = hostage.put(b"/\0").expect("room");
    refused(&hostage, libc::SYS_openat, &[AT_FDCWD, root, libc::O_RDONLY as u64, 0], libc::EACCES);
    let socket = socket(&hostage, libc::AF_INET, libc::SOCK_STREAM);
    let any =
        hostage.put(&[libc::AF_INET as u8, 0, 0x30, 0x39, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0]).expect("room");
    refused(&hostage, libc::SYS_bind, &[socket, any, 16], libc::EACCES);
    refused(&hostage, libc::SYS_connect, &[socket, any, 16], libc::EACCES);
}

/// Namespaces: the host's files, processes, sockets, names and network are not there.
#[test]
fn without_the_filter_there_are_still_namespaces() {
    let listener = {
        use std::os::linux::net::SocketAddrExt as _;
        let name = std::os::unix::net::SocketAddr::from_abstract_name(b"kiln-attack").expect("a name");
        std::os::unix::net::UnixListener::bind_addr(&name).expect("a listener")
    };
    let monitor = running();
    let hostage = hostage_without_filter(&monitor);
    for path in ["/etc/passwd\0", "/proc/1/environ\0", "/proc/self/mem\0", "/dev/kvm\0"] {
        let path = hostage.put(path.as_bytes()).expect("room");
        refused(&hostage, libc::SYS_openat, &[AT_FDCWD, path, 0, 0], libc::ENOENT);
    }
    // Its host, and itself as its host sees it, unless the number may be one of its own threads', which count from 1.
    for process in [std::process::id(), monitor.id()].into_iter().filter(|id| *id > THREADS_MAX) {
        refused(&hostage, libc::SYS_kill, &[process.into(), 0], libc::ESRCH);
        let seize = [libc::PTRACE_SEIZE.into(), process.into(), 0, 0];
        refused(&hostage, libc::SYS_ptrace, &seize, libc::ESRCH);
    }
    assert_eq!(hostage.call(libc::SYS_getppid, &[]).expect("there"), 0, "it sees its parent");

    let unix = socket(&hostage, libc::AF_UNIX, libc::SOCK_STREAM);
    let mut address = vec![libc::AF_UNIX as u8, 0, 0];
    address.extend(b"kiln-attack");
    let at = hostage.put(&address).expect("room");
    let length = address.len() as u64;
    refused(&hostage, libc::SYS_connect, &[unix, at, length], libc::ECONNREFUSED);
    drop(listener);

    let udp = socket(&hostage, libc::AF_INET, libc::SOCK_DGRAM);
    let host =
        hostage.put(&[libc::AF_INET as u8, 0, 0, 53, 127, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0, 0]).expect("room");
    refused(&hostage, libc::SYS_connect, &[udp, host, 16], libc::ENETUNREACH);

    let names = hostage.put(&[b'x'; 6 * 65]).expect("room");
    assert_eq!(hostage.call(libc::SYS_uname, &[names]).expect("there"), 0);
    let mut node = [b'x'; 1];
    hostage.get(65, &mut node).expect("the name of the host");
    assert_eq!(node, [0]);
}

/// No capability: neither over the host nor over the namespaces that are the monitor's own.
#[test]
fn without_the_filter_there_are_still_no_capabilities() {
    let monitor = running();
    let hostage = hostage_without_filter(&monitor);
    let name = hostage.put(b"x\0").expect("room");
    refused(&hostage, libc::SYS_sethostname, &[name, 1], libc::EPERM);
    refused(&hostage, libc::SYS_chroot, &[name], libc::ENOENT);
    refused(&hostage, libc::SYS_setns, &[0, 0], libc::EINVAL);
    refused(&hostage, libc::SYS_unshare, &[libc::CLONE_NEWNS as u64], libc::EPERM);
    refused(&hostage, libc::SYS_setuid, &[0], libc::EINVAL);
    let raise = [u64::MAX; 2].map(u64::to_ne_bytes).concat();
    let raise = hostage.put(&raise).expect("room");
    refused(&hostage, libc::SYS_prlimit64, &[0, libc::RLIMIT_NPROC.into(), raise, 0], libc::EPERM);
    let header = hostage
        .put(
            &[0x2008_0522_u32, 0, u32::MAX, u32::MAX, 0, u32::MAX, u32::MAX, 0]
                .map(u32::to_ne_bytes)
                .concat(),
        )
        .expect("room");
    refused(&hostage, libc::SYS_capset, &[header, header + 8], libc::EPERM);
    let tmpfs = hostage.put(b"tmpfs\0/\0").expect("room");
    refused(&hostage, libc::SYS_mount, &[tmpfs, tmpfs + 6, tmpfs, 0, 0], libc::EPERM);
}

#[test]
fn the_host_is_told_which_call_ended_a_monitor() {
    let (mut reading, stderr) = std::io::pipe().expect("a pipe");
    let monitor = Monitor::running_with_stderr(&Guest::default().ring(2).halt().elf(), stderr.into());
    assert_eq!(end_by(hostage(&monitor), monitor, libc::SYS_getppid, &[]), Some(libc::SIGSYS));
    let mut said = String::new();
    std::io::Read::read_to_string(&mut reading, &mut said).expect("text");
    assert_eq!(said, format!("killed by its own filter: system call {}\n", libc::SYS_getppid));
}
