//! The messages, as prost types: unknown fields are skipped, so either side may be newer.

use alloc::string::String;
use alloc::vec::Vec;

use prost::{Enumeration, Message, Oneof};

/// What the host asks for; the first frame of a stream.
#[derive(Clone, PartialEq, Message)]
pub struct Request {
    /// The one thing asked for. `None` is refused.
    #[prost(oneof = "Call", tags = "1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14")]
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
    /// Writes a file or tree into the guest's root. Answered by [`Done`] when it can begin; then entries and their data come,
    /// and the end of them, which is answered by another [`Done`].
    #[prost(message, tag = "10")]
    Put(Put),
    /// Reads a file or tree. Answered by [`Done`] when it can begin; then entries and their data come, and another reply, which
    /// says whether that was all.
    #[prost(message, tag = "11")]
    Get(Get),
    /// Connects to a TCP port of the guest's own. Answered by [`Done`]; from then on the connection carries what that one does.
    #[prost(message, tag = "12")]
    Dial(Dial),
    /// Sends a signal to the guest's processes.
    #[prost(message, tag = "13")]
    Signal(Signal),
    /// Asks what the guest uses.
    #[prost(message, tag = "14")]
    Measure(Measure),
}

/// Writes a file or tree into the guest's root, as root. Links of the path end inside that root.
#[derive(Clone, PartialEq, Message)]
pub struct Put {
    /// Where: an absolute path in the guest's root.
    #[prost(bytes = "vec", tag = "1")]
    pub path: Vec<u8>,
    /// How the root of the tree is named.
    #[prost(enumeration = "PutNaming", tag = "2")]
    pub naming: i32,
    /// The name of what is written, for [`PutNaming::Into`].
    #[prost(bytes = "vec", tag = "3")]
    pub name: Vec<u8>,
    /// Files get the owners their entries say, and not root.
    #[prost(bool, tag = "4")]
    pub keep_owner: bool,
}

/// How the root of a tree is named.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Enumeration)]
#[repr(i32)]
pub enum PutNaming {
    /// As the path says. The directories above it are made.
    Exact = 0,
    /// As `docker cp` has it: by its own name in the path, if that is a directory, and as the path otherwise.
    Into = 1,
    /// What is in it goes into the path, if that is a directory.
    Contents = 2,
}

/// Reads a file or tree of the guest's root.
#[derive(Clone, PartialEq, Message)]
pub struct Get {
    /// Its absolute path in the guest's root.
    #[prost(bytes = "vec", tag = "1")]
    pub path: Vec<u8>,
    /// It has to be a regular file, or a link to one. Otherwise a link is what is read.
    #[prost(bool, tag = "2")]
    pub file: bool,
}

/// One file, link or directory of a tree. Of a directory, what is in it follows; of a file, its contents.
#[derive(Clone, PartialEq, Message)]
pub struct Entry {
    /// How many directories of the tree it is in, which have come before: 0 for the root alone.
    #[prost(uint32, tag = "1")]
    pub depth: u32,
    /// Its name: one component. The root has none.
    #[prost(bytes = "vec", tag = "2")]
    pub name: Vec<u8>,
    /// Its `st_mode`: type and permissions.
    #[prost(uint32, tag = "3")]
    pub mode: u32,
    /// Its owner.
    #[prost(uint32, tag = "4")]
    pub uid: u32,
    /// Its group.
    #[prost(uint32, tag = "5")]
    pub gid: u32,
    /// When it was last changed, in seconds since 1970; with no nanoseconds either, it is not known.
    #[prost(int64, tag = "6")]
    pub mtime_s: i64,
    /// And nanoseconds.
    #[prost(uint32, tag = "7")]
    pub mtime_ns: u32,
    /// The size of a file, in bytes, when it was opened. What follows of it may be less, and for a file that does not know its
    /// size, which says 0, more.
    #[prost(uint64, tag = "8")]
    pub size: u64,
    /// Where a link leads.
    #[prost(bytes = "vec", tag = "9")]
    pub target: Vec<u8>,
}

/// Connects to a TCP port on the guest's loopback interface: 127.0.0.1, and `::1` when nothing listens there.
#[derive(Clone, Copy, PartialEq, Eq, Message)]
pub struct Dial {
    /// The port, 1 to 65535.
    #[prost(uint32, tag = "1")]
    pub port: u32,
}

/// Sends a signal to every process of the guest's, or where the first command is process 1, to that.
#[derive(Clone, Copy, PartialEq, Eq, Message)]
pub struct Signal {
    /// Its number, 1 to 64.
    #[prost(uint32, tag = "1")]
    pub number: u32,
}

/// Asks what the guest uses.
#[derive(Clone, Copy, PartialEq, Eq, Message)]
pub struct Measure {}

/// What a guest uses.
#[derive(Clone, Copy, PartialEq, Eq, Message)]
pub struct Measured {
    /// Memory the guest has, in bytes, without what its kernel took at its start.
    #[prost(uint64, tag = "1")]
    pub memory_bytes: u64,
    /// Of that, what is in use and cannot be had back without being written out or killed for.
    #[prost(uint64, tag = "2")]
    pub memory_used_bytes: u64,
    /// Processor time of all that ran in the guest since it started, its kernel's own among it, in microseconds.
    #[prost(uint64, tag = "3")]
    pub cpu_us: u64,
    /// Processes of the guest's users, a reaper among them.
    #[prost(uint32, tag = "4")]
    pub processes: u32,
    /// The guest's `CLOCK_MONOTONIC`, in microseconds: for a restored one, what its template had at its end is in it.
    #[prost(uint64, tag = "5")]
    pub uptime_us: u64,
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
    /// Files that are written before it starts; at most [`MAX_STAGED_FILES`](crate::MAX_STAGED_FILES).
    #[prost(message, repeated, tag = "9")]
    pub files: Vec<StagedFile>,
    /// Commands that follow it, each once the one before has exited with 0, in the same streams, environment and time. How the
    /// last one ended that was started is how all ended; one that could not be started ends them with the code a shell would
    /// report. At most [`MAX_CHAIN`](crate::MAX_CHAIN), without a terminal, and only where a reaper is process 1.
    #[prost(message, repeated, tag = "10")]
    pub chain: Vec<Argv>,
}

/// A file that is written as root, in the place of what has its name, with the directories above it.
#[derive(Clone, PartialEq, Message)]
pub struct StagedFile {
    /// Its absolute path in the guest's root.
    #[prost(bytes = "vec", tag = "1")]
    pub path: Vec<u8>,
    /// Its permissions: the lowest 12 bits of `st_mode`.
    #[prost(uint32, tag = "2")]
    pub mode: u32,
    /// What is in it.
    #[prost(bytes = "vec", tag = "3")]
    pub contents: Vec<u8>,
}

/// A command and its arguments.
#[derive(Clone, PartialEq, Message)]
pub struct Argv {
    /// As [`Exec::argv`].
    #[prost(bytes = "vec", repeated, tag = "1")]
    pub words: Vec<Vec<u8>>,
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
    #[prost(oneof = "Outcome", tags = "1, 2, 3, 4, 5, 6, 7")]
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
    /// What the guest uses.
    #[prost(message, tag = "7")]
    Measured(Measured),
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
    /// The command does not exist (exit code 127), or the file.
    NotFound = 2,
    /// The command exists and cannot be executed (exit code 126).
    NotExecutable = 3,
    /// Nothing listens on the port.
    NotListening = 4,
    /// As many of these as there may be at a time are under way.
    Busy = 5,
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
