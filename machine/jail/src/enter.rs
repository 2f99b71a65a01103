//! The way into the jail, which a process goes by itself, first of all.
#![expect(
    unsafe_code,
    reason = "what a process gives up, it gives up by system calls that have no safe interface"
)]

use std::ffi::{CStr, c_int, c_ulong};
use std::io;
use std::os::fd::{FromRawFd, OwnedFd};
use std::ptr;

use crate::spawn::{CAP_SETPCAP, CAP_SYS_ADMIN};
use crate::{deadline, filter, landlock, limits};

/// The user ids of which a host that is root takes one for each process: nobody's, by number, so that two of them
/// are strangers to each other and to everybody else ("kiln" in ASCII, the last digits free).
const USER_IDS: std::ops::Range<u32> = 0x6b69_0000..0x6b6a_0000;
/// Where those mean nothing, as in a container.
const NOBODY: u32 = 65_534;
/// A folder that is there on every host that got so far: what the new root is put over.
const PLACE: &CStr = c"/proc";
/// The highest capability a kernel may have. Linux `capabilities(7)`.
const CAPABILITIES_MAX: c_ulong = 63;
/// No capabilities come of being root, of changing users or of programs, and that is final. Linux
/// `include/uapi/linux/securebits.h`.
const SECUREBITS: c_ulong = 1 | 1 << 1 | 1 << 2 | 1 << 3 | 1 << 5 | 1 << 6 | 1 << 7;
const CAPABILITY_VERSION_3: u32 = 0x2008_0522;

/// What a process in its jail still has.
#[derive(Debug)]
pub struct Jailed<T> {
    /// What `prepare` made.
    pub prepared: T,
    /// The descriptor that was standard input.
    pub stdin: OwnedFd,
}

/// A process cannot be jailed. The host is to blame, but for one that was not started for it.
#[derive(Debug, thiserror::Error)]
#[error("cannot {step}")]
pub struct EnterError {
    step: &'static str,
    #[source]
    source: io::Error,
    hint: &'static str,
}

impl EnterError {
    /// What would help, or empty.
    pub fn hint(&self) -> &'static str {
        self.hint
    }
}

const DOCTOR: &str = "kiln doctor says what this host lacks, and what would help";

/// Makes an error of the last one of the system when a call failed.
fn step(step: &'static str, result: impl Into<i64>) -> Result<(), EnterError> {
    if result.into() >= 0 {
        return Ok(());
    }
    Err(EnterError { step, source: io::Error::last_os_error(), hint: DOCTOR })
}

/// Jails this process, which [`spawn`](crate::spawn()) has started, for good.
///
/// To be called first in `main`, before there is a thread. `prepare` gets the descriptors from 3 on that the host gave, in order,
/// and opens what is needed of the file system: as the user that the process stays, while there still are files, and before it can
/// have heard from anybody.
///
/// # Errors
/// [`EnterError`]; the process must end then, for it is between the worlds.
pub fn enter<T>(prepare: impl FnOnce(Vec<OwnedFd>) -> T) -> Result<Jailed<T>, EnterError> {
    if std::process::id() != 1 {
        return Err(EnterError {
            step: "enter the jail: this process was not started as one of its own",
            source: io::ErrorKind::PermissionDenied.into(),
            hint: "it is for Kiln to start a monitor",
        });
    }
    unblock_signals();
    share_one_heap();
    let files = inherited();
    leave_the_host()?;
    let prepared = prepare(files);
    empty_root()?;
    landlock::restrict().map_err(|source| EnterError {
        step: "deny itself files and sockets (Landlock)",
        source,
        hint: DOCTOR,
    })?;
    give_up_capabilities()?;
    limits::set().map_err(|source| EnterError { step: "limit itself", source, hint: DOCTOR })?;
    deadline::arm().map_err(|source| EnterError { step: "set its deadline", source, hint: DOCTOR })?;
    filter::install().map_err(|source| EnterError {
        step: "limit its system calls",
        source,
        hint: DOCTOR,
    })?;
    // SAFETY: descriptor 0 is the one a process is started with, and nothing of this one has taken it.
    Ok(Jailed { prepared, stdin: unsafe { OwnedFd::from_raw_fd(0) } })
}

/// Has all threads share one heap. The C library's allocator opens files for more: to learn how many processors there are before it makes
/// some, and how memory is counted before it shrinks one. Hardly anything is allocated while a guest runs.
fn share_one_heap() {
    // SAFETY: a parameter of the allocator; there is no other thread.
    unsafe { libc::mallopt(libc::M_ARENA_MAX, 1) };
}

fn unblock_signals() {
    // SAFETY: all zeros is a set, the empty one.
    let none: libc::sigset_t = unsafe { std::mem::zeroed() };
    // SAFETY: the set is ours, and nothing blocks what only the host blocked.
    unsafe { libc::sigprocmask(libc::SIG_SETMASK, &raw const none, ptr::null_mut()) };
}

/// The descriptors behind the standard streams. `spawn` leaves no gaps and closes all others.
fn inherited() -> Vec<OwnedFd> {
    let mut files = Vec::new();
    for fd in 3.. {
        // SAFETY: no pointers; one that is not open is an error.
        if unsafe { libc::fcntl(fd, libc::F_SETFD, libc::FD_CLOEXEC) } < 0 {
            break;
        }
        // SAFETY: it is open and nobody's: no other descriptor was opened since this process started.
        files.push(unsafe { OwnedFd::from_raw_fd(fd) });
    }
    files
}

