//! Sessions: writing to the store, and keeping what was written from being collected before a tag reaches it.

use std::fs::{self, File};
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use kiln_support::digest::Digest;
use kiln_support::durable;

use crate::error::Context;
use crate::record;
use crate::store::{DIGESTS_SUFFIX, Folder, layer_name};
use crate::writer::ObjectWriter;
use crate::{
    Draft, ImageRecord, LayerRecord, MAX_BLOB_BYTES, Object, ObjectId, SnapshotRecord, Store, StoreError, Tag,
};
use kiln_support::lock::Lock;

/// The name of the file in a session's folder whose lock says that the session lives.
pub(crate) const LIFE: &str = "life";

/// A writer's stay in the store. Cheap to clone; ends when the last clone is dropped or the process dies.
///
/// What is put or pinned through a session stays in the store at least until the session ends. So an image is put in
/// any order and tagged at the end; what no tag reaches by then is left to [`Store::collect`].
#[derive(Debug, Clone)]
pub struct Session {
    inner: Arc<Inner>,
}

#[derive(Debug)]
struct Inner {
    store: Store,
    folder: PathBuf,
    next_file: AtomicU64,
    _life: Lock,
}

impl Drop for Inner {
    fn drop(&mut self) {
        // If this fails the folder is swept when the store is next opened: its lock is free then.
        let _ = fs::remove_dir_all(&self.folder);
    }
}

impl Session {
    pub(crate) fn start(store: &Store) -> Result<Self, StoreError> {
        // The sweep takes the lock exclusively, so it never sees a folder whose lock is not yet held.
        let _lock = store.lock_shared()?;
        let sessions = store.folder(Folder::Sessions);
        let name = durable::random_name().context("name a session in", &sessions)?;
        let folder = sessions.join(name);
        fs::create_dir(&folder).context("create", &folder)?;
        let life_path = folder.join(LIFE);
        let life = Lock::try_exclusive(&life_path).context("lock", &life_path)?;
        let life = life.ok_or_else(|| StoreError::Io {
            action: "lock",
            path: life_path,
            source: io::ErrorKind::ResourceBusy.into(),
        })?;
        Ok(Self {
            inner: Arc::new(Inner {
                store: store.clone(),
                folder,
                next_file: AtomicU64::new(0),
                _life: life,
            }),
        })
    }

    /// The store this session writes to.
    pub fn store(&self) -> &Store {
        &self.inner.store
    }

    /// Puts a blob, on disk when this returns, and says its name.
    ///
    /// # Errors
    /// [`StoreError::TooLarge`]; or when the disk is full or fails.
    pub fn put_blob(&self, content: &[u8]) -> Result<Digest, StoreError> {
        let bytes = content.len() as u64;
        if bytes > MAX_BLOB_BYTES {
            return Err(StoreError::TooLarge { what: "a blob", bytes, limit: MAX_BLOB_BYTES });
        }
        let name = Digest::of(content);
        // Here already and sound: nothing to write. Damaged: written anew.
        if let Ok(Some(_)) = self.use_blob(&name) {
            return Ok(name);
        }
        self.pin(Folder::Blobs, &name.hex())?;
        self.put_file(Folder::Blobs, &name.hex(), content)?;
        Ok(name)
    }

    /// Starts an object.
    ///
    /// # Errors
    /// When the disk is full or fails.
    pub fn new_object(&self) -> Result<ObjectWriter, StoreError> {
        ObjectWriter::create(self.clone(), self.new_path())
    }

    /// Makes an empty file that somebody else is to write, for an object or a blob to be made of.
    ///
    /// # Errors
    /// When the disk is full or fails.
    pub fn new_draft(&self) -> Result<Draft, StoreError> {
        Draft::create(self.clone(), self.new_path())
    }

    /// Opens an object that is in the store and keeps it there.
    ///
    /// # Errors
    /// [`StoreError::Missing`] when it is not there, [`StoreError::Damaged`] when it is not what its name says.
    pub fn use_object(&self, id: ObjectId) -> Result<Object, StoreError> {
        let _lock = self.inner.store.lock_shared()?;
        self.pin(Folder::Objects, &id.0.hex())?;
        self.inner.store.object(id)
    }

    /// Reads a blob that is in the store and keeps it there; `None` when it is not.
    ///
    /// # Errors
    /// [`StoreError::Damaged`] when it is not what its name says.
    pub fn use_blob(&self, name: &Digest) -> Result<Option<Vec<u8>>, StoreError> {
        let _lock = self.inner.store.lock_shared()?;
        self.pin(Folder::Blobs, &name.hex())?;
        self.inner.store.blob(name)
    }

    /// Records that a layer was made into an object by a writer of this `format`.
    ///
    /// # Errors
    /// When the disk is full or fails.
    pub fn put_layer(&self, layer: LayerRecord, format: u32) -> Result<(), StoreError> {
        self.put_file(Folder::Layers, &layer_name(&layer.diff_id, format), &record::encode(&layer)?)
    }

