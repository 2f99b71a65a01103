//! Reads a layer's tar stream: V7, ustar, pax, GNU and star headers, in one pass and without seeking.
//!
//! Where the forms leave room, this follows Go's `archive/tar`, since it is what the runtimes that made and run these
//! images use: links, devices and directories have no data whatever their size says, global pax headers say nothing,
//! a GNU long name goes before a pax path, an archive may end without its end mark where an entry ends.

mod header;
mod pax;
mod sparse;

use std::io::{BufRead, BufReader, Read};

use crate::layer::LayerError;
use crate::tree::Time;
use header::{BLOCK_BYTES, Header};
use pax::Pax;
pub(crate) use sparse::Segment;
use sparse::{SEGMENTS_MAX, SparseForm, TextMap};

/// Bytes one extended header may have: records of an entry, a long name, a long link.
const EXTENSION_BYTES_MAX: u64 = 1 << 20;

/// Bytes read from the stream at a time.
const READ_BYTES: usize = 1 << 20;

/// One entry of a layer, before its path is taken apart.
pub(crate) struct Entry {
    /// As stored, not cleaned.
    pub(crate) path: Vec<u8>,
    pub(crate) kind: EntryKind,
    /// Permission bits, at most 0o7777.
    pub(crate) mode: u16,
    pub(crate) uid: u32,
    pub(crate) gid: u32,
    pub(crate) mtime: Time,
    /// Full names and values, as they came: any name, maybe twice.
    pub(crate) xattrs: Vec<(Vec<u8>, Vec<u8>)>,
}

/// What an entry is.
pub(crate) enum EntryKind {
    /// A regular file; its bytes follow.
    File {
        bytes: u64,
    },
    /// A file with holes; the bytes of its segments follow, one after the other.
    Sparse {
        bytes: u64,
        segments: Vec<Segment>,
    },
    /// Another name of the file at this path.
    HardLink(Vec<u8>),
    Symlink(Vec<u8>),
    CharDevice {
        major: u32,
        minor: u32,
    },
    BlockDevice {
        major: u32,
        minor: u32,
    },
    Directory,
    Fifo,
}

/// The stream, at an entry.
pub(crate) struct Archive<R> {
    input: BufReader<R>,
    /// Bytes taken from the stream so far.
    offset: u64,
    /// Bytes of the current entry's data not yet taken.
    data_bytes: u64,
    /// Bytes between the data's end and the next header.
    padding_bytes: u64,
}

impl<R: Read> Archive<R> {
    pub(crate) fn new(input: R) -> Self {
        Self {
            input: BufReader::with_capacity(READ_BYTES, input),
            offset: 0,
            data_bytes: 0,
            padding_bytes: 0,
        }
    }

    /// The next entry, or `None` after the last. What is left of the entry before is passed over.
    ///
    /// After the last entry the stream is read to its end, so that whoever digests the bytes has seen them all.
    pub(crate) fn next(&mut self) -> Result<Option<Entry>, LayerError> {
        let mut pax = Pax::default();
        let mut long_name = None;
        let mut long_link = None;
        let mut extended = false;
        loop {
            self.skip_data()?;
            // Some writers (umoci's `insert`) leave out the last padding and the end mark; who digests the stream
            // knows if it was cut here.
            if !extended && self.buffered()?.is_empty() {
                return Ok(None);
            }
            let block = self.block()?;
            if block.iter().all(|&b| b == 0) {
                if extended {
                    return Err(self.corrupt("an extended header has no entry after it"));
                }
                self.end()?;
                return Ok(None);
            }
            let header =
                Header::checked(&block).ok_or_else(|| self.corrupt("a header's checksum is wrong"))?;
            let size = header.size().and_then(|size| u64::try_from(size).ok());
            let size = size.ok_or_else(|| self.corrupt("a header's size is not a number"))?;
            match header.type_flag() {
                b'x' | b'X' => {
                    extended = true;
                    let bytes = self.extension(size)?;
                    pax.take(&bytes).map_err(|why| self.corrupt(why))?;
                }
                b'L' => {
                    extended = true;
                    long_name = Some(self.long_string(size)?);
                }
                b'K' => {
                    extended = true;
                    long_link = Some(self.long_string(size)?);
                }
                // A global pax header; a GNU volume label, which names the archive.
                b'g' | b'V' => self.expect_data(size)?,
                _ => return self.entry(&header, size, pax, long_name, long_link).map(Some),
            }
        }
    }

