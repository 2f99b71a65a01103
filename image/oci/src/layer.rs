//! Making a layer into an object of the store, in one pass over its bytes.
//!
//! ```text
//! source ─▶ SHA-256 (layer digest) ─▶ inflate ─▶ limit ─▶ SHA-256 (diff id) ─▶ EROFS writer ─▶ object
//! ```
//! Nothing is kept but the object, and that only when both digests are right.

use std::io::{self, BufRead, BufReader, Cursor, Read};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use kiln_rootfs::{FORMAT_VERSION, LayerError, Limits, write_layer_within};
use kiln_store::{LayerRecord, Session, StoreError};
use kiln_support::digest::{Digest, HashingReader};
use tokio::sync::mpsc;

use crate::PullError;
use crate::registry::Piece;

/// The most bytes a layer may have when unpacked: what a decompression bomb can make us write.
pub(crate) const MAX_LAYER_BYTES: u64 = 128 << 30;
/// How much is read from a source at once.
const READ_BYTES: usize = 128 << 10;

/// How a layer is compressed; seen from its first bytes, for what its media type says is often wrong.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Compression {
    None,
    Gzip,
    Zstd,
}

impl Compression {
    pub(crate) fn of(start: &[u8]) -> Self {
        match *start {
            // RFC 1952 §2.3.1 "Member header and trailer".
            [0x1f, 0x8b, ..] => Self::Gzip,
            // RFC 8878 §3.1 "Frames": a Zstandard frame, or a skippable one before it.
            [0x28, 0xb5, 0x2f, 0xfd, ..] | [0x50..=0x5f, 0x2a, 0x4d, 0x18, ..] => Self::Zstd,
            _ => Self::None,
        }
    }
}

/// A layer to be made into an object.
#[derive(Debug, Clone)]
pub(crate) struct Layer {
    /// The digest of its bytes as they travel.
    pub(crate) digest: Digest,
    /// How many those are.
    pub(crate) size: u64,
    /// The digest of its bytes uncompressed.
    pub(crate) diff_id: Digest,
    /// How many those may be.
    pub(crate) max_unpacked_bytes: u64,
}

/// Where a layer's bytes come from.
pub(crate) trait Source: Read {
    /// Why reading failed, when the cause is not in the error that reading gave.
    fn failure(&mut self) -> Option<PullError>;
}

/// Makes the layer into an object and records it.
pub(crate) fn convert(
    session: &Session,
    layer: &Layer,
    source: impl Source,
) -> Result<LayerRecord, PullError> {
    let what = || format!("layer {}", layer.digest);
    let mut packed = HashingReader::new(source);
    let mut object = session.new_object()?;
    let unpacked = unpack(&mut packed, layer.max_unpacked_bytes, |tar| {
        let limits = Limits { image_bytes: kiln_store::MAX_OBJECT_BYTES, ..Limits::default() };
        write_layer_within(&limits, tar, &mut object)
    });
    // A failure of the disk is that, whatever the bytes are.
    if let Err(Unusable::Rootfs(LayerError::Write(error))) = unpacked {
        return Err(storage(session, error));
    }
    // The rest, so that the digest tells whether the bytes are wrong or were badly packed in the first place.
    let rest = io::copy(&mut packed, &mut io::sink());
    let bytes = packed.passed();
    let (mut source, digest) = packed.finish();
    if let Some(error) = source.failure() {
        return Err(error);
    }
    rest.map_err(|error| PullError::Corrupt { what: what(), why: format!("it cannot be read: {error}") })?;
    if digest != layer.digest || bytes != layer.size {
        let why = format!("its digest is {digest} at {bytes} bytes, its manifest says {} bytes", layer.size);
        return Err(PullError::Corrupt { what: what(), why });
    }
    let diff_id = unpacked.map_err(|unusable| match unusable {
        Unusable::Bomb(limit) => {
            PullError::Unsupported { what: what(), why: format!("it unpacks to more than {limit} bytes") }
        }
        Unusable::Packing(error) => {
            PullError::Corrupt { what: what(), why: format!("it was badly compressed: {error}") }
        }
        Unusable::Rootfs(source) => PullError::Layer { layer: layer.digest.to_string(), source },
    })?;
    if diff_id != layer.diff_id {
        let why = format!("its content is {diff_id}, the image's config says {}", layer.diff_id);
        return Err(PullError::Corrupt { what: what(), why });
    }
    let record = LayerRecord { diff_id, object: object.finish()? };
    session.put_layer(record, FORMAT_VERSION)?;
    Ok(record)
}

