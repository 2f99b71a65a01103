//! Stops the guest's processes, all at one time, and lets them go on.
//!
//! Commands are born in a control group of their own; the agent and its reaper are in the root group, which nobody can
//! freeze. The guest's root may make further groups beside the commands' own and move its processes there, so every
//! group below the root is frozen. It cannot move them into the root group, whose lists of processes are read-only to
//! it; a program that goes out of its way to be born there (`CLONE_INTO_CGROUP`) is not frozen. Linux
//! Documentation/admin-guide/cgroup-v2.rst, "cgroup.freeze".

use alloc::format;
use alloc::vec::Vec;

use kiln_protocol::Failed;
use rustix::event::{PollFd, PollFlags};
use rustix::fd::{AsFd, BorrowedFd, OwnedFd};
use rustix::fs::{AtFlags, FileType, Mode, OFlags, RawDir};
use rustix::io::Errno;

use crate::failure::{internal, invalid};
use crate::session::one_shot;

/// The group of commands.
const COMMANDS: &str = "kiln";
/// The group of hooks, which run while all others are frozen.
const HOOKS: &str = "kiln-hooks";
/// The longest processes may take to stop: one that waits for a disk does not, until it has its answer.
const STOP_MS: u64 = 5_000;
/// How often the groups are looked at anew, because there was one more.
const MAX_ROUNDS: usize = 16;
/// The most groups below the root.
const MAX_GROUPS: usize = 64;
/// What `cgroup.events` takes: two lines.
const EVENTS_BYTES: usize = 128;
/// What directory entries are read into at a time.
const ENTRIES_BYTES: usize = 4096;

/// The guest's control groups.
pub struct Groups {
    root: OwnedFd,
    commands: OwnedFd,
}

/// Groups that have been frozen; [`thaw`](Frozen::thaw) lets their processes go on.
#[derive(Default)]
pub(crate) struct Frozen(Vec<OwnedFd>);

impl Groups {
    /// The groups below `root`, a directory of a cgroup2 file system; the commands' own is made there.
    ///
    /// # Errors
    /// What mkdir(2) and open(2) report.
    pub fn below(root: OwnedFd) -> Result<Self, Errno> {
        let commands = make(&root, COMMANDS)?;
        Ok(Self { root, commands })
    }

