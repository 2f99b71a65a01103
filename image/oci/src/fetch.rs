//! Fetching: where an image's content comes from, and one layer on its way into the store.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use kiln_store::{LayerRecord, Session};
use tokio::sync::mpsc;

use crate::layer::{Download, FromFile, Layer, convert};
use crate::local::Files;
use crate::manifest::{Descriptor, MAX_MANIFEST_BYTES};
use crate::registry::{Piece, Registry};
use crate::{Event, Progress, PullError};

/// How many pieces of a download may wait for the one who unpacks them. hyper makes none larger than 400 KiB.
const MAX_WAITING_PIECES: usize = 16;

/// Where content comes from.
pub(crate) enum Origin {
    Registry(Box<Registry>),
    Files(Arc<Files>),
}

impl Origin {
    pub(crate) async fn blob(&self, blob: &Descriptor, limit: u64) -> Result<Vec<u8>, PullError> {
        match self {
            Self::Registry(registry) => registry.blob(blob, limit).await,
            Self::Files(files) => {
                let (files, digest) = (Arc::clone(files), blob.digest);
                blocking(move || files.blob(&digest, limit)).await
            }
        }
    }

    pub(crate) async fn document(&self, blob: &Descriptor) -> Result<Vec<u8>, PullError> {
        match self {
            Self::Registry(registry) => Ok(registry.manifest(Some(&blob.digest)).await?.bytes),
            Self::Files(_) => self.blob(blob, MAX_MANIFEST_BYTES).await,
        }
    }
}

/// Tells conversions that run on their own threads that nobody waits for them any more.
#[derive(Default)]
pub(crate) struct GivenUp(pub(crate) Arc<AtomicBool>);

impl Drop for GivenUp {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

/// One layer on its way into the store.
pub(crate) struct Job {
    pub(crate) place: usize,
    pub(crate) blob: Descriptor,
    pub(crate) layer: Layer,
    pub(crate) session: Session,
    pub(crate) origin: Arc<Origin>,
    pub(crate) progress: Arc<dyn Progress>,
    pub(crate) given_up: Arc<AtomicBool>,
    /// Held by what runs on a thread of its own for as long as it does.
    pub(crate) busy: mpsc::Sender<()>,
}

impl Job {
    pub(crate) async fn run(self) -> Result<LayerRecord, PullError> {
        let (layer, session, place, progress) =
            (self.layer, self.session, self.place, Arc::clone(&self.progress));
        let counting = Counting { place, progress: self.progress, bytes: AtomicU64::new(0) };
        let record = match &*self.origin {
            Origin::Files(files) => {
                let (files, given_up, busy) = (Arc::clone(files), self.given_up, self.busy);
                blocking(move || {
                    // Dropped in the reverse order: the session has ended when nobody is busy.
                    let (_busy, session) = (busy, session);
                    let part = counting.read(files.open_blob(&layer.digest)?);
                    convert(&session, &layer, FromFile::new(part, given_up))
                })
                .await
            }
            Origin::Registry(registry) => {
                let (pieces, received) = mpsc::channel::<Piece>(MAX_WAITING_PIECES);
                let busy = self.busy;
                let converting = blocking(move || {
                    let (_busy, session) = (busy, session);
                    let download = Download::new(received);
                    convert(&session, &layer, CountedDownload { download, counting })
                });
                let streaming = async {
                    registry.stream(&self.blob, &pieces).await;
                    // The reader must see the end of the pieces also when the download ended without saying so.
                    drop(pieces);
                };
                let (record, ()) = tokio::join!(converting, streaming);
                record
            }
        }?;
        progress.event(Event::LayerDone { layer: place });
        Ok(record)
    }
}

/// Counts a layer's bytes for its user.
struct Counting {
    place: usize,
    progress: Arc<dyn Progress>,
    bytes: AtomicU64,
}

impl Counting {
    fn add(&self, count: usize) {
        let bytes = self.bytes.fetch_add(count as u64, Ordering::Relaxed) + count as u64;
        self.progress.event(Event::LayerProgress { layer: self.place, bytes });
    }

    fn read<R: std::io::Read>(self, inner: R) -> CountingReader<R> {
        CountingReader { inner, counting: self }
    }
}

struct CountingReader<R> {
    inner: R,
    counting: Counting,
}

impl<R: std::io::Read> std::io::Read for CountingReader<R> {
    fn read(&mut self, buffer: &mut [u8]) -> std::io::Result<usize> {
        let count = self.inner.read(buffer)?;
        self.counting.add(count);
        Ok(count)
    }
}

struct CountedDownload {
    download: Download,
    counting: Counting,
}

impl std::io::Read for CountedDownload {
    fn read(&mut self, buffer: &mut [u8]) -> std::io::Result<usize> {
        let count = self.download.read(buffer)?;
        self.counting.add(count);
        Ok(count)
    }
}

impl crate::layer::Source for CountedDownload {
    fn failure(&mut self) -> Option<PullError> {
        self.download.failure()
    }
}

/// Runs what blocks where it may.
pub(crate) async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, PullError> + Send + 'static,
) -> Result<T, PullError> {
    match tokio::task::spawn_blocking(work).await {
        Ok(done) => done,
        Err(error) => Err(PullError::Internal(error.to_string())),
    }
}
