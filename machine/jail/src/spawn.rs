//! Starting a process in namespaces of its own.
//!
//! One `clone` that shares its caller's memory until it executes, as `posix_spawn` does, so that a large host costs no more
//! than a small one. The process is a child of this one, and is waited for by a descriptor.
#![expect(unsafe_code, reason = "a new process shares the memory of this one until it executes")]

use std::ffi::{CStr, CString, c_int, c_void};
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::process::ExitStatusExt;
use std::path::Path;
use std::process::ExitStatus;
use std::ptr;

use rustix::process::{Signal, WaitId, WaitIdOptions, pidfd_send_signal, waitid};

/// More than the few calls need that the child makes on it.
const STACK_BYTES: usize = 64 << 10;
/// The most descriptors a process is given.
const FDS_MAX: usize = 16;
/// What the child needs to leave the host's name spaces with once it has executed, and to give everything up.
const CAPABILITIES: [u32; 2] = [CAP_SETPCAP, CAP_SYS_ADMIN];
/// Linux `include/uapi/linux/capability.h`.
pub(crate) const CAP_SETPCAP: u32 = 8;
pub(crate) const CAP_SYS_ADMIN: u32 = 21;
const CAPABILITY_VERSION_3: u32 = 0x2008_0522;

/// An executable.
#[derive(Clone, Copy, Debug)]
pub enum Program<'a> {
    /// By its path. `/proc/self/exe` is this very program.
    Path(&'a Path),
    /// By a descriptor of it, whatever its name is or was; no script.
    File(BorrowedFd<'a>),
}

/// What is to be started.
#[derive(Debug)]
pub struct Launch<'a> {
    /// The executable.
    pub program: Program<'a>,
    /// Its arguments, its own name among them.
    pub args: &'a [&'a str],
    /// Its descriptors from 0 on; it gets no others, and no environment.
    pub fds: &'a [BorrowedFd<'a>],
    /// The folder of the control group (version 2) that it is born in; the one of this process when there is none.
    pub cgroup: Option<BorrowedFd<'a>>,
}

