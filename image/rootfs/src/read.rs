//! A layer image's metadata back into a tree. The image is hostile input: it is checked as if a stranger had made it.

use std::collections::HashMap;
use std::io::{Read, Seek, SeekFrom};

use crate::emit;
use crate::format::{
    DIRENT_BYTES, DataLayout, Inode, SLOT_BYTES, SUPERBLOCK_BYTES, SUPERBLOCK_OFFSET, Superblock,
    XATTR_HEADER_BYTES, le16, le32, le64, mode, unpack_device,
};
use crate::sink::BLOCK_BYTES;
use crate::tree::{Data, Directory, File, HOLE, Kind, Meta, Node, NodeId, ROOT, Tree, TreeFull};
use crate::xattr::{self, SetId};

/// Metadata one layer may have, in bytes.
const METADATA_BYTES_MAX: u64 = 1 << 30;

/// Memory for the tree of a layer, in bytes, and how much of that each byte of metadata may ask for: what our own
/// writer makes stays below it, while metadata that refers to the same bytes over and over does not.
const TREE_BYTES_MAX: u64 = 2 << 30;
const TREE_BYTES_PER_BYTE: u64 = 16;

/// The metadata of one layer's image, ready for [`crate::merge()`].
#[derive(Debug)]
pub struct LayerReader {
    pub(crate) tree: Tree,
    image_blocks: u32,
}

