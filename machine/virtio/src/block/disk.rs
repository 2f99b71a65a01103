//! What a disk is made of: pieces of files, checked as they are read.

use std::fs::File;
use std::io;
use std::num::NonZeroU64;
use std::os::unix::fs::FileExt;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use kiln_memory::Slices;
use rustix::fs::{Advice, FallocateFlags, fadvise, fallocate};
use sha2::{Digest, Sha256};

/// What one digest covers.
pub(super) const VERIFIED_BLOCK_BYTES: u64 = 64 << 10;
const DIGEST_BYTES: u64 = 32;
/// How far ahead of a sequential reader the host fetches what will be verified next, so that it reads while we hash.
const READ_AHEAD_BLOCKS: u64 = 16;
/// Extents start and end on pages, so that every file system block of the guest lies in one of them.
const EXTENT_ALIGNMENT_BYTES: u64 = 4096;
/// The most extents of a disk.
const MAX_EXTENTS: usize = 1024;

/// A disk cannot be made of this. The caller's fault, except where the host fails to read.
#[derive(Debug, thiserror::Error)]
pub enum DiskError {
    /// The shape is impossible.
    #[error("{0}")]
    Shape(&'static str),
    /// The digests do not cover the file.
    #[error("a file of {data_bytes} bytes needs {expected} bytes of digests, not {found}")]
    Digests {
        /// The size of the data.
        data_bytes: u64,
        /// What its digests should take.
        expected: u64,
        /// What they take.
        found: u64,
    },
    /// The host cannot say how large a file is.
    #[error("cannot examine a disk's file")]
    Host(#[from] io::Error),
}

/// A request failed, and the guest is not to blame. The guest sees an I/O error; this is for who runs the machine.
#[derive(Debug, thiserror::Error)]
pub enum DiskFault {
    /// A block of a file is not what its digest says: the store's data was damaged or tampered with.
    #[error("extent {extent} of the disk: block {block} of its file does not match its digest")]
    Corrupt {
        /// Which extent of the disk.
        extent: usize,
        /// Which 64 KiB block of its file.
        block: u64,
    },
    /// The host failed to read or write.
    #[error("extent {extent} of the disk: {source}")]
    Host {
        /// Which extent of the disk.
        extent: usize,
        /// What the host said.
        source: io::Error,
    },
}

/// A file that holds a piece of a disk, with the memory of what was already verified.
///
/// Verification is lazy and happens once: the first read of any part of a 64 KiB block reads the whole block into our
/// memory, hashes it there and hands out those very bytes. From then on the block is read straight into the guest,
/// trusting the host to keep it: somebody who can write the file, or a medium that decays after the first read, is not
/// noticed by this process any more. A host that wants more seals the file or makes it immutable.
#[derive(Debug)]
pub struct DataFile {
    file: File,
    digests: Option<Digests>,
}

#[derive(Debug)]
struct Digests {
    file: File,
    data_bytes: u64,
    /// One bit a block, set once it was found right.
    verified: Box<[AtomicU64]>,
    /// The block a sequential reader will want verified next, and the first the host was not asked to fetch.
    expected: AtomicU64,
    unasked: AtomicU64,
}

impl DataFile {
    /// A file nobody vouches for, such as scratch space.
    pub fn trusted(file: File) -> Self {
        Self { file, digests: None }
    }

    /// A file whose 64 KiB blocks have the SHA-256 digests in `digests`, in order, 32 bytes each.
    ///
    /// `digests` itself is the caller's to check. Cost: one bit of memory for 64 KiB of data.
    ///
    /// # Errors
    /// [`DiskError::Digests`] when there are too few or too many.
    pub fn verified(file: File, digests: File) -> Result<Self, DiskError> {
        let data_bytes = file.metadata()?.len();
        let found = digests.metadata()?.len();
        let blocks = data_bytes.div_ceil(VERIFIED_BLOCK_BYTES);
        let expected = blocks * DIGEST_BYTES;
        if found != expected {
            return Err(DiskError::Digests { data_bytes, expected, found });
        }
        let verified = (0..blocks.div_ceil(64)).map(|_| AtomicU64::new(0)).collect();
        let (expected, unasked) = (AtomicU64::new(0), AtomicU64::new(0));
        let digests = Digests { file: digests, data_bytes, verified, expected, unasked };
        Ok(Self { file, digests: Some(digests) })
    }
}

/// A piece of a file on a disk.
#[derive(Clone, Debug)]
pub struct Extent {
    /// The file; the same `Arc` for several extents of one file.
    pub file: Arc<DataFile>,
    /// Where in the file the piece starts, a multiple of 4096.
    pub offset: u64,
    /// How long it is, a multiple of 4096. Past the end of the file there are zeros.
    pub bytes: u64,
}

/// Extents laid end to end.
#[derive(Debug)]
pub struct Disk {
    /// Each extent with its first byte's place on the disk, ascending.
    extents: Vec<(u64, Extent)>,
    /// What there is something behind.
    backed_bytes: u64,
    /// What the guest sees.
    bytes: u64,
    read_only: bool,
}

impl Disk {
    /// A disk the guest cannot write.
    ///
    /// # Errors
    /// [`DiskError::Shape`] when there are no extents or too many, or one is not made of whole pages.
    pub fn read_only(extents: Vec<Extent>) -> Result<Self, DiskError> {
        Self::new(extents, true)
    }

    /// A disk the guest can write, all in one file that nobody vouches for.
    ///
    /// # Errors
    /// [`DiskError::Shape`], as for a read-only one, or when the file has digests.
    pub fn writable(extent: Extent) -> Result<Self, DiskError> {
        if extent.file.digests.is_some() {
            return Err(DiskError::Shape("a writable disk cannot have digests"));
        }
        Self::new(vec![extent], false)
    }

    /// The disk as one of `bytes`, which is no less than it has. What is behind its extents reads as zeros and cannot be
    /// written.
    ///
    /// A machine saved with one disk can so be restored with another in its place, and its driver sees no change.
    ///
    /// # Errors
    /// [`DiskError::Shape`] when the disk has more, or `bytes` is not made of whole pages.
    pub fn with_capacity(self, bytes: u64) -> Result<Self, DiskError> {
        if bytes < self.backed_bytes
            || !bytes.is_multiple_of(EXTENT_ALIGNMENT_BYTES)
            || i64::try_from(bytes).is_err()
        {
            return Err(DiskError::Shape(
                "a disk's capacity is made of whole pages and holds all its extents",
            ));
        }
        Ok(Self { bytes, ..self })
    }

    /// A disk of `bytes` with nothing behind it.
    ///
    /// # Errors
    /// As [`Disk::with_capacity`].
    pub fn empty(bytes: u64, read_only: bool) -> Result<Self, DiskError> {
        Self { extents: Vec::new(), backed_bytes: 0, bytes: 0, read_only }.with_capacity(bytes)
    }

    fn new(extents: Vec<Extent>, read_only: bool) -> Result<Self, DiskError> {
        if extents.is_empty() || extents.len() > MAX_EXTENTS {
            return Err(DiskError::Shape("a disk has 1 to 1024 extents"));
        }
        let mut placed = Vec::with_capacity(extents.len());
        let mut bytes = 0_u64;
        for extent in extents {
            let whole = |value: u64| value.is_multiple_of(EXTENT_ALIGNMENT_BYTES);
            if extent.bytes == 0 || !whole(extent.bytes) || !whole(extent.offset) {
                return Err(DiskError::Shape("an extent is made of whole pages of 4096 bytes"));
            }
            let length = extent.bytes;
            let file_end = extent.offset.checked_add(length).filter(|&end| i64::try_from(end).is_ok());
            let disk_end = bytes.checked_add(length).filter(|&end| i64::try_from(end).is_ok());
            let (Some(_), Some(end)) = (file_end, disk_end) else {
                return Err(DiskError::Shape("a disk ends before 2^63 bytes"));
            };
            placed.push((bytes, extent));
            bytes = end;
        }
        Ok(Self { extents: placed, backed_bytes: bytes, bytes, read_only })
    }

    /// The size in bytes, as the guest sees it.
    pub fn bytes(&self) -> u64 {
        self.bytes
    }

    /// How much of it can be written, when any of it can.
    pub(super) fn backed_bytes(&self) -> u64 {
        self.backed_bytes
    }

    /// Whether the guest may not write.
    pub fn is_read_only(&self) -> bool {
        self.read_only
    }

    /// Reads `into`'s length at `offset`, a range inside the disk. `scratch` is room to verify in.
    pub(super) fn read(
        &self,
        offset: u64,
        mut into: Slices<'_>,
        scratch: &mut Vec<u8>,
    ) -> Result<(), DiskFault> {
        for piece in self.pieces(offset, into.len() as u64) {
            let part = into.take(piece.bytes as usize);
            let file = &piece.extent.file;
            match &file.digests {
                None => file.read_trusted(&part, piece.offset).map_err(ReadFailure::Host),
                Some(digests) => file.read_verified(digests, part, piece.offset, scratch),
            }
            .map_err(|failure| failure.of(piece.index))?;
        }
        into.fill_with_zeros();
        Ok(())
    }

    /// Tells the host which range will be read soon, so that it fetches it while we do something else.
    pub(super) fn prefetch(&self, offset: u64, bytes: u64) {
        for piece in self.pieces(offset, bytes) {
            prefetch(&piece.extent.file.file, piece.offset, piece.bytes);
        }
    }

    /// Writes all of `from` at `offset`, a range inside what a writable disk has.
    pub(super) fn write(&self, offset: u64, mut from: Slices<'_>) -> Result<(), DiskFault> {
        for piece in self.pieces(offset, from.len() as u64) {
            from.take(piece.bytes as usize)
                .write_at(&piece.extent.file.file, piece.offset)
                .map_err(|source| DiskFault::Host { extent: piece.index, source })?;
        }
        Ok(())
    }

    /// Makes a range inside what a writable disk has read as zeros; `keep_space` so that writing there later needs none.
    pub(super) fn zero(&self, offset: u64, bytes: u64, keep_space: bool) -> Result<(), DiskFault> {
        let how = if keep_space { FallocateFlags::ZERO_RANGE } else { FallocateFlags::PUNCH_HOLE };
        for piece in self.pieces(offset, bytes) {
            fallocate(&piece.extent.file.file, how | FallocateFlags::KEEP_SIZE, piece.offset, piece.bytes)
                .map_err(|errno| DiskFault::Host { extent: piece.index, source: errno.into() })?;
        }
        Ok(())
    }

    /// Returns when everything written before is on the medium.
    pub(super) fn flush(&self) -> Result<(), DiskFault> {
        for (index, (_, extent)) in self.extents.iter().enumerate().filter(|_| !self.read_only) {
            extent.file.file.sync_data().map_err(|source| DiskFault::Host { extent: index, source })?;
        }
        Ok(())
    }

    /// The pieces of extents that make up a range inside the disk, in order.
    fn pieces(&self, offset: u64, bytes: u64) -> impl Iterator<Item = Piece<'_>> {
        let end = offset + bytes;
        let first = self.extents.partition_point(|(start, _)| *start <= offset).saturating_sub(1);
        self.extents[first..].iter().enumerate().take_while(move |(_, (start, _))| *start < end).map(
            move |(index, (start, extent))| {
                let from = offset.max(*start);
                let to = end.min(start + extent.bytes);
                let offset = extent.offset + (from - start);
                Piece { index: first + index, extent, offset, bytes: to.saturating_sub(from) }
            },
        )
    }
}

/// Advice to the host: what goes wrong here goes wrong again, and is reported, at the read.
fn prefetch(file: &File, offset: u64, bytes: u64) {
    // No length would mean to the end of the file.
    if let Some(length) = NonZeroU64::new(bytes) {
        let _ = fadvise(file, offset, Some(length), Advice::WillNeed);
    }
}

/// Part of an extent.
struct Piece<'d> {
    /// Which extent of the disk.
    index: usize,
    extent: &'d Extent,
    /// Where in the extent's file the part starts.
    offset: u64,
    bytes: u64,
}

