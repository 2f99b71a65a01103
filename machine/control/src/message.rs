//! The messages, as prost types. A field named `*_fd` is an index into the descriptors beside the packet; for [`Start`], and
//! those of [`Files`] before it.

use prost::{Message, Oneof};

/// Host to monitor.
#[derive(Clone, PartialEq, Message)]
pub struct Command {
    /// What to do. `None` is refused.
    #[prost(oneof = "Do", tags = "1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 20")]
    pub call: Option<Do>,
}

/// What a host can ask of a monitor.
#[derive(Clone, PartialEq, Oneof)]
pub enum Do {
    /// Makes the machine and boots it. Once, first.
    #[prost(message, tag = "1")]
    Start(Start),
    /// Connects a socket to a vsock port of the guest.
    #[prost(message, tag = "2")]
    Connect(Connect),
    /// Ends the machine at once, as pulling the plug would.
    #[prost(message, tag = "3")]
    Stop(Stop),
    /// Hands over files for the start to come.
    #[prost(message, tag = "4")]
    Files(Files),
    /// Makes the machine that a snapshot is of, and enters it. In the place of [`Start`], or once more: then what was made before ends,
    /// and the guest of the snapshot takes over its memory and its vCPUs, which have nothing left of the guest before.
    #[prost(message, tag = "5")]
    Restore(Restore),
    /// Stops the machine between two instructions. Answered by [`Paused`].
    #[prost(message, tag = "6")]
    Pause(Pause),
    /// Lets a paused or parked machine go on. Answered by [`Entered`], or by [`Resumed`] where the monitor gives it a generation.
    #[prost(message, tag = "7")]
    Resume(Resume),
    /// Writes the memory of a machine to a file. Answered by [`Saved`].
    #[prost(message, tag = "8")]
    SaveMemory(SaveMemory),
    /// Writes everything else of a machine to a file. Answered by [`Saved`].
    #[prost(message, tag = "9")]
    SaveState(SaveState),
    /// Makes ahead what every machine of a shape has, for the [`Restore`] to come; once, first. Answered by [`Prepared`].
    #[prost(message, tag = "10")]
    Prepare(Prepare),
    /// Says what the guest last wrote to its console. Answered by [`Console`], however the machine is.
    #[prost(message, tag = "20")]
    ShowConsole(ShowConsole),
}

/// Asks for the last of the console.
#[derive(Clone, Copy, PartialEq, Eq, Message)]
pub struct ShowConsole {}

/// What the guest last wrote to its console.
#[derive(Clone, PartialEq, Eq, Message)]
pub struct Console {
    /// At most [`MAX_CONSOLE_BYTES`](crate::MAX_CONSOLE_BYTES), of which the first may be in the middle of a line.
    #[prost(bytes = "vec", tag = "1")]
    pub tail: Vec<u8>,
}

/// What every machine of a shape has: memory and vCPUs.
#[derive(Clone, Copy, PartialEq, Eq, Message)]
pub struct Prepare {
    /// As [`Start::memory_mib`].
    #[prost(uint32, tag = "1")]
    pub memory_mib: u32,
    /// As [`Start::vcpus`].
    #[prost(uint32, tag = "2")]
    pub vcpus: u32,
}

/// The machine to make.
#[derive(Clone, PartialEq, Message)]
pub struct Start {
    /// Guest memory in MiB, 64 or more. It is committed as the guest touches it.
    #[prost(uint32, tag = "1")]
    pub memory_mib: u32,
    /// 1 to 16.
    #[prost(uint32, tag = "2")]
    pub vcpus: u32,
    /// The guest kernel: ELF with a PVH note, or bzImage.
    #[prost(uint32, tag = "3")]
    pub kernel_fd: u32,
    /// The initramfs, a cpio archive as the kernel takes it.
    #[prost(uint32, tag = "4")]
    pub initramfs_fd: u32,
    /// Added at the end of the kernel's command line.
    #[prost(string, tag = "5")]
    pub cmdline: String,
    /// Block devices in the guest's order: /dev/vda, /dev/vdb ...
    #[prost(message, repeated, tag = "6")]
    pub disks: Vec<Disk>,
    /// Where the guest's console output goes as well, when not `None`; the monitor keeps the last 64 KiB anyway.
    #[prost(uint32, optional, tag = "7")]
    pub console_fd: Option<u32>,
    /// The guest's vsock context id, 3 or more.
    #[prost(uint64, tag = "8")]
    pub cid: u64,
}

