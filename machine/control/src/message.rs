//! The messages, as prost types. A field named `*_fd` is an index into the descriptors beside the packet; for [`Start`], and
//! those of [`Files`] before it.

use prost::{Message, Oneof};

/// Host to monitor.
#[derive(Clone, PartialEq, Message)]
pub struct Command {
    /// What to do. `None` is refused.
    #[prost(oneof = "Do", tags = "1, 2, 3, 4")]
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

/// Files for the [`Start`] that follows, as many as a packet may carry: in its numbering, the descriptors beside these
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
    #[prost(oneof = "Happened", tags = "1, 2, 3, 4")]
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
