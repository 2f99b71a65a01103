//! The messages, as prost types: unknown fields are skipped, so either side may be newer.

use alloc::string::String;
use alloc::vec::Vec;

use prost::{Enumeration, Message, Oneof};

/// What the host asks for; the first frame of a stream.
#[derive(Clone, PartialEq, Message)]
pub struct Request {
    /// The one thing asked for. `None` is refused.
    #[prost(oneof = "Call", tags = "1, 2, 3, 4, 5, 6, 7, 8, 9")]
    pub call: Option<Call>,
}

/// The calls the agent knows.
#[derive(Clone, PartialEq, Oneof)]
pub enum Call {
    /// Makes the guest ready for commands: mounts, identity, name resolution. Once per boot, before any exec.
    #[prost(message, tag = "1")]
    Setup(Setup),
    /// Starts a command; its streams follow on the same connection.
    #[prost(message, tag = "2")]
    Exec(Exec),
    /// Kills every process, unmounts, syncs and powers off.
    #[prost(message, tag = "3")]
    PowerOff(PowerOff),
    /// Asks for nothing but an answer: agent version and guest facts.
    #[prost(message, tag = "4")]
    Hello(Hello),
    /// Freezes user processes, writes out what is dirty, and parks. At the doorbell until there is mail: answered only when it
    /// cannot be done, for the ring is the answer, and the connection is gone by then. A guest that has no doorbell answers
    /// [`Parked`] and waits at its port for [`Become`].
    #[prost(message, tag = "5")]
    Park(Park),
    /// Writes a part of a file into the guest's root.
    #[prost(message, tag = "6")]
    WriteFile(WriteFile),
    /// Removes a file from the guest's root; one that is not there counts as removed.
    #[prost(message, tag = "7")]
    RemoveFile(RemoveFile),
    /// Is answered when what it names has come about; the caller closes the connection when it has waited long enough.
    #[prost(message, tag = "8")]
    Await(Await),
    /// Says who a guest is that is parked at its port: the only thing such a guest hears. It has said [`Parked`] first, unasked.
    #[prost(message, tag = "9")]
    Become(Become),
}

/// Says who a parked guest is now.
#[derive(Clone, PartialEq, Message)]
pub struct Become {
    /// A generation as it lies in the [mailbox](crate::mailbox), with the wall clock of this moment; answered by [`Became`]
    /// once the guest is that one. `None` for the guest to go on as the one it was; answered by [`Done`].
    #[prost(bytes = "vec", optional, tag = "1")]
    pub generation: Option<Vec<u8>>,
}

/// Writes a part of a file into the guest's root, as root: at least one, in their order, for any file.
///
/// The part at offset 0 makes a new file, in place of one that is there (a link is replaced, not followed), and the
/// directories above it. Any other continues the file where it ends.
#[derive(Clone, PartialEq, Message)]
pub struct WriteFile {
    /// Where: an absolute path in the guest's root, whose directories may be links.
    #[prost(string, tag = "1")]
    pub path: String,
    /// The permissions of the file: the lowest 12 bits of `st_mode`.
    #[prost(uint32, tag = "2")]
    pub mode: u32,
    /// How many bytes of the file are written already.
    #[prost(uint64, tag = "3")]
    pub offset: u64,
    /// The bytes that follow; at most [`MAX_FILE_PART_BYTES`](crate::MAX_FILE_PART_BYTES).
    #[prost(bytes = "vec", tag = "4")]
    pub contents: Vec<u8>,
}

/// Removes a file.
#[derive(Clone, PartialEq, Message)]
pub struct RemoveFile {
    /// Its absolute path in the guest's root.
    #[prost(string, tag = "1")]
    pub path: String,
}

/// Waits for one thing.
#[derive(Clone, PartialEq, Message)]
pub struct Await {
    /// What is waited for. `None` is refused.
    #[prost(oneof = "Awaited", tags = "1, 2")]
    pub awaited: Option<Awaited>,
}

/// What can be waited for.
#[derive(Clone, PartialEq, Oneof)]
pub enum Awaited {
    /// A process of the guest's listens on this TCP port, whatever its address; a command has been started before.
    #[prost(uint32, tag = "1")]
    Port(u32),
    /// Something has this absolute path.
    #[prost(string, tag = "2")]
    File(String),
}

/// Asks the agent to park.
#[derive(Clone, PartialEq, Message)]
pub struct Park {}

