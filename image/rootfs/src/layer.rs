//! A layer's tar stream in, its EROFS image out.

use std::io::{Read, Seek, Write};

use crate::emit::{EmitError, Source};
use crate::paths::{PathFault, Paths};
use crate::sink::{BLOCK_BYTES, Sink, SinkError};
use crate::tar::{Archive, Entry, EntryKind, Segment};
use crate::tree::{Data, File, HOLE, Kind, Meta, Node, NodeId, Tree, TreeFull};
use crate::{emit, xattr};

/// Bytes a symbolic link's target may have: Linux's `PATH_MAX` without its NUL.
const TARGET_BYTES_MAX: usize = 4095;

/// Largest file Linux can address, in bytes.
const FILE_BYTES_MAX: u64 = i64::MAX as u64;

/// What may be spent on one layer. Each limit stops an attack: a small archive of many entries, of large headers, of
/// endless data.
#[derive(Debug, Clone)]
pub struct Limits {
    /// Entries of the archive.
    pub entries: u64,
    /// Memory for the layer's tree, in bytes; its metadata on disk is smaller.
    pub metadata_bytes: u64,
    /// Length of the image, in bytes.
    pub image_bytes: u64,
}

impl Default for Limits {
    fn default() -> Self {
        Self { entries: 4 << 20, metadata_bytes: 1 << 30, image_bytes: 1 << 40 }
    }
}

/// What became of a layer.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct LayerSummary {
    /// Length of the image, a multiple of 4096.
    pub image_bytes: u64,
    /// Bytes of file data in it, padding and overwritten files counted.
    pub data_bytes: u64,
    /// Entries the archive had.
    pub entries: u64,
    /// Files, directories, links and so on in the image; hard links count once.
    pub inodes: u64,
    /// Whiteouts and opaque directories.
    pub whiteouts: u64,
    /// Extended attributes left out: EROFS has no place for their namespace, or they would steer the overlay.
    pub dropped_xattrs: u64,
}

