//! Takes a byte stream apart into frames.

use alloc::vec::Vec;

use crate::MAX_DATA_BYTES;
use crate::frame::{HEADER_BYTES, Kind, Malformed, parse_header};

/// What the buffer starts with: memory is touched as frames need it.
const FIRST_BYTES: usize = 4 << 10;
/// What the buffer keeps: room for a data frame and what comes with it.
const KEPT_BYTES: usize = 2 * MAX_DATA_BYTES;

/// Takes a byte stream apart into frames, whatever the pieces it arrives in.
///
/// Does no I/O: the owner reads into [`Reader::space`], says how much with [`Reader::filled`], and takes frames with
/// [`Reader::next_frame`] until there is none. Room for a frame is made as its bytes arrive, not as
/// its header claims, and is at most twice the longest frame's.
#[derive(Debug, Default)]
pub struct Reader {
    buffer: Vec<u8>,
    /// Where in `buffer` the first byte not yet taken is.
    start: usize,
    /// Where the bytes received end.
    end: usize,
}

impl Reader {
    /// Where the next bytes of the stream go; never empty once [`Self::next_frame`] has returned `None`.
    pub fn space(&mut self) -> &mut [u8] {
        if self.start > 0 {
            self.buffer.copy_within(self.start..self.end, 0);
            self.end -= self.start;
            self.start = 0;
        }
        if self.end < KEPT_BYTES && self.buffer.len() > KEPT_BYTES {
            self.buffer.truncate(KEPT_BYTES);
            self.buffer.shrink_to_fit();
        } else if self.end >= self.buffer.len() {
            let room = FIRST_BYTES.max(self.buffer.len().saturating_mul(2));
            self.buffer.resize(room, 0);
        }
        &mut self.buffer[self.end..]
    }

    /// Says that `bytes` more bytes stand at the start of what [`Self::space`] returned.
    ///
    /// # Panics
    /// When that is more than there was space for.
    pub fn filled(&mut self, bytes: usize) {
        self.end += bytes;
        assert!(self.end <= self.buffer.len(), "filled more than the space");
    }

    /// The next whole frame, or `None` until more bytes have come.
    ///
    /// # Errors
    /// [`Malformed`] as soon as a header is; the stream is unusable from there on.
    pub fn next_frame(&mut self) -> Result<Option<(Kind, &[u8])>, Malformed> {
        let received = &self.buffer[self.start..self.end];
        let Some((header, rest)) = received.split_first_chunk::<HEADER_BYTES>() else {
            return Ok(None);
        };
        let (kind, length) = parse_header(*header)?;
        if rest.len() < length {
            return Ok(None);
        }
        let payload = self.start + HEADER_BYTES;
        self.start = payload + length;
        Ok(Some((kind, &self.buffer[payload..payload + length])))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::MAX_PAYLOAD_BYTES;
    use crate::frame::{append, header};
    use alloc::vec;
    use proptest::prelude::*;

    /// Feeds `stream` in pieces of the given sizes, over and over, and returns the frames.
    fn frames(stream: &[u8], pieces: &[usize]) -> Result<Vec<(Kind, Vec<u8>)>, Malformed> {
        let (mut reader, mut found, mut rest) = (Reader::default(), vec![], stream);
        for piece in pieces.iter().cycle() {
            if rest.is_empty() {
                break;
            }
            let space = reader.space();
            let bytes = (*piece).min(space.len()).min(rest.len());
            space[..bytes].copy_from_slice(&rest[..bytes]);
            rest = &rest[bytes..];
            reader.filled(bytes);
            while let Some((kind, payload)) = reader.next_frame()? {
                found.push((kind, payload.to_vec()));
            }
        }
        Ok(found)
    }

    proptest! {
        #[test]
        fn frames_survive_any_cut_of_the_stream(
            payloads in prop::collection::vec((0..3_usize, 0..3000_usize), 0..20),
            pieces in prop::collection::vec(1..5000_usize, 1..10),
        ) {
            let sent: Vec<_> = payloads
                .iter()
                .map(|(kind, length)| ([Kind::Stdin, Kind::Request, Kind::Stdout][*kind], vec![*length as u8; *length]))
                .collect();
            let mut stream = vec![];
            for (kind, payload) in &sent {
                append(&mut stream, *kind, payload);
            }
            prop_assert_eq!(frames(&stream, &pieces), Ok(sent));
        }

        #[test]
        fn any_bytes_are_frames_or_an_error(
            stream in prop::collection::vec(any::<u8>(), 0..4096),
            pieces in prop::collection::vec(1..600_usize, 1..4),
        ) {
            let _ = frames(&stream, &pieces);
        }
    }

    #[test]
    fn the_longest_frame_passes_and_its_room_is_given_back() {
        let mut stream = vec![];
        append(&mut stream, Kind::Request, &vec![7; MAX_PAYLOAD_BYTES]);
        append(&mut stream, Kind::StdinEnd, &[]);
        let found = frames(&stream, &[usize::MAX]).expect("well-formed");
        assert_eq!(found.len(), 2);
        assert_eq!(found[0].1.len(), MAX_PAYLOAD_BYTES);

        let mut reader = Reader::default();
        let mut rest = stream.as_slice();
        while !rest.is_empty() {
            let bytes = reader.space().len().min(rest.len());
            reader.space()[..bytes].copy_from_slice(&rest[..bytes]);
            reader.filled(bytes);
            rest = &rest[bytes..];
            while reader.next_frame().expect("well-formed").is_some() {}
        }
        assert_eq!(reader.space().len(), KEPT_BYTES);
        assert!(reader.buffer.capacity() < 2 * KEPT_BYTES);
    }

    #[test]
    fn a_claimed_length_costs_no_memory_before_the_bytes_come() {
        let mut reader = Reader::default();
        let claim = header(Kind::Request, MAX_PAYLOAD_BYTES);
        reader.space()[..claim.len()].copy_from_slice(&claim);
        reader.filled(claim.len());
        assert_eq!(reader.next_frame(), Ok(None));
        reader.space();
        assert!(reader.buffer.capacity() <= FIRST_BYTES);
    }

    #[test]
    fn a_frame_above_its_limit_is_refused_at_its_header() {
        let claim = header(Kind::Signal, 5);
        assert_eq!(frames(&claim, &[5]), Err(Malformed::Length(5)));
    }
}