/// Asks who is there.
#[derive(Clone, PartialEq, Message)]
pub struct Hello {}

/// Makes the guest ready for commands.
#[derive(Clone, PartialEq, Message)]
pub struct Setup {
    /// The block device that holds the image's merged EROFS, such as `/dev/vda`.
    #[prost(string, tag = "1")]
    pub root_device: String,
    /// The block device that holds the writable upper (ext4); empty for a tmpfs upper.
    #[prost(string, tag = "2")]
    pub scratch_device: String,
    /// The root is read-only for commands; /tmp and /run are tmpfs, and volumes stay writable.
    #[prost(bool, tag = "3")]
    pub read_only: bool,
    /// The host name commands see.
    #[prost(string, tag = "4")]
    pub hostname: String,
    /// The image's VOLUME paths: each becomes a mount of its own, writable even when the root is not, and starts
    /// with what the image has there.
    #[prost(string, repeated, tag = "5")]
    pub volumes: Vec<String>,
    /// Contents of /etc/resolv.conf; empty leaves the image's file.
    #[prost(string, tag = "6")]
    pub resolv_conf: String,
    /// Wall clock at the host in nanoseconds since 1970-01-01 UTC; 0 leaves the guest's as it is.
    #[prost(uint64, tag = "7")]
    pub realtime_ns: u64,
    /// Random bytes for the guest kernel's generator; at least 32.
    #[prost(bytes = "vec", tag = "8")]
    pub entropy: Vec<u8>,
    /// Who is process 1 of the guest's processes. False: the first command, as with `docker run`; when it ends, so
    /// does every other process, and further commands are refused. True: a reaper of the agent's, as with
    /// `docker run --init`; it collects orphans, and what a command leaves running stays until power-off.
    #[prost(bool, tag = "9")]
    pub reaper: bool,
    /// A directory that commands will start in: under a read-only root it can only be made now. Empty for none.
    #[prost(string, tag = "10")]
    pub working_directory: String,
}

/// Starts a command.
#[derive(Clone, PartialEq, Message)]
pub struct Exec {
    /// The command and its arguments as bytes; at least one. The first is looked up in the command's PATH.
    #[prost(bytes = "vec", repeated, tag = "1")]
    pub argv: Vec<Vec<u8>>,
    /// The whole environment as `KEY=VALUE` bytes. PATH, HOSTNAME, HOME and, with a terminal, TERM are added when
    /// missing.
    #[prost(bytes = "vec", repeated, tag = "2")]
    pub env: Vec<Vec<u8>>,
    /// The working directory; made when missing, as image builders expect of WORKDIR. Empty means `/`.
    #[prost(string, tag = "3")]
    pub cwd: String,
    /// `USER` as in an image config: `name`, `uid`, `name:group`, `uid:gid`; empty means root. Looked up in the
    /// image's /etc/passwd and /etc/group, whose supplementary groups apply when no group is named.
    #[prost(string, tag = "4")]
    pub user: String,
    /// Gives the command a terminal of this size; stdout and stderr are then one stream.
    #[prost(message, optional, tag = "5")]
    pub tty: Option<WindowSize>,
    /// Kills the command's process group after this many milliseconds; 0 is never. For process 1 that is everything.
    #[prost(uint64, tag = "6")]
    pub timeout_ms: u64,
    /// Leaves stdin open for [`Stdin`](crate::frame::Kind::Stdin) frames; otherwise it is /dev/null, or with a
    /// terminal one on which nobody types.
    #[prost(bool, tag = "7")]
    pub stdin: bool,
    /// Warms the guest up before its first command: it runs alone, as process 1 of a namespace that ends with it, and
    /// the guest's first command is still to come. Refused once that has started, and beside any other command. Where
    /// a reaper is process 1, this is a command like any other.
    #[prost(bool, tag = "8")]
    pub warmup: bool,
}

/// The size of a terminal in characters.
#[derive(Clone, Copy, PartialEq, Eq, Message)]
pub struct WindowSize {
    /// Rows.
    #[prost(uint32, tag = "1")]
    pub rows: u32,
    /// Columns.
    #[prost(uint32, tag = "2")]
    pub columns: u32,
}

/// Asks the guest to stop.
#[derive(Clone, PartialEq, Message)]
pub struct PowerOff {
    /// How long processes have between SIGTERM and SIGKILL, in milliseconds.
    #[prost(uint64, tag = "1")]
    pub grace_ms: u64,
}