/// [`DiskFault`], before it is known which extent it is about.
enum ReadFailure {
    Corrupt { block: u64 },
    Host(io::Error),
}

impl ReadFailure {
    fn of(self, extent: usize) -> DiskFault {
        match self {
            Self::Corrupt { block } => DiskFault::Corrupt { extent, block },
            Self::Host(source) => DiskFault::Host { extent, source },
        }
    }
}

impl DataFile {
    fn read_trusted(&self, into: &Slices<'_>, offset: u64) -> io::Result<()> {
        let got = into.read_at(&self.file, offset)?;
        if got < into.len() {
            into.without_front(got).fill_with_zeros();
        }
        Ok(())
    }

    /// Reads runs of verified blocks straight into the guest, and every other block by way of `scratch`.
    fn read_verified(
        &self,
        digests: &Digests,
        mut into: Slices<'_>,
        offset: u64,
        scratch: &mut Vec<u8>,
    ) -> Result<(), ReadFailure> {
        let end = (offset + into.len() as u64).min(digests.data_bytes);
        let mut at = offset;
        while at < end {
            let block = at / VERIFIED_BLOCK_BYTES;
            if digests.is_verified(block) {
                let blocks = digests.verified_run(block, end.div_ceil(VERIFIED_BLOCK_BYTES));
                let run_end = end.min(blocks * VERIFIED_BLOCK_BYTES);
                let part = into.take((run_end - at) as usize);
                if part.read_at(&self.file, at).map_err(ReadFailure::Host)? < part.len() {
                    // It was there when it was verified.
                    return Err(ReadFailure::Corrupt { block });
                }
                at = run_end;
            } else {
                self.verify(digests, block, scratch)?;
                let start = block * VERIFIED_BLOCK_BYTES;
                let part_end = end.min(start + scratch.len() as u64);
                into.take((part_end - at) as usize).copy_from(&scratch[(at - start) as usize..]);
                at = part_end;
            }
        }
        into.fill_with_zeros();
        Ok(())
    }