/// The machine to make of a snapshot. Devices are those it was saved with, in their order; what is behind them is given anew.
#[derive(Clone, PartialEq, Message)]
pub struct Restore {
    /// Everything but the memory, as [`SaveState`] wrote it.
    #[prost(uint32, tag = "1")]
    pub state_fd: u32,
    /// The memory, as [`SaveMemory`] wrote it. It is mapped, so nobody may change it while the machine lives.
    #[prost(uint32, tag = "2")]
    pub memory_fd: u32,
    /// Block devices in the guest's order.
    #[prost(message, repeated, tag = "3")]
    pub disks: Vec<Disk>,
    /// Where the guest's console output goes as well, when not `None`.
    #[prost(uint32, optional, tag = "4")]
    pub console_fd: Option<u32>,
    /// The guest's vsock context id, 3 or more; the driver may have read it already, so it is the one the snapshot has.
    #[prost(uint64, tag = "5")]
    pub cid: u64,
    /// Whose life the guest leads from here: a generation as `kiln_protocol::mailbox` has it, its clock filled in when the
    /// guest is entered. `None` for the guest to go on as if nothing had been. A guest that is parked at its port is not given
    /// it: that is left to the host ([`Entered::at_port`]).
    #[prost(bytes = "vec", optional, tag = "6")]
    pub generation: Option<Vec<u8>>,
    /// The machine is not entered, and no generation is given: it stands still, its agent on the way to its first answer as far as it can
    /// come alone, until [`Resume`]. Answered by [`Standing`].
    #[prost(bool, tag = "7")]
    pub stand: bool,
}

/// Stops the machine.
#[derive(Clone, Copy, PartialEq, Eq, Message)]
pub struct Pause {
    /// The agent has said that it is parked at its port: the machine stands still for that, which is told by [`Parked`] first.
    #[prost(bool, tag = "1")]
    pub parked: bool,
}

/// Lets the machine go on.
#[derive(Clone, PartialEq, Message)]
pub struct Resume {
    /// As [`Restore::generation`].
    #[prost(bytes = "vec", optional, tag = "1")]
    pub generation: Option<Vec<u8>>,
}

/// Writes the machine's memory to the empty file beside the packet, pages of zeros as holes. A machine that runs is copied while it
/// runs, and stands still for a moment at the end.
#[derive(Clone, Copy, PartialEq, Eq, Message)]
pub struct SaveMemory {
    /// How much of it.
    #[prost(enumeration = "Portion", tag = "1")]
    pub portion: i32,
}

/// How much of a machine's memory is written to a file.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, prost::Enumeration)]
#[repr(i32)]
pub enum Portion {
    /// All of it.
    Whole = 0,
    /// All of a machine that runs, as far as it stands still long enough; what it writes from then on is left for the `Rest`.
    /// A host that cannot tell what is written leaves the file empty.
    Ahead = 1,
    /// What was left by `Ahead` of a machine that stands still now. The file is the same.
    Rest = 2,
}

/// Writes the machine's state to the empty file beside the packet: as it is, or for a machine that runs as it was at the instant of the
/// last [`SaveMemory`].
#[derive(Clone, PartialEq, Message)]
pub struct SaveState {
    /// SHA-256 of the guest kernel, 32 bytes.
    #[prost(bytes = "vec", tag = "1")]
    pub kernel: Vec<u8>,
    /// SHA-256 of the initramfs, 32 bytes.
    #[prost(bytes = "vec", tag = "2")]
    pub initramfs: Vec<u8>,
    /// The store's name of the saved memory, 32 bytes.
    #[prost(bytes = "vec", tag = "3")]
    pub memory: Vec<u8>,
}

/// Files for the [`Start`] or [`Restore`] that follows, as many as a packet may carry: in its numbering, the descriptors beside these
/// packets come first, in their order.
#[derive(Clone, PartialEq, Message)]
pub struct Files {}

/// A block device, served from pieces of files laid end to end.
#[derive(Clone, PartialEq, Message)]
pub struct Disk {
    /// The guest may not write.
    #[prost(bool, tag = "1")]
    pub read_only: bool,
    /// The pieces in order. A writable disk has exactly one.
    #[prost(message, repeated, tag = "2")]
    pub extents: Vec<Extent>,
    /// What the driver reads as the device's serial, at most 20 bytes. VIRTIO 1.2 §5.2 "Block Device".
    #[prost(string, tag = "3")]
    pub serial: String,
    /// The size the guest sees, in bytes, a multiple of 4096; 0 for as long as its pieces. What lies behind them reads as zeros
    /// and cannot be written, so a machine saved with one disk can be restored with another in its place.
    #[prost(uint64, tag = "4")]
    pub capacity_bytes: u64,
}

