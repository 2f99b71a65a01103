//! Writing an object: content in, digests of its blocks computed on the way.

use std::fs::{File, OpenOptions};
use std::io::{self, Seek, SeekFrom, Write};
use std::os::unix::fs::FileExt;
use std::path::PathBuf;

use kiln_support::digest::{BLOCK_BYTES, Digest, tree_id};

use crate::error::Context;
use crate::{ObjectId, Session, StoreError};

/// The most bytes of one object.
pub const MAX_OBJECT_BYTES: u64 = 256 << 30;

/// An object being written. It can be written in any order; what is never written reads as zeros.
///
/// Made for content that comes mostly in order: the block at the end is hashed as it fills, and only blocks that
/// were changed after that are read again. Blocks of zeros take no disk space. Dropping the writer before
/// [`ObjectWriter::finish`] leaves nothing.
///
/// ```text
/// new_object ──write, seek──▶ ObjectWriter ──finish──▶ in the store
///                                  └────────drop─────▶ gone
/// ```
#[derive(Debug)]
pub struct ObjectWriter {
    session: Session,
    path: PathBuf,
    file: File,
    position: u64,
    /// The bytes of the full blocks before the tail.
    tail_start: u64,
    /// The last block, not yet in the file; always shorter than a block between calls.
    tail: Vec<u8>,
    /// The digests of the blocks before the tail; `None` for those changed since they were hashed.
    digests: Vec<Option<Digest>>,
}

impl ObjectWriter {
    pub(crate) fn create(session: Session, path: PathBuf) -> Result<Self, StoreError> {
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .create_new(true)
            .open(&path)
            .context("create", &path)?;
        Ok(Self {
            session,
            path,
            file,
            position: 0,
            tail_start: 0,
            tail: Vec::with_capacity(BLOCK_BYTES),
            digests: Vec::new(),
        })
    }

    /// How many bytes the object has so far.
    pub fn length(&self) -> u64 {
        self.tail_start + self.tail.len() as u64
    }

    /// Puts the object into the store, on disk when this returns, and says what it is called.
    ///
    /// # Errors
    /// When the disk is full or fails; then nothing is in the store.
    pub fn finish(mut self) -> Result<ObjectId, StoreError> {
        let length = self.length();
        let tail = std::mem::take(&mut self.tail);
        if !tail.is_empty() {
            self.file.write_all_at(&tail, self.tail_start).context("write", &self.path)?;
            self.digests.push(Some(Digest::of(&tail)));
        }
        self.file.set_len(length).context("write", &self.path)?;
        let mut digests = Vec::with_capacity(self.digests.len() * Digest::BYTES);
        for index in 0..self.digests.len() {
            let digest = match self.digests[index] {
                Some(digest) => digest,
                None => self.hash_again(index as u64, length).context("read", &self.path)?,
            };
            digests.extend_from_slice(digest.as_bytes());
        }
        let id = ObjectId(tree_id(&digests));
        self.session.publish_object(id, &self.file, &self.path, &digests)?;
        Ok(id)
    }

    fn hash_again(&self, index: u64, length: u64) -> io::Result<Digest> {
        let start = index * BLOCK_BYTES as u64;
        let mut block = vec![0; (length - start).min(BLOCK_BYTES as u64) as usize];
        self.file.read_exact_at(&mut block, start)?;
        Ok(Digest::of(&block))
    }

    /// Adds `content` at the end, as much as fits into the last block.
    fn append(&mut self, content: &[u8]) -> io::Result<usize> {
        if self.tail.is_empty() && content.len() >= BLOCK_BYTES {
            let block = &content[..BLOCK_BYTES];
            self.put_block(block)?;
            return Ok(BLOCK_BYTES);
        }
        let count = content.len().min(BLOCK_BYTES - self.tail.len());
        self.tail.extend_from_slice(&content[..count]);
        if self.tail.len() == BLOCK_BYTES {
            let block = std::mem::take(&mut self.tail);
            let put = self.put_block(&block);
            self.tail = block;
            if put.is_err() {
                self.tail.truncate(BLOCK_BYTES - count);
            } else {
                self.tail.clear();
            }
            put?;
        }
        Ok(count)
    }

    fn put_block(&mut self, block: &[u8]) -> io::Result<()> {
        if block.iter().any(|byte| *byte != 0) {
            self.file.write_all_at(block, self.tail_start)?;
            self.digests.push(Some(Digest::of(block)));
        } else {
            self.digests.push(Some(zero_block_digest()));
        }
        self.tail_start += BLOCK_BYTES as u64;
        Ok(())
    }

    /// Changes bytes before the end.
    fn change(&mut self, content: &[u8]) -> io::Result<usize> {
        let count;
        if self.position >= self.tail_start {
            let at = (self.position - self.tail_start) as usize;
            count = content.len().min(self.tail.len() - at);
            self.tail[at..at + count].copy_from_slice(&content[..count]);
        } else {
            count = content.len().min((self.tail_start - self.position).min(BLOCK_BYTES as u64) as usize);
            // Marked first: a write that fails half-way has changed them too.
            let first = self.position / BLOCK_BYTES as u64;
            let last = (self.position + count as u64).div_ceil(BLOCK_BYTES as u64);
            self.digests[first as usize..last as usize].fill(None);
            self.file.write_all_at(&content[..count], self.position)?;
        }
        Ok(count)
    }
}

static ZEROS: [u8; BLOCK_BYTES] = [0; BLOCK_BYTES];

