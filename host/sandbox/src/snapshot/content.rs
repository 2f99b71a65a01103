//! What a template has beside its image: files of the host's, what warm-ups leave, and a service that runs.

use std::ffi::OsStr;
use std::fs::File;
use std::io::{self, Read};
use std::os::unix::fs::{FileExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::sync::Arc;
use std::time::Duration;

use kiln_protocol::{AGENT_PORT, Call, MAX_FILE_BYTES, MAX_FILE_PART_BYTES, Outcome, RemoveFile, WriteFile};
use kiln_support::digest::{Digest, Hasher};
use regex_lite::Regex;
use rustix::fs::OFlags;

use super::BakeError;
use crate::agent::{self, AgentError};
use crate::launch::Launch;
use crate::monitor::Monitor;
use crate::vm::boot::blocking;
use crate::vm::{VmBuilder, VmError};

/// Where a warm-up's script is in the guest while it runs.
const SCRIPT: &str = "/run/kiln-warm-up";
/// The permissions of such a script: whoever the warm-up runs as may read and run it.
const SCRIPT_MODE: u32 = 0o755;
/// How much of a command is shown, in characters.
const SHOWN_CHARS_MAX: usize = 1000;
/// What runs a script without a `#!` line.
const SHELL: &str = "/bin/sh";

/// What is put into a guest, and what it is to have done, before it is saved.
#[derive(Debug, Default)]
pub(crate) struct Content {
    pub(super) files: Vec<(HostFile, String)>,
    pub(super) warmups: Vec<WarmUp>,
    pub(super) code: Option<WarmUpByCode>,
    pub(super) service: Option<Service>,
}

/// Code of the caller's that warms a guest up.
pub(super) struct WarmUpByCode {
    /// Says what it does.
    pub(super) tag: String,
    pub(super) code: crate::baked::WarmUp,
    /// How commands run in the guest unless told otherwise.
    pub(super) launch: Arc<Launch>,
}

impl std::fmt::Debug for WarmUpByCode {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        formatter.debug_tuple("WarmUpByCode").field(&self.tag).finish()
    }
}

/// A command that runs to its end before the snapshot is made.
#[derive(Debug)]
pub(super) struct WarmUp {
    pub(super) launch: Launch,
    /// What its command is in the guest.
    pub(super) script: Option<HostFile>,
}

/// A command that runs when the snapshot is made.
#[derive(Debug)]
pub(super) struct Service {
    pub(super) launch: Launch,
    pub(super) trigger: Trigger,
    pub(super) limit: Duration,
}

/// What says that a service is ready.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Trigger {
    /// It, or another process of the guest's, listens on this TCP port.
    Port(u16),
    /// Something has this absolute path in the guest.
    File(String),
    /// It writes such a line to its stdout or its stderr.
    Log(LogPattern),
    /// It has started.
    Started,
}

/// A regular expression that a line of output matches, or as much of one as has been written: its first 16 KiB, what is not UTF-8
/// replaced.
#[derive(Clone, Debug)]
pub struct LogPattern(Regex);

/// Not a regular expression, or one that would match anything. Whoever wrote it is to blame.
#[derive(Debug, thiserror::Error)]
pub enum LogPatternError {
    /// Its syntax is wrong, or it is too large.
    #[error("not a regular expression")]
    Syntax(#[from] regex_lite::Error),
    /// It matches what is empty, so it says nothing.
    #[error("a regular expression that matches an empty line")]
    Empty,
}

impl FromStr for LogPattern {
    type Err = LogPatternError;

    fn from_str(text: &str) -> Result<Self, LogPatternError> {
        let regex = Regex::new(text)?;
        if regex.is_match("") {
            return Err(LogPatternError::Empty);
        }
        Ok(Self(regex))
    }
}

impl LogPattern {
    pub(super) fn matches(&self, line: &str) -> bool {
        self.0.is_match(line)
    }

    pub(super) fn text(&self) -> &str {
        self.0.as_str()
    }
}

impl PartialEq for LogPattern {
    fn eq(&self, other: &Self) -> bool {
        self.text() == other.text()
    }
}

impl Eq for LogPattern {}

impl Trigger {
    /// What is missing as long as it has not come about.
    pub(super) fn shown(&self) -> String {
        match self {
            Self::Port(port) => format!("listener on port {port}"),
            Self::File(path) => format!("file {path}"),
            Self::Log(pattern) => format!("'{}' in its output", pattern.text()),
            Self::Started => "start".to_owned(),
        }
    }
}

/// Why a file of the host's cannot go into a guest.
#[derive(Debug, thiserror::Error)]
pub enum HostFileError {
    /// It cannot be opened or read.
    #[error("cannot read {}", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// What the system said.
        #[source]
        source: io::Error,
    },
    /// It is a directory, or a device, and no file.
    #[error("{} is not a regular file", .0.display())]
    Irregular(PathBuf),
    /// It is larger than what is copied into guests.
    #[error("{} has more than {} MiB", .0.display(), MAX_FILE_BYTES >> 20)]
    TooLarge(PathBuf),
}