    fn entry(
        &mut self,
        header: &Header,
        header_bytes: u64,
        mut pax: Pax,
        long_name: Option<Vec<u8>>,
        long_link: Option<Vec<u8>>,
    ) -> Result<Entry, LayerError> {
        const NUMBER: &str = "a header's number field is not a number";
        let flag = header.type_flag();
        let id = |field: Option<i64>| field.and_then(|id| u32::try_from(id).ok());
        let uid =
            pax.uid.or_else(|| id(header.uid())).ok_or_else(|| self.corrupt("an owner is not a user id"))?;
        let gid =
            pax.gid.or_else(|| id(header.gid())).ok_or_else(|| self.corrupt("a group is not a group id"))?;
        let mode = (header.mode().ok_or_else(|| self.corrupt(NUMBER))? & 0o7777) as u16;
        let mtime = pax
            .mtime
            .or_else(|| header.mtime().map(|secs| Time { secs, nanos: 0 }))
            .ok_or_else(|| self.corrupt(NUMBER))?;
        let path = long_name.or(pax.sparse.name.take()).or(pax.path.take()).unwrap_or_else(|| header.name());
        let link = || long_link.or(pax.link_path.take()).unwrap_or_else(|| header.link_name().to_vec());
        let stored_bytes = pax.size.unwrap_or(header_bytes);

        let kind = match flag {
            b'1' => EntryKind::HardLink(link()),
            b'2' => EntryKind::Symlink(link()),
            b'3' | b'4' => {
                let device = header.device().ok_or_else(|| self.corrupt(NUMBER))?;
                let (Ok(major), Ok(minor)) = (u32::try_from(device.0), u32::try_from(device.1)) else {
                    return Err(self.corrupt("a device number is out of range"));
                };
                if flag == b'3' {
                    EntryKind::CharDevice { major, minor }
                } else {
                    EntryKind::BlockDevice { major, minor }
                }
            }
            b'5' => EntryKind::Directory,
            // A GNU directory with its listing as data.
            b'D' => {
                self.expect_data(stored_bytes)?;
                EntryKind::Directory
            }
            b'6' => EntryKind::Fifo,
            // V7 marks a directory by its name alone.
            0 if path.ends_with(b"/") => EntryKind::Directory,
            b'0' | 0 | b'7' => {
                self.expect_data(stored_bytes)?;
                self.file(&mut pax, stored_bytes)?
            }
            b'S' => {
                let (pairs, more) = header.gnu_sparse().ok_or_else(|| self.corrupt(NUMBER))?;
                let pairs = self.gnu_sparse_pairs(pairs, more)?;
                let bytes = header.gnu_sparse_size().and_then(|bytes| u64::try_from(bytes).ok());
                let bytes = bytes.ok_or_else(|| self.corrupt(NUMBER))?;
                let segments =
                    sparse::checked(pairs, bytes, stored_bytes).map_err(|why| self.corrupt(why))?;
                self.expect_data(stored_bytes)?;
                EntryKind::Sparse { bytes, segments }
            }
            _ => return Err(LayerError::refused(&path, "its entry type is not one a layer may have")),
        };
        Ok(Entry { path, kind, mode, uid, gid, mtime, xattrs: pax.xattrs })
    }

    /// A regular file, or a sparse one of the pax forms.
    fn file(&mut self, pax: &mut Pax, stored_bytes: u64) -> Result<EntryKind, LayerError> {
        let pairs = match pax.sparse.form().map_err(|why| self.corrupt(why))? {
            SparseForm::None => return Ok(EntryKind::File { bytes: stored_bytes }),
            SparseForm::Records(pairs) => pairs,
            SparseForm::Data => {
                let mut map = TextMap::default();
                while !self.take_map_block(&mut map)? {}
                map.pairs()
            }
        };
        let bytes = pax.sparse.real_size.ok_or_else(|| self.corrupt("a sparse file has no size"))?;
        let segments = sparse::checked(pairs, bytes, self.data_bytes).map_err(|why| self.corrupt(why))?;
        Ok(EntryKind::Sparse { bytes, segments })
    }

    fn take_map_block(&mut self, map: &mut TextMap) -> Result<bool, LayerError> {
        let Some(left) = self.data_bytes.checked_sub(BLOCK_BYTES as u64) else {
            return Err(self.corrupt("a sparse map does not end"));
        };
        let block = self.block()?;
        self.data_bytes = left;
        map.take(&block).map_err(|why| self.corrupt(why))
    }

    /// The whole map of a GNU `S` header whose first pairs are `first`.
    fn gnu_sparse_pairs(
        &mut self,
        first: Vec<(i64, i64)>,
        mut more: bool,
    ) -> Result<Vec<(u64, u64)>, LayerError> {
        let mut pairs = Vec::new();
        let mut next = first;
        loop {
            for (offset, length) in next {
                let (Ok(offset), Ok(length)) = (u64::try_from(offset), u64::try_from(length)) else {
                    return Err(self.corrupt("a sparse map holds a negative number"));
                };
                pairs.push((offset, length));
            }
            if !more {
                return Ok(pairs);
            }
            if pairs.len() >= SEGMENTS_MAX {
                return Err(self.corrupt("a sparse map has too many pieces"));
            }
            let block = self.block()?;
            (next, more) = header::gnu_sparse_more(&block)
                .ok_or_else(|| self.corrupt("a sparse map holds what is not a number"))?;
        }
    }

