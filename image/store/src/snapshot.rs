//! Snapshots: saved machines, each known by the key of everything it depends on.

use std::fs::{self, File};
use std::io;
use std::path::Path;

use kiln_support::digest::Digest;
use kiln_support::word::Word;
use serde::{Deserialize, Serialize};

use crate::error::Context;
use crate::store::Folder;
use crate::{ObjectId, Store, StoreError, record};
use kiln_support::lock::Lock;

/// The most snapshots one store lists.
const MAX_SNAPSHOTS: usize = 100_000;
/// The most bytes of a snapshot's name.
const NAME_BYTES_MAX: usize = 128;
/// The fewest digits that may stand for a snapshot's key.
const MIN_KEY_DIGITS: usize = 6;

/// What a snapshot is of.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum SnapshotKind {
    /// A guest that has booted, with nothing mounted: what templates are made from.
    Base,
    /// A guest with an image mounted, ready for commands. It goes when no tag means the image any more.
    Template,
    /// A machine that somebody saved. It stays until somebody removes it.
    Saved,
}

impl SnapshotKind {
    /// The name used in lists.
    pub fn name(self) -> &'static str {
        match self {
            Self::Base => "base",
            Self::Template => "template",
            Self::Saved => "saved",
        }
    }
}

/// What a snapshot is made of, and what it was made from.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct SnapshotRecord {
    /// The digest over everything it depends on: its identity.
    pub key: Digest,
    /// What it is of.
    pub kind: SnapshotKind,
    /// What its user calls it; no two snapshots have the same name.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub name: Option<String>,
    /// The image that is mounted in it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub image: Option<SnapshotImage>,
    /// The digest over the names of the objects that the image's disk is made of: the guest knows that disk and no other, such as
    /// one that a later version makes of the same image.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub root: Option<Digest>,
    /// The command that runs in it, in words.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub service: Option<String>,
    /// How commands run in its machines unless told otherwise, where whoever named or saved it said so; else as the image says.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub commands: Option<SnapshotCommands>,
    /// The guest's memory.
    pub memory: ObjectId,
    /// Everything else of the machine: a blob.
    pub state: Digest,
    /// The disk that has the guest's changes to its root.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub scratch: Option<ObjectId>,
    /// The guest's memory in MiB.
    pub memory_mib: u32,
    /// How many vCPUs it has.
    pub vcpus: u32,
    /// The SHA-256 of the guest kernel.
    pub kernel: Digest,
    /// The SHA-256 of the initramfs.
    pub initramfs: Digest,
    /// When it was made, in seconds since 1970.
    pub created_unix_s: u64,
}

/// The image in a snapshot.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct SnapshotImage {
    /// The name it was asked for by.
    pub reference: String,
    /// The digest of its manifest.
    pub manifest: Digest,
}

/// How commands run in the machines of a snapshot.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct SnapshotCommands {
    /// The whole environment as `KEY=VALUE` words.
    pub env: Vec<Word>,
    /// As whom; empty for root.
    pub user: String,
    /// Where; empty for `/`.
    pub working_directory: String,
}

impl SnapshotRecord {
    /// The objects it is made of.
    pub fn objects(&self) -> impl Iterator<Item = ObjectId> {
        [self.memory].into_iter().chain(self.scratch)
    }
}

/// A snapshot, open. Its files stay readable whatever is removed from the store.
///
/// Opening one reads the record and nothing else, for a machine is restored from it in less time than its bytes could be
/// read in. The state has digests of its own, which its reader checks; the memory is checked by [`Store::object`] and
/// [`Object::verify`](crate::Object::verify).
#[derive(Debug)]
pub struct Snapshot {
    /// What it is made of.
    pub record: SnapshotRecord,
    /// The guest's memory, to be read or mapped.
    pub memory: File,
    /// Everything else of the machine.
    pub state: File,
    /// The disk with the guest's changes, to be copied.
    pub scratch: Option<File>,
}

/// The right to make the snapshot of one key, which one process at a time has; given up when dropped.
#[derive(Debug)]
pub struct BakeLock {
    _lock: Lock,
}

impl Store {
    /// Opens a snapshot; `None` when it is not there, or something it is made of is not any more.
    ///
    /// # Errors
    /// [`StoreError::Damaged`] when the record of it is.
    pub fn open_snapshot(&self, key: &Digest) -> Result<Option<Snapshot>, StoreError> {
        let _lock = self.lock_shared()?;
        let Some(record) = self.snapshot(key)? else { return Ok(None) };
        let open = |folder, name: &str| open_if_there(&self.path(folder, name));
        let memory = open(Folder::Objects, &record.memory.0.hex())?;
        let state = open(Folder::Blobs, &record.state.hex())?;
        let (Some(memory), Some(state)) = (memory, state) else { return Ok(None) };
        let scratch = match record.scratch {
            Some(id) => match open(Folder::Objects, &id.0.hex())? {
                Some(file) => Some(file),
                None => return Ok(None),
            },
            None => None,
        };
        Ok(Some(Snapshot { record, memory, state, scratch }))
    }

    /// What the snapshot with this key is made of; `None` when there is none.
    ///
    /// # Errors
    /// [`StoreError::Damaged`] when the record of it is.
    pub fn snapshot(&self, key: &Digest) -> Result<Option<SnapshotRecord>, StoreError> {
        let record: Option<SnapshotRecord> =
            record::read(&self.path(Folder::Snapshots, &key.hex()), &format!("snapshot {key}"))?;
        match record {
            Some(record) if record.key != *key => {
                Err(StoreError::damaged(format!("snapshot {key}"), format!("it is that of {}", record.key)))
            }
            record => Ok(record),
        }
    }

