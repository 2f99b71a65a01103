//! What is said between a keeper and who wants something of its machine: one request a connection, one answer, a packet each.
//!
//! The socket is `SOCK_SEQPACKET`, so a packet is a message, and it has the limits of [`kiln_control`]'s packets.

use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::path::Path;

use prost::{Enumeration, Message, Oneof};
use rustix::fd::AsFd;
use rustix::net::{
    AddressFamily, SocketAddrUnix, SocketFlags, SocketType, accept_with, bind, connect, listen, socket_with,
    sockopt,
};
use tokio::io::Interest;

use super::folder::SOCKET;
use crate::monitor::channel::AsyncChannel;
use crate::readiness::Readiness;

/// Connections that wait to be accepted.
const BACKLOG: i32 = 16;

/// What is wanted.
#[derive(Clone, PartialEq, Message)]
pub(super) struct Request {
    /// `None` is refused.
    #[prost(oneof = "Wanted", tags = "1, 2, 3, 4, 5, 6, 7, 8, 9, 20, 21, 22, 23, 24")]
    pub(super) wanted: Option<Wanted>,
}

/// What can be wanted of a machine.
#[derive(Clone, PartialEq, Oneof)]
pub(super) enum Wanted {
    /// Stop it between two instructions. Answered by `Paused`.
    #[prost(message, tag = "1")]
    Pause(Nothing),
    /// Let it go on. Answered by `Done`.
    #[prost(message, tag = "2")]
    Resume(Nothing),
    /// Have the guest end by itself. Answered by `Done` once nothing is left.
    #[prost(message, tag = "3")]
    PowerOff(PowerOff),
    /// End it at once. Answered likewise.
    #[prost(message, tag = "4")]
    End(Nothing),
    /// Ask the agent for something that is a client's to ask for. Answered by `Answered`, with the connection.
    #[prost(message, tag = "5")]
    Agent(kiln_protocol::Request),
    /// Save it to the store. Answered by `Saved`.
    #[prost(message, tag = "6")]
    Snapshot(Snapshot),
    /// Copy it. Answered by `Saved`, with the files of the copy.
    #[prost(message, tag = "7")]
    Copy(Nothing),
    /// Connect to this vsock port of the guest. Answered by `Done`, with the connection.
    #[prost(uint32, tag = "8")]
    Connect(u32),
    /// Say what its process uses. Answered by `Used`.
    #[prost(message, tag = "9")]
    Use(Nothing),
    /// Say when it has ended. Answered by `Ended`.
    #[prost(message, tag = "20")]
    Wait(Nothing),
    /// Send its main command a signal; SIGKILL ends the machine. Answered by `Done`.
    #[prost(message, tag = "21")]
    Signal(Signal),
    /// Carry the streams of a command whose connection comes beside this. Answered by `Done`.
    #[prost(message, tag = "22")]
    Hold(Hold),
    /// Publish a port of the guest, at this start and the next ones. Answered by `Exposed`.
    #[prost(message, tag = "23")]
    Expose(Port),
    /// Publish it no more. Answered by `Done`.
    #[prost(message, tag = "24")]
    Unexpose(Port),
}

#[derive(Clone, Copy, PartialEq, Eq, Message)]
pub(super) struct Nothing {}

#[derive(Clone, Copy, PartialEq, Eq, Message)]
pub(super) struct PowerOff {
    /// How long processes have, in milliseconds.
    #[prost(uint64, tag = "1")]
    pub(super) grace_ms: u64,
}

#[derive(Clone, PartialEq, Eq, Message)]
pub(super) struct Snapshot {
    /// What the snapshot is called; empty for nothing.
    #[prost(string, tag = "1")]
    pub(super) name: String,
}

/// What came of it.
#[derive(Clone, PartialEq, Message)]
pub(super) struct Reply {
    #[prost(oneof = "Outcome", tags = "1, 2, 3, 4, 5, 6, 20, 21")]
    pub(super) outcome: Option<Outcome>,
}

/// What can come of a request.
#[derive(Clone, PartialEq, Oneof)]
pub(super) enum Outcome {
    #[prost(message, tag = "1")]
    Failed(Failed),
    #[prost(message, tag = "2")]
    Done(Nothing),
    #[prost(message, tag = "3")]
    Paused(Paused),
    #[prost(message, tag = "4")]
    Answered(Answered),
    #[prost(message, tag = "5")]
    Saved(Saved),
    #[prost(message, tag = "6")]
    Used(Used),
    #[prost(message, tag = "20")]
    Ended(Ended),
    #[prost(message, tag = "21")]
    Exposed(Port),
}

#[derive(Clone, PartialEq, Eq, Message)]
pub(super) struct Failed {
    #[prost(enumeration = "Blame", tag = "1")]
    pub(super) blame: i32,
    /// What was tried and what went wrong, in one line.
    #[prost(string, tag = "2")]
    pub(super) message: String,
}

/// [`crate::Blame`] as it travels.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Enumeration)]
#[repr(i32)]
pub(super) enum Blame {
    Kiln = 0,
    Caller = 1,
    Guest = 2,
    Host = 3,
}

#[derive(Clone, Copy, PartialEq, Eq, Message)]
pub(super) struct Signal {
    #[prost(uint32, tag = "1")]
    pub(super) number: u32,
}