/// The store's error that a failed write to an object stands for.
pub(crate) fn storage(session: &Session, source: io::Error) -> PullError {
    let path = session.store().root().to_owned();
    PullError::Store(match source.kind() {
        io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => StoreError::Full { path },
        _ => StoreError::Io { action: "write to", path, source },
    })
}

/// Why a layer cannot be used.
enum Unusable {
    /// It has too many bytes.
    Bomb(u64),
    /// It cannot be decompressed.
    Packing(io::Error),
    /// It is no root file system.
    Rootfs(LayerError),
}

/// Decompresses to `use_tar` and then to the end, and says the digest of all of it.
fn unpack<T>(
    packed: impl Read,
    limit: u64,
    use_tar: impl FnOnce(&mut HashingReader<Limited<Box<dyn Read + '_>>>) -> Result<T, LayerError>,
) -> Result<Digest, Unusable> {
    let mut packed = BufReader::with_capacity(READ_BYTES, packed);
    let mut start = Vec::with_capacity(4);
    packed.by_ref().take(4).read_to_end(&mut start).map_err(Unusable::Packing)?;
    let compression = Compression::of(&start);
    let packed = Cursor::new(start).chain(packed);
    let decoder = decoder(compression, packed).map_err(Unusable::Packing)?;
    let mut tar = HashingReader::new(Limited { inner: decoder, left: limit, exceeded: false });
    let made = use_tar(&mut tar).and_then(|_| io::copy(&mut tar, &mut io::sink()).map_err(LayerError::Read));
    let (limited, digest) = tar.finish();
    match made {
        Ok(_) => Ok(digest),
        Err(_) if limited.exceeded => Err(Unusable::Bomb(limit)),
        Err(LayerError::Read(error)) => Err(Unusable::Packing(error)),
        Err(error) => Err(Unusable::Rootfs(error)),
    }
}

fn decoder<'a>(compression: Compression, packed: impl BufRead + 'a) -> io::Result<Box<dyn Read + 'a>> {
    Ok(match compression {
        Compression::None => Box::new(packed),
        // Several members one after the other are one stream: RFC 1952 §2.2 "File format".
        Compression::Gzip => {
            Box::new(BufReader::with_capacity(READ_BYTES, flate2::bufread::MultiGzDecoder::new(packed)))
        }
        // The decoder refuses windows over 128 MiB, which bounds its memory.
        Compression::Zstd => Box::new(zstd::stream::read::Decoder::with_buffer(packed)?),
    })
}

/// Reads up to a limit; what would be more is an error, not an end.
struct Limited<R> {
    inner: R,
    left: u64,
    exceeded: bool,
}

impl<R: Read> Read for Limited<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let count = self.inner.read(buffer)?;
        if let Some(left) = self.left.checked_sub(count as u64) {
            self.left = left;
            Ok(count)
        } else {
            self.exceeded = true;
            Err(io::Error::new(io::ErrorKind::FileTooLarge, "more bytes than allowed"))
        }
    }
}

/// A layer's bytes as a download sends them. Reading fails when the download does, or is given up.
pub(crate) struct Download {
    pieces: mpsc::Receiver<Piece>,
    current: bytes::Bytes,
    ended: bool,
    failure: Option<PullError>,
}

impl Download {
    pub(crate) fn new(pieces: mpsc::Receiver<Piece>) -> Self {
        Self { pieces, current: bytes::Bytes::new(), ended: false, failure: None }
    }
}