    /// Leaves the whole of `block` in `scratch`, found right.
    fn verify(&self, digests: &Digests, block: u64, scratch: &mut Vec<u8>) -> Result<(), ReadFailure> {
        digests.read_ahead(&self.file, block);
        let start = block * VERIFIED_BLOCK_BYTES;
        scratch.resize((digests.data_bytes - start).min(VERIFIED_BLOCK_BYTES) as usize, 0);
        let mut expected = [0; DIGEST_BYTES as usize];
        let read = self
            .file
            .read_exact_at(scratch, start)
            .and_then(|()| digests.file.read_exact_at(&mut expected, block * DIGEST_BYTES));
        match read {
            Ok(()) if Sha256::digest(&scratch)[..] == expected => {
                digests.set_verified(block);
                Ok(())
            }
            // Shorter than it was when it was opened is as wrong as other bytes.
            Err(error) if error.kind() != io::ErrorKind::UnexpectedEof => Err(ReadFailure::Host(error)),
            _ => Err(ReadFailure::Corrupt { block }),
        }
    }
}

impl Digests {
    fn is_verified(&self, block: u64) -> bool {
        self.verified[(block / 64) as usize].load(Ordering::Relaxed) & (1 << (block % 64)) != 0
    }

    fn set_verified(&self, block: u64) {
        self.verified[(block / 64) as usize].fetch_or(1 << (block % 64), Ordering::Relaxed);
    }

    /// Asks the host to fetch what follows `block`, when the blocks come in order. Hints only: races do no harm.
    fn read_ahead(&self, file: &File, block: u64) {
        let next = block + 1;
        if self.expected.swap(next, Ordering::Relaxed) != block {
            self.unasked.store(next, Ordering::Relaxed);
            return;
        }
        let from = self.unasked.load(Ordering::Relaxed).max(next);
        let to = next + READ_AHEAD_BLOCKS;
        // Half a window at a time.
        if to.saturating_sub(from) >= READ_AHEAD_BLOCKS / 2 {
            self.unasked.store(to, Ordering::Relaxed);
            prefetch(file, from * VERIFIED_BLOCK_BYTES, (to - from) * VERIFIED_BLOCK_BYTES);
        }
    }

    /// Where the run of verified blocks that starts at `block` ends, at most at `limit`.
    fn verified_run(&self, block: u64, limit: u64) -> u64 {
        (block..limit).find(|&block| !self.is_verified(block)).unwrap_or(limit)
    }
}
