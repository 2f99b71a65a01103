//! What an image wants run when its guest has been restored: the programs in /etc/kiln/on-restore.d.
//!
//! They run one after the other, sorted by name, as root, when the guest is its new self and before any of its
//! processes goes on. What one leaves running ends with it.

use alloc::ffi::CString;
use alloc::format;
use alloc::string::{String, ToString as _};
use alloc::vec;
use alloc::vec::Vec;

use kiln_protocol::{Exec, Failed};
use rustix::event::{PollFd, PollFlags};
use rustix::fd::{AsFd as _, BorrowedFd, OwnedFd};
use rustix::fs::{AtFlags, FileType, Mode, OFlags, RawDir};
use rustix::io::Errno;

use crate::failure::{failed, internal};
use crate::identity::Life;
use crate::session::one_shot;
use crate::signals::SIGKILL;
use crate::sys::{self, Child};
use crate::workload::Workload;

const DIRECTORY: &str = "/etc/kiln/on-restore.d";
/// The most programs run.
const MAX_HOOKS: usize = 32;
/// The most names looked at.
const MAX_NAMES: usize = 1024;
/// How long one may take.
const HOOK_MS: u64 = 10_000;
/// Anybody may execute it.
const EXECUTABLE: u32 = 0o111;
/// What directory entries are read into at a time.
const ENTRIES_BYTES: usize = 4096;

/// The programs there are. Looked up while the guest has time: before it parks.
pub(crate) fn find() -> Vec<CString> {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let directory = match rustix::fs::open(DIRECTORY, flags, Mode::empty()) {
        Ok(directory) => directory,
        Err(Errno::NOENT | Errno::NOTDIR) => return Vec::new(),
        Err(error) => {
            sys::say(format_args!("cannot read {DIRECTORY}: {error:?}"));
            return Vec::new();
        }
    };
    let mut found = programs(&directory);
    if found.len() > MAX_HOOKS {
        sys::say(format_args!("{DIRECTORY}: only the first {MAX_HOOKS} are run"));
        found.truncate(MAX_HOOKS);
    }
    found
}

fn programs(directory: &OwnedFd) -> Vec<CString> {
    let mut found: Vec<CString> = Vec::new();
    let mut buffer = Vec::with_capacity(ENTRIES_BYTES);
    let mut entries = RawDir::new(directory, buffer.spare_capacity_mut());
    for _ in 0..MAX_NAMES {
        let Some(Ok(entry)) = entries.next() else { break };
        let name = entry.file_name();
        // Links are followed, as a shell would, and end inside the image.
        let is_program = rustix::fs::statat(directory, name, AtFlags::empty()).is_ok_and(|stat| {
            FileType::from_raw_mode(stat.st_mode) == FileType::RegularFile && stat.st_mode & EXECUTABLE != 0
        });
        if is_program && let Ok(path) = CString::new([DIRECTORY.as_bytes(), b"/", name.to_bytes()].concat()) {
            // Sorted by name; there are few.
            found.insert(found.partition_point(|other| *other < path), path);
        }
    }
    found
}

/// Runs `programs`, each to its end. What fails is told on the console, and holds up nothing.
pub(crate) fn run(programs: &[CString], workload: &mut Workload, first: Option<BorrowedFd<'_>>, life: &Life) {
    for program in programs {
        if let Err(failed) = run_one(program, workload, first, life) {
            sys::say(format_args!("{}: {}", program.to_string_lossy(), failed.message));
        }
    }
}

fn run_one(
    program: &CString,
    workload: &mut Workload,
    first: Option<BorrowedFd<'_>>,
    life: &Life,
) -> Result<(), Failed> {
    let group = match &workload.place.groups {
        Some(groups) => Some(groups.hook().map_err(|error| internal("make a control group", error))?),
        None => None,
    };
    let argv =
        vec![program.as_bytes().to_vec(), life.counter.to_string().into_bytes(), life.id().into_bytes()];
    let exec = Exec { argv, ..Exec::default() };
    let child = workload.start_hook(exec, first, group.as_ref().map(|group| group.as_fd()))?;
    let outcome = wait(&child);
    workload.hook_has_ended();
    if let (Some(groups), Some(group)) = (&workload.place.groups, &group) {
        groups.end_hook(group).map_err(|error| internal("end what it left running", error))?;
    }
    outcome
}

/// Waits until a hook has ended, or its time is up.
fn wait(child: &Child) -> Result<(), Failed> {
    let reason = |message: String| failed(kiln_protocol::Reason::Internal, message);
    let ended_in_time = ends_in_time(child);
    if !matches!(ended_in_time, Ok(true)) {
        let _ = sys::signal(child.pid, true, SIGKILL);
    }
    let ended = sys::reap(child.pid, true).map_err(|error| internal("reap a hook", error))?;
    if !ended_in_time.map_err(|error| internal("wait for a hook", error))? {
        return Err(reason(format!("killed after {} s", HOOK_MS / 1000)));
    }
    match ended {
        Some(ended) if ended.signal != 0 => Err(reason(format!("ended by signal {}", ended.signal))),
        Some(ended) if ended.code != 0 => Err(reason(format!("ended with exit code {}", ended.code))),
        _ => Ok(()),
    }
}

fn ends_in_time(child: &Child) -> Result<bool, Errno> {
    let timer = one_shot(HOOK_MS)?;
    loop {
        let mut files = [PollFd::new(&child.pidfd, PollFlags::IN), PollFd::new(&timer, PollFlags::IN)];
        match rustix::event::poll(&mut files, None) {
            Ok(_) => return Ok(!files[0].revents().is_empty()),
            Err(Errno::INTR) => {}
            Err(error) => return Err(error),
        }
    }
}