pub(crate) fn zero_block_digest() -> Digest {
    static DIGEST: std::sync::OnceLock<Digest> = std::sync::OnceLock::new();
    *DIGEST.get_or_init(|| Digest::of(ZEROS))
}

impl Write for ObjectWriter {
    fn write(&mut self, content: &[u8]) -> io::Result<usize> {
        if content.is_empty() {
            return Ok(0);
        }
        if self.position.checked_add(content.len() as u64).is_none_or(|end| end > MAX_OBJECT_BYTES) {
            return Err(io::Error::new(
                io::ErrorKind::FileTooLarge,
                format!("an object has at most {MAX_OBJECT_BYTES} bytes"),
            ));
        }
        while self.length() < self.position {
            let gap = (self.position - self.length()).min(BLOCK_BYTES as u64) as usize;
            self.append(&ZEROS[..gap])?;
        }
        let count =
            if self.position == self.length() { self.append(content)? } else { self.change(content)? };
        self.position += count as u64;
        Ok(count)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl Seek for ObjectWriter {
    fn seek(&mut self, target: SeekFrom) -> io::Result<u64> {
        let (base, offset) = match target {
            SeekFrom::Start(position) => (position, 0),
            SeekFrom::End(offset) => (self.length(), offset),
            SeekFrom::Current(offset) => (self.position, offset),
        };
        self.position = base
            .checked_add_signed(offset)
            .ok_or_else(|| io::Error::new(io::ErrorKind::InvalidInput, "seek to before the start"))?;
        Ok(self.position)
    }
}

impl Drop for ObjectWriter {
    fn drop(&mut self) {
        // Renamed away when finished; what cannot be removed now goes with the session's folder.
        let _ = std::fs::remove_file(&self.path);
    }
}

#[cfg(test)]
mod tests {
    use std::io::Read;

    use super::*;
    use crate::Store;
    use proptest::prelude::*;

    fn store() -> (tempfile::TempDir, Store) {
        let root = tempfile::tempdir().expect("a directory");
        let store = Store::open(root.path().join("store")).expect("a store");
        (root, store)
    }

    fn read_all(store: &Store, id: ObjectId) -> Vec<u8> {
        let mut content = Vec::new();
        store
            .object(id)
            .expect("an object")
            .reader()
            .expect("a reader")
            .read_to_end(&mut content)
            .expect("every block matches");
        content
    }

    #[test]
    fn zeros_take_no_disk_space() {
        let (_root, store) = store();
        let session = store.session().expect("a session");
        let mut writer = session.new_object().expect("a writer");
        writer.seek(SeekFrom::Start(256 << 20)).expect("sought");
        writer.write_all(b"end").expect("written");
        let object = store.object(writer.finish().expect("finished")).expect("an object");
        assert_eq!(object.length(), (256 << 20) + 3);
        assert!(object.disk_bytes().expect("known") < 1 << 20);
        object.verify().expect("whole");
    }

    #[test]
    fn an_object_dropped_before_its_end_leaves_nothing() {
        let (_root, store) = store();
        let session = store.session().expect("a session");
        let mut writer = session.new_object().expect("a writer");
        writer.write_all(&vec![1; 3 * BLOCK_BYTES]).expect("written");
        let path = writer.path.clone();
        assert!(path.exists());
        drop(writer);
        assert!(!path.exists());
        assert_eq!(std::fs::read_dir(store.root().join("objects")).expect("a directory").count(), 0);
    }

    #[test]
    fn an_object_past_the_limit_is_refused() {
        let (_root, store) = store();
        let session = store.session().expect("a session");
        let mut writer = session.new_object().expect("a writer");
        writer.seek(SeekFrom::Start(u64::MAX)).expect("sought");
        assert_eq!(writer.write(b"x").map_err(|e| e.kind()), Err(io::ErrorKind::FileTooLarge));
        writer.seek(SeekFrom::Start(MAX_OBJECT_BYTES)).expect("sought");
        assert_eq!(writer.write(b"x").map_err(|e| e.kind()), Err(io::ErrorKind::FileTooLarge));
        assert_eq!(writer.length(), 0);
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(48))]
        #[test]
        fn an_object_is_what_a_plain_file_would_be(
            writes in proptest::collection::vec((0..5 * BLOCK_BYTES, 0..2 * BLOCK_BYTES, 0u8..4), 0..12)
        ) {
            let (_root, store) = store();
            let session = store.session().expect("a session");
            let mut writer = session.new_object().expect("a writer");
            let mut expected = io::Cursor::new(Vec::new());
            for (at, length, byte) in writes {
                let content: Vec<u8> = (0..length).map(|i| byte.wrapping_mul((i % 7) as u8)).collect();
                for file in [&mut writer as &mut dyn WriteSeek, &mut expected] {
                    file.seek(SeekFrom::Start(at as u64)).expect("sought");
                    file.write_all(&content).expect("written");
                }
            }
            let expected = expected.into_inner();
            let id = writer.finish().expect("finished");
            let digests: Vec<u8> =
                expected.chunks(BLOCK_BYTES).flat_map(|block| *Digest::of(block).as_bytes()).collect();
            prop_assert_eq!(id, ObjectId(tree_id(&digests)));
            prop_assert_eq!(read_all(&store, id), expected);
        }
    }

    trait WriteSeek: Write + Seek {}
    impl<T: Write + Seek> WriteSeek for T {}
}