/// Why a layer could not be made. Nothing of the output may be used.
#[derive(Debug, thiserror::Error)]
pub enum LayerError {
    /// The source of the archive failed.
    #[error("the layer archive could not be read")]
    Read(#[source] std::io::Error),
    /// The output failed; the host's fault.
    #[error("the layer image could not be written")]
    Write(#[source] std::io::Error),
    /// The archive ends inside an entry; the image's fault. One that ends between two entries is whole as far as can
    /// be told here: the layer's digest tells the rest.
    #[error("the layer archive ends in the middle, after {offset} bytes")]
    Truncated {
        /// Bytes the archive has.
        offset: u64,
    },
    /// The bytes are not a tar archive; the image's fault.
    #[error("the layer archive is corrupt near byte {offset}: {why}")]
    Corrupt {
        /// Where reading stopped, in bytes.
        offset: u64,
        /// What was wrong there.
        why: &'static str,
    },
    /// An entry cannot be in a root file system; the image's fault.
    #[error("the layer's entry {path:?} cannot be used: {why}")]
    Refused {
        /// The entry's path, with escapes for bytes that are no text.
        path: String,
        /// Why not.
        why: &'static str,
    },
    /// The layer is larger than allowed; the image's fault, or the limits'.
    #[error("the layer is too large: {what} would pass {limit}")]
    TooLarge {
        /// What would be too much.
        what: &'static str,
        /// The limit it would pass.
        limit: u64,
    },
}

impl LayerError {
    pub(crate) fn refused(path: &[u8], why: &'static str) -> Self {
        Self::Refused { path: path.escape_ascii().to_string(), why }
    }

    /// True when the image is at fault, not this machine or the transfer.
    pub fn is_images_fault(&self) -> bool {
        !matches!(self, Self::Read(_) | Self::Write(_))
    }
}

/// Turns a layer's tar stream into an EROFS image, in one pass, with memory for the metadata alone.
///
/// The same archive and [`crate::FORMAT_VERSION`] give the same bytes. The image is
/// `[superblock][file data in the archive's order][metadata]`; whiteouts are in it as overlayfs has them (a character
/// device 0/0, the attribute `trusted.overlay.opaque`). `tar` is uncompressed and read to its end. `out` is written
/// strictly in order from where it stands, which must be its start; last its first 4096 bytes are written again.
///
/// # Errors
/// [`LayerError`]; then `out` holds nothing of use.
pub fn write_layer<R: Read, W: Write + Seek>(tar: R, out: W) -> Result<LayerSummary, LayerError> {
    write_layer_within(&Limits::default(), tar, out)
}

/// [`write_layer`] with limits of one's own.
///
/// # Errors
/// As [`write_layer`].
pub fn write_layer_within<R: Read, W: Write + Seek>(
    limits: &Limits,
    tar: R,
    out: W,
) -> Result<LayerSummary, LayerError> {
    let mut sink = Sink::new(out, limits.image_bytes);
    // The superblock's place.
    sink.write(&[0; BLOCK_BYTES as usize]).map_err(|error| sink_error(error, limits))?;
    let mut layer = Layer {
        limits,
        archive: Archive::new(tar),
        sink,
        tree: Tree::new(limits.metadata_bytes),
        paths: Paths::default(),
        summary: LayerSummary::default(),
    };
    while let Some(entry) = layer.archive.next()? {
        layer.entry(entry)?;
    }
    layer.finish()
}

struct Layer<'a, R, W: Write> {
    limits: &'a Limits,
    archive: Archive<R>,
    sink: Sink<W>,
    tree: Tree,
    paths: Paths,
    summary: LayerSummary,
}

impl<R: Read, W: Write + Seek> Layer<'_, R, W> {
    fn entry(&mut self, entry: Entry) -> Result<(), LayerError> {
        self.summary.entries += 1;
        if self.summary.entries > self.limits.entries {
            return Err(LayerError::TooLarge { what: "the number of entries", limit: self.limits.entries });
        }
        let Entry { path, kind, mode, uid, gid, mtime, xattrs } = entry;
        let place = self.paths.place(&mut self.tree, &path);
        let Some((parent, name)) = place.map_err(|fault| self.path_error(&path, fault))? else {
            // The root itself: it is a directory whatever else is said, and cannot be taken away.
            if !matches!(kind, EntryKind::Directory) {
                return Err(LayerError::refused(&path, "the root is a directory"));
            }
            let xattrs = self.xattrs(&path, xattrs)?;
            self.describe_directory(crate::tree::ROOT, Meta { mode, uid, gid, mtime, xattrs });
            return Ok(());
        };
        if self.whiteout(parent, &name, &path)? {
            return Ok(());
        }
        let kind = match kind {
            EntryKind::HardLink(target) => {
                let id = self.link_target(&path, &target)?;
                return self.name(parent, &name, id);
            }
            EntryKind::Directory => {
                let xattrs = self.xattrs(&path, xattrs)?;
                return self.directory(parent, &name, Meta { mode, uid, gid, mtime, xattrs });
            }
            EntryKind::File { bytes } => Kind::File(self.file(bytes)?),
            EntryKind::Sparse { bytes, segments } => Kind::File(self.sparse_file(&path, bytes, &segments)?),
            EntryKind::Symlink(target) => {
                if target.is_empty() || target.len() > TARGET_BYTES_MAX || target.contains(&0) {
                    return Err(LayerError::refused(
                        &path,
                        "its target is empty, too long or holds a NUL byte",
                    ));
                }
                Kind::Symlink(target.into())
            }
            // What overlayfs takes for a whiteout is one.
            EntryKind::CharDevice { major: 0, minor: 0 } => {
                self.paths.hide(&mut self.tree, parent, &name).map_err(|full| self.full(full))?;
                return Ok(());
            }
            EntryKind::CharDevice { major, minor } => {
                check_device(&path, major, minor)?;
                Kind::CharDevice { major, minor }
            }
            EntryKind::BlockDevice { major, minor } => {
                check_device(&path, major, minor)?;
                Kind::BlockDevice { major, minor }
            }
            EntryKind::Fifo => Kind::Fifo,
        };
        let xattrs = self.xattrs(&path, xattrs)?;
        let node = Node { meta: Meta { mode, uid, gid, mtime, xattrs }, kind };
        let id = self.tree.add(node).map_err(|full| self.full(full))?;
        self.name(parent, &name, id)
    }

    /// Takes the entry as a whiteout if its name makes it one. OCI image-spec, layer.md, "Whiteouts".
    fn whiteout(&mut self, parent: NodeId, name: &[u8], path: &[u8]) -> Result<bool, LayerError> {
        if name == b".wh..wh..opq" {
            if let Some(directory) = self.tree.directory_mut(parent) {
                directory.opaque = true;
            }
            return Ok(true);
        }
        // Names of aufs's own: files there may be linked to, so they stay until the end of the archive.
        if name.starts_with(b".wh..wh.") {
            return Ok(false);
        }
        let Some(hidden) = name.strip_prefix(b".wh.") else { return Ok(false) };
        if matches!(hidden, b"" | b"." | b"..") {
            return Err(LayerError::refused(path, "a whiteout needs the name of a file"));
        }
        self.paths.hide(&mut self.tree, parent, hidden).map_err(|full| self.full(full))?;
        Ok(true)
    }

