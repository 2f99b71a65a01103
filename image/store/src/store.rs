//! The store: where things are, and reading them.

use std::fs::{self, File};
use std::io::{self, Read};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use kiln_support::digest::Digest;
use kiln_support::durable;
use rustix::fs::Mode;

use crate::collect::{self, Collected, Swept};
use crate::error::Context;
use crate::record;
use crate::{ImageRecord, LayerRecord, Object, ObjectId, Session, StoreError, Tag};
use kiln_support::lock::Lock;

/// The most bytes of a blob: what a manifest, an index or a config may have.
pub const MAX_BLOB_BYTES: u64 = 8 << 20;
/// The most tags one store lists.
const MAX_TAGS: usize = 100_000;
/// What the name of an object's digests adds to that of its content.
pub(crate) const DIGESTS_SUFFIX: &str = ".digests";
const FORMAT: &str = "kiln-store 1\n";

/// A store on disk. Cheap to clone; any number of threads and processes use the same one at once.
#[derive(Debug, Clone)]
pub struct Store {
    root: Arc<PathBuf>,
    swept: Swept,
}

/// The folders of a store.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Folder {
    Blobs,
    Objects,
    Layers,
    Images,
    Tags,
    Snapshots,
    Locks,
    Sessions,
}

impl Folder {
    const ALL: [Self; 8] = [
        Self::Blobs,
        Self::Objects,
        Self::Layers,
        Self::Images,
        Self::Tags,
        Self::Snapshots,
        Self::Locks,
        Self::Sessions,
    ];
    /// Those that stores made by earlier versions lack.
    const LATER: [Self; 2] = [Self::Snapshots, Self::Locks];

    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Blobs => "blobs",
            Self::Objects => "objects",
            Self::Layers => "layers",
            Self::Images => "images",
            Self::Tags => "tags",
            Self::Snapshots => "snapshots",
            Self::Locks => "locks",
            Self::Sessions => "tmp",
        }
    }
}

impl Store {
    /// Where the store is when nobody says: what the environment's `KILN_ROOT` names, `/var/lib/kiln` for root, else `kiln` in the user's data
    /// folder.
    ///
    /// XDG Base Directory Specification 0.8: `$XDG_DATA_HOME`, or `$HOME/.local/share`; a relative path is ignored.
    ///
    /// # Errors
    /// [`StoreError::NoHome`] when the environment names no such folder.
    pub fn default_root() -> Result<PathBuf, StoreError> {
        let absolute = |name| std::env::var_os(name).map(PathBuf::from).filter(|path| path.is_absolute());
        if let Some(root) = absolute("KILN_ROOT") {
            return Ok(root);
        }
        if rustix::process::geteuid().is_root() {
            return Ok(PathBuf::from("/var/lib/kiln"));
        }
        absolute("XDG_DATA_HOME")
            .or_else(|| absolute("HOME").map(|home| home.join(".local/share")))
            .map(|data| data.join("kiln"))
            .ok_or(StoreError::NoHome)
    }

