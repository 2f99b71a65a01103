//! Images in the store: finding, listing, opening and removing them.

use std::fs::File;
use std::time::{Duration, SystemTime};

use kiln_rootfs::FORMAT_VERSION;
use kiln_store::{ImageRecord, LayerRecord, ObjectId, Store, StoreError, Tag};
use kiln_support::digest::Digest;

use crate::{Config, ImageConfig, Platform, PullError, Source, parse_config};

/// The block size every part of a disk is a multiple of.
const DISK_BLOCK_BYTES: u64 = 4096;
/// The fewest digits that may stand for an image's id.
const MIN_ID_DIGITS: usize = 6;

/// An image in the store.
#[derive(Debug, Clone)]
pub struct Image {
    /// The name it was asked for by, in full.
    pub name: String,
    /// The digest of its manifest: what it is.
    pub digest: Digest,
    /// The digest of its config, which Docker calls the image's id.
    pub id: Digest,
    /// What it was built for.
    pub platform: Platform,
    /// When it was built, as RFC 3339 writes it.
    pub created: Option<String>,
    /// How to run it.
    pub config: Config,
    /// The config as it came, which says more than Kiln uses.
    pub config_json: Vec<u8>,
    /// Its layers from the lowest up.
    pub layers: Vec<LayerRecord>,
    record: ImageRecord,
    store: Store,
}

/// A part of the disk a machine gets: all of a file, filled up with zeros.
#[derive(Debug)]
pub struct DiskPart {
    /// The content.
    pub data: File,
    /// The SHA-256 of each 64 KiB block of the content, checked against the content's name when it was opened.
    pub digests: File,
    /// How many bytes of the disk it takes; a multiple of 4096, which the content may be shorter than.
    pub length: u64,
}

/// One line of a list of images.
#[derive(Debug, Clone)]
pub struct Summary {
    /// The name in full.
    pub name: String,
    /// The digest of the manifest.
    pub digest: Digest,
    /// What it was built for.
    pub platform: String,
    /// When it was pulled.
    pub pulled: SystemTime,
    /// The rest, or why it cannot be had: then the image is damaged.
    pub details: Result<Details, String>,
}

/// What a list says of a sound image.
#[derive(Debug, Clone)]
pub struct Details {
    /// The digest of the config.
    pub id: Digest,
    /// When it was built, as RFC 3339 writes it.
    pub created: Option<String>,
    /// How much disk its objects take, in bytes; what it shares with other images is counted for each.
    pub disk_bytes: u64,
    /// How many layers it has.
    pub layers: usize,
}

/// What removing an image did.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Removed {
    /// The names that are gone, in full.
    pub names: Vec<String>,
    /// How much disk space was freed, in bytes; nothing when other names need all of it.
    pub bytes_freed: u64,
}

impl Image {
    /// Opens what a tag means; `None` when it is not in the store in the form this version makes.
    pub(crate) fn open(store: &Store, tag: &Tag) -> Result<Option<Self>, PullError> {
        Self::open_manifest(store, &tag.name, &tag.manifest)
    }

    pub(crate) fn open_manifest(
        store: &Store,
        name: &str,
        manifest: &Digest,
    ) -> Result<Option<Self>, PullError> {
        let Some(record) = store.image(manifest)?.filter(|record| record.format == FORMAT_VERSION) else {
            return Ok(None);
        };
        let config_json = store
            .blob(&record.config)?
            .ok_or_else(|| StoreError::Missing { what: format!("the config {} of {name}", record.config) })?;
        let config = parse_config(&config_json).map_err(|error| PullError::Malformed {
            what: format!("the config {} of {name}", record.config),
            why: error.to_string(),
        })?;
        Ok(Some(Self::new(store, name, record, config, config_json)))
    }

    pub(crate) fn new(
        store: &Store,
        name: &str,
        record: ImageRecord,
        config: ImageConfig,
        config_json: Vec<u8>,
    ) -> Self {
        Self {
            name: name.to_owned(),
            digest: record.manifest,
            id: record.config,
            platform: config.platform.unwrap_or_else(Platform::host),
            created: config.created,
            config: config.run,
            config_json,
            layers: record.layers.clone(),
            record,
            store: store.clone(),
        }
    }

    /// The objects its root file system's disk is made of, in the disk's order: what its files are.
    pub fn objects(&self) -> impl Iterator<Item = ObjectId> {
        [self.record.merged].into_iter().chain(self.record.layers.iter().map(|layer| layer.object))
    }

    /// The parts of its root file system's disk, to be laid end to end: the merged metadata, then each layer.
    ///
    /// # Errors
    /// [`PullError::Store`] when one is missing or damaged.
    pub fn disk(&self) -> Result<Vec<DiskPart>, PullError> {
        let objects = self.store.image_objects(&self.record)?;
        let parts = objects.into_iter().map(|object| {
            let length = object.length().next_multiple_of(DISK_BLOCK_BYTES);
            let (data, digests) = object.into_files();
            DiskPart { data, digests, length }
        });
        Ok(parts.collect())
    }
}