    /// The next bytes of the current entry's data: at least one, at most `most`; call [`Self::consume`] with how
    /// many were used. Empty when no data is left or `most` is zero.
    pub(crate) fn data(&mut self, most: u64) -> Result<&[u8], LayerError> {
        let most = most.min(self.data_bytes);
        if most == 0 {
            return Ok(&[]);
        }
        let offset = self.offset;
        let bytes = self.buffered()?;
        if bytes.is_empty() {
            return Err(LayerError::Truncated { offset });
        }
        let length = usize::try_from(most).unwrap_or(usize::MAX).min(bytes.len());
        Ok(&bytes[..length])
    }

    /// Takes `length` of the bytes that [`Self::data`] showed.
    pub(crate) fn consume(&mut self, length: usize) {
        self.input.consume(length);
        self.offset += length as u64;
        self.data_bytes -= length as u64;
    }

    fn expect_data(&mut self, bytes: u64) -> Result<(), LayerError> {
        if bytes > i64::MAX as u64 {
            return Err(self.corrupt("an entry's size is out of range"));
        }
        self.data_bytes = bytes;
        self.padding_bytes = bytes.next_multiple_of(BLOCK_BYTES as u64) - bytes;
        Ok(())
    }

    /// Passes over what is left of the current entry. A last entry may lack the padding after its data.
    fn skip_data(&mut self) -> Result<(), LayerError> {
        self.skip()?;
        self.data_bytes = std::mem::take(&mut self.padding_bytes);
        if self.data_bytes > 0 && self.buffered()?.is_empty() {
            self.data_bytes = 0;
        }
        self.skip()
    }

    fn skip(&mut self) -> Result<(), LayerError> {
        while self.data_bytes > 0 {
            let length = self.data(u64::MAX)?.len();
            self.consume(length);
        }
        Ok(())
    }

    /// The bytes at hand, some unless the stream has ended.
    fn buffered(&mut self) -> Result<&[u8], LayerError> {
        while let Err(error) = self.input.fill_buf() {
            if error.kind() != std::io::ErrorKind::Interrupted {
                return Err(LayerError::Read(error));
            }
        }
        Ok(self.input.buffer())
    }

    fn block(&mut self) -> Result<[u8; BLOCK_BYTES], LayerError> {
        let mut block = [0; BLOCK_BYTES];
        self.fill(&mut block)?;
        Ok(block)
    }

    fn fill(&mut self, bytes: &mut [u8]) -> Result<(), LayerError> {
        let mut filled = 0;
        while filled < bytes.len() {
            match self.input.read(&mut bytes[filled..]) {
                Ok(0) => return Err(LayerError::Truncated { offset: self.offset }),
                Ok(length) => {
                    filled += length;
                    self.offset += length as u64;
                }
                Err(error) if error.kind() == std::io::ErrorKind::Interrupted => {}
                Err(error) => return Err(LayerError::Read(error)),
            }
        }
        Ok(())
    }

    fn extension(&mut self, size: u64) -> Result<Vec<u8>, LayerError> {
        if size > EXTENSION_BYTES_MAX {
            return Err(LayerError::TooLarge {
                what: "an extended header's bytes",
                limit: EXTENSION_BYTES_MAX,
            });
        }
        self.expect_data(size)?;
        let mut bytes = Vec::new();
        while self.data_bytes > 0 {
            let piece = self.data(u64::MAX)?;
            bytes.extend_from_slice(piece);
            let length = piece.len();
            self.consume(length);
        }
        Ok(bytes)
    }

    fn long_string(&mut self, size: u64) -> Result<Vec<u8>, LayerError> {
        let mut bytes = self.extension(size)?;
        if let Some(end) = bytes.iter().position(|&b| b == 0) {
            bytes.truncate(end);
        }
        Ok(bytes)
    }

    /// After the first zero block: the second, if it is there, and then whatever pads the stream.
    fn end(&mut self) -> Result<(), LayerError> {
        let mut second = [0; BLOCK_BYTES];
        match self.fill(&mut second) {
            Ok(()) if second.iter().any(|&b| b != 0) => {
                return Err(self.corrupt("an entry follows the archive's end mark"));
            }
            Ok(()) | Err(LayerError::Truncated { .. }) => {}
            Err(error) => return Err(error),
        }
        loop {
            let length = self.buffered()?.len();
            if length == 0 {
                return Ok(());
            }
            self.input.consume(length);
            self.offset += length as u64;
        }
    }

    fn corrupt(&self, why: &'static str) -> LayerError {
        LayerError::Corrupt { offset: self.offset, why }
    }
}
