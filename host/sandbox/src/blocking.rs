//! The library for programs without a runtime of their own.
//!
//! Everything is the same but for who waits: [`wait`] runs a future of this library to its end on threads that Kiln keeps for it, and
//! [`stream`] makes of one of its streams a [`Read`] and a [`Write`].
//!
//! ```no_run
//! use std::io::Write as _;
//!
//! use kiln::Image;
//! use kiln::blocking::{stream, wait};
//!
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! let image = wait(Image::builder("python:3.12").build())?;
//! let pool = wait(async { image.pool().build() });
//! let vm = wait(pool.acquire())?;
//! let mut child = wait(vm.exec(["python3", "-"]).stdin().spawn())?;
//! if let Some(stdin) = child.stdin.take() {
//!     stream(stdin).write_all(b"print(6 * 7)")?;
//! }
//! if let Some(stdout) = child.stdout.take() {
//!     println!("{}", std::io::read_to_string(stream(stdout))?);
//! }
//! assert!(wait(child.wait())?.success());
//! # Ok(())
//! # }
//! ```

use std::io::{self, Read, Write};
use std::sync::OnceLock;

use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::runtime::{Builder, Runtime};

/// Threads for what goes on while nobody waits: streams, machines that come back to their pool.
const THREADS: usize = 2;

static RUNTIME: OnceLock<Runtime> = OnceLock::new();

/// Waits for a future of this library.
///
/// # Panics
/// Where a runtime runs already: there, `.await` it. When the host has no threads left for the first call.
pub fn wait<F: Future>(future: F) -> F::Output {
    runtime().block_on(future)
}

fn runtime() -> &'static Runtime {
    RUNTIME.get_or_init(|| {
        let mut builder = Builder::new_multi_thread();
        builder.worker_threads(THREADS).thread_name("kiln").enable_all();
        builder.build().expect("a host that runs a program has a few threads for it")
    })
}

/// A stream that is read and written by who waits for it. Dropping it closes what it is of.
pub fn stream<S>(inner: S) -> Stream<S> {
    Stream { inner }
}

/// A stream that is read and written by who waits for it. Made by [`stream`].
#[derive(Debug)]
pub struct Stream<S> {
    inner: S,
}

impl<S> Stream<S> {
    /// The stream as it was.
    pub fn into_inner(self) -> S {
        self.inner
    }
}

impl<S: AsyncRead + Unpin> Read for Stream<S> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        wait(self.inner.read(buffer))
    }
}

impl<S: AsyncWrite + Unpin> Write for Stream<S> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        wait(self.inner.write(bytes))
    }

    fn flush(&mut self) -> io::Result<()> {
        wait(self.inner.flush())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_stream_is_read_and_written_without_a_runtime() {
        let (one, other) = tokio::io::duplex(4);
        let writer = std::thread::spawn(move || stream(one).write_all(b"more than fits"));
        assert_eq!(io::read_to_string(stream(other)).expect("text"), "more than fits");
        writer.join().expect("no panic").expect("written");
    }
}
