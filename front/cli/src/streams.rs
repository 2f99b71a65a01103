//! The caller's stdin, stdout and stderr, carried to and from a command.

use std::io;

use kiln::agent::ChildStdin;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};

use crate::events::EventLog;

/// One read's worth.
const CHUNK_BYTES: usize = 64 << 10;

/// Carries a command's output until its end. A caller that goes away (`| head`) is the command's to know: `from` is
/// dropped, which closes its pipe.
///
/// # Errors
/// When the output cannot be written for another reason than that nobody reads it.
pub(crate) async fn carry_out(
    mut from: impl AsyncRead + Unpin,
    mut to: impl AsyncWrite + Unpin,
    events: EventLog,
) -> io::Result<()> {
    let mut chunk = vec![0; CHUNK_BYTES];
    loop {
        let count = match from.read(&mut chunk).await {
            // A connection that was lost is reported by the wait for the command's end.
            Ok(0) | Err(_) => return Ok(()),
            Ok(count) => count,
        };
        events.output();
        if let Err(error) = to.write_all(&chunk[..count]).await {
            return closed_is_fine(error);
        }
        if let Err(error) = to.flush().await {
            return closed_is_fine(error);
        }
    }
}

fn closed_is_fine(error: io::Error) -> io::Result<()> {
    if error.kind() == io::ErrorKind::BrokenPipe { Ok(()) } else { Err(error) }
}

/// Carries the caller's stdin to a command until its end, or until the command is gone.
pub(crate) async fn carry_in(mut to: ChildStdin) {
    let mut stdin = tokio::io::stdin();
    let mut chunk = vec![0; CHUNK_BYTES];
    while let Ok(count) = stdin.read(&mut chunk).await {
        if count == 0 || to.write_all(&chunk[..count]).await.is_err() {
            break;
        }
    }
    // Dropping `to` ends the command's stdin after what was written.
}
