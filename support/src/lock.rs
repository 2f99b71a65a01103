//! Locks between processes: `flock` on a file, released when the holder drops it or dies.

use std::fs::{File, OpenOptions};
use std::io;
use std::path::Path;

use rustix::fs::{FlockOperation, flock};
use rustix::io::Errno;

/// A lock held; released when dropped.
#[derive(Debug)]
#[must_use]
pub struct Lock {
    _file: File,
}

impl Lock {
    /// Waits until nobody holds the lock exclusively. The file is made when it is missing.
    ///
    /// # Errors
    /// What the file system says.
    pub fn shared(path: &Path) -> io::Result<Self> {
        Self::take(path, FlockOperation::LockShared)
    }

    /// Waits until nobody else holds the lock. The file is made when it is missing.
    ///
    /// # Errors
    /// What the file system says.
    pub fn exclusive(path: &Path) -> io::Result<Self> {
        Self::take(path, FlockOperation::LockExclusive)
    }

    /// Takes the lock alone if nobody else holds it; `None` if somebody does. The file is made when it is missing.
    ///
    /// # Errors
    /// What the file system says.
    pub fn try_exclusive(path: &Path) -> io::Result<Option<Self>> {
        match Self::take(path, FlockOperation::NonBlockingLockExclusive) {
            Ok(lock) => Ok(Some(lock)),
            Err(error) if error.raw_os_error() == Some(Errno::WOULDBLOCK.raw_os_error()) => Ok(None),
            Err(error) => Err(error),
        }
    }

    // Each lock opens the file anew: flock belongs to the open file, and two threads must not share one.
    fn take(path: &Path, operation: FlockOperation) -> io::Result<Self> {
        let file = OpenOptions::new().read(true).write(true).create(true).truncate(false).open(path)?;
        rustix::io::retry_on_intr(|| flock(&file, operation))?;
        Ok(Self { _file: file })
    }
}
