//! What a machine's handle does in its guest besides running commands.

use std::net::SocketAddr;
use std::path::Path;
use std::sync::Arc;

use tokio::io::AsyncRead;
use tokio::net::UnixStream;

use super::{AskError, HostStats, MonitorError, Stats, Target, Vm, stats};
use crate::files::{self, Copied, CopyOptions, FileError, GuestFile};
use crate::ports::{self, Behind, ExposeError, ExposedPort, GuestStream};

impl Vm {
    fn target(&self) -> Target<'_> {
        Target::Own(&self.machine.monitor)
    }

    /// Connects to a vsock port for another process.
    pub(crate) async fn connect_to(&self, port: u32) -> Result<UnixStream, AskError> {
        self.target().connect(port).await
    }

    /// Opens a file of the guest's, links followed, to be read as a stream. The file is read as root, wherever its path, which has
    /// to be absolute, leads in the guest's root.
    ///
    /// # Errors
    /// [`FileError::Ask`], with [`Reason::NotFound`](crate::Reason::NotFound) when it is not there; what is no regular file is
    /// refused.
    pub async fn read_file(&self, path: impl AsRef<Path>) -> Result<GuestFile, FileError> {
        files::read(self.target(), path.as_ref()).await
    }

    /// Writes all that a reader has to a file of the guest's, and returns how many bytes that was. The file is root's, has these
    /// permissions (the lowest 12 bits of `st_mode`), and takes the place of what had its name, a link among it, at the moment
    /// when it is complete; the directories above it are made. When this is dropped, or anything fails, nothing is left of it.
    ///
    /// # Errors
    /// [`FileError::Source`] when the reader fails; [`FileError::Ask`] when the guest refuses.
    pub async fn write_file(
        &self,
        path: impl AsRef<Path>,
        mode: u32,
        contents: impl AsyncRead + Unpin,
    ) -> Result<u64, FileError> {
        files::write(self.target(), path.as_ref(), mode, contents).await
    }

    /// Copies a file, a link, or a directory and all in it into the guest, with permissions and times. Names follow `docker cp`:
    /// into `to` if that is a directory, and as `to` otherwise; of a path that ends in `/.`, what is in it. Each file and link
    /// appears when it is complete, in the place of one that is there; directories that are there stay and are added to.
    ///
    /// Devices, fifos and sockets are counted and left out. What vanishes meanwhile is left out, and what grows is cut.
    ///
    /// # Errors
    /// [`FileError::Host`] when something cannot be read; [`FileError::Ask`] when the guest refuses. What was complete by then
    /// stays.
    pub async fn copy_in(
        &self,
        from: impl AsRef<Path>,
        to: impl AsRef<Path>,
        options: CopyOptions,
    ) -> Result<Copied, FileError> {
        files::copy_in(self.target(), from.as_ref(), to.as_ref(), options).await
    }

    /// Copies a file, a link, or a directory and all in it out of the guest: names as for [`copy_in`](Self::copy_in). What is made
    /// is the caller's, without set-id bits, and nothing outside of `to` is made, whatever the guest says: a link of the guest's
    /// is copied as one, and never followed here.
    ///
    /// # Errors
    /// [`FileError::TooLarge`] beyond the limits of the options; [`FileError::Host`] when something cannot be made;
    /// [`FileError::Ask`] when the guest refuses, or breaks the rules. What was complete by then stays.
    pub async fn copy_out(
        &self,
        from: impl AsRef<Path>,
        to: impl AsRef<Path>,
        options: CopyOptions,
    ) -> Result<Copied, FileError> {
        files::copy_out(self.target(), from.as_ref(), to.as_ref(), options).await
    }

    /// Connects to a TCP port of the guest's own addresses: 127.0.0.1, and `::1` when nothing listens there. Through the agent, so
    /// the guest needs no network for it.
    ///
    /// # Errors
    /// [`AskError::Agent`] with [`Reason::NotListening`](crate::Reason::NotListening) when nothing listens, and
    /// [`Reason::Busy`](crate::Reason::Busy) when 64 such connections are open.
    pub async fn connect_tcp(&self, port: u16) -> Result<GuestStream, AskError> {
        ports::connect_tcp(self.target(), port).await
    }

    /// Connects to a vsock port of the guest's, for protocols of one's own.
    ///
    /// Returns before the guest has answered: a port on which nothing listens reads as an end of the stream. The agent's own port,
    /// 1024, is refused.
    ///
    /// # Errors
    /// [`AskError`]
    pub async fn connect(&self, port: u32) -> Result<GuestStream, AskError> {
        ports::connect(self.target(), port).await
    }

    /// Listens on the host for connections to a TCP port of the guest's own addresses. The address is a free port of 127.0.0.1
    /// unless one is given, of which port 0 stands for a free one; what is given otherwise than on the loopback interface is there
    /// for everybody who can reach it.
    ///
    /// [`EXPOSED_CONNECTIONS_MAX`](crate::EXPOSED_CONNECTIONS_MAX) connections are carried at a time, and each for itself: one that
    /// nobody listens for in the guest, or that breaks, is closed. They go on when the port is dropped.
    ///
    /// # Errors
    /// [`ExposeError`] when the address cannot be listened on.
    pub async fn expose_tcp(
        &self,
        address: impl Into<Option<SocketAddr>>,
        port: u16,
    ) -> Result<ExposedPort, ExposeError> {
        ports::expose(
            Behind::Own(Arc::downgrade(&self.machine)),
            self.target().end_watch(),
            address.into(),
            port,
        )
        .await
    }

    /// Sends a signal to every process of the guest's users; where a command is process 1, to that, as `docker kill` does.
    ///
    /// # Errors
    /// [`AskError::Agent`] when there is no process, or no such signal.
    pub async fn workload_signal(&self, number: u32) -> Result<(), AskError> {
        stats::signal(self.target(), number).await
    }

    /// What the machine uses, in its guest and on the host.
    ///
    /// # Errors
    /// [`AskError`] when the guest does not say; [`host_stats`](Self::host_stats) does without it.
    pub async fn stats(&self) -> Result<Stats, AskError> {
        Ok(Stats { guest: stats::guest(self.target()).await?, host: self.host_stats() })
    }

    /// What the guest last wrote to its console, 64 KiB at most: what its kernel has to say. It can be had of a paused machine, too.
    ///
    /// # Errors
    /// [`MonitorError::Ended`] when the machine is gone: its end has the last of it.
    pub async fn console(&self) -> Result<Vec<u8>, MonitorError> {
        self.machine.monitor.console().await
    }

    /// What the machine uses on the host. Asks neither guest nor monitor, so it can be had of a paused machine. Costs three small
    /// reads of `/proc`.
    pub fn host_stats(&self) -> HostStats {
        HostStats::of(self.machine.monitor.process_id())
    }
}
