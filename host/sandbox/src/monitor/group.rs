//! A control group for each monitor: a bound also for what the kernel holds for it, and a name that says whose it is.
//!
//! ```text
//! KILN_CGROUP=DIR, or as root /sys/fs/cgroup/kiln
//!   kiln-NAMESPACE-PROCESS-STARTED-NUMBER/    one monitor, born in it; its host's process is in the name
//! ```
//! Where there is no such folder nothing is done, and nothing paid: the limits of the process itself (`kiln_jail`) hold everywhere. A group
//! whose host is gone is killed and removed by the next process that makes one. Version 2 alone: Linux
//! `Documentation/admin-guide/cgroup-v2.rst`.

use std::fmt;
use std::fs::{self, File};
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use std::sync::OnceLock;
use std::sync::atomic::{AtomicU64, Ordering};

use kiln_jail::{OVERHEAD_BYTES, THREADS_MAX};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fs::{Mode, OFlags};
use rustix::io::Errno;
use rustix::process::{Pid, test_kill_process};

/// The environment variable that names the folder in which groups are made.
pub const CGROUP_VARIABLE: &str = "KILN_CGROUP";
/// Where cgroup v2 is, and where root has its groups when nobody says.
const ROOT: &str = "/sys/fs/cgroup";
const OWN: &str = "kiln";
/// What the kernel may hold for a monitor beside what grows with its guest's memory: 512 connections with a socket buffer of 208 KiB
/// each, 64 stacks of threads, and KVM's own.
const KERNEL_BYTES: u64 = 128 << 20;
/// What it may hold for each page of the guest: 8 bytes in the page tables of the process, of KVM (twice where it shadows the guest's), and
/// of KVM's way back from pages, and as much again to spare; as a part of the guest's memory.
const PAGE_TABLES_SHARE: u64 = 64;
/// How long processes may take to go that were killed.
const KILL_LIMIT: Timespec = Timespec { tv_sec: 5, tv_nsec: 0 };
/// Linux `include/uapi/linux/magic.h`, `CGROUP2_SUPER_MAGIC`.
const CGROUP2_MAGIC: u64 = 0x6367_7270;

/// What a monitor whose guest has so much memory may have in all, in bytes.
///
/// The snapshot's file, of which guest memory is a private mapping, is page cache: it is charged to the group that touched it first, counts
/// here, and is given up before anything is killed. What must fit is what the guest has changed, which its memory's size bounds.
pub(crate) const fn bound_bytes(guest_bytes: u64) -> u64 {
    guest_bytes.saturating_add(guest_bytes / PAGE_TABLES_SHARE).saturating_add(OVERHEAD_BYTES + KERNEL_BYTES)
}

/// Control groups cannot be used although somebody said so, or not any more.
#[derive(Debug, thiserror::Error)]
#[error("cannot {action} {}", path.display())]
pub struct GroupError {
    action: &'static str,
    path: PathBuf,
    #[source]
    source: io::Error,
}

impl GroupError {
    fn at(action: &'static str, path: &Path) -> impl FnOnce(io::Error) -> Self {
        let path = path.to_owned();
        move |source| Self { action, path, source }
    }

    /// What would help.
    pub fn hint(&self) -> &'static str {
        match Errno::from_io_error(&self.source) {
            Some(Errno::BUSY) => {
                "a folder whose groups are bounded has no process of its own: move the host into a group below it, or name another folder"
            }
            _ => {
                "KILN_CGROUP names a folder of cgroup v2 that is yours, with the memory and pids controllers (systemd: Delegate=yes); \
                 unset it to go without"
            }
        }
    }
}

/// What was left of hosts that died, and is gone.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Cleared {
    /// Groups that were removed.
    pub groups: usize,
    /// Monitors that had outlived their host, and were killed.
    pub monitors: usize,
}

