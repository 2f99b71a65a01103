//! Pulling: from a name to an image in the store.

use std::collections::{HashMap, VecDeque};
use std::sync::Arc;
use std::time::SystemTime;

use kiln_rootfs::{FORMAT_VERSION, LayerReader, MergeError, merge};
use kiln_store::{ImageRecord, LayerRecord, ObjectId, Session, Store, Tag};
use kiln_support::digest::Digest;
use tokio::sync::{Semaphore, mpsc};
use tokio::task::JoinSet;

use crate::config::MAX_CONFIG_BYTES;
use crate::fetch::{GivenUp, Job, Origin, blocking};
use crate::layer::{Layer, MAX_LAYER_BYTES, storage};
use crate::local::Files;
use crate::manifest::{Descriptor, Document, Index, Manifest, parse_document};
use crate::registry::Registry;
use crate::{Event, Image, ImageConfig, LayerInfo, Platform, Progress, PullError, Source, parse_config};

/// The most layers that are fetched and made into objects at once.
const MAX_PARALLEL_LAYERS: usize = 4;
/// The most manifests and indexes looked at to find the right one.
const MAX_DOCUMENTS: usize = 16;

/// When to ask the source of an image.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum PullPolicy {
    /// When the store does not have the image.
    #[default]
    Missing,
    /// Each time: if the name means something else now, that is fetched.
    Always,
    /// Never: what the store does not have is not there.
    Never,
}

/// The text says no policy.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{0:?} is not a pull policy: expected missing, always or never")]
pub struct ParsePolicyError(String);

impl std::str::FromStr for PullPolicy {
    type Err = ParsePolicyError;

    fn from_str(text: &str) -> Result<Self, ParsePolicyError> {
        match text {
            "missing" => Ok(Self::Missing),
            "always" => Ok(Self::Always),
            "never" => Ok(Self::Never),
            _ => Err(ParsePolicyError(text.chars().take(40).collect())),
        }
    }
}

/// How to pull.
#[derive(Debug, Clone)]
pub struct PullOptions {
    /// When to ask the source.
    pub policy: PullPolicy,
    /// What the image is to run on; this host's platform when `None`.
    pub platform: Option<Platform>,
    /// Speak plain HTTP with a registry on another machine if it does not speak TLS. With one on this machine that
    /// is done anyway.
    pub allow_http: bool,
    /// Check every byte the store has of the image, and fetch again what is damaged. Asks the source.
    pub verify: bool,
    /// The most bytes a layer may have when unpacked.
    pub max_layer_bytes: u64,
}

impl Default for PullOptions {
    fn default() -> Self {
        Self {
            policy: PullPolicy::Missing,
            platform: None,
            allow_http: false,
            verify: false,
            max_layer_bytes: MAX_LAYER_BYTES,
        }
    }
}

/// Gets the image from its source into the store, as far as it is not there, and opens it.
///
/// Dropping the future gives the pull up: what it had finished stays in the store until the next collection, and
/// serves the next pull of the same layers. Runs on tokio, with its I/O and time enabled.
///
/// # Errors
/// [`PullError`]; then the name means what it meant before.
pub async fn pull(
    store: &Store,
    source: &Source,
    options: &PullOptions,
    progress: Arc<dyn Progress>,
) -> Result<Image, PullError> {
    let name = source.to_string();
    let platform = options.platform.clone().unwrap_or_else(Platform::host);
    let is_registry = matches!(source, Source::Registry(_));
    // Files change under their names and cost nothing to ask; a registry is asked when it must be.
    if options.policy == PullPolicy::Never
        || (options.policy == PullPolicy::Missing && is_registry && !options.verify)
    {
        let (store, source, platform) = (store.clone(), source.clone(), platform.clone());
        if let Some(image) = blocking(move || in_store(&store, &source, &platform)).await? {
            return Ok(image);
        }
        if options.policy == PullPolicy::Never {
            return Err(PullError::NotInStore { name, platform: options.platform.clone() });
        }
    }
    progress.event(Event::Resolving { name: &name });
    let mut known = if options.verify { None } else { known(store, &name, &platform).await? };
    let (origin, top, digest, media_type) = match source {
        Source::Registry(reference) => {
            let registry = Registry::connect(reference, options.allow_http, Arc::clone(&progress)).await?;
            // What the registry says counts only as far as it agrees with what is here and was checked.
            if let Some((target, image)) = known.take()
                && options.policy == PullPolicy::Always
            {
                if registry.manifest_digest().await? == Some(target) {
                    progress.event(Event::Done { manifest: &image.digest, unchanged: true });
                    return Ok(image);
                }
                known = Some((target, image));
            }
            let fetched = registry.manifest(None).await?;
            (Origin::Registry(Box::new(registry)), fetched.bytes, fetched.digest, fetched.media_type)
        }
        Source::OciLayout(..) | Source::OciArchive(..) | Source::DockerArchive(..) => {
            let source = source.clone();
            let (files, found) = blocking(move || open_files(&source)).await?;
            (Origin::Files(Arc::new(files)), found.bytes, found.digest, None)
        }
    };
    if let Some((target, image)) = known
        && target == digest
    {
        progress.event(Event::Done { manifest: &image.digest, unchanged: true });
        return Ok(image);
    }
    let pull = Pull { name, platform, options, origin: Arc::new(origin), progress };
    let session_store = store.clone();
    let session = blocking(move || Ok(session_store.session()?)).await?;
    pull.run(session, top, digest, media_type).await
}