/// Finds an image in the store by name, or by the start of its id or of its manifest's digest.
///
/// # Errors
/// [`PullError::NotInStore`]; [`PullError::Store`] when it is damaged.
pub fn find(store: &Store, name: &str, platform: Option<&Platform>) -> Result<Image, PullError> {
    let mut tags = matching(store, name, platform)?;
    // The platform of this host before others, when nothing else was asked for.
    let host = Platform::host().to_string();
    tags.sort_by_key(|tag| tag.platform != host);
    let absent = || PullError::NotInStore { name: name.to_owned(), platform: platform.cloned() };
    let tag = tags.first().ok_or_else(absent)?;
    Image::open(store, tag)?.ok_or_else(absent)
}

/// Opens the image of this manifest, whether a name still means it or not; `name` is what it is called.
///
/// # Errors
/// [`PullError::NotInStore`]; [`PullError::Store`] when it is damaged.
pub fn open(store: &Store, name: &str, manifest: &Digest) -> Result<Image, PullError> {
    let absent = || PullError::NotInStore { name: name.to_owned(), platform: None };
    Image::open_manifest(store, name, manifest)?.ok_or_else(absent)
}

/// Lists the images in the store by name. A damaged image is listed as such.
///
/// # Errors
/// [`PullError::Store`] when the store cannot be read.
pub fn list(store: &Store) -> Result<Vec<Summary>, PullError> {
    let summaries = store.tags()?.into_iter().map(|tag| Summary {
        details: details(store, &tag).map_err(|error| error.to_string()),
        name: tag.name,
        digest: tag.manifest,
        platform: tag.platform,
        pulled: SystemTime::UNIX_EPOCH + Duration::from_secs(tag.pulled_unix_s.min(u64::from(u32::MAX))),
    });
    Ok(summaries.collect())
}

/// Removes a name, or all names of an image given by its id, and whatever nothing needs then.
///
/// # Errors
/// [`PullError::NotInStore`]; [`PullError::Store`] when the store cannot be changed.
pub fn remove(store: &Store, name: &str, platform: Option<&Platform>) -> Result<Removed, PullError> {
    let tags = matching(store, name, platform)?;
    if tags.is_empty() {
        return Err(PullError::NotInStore { name: name.to_owned(), platform: platform.cloned() });
    }
    let mut names = Vec::new();
    for tag in tags {
        if store.untag(&tag.name, &tag.platform)? {
            names.push(tag.name);
        }
    }
    Ok(Removed { names, bytes_freed: store.collect()?.bytes })
}

/// The tags with the name, or if there is none, those of the image with the id.
fn matching(store: &Store, name: &str, platform: Option<&Platform>) -> Result<Vec<Tag>, PullError> {
    let platform = platform.map(ToString::to_string);
    let source = name.parse::<Source>();
    let full = source.as_ref().map(ToString::to_string).ok();
    let tags: Vec<Tag> = store
        .tags()?
        .into_iter()
        .filter(|tag| platform.as_ref().is_none_or(|platform| *platform == tag.platform))
        .collect();
    let named: Vec<Tag> = tags.iter().filter(|tag| Some(&tag.name) == full.as_ref()).cloned().collect();
    if !named.is_empty() {
        return Ok(named);
    }
    let digits = name.strip_prefix("sha256:").unwrap_or(name);
    if digits.len() < MIN_ID_DIGITS || !digits.bytes().all(|byte| matches!(byte, b'0'..=b'9' | b'a'..=b'f')) {
        return source.map(|_| Vec::new()).map_err(PullError::Name);
    }
    let found: Vec<Tag> = tags
        .into_iter()
        .filter(|tag| {
            let id = || store.image(&tag.manifest).ok().flatten().map(|image| image.config.hex());
            tag.manifest.hex().starts_with(digits) || id().is_some_and(|id| id.starts_with(digits))
        })
        .collect();
    if found.iter().any(|tag| tag.manifest != found[0].manifest) {
        let why = "several images have an id that starts so".to_owned();
        return Err(PullError::NotFound { what: name.to_owned(), why });
    }
    Ok(found)
}

fn details(store: &Store, tag: &Tag) -> Result<Details, PullError> {
    let image = Image::open(store, tag)?
        .ok_or_else(|| StoreError::Missing { what: format!("image {}", tag.manifest) })?;
    let mut disk_bytes = 0;
    for object in store.image_objects(&image.record)? {
        disk_bytes += object.disk_bytes().map_err(|source| StoreError::Io {
            action: "look at an object in",
            path: store.root().to_owned(),
            source,
        })?;
    }
    Ok(Details { id: image.id, created: image.created, disk_bytes, layers: image.layers.len() })
}
