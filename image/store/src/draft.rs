//! Objects made of files that somebody else writes, mostly holes.

use std::fs::{File, OpenOptions, Permissions};
use std::io;
use std::os::unix::fs::{FileExt, PermissionsExt};
use std::path::PathBuf;

use kiln_support::digest::{BLOCK_BYTES, Digest, block_count, tree_id};
use kiln_support::sparse::Holes;

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
}
