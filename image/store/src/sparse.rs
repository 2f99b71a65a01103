//! Files that are mostly holes: what is in them, copying them, and making an object of one.

use std::fs::{File, OpenOptions, Permissions};
use std::io;
use std::os::unix::fs::{FileExt, PermissionsExt};
use std::path::PathBuf;

use kiln_support::digest::{BLOCK_BYTES, Digest, block_count, tree_id};
use rustix::fs::{SeekFrom, copy_file_range, ioctl_ficlone, seek};
use rustix::io::Errno;

use crate::error::Context;
use crate::writer::{MAX_OBJECT_BYTES, zero_block_digest};
use crate::{MAX_BLOB_BYTES, ObjectId, Session, StoreError};

/// What an object's file may be: read, by its owner. Whoever maps it relies on nobody writing to it.
const OBJECT_MODE: u32 = 0o400;

/// An empty file in a session's folder, for somebody else to write: another process, say. Dropping it leaves nothing.
///
/// ```text
/// new_draft ──others write──▶ Draft ──adopt──▶ in the store
///                               └────drop────▶ gone
/// ```
#[derive(Debug)]
pub struct Draft {
    session: Session,
    path: PathBuf,
    file: File,
}

impl Draft {
    pub(crate) fn create(session: Session, path: PathBuf) -> Result<Self, StoreError> {
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .create_new(true)
            .open(&path)
            .context("create", &path)?;
        Ok(Self { session, path, file })
    }

    /// The file, open for reading and writing.
    pub fn file(&self) -> &File {
        &self.file
    }

    /// Makes a blob of what is in the file now, on disk when this returns, and says its name.
    ///
    /// # Errors
    /// [`StoreError::TooLarge`]; or when the disk is full or fails.
    pub fn adopt_as_blob(self) -> Result<Digest, StoreError> {
        let bytes = self.file.metadata().context("look at", &self.path)?.len();
        if bytes > MAX_BLOB_BYTES {
            return Err(StoreError::TooLarge { what: "a blob", bytes, limit: MAX_BLOB_BYTES });
        }
        let mut content = vec![0; bytes as usize];
        self.file.read_exact_at(&mut content, 0).context("read", &self.path)?;
        self.session.put_blob(&content)
    }

    /// Makes an object of what is in the file now, on disk when this returns, and says what it is called.
    ///
    /// Whoever was given the file must have finished: what is written later makes the object a damaged one. Holes stay
    /// holes. Cost: reading and hashing the data, and 32 bytes for each 64 KiB of holes.
    ///
    /// # Errors
    /// [`StoreError::TooLarge`]; or when the disk is full or fails. Nothing is in the store then.
    pub fn adopt(self) -> Result<ObjectId, StoreError> {
        let digests = digests(&self.file).context("read", &self.path)?.ok_or_else(|| {
            let bytes = self.file.metadata().map_or(u64::MAX, |metadata| metadata.len());
            StoreError::TooLarge { what: "an object", bytes, limit: MAX_OBJECT_BYTES }
        })?;
        self.file.set_permissions(Permissions::from_mode(OBJECT_MODE)).context("protect", &self.path)?;
        let id = ObjectId(tree_id(&digests));
        self.session.publish_object(id, &self.file, &self.path, &digests)?;
        Ok(id)
    }
}

impl Drop for Draft {
    fn drop(&mut self) {
        // Renamed away when adopted; what cannot be removed now goes with the session's folder.
        let _ = std::fs::remove_file(&self.path);
    }
}

/// The digests of a file's blocks, end to end; `None` when it is longer than any object.
fn digests(file: &File) -> io::Result<Option<Vec<u8>>> {
    let length = file.metadata()?.len();
    if length > MAX_OBJECT_BYTES {
        return Ok(None);
    }
    let block_bytes = BLOCK_BYTES as u64;
    let mut digests = Vec::with_capacity(block_count(length) as usize * Digest::BYTES);
    let mut block = vec![0; BLOCK_BYTES];
    let mut holes = Holes::of(file, length);
    for index in 0..block_count(length) {
        let start = index * block_bytes;
        let bytes = (length - start).min(block_bytes);
        let digest = if holes.have(start..start + bytes)? && bytes == block_bytes {
            zero_block_digest()
        } else {
            let block = &mut block[..bytes as usize];
            file.read_exact_at(block, start)?;
            Digest::of(block)
        };
        digests.extend_from_slice(digest.as_bytes());
    }
    Ok(Some(digests))
}

/// Where a file has holes, asked from its start to its end.
pub(crate) struct Holes<'a> {
    file: &'a File,
    length: u64,
    data: std::ops::Range<u64>,
}

impl<'a> Holes<'a> {
    pub(crate) fn of(file: &'a File, length: u64) -> Self {
        Self { file, length, data: 0..0 }
    }

    /// Whether all of `range`, which begins at or behind the one asked for before, lies in a hole.
    pub(crate) fn have(&mut self, range: std::ops::Range<u64>) -> io::Result<bool> {
        if self.data.end <= range.start {
            self.data = next_data(self.file, range.start)?.unwrap_or(self.length..self.length);
        }
        Ok(range.end <= self.data.start)
    }
}

/// The first range of data at or behind `from`; `None` when only a hole is left.
fn next_data(file: &File, from: u64) -> io::Result<Option<std::ops::Range<u64>>> {
    let start = match seek(file, SeekFrom::Data(from)) {
        Ok(start) => start,
        Err(Errno::NXIO) => return Ok(None),
        Err(error) => return Err(error.into()),
    };
    let end = seek(file, SeekFrom::Hole(start))?;
    Ok(Some(start..end))
}

