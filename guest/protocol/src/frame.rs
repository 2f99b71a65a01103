//! Frames: length, kind, payload.

use alloc::vec::Vec;

use prost::Message;

use crate::{Entry, MAX_DATA_BYTES, MAX_PAYLOAD_BYTES, Request, WindowSize};

/// Bytes of a frame's header: payload length (4, little-endian) and kind (1).
pub const HEADER_BYTES: usize = 5;

/// The most bytes of a reply: its longest text is one line of an error.
const MAX_REPLY_BYTES: usize = 16 << 10;
/// The most bytes of an entry: a name, the longest path a link can lead to, and numbers.
const MAX_ENTRY_BYTES: usize = 5 << 10;
/// The most bytes of a message that holds a few numbers.
const MAX_NUMBERS_BYTES: usize = 128;

/// What a frame carries.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Kind {
    /// Host to agent: a [`Request`]; the first frame of a stream and only that.
    Request = 1,
    /// Host to agent: bytes for the command's stdin.
    Stdin = 2,
    /// Host to agent: stdin ends here. No payload.
    StdinEnd = 3,
    /// Host to agent: a signal number (u32) for the command's process group.
    Signal = 4,
    /// Host to agent: the terminal's new [`WindowSize`].
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
    /// Either side: an [`Entry`] of a tree.
    Entry = 10,
    /// Either side: contents of the file whose entry came last.
    Data = 11,
    /// Host to agent: the tree is complete. No payload.
    End = 12,
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

impl Kind {
    /// The most bytes the payload of such a frame may have.
    pub fn max_payload_bytes(self) -> usize {
        match self {
            Self::Request => MAX_PAYLOAD_BYTES,
            Self::Stdin | Self::Stdout | Self::Stderr | Self::Data => MAX_DATA_BYTES,
            Self::Entry => MAX_ENTRY_BYTES,
            Self::End | Self::StdinEnd | Self::StdoutClose | Self::StderrClose => 0,
            Self::Signal => size_of::<u32>(),
            Self::StdoutCredit | Self::StderrCredit | Self::StdinCredit => size_of::<u64>(),
            Self::Reply => MAX_REPLY_BYTES,
            Self::Resize | Self::Exited => MAX_NUMBERS_BYTES,
        }
    }
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
            10 => Self::Entry,
            11 => Self::Data,
            12 => Self::End,
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
    /// A payload above [`Kind::max_payload_bytes`].
    #[error("frame of {0} bytes, more than its kind may have")]
    Length(usize),
    /// A payload that is not what the kind says.
    #[error("frame of kind {0:?} with a payload that does not decode")]
    Payload(Kind),
    /// A kind that only the other side sends.
    #[error("frame of kind {0:?} from the wrong side")]
    Direction(Kind),
}

/// The header of a frame with `payload_bytes` of payload.
pub fn header(kind: Kind, payload_bytes: usize) -> [u8; HEADER_BYTES] {
    let [a, b, c, d] = (payload_bytes as u32).to_le_bytes();
    [a, b, c, d, kind as u8]
}

/// Reads a header: the kind and how many payload bytes follow.
///
/// # Errors
/// [`Malformed`] for an unknown kind or a length above the kind's limit; nothing more may be read from the stream
/// then.
pub fn parse_header(bytes: [u8; HEADER_BYTES]) -> Result<(Kind, usize), Malformed> {
    let [a, b, c, d, kind] = bytes;
    let length = u32::from_le_bytes([a, b, c, d]) as usize;
    if length > MAX_PAYLOAD_BYTES {
        return Err(Malformed::Length(length));
    }
    let kind = Kind::try_from(kind)?;
    if length > kind.max_payload_bytes() {
        return Err(Malformed::Length(length));
    }
    Ok((kind, length))
}

/// Appends a whole frame to `out`.
pub fn append(out: &mut Vec<u8>, kind: Kind, payload: &[u8]) {
    out.extend_from_slice(&header(kind, payload.len()));
    out.extend_from_slice(payload);
}

/// Appends a frame that carries `message`.
pub fn append_message(out: &mut Vec<u8>, kind: Kind, message: &impl Message) {
    let length = message.encoded_len();
    out.extend_from_slice(&header(kind, length));
    message.encode_raw(out);
}