    /// All snapshots, the oldest first, and beside them the keys of those whose records are damaged.
    ///
    /// # Errors
    /// When the store cannot be read.
    pub fn snapshots(&self) -> Result<(Vec<SnapshotRecord>, Vec<Digest>), StoreError> {
        let folder = self.folder(Folder::Snapshots);
        let (mut sound, mut damaged) = (Vec::new(), Vec::new());
        for entry in fs::read_dir(&folder).context("list", &folder)? {
            let name = entry.context("list", &folder)?.file_name();
            // The store gives no other names than keys.
            let Some(key) = name.to_str().and_then(|name| Digest::from_hex(name).ok()) else { continue };
            match self.snapshot(&key) {
                Ok(Some(record)) => sound.push(record),
                // Removed since the listing.
                Ok(None) => {}
                Err(StoreError::Damaged { .. }) => damaged.push(key),
                Err(error) => return Err(error),
            }
            if sound.len() + damaged.len() > MAX_SNAPSHOTS {
                let why = format!("it has more than {MAX_SNAPSHOTS}");
                return Err(StoreError::damaged("the list of snapshots", why));
            }
        }
        sound.sort_by(|a, b| (a.created_unix_s, &a.key).cmp(&(b.created_unix_s, &b.key)));
        Ok((sound, damaged))
    }

    /// The snapshot with this name, or the one whose key starts so; `None` when there is none, or several have such a key.
    ///
    /// # Errors
    /// When the store cannot be read.
    pub fn find_snapshot(&self, name: &str) -> Result<Option<SnapshotRecord>, StoreError> {
        let (snapshots, _) = self.snapshots()?;
        if let Some(named) = snapshots.iter().find(|snapshot| snapshot.name.as_deref() == Some(name)) {
            return Ok(Some(named.clone()));
        }
        let digits = name.strip_prefix("sha256:").unwrap_or(name);
        if digits.len() < MIN_KEY_DIGITS {
            return Ok(None);
        }
        let mut found = snapshots.into_iter().filter(|snapshot| snapshot.key.hex().starts_with(digits));
        Ok(found.next().filter(|_| found.next().is_none()))
    }

    /// Removes a snapshot, damaged or not; what it was made of goes with the next [`Store::collect`], and machines made
    /// from it do not notice. True when there was one.
    ///
    /// # Errors
    /// When the file system fails.
    pub fn remove_snapshot(&self, key: &Digest) -> Result<bool, StoreError> {
        self.remove_record(Folder::Snapshots, &key.hex())
    }

    /// Takes the right to make the snapshot of this key; `None` when somebody else has it.
    ///
    /// # Errors
    /// When the file system fails.
    pub fn try_bake_lock(&self, key: &Digest) -> Result<Option<BakeLock>, StoreError> {
        let path = self.path(Folder::Locks, &key.hex());
        Ok(Lock::try_exclusive(&path).context("lock", &path)?.map(|lock| BakeLock { _lock: lock }))
    }

    /// Waits for the right to make the snapshot of this key, as long as it takes somebody else to make it. Blocks.
    ///
    /// # Errors
    /// When the file system fails.
    pub fn bake_lock(&self, key: &Digest) -> Result<BakeLock, StoreError> {
        let path = self.path(Folder::Locks, &key.hex());
        Ok(BakeLock { _lock: Lock::exclusive(&path).context("lock", &path)? })
    }
}

/// Whether a snapshot may be called so: words that no key and no option looks like.
pub fn is_snapshot_name(name: &str) -> bool {
    let is_good = |byte: u8| byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'_' | b'.' | b':' | b'/');
    name.len() <= NAME_BYTES_MAX
        && name.bytes().all(is_good)
        && name.bytes().next().is_some_and(|first| first.is_ascii_alphanumeric())
        && !(name.len() >= MIN_KEY_DIGITS && name.bytes().all(|byte| byte.is_ascii_hexdigit()))
}

/// Removes the locks of bakes that nobody holds. Needs the store's lock exclusively. One who opened such a file and has
/// not locked it yet gets a lock that nobody else sees, and at worst the same is made twice.
pub(crate) fn sweep_locks(store: &Store) -> Result<(), StoreError> {
    let folder = store.folder(Folder::Locks);
    for entry in fs::read_dir(&folder).context("list", &folder)? {
        let path = entry.context("list", &folder)?.path();
        if Lock::try_exclusive(&path).context("lock", &path)?.is_some() {
            fs::remove_file(&path).context("remove", &path)?;
        }
    }
    Ok(())
}

fn open_if_there(path: &Path) -> Result<Option<File>, StoreError> {
    match File::open(path) {
        Ok(file) => Ok(Some(file)),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(error).context("open", path),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_is_neither_a_key_nor_an_option() {
        for good in ["web", "web-1", "python:3.12", "a", "deadbeefs"] {
            assert!(is_snapshot_name(good), "{good}");
        }
        for bad in ["", "-x", "deadbeef", "a b", "a\n", &"x".repeat(129), ".."] {
            assert!(!is_snapshot_name(bad), "{bad}");
        }
    }
}
