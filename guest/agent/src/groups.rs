//! The guest's control groups. Linux Documentation/admin-guide/cgroup-v2.rst.
//!
//! ```text
//! /               the agent, its reaper, the kernel
//! └ kiln          no process: what the groups below may have together
//!   ├ commands    all that commands start; the root of all groups, as they see it
//!   │ └ ...       groups of their own making
//!   └ hooks       one hook at a time
//! ```
//! Commands have no way to a file of `kiln`. What is mounted for them begins at their own group, each is born in a namespace whose root that
//! is, and so is everything they can mount anew. So what bounds them is out of reach of their root, whatever it may write.

use alloc::format;
use alloc::string::ToString as _;

use kiln_protocol::Failed;
use kiln_protocol::mailbox::Bounds;
use rustix::fd::{AsFd, BorrowedFd, OwnedFd};
use rustix::fs::{AtFlags, Mode, OFlags};
use rustix::io::Errno;

use crate::failure::internal;
use crate::freezer;

/// The group whose bounds hold for all below it.
const BOUNDED: &str = "kiln";
/// The group of commands, from the root.
pub(crate) const COMMANDS: &str = "kiln/commands";
/// The group of hooks, which run while commands are frozen.
const HOOKS: &str = "kiln/hooks";
/// Where commands are born, in their own group, once its users have divided it among groups: no process may be beside these.
const LATE: &str = "kiln";
/// What groups can be bounded by, as far as the kernel knows it.
const CONTROLLERS: [&[u8]; 3] = [b"+memory", b"+cpuset", b"+pids"];
/// What `memory.events` takes: some lines of a word and a number.
const EVENTS_BYTES: usize = 512;

/// The guest's control groups.
pub struct Groups {
    root: OwnedFd,
    bounded: OwnedFd,
    commands: OwnedFd,
}

impl Groups {
    /// The groups below `root`, a directory of a cgroup2 file system; they are made there.
    ///
    /// # Errors
    /// What mkdir(2) and open(2) report.
    pub fn below(root: OwnedFd) -> Result<Self, Errno> {
        let bounded = make(&root, BOUNDED)?;
        // Ahead of the first process, so that all it ever takes is counted, and nothing has to be moved from one count to another. A
        // kernel without one of them cannot bound by it.
        for group in [&root, &bounded] {
            for controller in CONTROLLERS {
                let _ = write(group, "cgroup.subtree_control", controller);
            }
        }
        let commands = make(&root, COMMANDS)?;
        Ok(Self { root, bounded, commands })
    }

    /// Where a command is born.
    pub(crate) fn commands(&self) -> BorrowedFd<'_> {
        self.commands.as_fd()
    }

    /// Where a command is born that is not taken there.
    pub(crate) fn late(&self) -> Result<OwnedFd, Errno> {
        make(&self.commands, LATE)
    }

    /// Where a hook is born, and [ends](Self::end_hook) with all it leaves behind: a new group for each, for what is born
    /// into a group that has been killed can die of it (Linux since 6.14).
    pub(crate) fn hook(&self) -> Result<OwnedFd, Errno> {
        match rustix::fs::unlinkat(&self.root, HOOKS, AtFlags::REMOVEDIR) {
            Ok(()) | Err(Errno::NOENT) => make(&self.root, HOOKS),
            Err(error) => Err(error),
        }
    }

    /// Kills what is left in the group of a hook, and removes it.
    pub(crate) fn end_hook(&self, group: &OwnedFd) -> Result<(), Errno> {
        write(group, "cgroup.kill", b"1")?;
        freezer::wait_until_empty(group)?;
        rustix::fs::unlinkat(&self.root, HOOKS, AtFlags::REMOVEDIR)
    }

    /// Bounds what commands and hooks may have from now on, together with all that runs since before.
    ///
    /// # Errors
    /// When the kernel has no such bounds, or what runs takes more than it may.
    pub(crate) fn bound(&self, bounds: Bounds) -> Result<(), Failed> {
        if bounds.vcpus > 0 {
            let vcpus = format!("0-{}", bounds.vcpus - 1);
            write(&self.bounded, "cpuset.cpus", vcpus.as_bytes())
                .map_err(|error| internal(&format!("keep processes on {} vCPUs", bounds.vcpus), error))?;
        }
        if bounds.memory_mib > 0 {
            self.bound_memory(bounds.memory_mib).map_err(|error| {
                internal(&format!("keep processes to {} MiB of memory", bounds.memory_mib), error)
            })?;
        }
        Ok(())
    }

    fn bound_memory(&self, mib: u32) -> Result<(), Errno> {
        let killed = kills(&self.bounded)?;
        let bytes = (u64::from(mib) << 20).to_string();
        // That of the commands' own group is for programs to read.
        for group in [&self.bounded, &self.commands] {
            write(group, "memory.max", bytes.as_bytes())?;
        }
        // The kernel makes room, in the end by killing, before it returns.
        if kills(&self.bounded)? == killed { Ok(()) } else { Err(Errno::NOMEM) }
    }
}

/// How many processes below a group were killed for memory.
fn kills(group: &OwnedFd) -> Result<u64, Errno> {
    let events = open(group, "memory.events", OFlags::RDONLY)?;
    let mut text = [0; EVENTS_BYTES];
    let bytes = rustix::io::read(&events, &mut text)?;
    let line = text[..bytes].split(|byte| *byte == b'\n').find_map(|line| line.strip_prefix(b"oom_kill "));
    let count = line.and_then(|count| core::str::from_utf8(count).ok()).and_then(|count| count.parse().ok());
    count.ok_or(Errno::INVAL)
}

fn make(root: &OwnedFd, name: &str) -> Result<OwnedFd, Errno> {
    match rustix::fs::mkdirat(root, name, Mode::from_raw_mode(0o755)) {
        Ok(()) | Err(Errno::EXIST) => {}
        Err(error) => return Err(error),
    }
    open(root, name, OFlags::PATH | OFlags::DIRECTORY)
}

/// Opens a file of a group.
pub(crate) fn open(group: impl AsFd, name: &str, flags: OFlags) -> Result<OwnedFd, Errno> {
    rustix::fs::openat(group, name, flags | OFlags::CLOEXEC, Mode::empty())
}

fn write(group: impl AsFd, name: &str, value: &[u8]) -> Result<(), Errno> {
    let file = open(group, name, OFlags::WRONLY)?;
    // The kernel takes such a value whole or not at all.
    rustix::io::write(&file, value).map(|_| ())
}