/// What the store has for the name without asking anybody.
fn in_store(store: &Store, source: &Source, platform: &Platform) -> Result<Option<Image>, PullError> {
    let name = source.to_string();
    if let Some(tag) = store.tag(&name, &platform.to_string())? {
        return Image::open(store, &tag);
    }
    // A digest means the same under every name.
    let Source::Registry(reference) = source else { return Ok(None) };
    let Some(digest) = reference.digest() else { return Ok(None) };
    let image = Image::open_manifest(store, &name, digest)?;
    Ok(image.filter(|image| platform.fit(&image.platform).is_some()))
}

/// The image the name means here, and what the name meant at its source then. Damage counts as absence.
async fn known(store: &Store, name: &str, platform: &Platform) -> Result<Option<(Digest, Image)>, PullError> {
    let (store, name, platform) = (store.clone(), name.to_owned(), platform.to_string());
    blocking(move || {
        let Some(tag) = store.tag(&name, &platform).or_else(none_if_damaged)? else { return Ok(None) };
        let image = Image::open(&store, &tag).or_else(none_if_damaged)?;
        let image = image.filter(|image| image.disk().is_ok());
        Ok(image.map(|image| (tag.target, image)))
    })
    .await
}

fn open_files(source: &Source) -> Result<(Files, crate::local::Found), PullError> {
    match source {
        Source::OciLayout(path, name) => {
            let files = Files::layout(path)?;
            let found = files.find_in_layout(name.as_deref())?;
            Ok((files, found))
        }
        Source::OciArchive(path, name) => {
            let files = Files::archive(path)?;
            let found = files.find_in_layout(name.as_deref())?;
            Ok((files, found))
        }
        Source::DockerArchive(path, name) => {
            let mut files = Files::archive(path)?;
            let found = files.find_in_docker_archive(name.as_deref())?;
            Ok((files, found))
        }
        Source::Registry(_) => Err(PullError::Internal("a registry is no file".to_owned())),
    }
}

/// One image's manifest and config, chosen and checked.
struct Chosen {
    manifest_bytes: Vec<u8>,
    manifest: Manifest,
    config_bytes: Vec<u8>,
    config: ImageConfig,
}

/// A pull under way.
struct Pull<'a> {
    name: String,
    platform: Platform,
    options: &'a PullOptions,
    origin: Arc<Origin>,
    progress: Arc<dyn Progress>,
}

