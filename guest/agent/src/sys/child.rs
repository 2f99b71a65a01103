//! Starting and reaping children.
//!
//! A child shares the agent's memory, and the agent waits, until the child executes its program or gives up
//! (`CLONE_VM | CLONE_VFORK`, clone(2)). So starting a command copies no page table and leaves no page to be copied
//! later, and a failure is reported by writing it where the agent looks: nothing can lose it. Between clone and exec
//! the child makes system calls only, with arguments the agent prepared: it allocates nothing and takes no lock.
//!
//! In that time it is already in the commands' namespace, with the agent's memory and files. Nobody there can look into
//! it: the agent is not dumpable, and the child has capabilities no command has, or none any more and a memory that is
//! not dumpable (ptrace(2), "Ptrace access mode checking"). A command of root can signal it. To kill it ends one start;
//! to stop it (SIGSTOP) holds up the agent, which is to deny oneself the service.

use alloc::boxed::Box;
use alloc::ffi::CString;
use alloc::vec::Vec;
use core::ffi::{CStr, c_char, c_void};
use core::ptr::{null, null_mut};

use rustix::fd::{AsRawFd as _, BorrowedFd, FromRawFd, OwnedFd};
use rustix::fs::{Gid, Uid};
use rustix::io::Errno;
use rustix::process::Pid;

use super::arch::{self, CloneArguments, syscall};

const CLONE_VM: u64 = 0x100;
const CLONE_PIDFD: u64 = 0x1000;
const CLONE_NEWCGROUP: usize = 0x200_0000;
const CLONE_VFORK: u64 = 0x4000;
const CLONE_NEWPID: u64 = 0x2000_0000;
const CLONE_INTO_CGROUP: u64 = 0x2_0000_0000;
const SIGTERM: usize = 15;
const SIGCHLD: usize = 17;

/// The signal that has a reaper end once it has no child left. It has no other meaning to a virtual machine.
pub const END_WITH_ORPHANS: u32 = 30;
/// The signal that has a reaper send all others the one that comes with it as its value. The kernel queues these
/// (signal(7), "Real-time signals"), so that none is lost on another.
const SEND_ALL: u32 = 34;
/// What a reaper acts on, as a signal set: SIGTERM, which it hands on to all, [`END_WITH_ORPHANS`] and [`SEND_ALL`]. Of
/// several the kernel delivers the smaller first.
static ORDERS: u64 = 1 << (SIGTERM - 1) | 1 << (END_WITH_ORPHANS - 1) | 1 << (SEND_ALL - 1);
/// Where these are in `siginfo_t`, which is 32 words of 32 bits: `si_code`, `si_pid` and `si_value`.
const CODE: usize = 2;
const SENDER: usize = 4;
const VALUE: usize = 6;
/// `si_code` of kill(2) and of sigqueue(3).
const SI_USER: u32 = 0;
const SI_QUEUE: u32 = u32::MAX;
const SET_BYTES: usize = size_of::<u64>();

/// What a child's stack may take between clone and exec: a few frames and a copy of a path.
const STACK_BYTES: usize = 32 << 10;

/// A command made ready to start: nothing is left to look up or to allocate.
pub struct Start<'a> {
    /// stdin, stdout and stderr; none of them may be 0, 1 or 2 itself.
    pub stdio: [BorrowedFd<'a>; 3],
    /// stdin is a terminal, which becomes the session's own.
    pub terminal: bool,
    /// Run first, as the child, in its namespace.
    pub prepare: Option<fn() -> Result<(), Errno>>,
    /// The control group it is born in, which must not be frozen, and which is the root of all groups to it; without one, the agent's
    /// own.
    pub control_group: Option<BorrowedFd<'a>>,
    /// All its groups.
    pub groups: &'a [Gid],
    /// The group it runs as.
    pub gid: Gid,
    /// The user it runs as.
    pub uid: Uid,
    /// Where it runs.
    pub directory: &'a CStr,
    /// The files to try, in order.
    pub programs: &'a [CString],
    /// Its arguments, the name first.
    pub arguments: &'a [CString],
    /// Its environment.
    pub environment: &'a [CString],
}

/// What a child was doing when it failed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stage {
    /// The child could not be made.
    Clone,
    /// [`Start::prepare`].
    Prepare,
    /// Its session, terminal and streams.
    Streams,
    /// Its working directory.
    Directory,
    /// Its user and groups.
    Identity,
    /// Its program.
    Exec,
}

/// Why a command did not start.
pub type Failure = (Stage, Errno);

