//! Waiting for files to change.

use std::io;
use std::mem::MaybeUninit;
use std::os::fd::OwnedFd;
use std::path::Path;

use rustix::fs::inotify::{self, CreateFlags, WatchFlags};
use rustix::io::Errno;
use tokio::io::Interest;

use super::DetachedError;
use crate::readiness::Readiness;

/// Room for what happened; the rest is read on the next turn.
const BUFFER_BYTES: usize = 4096;

/// Tells that files of a folder have changed. Linux man page inotify(7).
#[derive(Debug)]
pub struct Watch {
    inotify: OwnedFd,
    readiness: Readiness,
}

impl Watch {
    /// Watches a folder from here on: what changes later is told, even if nobody waits then.
    pub(super) fn new(folder: &Path) -> Result<Self, DetachedError> {
        Self::open(folder).map_err(DetachedError::io("watch", folder))
    }

    fn open(folder: &Path) -> io::Result<Self> {
        let inotify = inotify::init(CreateFlags::NONBLOCK | CreateFlags::CLOEXEC)?;
        let changes =
            WatchFlags::MODIFY | WatchFlags::CREATE | WatchFlags::MOVED_TO | WatchFlags::DELETE_SELF;
        inotify::add_watch(&inotify, folder, changes | WatchFlags::ONLYDIR)?;
        let readiness = Readiness::of(inotify.try_clone()?)?;
        Ok(Self { inotify, readiness })
    }

    /// Waits until something has changed since this was last called. Safe to cancel.
    pub async fn changed(&mut self) {
        // The kernel has no reason to fail this; if it did, looking once too often harms nobody.
        let _ = self
            .readiness
            .when(Interest::READABLE, || {
                let mut buffer = [MaybeUninit::uninit(); BUFFER_BYTES];
                let mut changes = inotify::Reader::new(&self.inotify, &mut buffer);
                let mut changed = false;
                loop {
                    match changes.next() {
                        Ok(_) => changed = true,
                        Err(Errno::INTR) => {}
                        Err(Errno::AGAIN) if changed => return Ok(()),
                        Err(errno) => return Err(errno.into()),
                    }
                }
            })
            .await;
    }
}

#[cfg(test)]
mod tests {
    use std::fs::{self, OpenOptions};
    use std::io::Write as _;
    use std::time::Duration;

    use super::*;

    /// It stops a test that hangs.
    const LIMIT: Duration = Duration::from_mins(1);

    #[tokio::test]
    async fn a_change_is_told_that_came_before_the_wait() {
        let folder = tempfile::tempdir().expect("a folder");
        let path = folder.path().join("file");
        fs::write(&path, "a").expect("written");
        let mut watch = Watch::new(folder.path()).expect("watched");
        let mut file = OpenOptions::new().append(true).open(&path).expect("there");
        for _ in 0..3 {
            file.write_all(b"b").expect("written");
            tokio::time::timeout(LIMIT, watch.changed()).await.expect("told");
        }
        fs::write(folder.path().join("aside"), "c").expect("written");
        tokio::time::timeout(LIMIT, watch.changed()).await.expect("told");
        fs::rename(folder.path().join("aside"), &path).expect("renamed");
        tokio::time::timeout(LIMIT, watch.changed()).await.expect("told");
    }
}
