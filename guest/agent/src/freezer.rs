//! Stops the guest's processes, all at one time, and lets them go on.
//!
//! Commands, and whatever they start, are in one control group and in groups that their root makes below it, which freeze with it. It has
//! no way out of there. Linux Documentation/admin-guide/cgroup-v2.rst, "cgroup.freeze".

use kiln_protocol::Failed;
use rustix::event::{PollFd, PollFlags};
use rustix::fd::{AsFd, OwnedFd};
use rustix::fs::OFlags;
use rustix::io::Errno;

use crate::failure::internal;
use crate::groups::{Groups, open};
use crate::session::one_shot;

/// The longest processes may take to stop: one that waits for a disk does not, until it has its answer.
const STOP_MS: u64 = 5_000;
/// What `cgroup.events` takes: two lines.
const EVENTS_BYTES: usize = 128;

/// Processes that have been frozen; [`thaw`](Frozen::thaw) lets them go on.
#[derive(Default)]
pub(crate) struct Frozen(Option<OwnedFd>);

impl Groups {
    /// Freezes all commands, and waits until no process of theirs runs.
    ///
    /// # Errors
    /// When one does not stop in time; all go on then.
    pub(crate) fn freeze(&self) -> Result<Frozen, Failed> {
        let group = self.commands();
        let switch = open(group, "cgroup.freeze", OFlags::WRONLY);
        let switch = switch.map_err(|error| internal("find the switch of a control group", error))?;
        rustix::io::write(&switch, b"1").map_err(|error| internal("freeze processes", error))?;
        let frozen = Frozen(Some(switch));
        match wait_for(b"frozen 1", group) {
            Ok(()) => Ok(frozen),
            Err(error) => {
                frozen.thaw();
                Err(internal("stop the guest's processes", error))
            }
        }
    }
}

impl Frozen {
    /// Lets the processes go on.
    pub(crate) fn thaw(self) {
        if let Some(switch) = self.0 {
            // A group that is gone has nobody in it.
            let _ = rustix::io::write(&switch, b"0");
        }
    }
}

/// Waits until no process is left in a group.
pub(crate) fn wait_until_empty(group: &OwnedFd) -> Result<(), Errno> {
    wait_for(b"populated 0", group)
}

/// Waits until `cgroup.events` has the line `wanted`, as long as processes may take to stop.
fn wait_for(wanted: &[u8], group: impl AsFd) -> Result<(), Errno> {
    let (events, timer) = (open(group, "cgroup.events", OFlags::RDONLY)?, one_shot(STOP_MS)?);
    loop {
        let mut text = [0; EVENTS_BYTES];
        let bytes = rustix::io::pread(&events, &mut text, 0)?;
        if text[..bytes].split(|byte| *byte == b'\n').any(|line| line == wanted) {
            return Ok(());
        }
        let mut files = [PollFd::new(&events, PollFlags::PRI), PollFd::new(&timer, PollFlags::IN)];
        match rustix::event::poll(&mut files, None) {
            Ok(_) if !files[1].revents().is_empty() => return Err(Errno::TIMEDOUT),
            Ok(_) | Err(Errno::INTR) => {}
            Err(error) => return Err(error),
        }
    }
}
