//! Objects: big content, checked block by block as it is read.

use std::fmt;
use std::fs::File;
use std::io::{self, Read, Seek, SeekFrom};
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::path::Path;

use kiln_support::digest::{BLOCK_BYTES, Digest, block_count, tree_id};
use kiln_support::sparse::Holes;
use serde::{Deserialize, Serialize};

use crate::StoreError;
use crate::error::Context;
use crate::writer::{MAX_OBJECT_BYTES, zero_block_digest};

/// The name of an object: the root of its digest tree ([`tree_id`]). Not the SHA-256 of its content.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct ObjectId(pub Digest);

impl fmt::Display for ObjectId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// An object, open. Its files stay readable whatever is removed from the store.
#[derive(Debug)]
pub struct Object {
    id: ObjectId,
    length: u64,
    data: File,
    digests: File,
}

impl Object {
    /// Opens the object and checks its digests against its name, and that it is as long as they say.
    pub(crate) fn open(data_path: &Path, digests_path: &Path, id: ObjectId) -> Result<Self, StoreError> {
        let open = |path: &Path| match File::open(path) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                Err(StoreError::Missing { what: format!("object {id}") })
            }
            opened => opened.context("open", path),
        };
        let data = open(data_path)?;
        let digests = open(digests_path)?;
        let length = data.metadata().context("look at", data_path)?.len();
        let digests_length = digests.metadata().context("look at", digests_path)?.len();
        let damaged = |why: String| StoreError::damaged(format!("object {id}"), why);
        if length > MAX_OBJECT_BYTES || digests_length != block_count(length) * Digest::BYTES as u64 {
            return Err(damaged(format!("{length} bytes of content have {digests_length} bytes of digests")));
        }
        let mut bytes = vec![0; digests_length as usize];
        digests.read_exact_at(&mut bytes, 0).context("read", digests_path)?;
        if tree_id(&bytes) != id.0 {
            return Err(damaged("its digests do not add up to its name".to_owned()));
        }
        Ok(Self { id, length, data, digests })
    }

    /// The object's name.
    pub fn id(&self) -> ObjectId {
        self.id
    }

    /// How many bytes it has.
    pub fn length(&self) -> u64 {
        self.length
    }

    /// How many bytes of disk it takes; less than its length when it has holes.
    ///
    /// # Errors
    /// When the file system fails.
    pub fn disk_bytes(&self) -> io::Result<u64> {
        use std::os::unix::fs::MetadataExt;
        Ok((self.data.metadata()?.blocks() + self.digests.metadata()?.blocks()) * 512)
    }

    /// The content's file and the digests' file. Whoever reads the content checks each block against its digest.
    pub fn into_files(self) -> (File, File) {
        (self.data, self.digests)
    }

    /// Reads the content, checking each block.
    ///
    /// # Errors
    /// When a file cannot be shared between readers.
    pub fn reader(&self) -> io::Result<ObjectReader> {
        Ok(ObjectReader {
            id: self.id,
            length: self.length,
            data: self.data.try_clone()?,
            digests: self.digests.try_clone()?,
            position: 0,
            block: Vec::new(),
            block_index: None,
        })
    }

    /// Checks every byte. Cost: reading and hashing all of the object but its holes.
    ///
    /// # Errors
    /// [`StoreError::Damaged`] when a block is not what it was.
    pub fn verify(&self) -> Result<(), StoreError> {
        let checked = self.reader().and_then(|mut reader| {
            let mut holes = Holes::of(&self.data, self.length);
            for index in 0..block_count(self.length) {
                let block = reader.range(index);
                let is_full = block.end - block.start == BLOCK_BYTES as u64;
                // A hole is a block of zeros that need not be read to be known.
                if !(is_full && holes.have(block)? && reader.digest(index)? == zero_block_digest()) {
                    reader.load(index)?;
                }
            }
            Ok(())
        });
        checked.map_err(|error| StoreError::damaged(format!("object {}", self.id), error.to_string()))
    }
}

/// Reads an object; each block is checked against its digest before a byte of it is handed out.
#[derive(Debug)]
pub struct ObjectReader {
    id: ObjectId,
    length: u64,
    data: File,
    digests: File,
    position: u64,
    block: Vec<u8>,
    block_index: Option<u64>,
}

impl ObjectReader {
    /// Where a block is in the content.
    fn range(&self, index: u64) -> Range<u64> {
        let start = index * BLOCK_BYTES as u64;
        start..self.length.min(start + BLOCK_BYTES as u64)
    }

    /// The digest a block is to have.
    fn digest(&self, index: u64) -> io::Result<Digest> {
        let mut digest = [0; Digest::BYTES];
        self.digests.read_exact_at(&mut digest, index * Digest::BYTES as u64)?;
        Ok(Digest::from_bytes(digest))
    }

    fn load(&mut self, index: u64) -> io::Result<()> {
        if self.block_index == Some(index) {
            return Ok(());
        }
        self.block_index = None;
        let range = self.range(index);
        self.block.resize((range.end - range.start) as usize, 0);
        self.data.read_exact_at(&mut self.block, range.start)?;
        if Digest::of(&self.block) != self.digest(index)? {
            return Err(io::Error::new(
                io::ErrorKind::InvalidData,
                format!("block {index} of object {} does not match its digest", self.id),
            ));
        }
        self.block_index = Some(index);
        Ok(())
    }
}

impl Read for ObjectReader {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        if self.position >= self.length || buffer.is_empty() {
            return Ok(0);
        }
        self.load(self.position / BLOCK_BYTES as u64)?;
        let rest = &self.block[(self.position % BLOCK_BYTES as u64) as usize..];
        let count = rest.len().min(buffer.len());
        buffer[..count].copy_from_slice(&rest[..count]);
        self.position += count as u64;
        Ok(count)
    }
}

impl Seek for ObjectReader {
    fn seek(&mut self, target: SeekFrom) -> io::Result<u64> {
        let (base, offset) = match target {
            SeekFrom::Start(position) => (position, 0),
            SeekFrom::End(offset) => (self.length, offset),
            SeekFrom::Current(offset) => (self.position, offset),
        };
        self.position = base
            .checked_add_signed(offset)
            .ok_or_else(|| io::Error::new(io::ErrorKind::InvalidInput, "seek to before the start"))?;
        Ok(self.position)
    }
}
