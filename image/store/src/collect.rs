//! Collecting what nobody needs: mark from the tags and the live sessions, sweep the rest.

use std::collections::HashSet;
use std::fmt;
use std::fs;
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use kiln_support::digest::Digest;
use kiln_support::durable;

use crate::error::Context;
use crate::record::{ImageRecord, LayerRecord};
use crate::session::{LIFE, pin_name};
use crate::store::{DIGESTS_SUFFIX, Folder};
use crate::{SnapshotKind, Store, StoreError, Tag, record, snapshot};
use kiln_support::lock::Lock;

/// What a collection removed.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Collected {
    /// Images nothing referred to.
    pub images: u64,
    /// Objects nothing referred to.
    pub objects: u64,
    /// Blobs nothing referred to.
    pub blobs: u64,
    /// Snapshots of images that no tag means any more, or that nobody can read.
    pub snapshots: u64,
    /// The disk space all of it took, in bytes.
    pub bytes: u64,
}

/// What was removed of writers that died before they were done.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Swept {
    /// How many writers that was.
    pub sessions: u64,
    /// The files they had begun.
    pub files: u64,
    /// The disk space these took, in bytes.
    pub bytes: u64,
}

impl Swept {
    /// Nobody died.
    pub fn is_nothing(&self) -> bool {
        self.sessions == 0
    }

    /// Counts what a dead session's folder holds. Its pins are empty, and no files of anybody's.
    fn count(&mut self, folder: &Path) {
        self.sessions += 1;
        // What cannot be looked at is removed all the same, or that fails and says why.
        for file in fs::read_dir(folder).into_iter().flatten().flatten() {
            if let Some(file) = file.metadata().ok().filter(|file| file.len() > 0) {
                self.files += 1;
                self.bytes += file.blocks() * 512;
            }
        }
    }
}

/// As a note to whoever uses the store: `what 2 interrupted commands left (3 files, 41 MiB)`.
impl fmt::Display for Swept {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        let plural = |count| if count == 1 { "" } else { "s" };
        write!(formatter, "what {} interrupted command{} left", self.sessions, plural(self.sessions))?;
        let mib = self.bytes.div_ceil(1 << 20);
        match self.files {
            0 => Ok(()),
            files => write!(formatter, " ({files} file{}, {mib} MiB)", plural(files)),
        }
    }
}

/// Removes the folders of sessions whose process is dead. Skipped while others publish; it will be tried again.
pub(crate) fn sweep_dead_sessions(store: &Store) -> Result<Swept, StoreError> {
    let mut swept = Swept::default();
    if list(&store.folder(Folder::Sessions))?.is_empty() {
        return Ok(swept);
    }
    if let Some(_lock) = Lock::try_exclusive(&store.lock_path()).context("lock", &store.lock_path())? {
        live_sessions(store, &mut swept)?;
    }
    Ok(swept)
}

pub(crate) fn collect(store: &Store) -> Result<Collected, StoreError> {
    let _lock = Lock::exclusive(&store.lock_path()).context("lock", &store.lock_path())?;
    let needed = mark(store)?;
    sweep(store, &needed)
}

/// The pins of the sessions that live; the folders of the others are removed and counted. Needs the lock exclusively.
fn live_sessions(store: &Store, swept: &mut Swept) -> Result<Vec<PathBuf>, StoreError> {
    let mut live = Vec::new();
    for name in list(&store.folder(Folder::Sessions))? {
        let folder = store.path(Folder::Sessions, &name);
        match Lock::try_exclusive(&folder.join(LIFE)) {
            Ok(None) => live.push(folder),
            Ok(Some(_dead)) => {
                swept.count(&folder);
                fs::remove_dir_all(&folder).or_else(ignore_missing).context("remove", &folder)?;
            }
            // The session ended between the listing and now.
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(error) => return Err(error).context("lock", &folder),
        }
    }
    Ok(live)
}

/// The pin names of all that is needed.
fn mark(store: &Store) -> Result<HashSet<String>, StoreError> {
    let mut needed = HashSet::new();
    for session in live_sessions(store, &mut Swept::default())? {
        needed.extend(
            list(&session).or_else(|error| if session.exists() { Err(error) } else { Ok(Vec::new()) })?,
        );
    }
    let tags = store.tags()?;
    for tag in &tags {
        needed.insert(pin_name(Folder::Blobs, &tag.target.hex()));
        mark_image(store, &tag.manifest, &tag.name, &mut needed)?;
    }
    mark_snapshots(store, &tags, &mut needed)?;
    Ok(needed)
}