/// A child that has not been reaped.
pub struct Child {
    /// Its id as the agent sees it; the id of its process group and session too.
    pub pid: Pid,
    /// Its id in its own namespace.
    pub inner_pid: u32,
    /// Readable when it has ended.
    pub pidfd: OwnedFd,
}

/// How a child ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Ended {
    /// Its exit code, when it exited by itself.
    pub code: u8,
    /// The signal that ended it, or 0.
    pub signal: u8,
    /// The most memory it, or a child it waited for, had resident, in KiB.
    pub peak_rss_kib: u64,
}

struct Context<'a> {
    start: &'a Start<'a>,
    argv: Vec<*const c_char>,
    envp: Vec<*const c_char>,
    /// What the child reports.
    inner_pid: u32,
    failure: Option<Failure>,
}

/// Starts a command; returns once it executes its program.
///
/// With `new_namespace` it becomes process 1 of a PID namespace of its own, otherwise of the one the agent's children
/// go to.
///
/// # Errors
/// What failed and how; the child is gone then.
pub fn start(start: &Start<'_>, new_namespace: bool) -> Result<Child, Failure> {
    let mut context = Context {
        start,
        argv: pointers(start.arguments),
        envp: pointers(start.environment),
        inner_pid: 0,
        failure: None,
    };
    let namespace = if new_namespace { CLONE_NEWPID } else { 0 };
    let flags = CLONE_VM | CLONE_VFORK | namespace;
    let mut child = clone(flags, start.control_group, run_command, (&raw mut context).cast())
        .map_err(|error| (Stage::Clone, error))?;
    match context.failure {
        None => {
            child.inner_pid = context.inner_pid;
            Ok(child)
        }
        Some(failure) => {
            // It exits at once; its status says nothing that `failure` does not.
            let _ = reap(child.pid, true);
            Err(failure)
        }
    }
}

/// Starts process 1 of a new PID namespace: it collects the orphans there, hands SIGTERM on to all when the agent sends
/// it, and ends with the last orphan when the agent sends [`END_WITH_ORPHANS`].
///
/// # Errors
/// What clone(2) reports.
pub fn start_reaper() -> Result<Child, Errno> {
    const SIG_BLOCK: usize = 0;
    const SIG_SETMASK: usize = 2;
    let mut mask = 0_u64;
    let orders = (&raw const ORDERS).expose_provenance();
    // It is born with its orders blocked: until it waits for them they wait for it, while to a process 1 that has set up nothing they
    // would be lost.
    // SAFETY: the kernel reads one signal set and writes another.
    unsafe {
        syscall(arch::RT_SIGPROCMASK, [SIG_BLOCK, orders, (&raw mut mask).expose_provenance(), SET_BYTES, 0])
    }?;
    let reaper = clone(CLONE_NEWPID, None, run_reaper, null_mut());
    let mask = (&raw const mask).expose_provenance();
    // SAFETY: the kernel reads a signal set. That does not fail.
    let _ = unsafe { syscall(arch::RT_SIGPROCMASK, [SIG_SETMASK, mask, 0, SET_BYTES, 0]) };
    reaper
}

/// Takes the status of `child` when it has ended, or waits for that.
///
/// # Errors
/// `CHILD` when there is no such child.
pub fn reap(child: Pid, wait: bool) -> Result<Option<Ended>, Errno> {
    const WNOHANG: usize = 1;
    /// Where `ru_maxrss` is in `struct rusage`, which is 18 words.
    const MAXRSS: usize = 4;
    let (mut status, mut usage) = (0_u32, [0_u64; 18]);
    let pid = child.as_raw_nonzero().get() as usize;
    let arguments = [
        pid,
        (&raw mut status).expose_provenance(),
        if wait { 0 } else { WNOHANG },
        (&raw mut usage).expose_provenance(),
        0,
    ];
    loop {
        // SAFETY: wait4 writes an int and a struct rusage, for which there is room.
        match unsafe { syscall(arch::WAIT4, arguments) } {
            Err(Errno::INTR) => {}
            Err(error) => return Err(error),
            Ok(0) => return Ok(None),
            Ok(_) => break,
        }
    }
    // wait(2): the low 7 bits are the signal, the next byte the exit code.
    let (signal, code) = ((status & 0x7f) as u8, (status >> 8) as u8);
    Ok(Some(Ended { code: if signal == 0 { code } else { 0 }, signal, peak_rss_kib: usage[MAXRSS] }))
}