/// As a note to whoever uses them: `the control groups of 2 machines whose host died, of which 1 still ran`.
impl fmt::Display for Cleared {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (groups, plural) = (self.groups, if self.groups == 1 { "" } else { "s" });
        write!(formatter, "the control group{plural} of {groups} machine{plural} whose host died")?;
        match self.monitors {
            0 => Ok(()),
            monitors => write!(formatter, ", of which {monitors} still ran"),
        }
    }
}

/// Where the groups of this process's monitors are made.
#[derive(Debug)]
pub struct Groups {
    folder: PathBuf,
    owner: Owner,
    next: AtomicU64,
    cleared: Cleared,
}

/// The process a group belongs to, as no other is called while this machine is up.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Owner {
    /// The pid namespace, by its inode.
    namespace: u64,
    process: i32,
    /// When it started, in the kernel's ticks since boot.
    started: u64,
}

/// The groups of this process: `None` where there is no place for any. The first call finds the place, and clears what dead hosts have left in
/// it.
///
/// # Errors
/// [`GroupError`] when the place that the environment names cannot be used; the same at each call.
pub fn groups() -> Result<Option<&'static Groups>, &'static GroupError> {
    static GROUPS: OnceLock<Result<Option<Groups>, GroupError>> = OnceLock::new();
    GROUPS.get_or_init(find).as_ref().map(Option::as_ref)
}

fn find() -> Result<Option<Groups>, GroupError> {
    if let Some(folder) = std::env::var_os(CGROUP_VARIABLE).filter(|value| !value.is_empty()) {
        return Groups::open(PathBuf::from(folder)).map(Some);
    }
    if !rustix::process::geteuid().is_root() {
        return Ok(None);
    }
    // Nobody asked for it, so a host that has no place for it is as good.
    let has_memory = |controllers: String| controllers.split_whitespace().any(|name| name == "memory");
    if !fs::read_to_string(Path::new(ROOT).join("cgroup.controllers")).is_ok_and(has_memory) {
        return Ok(None);
    }
    let own = Path::new(ROOT).join(OWN);
    let made = delegate(Path::new(ROOT)).and_then(|()| make(&own));
    Ok(made.and_then(|()| Groups::open(own)).ok())
}

/// Has the groups in a folder be bounded, unless they are.
fn delegate(folder: &Path) -> Result<(), GroupError> {
    let path = folder.join("cgroup.subtree_control");
    let failed = |source| GroupError::at("use the control group", folder)(source);
    let controlled = fs::read_to_string(&path).map_err(failed)?;
    for controller in ["memory", "pids"] {
        if !controlled.split_whitespace().any(|name| name == controller) {
            fs::write(&path, format!("+{controller}")).map_err(failed)?;
        }
    }
    Ok(())
}

fn make(folder: &Path) -> Result<(), GroupError> {
    match fs::create_dir(folder) {
        Err(error) if error.kind() != io::ErrorKind::AlreadyExists => {
            Err(GroupError::at("make the control group", folder)(error))
        }
        _ => Ok(()),
    }
}

impl Groups {
    fn open(folder: PathBuf) -> Result<Self, GroupError> {
        let unusable = |source| GroupError::at("use the control group", &folder)(source);
        let other = |why: &str| unusable(io::Error::new(io::ErrorKind::InvalidInput, why.to_owned()));
        if !folder.is_absolute() {
            return Err(other("it is no absolute path"));
        }
        let system = rustix::fs::statfs(&folder).map_err(|errno| unusable(errno.into()))?;
        if system.f_type.cast_unsigned() != CGROUP2_MAGIC {
            return Err(other("it is no folder of cgroup v2"));
        }
        let controllers = fs::read_to_string(folder.join("cgroup.controllers")).map_err(unusable)?;
        for needed in ["memory", "pids"] {
            if !controllers.split_whitespace().any(|name| name == needed) {
                return Err(other(&format!("it has no {needed} controller")));
            }
        }
        delegate(&folder)?;
        let owner = Owner::this().map_err(unusable)?;
        let cleared = clear(&folder, owner.namespace)?;
        Ok(Self { folder, owner, next: AtomicU64::new(0), cleared })
    }

