//! A file tree in memory: what a layer says, or what several layers together say.

use std::collections::BTreeMap;

use crate::xattr::{SetId, XattrSets};

/// The root directory of every tree.
pub(crate) const ROOT: NodeId = NodeId(0);

/// What a node costs beside its own strings, in bytes: itself and its place in its directory's map.
const NODE_BYTES: u64 = 160;

/// A point in time with its nanoseconds, which are always counted forward.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub(crate) struct Time {
    /// Seconds since the epoch.
    pub(crate) secs: i64,
    /// Below a milliard.
    pub(crate) nanos: u32,
}

/// A node of one tree. Two names with the same id are hard links of one file.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(crate) struct NodeId(u32);

impl NodeId {
    /// Place in arrays that run beside the tree's nodes.
    pub(crate) fn index(self) -> usize {
        self.0 as usize
    }
}

/// What every node has.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Meta {
    /// Permission bits, at most 0o7777.
    pub(crate) mode: u16,
    pub(crate) uid: u32,
    pub(crate) gid: u32,
    pub(crate) mtime: Time,
    pub(crate) xattrs: SetId,
}

impl Meta {
    /// Of a directory that no entry describes.
    pub(crate) const IMPLICIT_DIRECTORY: Self =
        Self { mode: 0o755, uid: 0, gid: 0, mtime: Time { secs: 0, nanos: 0 }, xattrs: SetId::EMPTY };
}

#[derive(Debug, Clone)]
pub(crate) struct Node {
    pub(crate) meta: Meta,
    pub(crate) kind: Kind,
}

#[derive(Debug, Clone)]
pub(crate) enum Kind {
    Directory(Box<Directory>),
    File(File),
    Symlink(Box<[u8]>),
    CharDevice {
        major: u32,
        minor: u32,
    },
    BlockDevice {
        major: u32,
        minor: u32,
    },
    Fifo,
    Socket,
    /// In a layer: the lower layers' file of this name is gone.
    Whiteout,
    /// In a layer: another name of the file that the lower layers have at this path (from the root, clean).
    LowerLink(Box<[u8]>),
}

#[derive(Debug, Clone, Default)]
pub(crate) struct Directory {
    /// In byte order of the names, which is EROFS's order too.
    pub(crate) children: BTreeMap<Box<[u8]>, NodeId>,
    /// In a layer: hides what the lower layers have in this directory.
    pub(crate) opaque: bool,
    /// In a layer: there for its children only, so it says nothing of the directory itself.
    pub(crate) implicit: bool,
}

/// A regular file: its size and where its bytes are.
#[derive(Debug, Clone)]
pub(crate) struct File {
    pub(crate) bytes: u64,
    /// Which layer's image holds the data, 0 in a layer's own tree.
    pub(crate) layer: u16,
    pub(crate) data: Data,
}

#[derive(Debug, Clone)]
pub(crate) enum Data {
    /// Blocks in a row from this one of the layer's image; 0 for an empty file.
    Run(u32),
    /// Pieces of 4096 << `bits` bytes, each in a row of blocks or a hole.
    Chunks { bits: u8, blocks: Box<[u32]> },
}

/// The block address that says "hole" in [`Data::Chunks`].
pub(crate) const HOLE: u32 = u32::MAX;

/// A tree, with a limit on the memory it takes.
#[derive(Debug)]
pub(crate) struct Tree {
    nodes: Vec<Node>,
    pub(crate) xattrs: XattrSets,
    bytes_left: u64,
}

/// The tree would take more memory than it may.
#[derive(Debug)]
pub(crate) struct TreeFull;

impl Tree {
    /// A tree of an implicit root alone that may grow to about `limit_bytes`.
    pub(crate) fn new(limit_bytes: u64) -> Self {
        let directory = Directory { implicit: true, ..Directory::default() };
        let root = Node { meta: Meta::IMPLICIT_DIRECTORY, kind: Kind::Directory(Box::new(directory)) };
        Self { nodes: vec![root], xattrs: XattrSets::default(), bytes_left: limit_bytes }
    }

    pub(crate) fn node(&self, id: NodeId) -> &Node {
        &self.nodes[id.index()]
    }

    pub(crate) fn node_mut(&mut self, id: NodeId) -> &mut Node {
        &mut self.nodes[id.index()]
    }

    /// Nodes ever added, those no longer reachable among them.
    pub(crate) fn len(&self) -> usize {
        self.nodes.len()
    }

    /// Every node ever added.
    pub(crate) fn ids(&self) -> impl Iterator<Item = NodeId> + use<> {
        (0..self.nodes.len() as u32).map(NodeId)
    }

    pub(crate) fn directory(&self, id: NodeId) -> Option<&Directory> {
        match &self.node(id).kind {
            Kind::Directory(directory) => Some(directory),
            _ => None,
        }
    }

    pub(crate) fn directory_mut(&mut self, id: NodeId) -> Option<&mut Directory> {
        match &mut self.node_mut(id).kind {
            Kind::Directory(directory) => Some(directory),
            _ => None,
        }
    }

    /// Takes `bytes` from what the tree may still use.
    pub(crate) fn charge(&mut self, bytes: u64) -> Result<(), TreeFull> {
        self.bytes_left = self.bytes_left.checked_sub(bytes).ok_or(TreeFull)?;
        Ok(())
    }

    /// Whether `bytes` could still be taken.
    pub(crate) fn has_room(&self, bytes: u64) -> Result<(), TreeFull> {
        if bytes <= self.bytes_left { Ok(()) } else { Err(TreeFull) }
    }

    /// Adds a node that no directory names yet.
    pub(crate) fn add(&mut self, node: Node) -> Result<NodeId, TreeFull> {
        let own = match &node.kind {
            Kind::Symlink(target) | Kind::LowerLink(target) => target.len() as u64,
            Kind::File(File { data: Data::Chunks { blocks, .. }, .. }) => blocks.len() as u64 * 4,
            Kind::Directory(_) => 64,
            _ => 0,
        };
        self.charge(NODE_BYTES + own)?;
        let id = NodeId(u32::try_from(self.nodes.len()).map_err(|_| TreeFull)?);
        self.nodes.push(node);
        Ok(id)
    }

    /// Gives `child` a name in a directory; what had the name before is returned.
    pub(crate) fn link(
        &mut self,
        directory: NodeId,
        name: &[u8],
        child: NodeId,
    ) -> Result<Option<NodeId>, TreeFull> {
        if let Some(place) = self.directory_mut(directory).and_then(|dir| dir.children.get_mut(name)) {
            return Ok(Some(std::mem::replace(place, child)));
        }
        self.charge(32 + name.len() as u64)?;
        if let Some(dir) = self.directory_mut(directory) {
            dir.children.insert(name.into(), child);
        }
        Ok(None)
    }

    /// The node at a clean path from the root, no symlink followed.
    pub(crate) fn find(&self, path: &[u8]) -> Option<NodeId> {
        let mut names = path.split(|&b| b == b'/').filter(|name| !name.is_empty());
        names.try_fold(ROOT, |at, name| self.directory(at)?.children.get(name).copied())
    }
}
