//! The program that monitors are made from.

use std::fmt;
use std::fs::{self, File};
use std::io;
use std::os::fd::AsFd as _;
use std::os::unix::fs::MetadataExt as _;
use std::path::PathBuf;
use std::sync::Arc;

use kiln_jail::Program;
use kiln_support::digest::{Digest, Hasher};

use super::{MONITOR_NAME, MonitorError};
use crate::BuiltIn;
use crate::bundle::{GUEST_DIR_NAME, GUEST_DIR_VARIABLE};
use crate::sealed::{Use, sealed};

/// The environment variable that names a monitor.
const MONITOR_VARIABLE: &str = "KILN_MONITOR";

/// The executable that monitors are made from.
///
/// A monitor that is a program of its own starts in half the time of one that is also something else, for it is linked
/// statically and small.
#[derive(Clone, Debug)]
pub struct MonitorProgram {
    source: Source,
}

#[derive(Clone, Debug)]
enum Source {
    Path(PathBuf),
    BuiltIn { sha256: Digest, file: Arc<File> },
}

impl MonitorProgram {
    /// The running program itself. Its `main` must hand over to the monitor when `argv[0]` is [`MONITOR_NAME`].
    pub fn this() -> Self {
        Self::at("/proc/self/exe")
    }

    /// Another executable: what a program names that embeds this library, usually the installed `kiln`.
    pub fn at(path: impl Into<PathBuf>) -> Self {
        Self { source: Source::Path(path.into()) }
    }

    /// The monitor of a program that embeds this library: `kiln-monitor`, where the environment's `KILN_MONITOR` names it, in the folder that
    /// [`KILN_GUEST_DIR`](crate::bundle::GUEST_DIR_VARIABLE) names, or in `kiln-guest/` beside the executable.
    ///
    /// # Errors
    /// [`MonitorError::NoProgram`] with the places.
    pub fn find() -> Result<Self, MonitorError> {
        let named =
            |variable| std::env::var_os(variable).filter(|value| !value.is_empty()).map(PathBuf::from);
        if let Some(program) = named(MONITOR_VARIABLE) {
            return Ok(Self::at(program));
        }
        let beside = std::env::current_exe().ok().and_then(|exe| Some(exe.parent()?.join(GUEST_DIR_NAME)));
        let looked_in: Vec<PathBuf> = named(GUEST_DIR_VARIABLE)
            .into_iter()
            .chain(beside)
            .map(|folder| folder.join(MONITOR_NAME))
            .collect();
        match looked_in.iter().find(|path| path.exists()) {
            Some(program) => Ok(Self::at(program)),
            None => Err(MonitorError::NoProgram { looked_in }),
        }
    }

    /// A monitor that is part of a program, as `kiln` has one.
    ///
    /// It is executed from a file in memory that nobody can change, which this makes: once is enough for a process, since a clone
    /// is the same file. Cost: a copy of `program`, in time and for as long as a clone or a machine lives.
    ///
    /// # Errors
    /// When the host has no memory or descriptors left, and `PermissionDenied` when it lets no file in memory be executed
    /// (`vm.memfd_noexec=2`).
    pub fn built_in(program: BuiltIn) -> io::Result<Self> {
        let file = Arc::new(sealed(MONITOR_NAME, program.bytes, Use::Executing)?);
        Ok(Self { source: Source::BuiltIn { sha256: program.sha256, file } })
    }

    pub(super) fn executable(&self) -> Program<'_> {
        match &self.source {
            Source::Path(path) => Program::Path(path),
            Source::BuiltIn { file, .. } => Program::File(file.as_fd()),
        }
    }

    /// What tells this program from any other without reading it: the digest of one that is built in, and of a file
    /// how long it is and when its content was last changed.
    pub(crate) fn identity(&self) -> io::Result<Digest> {
        let mut hasher = Hasher::new();
        match &self.source {
            Source::BuiltIn { sha256, .. } => {
                hasher.update(b"built in");
                hasher.update(sha256.as_bytes());
            }
            Source::Path(path) => {
                let metadata = fs::metadata(path)?;
                hasher.update(b"file");
                for number in [metadata.size(), metadata.mtime() as u64, metadata.mtime_nsec() as u64] {
                    hasher.update(&number.to_le_bytes());
                }
            }
        }
        Ok(hasher.finish())
    }
}

impl fmt::Display for MonitorProgram {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.source {
            Source::Path(path) => path.display().fmt(formatter),
            Source::BuiltIn { .. } => write!(formatter, "{MONITOR_NAME} (built in)"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_built_in_monitor_is_known_by_its_content_in_every_process() {
        let program = |bytes| MonitorProgram::built_in(BuiltIn { bytes, sha256: Digest::of(bytes) });
        let identity = |bytes| program(bytes).and_then(|program| program.identity()).expect("known");
        assert_eq!(identity(b"one"), identity(b"one"));
        assert_ne!(identity(b"one"), identity(b"two"));
    }

    #[test]
    fn a_file_is_known_by_its_length_and_its_last_change() {
        let folder = tempfile::tempdir().expect("a folder");
        let path = folder.path().join("monitor");
        let identity = || MonitorProgram::at(&path).identity();
        assert!(identity().is_err());
        fs::write(&path, "one").expect("written");
        let before = identity().expect("known");
        assert_eq!(before, identity().expect("known"));
        fs::write(&path, "three").expect("written");
        assert_ne!(before, identity().expect("known"));
    }
}
