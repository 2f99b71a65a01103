//! What can go wrong with getting an image, and whose fault it is.

use std::fmt;
use std::io;
use std::path::PathBuf;
use std::sync::Arc;

use kiln_rootfs::LayerError;
use kiln_store::StoreError;

use crate::{ParseSourceError, Platform};

/// Whose fault a failure is; it decides what a program does about it and with which code it ends.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Blame {
    /// Whoever asked: there is no such image, or not for them.
    Caller,
    /// The image or where it comes from: malformed, damaged, unreachable.
    Source,
    /// This machine: no space, no permission.
    Host,
    /// Kiln.
    Kiln,
}

/// What can go wrong with getting an image. Each names the thing.
#[derive(Debug, thiserror::Error)]
pub enum PullError {
    /// The text says no image.
    #[error(transparent)]
    Name(#[from] ParseSourceError),
    /// The image is not in the store, and may not be fetched or has nowhere to be fetched from.
    #[error("{name} is not in the store{}", for_platform(platform.as_ref()))]
    NotInStore {
        /// What was asked for.
        name: String,
        /// For which platform.
        platform: Option<Platform>,
    },
    /// The source has no such image.
    #[error("{what} does not exist: {why}")]
    NotFound {
        /// What was asked for.
        what: String,
        /// What the source said.
        why: String,
    },
    /// The registry does not give it to this user.
    #[error("{what}: access denied: {why}")]
    Denied {
        /// What was asked for.
        what: String,
        /// What the registry said.
        why: String,
        /// Whether credentials for the registry were found and used.
        with_credentials: bool,
    },
    /// There is no image for the platform.
    #[error("{name} has no image for {wanted}, it has: {}", available.join(", "))]
    NoPlatform {
        /// What was asked for.
        name: String,
        /// The platform wanted.
        wanted: Platform,
        /// The platforms there are.
        available: Vec<String>,
    },
    /// It is there, well-formed, and nothing Kiln can run.
    #[error("{what} cannot be used: {why}")]
    Unsupported {
        /// The thing.
        what: String,
        /// Why not.
        why: String,
    },
    /// It is not what the specification says it must be.
    #[error("{what} is malformed: {why}")]
    Malformed {
        /// The thing.
        what: String,
        /// What is wrong.
        why: String,
    },
    /// It is not what its digest says, or ends early.
    #[error("{what} is corrupt: {why}")]
    Corrupt {
        /// The thing.
        what: String,
        /// What is wrong.
        why: String,
    },
    /// The registry cannot be reached or does not answer.
    #[error("cannot reach {host}: {why}")]
    Unreachable {
        /// The host that was asked.
        host: String,
        /// What happened.
        why: String,
        /// What would help.
        hint: Option<&'static str>,
    },
    /// The registry answers with an error.
    #[error("{host} failed to give {what}: {why}")]
    Registry {
        /// The host that was asked.
        host: String,
        /// What for.
        what: String,
        /// What it said.
        why: String,
    },
    /// The user's credentials cannot be read.
    #[error("credentials for {registry}: {why}")]
    Credentials {
        /// For which registry.
        registry: String,
        /// What is wrong.
        why: String,
    },
    /// A file of a local source cannot be read.
    #[error("cannot read {}", path.display())]
    File {
        /// The file.
        path: PathBuf,
        /// Why not.
        source: io::Error,
    },
    /// A layer cannot be made into a file system.
    #[error("layer {layer} cannot be used")]
    Layer {
        /// The layer's digest.
        layer: String,
        /// Why not.
        source: LayerError,
    },
    /// The layers cannot be merged.
    #[error("the layers of {image} cannot be merged")]
    Merge {
        /// The image's digest.
        image: String,
        /// Why not.
        source: Arc<dyn std::error::Error + Send + Sync>,
    },
    /// The store failed.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// Kiln failed.
    #[error("internal error: {0}")]
    Internal(String),
}

impl PullError {
    /// Whose fault it is.
    pub fn blame(&self) -> Blame {
        match self {
            Self::Name(_)
            | Self::NotInStore { .. }
            | Self::NotFound { .. }
            | Self::Denied { .. }
            | Self::NoPlatform { .. }
            | Self::Unsupported { .. }
            | Self::File { .. }
            | Self::Credentials { .. } => Blame::Caller,
            Self::Malformed { .. }
            | Self::Corrupt { .. }
            | Self::Unreachable { .. }
            | Self::Registry { .. }
            | Self::Layer { .. }
            | Self::Merge { .. } => Blame::Source,
            Self::Store(_) => Blame::Host,
            Self::Internal(_) => Blame::Kiln,
        }
    }

    /// What the user can do about it, if anything.
    pub fn hint(&self) -> Option<String> {
        let text = match self {
            Self::NotInStore { name, .. } => return Some(format!("kiln pull {name}")),
            Self::NotFound { .. } => "check the name and the tag",
            Self::Denied { with_credentials: false, .. } => {
                "check the name; if it is private, put credentials into ~/.docker/config.json (docker login, skopeo login)"
            }
            Self::Denied { with_credentials: true, .. } => {
                "the credentials found in the docker config do not open it; log in again"
            }
            Self::NoPlatform { .. } => "name one of them with --platform",
            Self::Corrupt { .. } => "try again; if it stays, the image must be pushed again",
            Self::Unreachable { hint, .. } => return hint.map(ToOwned::to_owned),
            Self::Store(error) => return error.hint(),
            _ => return None,
        };
        Some(text.to_owned())
    }

    /// The error of a file of a local source.
    pub(crate) fn file(path: &std::path::Path) -> impl FnOnce(io::Error) -> Self + use<> {
        let path = path.to_owned();
        |source| Self::File { path, source }
    }
}

fn for_platform(platform: Option<&Platform>) -> String {
    platform.map(|platform| format!(" for {platform}")).unwrap_or_default()
}

/// Text from a stranger, made fit for a terminal: one line, no control characters, not long.
pub(crate) fn plain(text: impl fmt::Display) -> String {
    const MAX_CHARS: usize = 300;
    let text = text.to_string();
    let mut plain: String =
        text.chars().map(|c| if c.is_control() { ' ' } else { c }).take(MAX_CHARS).collect();
    if text.chars().count() > MAX_CHARS {
        plain.push('…');
    }
    plain.trim().to_owned()
}