/// Sends a signal to a child, or with `group` to the process group it leads.
///
/// # Errors
/// `SRCH` when nobody is there, `INVAL` for a number that is no signal.
pub fn signal(child: Pid, group: bool, number: u32) -> Result<(), Errno> {
    let pid = child.as_raw_nonzero().get() as isize;
    let target = if group { -pid } else { pid };
    // SAFETY: kill takes numbers.
    unsafe { syscall(arch::KILL, [target as usize, number as usize, 0, 0, 0]) }.map(|_| ())
}

/// Has a reaper send a signal to every process of its namespace but itself.
///
/// # Errors
/// `SRCH` when the reaper is not there, `AGAIN` when as many wait for it as the kernel queues.
pub fn signal_all(reaper: Pid, number: u32) -> Result<(), Errno> {
    let mut info = [0_u32; 32];
    (info[0], info[CODE], info[VALUE]) = (SEND_ALL, SI_QUEUE, number);
    let pid = reaper.as_raw_nonzero().get() as usize;
    let arguments = [pid, SEND_ALL as usize, (&raw const info).expose_provenance(), 0, 0];
    // SAFETY: the kernel reads a siginfo_t, which `info` has the size of.
    unsafe { syscall(arch::RT_SIGQUEUEINFO, arguments) }.map(|_| ())
}

fn clone(
    mut flags: u64,
    control_group: Option<BorrowedFd<'_>>,
    run: extern "C" fn(*mut c_void) -> !,
    argument: *mut c_void,
) -> Result<Child, Errno> {
    // Not written to: only the pages the child uses are touched.
    let mut stack = Box::<[u128]>::new_uninit_slice(STACK_BYTES / size_of::<u128>());
    let mut pidfd = -1;
    if control_group.is_some() {
        flags |= CLONE_INTO_CGROUP;
    }
    let arguments = CloneArguments {
        flags: flags | CLONE_PIDFD,
        pidfd: (&raw mut pidfd).expose_provenance() as u64,
        exit_signal: SIGCHLD as u64,
        stack: stack.as_mut_ptr().expose_provenance() as u64,
        stack_size: STACK_BYTES as u64,
        cgroup: control_group.map_or(0, |group| group.as_raw_fd() as u64),
        ..CloneArguments::default()
    };
    // SAFETY: `run` is one of ours, none of which returns. With CLONE_VM there is CLONE_VFORK too (`start`), so the
    // stack and what `argument` points to outlive the child's use of them; without, it has copies.
    let pid = unsafe { arch::clone(&arguments, run, argument) }?;
    let pid = Pid::from_raw(pid as i32).ok_or(Errno::CHILD)?;
    // SAFETY: clone has just made this descriptor for us alone.
    let pidfd = unsafe { OwnedFd::from_raw_fd(pidfd) };
    Ok(Child { pid, inner_pid: 1, pidfd })
}