/// A file of the host's that goes into a guest: opened, and known by what is in it.
#[derive(Debug)]
pub struct HostFile {
    path: PathBuf,
    file: File,
    pub(super) digest: Digest,
    pub(super) mode: u32,
    /// It begins with a `#!` line.
    pub(super) names_interpreter: bool,
}

impl HostFile {
    /// Opens a file, links followed, and reads it for its digest. Blocks; cost: reading and hashing all of it.
    ///
    /// # Errors
    /// [`HostFileError`], by what is wrong with it.
    pub fn open(path: &Path) -> Result<Self, HostFileError> {
        let error = |source| HostFileError::Read { path: path.to_owned(), source };
        // A fifo that nobody writes to is not waited for.
        let flags = (OFlags::NONBLOCK | OFlags::NOCTTY).bits() as i32;
        let mut file = File::options().read(true).custom_flags(flags).open(path).map_err(error)?;
        let metadata = file.metadata().map_err(error)?;
        if !metadata.is_file() {
            return Err(HostFileError::Irregular(path.to_owned()));
        }
        let mut digest = Hasher::new();
        let (mut bytes, mut start) = (0, Vec::new());
        let mut buffer = vec![0; MAX_FILE_PART_BYTES];
        loop {
            let count = file.read(&mut buffer).map_err(error)?;
            if count == 0 {
                break;
            }
            bytes += count as u64;
            if bytes > MAX_FILE_BYTES {
                return Err(HostFileError::TooLarge(path.to_owned()));
            }
            let missing = 2_usize.saturating_sub(start.len()).min(count);
            start.extend_from_slice(&buffer[..missing]);
            digest.update(&buffer[..count]);
        }
        Ok(Self {
            path: path.to_owned(),
            file,
            digest: digest.finish(),
            mode: metadata.mode() & 0o7777,
            names_interpreter: start == b"#!",
        })
    }

    /// Writes it into a guest, if it is still what it was when it was opened.
    async fn write(&self, monitor: &Monitor, path: &str, mode: u32) -> Result<(), VmError> {
        let changed = || BakeError::Changed(self.path.clone());
        let failed = |source| BakeError::File { path: path.to_owned(), source };
        let mut digest = Hasher::new();
        let mut offset = 0;
        loop {
            let file = self.file.try_clone().map_err(|source| BakeError::read(&self.path, source))?;
            let part = blocking(move || read_part(&file, offset)).await;
            let part = part.map_err(|source| BakeError::read(&self.path, source))?;
            digest.update(&part);
            let bytes = part.len() as u64;
            if offset + bytes > MAX_FILE_BYTES {
                return Err(changed().into());
            }
            if bytes == 0 && offset > 0 {
                break;
            }
            let part = WriteFile { path: path.to_owned(), mode, offset, contents: part };
            ask(monitor, Call::WriteFile(part)).await.map_err(failed)?;
            if bytes == 0 {
                break;
            }
            offset += bytes;
        }
        if digest.finish() == self.digest { Ok(()) } else { Err(changed().into()) }
    }
}