/// A piece of a file on a disk.
#[derive(Clone, PartialEq, Message)]
pub struct Extent {
    /// The file.
    #[prost(uint32, tag = "1")]
    pub fd: u32,
    /// Where in the file the piece starts, in bytes; a multiple of 4096.
    #[prost(uint64, tag = "2")]
    pub offset: u64,
    /// How long it is, in bytes; a multiple of 4096. The file may end before: the rest reads as zeros.
    #[prost(uint64, tag = "3")]
    pub length: u64,
    /// A file with the SHA-256 of each 64 KiB block of the whole data file (the last block as long as it is), each
    /// 32 bytes, which the host has checked against the object's name. Every block is checked against it when first
    /// read. `None` for data nobody vouches for, such as scratch space.
    #[prost(uint32, optional, tag = "4")]
    pub digests_fd: Option<u32>,
}

/// Connects a socket to a vsock port of the guest. The guest's end is the one descriptor beside the packet, a
/// stream socket; the monitor closes it when the guest refuses.
#[derive(Clone, PartialEq, Message)]
pub struct Connect {
    /// The guest port.
    #[prost(uint32, tag = "1")]
    pub port: u32,
}

/// Ends the machine at once.
#[derive(Clone, PartialEq, Message)]
pub struct Stop {}

/// Monitor to host.
#[derive(Clone, PartialEq, Message)]
pub struct Event {
    /// What happened.
    #[prost(oneof = "Happened", tags = "1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 20")]
    pub happened: Option<Happened>,
}

/// What a monitor reports.
#[derive(Clone, PartialEq, Oneof)]
pub enum Happened {
    /// The vCPUs entered the guest.
    #[prost(message, tag = "1")]
    Booted(Booted),
    /// The agent rang the doorbell for the first time: it listens.
    #[prost(message, tag = "2")]
    Ready(Ready),
    /// The machine ended; the last event.
    #[prost(message, tag = "3")]
    Ended(Ended),
    /// The machine could not be made or start; the last event.
    #[prost(message, tag = "4")]
    Failed(Failed),
    /// The agent is parked and the machine stands still, as [`Pause`] makes it or has made it.
    #[prost(message, tag = "5")]
    Parked(Parked),
    /// The machine stands still.
    #[prost(message, tag = "6")]
    Paused(Paused),
    /// A machine that stood still, or was restored, runs.
    #[prost(message, tag = "7")]
    Entered(Entered),
    /// The agent of a parked machine has taken the generation it was given and acknowledged it.
    #[prost(message, tag = "8")]
    Resumed(Resumed),
    /// The guest has become the one its generation says; user processes run from here.
    #[prost(message, tag = "9")]
    Adopted(Adopted),
    /// A file was written, or could not be.
    #[prost(message, tag = "10")]
    Saved(Saved),
    /// There is a shell.
    #[prost(message, tag = "11")]
    Prepared(Prepared),
    /// The machine of a snapshot waits to be resumed.
    #[prost(message, tag = "12")]
    Standing(Standing),
    /// What the guest last wrote to its console.
    #[prost(message, tag = "20")]
    Console(Console),
}

/// What machines of a shape have is there.
#[derive(Clone, Copy, PartialEq, Eq, Message)]
pub struct Prepared {
    /// Host `CLOCK_MONOTONIC` in nanoseconds when it was.
    #[prost(uint64, tag = "1")]
    pub at_ns: u64,
}

/// A guest waits.
#[derive(Clone, Copy, PartialEq, Eq, Message)]
pub struct Standing {
    /// Host `CLOCK_MONOTONIC` in nanoseconds when the order had come.
    #[prost(uint64, tag = "1")]
    pub ordered_ns: u64,
    /// The same when it was carried out.
    #[prost(uint64, tag = "2")]
    pub at_ns: u64,
}

/// The machine parked itself.
#[derive(Clone, Copy, PartialEq, Eq, Message)]
pub struct Parked {
    /// Host `CLOCK_MONOTONIC` in nanoseconds when it stood still.
    #[prost(uint64, tag = "1")]
    pub at_ns: u64,
}

/// The machine was stopped.
#[derive(Clone, Copy, PartialEq, Eq, Message)]
pub struct Paused {
    /// How long it took until the last vCPU stood still, in nanoseconds.
    #[prost(uint64, tag = "1")]
    pub took_ns: u64,
}