impl Pull<'_> {
    async fn run(
        self,
        session: Session,
        top: Vec<u8>,
        target: Digest,
        media_type: Option<String>,
    ) -> Result<Image, PullError> {
        let chosen = self.choose(&top, target, media_type).await?;
        let manifest = Digest::of(&chosen.manifest_bytes);
        let config = chosen.manifest.config.digest;
        if chosen.config.diff_ids.len() != chosen.manifest.layers.len() {
            let (said, are) = (chosen.config.diff_ids.len(), chosen.manifest.layers.len());
            let why = format!("its config says {said} layers, its manifest {are}");
            return Err(PullError::Malformed { what: format!("image {manifest}"), why });
        }

        let blobs = [chosen.manifest_bytes, chosen.config_bytes.clone(), top];
        let (storing, verify) = (session.clone(), self.options.verify);
        let diff_ids = chosen.config.diff_ids.clone();
        let (known, present) = blocking(move || {
            for blob in &blobs {
                storing.put_blob(blob)?;
            }
            let known = known_image(&storing, &manifest, verify)?;
            let present = diff_ids.iter().map(|diff_id| known_layer(&storing, diff_id, verify));
            Ok((known, present.collect::<Result<Vec<_>, _>>()?))
        })
        .await?;
        let all_present = present.iter().all(Option::is_some);

        let layers = self.layers(&session, manifest, &chosen.manifest, &chosen.config, present).await?;
        let same = |record: &ImageRecord| all_present && record.layers == layers && record.config == config;
        let record = if let Some(record) = known.filter(same) {
            record
        } else {
            self.progress.event(Event::Merging);
            let session = session.clone();
            blocking(move || {
                let merged = merge_layers(&session, &manifest, &layers)?;
                let record = ImageRecord { manifest, config, layers, merged, format: FORMAT_VERSION };
                session.put_image(&record)?;
                Ok(record)
            })
            .await?
        };

        let tag = Tag {
            name: self.name.clone(),
            platform: self.platform.to_string(),
            target,
            manifest,
            pulled_unix_s: SystemTime::now()
                .duration_since(SystemTime::UNIX_EPOCH)
                .map_or(0, |since| since.as_secs()),
        };
        let image = Image::new(session.store(), &self.name, record, chosen.config, chosen.config_bytes);
        let image = blocking(move || {
            session.put_tag(&tag)?;
            Ok(image)
        })
        .await?;
        self.progress.event(Event::Done { manifest: &manifest, unchanged: all_present });
        Ok(image)
    }

    /// Goes from what the name means to the one image for the platform.
    async fn choose(
        &self,
        top: &[u8],
        digest: Digest,
        media_type: Option<String>,
    ) -> Result<Chosen, PullError> {
        let mut available = Vec::new();
        let mut waiting = VecDeque::from([(top.to_vec(), digest, media_type, None::<Platform>)]);
        let mut listed: VecDeque<(Descriptor, Option<Platform>)> = VecDeque::new();
        for _ in 0..MAX_DOCUMENTS {
            let (bytes, digest, media_type, platform) = match waiting.pop_front() {
                Some(document) => document,
                None => match listed.pop_front() {
                    Some((blob, platform)) => {
                        (self.origin.document(&blob).await?, blob.digest, Some(blob.media_type), platform)
                    }
                    None => break,
                },
            };
            let what = format!("manifest {digest} of {}", self.name);
            let document = parse_document(&bytes, media_type.as_deref()).map_err(|error| match error {
                crate::ParseManifestError::Malformed(why) => PullError::Malformed { what, why },
                crate::ParseManifestError::Unsupported(why) => PullError::Unsupported { what, why },
            })?;
            match document {
                Document::Index(index) => listed.extend(self.fitting(index, &mut available)),
                Document::Manifest(manifest) => {
                    let config_bytes = self.origin.blob(&manifest.config, MAX_CONFIG_BYTES).await?;
                    let config = parse_config(&config_bytes).map_err(|error| PullError::Malformed {
                        what: format!("the config {} of {}", manifest.config.digest, self.name),
                        why: error.to_string(),
                    })?;
                    if self.accepts(&config, platform.as_ref()) {
                        return Ok(Chosen { manifest_bytes: bytes, manifest, config_bytes, config });
                    }
                    available.extend(config.platform.map(|platform| platform.to_string()));
                }
            }
        }
        if available.is_empty() {
            let why = "it lists no image".to_owned();
            return Err(PullError::Unsupported { what: self.name.clone(), why });
        }
        available.sort();
        available.dedup();
        Err(PullError::NoPlatform { name: self.name.clone(), wanted: self.platform.clone(), available })
    }

    /// The documents of an index to look at: the one that fits best, or if none says so, those that say nothing.
    fn fitting(&self, index: Index, available: &mut Vec<String>) -> Vec<(Descriptor, Option<Platform>)> {
        let best = index
            .entries
            .iter()
            // Of several that fit equally the first counts, as OCI says.
            .rev()
            .filter_map(|entry| Some((self.platform.fit(entry.platform.as_ref()?)?, entry)))
            .max_by_key(|(fit, _)| *fit);
        if let Some((_, entry)) = best {
            return vec![(entry.blob.clone(), entry.platform.clone())];
        }
        available.extend(index.entries.iter().filter_map(|entry| Some(entry.platform.as_ref()?.to_string())));
        index
            .entries
            .into_iter()
            .filter(|entry| entry.platform.is_none())
            .map(|entry| (entry.blob, None))
            .collect()
    }

    /// True when an image is for the platform: by what its index said, or else by what its config says.
    fn accepts(&self, config: &ImageConfig, listed_as: Option<&Platform>) -> bool {
        match (&config.platform, listed_as) {
            (None, _) => true,
            // The index knows the variant, which configs often leave out.
            (Some(built), Some(_)) => {
                built.os == self.platform.os && built.architecture == self.platform.architecture
            }
            (Some(built), None) => self.platform.fit(built).is_some(),
        }
    }

    /// Gets the layers that are not present.
    async fn layers(
        &self,
        session: &Session,
        manifest_digest: Digest,
        manifest: &Manifest,
        config: &ImageConfig,
        present: Vec<Option<LayerRecord>>,
    ) -> Result<Vec<LayerRecord>, PullError> {
        // A layer can be in an image more than once, and is fetched for its first place.
        let mut records: HashMap<Digest, LayerRecord> = HashMap::new();
        let mut first_place: HashMap<Digest, usize> = HashMap::new();
        let mut infos = Vec::new();
        for (place, (blob, diff_id)) in manifest.layers.iter().zip(&config.diff_ids).enumerate() {
            if let Some(record) = present[place] {
                records.insert(*diff_id, record);
            }
            let first = *first_place.entry(*diff_id).or_insert(place);
            let present = records.contains_key(diff_id) || first != place;
            infos.push(LayerInfo { digest: blob.digest, bytes: blob.size, present });
        }
        self.progress.event(Event::Resolved { manifest: &manifest_digest, layers: &infos });

        let given_up = GivenUp::default();
        let (busy, mut idle) = mpsc::channel::<()>(1);
        let permits = Arc::new(Semaphore::new(MAX_PARALLEL_LAYERS));
        let mut tasks = JoinSet::new();
        for (place, info) in infos.iter().enumerate() {
            if info.present {
                continue;
            }
            let job = Job {
                place,
                blob: manifest.layers[place].clone(),
                layer: Layer {
                    digest: info.digest,
                    size: info.bytes,
                    diff_id: config.diff_ids[place],
                    max_unpacked_bytes: self.options.max_layer_bytes,
                },
                session: session.clone(),
                origin: Arc::clone(&self.origin),
                progress: Arc::clone(&self.progress),
                given_up: Arc::clone(&given_up.0),
                busy: busy.clone(),
            };
            let permits = Arc::clone(&permits);
            tasks.spawn(async move {
                let _permit =
                    permits.acquire().await.map_err(|error| PullError::Internal(error.to_string()))?;
                job.run().await
            });
        }
        drop(busy);
        let mut failure = None;
        while let Some(done) = tasks.join_next().await {
            match done.map_err(|error| PullError::Internal(error.to_string())).flatten() {
                Ok(record) => _ = records.insert(record.diff_id, record),
                Err(error) => {
                    failure = Some(error);
                    break;
                }
            }
        }
        if let Some(error) = failure {
            // The first failure ends the pull: the others are told, and are through with the store before it is over.
            drop((tasks, given_up));
            idle.recv().await;
            return Err(error);
        }
        let all = config.diff_ids.iter().map(|diff_id| records.get(diff_id).copied());
        all.collect::<Option<_>>().ok_or_else(|| PullError::Internal("a layer was forgotten".to_owned()))
    }
}