/// Makes the empty file `to` a copy of `from`: sharing its blocks where the file system can, else its data alone.
///
/// # Errors
/// What the file system says.
pub fn copy_sparse(from: &File, to: &File) -> io::Result<()> {
    if ioctl_ficlone(to, from).is_ok() {
        return Ok(());
    }
    let length = from.metadata()?.len();
    to.set_len(length)?;
    let mut at = 0;
    while let Some(data) = next_data(from, at)? {
        copy_range(from, to, &data)?;
        at = data.end;
    }
    Ok(())
}

fn copy_range(from: &File, to: &File, range: &std::ops::Range<u64>) -> io::Result<()> {
    let (mut read_at, mut write_at) = (range.start, range.start);
    while read_at < range.end {
        let left = usize::try_from(range.end - read_at).unwrap_or(usize::MAX);
        match copy_file_range(from, Some(&mut read_at), to, Some(&mut write_at), left) {
            // The file became shorter under our hands.
            Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
            Ok(_) | Err(Errno::INTR) => {}
            // Between file systems, or where the kernel cannot: by hand.
            Err(Errno::XDEV | Errno::NOSYS | Errno::OPNOTSUPP | Errno::INVAL) => {
                return copy_by_hand(from, to, read_at..range.end);
            }
            Err(error) => return Err(error.into()),
        }
    }
    Ok(())
}

fn copy_by_hand(from: &File, to: &File, range: std::ops::Range<u64>) -> io::Result<()> {
    let mut buffer = vec![0; BLOCK_BYTES];
    let mut at = range.start;
    while at < range.end {
        let chunk = &mut buffer[..(range.end - at).min(BLOCK_BYTES as u64) as usize];
        from.read_exact_at(chunk, at)?;
        to.write_all_at(chunk, at)?;
        at += chunk.len() as u64;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::io::Read;
    use std::os::unix::fs::MetadataExt;

    use super::*;
    use crate::Store;

    fn store() -> (tempfile::TempDir, Store) {
        let root = tempfile::tempdir().expect("a directory");
        let store = Store::open(root.path().join("store")).expect("a store");
        (root, store)
    }

    /// A file with data at odd places, and what a plain reader sees of it.
    fn fill(file: &File, length: u64) -> Vec<u8> {
        file.set_len(length).expect("grown");
        let mut content = vec![0; length as usize];
        for (at, bytes) in [(0, 3), (70_000, 130_000), (900_000, 1), (length - 5, 5)] {
            content[at as usize..at as usize + bytes].fill(7);
            file.write_all_at(&vec![7; bytes], at).expect("written");
        }
        content
    }

    #[test]
    fn an_adopted_file_is_the_object_its_content_makes() {
        let (_root, store) = store();
        let session = store.session().expect("a session");
        for length in [16 * BLOCK_BYTES as u64, (1 << 20) + 4096 + 1] {
            let draft = session.new_draft().expect("a draft");
            let content = fill(draft.file(), length);
            let id = draft.adopt().expect("adopted");
            let object = store.object(id).expect("an object");
            let mut read = Vec::new();
            object.reader().expect("a reader").read_to_end(&mut read).expect("every block matches");
            assert!(read == content);
            let mut writer = session.new_object().expect("a writer");
            io::Write::write_all(&mut writer, &content).expect("written");
            assert_eq!(writer.finish().expect("finished"), id);
        }
    }

    #[test]
    fn holes_are_neither_read_nor_filled() {
        let (_root, store) = store();
        let session = store.session().expect("a session");
        let draft = session.new_draft().expect("a draft");
        // More than could be read in the life of this test.
        draft.file().set_len(200 << 30).expect("grown");
        draft.file().write_all_at(b"end", (200 << 30) - 3).expect("written");
        let object = store.object(draft.adopt().expect("adopted")).expect("an object");
        object.verify().expect("whole");
        assert_eq!(object.length(), 200 << 30);
        let (data, _) = object.into_files();
        assert!(data.metadata().expect("known").blocks() * 512 < 1 << 20);
        assert_eq!(data.metadata().expect("known").mode() & 0o777, OBJECT_MODE);
    }

    #[test]
    fn a_draft_that_is_dropped_or_too_long_leaves_nothing() {
        let (_root, store) = store();
        let session = store.session().expect("a session");
        let path = session.new_draft().expect("a draft").path.clone();
        assert!(!path.exists());
        let draft = session.new_draft().expect("a draft");
        let path = draft.path.clone();
        draft.file().set_len(MAX_OBJECT_BYTES + 1).expect("grown");
        assert!(matches!(draft.adopt(), Err(StoreError::TooLarge { .. })));
        assert!(!path.exists());
        assert_eq!(std::fs::read_dir(store.root().join("objects")).expect("a directory").count(), 0);
    }

    #[test]
    fn a_copy_has_the_data_and_the_holes() {
        let (from, to) = (tempfile::tempfile().expect("a file"), tempfile::tempfile().expect("a file"));
        let content = fill(&from, 3 << 20);
        copy_sparse(&from, &to).expect("copied");
        let mut read = vec![0; content.len()];
        to.read_exact_at(&mut read, 0).expect("as long as the other");
        assert!(read == content);
        assert_eq!(to.metadata().expect("known").len(), content.len() as u64);
        assert!(to.metadata().expect("known").blocks() * 512 < 1 << 20);
        let by_hand = tempfile::tempfile().expect("a file");
        copy_by_hand(&from, &by_hand, 0..content.len() as u64).expect("copied");
        by_hand.read_exact_at(&mut read, 0).expect("as long as the other");
        assert!(read == content);
    }
}