/// The agent's answer to a request; an exec's is sent once the command runs or has been refused.
#[derive(Clone, PartialEq, Message)]
pub struct Reply {
    /// What came of it.
    #[prost(oneof = "Outcome", tags = "1, 2, 3, 4, 5, 6")]
    pub outcome: Option<Outcome>,
}

/// What came of a request.
#[derive(Clone, PartialEq, Oneof)]
pub enum Outcome {
    /// It was refused or failed.
    #[prost(message, tag = "1")]
    Failed(Failed),
    /// It is done (setup, power-off).
    #[prost(message, tag = "2")]
    Done(Done),
    /// The command runs.
    #[prost(message, tag = "3")]
    Started(Started),
    /// Who answers.
    #[prost(message, tag = "4")]
    Welcome(Welcome),
    /// The guest is parked at its port, and the machine may be stopped; or it is still, and asks who it is.
    #[prost(message, tag = "5")]
    Parked(Parked),
    /// The guest has become another.
    #[prost(message, tag = "6")]
    Became(Became),
}

/// The guest is parked without a doorbell.
#[derive(Clone, PartialEq, Message)]
pub struct Parked {}

/// The guest is the one of its generation; only now user processes run.
#[derive(Clone, PartialEq, Message)]
pub struct Became {
    /// The generation's id.
    #[prost(bytes = "vec", tag = "1")]
    pub id: Vec<u8>,
}

/// Nothing more to say.
#[derive(Clone, PartialEq, Message)]
pub struct Done {}

/// The command runs.
#[derive(Clone, PartialEq, Message)]
pub struct Started {
    /// Its process id as the guest's processes see it.
    #[prost(uint32, tag = "1")]
    pub pid: u32,
}

/// Who answers.
#[derive(Clone, PartialEq, Message)]
pub struct Welcome {
    /// The agent's version.
    #[prost(string, tag = "1")]
    pub version: String,
    /// The guest kernel's release.
    #[prost(string, tag = "2")]
    pub kernel: String,
    /// How often the guest has been restored and become another.
    #[prost(uint64, tag = "3")]
    pub generation: u64,
    /// The guest's host name.
    #[prost(string, tag = "4")]
    pub hostname: String,
    /// The guest's wall clock, in nanoseconds since 1970-01-01 UTC.
    #[prost(uint64, tag = "5")]
    pub realtime_ns: u64,
    /// The guest's `CLOCK_MONOTONIC`, in nanoseconds.
    #[prost(uint64, tag = "6")]
    pub monotonic_ns: u64,
    /// 32 bytes fresh from the guest kernel's random number generator: no two guests, and no two answers, have the same.
    #[prost(bytes = "vec", tag = "7")]
    pub random: Vec<u8>,
}

/// Why a request was refused.
#[derive(Clone, PartialEq, Message)]
pub struct Failed {
    /// The kind of failure, which decides the exit code.
    #[prost(enumeration = "Reason", tag = "1")]
    pub reason: i32,
    /// What was tried and what went wrong, in one line.
    #[prost(string, tag = "2")]
    pub message: String,
}

/// The kinds of failure.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Enumeration)]
#[repr(i32)]
pub enum Reason {
    /// Something inside the guest failed that should not.
    Internal = 0,
    /// The request itself is wrong: unknown user, empty argv, setup twice.
    Invalid = 1,
    /// The command does not exist (exit code 127).
    NotFound = 2,
    /// The command exists and cannot be executed (exit code 126).
    NotExecutable = 3,
}

/// How a command ended; the last frame of an exec stream.
///
/// It follows all the command itself wrote. What a process left in the background still holds open is not waited
/// for: as `docker run` ends with its process 1, so a command ends with its own process.
#[derive(Clone, Copy, PartialEq, Eq, Message)]
pub struct Exited {
    /// The exit code when it exited by itself.
    #[prost(uint32, tag = "1")]
    pub code: u32,
    /// The signal that ended it, or 0.
    #[prost(uint32, tag = "2")]
    pub signal: u32,
    /// It was killed because its time was up.
    #[prost(bool, tag = "3")]
    pub timed_out: bool,
    /// The most memory it had resident, in KiB.
    #[prost(uint64, tag = "4")]
    pub peak_rss_kib: u64,
}
