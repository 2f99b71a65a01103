//! What is known of a detached machine.

use std::path::PathBuf;

use kiln_store::SnapshotImage;
use kiln_support::digest::Digest;
use serde::{Deserialize, Serialize};

use super::now_unix_ms;
use super::publish::Published;
use super::workload::MainCommand;
use crate::ExitStatus;

/// The most bytes of a machine's name: a host name has no room for more.
const NAME_BYTES_MAX: usize = 63;

/// What is known of a detached machine.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct VmRecord {
    /// Twelve hexadecimal digits that no other machine has.
    pub id: String,
    /// What its user calls it; the id where nobody chose. It is the guest's host name too.
    pub name: String,
    /// The image of its root.
    pub image: SnapshotImage,
    /// What it is made from.
    pub origin: Origin,
    /// Guest memory in MiB.
    pub memory_mib: u32,
    /// The number of vCPUs.
    pub vcpus: u32,
    /// Where the guest's changes to its root go.
    pub scratch: ScratchKind,
    /// A kernel of the user's own.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub kernel: Option<PathBuf>,
    /// Paths in the image that become writable places of their own.
    #[serde(default)]
    pub volumes: Vec<String>,
    /// What a command in it gets unless its caller says otherwise.
    pub defaults: Defaults,
    /// The command it runs, and with which it ends; none for a machine that only takes commands.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub main: Option<MainCommand>,
    /// Ports of the guest that its keeper listens for.
    #[serde(default)]
    pub ports: Vec<Published>,
    /// The guest's host name, where it is not the machine's name.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub hostname: Option<String>,
    /// Its first command is process 1 of the guest, and not a reaper.
    #[serde(default)]
    pub command_is_process_1: bool,
    /// Its guest is booted, and neither made from a template nor made one.
    #[serde(default)]
    pub boots: bool,
    /// It is removed when it has ended.
    #[serde(default)]
    pub remove_when_ended: bool,
    /// When it was created, in milliseconds since 1970.
    pub created_unix_ms: u64,
    /// How it is. What a crash left behind is put right by [`Machines::reconcile`](super::Machines::reconcile).
    pub state: State,
    /// When it last started.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub started_unix_ms: Option<u64>,
    /// When it last ended.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ended_unix_ms: Option<u64>,
    /// How it last ended, in one line.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub end: Option<String>,
    /// What it last ended with.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub exit: Option<Exit>,
    /// Since when it is paused.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub paused_unix_ms: Option<u64>,
    /// How long it has been paused since it started, the pause it may be in left aside, in milliseconds.
    #[serde(default)]
    pub paused_total_ms: u64,
    /// The process that keeps it, for its user to look at: whether it lives is told by its lock.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub keeper_pid: Option<u32>,
}

/// What a machine is made from.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Origin {
    /// An image, by its template.
    Image,
    /// A snapshot that was saved of a machine.
    Snapshot {
        /// Its key.
        key: Digest,
    },
    /// A copy of a machine that ran. There is none for a second start.
    Fork {
        /// The name of that machine.
        of: String,
    },
}

/// Where the guest's changes to its root go.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ScratchKind {
    /// A disk of this size.
    Disk {
        /// In bytes.
        bytes: u64,
    },
    /// Guest memory.
    Memory,
    /// Nowhere.
    ReadOnly,
}

/// What a command gets unless its caller says otherwise: the image's configuration.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Defaults {
    /// `KEY=VALUE` words.
    #[serde(default)]
    pub env: Vec<String>,
    /// The user.
    #[serde(default)]
    pub user: String,
    /// The working directory.
    #[serde(default)]
    pub working_directory: String,
}

/// What a machine, or its main command, ended with.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Exit {
    /// The code a shell would report: the command's own, 128 + n for signal n, 124 when its time was up. A machine without a
    /// main command has 0 when it powered off, and 137 otherwise.
    pub code: u8,
    /// The signal that ended the command.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub signal: Option<u8>,
}

impl Exit {
    /// Nothing ran.
    pub const NONE: Self = Self { code: 0, signal: None };
    /// It was ended from outside.
    pub const KILLED: Self = Self { code: 128 + 9, signal: Some(9) };
}

impl From<ExitStatus> for Exit {
    fn from(status: ExitStatus) -> Self {
        Self { code: status.shell_code(), signal: status.signal() }
    }
}