/// As much of a file from `offset` on as one message carries; less only at its end.
fn read_part(file: &File, offset: u64) -> io::Result<Vec<u8>> {
    let mut part = vec![0; MAX_FILE_PART_BYTES];
    let mut filled = 0;
    while filled < part.len() {
        match file.read_at(&mut part[filled..], offset + filled as u64) {
            Ok(0) => break,
            Ok(count) => filled += count,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    part.truncate(filled);
    Ok(part)
}

impl Content {
    /// Whether a machine that boots has all there is.
    pub(crate) fn is_empty(&self) -> bool {
        self.files.is_empty() && self.warmups.is_empty() && self.code.is_none() && self.service.is_none()
    }

    /// Writes the files.
    pub(super) async fn write_files(&self, monitor: &Monitor) -> Result<(), VmError> {
        for (file, path) in &self.files {
            file.write(monitor, path, file.mode).await?;
        }
        Ok(())
    }
}

impl WarmUp {
    /// Puts its script in place, if it has one.
    pub(super) async fn write_script(&self, monitor: &Monitor) -> Result<(), VmError> {
        match &self.script {
            Some(script) => script.write(monitor, SCRIPT, SCRIPT_MODE).await,
            None => Ok(()),
        }
    }

    /// Takes it away again.
    pub(super) async fn remove_script(&self, monitor: &Monitor) -> Result<(), VmError> {
        if self.script.is_none() {
            return Ok(());
        }
        let file = RemoveFile { path: SCRIPT.to_owned() };
        let failed = |source| BakeError::File { path: SCRIPT.to_owned(), source };
        Ok(ask(monitor, Call::RemoveFile(file)).await.map_err(failed)?)
    }

    /// What its user knows it by.
    pub(super) fn shown(&self) -> String {
        match &self.script {
            Some(script) => script.path.display().to_string(),
            None => shown(&self.launch),
        }
    }
}

/// A command as it is shown, in quotes.
pub(super) fn shown(launch: &Launch) -> String {
    format!("'{}'", words(launch))
}

/// The words of a command, as many as anybody wants to see.
pub(super) fn words(launch: &Launch) -> String {
    let words: Vec<_> = launch.argv.iter().map(|word| word.to_string_lossy()).collect();
    words.join(" ").chars().take(SHOWN_CHARS_MAX).collect()
}

/// Asks the agent for something that it does or refuses.
pub(super) async fn ask(monitor: &Monitor, call: Call) -> Result<(), AgentError> {
    let stream = monitor.connect(AGENT_PORT).await.map_err(|error| match error {
        crate::MonitorError::Ended(end) => AgentError::MachineEnded(end),
        other => AgentError::Lost(io::Error::other(other)),
    })?;
    match agent::ask(stream, call).await {
        Ok(Outcome::Done(_)) => Ok(()),
        Ok(_) => Err(AgentError::Broken("a reply that does not answer what was asked")),
        Err(error) => Err(error.explained(&mut monitor.end_watch()).await),
    }
}

/// What a template has beside its image. All of it is part of what the snapshot is known by, in the order it is given.
impl VmBuilder {
    /// Puts a copy of a file of the host's into the guest's root before any warm-up, with the file's permissions, owned by
    /// root, in the place of what the image has there. `path` is its absolute path in the guest.
    pub fn extra_file(mut self, file: HostFile, path: impl Into<String>) -> Self {
        self.content.files.push((file, path.into()));
        self
    }

    /// Adds a command that runs to its end before the snapshot is made, so that machines start with what it leaves: files,
    /// memory, caches.
    pub fn warm_up(mut self, command: Launch) -> Self {
        self.content.warmups.push(WarmUp { launch: command, script: None });
        self
    }

    /// Adds code that warms the guest up after the commands; `tag` stands for what it does.
    pub(crate) fn warm_up_by_code(
        mut self,
        tag: String,
        code: crate::baked::WarmUp,
        launch: Arc<Launch>,
    ) -> Self {
        self.content.code = Some(WarmUpByCode { tag, code, launch });
        self
    }

    /// The same with a script of the host's, by its `#!` line or else by `/bin/sh`. `launch` says as whom, where and with
    /// which environment; its command is not looked at. The script is not in the guest any more when the snapshot is made.
    pub fn warm_up_by_script(mut self, script: HostFile, launch: Launch) -> Self {
        let shell = (!script.names_interpreter).then_some(SHELL);
        let argv = shell.into_iter().chain([SCRIPT]).map(|word| OsStr::new(word).to_owned()).collect();
        self.content.warmups.push(WarmUp { launch: Launch { argv, ..launch }, script: Some(script) });
        self
    }

    /// Starts a command as the guest's first, after the warm-ups, and makes the snapshot when it is ready: machines have it
    /// running when they start. One that ends before, or is not ready within `limit`, fails the bake.
    pub fn service(mut self, command: Launch, ready: Trigger, limit: Duration) -> Self {
        self.content.service = Some(Service { launch: command, trigger: ready, limit });
        self
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_is_known_by_what_is_in_it_and_its_permissions() {
        use std::os::unix::fs::PermissionsExt as _;
        let folder = tempfile::tempdir().expect("a folder");
        let path = folder.path().join("file");
        let open = |contents: &[u8], mode| {
            std::fs::write(&path, contents).expect("written");
            std::fs::set_permissions(&path, std::fs::Permissions::from_mode(mode)).expect("set");
            HostFile::open(&path).expect("a file")
        };
        let long = vec![b'#'; MAX_FILE_PART_BYTES + 1];
        for (contents, script) in [(&b"#!/bin/sh\n"[..], true), (b"#", false), (b"", false), (&long, false)] {
            let file = open(contents, 0o640);
            assert_eq!((file.digest, file.mode), (Digest::of(contents), 0o640));
            assert_eq!(file.names_interpreter, script);
        }
        assert_eq!(read_part(&open(&long, 0o644).file, 1).expect("read").len(), MAX_FILE_PART_BYTES);
    }

    #[test]
    fn what_is_no_file_of_a_sane_size_is_refused_unread() {
        let folder = tempfile::tempdir().expect("a folder");
        let fifo = folder.path().join("fifo");
        rustix::fs::mknodat(rustix::fs::CWD, &fifo, rustix::fs::FileType::Fifo, rustix::fs::Mode::RWXU, 0)
            .expect("a fifo");
        for path in [folder.path(), &fifo, Path::new("/dev/zero")] {
            assert!(matches!(HostFile::open(path), Err(HostFileError::Irregular(_))), "{path:?}");
        }
        let huge = folder.path().join("huge");
        File::create(&huge).expect("a file").set_len(MAX_FILE_BYTES + 1).expect("sparse");
        assert!(matches!(HostFile::open(&huge), Err(HostFileError::TooLarge(_))));
        assert!(matches!(HostFile::open(Path::new("/nonexistent")), Err(HostFileError::Read { .. })));
    }
}