/// The machine runs again.
#[derive(Clone, Copy, PartialEq, Eq, Message)]
pub struct Entered {
    /// Host `CLOCK_MONOTONIC` in nanoseconds when the monitor started running.
    #[prost(uint64, tag = "1")]
    pub spawned_ns: u64,
    /// The same when the order to restore or resume had come.
    #[prost(uint64, tag = "2")]
    pub ordered_ns: u64,
    /// The same when the first vCPU was about to enter the guest.
    #[prost(uint64, tag = "3")]
    pub entered_ns: u64,
    /// The agent waits at its port to hear who the guest is, from the host: the monitor does not speak with it.
    #[prost(bool, tag = "4")]
    pub at_port: bool,
}

/// The agent acknowledged its generation.
#[derive(Clone, Copy, PartialEq, Eq, Message)]
pub struct Resumed {
    /// Host `CLOCK_MONOTONIC` in nanoseconds when the doorbell rang.
    #[prost(uint64, tag = "1")]
    pub at_ns: u64,
    /// When it had been entered, which is not told by itself: the host would wake for it while the agent answers.
    #[prost(message, optional, tag = "2")]
    pub entered: Option<Entered>,
}

/// The guest took on its identity.
#[derive(Clone, Copy, PartialEq, Eq, Message)]
pub struct Adopted {
    /// Host `CLOCK_MONOTONIC` in nanoseconds when the doorbell rang.
    #[prost(uint64, tag = "1")]
    pub at_ns: u64,
}

/// What came of [`SaveMemory`] or [`SaveState`]. The machine runs, or stands still, as before.
#[derive(Clone, PartialEq, Eq, Message)]
pub struct Saved {
    /// Why the file is of no use, in one line; empty when it is whole.
    #[prost(string, tag = "1")]
    pub failure: String,
    /// How long it took, in nanoseconds.
    #[prost(uint64, tag = "2")]
    pub took_ns: u64,
    /// How long a machine that runs stood still for it, in nanoseconds.
    #[prost(uint64, tag = "3")]
    pub paused_ns: u64,
}

/// The vCPUs entered the guest.
#[derive(Clone, Copy, PartialEq, Eq, Message)]
pub struct Booted {
    /// Host `CLOCK_MONOTONIC` in nanoseconds when the monitor started running.
    #[prost(uint64, tag = "1")]
    pub spawned_ns: u64,
    /// The same when the first vCPU entered the guest.
    #[prost(uint64, tag = "2")]
    pub entered_ns: u64,
}

/// The agent listens.
#[derive(Clone, Copy, PartialEq, Eq, Message)]
pub struct Ready {
    /// Host `CLOCK_MONOTONIC` in nanoseconds when the agent's first instruction announced itself; 0 if it did not.
    #[prost(uint64, tag = "1")]
    pub agent_started_ns: u64,
    /// The same when the doorbell rang.
    #[prost(uint64, tag = "2")]
    pub ready_ns: u64,
}

/// How a machine ended.
#[derive(Clone, PartialEq, Message)]
pub struct Ended {
    /// Why.
    #[prost(enumeration = "EndReason", tag = "1")]
    pub reason: i32,
    /// The particulars, in one line, when there are any.
    #[prost(string, tag = "2")]
    pub detail: String,
    /// The last of the guest's console, at most 16 KiB; empty after an orderly power-off.
    #[prost(bytes = "vec", tag = "3")]
    pub console: Vec<u8>,
}

/// The ways a machine ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, prost::Enumeration)]
#[repr(i32)]
pub enum EndReason {
    /// The guest powered off.
    PowerOff = 0,
    /// The guest asked for a reset, which for Kiln is an end too.
    Reset = 1,
    /// The guest kernel panicked.
    Panic = 2,
    /// A vCPU stopped in a way nothing can be done about: triple fault, or an instruction KVM cannot emulate.
    Crash = 3,
    /// The host said [`Stop`].
    Stopped = 4,
}

/// The machine could not be made or start.
#[derive(Clone, PartialEq, Message)]
pub struct Failed {
    /// Who is to blame.
    #[prost(enumeration = "Blame", tag = "1")]
    pub blame: i32,
    /// What was tried and what went wrong, in one line.
    #[prost(string, tag = "2")]
    pub message: String,
    /// What would help, or empty.
    #[prost(string, tag = "3")]
    pub hint: String,
}

/// Who is to blame for a failure; it decides the exit code.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, prost::Enumeration)]
#[repr(i32)]
pub enum Blame {
    /// Whoever asked: a bad kernel file, an impossible shape.
    Caller = 0,
    /// The host: no permission, a missing KVM capability, no memory.
    Host = 1,
    /// Kiln.
    Kiln = 2,
}