/// The record of the image if it is sound; damage counts as absence, for the image is about to be made again.
fn known_image(session: &Session, manifest: &Digest, verify: bool) -> Result<Option<ImageRecord>, PullError> {
    let known = session.use_image(manifest).or_else(none_if_damaged)?;
    let Some(record) = known.filter(|record| record.format == FORMAT_VERSION) else { return Ok(None) };
    let sound =
        session.use_object(record.merged).and_then(|merged| if verify { merged.verify() } else { Ok(()) });
    match sound {
        Ok(()) => Ok(Some(record)),
        Err(error) if error.is_damage() => Ok(None),
        Err(error) => Err(error.into()),
    }
}

/// The object of a layer if it is there and sound.
fn known_layer(session: &Session, diff_id: &Digest, verify: bool) -> Result<Option<LayerRecord>, PullError> {
    let known = session.store().layer(diff_id, FORMAT_VERSION).or_else(none_if_damaged)?;
    let Some(record) = known.filter(|record| record.diff_id == *diff_id) else { return Ok(None) };
    let sound =
        session.use_object(record.object).and_then(|object| if verify { object.verify() } else { Ok(()) });
    match sound {
        Ok(()) => Ok(Some(record)),
        Err(error) if error.is_damage() => Ok(None),
        Err(error) => Err(error.into()),
    }
}

fn none_if_damaged<T, E: Into<PullError>>(error: E) -> Result<Option<T>, PullError> {
    match error.into() {
        PullError::Store(error) if error.is_damage() => Ok(None),
        error => Err(error),
    }
}

fn merge_layers(session: &Session, manifest: &Digest, layers: &[LayerRecord]) -> Result<ObjectId, PullError> {
    let failed = |source: Arc<dyn std::error::Error + Send + Sync>| PullError::Merge {
        image: manifest.to_string(),
        source,
    };
    let mut readers = Vec::new();
    for layer in layers {
        let reader = session.use_object(layer.object)?.reader().map_err(|error| storage(session, error))?;
        readers.push(LayerReader::open(reader).map_err(|error| failed(Arc::new(error)))?);
    }
    let mut object = session.new_object()?;
    match merge(&readers, &mut object) {
        Ok(_) => Ok(object.finish()?),
        Err(MergeError::Write(error)) => Err(storage(session, error)),
        Err(error) => Err(failed(Arc::new(error))),
    }
}