/// Marks an image and all that it is made of. One that is not there is damage, but nothing is lost by going on.
fn mark_image(
    store: &Store,
    manifest: &Digest,
    name: &str,
    needed: &mut HashSet<String>,
) -> Result<(), StoreError> {
    let path = store.path(Folder::Images, &manifest.hex());
    let Some(image) = record::read::<ImageRecord>(&path, &format!("image {manifest} ({name})"))? else {
        return Ok(());
    };
    needed.insert(pin_name(Folder::Images, &image.manifest.hex()));
    for blob in [&image.manifest, &image.config] {
        needed.insert(pin_name(Folder::Blobs, &blob.hex()));
    }
    for object in image.layers.iter().map(|layer| layer.object).chain([image.merged]) {
        needed.insert(pin_name(Folder::Objects, &object.0.hex()));
    }
    Ok(())
}

/// A damaged record of a snapshot is left out: nobody can use what it stood for, and a template is made again.
fn mark_snapshots(store: &Store, tags: &[Tag], needed: &mut HashSet<String>) -> Result<(), StoreError> {
    for snapshot in store.snapshots()?.0 {
        let is_wanted = match (snapshot.kind, &snapshot.image) {
            (SnapshotKind::Template, Some(image)) => tags.iter().any(|tag| tag.manifest == image.manifest),
            _ => true,
        };
        if !is_wanted {
            continue;
        }
        // A machine that was saved has its root's files in its image, whatever that is called by now.
        if let (SnapshotKind::Saved, Some(image)) = (snapshot.kind, &snapshot.image) {
            mark_image(store, &image.manifest, &image.reference, needed)?;
        }
        needed.insert(pin_name(Folder::Snapshots, &snapshot.key.hex()));
        needed.insert(pin_name(Folder::Blobs, &snapshot.state.hex()));
        needed.extend(snapshot.objects().map(|id| pin_name(Folder::Objects, &id.0.hex())));
    }
    Ok(())
}

fn sweep(store: &Store, needed: &HashSet<String>) -> Result<Collected, StoreError> {
    let mut collected = Collected::default();
    for name in list(&store.folder(Folder::Images))? {
        if !needed.contains(&pin_name(Folder::Images, &name)) {
            collected.bytes += remove(&store.path(Folder::Images, &name))?;
            collected.images += 1;
        }
    }
    // Records before what they name, so that whoever finds one finds it all, or learns that it is going.
    for name in list(&store.folder(Folder::Snapshots))? {
        if !needed.contains(&pin_name(Folder::Snapshots, &name)) {
            collected.bytes += remove(&store.path(Folder::Snapshots, &name))?;
            collected.snapshots += 1;
        }
    }
    snapshot::sweep_locks(store)?;
    for name in list(&store.folder(Folder::Layers))? {
        let path = store.path(Folder::Layers, &name);
        // A damaged record of a layer is of no use to anybody: the layer can be made again.
        let layer: Option<LayerRecord> = record::read(&path, "a layer").unwrap_or(None);
        if !layer.is_some_and(|layer| needed.contains(&pin_name(Folder::Objects, &layer.object.0.hex()))) {
            collected.bytes += remove(&path)?;
        }
    }
    // Content before digests: an object is there when its content is, so it never lacks its digests.
    let objects = list(&store.folder(Folder::Objects))?;
    let (digests, content): (Vec<_>, Vec<_>) =
        objects.iter().partition(|name| name.ends_with(DIGESTS_SUFFIX));
    collected.objects =
        content.iter().filter(|name| !needed.contains(&pin_name(Folder::Objects, name))).count() as u64;
    for name in content.into_iter().chain(digests) {
        let id = name.strip_suffix(DIGESTS_SUFFIX).unwrap_or(name);
        if !needed.contains(&pin_name(Folder::Objects, id)) {
            collected.bytes += remove(&store.path(Folder::Objects, name))?;
        }
    }
    for name in list(&store.folder(Folder::Blobs))? {
        if !needed.contains(&pin_name(Folder::Blobs, &name)) {
            collected.bytes += remove(&store.path(Folder::Blobs, &name))?;
            collected.blobs += 1;
        }
    }
    for folder in [Folder::Images, Folder::Snapshots, Folder::Layers, Folder::Objects, Folder::Blobs] {
        let path = store.folder(folder);
        durable::sync_directory(&path).context("sync", &path)?;
    }
    Ok(collected)
}

/// Removes the file and says how much disk space it took.
fn remove(path: &Path) -> Result<u64, StoreError> {
    let bytes = fs::symlink_metadata(path).map_or(0, |metadata| metadata.blocks() * 512);
    fs::remove_file(path).or_else(ignore_missing).context("remove", path)?;
    Ok(bytes)
}

fn ignore_missing(error: io::Error) -> io::Result<()> {
    if error.kind() == io::ErrorKind::NotFound { Ok(()) } else { Err(error) }
}

fn list(folder: &Path) -> Result<Vec<String>, StoreError> {
    let mut names = Vec::new();
    for entry in fs::read_dir(folder).context("list", folder)? {
        // The store gives no other names than text; a stranger's file is none of our business.
        if let Ok(name) = entry.context("list", folder)?.file_name().into_string() {
            names.push(name);
        }
    }
    Ok(names)
}