    /// Where they are.
    pub fn folder(&self) -> &Path {
        &self.folder
    }

    /// What dead hosts had left there when this process first looked.
    pub fn cleared(&self) -> Cleared {
        self.cleared
    }

    /// Makes a group for one monitor. Its memory is not bounded yet.
    pub(super) fn new_group(&self) -> Result<Group, GroupError> {
        let number = self.next.fetch_add(1, Ordering::Relaxed);
        let path = self.folder.join(self.owner.group_name(number));
        fs::create_dir(&path).map_err(GroupError::at("make the control group", &path))?;
        let opened =
            rustix::fs::open(&path, OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty());
        let group = opened.map_err(|errno| GroupError::at("open the control group", &path)(errno.into()));
        let group = group
            .map(|directory| Group { path: path.clone(), directory, guest_bytes: AtomicU64::new(0) })
            .inspect_err(|_| {
                // The first failure is the one to report.
                let _ = fs::remove_dir(&path);
            })?;
        group.write("pids.max", THREADS_MAX)?;
        Ok(group)
    }
}

impl Owner {
    fn this() -> io::Result<Self> {
        let process = rustix::process::getpid();
        let started = started(process)?.ok_or(io::ErrorKind::NotFound)?;
        let namespace = fs::metadata("/proc/self/ns/pid")?.ino();
        Ok(Self { namespace, process: process.as_raw_nonzero().get(), started })
    }

    fn group_name(self, number: u64) -> String {
        format!("kiln-{}-{}-{}-{number}", self.namespace, self.process, self.started)
    }

    /// The owner of the group of that name; `None` when the name is none of ours.
    fn of_group(name: &str) -> Option<Self> {
        let mut parts = name.strip_prefix("kiln-")?.split('-');
        let owner = Self {
            namespace: parts.next()?.parse().ok()?,
            process: parts.next()?.parse().ok()?,
            started: parts.next()?.parse().ok()?,
        };
        let number: u64 = parts.next()?.parse().ok()?;
        // Only what would be called so again.
        (parts.next().is_none() && owner.group_name(number) == name).then_some(owner)
    }

    /// Whether the process is gone, of one in the same pid namespace. In doubt it is not.
    fn is_gone(self) -> bool {
        let Some(process) = Pid::from_raw(self.process) else { return true };
        if test_kill_process(process) == Err(Errno::SRCH) {
            return true;
        }
        started(process).is_ok_and(|started| started != Some(self.started))
    }
}

/// When a process started, in ticks since boot; `None` for one that has ended and was not waited for. Linux man page `proc_pid_stat(5)`.
fn started(process: Pid) -> io::Result<Option<u64>> {
    let stat = fs::read_to_string(format!("/proc/{}/stat", process.as_raw_nonzero()))?;
    // The name before may have anything in it but ends the last parenthesis.
    let fields: Vec<&str> =
        stat.rsplit_once(')').map_or(Vec::new(), |(_, rest)| rest.split_whitespace().collect());
    let (Some(state), Some(started)) = (fields.first(), fields.get(19)) else {
        return Err(io::ErrorKind::InvalidData.into());
    };
    if matches!(*state, "Z" | "X") {
        return Ok(None);
    }
    started.parse().map(Some).map_err(|_| io::ErrorKind::InvalidData.into())
}

/// Kills what is left in the groups of processes of this namespace that are gone, and removes them.
fn clear(folder: &Path, namespace: u64) -> Result<Cleared, GroupError> {
    let mut cleared = Cleared::default();
    for entry in fs::read_dir(folder).map_err(GroupError::at("list the control group", folder))? {
        let Ok(entry) = entry else { continue };
        let owner = entry.file_name().to_str().and_then(Owner::of_group);
        if !owner.is_some_and(|owner| owner.namespace == namespace && owner.is_gone()) {
            continue;
        }
        let path = entry.path();
        // Another process may be clearing it as well; whoever removes it has done it.
        let ran = kill(&path).unwrap_or(false);
        if fs::remove_dir(&path).is_ok() {
            cleared.groups += 1;
            cleared.monitors += usize::from(ran);
        }
    }
    Ok(cleared)
}