impl Read for Download {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        while self.current.is_empty() && !self.ended {
            match self.pieces.blocking_recv() {
                Some(Piece::Data(data)) => self.current = data,
                Some(Piece::End) => self.ended = true,
                Some(Piece::Failed(error)) => {
                    self.failure = Some(error);
                    self.ended = true;
                }
                // The download was dropped in the middle: so is the pull, and nobody waits for what this says.
                None => {
                    self.failure = Some(cancelled());
                    self.ended = true;
                }
            }
        }
        if self.failure.is_some() {
            return Err(io::Error::other("the download failed"));
        }
        let count = self.current.len().min(buffer.len());
        buffer[..count].copy_from_slice(&self.current.split_to(count));
        Ok(count)
    }
}

impl Source for Download {
    fn failure(&mut self) -> Option<PullError> {
        self.failure.take()
    }
}

/// A layer's bytes from a local file, until the pull is given up.
pub(crate) struct FromFile<R> {
    inner: R,
    given_up: Arc<AtomicBool>,
}

impl<R> FromFile<R> {
    pub(crate) fn new(inner: R, given_up: Arc<AtomicBool>) -> Self {
        Self { inner, given_up }
    }
}

impl<R: Read> Read for FromFile<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        if self.given_up.load(Ordering::Relaxed) {
            return Err(io::Error::other("the pull was given up"));
        }
        self.inner.read(buffer)
    }
}

impl<R: Read> Source for FromFile<R> {
    fn failure(&mut self) -> Option<PullError> {
        self.given_up.load(Ordering::Relaxed).then(cancelled)
    }
}