/// How a machine is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum State {
    /// It never ran.
    Created,
    /// It runs.
    Running,
    /// It stands still.
    Paused,
    /// It ran.
    Ended,
}

impl State {
    /// The name used in lists.
    pub fn name(self) -> &'static str {
        match self {
            Self::Created => "created",
            Self::Running => "running",
            Self::Paused => "paused",
            Self::Ended => "ended",
        }
    }

    /// There is a machine.
    pub fn is_up(self) -> bool {
        matches!(self, Self::Running | Self::Paused)
    }
}

impl VmRecord {
    /// The record of a machine that is created now, and of which nothing else is known.
    pub fn new(id: String, name: String, image: SnapshotImage, origin: Origin) -> Self {
        Self {
            id,
            name,
            image,
            origin,
            memory_mib: 0,
            vcpus: 0,
            scratch: ScratchKind::Memory,
            kernel: None,
            volumes: Vec::new(),
            defaults: Defaults::default(),
            main: None,
            ports: Vec::new(),
            hostname: None,
            command_is_process_1: false,
            boots: false,
            remove_when_ended: false,
            created_unix_ms: now_unix_ms(),
            state: State::Created,
            started_unix_ms: None,
            ended_unix_ms: None,
            end: None,
            exit: None,
            paused_unix_ms: None,
            paused_total_ms: 0,
            keeper_pid: None,
        }
    }

    /// Takes note that the machine runs, kept by this process.
    pub(super) fn started(&mut self, now_unix_ms: u64) {
        self.state = State::Running;
        self.started_unix_ms = Some(now_unix_ms);
        (self.ended_unix_ms, self.end, self.exit) = (None, None, None);
        (self.paused_unix_ms, self.paused_total_ms) = (None, 0);
        self.keeper_pid = Some(std::process::id());
    }

    pub(super) fn paused(&mut self, now_unix_ms: u64) {
        self.state = State::Paused;
        self.paused_unix_ms.get_or_insert(now_unix_ms);
    }

    pub(super) fn resumed(&mut self, now_unix_ms: u64) {
        self.state = State::Running;
        if let Some(since) = self.paused_unix_ms.take() {
            self.paused_total_ms += now_unix_ms.saturating_sub(since);
        }
    }

    pub(super) fn ended(&mut self, how: String, exit: Exit, now_unix_ms: u64) {
        self.resumed(now_unix_ms);
        self.state = State::Ended;
        self.ended_unix_ms = Some(now_unix_ms);
        self.end = Some(how);
        self.exit = Some(exit);
        for port in &mut self.ports {
            port.bound = None;
        }
        self.keeper_pid = None;
    }
}

/// Whether a machine may be called so: a word that is a host name, a file name and no option.
pub fn is_vm_name(name: &str) -> bool {
    name.len() <= NAME_BYTES_MAX
        && name.bytes().next().is_some_and(|first| first.is_ascii_alphanumeric())
        && name.bytes().all(|byte| byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'_' | b'.'))
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;

    /// The record of a machine with this name.
    pub(in crate::detached) fn record(name: &str) -> VmRecord {
        let image = SnapshotImage { reference: "demo".into(), manifest: Digest::EMPTY };
        let record = VmRecord::new("0123456789ab".into(), name.into(), image, Origin::Image);
        VmRecord { memory_mib: 64, vcpus: 1, created_unix_ms: 1, ..record }
    }

    #[test]
    fn pauses_add_up_and_a_start_begins_anew() {
        let mut record = record("web");
        record.started(100);
        record.paused(110);
        record.paused(115);
        record.resumed(120);
        record.resumed(125);
        assert_eq!((record.state, record.paused_total_ms), (State::Running, 10));
        record.paused(130);
        record.ended("it was stopped".into(), Exit::KILLED, 135);
        assert_eq!((record.state, record.paused_total_ms), (State::Ended, 15));
        record.started(200);
        assert_eq!((record.end, record.exit), (None, None));
        assert_eq!((record.ended_unix_ms, record.paused_total_ms), (None, 0));
    }

    #[test]
    fn a_name_is_a_file_and_a_host() {
        for good in ["web", "web-1", "a.b_c", "0"] {
            assert!(is_vm_name(good), "{good}");
        }
        for bad in ["", ".", "..", ".lock", "-x", "a/b", "a b", "ä", "a\0", &"x".repeat(64)] {
            assert!(!is_vm_name(bad), "{bad}");
        }
    }
}