/// What the host says to the agent, taken apart and checked.
#[derive(Clone, Debug, PartialEq)]
pub enum ToAgent<'a> {
    /// [`Kind::Request`].
    Request(Request),
    /// [`Kind::Stdin`].
    Stdin(&'a [u8]),
    /// [`Kind::StdinEnd`].
    StdinEnd,
    /// [`Kind::Signal`].
    Signal(u32),
    /// [`Kind::Resize`].
    Resize(WindowSize),
    /// [`Kind::StdoutCredit`].
    StdoutCredit(u64),
    /// [`Kind::StderrCredit`].
    StderrCredit(u64),
    /// [`Kind::StdoutClose`].
    StdoutClose,
    /// [`Kind::StderrClose`].
    StderrClose,
    /// [`Kind::Entry`].
    Entry(Entry),
    /// [`Kind::Data`].
    Data(&'a [u8]),
    /// [`Kind::End`].
    End,
}

impl<'a> ToAgent<'a> {
    /// Decodes the payload of a frame the agent received.
    ///
    /// # Errors
    /// [`Malformed`] when the payload is not what the kind says, or the kind is not the host's to send.
    pub fn decode(kind: Kind, payload: &'a [u8]) -> Result<Self, Malformed> {
        let broken = Malformed::Payload(kind);
        let u64 = || payload.try_into().map(u64::from_le_bytes).map_err(|_| broken);
        Ok(match kind {
            Kind::Request => Self::Request(Request::decode(payload).map_err(|_| broken)?),
            Kind::Stdin => Self::Stdin(payload),
            Kind::StdinEnd => Self::StdinEnd,
            Kind::Signal => Self::Signal(payload.try_into().map(u32::from_le_bytes).map_err(|_| broken)?),
            Kind::Resize => Self::Resize(WindowSize::decode(payload).map_err(|_| broken)?),
            Kind::StdoutCredit => Self::StdoutCredit(u64()?),
            Kind::StderrCredit => Self::StderrCredit(u64()?),
            Kind::StdoutClose => Self::StdoutClose,
            Kind::StderrClose => Self::StderrClose,
            Kind::Entry => Self::Entry(Entry::decode(payload).map_err(|_| broken)?),
            Kind::Data => Self::Data(payload),
            Kind::End => Self::End,
            Kind::Reply | Kind::Stdout | Kind::Stderr | Kind::StdinCredit | Kind::Exited => {
                return Err(Malformed::Direction(kind));
            }
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use alloc::vec;

    #[test]
    fn a_header_reads_back() {
        assert_eq!(parse_header(header(Kind::Stdout, 77)), Ok((Kind::Stdout, 77)));
    }

    #[test]
    fn a_length_above_the_limit_is_refused_before_anything_is_read() {
        let too_long = MAX_PAYLOAD_BYTES + 1;
        assert_eq!(parse_header(header(Kind::Request, too_long)), Err(Malformed::Length(too_long)));
    }

    #[test]
    fn each_kind_has_a_limit_of_its_own() {
        for byte in 0..=u8::MAX {
            let Ok(kind) = Kind::try_from(byte) else { continue };
            assert_eq!(kind as u8, byte);
            let most = kind.max_payload_bytes();
            assert!(most <= MAX_PAYLOAD_BYTES);
            assert_eq!(parse_header(header(kind, most)), Ok((kind, most)));
            assert_eq!(parse_header(header(kind, most + 1)), Err(Malformed::Length(most + 1)));
        }
    }

    #[test]
    fn an_unknown_kind_is_refused() {
        assert_eq!(parse_header([0, 0, 0, 0, 99]), Err(Malformed::Kind(99)));
    }

    #[test]
    fn a_number_of_the_wrong_length_is_refused() {
        assert_eq!(ToAgent::decode(Kind::Signal, &[15, 0, 0, 0]), Ok(ToAgent::Signal(15)));
        assert_eq!(ToAgent::decode(Kind::Signal, &[15]), Err(Malformed::Payload(Kind::Signal)));
        let credit = Kind::StdoutCredit;
        assert_eq!(ToAgent::decode(credit, &[0; 7]), Err(Malformed::Payload(credit)));
    }

    #[test]
    fn the_agents_own_words_are_refused_from_the_host() {
        assert_eq!(ToAgent::decode(Kind::Exited, &[]), Err(Malformed::Direction(Kind::Exited)));
    }

    #[test]
    fn a_message_frame_reads_back() {
        let mut out = vec![];
        let size = WindowSize { rows: 24, columns: 80 };
        append_message(&mut out, Kind::Resize, &size);
        let (start, payload) = out.split_at(HEADER_BYTES);
        let (kind, length) = parse_header(start.try_into().expect("five bytes")).expect("our own header");
        assert_eq!(length, payload.len());
        assert_eq!(ToAgent::decode(kind, payload), Ok(ToAgent::Resize(size)));
    }
}