    /// The node a hard link names: a file of this layer, or a stand-in for a lower layer's.
    fn link_target(&mut self, path: &[u8], target: &[u8]) -> Result<NodeId, LayerError> {
        let found = Paths::find(&self.tree, target).map_err(|fault| self.path_error(path, fault))?;
        match found {
            Ok(id) if self.tree.directory(id).is_some() => {
                Err(LayerError::refused(path, "it is a hard link to a directory"))
            }
            Ok(id) => Ok(id),
            Err(lower_path) => {
                let meta = Meta { mode: 0, ..Meta::IMPLICIT_DIRECTORY };
                let node = Node { meta, kind: Kind::LowerLink(lower_path.into()) };
                self.tree.add(node).map_err(|full| self.full(full))
            }
        }
    }

    fn name(&mut self, parent: NodeId, name: &[u8], id: NodeId) -> Result<(), LayerError> {
        let before = self.tree.link(parent, name, id).map_err(|full| self.full(full))?;
        if before.is_some_and(|before| self.tree.directory(before).is_some()) {
            self.paths.forget();
        }
        Ok(())
    }

    /// A directory entry: describes the one that is there, or is a new one in place of whatever else is.
    fn directory(&mut self, parent: NodeId, name: &[u8], meta: Meta) -> Result<(), LayerError> {
        let existing = self.tree.directory(parent).and_then(|dir| dir.children.get(name).copied());
        if let Some(id) = existing.filter(|&id| self.tree.directory(id).is_some()) {
            self.describe_directory(id, meta);
            return Ok(());
        }
        let node = Node { meta, kind: Kind::Directory(Box::default()) };
        let id = self.tree.add(node).map_err(|full| self.full(full))?;
        self.name(parent, name, id)
    }

    fn describe_directory(&mut self, id: NodeId, meta: Meta) {
        self.tree.node_mut(id).meta = meta;
        if let Some(directory) = self.tree.directory_mut(id) {
            directory.implicit = false;
        }
    }

    fn xattrs(&mut self, path: &[u8], attributes: Vec<xattr::Xattr>) -> Result<xattr::SetId, LayerError> {
        let (set, dropped) = xattr::from_tar(attributes).map_err(|bad| LayerError::refused(path, bad.0))?;
        self.summary.dropped_xattrs += dropped;
        let bytes = set.len() as u64;
        let (id, new) = self.tree.xattrs.intern(set);
        // A set that others have too still takes a number for each attribute.
        let cost = if new { bytes * 2 + 64 } else { bytes / 2 };
        self.tree.charge(cost).map_err(|full| self.full(full))?;
        Ok(id)
    }

    fn file(&mut self, bytes: u64) -> Result<File, LayerError> {
        if bytes == 0 {
            return Ok(File { bytes, layer: 0, data: Data::Run(0) });
        }
        let start = self.sink.block().map_err(|error| sink_error(error, self.limits))?;
        self.sink.expect(bytes).map_err(|error| sink_error(error, self.limits))?;
        self.copy(bytes)?;
        self.pad()?;
        Ok(File { bytes, layer: 0, data: Data::Run(start) })
    }

    /// Stores the pieces of a sparse file that have data, and which they are.
    fn sparse_file(&mut self, path: &[u8], bytes: u64, segments: &[Segment]) -> Result<File, LayerError> {
        if bytes > FILE_BYTES_MAX {
            return Err(LayerError::refused(path, "a sparse file is too large"));
        }
        if let [Segment { offset: 0, length }] = segments
            && *length == bytes
        {
            return self.file(bytes);
        }
        if bytes == 0 {
            return self.file(0);
        }
        let bits = chunk_bits(bytes, segments);
        let chunk = BLOCK_BYTES << bits;
        let count = bytes.div_ceil(chunk);
        // Before the map is made: it alone could be too large.
        self.tree.has_room(count.saturating_mul(4)).map_err(|full| self.full(full))?;
        let mut blocks = vec![HOLE; usize::try_from(count).unwrap_or(usize::MAX)];
        // Where the data written so far ends, and the end of the chunk it is in.
        let (mut end, mut chunk_end) = (0, 0);
        for &Segment { offset, length } in segments {
            let (mut at, mut left) = (offset, length);
            while left > 0 {
                if at >= chunk_end {
                    self.zeros(chunk_end - end)?;
                    self.pad()?;
                    let index = at / chunk;
                    end = index * chunk;
                    chunk_end = (end + chunk).min(bytes);
                    self.sink.expect(chunk_end - end).map_err(|error| sink_error(error, self.limits))?;
                    let start = self.sink.block().map_err(|error| sink_error(error, self.limits))?;
                    blocks[usize::try_from(index).unwrap_or(usize::MAX)] = start;
                }
                self.zeros(at - end)?;
                let piece = left.min(chunk_end - at);
                self.copy(piece)?;
                at += piece;
                left -= piece;
                end = at;
            }
        }
        self.zeros(chunk_end - end)?;
        self.pad()?;
        Ok(File { bytes, layer: 0, data: Data::Chunks { bits, blocks: blocks.into() } })
    }

