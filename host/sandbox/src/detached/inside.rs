//! What a handle on a machine that another process keeps does in its guest besides running commands. What is carried does not
//! pass the keeper.

use std::net::SocketAddr;
use std::path::Path;

use tokio::io::AsyncRead;

use super::Kept;
use crate::files::{self, Copied, CopyOptions, FileError, GuestFile};
use crate::ports::{self, Behind, ExposeError, ExposedPort, GuestStream};
use crate::vm::{AskError, Stats, Target, stats};

impl Kept {
    /// As [`Vm::read_file`](crate::Vm::read_file).
    ///
    /// # Errors
    /// As there.
    pub async fn read_file(&self, path: impl AsRef<Path>) -> Result<GuestFile, FileError> {
        files::read(Target::Kept(self), path.as_ref()).await
    }

    /// As [`Vm::write_file`](crate::Vm::write_file).
    ///
    /// # Errors
    /// As there.
    pub async fn write_file(
        &self,
        path: impl AsRef<Path>,
        mode: u32,
        contents: impl AsyncRead + Unpin,
    ) -> Result<u64, FileError> {
        files::write(Target::Kept(self), path.as_ref(), mode, contents).await
    }

    /// As [`Vm::copy_in`](crate::Vm::copy_in).
    ///
    /// # Errors
    /// As there.
    pub async fn copy_in(
        &self,
        from: impl AsRef<Path>,
        to: impl AsRef<Path>,
        options: CopyOptions,
    ) -> Result<Copied, FileError> {
        files::copy_in(Target::Kept(self), from.as_ref(), to.as_ref(), options).await
    }

    /// As [`Vm::copy_out`](crate::Vm::copy_out).
    ///
    /// # Errors
    /// As there.
    pub async fn copy_out(
        &self,
        from: impl AsRef<Path>,
        to: impl AsRef<Path>,
        options: CopyOptions,
    ) -> Result<Copied, FileError> {
        files::copy_out(Target::Kept(self), from.as_ref(), to.as_ref(), options).await
    }

    /// As [`Vm::connect_tcp`](crate::Vm::connect_tcp).
    ///
    /// # Errors
    /// As there.
    pub async fn connect_tcp(&self, port: u16) -> Result<GuestStream, AskError> {
        ports::connect_tcp(Target::Kept(self), port).await
    }

    /// As [`Vm::connect`](crate::Vm::connect).
    ///
    /// # Errors
    /// As there.
    pub async fn connect(&self, port: u32) -> Result<GuestStream, AskError> {
        ports::connect(Target::Kept(self), port).await
    }

    /// As [`Vm::expose_tcp`](crate::Vm::expose_tcp).
    ///
    /// # Errors
    /// As there.
    pub async fn expose_tcp(
        &self,
        address: impl Into<Option<SocketAddr>>,
        port: u16,
    ) -> Result<ExposedPort, ExposeError> {
        ports::expose(Behind::Kept(self.clone()), None, address.into(), port).await
    }

    /// As [`Vm::workload_signal`](crate::Vm::workload_signal).
    ///
    /// # Errors
    /// As there.
    pub async fn workload_signal(&self, number: u32) -> Result<(), AskError> {
        stats::signal(Target::Kept(self), number).await
    }

    /// As [`Vm::stats`](crate::Vm::stats).
    ///
    /// # Errors
    /// As there.
    pub async fn stats(&self) -> Result<Stats, AskError> {
        Ok(Stats { guest: stats::guest(Target::Kept(self)).await?, host: self.host_stats().await? })
    }
}
