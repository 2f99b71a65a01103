//! Where an image's bytes go: in order, counted, limited.

use std::io::{self, BufWriter, Seek, SeekFrom, Write};

/// EROFS block size of all our images, in bytes.
pub(crate) const BLOCK_BYTES: u64 = 4096;

/// Bytes gathered before the output is called; larger pieces go to it directly.
const WRITE_BYTES: usize = 256 << 10;

/// The output of one image.
pub(crate) struct Sink<W: Write> {
    out: BufWriter<W>,
    position: u64,
    limit: u64,
}

/// Why bytes were not taken.
pub(crate) enum SinkError {
    /// The image would pass its limit.
    Full,
    Io(io::Error),
}

impl<W: Write> Sink<W> {
    pub(crate) fn new(out: W, limit_bytes: u64) -> Self {
        // Block addresses have 32 bits, and the last one means a hole.
        let limit = limit_bytes.min(BLOCK_BYTES * u64::from(u32::MAX - 1));
        Self { out: BufWriter::with_capacity(WRITE_BYTES, out), position: 0, limit }
    }

    /// Bytes taken so far.
    pub(crate) fn position(&self) -> u64 {
        self.position
    }

    /// The block the next byte goes to; the position is at a block's start.
    pub(crate) fn block(&self) -> Result<u32, SinkError> {
        u32::try_from(self.position / BLOCK_BYTES).map_err(|_| SinkError::Full)
    }

    /// Says that `bytes` will come: fails now rather than after most of them were written.
    pub(crate) fn expect(&self, bytes: u64) -> Result<(), SinkError> {
        if bytes > self.limit.saturating_sub(self.position) {
            return Err(SinkError::Full);
        }
        Ok(())
    }

    pub(crate) fn write(&mut self, bytes: &[u8]) -> Result<(), SinkError> {
        self.expect(bytes.len() as u64)?;
        self.out.write_all(bytes).map_err(SinkError::Io)?;
        self.position += bytes.len() as u64;
        Ok(())
    }

    pub(crate) fn zeros(&mut self, bytes: u64) -> Result<(), SinkError> {
        const ZEROS: [u8; BLOCK_BYTES as usize] = [0; BLOCK_BYTES as usize];
        let mut left = bytes;
        while left > 0 {
            let piece = left.min(BLOCK_BYTES);
            self.write(&ZEROS[..piece as usize])?;
            left -= piece;
        }
        Ok(())
    }

    /// Zeros up to the next block.
    pub(crate) fn pad(&mut self) -> Result<(), SinkError> {
        self.zeros(self.position.next_multiple_of(BLOCK_BYTES) - self.position)
    }
}

impl<W: Write + Seek> Sink<W> {
    /// Writes `first` over the first bytes, and all that is held back.
    pub(crate) fn finish(self, first: &[u8]) -> io::Result<()> {
        let mut out = self.out.into_inner().map_err(io::IntoInnerError::into_error)?;
        let back = i64::try_from(self.position).map_err(io::Error::other)?;
        out.seek(SeekFrom::Current(-back))?;
        out.write_all(first)?;
        out.flush()
    }
}
