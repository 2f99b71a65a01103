//! Frames: length, kind, payload.

use crate::MAX_PAYLOAD_BYTES;

/// Bytes of a frame's header: payload length (4, little-endian) and kind (1).
pub const HEADER_BYTES: usize = 5;

/// What a frame carries.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Kind {
    /// Host to agent: a [`Request`](crate::Request); the first frame of a stream and only that.
    Request = 1,
    /// Host to agent: bytes for the command's stdin.
    Stdin = 2,
    /// Host to agent: stdin ends here. No payload.
    StdinEnd = 3,
    /// Host to agent: a signal number (u32) for the command's process group.
    Signal = 4,
    /// Host to agent: the terminal's new [`WindowSize`](crate::WindowSize).
    Resize = 5,
    /// Host to agent: more stdout credit in bytes (u64).
    StdoutCredit = 6,
    /// Host to agent: more stderr credit in bytes (u64).
    StderrCredit = 7,
    /// Host to agent: nobody reads stdout any more; the command's next write to it fails as to a pipe whose reader
    /// is gone (SIGPIPE, EPIPE). Data frames already under way are dropped. No payload.
    StdoutClose = 8,
    /// Host to agent: the same for stderr. No payload.
    StderrClose = 9,
    /// Agent to host: a [`Reply`](crate::Reply).
    Reply = 16,
    /// Agent to host: bytes the command wrote to stdout (or its terminal).
    Stdout = 17,
    /// Agent to host: bytes the command wrote to stderr.
    Stderr = 18,
    /// Agent to host: more stdin credit in bytes (u64).
    StdinCredit = 19,
    /// Agent to host: an [`Exited`](crate::Exited); the last frame of a stream.
    Exited = 20,
}

impl TryFrom<u8> for Kind {
    type Error = Malformed;

    fn try_from(byte: u8) -> Result<Self, Malformed> {
        Ok(match byte {
            1 => Self::Request,
            2 => Self::Stdin,
            3 => Self::StdinEnd,
            4 => Self::Signal,
            5 => Self::Resize,
            6 => Self::StdoutCredit,
            7 => Self::StderrCredit,
            8 => Self::StdoutClose,
            9 => Self::StderrClose,
            16 => Self::Reply,
            17 => Self::Stdout,
            18 => Self::Stderr,
            19 => Self::StdinCredit,
            20 => Self::Exited,
            other => return Err(Malformed::Kind(other)),
        })
    }
}

/// The peer sent something that is no frame; the stream is unusable from here on.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Malformed {
    /// A kind this version does not know.
    #[error("frame of unknown kind {0}")]
    Kind(u8),
    /// A payload above [`MAX_PAYLOAD_BYTES`].
    #[error("frame of {0} bytes where {MAX_PAYLOAD_BYTES} are allowed")]
    Length(usize),
}

/// The header of a frame with `payload_bytes` of payload.
pub fn header(kind: Kind, payload_bytes: usize) -> [u8; HEADER_BYTES] {
    let [a, b, c, d] = (payload_bytes as u32).to_le_bytes();
    [a, b, c, d, kind as u8]
}

/// Reads a header: the kind and how many payload bytes follow.
///
/// # Errors
/// [`Malformed`] for an unknown kind or a length above the limit; nothing more may be read from the stream then.
pub fn parse_header(bytes: [u8; HEADER_BYTES]) -> Result<(Kind, usize), Malformed> {
    let [a, b, c, d, kind] = bytes;
    let length = u32::from_le_bytes([a, b, c, d]) as usize;
    if length > MAX_PAYLOAD_BYTES {
        return Err(Malformed::Length(length));
    }
    Ok((Kind::try_from(kind)?, length))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_header_reads_back() {
        assert_eq!(parse_header(header(Kind::Stdout, 77)), Ok((Kind::Stdout, 77)));
    }

    #[test]
    fn a_length_above_the_limit_is_refused_before_anything_is_read() {
        assert_eq!(
            parse_header(header(Kind::Stdin, MAX_PAYLOAD_BYTES + 1)),
            Err(Malformed::Length(MAX_PAYLOAD_BYTES + 1))
        );
    }

    #[test]
    fn an_unknown_kind_is_refused() {
        assert_eq!(parse_header([0, 0, 0, 0, 99]), Err(Malformed::Kind(99)));
    }
}