    /// Records what an image is made of. All of it must be in the store, put or used through this session.
    ///
    /// # Errors
    /// When the disk is full or fails.
    pub fn put_image(&self, image: &ImageRecord) -> Result<(), StoreError> {
        self.pin(Folder::Images, &image.manifest.hex())?;
        self.put_file(Folder::Images, &image.manifest.hex(), &record::encode(image)?)
    }

    /// Makes a name mean an image, which must be in the store, put or used through this session.
    ///
    /// # Errors
    /// When the disk is full or fails.
    pub fn put_tag(&self, tag: &Tag) -> Result<(), StoreError> {
        self.put_file(Folder::Tags, &Tag::file_name(&tag.name, &tag.platform), &record::encode(tag)?)
    }

    /// Records a snapshot, in the place of an earlier one with its key. All it is made of must be in the store, put or
    /// used through this session. A name that it has goes over to it.
    ///
    /// # Errors
    /// When the disk is full or fails.
    pub fn put_snapshot(&self, snapshot: &SnapshotRecord) -> Result<(), StoreError> {
        if let Some(name) = &snapshot.name {
            let (others, _) = self.inner.store.snapshots()?;
            for other in others {
                if other.key != snapshot.key && other.name.as_ref() == Some(name) {
                    // What a machine was saved with stays with it.
                    let commands = other.commands.filter(|_| other.kind == crate::SnapshotKind::Saved);
                    self.put_snapshot_record(&SnapshotRecord { name: None, commands, ..other })?;
                }
            }
        }
        self.put_snapshot_record(snapshot)
    }

    fn put_snapshot_record(&self, snapshot: &SnapshotRecord) -> Result<(), StoreError> {
        let name = snapshot.key.hex();
        self.pin(Folder::Snapshots, &name)?;
        self.put_file(Folder::Snapshots, &name, &record::encode(snapshot)?)
    }

    /// Reads what an image is made of and keeps all of it in the store; `None` when it is not in the store.
    ///
    /// # Errors
    /// [`StoreError::Damaged`] when the record of it is.
    pub fn use_image(&self, manifest: &Digest) -> Result<Option<ImageRecord>, StoreError> {
        let _lock = self.inner.store.lock_shared()?;
        let Some(image) = self.inner.store.image(manifest)? else { return Ok(None) };
        self.pin(Folder::Images, &manifest.hex())?;
        for blob in [&image.manifest, &image.config] {
            self.pin(Folder::Blobs, &blob.hex())?;
        }
        for object in image.layers.iter().map(|layer| layer.object).chain([image.merged]) {
            self.pin(Folder::Objects, &object.0.hex())?;
        }
        Ok(Some(image))
    }

    /// Moves a finished object into place. The digests go first: an object is there when its content is.
    pub(crate) fn publish_object(
        &self,
        id: ObjectId,
        data: &File,
        data_path: &Path,
        digests: &[u8],
    ) -> Result<(), StoreError> {
        let hex = id.0.hex();
        self.pin(Folder::Objects, &hex)?;
        self.put_file(Folder::Objects, &format!("{hex}{DIGESTS_SUFFIX}"), digests)?;
        data.sync_all().context("write", data_path)?;
        let target = self.inner.store.path(Folder::Objects, &hex);
        self.publish(data, data_path, &target)
    }

    /// Moves a synced file into place, between two collections: one that has not seen its pin must not see it.
    fn publish(&self, file: &File, aside: &Path, target: &Path) -> Result<(), StoreError> {
        let _lock = self.inner.store.lock_shared()?;
        durable::publish(file, aside, target).context("write", target)
    }

    fn new_path(&self) -> PathBuf {
        self.inner.folder.join(self.inner.next_file.fetch_add(1, Ordering::Relaxed).to_string())
    }

    fn put_file(&self, folder: Folder, name: &str, content: &[u8]) -> Result<(), StoreError> {
        let target = self.inner.store.path(folder, name);
        let aside = self.new_path();
        let written = File::create_new(&aside).and_then(|mut file| {
            io::Write::write_all(&mut file, content)?;
            file.sync_all()?;
            Ok(file)
        });
        let put = written.context("write", &aside).and_then(|file| self.publish(&file, &aside, &target));
        if put.is_err() {
            // Makes room on a full disk; the session's end removes it in any case.
            let _ = fs::remove_file(&aside);
        }
        put
    }

    /// Keeps the file from being collected while this session lives. A pin need not survive a power cut: no session
    /// does.
    fn pin(&self, folder: Folder, name: &str) -> Result<(), StoreError> {
        let path = self.inner.folder.join(pin_name(folder, name));
        File::create(&path).map(drop).context("create", &path)
    }
}

/// The name of the empty file that pins a file of the store.
pub(crate) fn pin_name(folder: Folder, name: &str) -> String {
    format!("{}-{name}", folder.name())
}