/// A port of a guest's at an address of the host's.
#[derive(Clone, PartialEq, Eq, Message)]
pub(super) struct Port {
    /// Where it is to be reached, or is: a socket address in words.
    #[prost(string, tag = "1")]
    pub(super) address: String,
    #[prost(uint32, tag = "2")]
    pub(super) guest: u32,
}

#[derive(Clone, PartialEq, Eq, Message)]
pub(super) struct Hold {
    /// The command's process id.
    #[prost(uint32, tag = "1")]
    pub(super) pid: u32,
    /// When it is killed, in milliseconds; 0 is never.
    #[prost(uint64, tag = "2")]
    pub(super) timeout_ms: u64,
    /// The command, for who wants to know.
    #[prost(string, tag = "3")]
    pub(super) command: String,
}

/// What it ended with: [`super::Exit`].
#[derive(Clone, Copy, PartialEq, Eq, Message)]
pub(super) struct Ended {
    #[prost(uint32, tag = "1")]
    pub(super) code: u32,
    /// 0 for none.
    #[prost(uint32, tag = "2")]
    pub(super) signal: u32,
}

#[derive(Clone, Copy, PartialEq, Eq, Message)]
pub(super) struct Paused {
    #[prost(uint64, tag = "1")]
    pub(super) took_ns: u64,
}

#[derive(Clone, PartialEq, Eq, Message)]
pub(super) struct Answered {
    /// The agent's `Reply`, as it came.
    #[prost(bytes = "vec", tag = "1")]
    pub(super) reply: Vec<u8>,
}

#[derive(Clone, PartialEq, Eq, Message)]
pub(super) struct Saved {
    /// A `SnapshotRecord` as JSON.
    #[prost(bytes = "vec", tag = "1")]
    pub(super) record: Vec<u8>,
    #[prost(uint64, tag = "2")]
    pub(super) frozen_ns: u64,
    #[prost(uint64, tag = "3")]
    pub(super) still_ns: u64,
}

/// [`crate::HostStats`] as it travels.
#[derive(Clone, Copy, PartialEq, Eq, Message)]
pub(super) struct Used {
    #[prost(uint64, tag = "1")]
    pub(super) resident_bytes: u64,
    #[prost(uint64, tag = "2")]
    pub(super) private_bytes: u64,
    #[prost(uint64, tag = "3")]
    pub(super) resident_peak_bytes: u64,
    #[prost(uint64, tag = "4")]
    pub(super) cpu_us: u64,
}

impl From<crate::Blame> for Blame {
    fn from(blame: crate::Blame) -> Self {
        match blame {
            crate::Blame::Kiln => Self::Kiln,
            crate::Blame::Caller => Self::Caller,
            crate::Blame::Guest => Self::Guest,
            crate::Blame::Host => Self::Host,
        }
    }
}

impl From<Blame> for crate::Blame {
    fn from(blame: Blame) -> Self {
        match blame {
            Blame::Kiln => Self::Kiln,
            Blame::Caller => Self::Caller,
            Blame::Guest => Self::Guest,
            Blame::Host => Self::Host,
        }
    }
}

/// Where a keeper is reached.
#[derive(Debug)]
pub(super) struct Listener {
    socket: OwnedFd,
    readiness: Readiness,
}

impl Listener {
    /// Listens in a machine's folder, in the place of a keeper that is gone.
    pub(super) fn bind(folder: &Path) -> io::Result<Self> {
        match std::fs::remove_file(folder.join(SOCKET)) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
            _ => {}
        }
        let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
        let socket = socket_with(AddressFamily::UNIX, SocketType::SEQPACKET, flags, None)?;
        let (_folder, address) = address(folder)?;
        bind(&socket, &address)?;
        listen(&socket, BACKLOG)?;
        let readiness = Readiness::of(socket.try_clone()?)?;
        Ok(Self { socket, readiness })
    }

    /// The next connection of the user that this process is of. Others are closed: they have no business here, though the
    /// folder should have kept them away.
    pub(super) async fn accept(&self) -> io::Result<AsyncChannel> {
        loop {
            let accept = || Ok(accept_with(&self.socket, SocketFlags::CLOEXEC | SocketFlags::NONBLOCK)?);
            let connection = self.readiness.when(Interest::READABLE, accept).await?;
            let peer = sockopt::socket_peercred(&connection)?;
            if peer.uid == rustix::process::geteuid() {
                return AsyncChannel::new(connection);
            }
        }
    }
}

/// Connects to the keeper that listens in a machine's folder.
pub(super) fn reach(folder: &Path) -> io::Result<AsyncChannel> {
    let socket = socket_with(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None)?;
    let (_folder, address) = address(folder)?;
    connect(&socket, &address)?;
    AsyncChannel::new(socket)
}

/// The address of a machine's socket, good as long as the folder that comes with it is open: so it is short however long the
/// folder's path. Linux man page unix(7): `sun_path` has 108 bytes.
fn address(folder: &Path) -> io::Result<(File, SocketAddrUnix)> {
    let folder = File::open(folder)?;
    let path = format!("/proc/self/fd/{}/{SOCKET}", folder.as_fd().as_raw_fd());
    Ok((folder, SocketAddrUnix::new(path)?))
}