/// A process could not be started. The host is to blame.
#[derive(Debug, thiserror::Error)]
pub enum SpawnError {
    /// The host gives no namespaces.
    #[error("cannot make the namespaces of a process")]
    Namespaces(#[source] io::Error),
    /// The control group takes no process, or this one may not put any into it.
    #[error("cannot start a process in its control group")]
    Group(#[source] io::Error),
    /// The program cannot be executed.
    #[error("cannot execute the program")]
    Execute(#[source] io::Error),
    /// The process could not set itself up, or there was no room for it.
    #[error("cannot start a process")]
    Host(#[source] io::Error),
}

/// A process that was started, to be waited for. It goes on when this is dropped.
#[derive(Debug)]
pub struct Child {
    pidfd: OwnedFd,
    id: u32,
}

/// What the child is told and what it tells, in memory that both see.
struct Plan<'a> {
    /// Beside `file`, or from there on.
    path: &'a CStr,
    /// The executable itself, where `path` is empty.
    file: Option<BorrowedFd<'a>>,
    argv: &'a [*const libc::c_char],
    fds: &'a [BorrowedFd<'a>],
    /// It is in a user namespace of its own.
    has_user_namespace: bool,
    /// How far it came, and the error that ended it there, or 0.
    failed: [c_int; 2],
}

const FAILED_SETUP: c_int = 1;
const FAILED_EXECUTE: c_int = 2;

/// Starts a process that is to [`enter`](crate::enter()) its jail first of all.
///
/// It is alone in a pid namespace, and in a user namespace in which nobody's ids mean anything; of a host that is root, the
/// latter comes in `enter`, since only a process that has given root up can make one that is not root's. It leads a session, has
/// an empty environment and every signal blocked.
///
/// Returns when the program is being executed. The calling thread does nothing else until then; other threads go on.
///
/// # Errors
/// [`SpawnError`]; there is no process then.
pub fn spawn(launch: &Launch<'_>) -> Result<Child, SpawnError> {
    let invalid = || SpawnError::Host(io::ErrorKind::InvalidInput.into());
    let text = |bytes: &[u8]| CString::new(bytes).map_err(|_| invalid());
    let (path, file) = match launch.program {
        Program::Path(path) => (text(path.as_os_str().as_bytes())?, None),
        Program::File(file) => (CString::default(), Some(file)),
    };
    let args: Vec<CString> = launch.args.iter().map(|arg| text(arg.as_bytes())).collect::<Result<_, _>>()?;
    let argv: Vec<_> = args.iter().map(|arg| arg.as_ptr()).chain([ptr::null()]).collect();
    if launch.fds.len() > FDS_MAX {
        return Err(invalid());
    }
    let has_user_namespace = !rustix::process::geteuid().is_root();
    let mut plan =
        Plan { path: &path, file, argv: &argv, fds: launch.fds, has_user_namespace, failed: [0; 2] };
    let child = match launch.cgroup {
        None => clone(&mut plan, has_user_namespace, None).map_err(SpawnError::Namespaces)?,
        // Which of the two it was the kernel does not say; that namespaces can be had is said elsewhere.
        group => clone(&mut plan, has_user_namespace, group).map_err(SpawnError::Group)?,
    };
    let error = match plan.failed {
        [_, 0] => return Ok(child),
        [FAILED_EXECUTE, errno] => SpawnError::Execute(io::Error::from_raw_os_error(errno)),
        [_, errno] => SpawnError::Host(io::Error::from_raw_os_error(errno)),
    };
    // It has ended already, so this does not wait.
    let _ = child.reap(WaitIdOptions::empty());
    Err(error)
}

fn clone(
    plan: &mut Plan<'_>,
    with_user_namespace: bool,
    cgroup: Option<BorrowedFd<'_>>,
) -> io::Result<Child> {
    let mut stack: Vec<u128> = Vec::with_capacity(STACK_BYTES / size_of::<u128>());
    let user = if with_user_namespace { libc::CLONE_NEWUSER } else { 0 };
    let flags = libc::CLONE_VM | libc::CLONE_VFORK | libc::CLONE_PIDFD | libc::CLONE_NEWPID | user;
    let mut pidfd: c_int = -1;
    let plan = ptr::from_mut(plan).cast::<c_void>();
    let before = block_signals();
    // `CLONE_VFORK` stops this thread until the child has executed or ended, so that the stack, the plan and the place for the
    // descriptor outlive its use of them. No handler of ours runs in the child, for all signals are blocked, and stay so.
    // `child` calls nothing that needs more than its own stack.
    let cloned = if let Some(cgroup) = cgroup {
        // SAFETY: as above.
        unsafe { clone_into(cgroup, flags, &mut stack, plan, &mut pidfd) }
    } else {
        // SAFETY: one past the end of what was allocated; stacks grow down from there.
        let top = unsafe { stack.as_mut_ptr().add(stack.capacity()) };
        // SAFETY: as above.
        let id = unsafe { libc::clone(child, top.cast(), flags | libc::SIGCHLD, plan, &raw mut pidfd) };
        if id < 0 { Err(io::Error::last_os_error()) } else { Ok(id) }
    };
    // SAFETY: the set is one that the kernel filled in.
    unsafe { libc::pthread_sigmask(libc::SIG_SETMASK, &raw const before, ptr::null_mut()) };
    let id = cloned?.cast_unsigned();
    // SAFETY: the kernel made the descriptor for us alone.
    Ok(Child { pidfd: unsafe { OwnedFd::from_raw_fd(pidfd) }, id })
}

/// As the C library's `clone`, which cannot say in which control group; a process that is moved there later waits for all processors of
/// the host. Linux man page clone(2), `CLONE_INTO_CGROUP`.
///
/// # Safety
/// As `clone`: the thread must be stopped until the child has executed or ended, by `CLONE_VFORK`.
unsafe fn clone_into(
    cgroup: BorrowedFd<'_>,
    flags: c_int,
    stack: &mut Vec<u128>,
    plan: *mut c_void,
    pidfd: &mut c_int,
) -> io::Result<c_int> {
    let arguments = CloneArguments {
        flags: u64::from(flags.cast_unsigned()) | CLONE_INTO_CGROUP,
        pidfd: ptr::from_mut(pidfd) as u64,
        exit_signal: libc::SIGCHLD as u64,
        stack: stack.as_mut_ptr() as u64,
        stack_bytes: (stack.capacity() * size_of::<u128>()) as u64,
        cgroup: cgroup.as_raw_fd() as u64,
        ..CloneArguments::default()
    };
    let result: i64;
    // SAFETY: the caller sees to it that what is pointed to outlives the child's use of it. The child comes back from the call on a
    // stack of its own, which is aligned, with nothing on it: it may only call, and `child` does not return. This thread comes back
    // with its registers as they were but for those that a system call changes.
    unsafe {
        std::arch::asm!(
            "syscall",
            "test rax, rax",
            "jnz 2f",
            "xor ebp, ebp",
            "mov rdi, r12",
            "call r13",
            "ud2",
            "2:",
            inlateout("rax") libc::SYS_clone3 => result,
            in("rdi") &raw const arguments,
            in("rsi") size_of::<CloneArguments>(),
            in("r12") plan,
            in("r13") child as extern "C" fn(*mut c_void) -> c_int,
            lateout("rcx") _,
            lateout("r11") _,
        );
    }
    if result < 0 { Err(io::Error::from_raw_os_error(-result as c_int)) } else { Ok(result as c_int) }
}

/// What `clone3` is told. Linux `include/uapi/linux/sched.h`, `struct clone_args`, its third version.
#[repr(C)]
#[derive(Default)]
struct CloneArguments {
    flags: u64,
    pidfd: u64,
    child_tid: u64,
    parent_tid: u64,
    exit_signal: u64,
    stack: u64,
    stack_bytes: u64,
    tls: u64,
    set_tid: u64,
    set_tid_size: u64,
    cgroup: u64,
}

const CLONE_INTO_CGROUP: u64 = 0x2_0000_0000;

/// Blocks all signals for this thread, and returns what was blocked before.
fn block_signals() -> libc::sigset_t {
    // SAFETY: all zeros is a set, the empty one.
    let mut all: libc::sigset_t = unsafe { std::mem::zeroed() };
    let mut before = all;
    // SAFETY: a set of ours is filled.
    unsafe { libc::sigfillset(&raw mut all) };
    // SAFETY: both are sets of ours.
    unsafe { libc::pthread_sigmask(libc::SIG_SETMASK, &raw const all, &raw mut before) };
    before
}

/// The child's life until it executes. It allocates nothing and takes no lock.
extern "C" fn child(plan: *mut c_void) -> c_int {
    // SAFETY: the plan of `clone`, whose thread stands still.
    let plan = unsafe { &mut *plan.cast::<Plan<'_>>() };
    plan.failed = [FAILED_SETUP, 0];
    if let Ok(program) = set_up(plan) {
        plan.failed = [FAILED_EXECUTE, 0];
        let (path, argv) = (plan.path.as_ptr(), plan.argv.as_ptr());
        let environment: [*const libc::c_char; 1] = [ptr::null()];
        let flags = if plan.file.is_some() { libc::AT_EMPTY_PATH } else { 0 };
        // SAFETY: the path is a C string, and both lists are of such and end with a null.
        unsafe { libc::syscall(libc::SYS_execveat, program, path, argv, environment.as_ptr(), flags) };
    }
    plan.failed[1] = io::Error::last_os_error().raw_os_error().unwrap_or(libc::EINVAL);
    // SAFETY: ends this process alone, without any of the handlers of the program whose memory it shares.
    unsafe { libc::_exit(127) }
}

struct Failed;

fn done(result: c_int) -> Result<c_int, Failed> {
    if result < 0 { Err(Failed) } else { Ok(result) }
}

/// Returns what the program's path starts from.
fn set_up(plan: &Plan<'_>) -> Result<c_int, Failed> {
    // SAFETY: no pointers; no terminal is left to it, and no group in which it would get others' signals.
    done(unsafe { libc::setsid() })?;
    let count = plan.fds.len() as c_int;
    let mut aside = [0; FDS_MAX];
    // First out of the way of each other, then to their places.
    for (aside, fd) in aside.iter_mut().zip(plan.fds) {
        // SAFETY: no pointers, and a descriptor that is open.
        *aside = done(unsafe { libc::fcntl(fd.as_raw_fd(), libc::F_DUPFD_CLOEXEC, count) })?;
    }
    let program = match plan.file {
        // SAFETY: as above.
        Some(file) => done(unsafe { libc::fcntl(file.as_raw_fd(), libc::F_DUPFD_CLOEXEC, count) })?,
        None => libc::AT_FDCWD,
    };
    for (place, aside) in (0..count).zip(aside) {
        // SAFETY: no pointers; the table of descriptors is the child's own.
        done(unsafe { libc::dup2(aside, place) })?;
    }
    let flags = libc::CLOSE_RANGE_CLOEXEC as c_int;
    // SAFETY: no pointers; this is the child's own table, and nothing of it is used after it executes.
    done(unsafe { libc::close_range(count as libc::c_uint, libc::c_uint::MAX, flags) })?;
    if plan.has_user_namespace {
        keep_capabilities()?;
    }
    Ok(program)
}

/// Has the program keep what [`CAPABILITIES`] names: one whose user means nothing in its namespace would lose all as it executes.
fn keep_capabilities() -> Result<(), Failed> {
    let wanted = CAPABILITIES.iter().fold(0, |set, capability| set | 1u32 << capability);
    let header = [CAPABILITY_VERSION_3, 0];
    // Effective, permitted, inheritable; the same of the capabilities above 31.
    let sets = [wanted, wanted, wanted, 0, 0, 0];
    // SAFETY: a header and two sets, as version 3 of the interface has them.
    done(unsafe { libc::syscall(libc::SYS_capset, header.as_ptr(), sets.as_ptr()) } as c_int)?;
    for capability in CAPABILITIES {
        let capability = libc::c_ulong::from(capability);
        // SAFETY: no pointers.
        done(unsafe { libc::prctl(libc::PR_CAP_AMBIENT, libc::PR_CAP_AMBIENT_RAISE, capability, 0, 0) })?;
    }
    Ok(())
}

impl Child {
    /// Its process id, as this process sees it.
    pub fn id(&self) -> u32 {
        self.id
    }

    /// Kills the process. One that has ended stays as it is.
    ///
    /// # Errors
    /// When this process may not.
    pub fn kill(&self) -> io::Result<()> {
        match pidfd_send_signal(&self.pidfd, Signal::KILL) {
            Err(rustix::io::Errno::SRCH) | Ok(()) => Ok(()),
            Err(errno) => Err(errno.into()),
        }
    }

    /// How the process ended; `None` while it has not. Its descriptor is readable once it has.
    ///
    /// # Errors
    /// When somebody else has waited for it.
    pub fn try_wait(&self) -> io::Result<Option<ExitStatus>> {
        self.reap(WaitIdOptions::NOHANG)
    }

    /// Waits for the end of the process, and says how it ended.
    ///
    /// # Errors
    /// As [`try_wait`](Self::try_wait).
    pub fn wait(&self) -> io::Result<ExitStatus> {
        loop {
            match self.reap(WaitIdOptions::empty()) {
                Ok(Some(status)) => return Ok(status),
                Ok(None) => {}
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                // A descriptor that was made not to block does not wait.
                Err(error) => return Err(error),
            }
        }
    }

    fn reap(&self, options: WaitIdOptions) -> io::Result<Option<ExitStatus>> {
        let ended = waitid(WaitId::PidFd(self.pidfd.as_fd()), options | WaitIdOptions::EXITED)?;
        Ok(ended.map(|ended| {
            // As `wait` encodes it: Linux man page wait(2).
            let raw = match ended.exit_status() {
                Some(code) => code << 8,
                None => ended.terminating_signal().unwrap_or(0),
            };
            ExitStatus::from_raw(raw)
        }))
    }
}

impl AsRawFd for Child {
    fn as_raw_fd(&self) -> RawFd {
        self.pidfd.as_raw_fd()
    }
}

impl AsFd for Child {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.pidfd.as_fd()
    }
}