    /// Where a command is born.
    pub(crate) fn commands(&self) -> BorrowedFd<'_> {
        self.commands.as_fd()
    }

    /// Where a hook is born, and [ends](Self::end_hook) with all it leaves behind: a new group for each, for what is born
    /// into a group that has been killed can die of it (Linux since 6.14).
    ///
    /// # Errors
    /// `EXIST` when the guest's root has a group of that name with processes in it, which are frozen, and so would the hook be.
    pub(crate) fn hook(&self) -> Result<OwnedFd, Errno> {
        match rustix::fs::unlinkat(&self.root, HOOKS, AtFlags::REMOVEDIR) {
            Ok(()) | Err(Errno::NOENT) => make(&self.root, HOOKS),
            Err(_) => Err(Errno::EXIST),
        }
    }

    /// Kills what is left in the group of a hook, and removes it.
    pub(crate) fn end_hook(&self, group: &OwnedFd) -> Result<(), Errno> {
        let switch = open(group, "cgroup.kill", OFlags::WRONLY)?;
        rustix::io::write(&switch, b"1")?;
        let events = open(group, "cgroup.events", OFlags::RDONLY)?;
        wait_for(b"populated 0", &events, &one_shot(STOP_MS)?)?;
        rustix::fs::unlinkat(&self.root, HOOKS, AtFlags::REMOVEDIR)
    }

    /// Freezes every group, and waits until no process of theirs runs.
    ///
    /// # Errors
    /// When one does not stop in time, or is in too many groups; all go on then.
    pub(crate) fn freeze(&self) -> Result<Frozen, Failed> {
        let mut frozen = Frozen::default();
        let outcome = self.freeze_all(&mut frozen);
        if outcome.is_err() {
            frozen.thaw();
            return outcome.map(|()| Frozen::default());
        }
        Ok(frozen)
    }

    fn freeze_all(&self, frozen: &mut Frozen) -> Result<(), Failed> {
        let timer = one_shot(STOP_MS).map_err(|error| internal("make a timer", error))?;
        // A process may have made a group and moved there behind our back. Once a look finds nothing new, all are frozen, and
        // nobody is left to make another.
        for _ in 0..MAX_ROUNDS {
            let groups = self.list().map_err(|error| internal("list the control groups", error))?;
            if groups.len() > MAX_GROUPS {
                return Err(invalid(format!("more than {MAX_GROUPS} control groups")));
            }
            let (before, mut waiting) = (frozen.0.len(), Vec::new());
            for group in &groups {
                if let Some(switch) =
                    switch_off(group).map_err(|error| internal("freeze processes", error))?
                {
                    frozen.0.push(switch);
                }
                let events = open(group, "cgroup.events", OFlags::RDONLY);
                waiting.push(events.map_err(|error| internal("watch a control group", error))?);
            }
            for events in &waiting {
                wait_for(b"frozen 1", events, &timer)
                    .map_err(|error| internal("stop the guest's processes", error))?;
            }
            if frozen.0.len() == before {
                return Ok(());
            }
        }
        Err(invalid("processes make control groups faster than they can be frozen".into()))
    }

    /// The groups right below the root, one more than there may be at most.
    fn list(&self) -> Result<Vec<OwnedFd>, Errno> {
        let mut groups = Vec::new();
        rustix::fs::seek(&self.root, rustix::fs::SeekFrom::Start(0))?;
        let mut buffer = Vec::with_capacity(ENTRIES_BYTES);
        let mut entries = RawDir::new(&self.root, buffer.spare_capacity_mut());
        while let Some(entry) = entries.next() {
            let entry = entry?;
            let name = entry.file_name();
            if entry.file_type() != FileType::Directory || name == c"." || name == c".." {
                continue;
            }
            if groups.len() > MAX_GROUPS {
                break;
            }
            match rustix::fs::openat(
                &self.root,
                name,
                OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC,
                Mode::empty(),
            ) {
                Ok(group) => groups.push(group),
                // It has just been removed, so it was empty.
                Err(Errno::NOENT) => {}
                Err(error) => return Err(error),
            }
        }
        Ok(groups)
    }
}

impl Frozen {
    /// Lets the processes go on.
    pub(crate) fn thaw(self) {
        for switch in &self.0 {
            // A group that is gone has nobody in it.
            let _ = rustix::io::write(switch, b"0");
        }
    }
}

/// Has a group freeze; its switch, or `None` when the guest's own root had frozen it before, in which case it stays.
fn switch_off(group: &OwnedFd) -> Result<Option<OwnedFd>, Errno> {
    let switch = open(group, "cgroup.freeze", OFlags::RDWR)?;
    let mut state = [b'0'; 2];
    rustix::io::read(&switch, &mut state)?;
    if state[0] == b'1' {
        return Ok(None);
    }
    rustix::io::write(&switch, b"1")?;
    Ok(Some(switch))
}

/// Waits until `cgroup.events` has the line `wanted`, or the timer's time is up.
fn wait_for(wanted: &[u8], events: &OwnedFd, timer: &OwnedFd) -> Result<(), Errno> {
    loop {
        let mut text = [0; EVENTS_BYTES];
        let bytes = rustix::io::pread(events, &mut text, 0)?;
        if text[..bytes].split(|byte| *byte == b'\n').any(|line| line == wanted) {
            return Ok(());
        }
        let mut files = [PollFd::new(events, PollFlags::PRI), PollFd::new(timer, PollFlags::IN)];
        match rustix::event::poll(&mut files, None) {
            Ok(_) if !files[1].revents().is_empty() => return Err(Errno::TIMEDOUT),
            Ok(_) | Err(Errno::INTR) => {}
            Err(error) => return Err(error),
        }
    }
}

fn make(root: &OwnedFd, name: &str) -> Result<OwnedFd, Errno> {
    match rustix::fs::mkdirat(root, name, Mode::from_raw_mode(0o755)) {
        Ok(()) | Err(Errno::EXIST) => {}
        Err(error) => return Err(error),
    }
    open(root, name, OFlags::PATH | OFlags::DIRECTORY)
}

fn open(directory: &OwnedFd, name: &str, flags: OFlags) -> Result<OwnedFd, Errno> {
    rustix::fs::openat(directory, name, flags | OFlags::CLOEXEC, Mode::empty())
}