extern "C" fn run_command(context: *mut c_void) -> ! {
    // SAFETY: `start` passed a `Context` and does not run before this child is done.
    let context = unsafe { &mut *context.cast::<Context<'_>>() };
    let failure = become_command(context);
    context.failure = Some(failure);
    exit(1)
}

/// Does all a command needs done in its own process, and executes it; returns only what failed.
fn become_command(context: &mut Context<'_>) -> Failure {
    let start = context.start;
    let prepared = (|| {
        if start.control_group.is_some() {
            // SAFETY: unshare takes a number. Control groups are of the process, which shares memory with the agent and no namespace
            // that this replaces.
            unsafe { syscall(arch::UNSHARE, [CLONE_NEWCGROUP, 0, 0, 0, 0]) }
                .map_err(|error| (Stage::Clone, error))?;
        }
        if let Some(prepare) = start.prepare {
            prepare().map_err(|error| (Stage::Prepare, error))?;
        }
        context.inner_pid = streams(start).map_err(|error| (Stage::Streams, error))?;
        // As root, as a container runtime does, so that a directory closed to the user can be worked in.
        rustix::process::chdir(start.directory).map_err(|error| (Stage::Directory, error))?;
        identity(start).map_err(|error| (Stage::Identity, error))
    })();
    match prepared {
        Err(failure) => failure,
        Ok(()) => (Stage::Exec, execute(context)),
    }
}

/// Makes the child a session of its own, whose id in its namespace is returned, with the streams it was given.
fn streams(start: &Start<'_>) -> Result<u32, Errno> {
    let session = rustix::process::setsid()?;
    let [stdin, stdout, stderr] = start.stdio;
    if start.terminal {
        rustix::process::ioctl_tiocsctty(stdin)?;
    }
    rustix::stdio::dup2_stdin(stdin)?;
    rustix::stdio::dup2_stdout(stdout)?;
    rustix::stdio::dup2_stderr(stderr)?;
    Ok(session.as_raw_nonzero().get() as u32)
}

/// Takes the user's identity. The capabilities need no call: leaving user 0 clears them, and for user 0 exec grants
/// what the bounding set holds, which the agent has cut down already.
fn identity(start: &Start<'_>) -> Result<(), Errno> {
    rustix::thread::set_thread_groups(start.groups)?;
    if start.gid != Gid::ROOT {
        rustix::thread::set_thread_res_gid(start.gid, start.gid, start.gid)?;
    }
    if start.uid != Uid::ROOT {
        rustix::thread::set_thread_res_uid(start.uid, start.uid, start.uid)?;
    }
    Ok(())
}

/// Executes the first program that is there; one that may not be executed counts only when no other is there.
fn execute(context: &Context<'_>) -> Errno {
    let mut failure = Errno::NOENT;
    for program in context.start.programs {
        let arguments = [
            program.as_ptr().expose_provenance(),
            context.argv.as_ptr().expose_provenance(),
            context.envp.as_ptr().expose_provenance(),
            0,
            0,
        ];
        // SAFETY: a C string and two arrays of C strings that end in a null pointer, all alive until this succeeds.
        match unsafe { syscall(arch::EXECVE, arguments) } {
            Ok(_) | Err(Errno::NOENT | Errno::NOTDIR) => {}
            Err(Errno::ACCESS) => failure = Errno::ACCESS,
            Err(error) => return error,
        }
    }
    failure
}

fn pointers(strings: &[CString]) -> Vec<*const c_char> {
    strings.iter().map(|string| string.as_ptr()).chain([null()]).collect()
}

extern "C" fn run_reaper(_: *mut c_void) -> ! {
    /// Ignoring SIGCHLD makes the kernel reap every child at once: orphans cost this process no instruction.
    static IGNORE: [usize; 4] = [1, 0, 0, 0];
    const PR_SET_PDEATHSIG: usize = 1;
    const SIGKILL: usize = 9;
    let ignore = (&raw const IGNORE).expose_provenance();
    // None of these fails for such arguments; and if one did, nothing here could mend it.
    for (number, arguments) in [
        // It ends with the agent, should that ever be.
        (arch::PRCTL, [PR_SET_PDEATHSIG, SIGKILL, 0, 0, 0]),
        (arch::CLOSE_RANGE, [0, u32::MAX as usize, 0, 0, 0]),
        (arch::RT_SIGACTION, [SIGCHLD, ignore, 0, SET_BYTES, 0]),
    ] {
        // SAFETY: the kernel reads the static, of the size it expects. No descriptor is used after.
        let _ = unsafe { syscall(number, arguments) };
    }
    loop {
        let number = match next_order() {
            (END_WITH_ORPHANS, _) => break,
            (SEND_ALL, number) => number as usize,
            _ => SIGTERM,
        };
        // SAFETY: kill takes numbers; -1 is every process of this namespace but this one.
        let _ = unsafe { syscall(arch::KILL, [usize::MAX, number, 0, 0, 0]) };
    }
    // SAFETY: wait4 takes null pointers for what is not wanted. It fails when no child is left.
    while unsafe { syscall(arch::WAIT4, [usize::MAX, 0, 0, 0, 0]) }.is_ok() {}
    exit(0)
}

/// Waits for a signal of [`ORDERS`] from the agent, which is outside of the namespace and so has no id here; returns it and
/// the value with it. The value's sender can be made up, by root of the namespace alone: who may send all a signal anyway.
fn next_order() -> (u32, u32) {
    let mut info = [0_u32; 32];
    let arguments =
        [(&raw const ORDERS).expose_provenance(), (&raw mut info).expose_provenance(), 0, SET_BYTES, 0];
    loop {
        // SAFETY: the kernel reads a signal set and writes a siginfo_t, for which there is room.
        match unsafe { syscall(arch::RT_SIGTIMEDWAIT, arguments) } {
            Ok(number) if info[SENDER] == 0 => match (number as u32, info[CODE]) {
                (SEND_ALL, SI_QUEUE) => return (SEND_ALL, info[VALUE]),
                (SEND_ALL, _) => {}
                (number, SI_USER) => return (number, 0),
                _ => {}
            },
            _ => {}
        }
    }
}

/// Ends this process, not the agent.
fn exit(code: usize) -> ! {
    loop {
        // SAFETY: exit_group takes a number and does not return.
        let _ = unsafe { syscall(arch::EXIT_GROUP, [code, 0, 0, 0, 0]) };
    }
}