/// Why a layer's image could not be read.
#[derive(Debug, thiserror::Error)]
pub enum ReadError {
    /// The file failed; the host's fault.
    #[error("the layer image could not be read")]
    Io(#[from] std::io::Error),
    /// The image is not one that [`crate::write_layer`] made: damaged, or not meant for this. Converting the layer
    /// again is the way out.
    #[error("the layer image is not valid: {0}")]
    Invalid(&'static str),
}

impl From<TreeFull> for ReadError {
    fn from(_: TreeFull) -> Self {
        Self::Invalid("its metadata asks for too much memory")
    }
}

impl LayerReader {
    /// Reads the metadata of an image that [`crate::write_layer`] made. The files' data is not read.
    ///
    /// # Errors
    /// [`ReadError::Invalid`] for anything that our writer would not write, [`ReadError::Io`] when reading fails.
    pub fn open<R: Read + Seek>(mut image: R) -> Result<Self, ReadError> {
        let length = image.seek(SeekFrom::End(0))?;
        if length < 2 * BLOCK_BYTES {
            return Err(ReadError::Invalid("it is too short"));
        }
        image.seek(SeekFrom::Start(SUPERBLOCK_OFFSET as u64))?;
        let mut superblock = [0; SUPERBLOCK_BYTES];
        image.read_exact(&mut superblock)?;
        let superblock =
            Superblock::decode(&superblock).ok_or(ReadError::Invalid("it has another superblock"))?;
        let start = superblock.metadata_block;
        if u64::from(superblock.blocks) * BLOCK_BYTES != length || start == 0 || start >= superblock.blocks {
            return Err(ReadError::Invalid("its superblock does not fit its length"));
        }
        let bytes = u64::from(superblock.blocks - start) * BLOCK_BYTES;
        if bytes > METADATA_BYTES_MAX {
            return Err(ReadError::Invalid("its metadata is too large"));
        }
        image.seek(SeekFrom::Start(u64::from(start) * BLOCK_BYTES))?;
        let mut metadata = vec![0; usize::try_from(bytes).unwrap_or(usize::MAX)];
        image.read_exact(&mut metadata)?;
        let limit = (bytes * TREE_BYTES_PER_BYTE + (1 << 20)).min(TREE_BYTES_MAX);
        let mut decoder = Decoder {
            superblock,
            metadata,
            tree: Tree::new(limit),
            nodes: HashMap::new(),
            sets: HashMap::new(),
        };
        decoder.run()?;
        Ok(Self { tree: decoder.tree, image_blocks: superblock.blocks })
    }

    /// Length of the image this was read from.
    pub fn image_bytes(&self) -> u64 {
        u64::from(self.image_blocks) * BLOCK_BYTES
    }

    pub(crate) fn image_blocks(&self) -> u32 {
        self.image_blocks
    }
}

/// An inode's attributes, with our marks apart.
#[derive(Clone, Default)]
struct Attributes {
    set: Option<SetId>,
    opaque: bool,
    implicit: bool,
    lower_link: Option<Box<[u8]>>,
}

struct Decoder {
    superblock: Superblock,
    metadata: Vec<u8>,
    tree: Tree,
    /// Nodes by inode number, directories too.
    nodes: HashMap<u64, NodeId>,
    /// Attributes by the bytes that state them: inodes with the same ones mostly have the same bytes.
    sets: HashMap<Vec<u8>, Attributes>,
}

/// One inode with where its parts are.
struct Found {
    inode: Inode,
    attributes: Attributes,
    /// Where in the metadata the inode's attributes end.
    end: usize,
}

impl Decoder {
    fn run(&mut self) -> Result<(), ReadError> {
        let root_nid = u64::from(self.superblock.root_nid);
        let root = self.inode(root_nid)?;
        if root.inode.mode & mode::TYPE != mode::DIRECTORY {
            return Err(ReadError::Invalid("its root is not a directory"));
        }
        let node = self.node(&root)?;
        *self.tree.node_mut(ROOT) = node;
        self.nodes.insert(root_nid, ROOT);
        let mut todo = vec![(root_nid, root_nid, ROOT, self.content(&root)?)];
        while let Some((nid, parent_nid, id, content)) = todo.pop() {
            let mut before: Option<&[u8]> = None;
            let mut dots = 0;
            for entry in dirents(&content)? {
                let Dirent { name, nid: child_nid, file_type } = entry?;
                if before.is_some_and(|before| before >= name) {
                    return Err(ReadError::Invalid("a directory's names are out of order"));
                }
                before = Some(name);
                if name == b"." || name == b".." {
                    if child_nid != if name == b"." { nid } else { parent_nid } {
                        return Err(ReadError::Invalid("a directory's own entries lead elsewhere"));
                    }
                    dots += 1;
                    continue;
                }
                let child = if let Some(&child) = self.nodes.get(&child_nid) {
                    if self.tree.directory(child).is_some() {
                        return Err(ReadError::Invalid("a directory has two names"));
                    }
                    child
                } else {
                    let found = self.inode(child_nid)?;
                    let node = self.node(&found)?;
                    let child = self.tree.add(node)?;
                    self.nodes.insert(child_nid, child);
                    if self.tree.directory(child).is_some() {
                        todo.push((child_nid, nid, child, self.content(&found)?));
                    }
                    child
                };
                if file_type != emit::file_type(&self.tree.node(child).kind) {
                    return Err(ReadError::Invalid("a directory names another type than the inode"));
                }
                self.tree.link(id, name, child)?;
            }
            if dots != 2 {
                return Err(ReadError::Invalid("a directory lacks its own entries"));
            }
        }
        Ok(())
    }

    fn inode(&mut self, nid: u64) -> Result<Found, ReadError> {
        const OUTSIDE: ReadError = ReadError::Invalid("an inode is outside the metadata");
        let at = nid.checked_mul(SLOT_BYTES).and_then(|at| usize::try_from(at).ok()).ok_or(OUTSIDE)?;
        let bytes = self.metadata.get(at..).ok_or(OUTSIDE)?;
        let (inode, size) =
            Inode::decode(bytes).ok_or(ReadError::Invalid("an inode is of an unknown form"))?;
        let body_bytes = match inode.xattr_count {
            0 => 0,
            count => XATTR_HEADER_BYTES + (usize::from(count) - 1) * 4,
        };
        let body = bytes.get(size..size + body_bytes).ok_or(OUTSIDE)?;
        let attributes = if let Some(attributes) = self.sets.get(body) {
            attributes.clone()
        } else {
            let body = body.to_vec();
            let attributes = self.attributes(&body)?;
            self.tree.charge(body.len() as u64 + 64)?;
            self.sets.insert(body, attributes.clone());
            attributes
        };
        Ok(Found { inode, attributes, end: at + size + body_bytes })
    }

    fn attributes(&mut self, body: &[u8]) -> Result<Attributes, ReadError> {
        const BAD: ReadError = ReadError::Invalid("an inode's attributes are malformed");
        if body.is_empty() {
            return Ok(Attributes::default());
        }
        let shared = usize::from(body[4]) * 4;
        let numbers = body.get(XATTR_HEADER_BYTES..XATTR_HEADER_BYTES + shared).ok_or(BAD)?;
        let mut pairs = Vec::new();
        let area = u64::from(self.superblock.xattr_block)
            .checked_sub(u64::from(self.superblock.metadata_block))
            .and_then(|blocks| usize::try_from(blocks * BLOCK_BYTES).ok());
        for number in numbers.chunks_exact(4) {
            let at = area.and_then(|area| area.checked_add(le32(number, 0) as usize * 4)).ok_or(BAD)?;
            let entry = self.metadata.get(at..).and_then(xattr::first_entry).ok_or(BAD)?.0;
            pairs.push(xattr::decode(entry).ok_or(BAD)?);
        }
        let mut rest = &body[XATTR_HEADER_BYTES + shared..];
        while !rest.is_empty() {
            let (entry, next) = xattr::first_entry(rest).ok_or(BAD)?;
            pairs.push(xattr::decode(entry).ok_or(BAD)?);
            rest = next;
        }
        let mut attributes = Attributes::default();
        pairs.retain(|(name, value)| match name.as_slice() {
            name if name == xattr::OPAQUE.0 => {
                attributes.opaque = true;
                false
            }
            xattr::IMPLICIT => {
                attributes.implicit = true;
                false
            }
            xattr::LOWER_LINK => {
                attributes.lower_link = Some(value.as_slice().into());
                false
            }
            _ => true,
        });
        pairs.sort();
        if pairs.windows(2).any(|pair| pair[0].0 == pair[1].0) {
            return Err(BAD);
        }
        let set = pairs.iter().map(|(name, value)| (name.as_slice(), value.as_slice()));
        let set = xattr::encode(set).map_err(|bad| ReadError::Invalid(bad.0))?;
        self.tree.charge(set.len() as u64 * 2)?;
        attributes.set = Some(self.tree.xattrs.intern(set).0);
        Ok(attributes)
    }

    fn node(&self, found: &Found) -> Result<Node, ReadError> {
        let Found { inode, attributes, end } = found;
        let kind = match inode.mode & mode::TYPE {
            mode::DIRECTORY => {
                let Attributes { opaque, implicit, .. } = *attributes;
                Kind::Directory(Box::new(Directory { opaque, implicit, ..Directory::default() }))
            }
            mode::FILE => match &attributes.lower_link {
                Some(path) if inode.bytes == 0 => Kind::LowerLink(path.clone()),
                Some(_) => return Err(ReadError::Invalid("a link has content")),
                None => Kind::File(self.file(inode, *end)?),
            },
            mode::SYMLINK => {
                let target = self.content(found)?;
                if target.is_empty() || target.len() as u64 >= BLOCK_BYTES || target.contains(&0) {
                    return Err(ReadError::Invalid("a symbolic link's target is not one"));
                }
                Kind::Symlink(target.into())
            }
            mode::CHAR if inode.place == 0 => Kind::Whiteout,
            mode::CHAR => {
                let (major, minor) = unpack_device(inode.place);
                Kind::CharDevice { major, minor }
            }
            mode::BLOCK => {
                let (major, minor) = unpack_device(inode.place);
                Kind::BlockDevice { major, minor }
            }
            mode::FIFO => Kind::Fifo,
            mode::SOCKET => Kind::Socket,
            _ => return Err(ReadError::Invalid("an inode is of no type")),
        };
        let mtime = inode.time.unwrap_or(self.superblock.time);
        if mtime.nanos >= 1_000_000_000 {
            return Err(ReadError::Invalid("an inode's time is not one"));
        }
        let meta = Meta {
            mode: inode.mode & !mode::TYPE,
            uid: inode.uid,
            gid: inode.gid,
            mtime,
            xattrs: attributes.set.unwrap_or(SetId::EMPTY),
        };
        Ok(Node { meta, kind })
    }

    fn file(&self, inode: &Inode, end: usize) -> Result<File, ReadError> {
        const OUTSIDE: ReadError = ReadError::Invalid("a file's data is outside the image's");
        let Inode { bytes, place, layout, .. } = *inode;
        if bytes > i64::MAX as u64 {
            return Err(ReadError::Invalid("a file is too large"));
        }
        // Data lies between the superblock's block and the metadata.
        let inside = |block: u32, bytes: u64| {
            let blocks = bytes.div_ceil(BLOCK_BYTES);
            block > 0 && u64::from(block) + blocks <= u64::from(self.superblock.metadata_block)
        };
        let data = match layout {
            DataLayout::Plain if bytes == 0 && place == 0 => Data::Run(0),
            DataLayout::Plain if bytes > 0 && inside(place, bytes) => Data::Run(place),
            DataLayout::Chunks if place < 32 && bytes > 0 => {
                let chunk = BLOCK_BYTES << place;
                let count = usize::try_from(bytes.div_ceil(chunk)).map_err(|_| OUTSIDE)?;
                let map = count.checked_mul(4).and_then(|size| end.checked_add(size));
                let map = map.and_then(|map_end| self.metadata.get(end..map_end)).ok_or(OUTSIDE)?;
                self.tree.has_room(map.len() as u64)?;
                let blocks: Box<[u32]> = map.chunks_exact(4).map(|block| le32(block, 0)).collect();
                for (index, &block) in blocks.iter().enumerate() {
                    if block != HOLE && !inside(block, chunk.min(bytes - index as u64 * chunk)) {
                        return Err(OUTSIDE);
                    }
                }
                Data::Chunks { bits: place as u8, blocks }
            }
            _ => return Err(OUTSIDE),
        };
        Ok(File { bytes, layer: 0, data })
    }

    /// The content of a directory or symlink.
    fn content(&self, found: &Found) -> Result<Vec<u8>, ReadError> {
        const OUTSIDE: ReadError = ReadError::Invalid("a directory's content is outside the metadata");
        let Found { inode, end, .. } = found;
        let bytes =
            usize::try_from(inode.bytes).ok().filter(|&bytes| bytes <= self.metadata.len()).ok_or(OUTSIDE)?;
        self.tree.has_room(bytes as u64)?;
        let block = BLOCK_BYTES as usize;
        let tail = match inode.layout {
            DataLayout::Inline => bytes % block,
            DataLayout::Plain => 0,
            DataLayout::Chunks => return Err(ReadError::Invalid("a directory is in chunks")),
        };
        let mut content = Vec::with_capacity(bytes);
        if bytes > tail {
            let start = u64::from(inode.place).checked_sub(u64::from(self.superblock.metadata_block));
            let start = start.and_then(|start| usize::try_from(start * BLOCK_BYTES).ok()).ok_or(OUTSIDE)?;
            let whole = start.checked_add(bytes - tail).and_then(|stop| self.metadata.get(start..stop));
            content.extend_from_slice(whole.ok_or(OUTSIDE)?);
        }
        if tail > 0 {
            if end % block + tail > block {
                return Err(ReadError::Invalid("inline content crosses a block's end"));
            }
            content.extend_from_slice(self.metadata.get(*end..end + tail).ok_or(OUTSIDE)?);
        }
        Ok(content)
    }
}

struct Dirent<'a> {
    name: &'a [u8],
    nid: u64,
    file_type: u8,
}

/// The entries of a directory, block by block.
fn dirents(content: &[u8]) -> Result<impl Iterator<Item = Result<Dirent<'_>, ReadError>>, ReadError> {
    const BAD: ReadError = ReadError::Invalid("a directory's content is malformed");
    let mut blocks = Vec::new();
    for block in content.chunks(BLOCK_BYTES as usize) {
        if block.len() < DIRENT_BYTES {
            return Err(BAD);
        }
        let names_at = usize::from(le16(block, 8));
        if names_at == 0 || names_at % DIRENT_BYTES != 0 || names_at > block.len() {
            return Err(BAD);
        }
        blocks.push((block, names_at / DIRENT_BYTES));
    }
    Ok(blocks.into_iter().flat_map(|(block, count)| {
        (0..count).map(move |index| {
            let at = index * DIRENT_BYTES;
            let start = usize::from(le16(block, at + 8));
            let end = if index + 1 < count {
                usize::from(le16(block, at + DIRENT_BYTES + 8))
            } else {
                let rest = block.get(start..).ok_or(BAD)?;
                start + rest.iter().position(|&b| b == 0).unwrap_or(rest.len())
            };
            let name = block.get(start..end).ok_or(BAD)?;
            if name.is_empty() || name.len() > 255 || name.contains(&b'/') || name.contains(&0) {
                return Err(ReadError::Invalid("a name is not one"));
            }
            Ok(Dirent { name, nid: le64(block, at), file_type: block[at + 10] })
        })
    }))
}