    /// Opens the store at `root`, which is made if it is not there, and sweeps what dead writers left behind.
    ///
    /// # Errors
    /// [`StoreError::Format`] when another version made it; [`StoreError::Io`] when it may not be written.
    pub fn open(root: impl Into<PathBuf>) -> Result<Self, StoreError> {
        let root = root.into();
        let path = std::path::absolute(&root).context("find", &root)?;
        let store = Self { root: Arc::new(path), swept: Swept::default() };
        let format_path = store.root.join("format");
        match fs::read_to_string(&format_path) {
            Ok(format) if format == FORMAT => store.create_folders(&Folder::LATER)?,
            Ok(found) => {
                let found = found.trim().chars().take(40).collect();
                return Err(StoreError::Format { root, found, known: FORMAT.trim() });
            }
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                store.create()?;
                durable::write(&format_path, FORMAT.as_bytes()).context("write", &format_path)?;
            }
            Err(error) => return Err(error).context("open", &format_path),
        }
        let swept = collect::sweep_dead_sessions(&store)?;
        Ok(Self { swept, ..store })
    }

    /// What dead writers had left when it was opened, which is gone.
    pub fn swept(&self) -> Swept {
        self.swept
    }

    fn create(&self) -> Result<(), StoreError> {
        durable::create_directories(&self.root).context("create", &self.root)?;
        // Images can hold what only their owner may read.
        rustix::fs::chmod(&*self.root, Mode::RWXU).map_err(io::Error::from).context("protect", &self.root)?;
        self.create_folders(&Folder::ALL)
    }

    fn create_folders(&self, folders: &[Folder]) -> Result<(), StoreError> {
        for folder in folders {
            let path = self.folder(*folder);
            durable::create_directories(&path).context("create", &path)?;
        }
        Ok(())
    }

    /// The folder the store is in.
    pub fn root(&self) -> &Path {
        &self.root
    }

    pub(crate) fn folder(&self, folder: Folder) -> PathBuf {
        self.root.join(folder.name())
    }

    pub(crate) fn path(&self, folder: Folder, name: &str) -> PathBuf {
        self.folder(folder).join(name)
    }

    pub(crate) fn lock_path(&self) -> PathBuf {
        self.root.join("lock")
    }

    /// Keeps what is in the store in it until the lock is dropped. To be held for moments.
    pub(crate) fn lock_shared(&self) -> Result<Lock, StoreError> {
        Lock::shared(&self.lock_path()).context("lock", &self.lock_path())
    }

    /// Starts writing to the store.
    ///
    /// # Errors
    /// When the disk is full or fails.
    pub fn session(&self) -> Result<Session, StoreError> {
        Session::start(self)
    }

    /// Reads a blob and checks it against its name; `None` when it is not there.
    ///
    /// # Errors
    /// [`StoreError::Damaged`] when it is not what its name says.
    pub fn blob(&self, name: &Digest) -> Result<Option<Vec<u8>>, StoreError> {
        let path = self.path(Folder::Blobs, &name.hex());
        let file = match File::open(&path) {
            Ok(file) => file,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(error).context("open", &path),
        };
        let mut content = Vec::new();
        file.take(MAX_BLOB_BYTES + 1).read_to_end(&mut content).context("read", &path)?;
        if Digest::of(&content) != *name {
            return Err(StoreError::damaged(format!("blob {name}"), "its content does not match its name"));
        }
        Ok(Some(content))
    }

    /// Opens an object and checks its digests against its name.
    ///
    /// # Errors
    /// [`StoreError::Missing`] when it is not there, [`StoreError::Damaged`] when it is not what its name says.
    pub fn object(&self, id: ObjectId) -> Result<Object, StoreError> {
        let hex = id.0.hex();
        Object::open(
            &self.path(Folder::Objects, &hex),
            &self.path(Folder::Objects, &(hex + DIGESTS_SUFFIX)),
            id,
        )
    }

    /// Opens the objects of an image, the merged one first, all or none of them.
    ///
    /// # Errors
    /// Those of [`Store::object`].
    pub fn image_objects(&self, image: &ImageRecord) -> Result<Vec<Object>, StoreError> {
        let _lock = self.lock_shared()?;
        std::iter::once(image.merged)
            .chain(image.layers.iter().map(|layer| layer.object))
            .map(|id| self.object(id))
            .collect()
    }

    /// The object the layer was made into by a writer of this `format`; `None` when it was not.
    ///
    /// # Errors
    /// [`StoreError::Damaged`] when the record of it is.
    pub fn layer(&self, diff_id: &Digest, format: u32) -> Result<Option<LayerRecord>, StoreError> {
        record::read(&self.path(Folder::Layers, &layer_name(diff_id, format)), &format!("layer {diff_id}"))
    }

    /// What the image with this manifest is made of; `None` when it is not in the store.
    ///
    /// # Errors
    /// [`StoreError::Damaged`] when the record of it is.
    pub fn image(&self, manifest: &Digest) -> Result<Option<ImageRecord>, StoreError> {
        record::read(&self.path(Folder::Images, &manifest.hex()), &format!("image {manifest}"))
    }

    /// What `name` means for `platform`; `None` when it means nothing here.
    ///
    /// # Errors
    /// [`StoreError::Damaged`] when the record of it is.
    pub fn tag(&self, name: &str, platform: &str) -> Result<Option<Tag>, StoreError> {
        let path = self.path(Folder::Tags, &Tag::file_name(name, platform));
        record::read(&path, &format!("the tag {name} for {platform}"))
    }

    /// All tags, by name and platform.
    ///
    /// # Errors
    /// [`StoreError::Damaged`] when a record is; the path of the file is named, for it can be removed.
    pub fn tags(&self) -> Result<Vec<Tag>, StoreError> {
        let folder = self.folder(Folder::Tags);
        let mut tags = Vec::new();
        for entry in fs::read_dir(&folder).context("list", &folder)? {
            let path = entry.context("list", &folder)?.path();
            // A tag that was removed since the listing is simply not listed.
            if let Some(tag) = record::read::<Tag>(&path, &format!("the tag in {}", path.display()))? {
                tags.push(tag);
            }
            if tags.len() > MAX_TAGS {
                return Err(StoreError::damaged("the list of tags", format!("it has more than {MAX_TAGS}")));
            }
        }
        tags.sort_by(|a, b| (&a.name, &a.platform).cmp(&(&b.name, &b.platform)));
        Ok(tags)
    }

    /// Removes what `name` means for `platform`. The image itself goes with the next [`Store::collect`], if nothing
    /// else needs it. True when there was such a tag, damaged or not.
    ///
    /// # Errors
    /// When the file system fails.
    pub fn untag(&self, name: &str, platform: &str) -> Result<bool, StoreError> {
        self.remove_record(Folder::Tags, &Tag::file_name(name, platform))
    }

    /// Removes a record for good; false when there was none.
    pub(crate) fn remove_record(&self, folder: Folder, name: &str) -> Result<bool, StoreError> {
        let folder = self.folder(folder);
        let path = folder.join(name);
        match fs::remove_file(&path) {
            Ok(()) => {
                durable::sync_directory(&folder).context("sync", &folder)?;
                Ok(true)
            }
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(false),
            Err(error) => Err(error).context("remove", &path),
        }
    }

    /// Removes everything neither a tag nor a snapshot reaches and no live session has pinned, and says how much that was.
    /// Templates of images that no tag means any more go too, and snapshots whose records are damaged.
    ///
    /// Waits for those who are just opening or publishing something, which takes them moments; holds them up for as
    /// long as it takes to read all tags and list all folders.
    ///
    /// # Errors
    /// [`StoreError::Damaged`] when what is needed cannot be known because a record is damaged; then nothing is
    /// removed.
    pub fn collect(&self) -> Result<Collected, StoreError> {
        collect::collect(self)
    }
}

/// The file name of the record of a layer.
pub(crate) fn layer_name(diff_id: &Digest, format: u32) -> String {
    format!("{}.{format}", diff_id.hex())
}