/// Kills all there is in a group and waits for its end; false when there was nothing.
fn kill(group: &Path) -> io::Result<bool> {
    let events = File::open(group.join("cgroup.events"))?;
    if !is_populated(&events)? {
        return Ok(false);
    }
    fs::write(group.join("cgroup.kill"), "1")?;
    while is_populated(&events)? {
        let mut changed = [PollFd::new(&events, PollFlags::PRI)];
        if poll(&mut changed, Some(&KILL_LIMIT))? == 0 {
            break;
        }
    }
    Ok(true)
}

fn is_populated(events: &File) -> io::Result<bool> {
    let mut text = [0; 256];
    let count = std::os::unix::fs::FileExt::read_at(events, &mut text, 0)?;
    Ok(String::from_utf8_lossy(&text[..count]).lines().any(|line| line == "populated 1"))
}

/// The group of one monitor.
#[derive(Debug)]
pub(super) struct Group {
    path: PathBuf,
    directory: OwnedFd,
    /// The guest memory it is bounded for; 0 for none yet.
    guest_bytes: AtomicU64,
}

impl Group {
    /// Bounds what a monitor may have whose guest has so much memory, before it is told to make it. A machine that becomes another is
    /// of the same size, and is bounded already.
    pub(super) fn bound(&self, guest_bytes: u64) -> Result<(), GroupError> {
        if self.guest_bytes.swap(guest_bytes, Ordering::Relaxed) == guest_bytes {
            return Ok(());
        }
        self.write("memory.max", bound_bytes(guest_bytes))
    }

    fn write(&self, file: &str, value: u64) -> Result<(), GroupError> {
        let path = self.path.join(file);
        fs::write(&path, value.to_string()).map_err(GroupError::at("write", &path))
    }

    /// Removes the group of a process that has ended, and says whether it had been killed for its memory.
    pub(super) fn remove(&self) -> bool {
        let events = fs::read_to_string(self.path.join("memory.events")).unwrap_or_default();
        // What stays for whatever reason is cleared once this process is gone.
        let _ = fs::remove_dir(&self.path);
        events.lines().filter_map(|line| line.strip_prefix("oom_kill ")).any(|count| count != "0")
    }
}

impl AsFd for Group {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.directory.as_fd()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_group_says_whose_it_is() {
        let owner = Owner::this().expect("a process");
        assert_eq!(Owner::of_group(&owner.group_name(7)), Some(owner));
        for other in
            ["kiln-1-2-3", "kiln-1-2-3-4-5", "kiln-1-2-3-x", "kiln-01-2-3-4", "other-1-2-3-4", "kiln"]
        {
            assert_eq!(Owner::of_group(other), None, "{other}");
        }
    }

    #[test]
    fn an_owner_is_gone_when_its_process_is_or_is_another() {
        let owner = Owner::this().expect("a process");
        assert!(!owner.is_gone());
        assert!(Owner { started: owner.started + 1, ..owner }.is_gone());
        let mut child = std::process::Command::new("true").spawn().expect("a process");
        let process = child.id().cast_signed();
        child.wait().expect("it ends");
        assert!(Owner { process, ..owner }.is_gone());
    }

    #[test]
    fn a_folder_that_is_no_control_group_is_refused() {
        let folder = tempfile::tempdir().expect("a folder");
        for path in [folder.path().to_owned(), folder.path().join("none"), PathBuf::from("sys/fs/cgroup")] {
            let error = Groups::open(path.clone()).expect_err("refused");
            assert!(error.to_string().contains(&path.display().to_string()), "{error}");
            assert!(error.hint().contains(CGROUP_VARIABLE), "{}", error.hint());
        }
    }
}
