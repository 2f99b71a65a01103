//! Several layers' trees into one, as the OCI image specification layers them.

use std::io::Write;

use crate::emit::{self, EmitError, Source};
use crate::read::LayerReader;
use crate::sink::BLOCK_BYTES;
use crate::tree::{Kind, Node, NodeId, ROOT, Tree, TreeFull};
use crate::xattr::SetId;

/// Layers an image may have. Docker stops at 127.
const LAYERS_MAX: usize = 1024;

/// Memory for the merged tree, in bytes.
const TREE_BYTES_MAX: u64 = 4 << 30;

/// What became of the layers.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct MergeSummary {
    /// Length of the merged object, a multiple of 4096.
    pub metadata_bytes: u64,
    /// Length of the whole device.
    pub total_bytes: u64,
    /// Files, directories, links and so on; hard links count once.
    pub inodes: u64,
    /// Where in the device each layer's image starts, in bytes.
    pub layer_starts: Vec<u64>,
}

/// Why layers could not be merged.
#[derive(Debug, thiserror::Error)]
pub enum MergeError {
    /// The output failed; the host's fault.
    #[error("the merged metadata could not be written")]
    Write(#[from] std::io::Error),
    /// A layer links to a file that no layer below it has; the image's fault.
    #[error("layer {layer} has a hard link to {path:?}, which no layer below it has as a file")]
    LinkTarget {
        /// Which layer, the lowest is 0.
        layer: usize,
        /// The file's path from the root, with escapes for bytes that are no text.
        path: String,
    },
    /// The image has too many layers, files or attributes; the image's fault.
    #[error("the image is too large: {0}")]
    TooLarge(&'static str),
}

impl From<TreeFull> for MergeError {
    fn from(_: TreeFull) -> Self {
        Self::TooLarge("its metadata takes too much memory")
    }
}

impl From<EmitError> for MergeError {
    fn from(error: EmitError) -> Self {
        match error {
            EmitError::TooLarge => Self::TooLarge("its layers have more blocks than can be addressed"),
            EmitError::Xattrs(why) => Self::TooLarge(why),
        }
    }
}

/// Merges layers, the lowest first, into one metadata object for the device `[out][layer 0 image][layer 1 image]...`.
///
/// The result is a whole EROFS file system when those images follow `out` at the places the summary tells. Whiteouts
/// and opaque directories are applied and gone. The same layers give the same bytes. `out` is written in order.
///
/// # Errors
/// [`MergeError`]; then `out` holds nothing of use.
pub fn merge<W: Write>(layers: &[LayerReader], mut out: W) -> Result<MergeSummary, MergeError> {
    if layers.len() > LAYERS_MAX {
        return Err(MergeError::TooLarge("it has too many layers"));
    }
    let mut tree = Tree::new(TREE_BYTES_MAX);
    for (index, layer) in layers.iter().enumerate() {
        Overlay {
            upper: &layer.tree,
            layer: index,
            merged: &mut tree,
            nodes: vec![None; layer.tree.len()],
            sets: vec![None; layer.tree.xattrs.len()],
        }
        .apply()?;
    }
    if let Some(root) = tree.directory_mut(ROOT) {
        root.implicit = false;
    }
    let layer_blocks: Vec<u32> = layers.iter().map(LayerReader::image_blocks).collect();
    let image = emit::plan(&mut tree, Source::Merged { layer_blocks: &layer_blocks })?;
    let (metadata, _) = image.encode(&tree);
    out.write_all(&metadata)?;
    out.flush()?;
    Ok(MergeSummary {
        metadata_bytes: metadata.len() as u64,
        total_bytes: u64::from(image.total_blocks()) * BLOCK_BYTES,
        inodes: image.inodes(),
        layer_starts: image.bases().iter().map(|&base| u64::from(base) * BLOCK_BYTES).collect(),
    })
}

/// One layer on its way into the merged tree.
struct Overlay<'a> {
    upper: &'a Tree,
    layer: usize,
    merged: &'a mut Tree,
    /// By the layer's node: what it is in the merged tree, so that hard links stay links.
    nodes: Vec<Option<NodeId>>,
    /// By the layer's attribute set: what it is in the merged tree.
    sets: Vec<Option<SetId>>,
}

impl Overlay<'_> {
    fn apply(mut self) -> Result<(), MergeError> {
        // Links mean what is below, before this layer changes any of it.
        for id in self.upper.ids() {
            if let Kind::LowerLink(path) = &self.upper.node(id).kind {
                let target = self.merged.find(path).filter(|&found| self.merged.directory(found).is_none());
                let path = || path.escape_ascii().to_string();
                let target =
                    target.ok_or_else(|| MergeError::LinkTarget { layer: self.layer, path: path() })?;
                self.nodes[id.index()] = Some(target);
            }
        }
        let mut todo = vec![(ROOT, ROOT)];
        while let Some((upper, merged)) = todo.pop() {
            self.describe(upper, merged)?;
            let Some(directory) = self.upper.directory(upper) else { continue };
            if directory.opaque
                && let Some(below) = self.merged.directory_mut(merged)
            {
                below.children.clear();
            }
            for (name, &child) in &directory.children {
                let below = self.merged.directory(merged).and_then(|dir| dir.children.get(name).copied());
                match &self.upper.node(child).kind {
                    Kind::Whiteout => {
                        if let Some(directory) = self.merged.directory_mut(merged) {
                            directory.children.remove(name);
                        }
                    }
                    Kind::Directory(_) => {
                        let below = below.filter(|&below| self.merged.directory(below).is_some());
                        let place = if let Some(below) = below {
                            below
                        } else {
                            let new = self.copy(child)?;
                            self.merged.link(merged, name, new)?;
                            new
                        };
                        todo.push((child, place));
                    }
                    _ => {
                        let node = match self.nodes[child.index()] {
                            Some(node) => node,
                            None => self.copy(child)?,
                        };
                        self.nodes[child.index()] = Some(node);
                        self.merged.link(merged, name, node)?;
                    }
                }
            }
        }
        Ok(())
    }

    /// What a layer says of a directory holds for the merged one, if it says anything.
    fn describe(&mut self, upper: NodeId, merged: NodeId) -> Result<(), MergeError> {
        let node = self.upper.node(upper);
        if self.upper.directory(upper).is_some_and(|directory| !directory.implicit) {
            let xattrs = self.set(node.meta.xattrs)?;
            self.merged.node_mut(merged).meta = crate::tree::Meta { xattrs, ..node.meta };
        }
        Ok(())
    }

    /// A new merged node like the layer's; a directory is empty at first.
    fn copy(&mut self, id: NodeId) -> Result<NodeId, MergeError> {
        let node = self.upper.node(id);
        let xattrs = self.set(node.meta.xattrs)?;
        let kind = match &node.kind {
            Kind::Directory(_) => Kind::Directory(Box::default()),
            Kind::File(file) => {
                // At most LAYERS_MAX.
                Kind::File(crate::tree::File { layer: self.layer as u16, ..file.clone() })
            }
            other => other.clone(),
        };
        Ok(self.merged.add(Node { meta: crate::tree::Meta { xattrs, ..node.meta }, kind })?)
    }

    fn set(&mut self, id: SetId) -> Result<SetId, MergeError> {
        if let Some(set) = self.sets[id.index()] {
            return Ok(set);
        }
        let entries = self.upper.xattrs.entries(id).to_vec();
        let bytes = entries.len() as u64;
        let (set, new) = self.merged.xattrs.intern(entries);
        if new {
            self.merged.charge(bytes * 2 + 64)?;
        }
        self.sets[id.index()] = Some(set);
        Ok(set)
    }
}