fn cancelled() -> PullError {
    PullError::Internal("the pull was given up".to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;

    fn tar_with(content: &[u8]) -> Vec<u8> {
        let mut builder = tar::Builder::new(Vec::new());
        let mut header = tar::Header::new_ustar();
        header.set_size(content.len() as u64);
        header.set_mode(0o644);
        builder.append_data(&mut header, "file", content).expect("appended");
        builder.into_inner().expect("finished")
    }

    fn gzip(content: &[u8]) -> Vec<u8> {
        let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
        encoder.write_all(content).expect("written");
        encoder.finish().expect("finished")
    }

    fn zstd_frame(content: &[u8]) -> Vec<u8> {
        zstd::stream::encode_all(content, 1).expect("encoded")
    }

    fn layer(packed: &[u8], tar: &[u8]) -> Layer {
        Layer {
            digest: Digest::of(packed),
            size: packed.len() as u64,
            diff_id: Digest::of(tar),
            max_unpacked_bytes: 1 << 20,
        }
    }

    /// Converts, and says how many files the store's objects folder has then.
    fn convert_in_new_store(layer: &Layer, packed: &[u8]) -> (Result<LayerRecord, PullError>, usize) {
        let folder = tempfile::tempdir().expect("a folder");
        let store = kiln_store::Store::open(folder.path()).expect("a store");
        let session = store.session().expect("a session");
        let record = convert(&session, layer, FromFile::new(packed, Arc::default()));
        let files = std::fs::read_dir(folder.path().join("objects")).expect("a folder").count();
        (record, files)
    }

    #[test]
    fn one_layer_gives_one_object_however_it_is_packed() {
        let tar = tar_with(b"hello");
        let mut objects = Vec::new();
        let (first, second) = tar.split_at(700);
        let skippable = [&[0x5a, 0x2a, 0x4d, 0x18, 3, 0, 0, 0, 9, 9, 9], &zstd_frame(&tar)[..]].concat();
        for packed in [
            tar.clone(),
            gzip(&tar),
            [gzip(first), gzip(second)].concat(),
            zstd_frame(&tar),
            [zstd_frame(first), zstd_frame(second)].concat(),
            skippable,
        ] {
            let (record, files) = convert_in_new_store(&layer(&packed, &tar), &packed);
            objects.push(record.expect("converted").object);
            assert_eq!(files, 2);
        }
        objects.dedup();
        assert_eq!(objects.len(), 1);
    }

    #[test]
    fn an_archive_without_its_end_mark_is_taken_when_the_digests_are_right() {
        let content = b"as umoci inserts";
        let tar = tar_with(content);
        for length in [1024, 512 + content.len()] {
            let unmarked = &tar[..length];
            for packed in [unmarked.to_vec(), gzip(unmarked)] {
                convert_in_new_store(&layer(&packed, unmarked), &packed).0.expect("converted");
                let (cut, _) = convert_in_new_store(&layer(&packed, &tar), &packed);
                assert!(matches!(cut, Err(PullError::Corrupt { .. })), "{cut:?}");
            }
        }
        let inside = &tar[..512 + content.len() - 1];
        convert_in_new_store(&layer(inside, inside), inside).0.expect_err("cut inside an entry");
    }

    #[test]
    fn a_truncated_or_changed_layer_is_corrupt_and_leaves_nothing() {
        let tar = tar_with(&[3; 5000]);
        for packed in [tar.clone(), gzip(&tar), zstd_frame(&tar)] {
            let whole = layer(&packed, &tar);
            for cut in (0..packed.len()).step_by(packed.len() / 23 + 1) {
                let (record, files) = convert_in_new_store(&whole, &packed[..cut]);
                assert!(matches!(record, Err(PullError::Corrupt { .. })), "cut at {cut}: {record:?}");
                assert_eq!(files, 0);
                let mut changed = packed.clone();
                changed[cut] ^= 0x10;
                let (record, files) = convert_in_new_store(&whole, &changed);
                assert!(matches!(record, Err(PullError::Corrupt { .. })), "changed at {cut}: {record:?}");
                assert_eq!(files, 0);
            }
            let longer = [&packed[..], b"x"].concat();
            assert!(matches!(convert_in_new_store(&whole, &longer).0, Err(PullError::Corrupt { .. })));
        }
    }

    #[test]
    fn a_layer_packed_short_is_an_error_even_with_the_right_digest() {
        let tar = tar_with(&vec![3; 50_000]);
        for packed in [gzip(&tar), zstd_frame(&tar), tar.clone()] {
            let cut = &packed[..packed.len() - 20];
            let (record, files) = convert_in_new_store(&layer(cut, &tar), cut);
            assert!(record.is_err(), "{record:?}");
            assert_eq!(files, 0);
        }
    }

    #[test]
    fn content_other_than_the_config_says_is_corrupt() {
        let tar = tar_with(b"hello");
        let packed = gzip(&tar);
        let (record, files) = convert_in_new_store(&layer(&packed, b"other"), &packed);
        assert!(record.expect_err("refused").to_string().contains("config says"));
        assert_eq!(files, 0);
    }

    #[test]
    fn a_decompression_bomb_is_stopped_at_the_limit() {
        let mut tar = tar_with(&vec![0; 4 << 20]);
        for tar in [tar.clone(), {
            tar.resize(tar.len() + (4 << 20), 0);
            tar
        }] {
            for packed in [gzip(&tar), zstd_frame(&tar)] {
                let (record, files) = convert_in_new_store(&layer(&packed, &tar), &packed);
                let error = record.expect_err("refused").to_string();
                assert!(error.contains("more than 1048576 bytes"), "{error}");
                assert_eq!(files, 0);
            }
        }
    }

    #[test]
    fn a_pull_given_up_stops_the_conversion() {
        let tar = tar_with(b"hello");
        let folder = tempfile::tempdir().expect("a folder");
        let store = kiln_store::Store::open(folder.path()).expect("a store");
        let session = store.session().expect("a session");
        let given_up = Arc::new(AtomicBool::new(true));
        assert!(convert(&session, &layer(&tar, &tar), FromFile::new(&tar[..], given_up)).is_err());
        let (sender, receiver) = mpsc::channel(1);
        sender.try_send(Piece::Data(tar.clone().into())).unwrap_or_else(|_| panic!("room"));
        drop(sender);
        assert!(convert(&session, &layer(&tar, &tar), Download::new(receiver)).is_err());
        assert_eq!(std::fs::read_dir(folder.path().join("objects")).expect("a folder").count(), 0);
    }
}