/// Leaves what it shares with the host, and root's user id if it has that.
fn leave_the_host() -> Result<(), EnterError> {
    let mut namespaces = libc::CLONE_NEWNS
        | libc::CLONE_NEWNET
        | libc::CLONE_NEWIPC
        | libc::CLONE_NEWUTS
        | libc::CLONE_NEWCGROUP;
    // SAFETY: no pointers.
    if unsafe { libc::geteuid() } == 0 {
        give_up_root()?;
        namespaces |= libc::CLONE_NEWUSER;
    }
    // SAFETY: no pointers.
    step("make its namespaces", unsafe { libc::unshare(namespaces) })?;
    // SAFETY: an empty name.
    step("forget the host's name", unsafe { libc::sethostname(c"".as_ptr(), 0) })?;
    // SAFETY: an empty name.
    step("forget the host's domain", unsafe { libc::setdomainname(c"".as_ptr(), 0) })
}

/// Becomes a user that nobody is. Where root itself is the only user there is, as in the user namespace of one, it is nobody special.
fn give_up_root() -> Result<(), EnterError> {
    // SAFETY: an empty list of groups. A user namespace may forbid it; then they are the groups of whoever made it.
    unsafe { libc::setgroups(0, ptr::null()) };
    let own = USER_IDS.start + any_below(USER_IDS.end - USER_IDS.start);
    for id in [own, NOBODY] {
        // SAFETY: no pointers; no other thread is there that it would have to reach.
        let group = unsafe { libc::setresgid(id, id, id) };
        // SAFETY: as above.
        let user = unsafe { libc::setresuid(id, id, id) };
        if group == 0 && user == 0 {
            break;
        }
        // An id that means nothing in a user namespace is no id; any other reason is one to stop.
        let error = io::Error::last_os_error();
        if error.kind() != io::ErrorKind::InvalidInput {
            return Err(EnterError { step: "give up being root", source: error, hint: DOCTOR });
        }
    }
    // So that it can still look at itself; that ends before it hears from anybody.
    // SAFETY: no pointers.
    step("look at itself", unsafe { libc::prctl(libc::PR_SET_DUMPABLE, 1, 0, 0, 0) })
}

/// A number that differs from process to process; nothing but tidiness depends on it.
fn any_below(bound: u32) -> u32 {
    let mut now = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: a time of ours is filled in.
    unsafe { libc::clock_gettime(libc::CLOCK_MONOTONIC, &raw mut now) };
    (now.tv_nsec as u32 / 64) % bound
}

/// An empty folder in the place of all files, which nobody can write to.
fn empty_root() -> Result<(), EnterError> {
    let flags = libc::MS_RDONLY | libc::MS_NOSUID | libc::MS_NODEV | libc::MS_NOEXEC;
    let options = c"size=4k,nr_inodes=1,mode=555";
    // SAFETY: all four are C strings.
    let mounted = unsafe {
        libc::mount(c"none".as_ptr(), PLACE.as_ptr(), c"tmpfs".as_ptr(), flags, options.as_ptr().cast())
    };
    step("mount an empty root", mounted)?;
    // SAFETY: a C string.
    step("enter the empty root", unsafe { libc::chdir(PLACE.as_ptr()) })?;
    let here = c".".as_ptr();
    // The old root ends up over the new one and is taken away from there: Linux man page pivot_root(2), "pivot_root(\".\", \".\")".
    // SAFETY: both are C strings.
    step("change to the empty root", unsafe { libc::syscall(libc::SYS_pivot_root, here, here) })?;
    // SAFETY: a C string.
    step("leave the host's files", unsafe { libc::umount2(here, libc::MNT_DETACH) })?;
    // SAFETY: a C string.
    step("stay in the empty root", unsafe { libc::chdir(c"/".as_ptr()) })
}

/// Nothing is left that could be used, nor a way to get any: not by a program, for none can be executed with more than this.
fn give_up_capabilities() -> Result<(), EnterError> {
    let control = |step_name, option: c_int, argument: c_ulong| {
        // SAFETY: options without pointers.
        step(step_name, unsafe { libc::prctl(option, argument, 0, 0, 0) })
    };
    control("give up what programs may bring", libc::PR_SET_NO_NEW_PRIVS, 1)?;
    control("give up what users may bring", libc::PR_SET_SECUREBITS, SECUREBITS)?;
    // SAFETY: an option without pointers.
    step("give up its ambient capabilities", unsafe {
        libc::prctl(libc::PR_CAP_AMBIENT, libc::PR_CAP_AMBIENT_CLEAR_ALL, 0, 0, 0)
    })?;
    for capability in 0..=CAPABILITIES_MAX {
        // SAFETY: an option without pointers.
        if unsafe { libc::prctl(libc::PR_CAPBSET_DROP, capability, 0, 0, 0) } < 0 {
            // The kernel has no more; these two, without which nothing was dropped, it has.
            let all = capability > c_ulong::from(CAP_SETPCAP.max(CAP_SYS_ADMIN))
                && io::Error::last_os_error().kind() == io::ErrorKind::InvalidInput;
            if all {
                break;
            }
            return step("give up its bounding set", -1);
        }
    }
    let header = [CAPABILITY_VERSION_3, 0];
    let none = [0u32; 6];
    // SAFETY: a header and two sets, as version 3 of the interface has them.
    step("give up its capabilities", unsafe {
        libc::syscall(libc::SYS_capset, header.as_ptr(), none.as_ptr())
    })?;
    control("hide its memory", libc::PR_SET_DUMPABLE, 0)
}
