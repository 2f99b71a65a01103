//! What can go wrong with the store.

use std::io;
use std::path::{Path, PathBuf};

/// What can go wrong with the store. All of it is the host's doing, never that of an image or a guest.
#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    /// The file system refused.
    #[error("cannot {action} {}", path.display())]
    Io {
        /// What was tried.
        action: &'static str,
        /// On what.
        path: PathBuf,
        /// Why it failed.
        source: io::Error,
    },
    /// There is no room. Nothing half-written is left.
    #[error("no space left on the disk of {}", path.display())]
    Full {
        /// What was being written.
        path: PathBuf,
    },
    /// Something in the store is not what was put there.
    #[error("{what} in the store is damaged: {why}")]
    Damaged {
        /// The thing.
        what: String,
        /// What is wrong with it.
        why: String,
    },
    /// Something another thing in the store relies on is not there.
    #[error("{what} is missing from the store")]
    Missing {
        /// The thing.
        what: String,
    },
    /// The store was written by a version of Kiln this one does not know.
    #[error("the store at {} has format {found:?}, this kiln knows {known:?}", root.display())]
    Format {
        /// The store's root.
        root: PathBuf,
        /// What it says of itself.
        found: String,
        /// What this version writes.
        known: &'static str,
    },
    /// There is no place for the store.
    #[error("neither XDG_DATA_HOME nor HOME is set to an absolute path, so there is no place for the store")]
    NoHome,
    /// More was put than the store takes.
    #[error("{what} has {bytes} bytes, the store takes at most {limit}")]
    TooLarge {
        /// The thing.
        what: &'static str,
        /// Its size.
        bytes: u64,
        /// The limit.
        limit: u64,
    },
}

impl StoreError {
    /// What the user can do about it, if anything.
    pub fn hint(&self) -> Option<String> {
        match self {
            Self::Full { .. } => Some(
                "free some space, remove images (kiln rmi NAME), or use another disk (--root DIR)".to_owned(),
            ),
            Self::Damaged { .. } | Self::Missing { .. } => Some(
                "kiln pull --verify NAME checks every byte of the image and fetches what is damaged again"
                    .to_owned(),
            ),
            Self::Format { .. } => {
                Some("use the kiln that made it, or another store (--root DIR)".to_owned())
            }
            Self::NoHome => Some("name a place (--root DIR)".to_owned()),
            Self::Io { source, .. } => match source.kind() {
                io::ErrorKind::PermissionDenied | io::ErrorKind::ReadOnlyFilesystem => {
                    Some("use a store you may write to (--root DIR)".to_owned())
                }
                _ => None,
            },
            Self::TooLarge { .. } => None,
        }
    }

    /// True when fetching the content again would repair it.
    pub fn is_damage(&self) -> bool {
        matches!(self, Self::Damaged { .. } | Self::Missing { .. })
    }

    pub(crate) fn damaged(what: impl Into<String>, why: impl Into<String>) -> Self {
        Self::Damaged { what: what.into(), why: why.into() }
    }
}

/// Names the action and the path an I/O error belongs to.
pub(crate) trait Context<T> {
    fn context(self, action: &'static str, path: &Path) -> Result<T, StoreError>;
}

impl<T> Context<T> for io::Result<T> {
    fn context(self, action: &'static str, path: &Path) -> Result<T, StoreError> {
        self.map_err(|source| match source.kind() {
            io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => {
                StoreError::Full { path: path.to_owned() }
            }
            _ => StoreError::Io { action, path: path.to_owned(), source },
        })
    }
}