    /// Moves the next `bytes` of the current entry's data into the image.
    fn copy(&mut self, bytes: u64) -> Result<(), LayerError> {
        let mut left = bytes;
        while left > 0 {
            let piece = self.archive.data(left)?;
            let length = piece.len();
            if length == 0 {
                // The sizes were checked to agree; this only keeps a mistake there from looping.
                return Err(LayerError::Corrupt {
                    offset: left,
                    why: "an entry has less data than its map says",
                });
            }
            self.sink.write(piece).map_err(|error| sink_error(error, self.limits))?;
            self.archive.consume(length);
            left -= length as u64;
        }
        Ok(())
    }

    fn zeros(&mut self, bytes: u64) -> Result<(), LayerError> {
        self.sink.zeros(bytes).map_err(|error| sink_error(error, self.limits))
    }

    fn pad(&mut self) -> Result<(), LayerError> {
        self.sink.pad().map_err(|error| sink_error(error, self.limits))
    }

    fn finish(mut self) -> Result<LayerSummary, LayerError> {
        self.summary.data_bytes = self.sink.position() - BLOCK_BYTES;
        let whiteouts =
            std::mem::take(&mut self.paths).finish(&mut self.tree).map_err(|full| self.full(full))?;
        let start = self.sink.block().map_err(|error| sink_error(error, self.limits))?;
        let image = emit::plan(&mut self.tree, Source::Layer { metadata_start: start })
            .map_err(|error| emit_error(error, self.limits))?;
        let (metadata, superblock) = image.encode(&self.tree);
        self.sink.expect(metadata.len() as u64).map_err(|error| sink_error(error, self.limits))?;
        self.sink.write(&metadata).map_err(|error| sink_error(error, self.limits))?;
        self.summary.image_bytes = self.sink.position();
        self.summary.inodes = image.inodes();
        self.summary.whiteouts = whiteouts;
        self.sink.finish(&superblock).map_err(LayerError::Write)?;
        Ok(self.summary)
    }

    fn full(&self, _: TreeFull) -> LayerError {
        LayerError::TooLarge { what: "the memory for its metadata", limit: self.limits.metadata_bytes }
    }

    fn path_error(&self, path: &[u8], fault: PathFault) -> LayerError {
        match fault {
            PathFault::Refused(why) => LayerError::refused(path, why),
            PathFault::Full => self.full(TreeFull),
        }
    }
}

/// The chunk size, as 4096 << bits, that makes a sparse file cheapest: small chunks need a long map, large ones store
/// zeros beside the data.
fn chunk_bits(bytes: u64, segments: &[Segment]) -> u8 {
    /// `EROFS_CHUNK_FORMAT_BLKBITS_MASK`, and what 2^63 bytes need.
    const BITS_MAX: u8 = 31;
    let cost = |bits: u8| {
        let chunk = BLOCK_BYTES << bits;
        let (mut touched, mut next) = (0u64, 0u64);
        for segment in segments {
            let first = (segment.offset / chunk).max(next);
            let last = (segment.offset + segment.length - 1) / chunk;
            if last >= first {
                touched += last - first + 1;
                next = last + 1;
            }
        }
        u128::from(touched) * u128::from(chunk) + u128::from(bytes.div_ceil(chunk)) * 4
    };
    // The largest of the cheapest: equal cost means fewer map entries to read.
    (0..=BITS_MAX).rev().min_by_key(|&bits| cost(bits)).unwrap_or(0)
}

/// Linux packs a device number into 12 and 20 bits.
fn check_device(path: &[u8], major: u32, minor: u32) -> Result<(), LayerError> {
    if major >= 1 << 12 || minor >= 1 << 20 {
        return Err(LayerError::refused(path, "its device number is out of range"));
    }
    Ok(())
}

fn sink_error(error: SinkError, limits: &Limits) -> LayerError {
    match error {
        SinkError::Full => LayerError::TooLarge { what: "its image's bytes", limit: limits.image_bytes },
        SinkError::Io(error) => LayerError::Write(error),
    }
}

fn emit_error(error: EmitError, limits: &Limits) -> LayerError {
    match error {
        EmitError::TooLarge => LayerError::TooLarge { what: "its image's bytes", limit: limits.image_bytes },
        EmitError::Xattrs(why) => LayerError::Refused { path: "/".into(), why },
    }
}
