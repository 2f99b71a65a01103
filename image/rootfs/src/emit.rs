//! A tree as EROFS metadata: first where everything goes, then the bytes.
//!
//! What is read together lies together: a directory's entries are in its inode's own block if they fit, the inodes of
//! its files follow, and then its directories. Inodes take 32 bytes where their time is the image's most common one
//! and the rest fits, else 64.

use std::collections::HashMap;

use crate::format::{
    self, COMPACT_BYTES, DIRENT_BYTES, DataLayout, EXTENDED_BYTES, Inode, SLOT_BYTES, SUPERBLOCK_BYTES,
    SUPERBLOCK_OFFSET, Superblock, XATTR_HEADER_BYTES, mode,
};
use crate::sink::BLOCK_BYTES;
use crate::tree::{Data, Directory, File, HOLE, Kind, Node, NodeId, ROOT, Time, Tree};
use crate::xattr::{self, SetId};

/// What kind of image the metadata is for.
#[derive(Clone, Copy)]
pub(crate) enum Source<'a> {
    /// A layer's own: the metadata follows the data.
    Layer { metadata_start: u32 },
    /// Several layers': the metadata goes first, then these many blocks of each layer's image.
    Merged { layer_blocks: &'a [u32] },
}

/// Why a tree does not fit the format.
#[derive(Debug, Clone, Copy)]
pub(crate) enum EmitError {
    /// More blocks than addresses.
    TooLarge,
    /// Attributes that do not fit with our marks among them.
    Xattrs(&'static str),
}

/// Where everything goes.
pub(crate) struct Image {
    superblock: Superblock,
    /// Every inode once, as they lie in the metadata.
    order: Vec<NodeId>,
    /// By node; those not in `order` are not meaningful.
    places: Vec<Place>,
    /// By set: header, numbers of shared attributes, attributes.
    xattr_bodies: Vec<Vec<u8>>,
    /// The attributes that several inodes have.
    shared_xattrs: Vec<u8>,
    /// What to add to a layer's block addresses.
    bases: Vec<u32>,
    metadata_blocks: u32,
}

#[derive(Clone)]
struct Place {
    /// In bytes from the metadata's start; a multiple of [`SLOT_BYTES`].
    offset: u64,
    links: u32,
    /// Of a directory.
    parent: NodeId,
    set: SetId,
    /// Size of a directory's or symlink's content.
    bytes: u64,
    /// First metadata block of a directory's or symlink's content outside the inode.
    block: u32,
    inline: bool,
}

/// Decides where everything goes.
pub(crate) fn plan(tree: &mut Tree, source: Source) -> Result<Image, EmitError> {
    let sets = mark_directories(tree)?;
    let tree = &*tree;
    let (order, mut places) = arrange(tree, &sets);
    let time = most_common_time(tree, &order);
    let (xattr_bodies, shared_xattrs) = share_xattrs(tree, &order, &places);

    let reserved = match source {
        // Inode number 0 would be no number to programs that list directories.
        Source::Layer { .. } => SLOT_BYTES,
        Source::Merged { .. } => (SUPERBLOCK_OFFSET + SUPERBLOCK_BYTES) as u64,
    };
    let mut room = Room { end: reserved, gap: 0..0 };
    for &id in &order {
        let node = tree.node(id);
        let place = &mut places[id.index()];
        let inode = describe(node, place, time, 0, 0);
        let fixed = if inode.is_compact() { COMPACT_BYTES } else { EXTENDED_BYTES };
        let head = fixed + xattr_bodies[place.set.index()].len() as u64;
        let (tail, after) = match &node.kind {
            Kind::Directory(_) | Kind::Symlink(_) => {
                let tail = place.bytes % BLOCK_BYTES;
                place.inline = tail > 0 && head + tail <= BLOCK_BYTES;
                (if place.inline { tail } else { 0 }, 0)
            }
            Kind::File(File { data: Data::Chunks { blocks, .. }, .. }) => (0, blocks.len() as u64 * 4),
            _ => (0, 0),
        };
        // Inline content must not cross a block's end; nor should the inode itself.
        let together = if tail > 0 { head + tail } else { fixed };
        place.offset = room.take(together, head + tail + after);
    }
    let mut block = blocks(room.end)?;
    for &id in &order {
        let place = &mut places[id.index()];
        let whole = if place.inline { place.bytes / BLOCK_BYTES } else { place.bytes.div_ceil(BLOCK_BYTES) };
        if whole > 0 {
            place.block = block;
            block = u32::try_from(whole)
                .ok()
                .and_then(|whole| block.checked_add(whole))
                .ok_or(EmitError::TooLarge)?;
        }
    }
    let shared_start = block;
    let metadata_blocks =
        block.checked_add(blocks(shared_xattrs.len() as u64)?).ok_or(EmitError::TooLarge)?;

    let (metadata_block, bases, total) = match source {
        Source::Layer { metadata_start } => {
            (metadata_start, vec![0], metadata_start.checked_add(metadata_blocks))
        }
        Source::Merged { layer_blocks } => {
            let mut bases = Vec::with_capacity(layer_blocks.len());
            let total = layer_blocks.iter().try_fold(metadata_blocks, |base, &length| {
                bases.push(base);
                base.checked_add(length)
            });
            (0, bases, total)
        }
    };
    // The last address means a hole.
    let total = total.filter(|&total| total < HOLE).ok_or(EmitError::TooLarge)?;
    let root_nid =
        u16::try_from(places[ROOT.index()].offset / SLOT_BYTES).map_err(|_| EmitError::TooLarge)?;
    let chunked = order
        .iter()
        .any(|&id| matches!(&tree.node(id).kind, Kind::File(File { data: Data::Chunks { .. }, .. })));
    let superblock = Superblock {
        root_nid,
        inodes: order.len() as u64,
        time,
        blocks: total,
        metadata_block,
        xattr_block: if shared_xattrs.is_empty() { 0 } else { metadata_block + shared_start },
        chunked,
    };
    Ok(Image { superblock, order, places, xattr_bodies, shared_xattrs, bases, metadata_blocks })
}

fn blocks(bytes: u64) -> Result<u32, EmitError> {
    u32::try_from(bytes.div_ceil(BLOCK_BYTES)).map_err(|_| EmitError::TooLarge)
}

/// The attributes of every node, with the marks of directories and links added that only a layer has.
fn mark_directories(tree: &mut Tree) -> Result<Vec<SetId>, EmitError> {
    let mut sets = Vec::with_capacity(tree.len());
    let mut marked: HashMap<(SetId, bool, bool), SetId> = HashMap::new();
    for id in tree.ids() {
        let node = tree.node(id);
        let own = node.meta.xattrs;
        let (opaque, implicit, link) = match &node.kind {
            Kind::Directory(dir) => (dir.opaque, dir.implicit, None),
            Kind::LowerLink(path) => (false, false, Some(path.clone())),
            _ => (false, false, None),
        };
        if !opaque && !implicit && link.is_none() {
            sets.push(own);
            continue;
        }
        if link.is_none()
            && let Some(&set) = marked.get(&(own, opaque, implicit))
        {
            sets.push(set);
            continue;
        }
        let mut attributes: Vec<xattr::Xattr> = Vec::new();
        let mut rest = tree.xattrs.entries(own);
        while let Some((entry, next)) = xattr::first_entry(rest) {
            attributes.extend(xattr::decode(entry));
            rest = next;
        }
        let mut mark = |name: &[u8], value: &[u8]| attributes.push((name.to_vec(), value.to_vec()));
        if opaque {
            mark(xattr::OPAQUE.0, xattr::OPAQUE.1);
        }
        if implicit {
            mark(xattr::IMPLICIT, b"");
        }
        if let Some(path) = &link {
            mark(xattr::LOWER_LINK, path);
        }
        attributes.sort();
        let pairs = attributes.iter().map(|(name, value)| (name.as_slice(), value.as_slice()));
        let entries = xattr::encode(pairs).map_err(|bad| EmitError::Xattrs(bad.0))?;
        let (set, _) = tree.xattrs.intern(entries);
        if link.is_none() {
            marked.insert((own, opaque, implicit), set);
        }
        sets.push(set);
    }
    Ok(sets)
}

/// The order of the inodes, and what can be said of each before their offsets are known.
fn arrange(tree: &Tree, sets: &[SetId]) -> (Vec<NodeId>, Vec<Place>) {
    let unseen =
        Place { offset: 0, links: 0, parent: ROOT, set: SetId::EMPTY, bytes: 0, block: 0, inline: false };
    let mut places: Vec<Place> = sets.iter().map(|&set| Place { set, ..unseen.clone() }).collect();
    let mut order = Vec::new();
    let mut todo = vec![ROOT];
    places[ROOT.index()].links = 2;
    while let Some(id) = todo.pop() {
        let Some(directory) = tree.directory(id) else { continue };
        order.push(id);
        places[id.index()].bytes = packed_bytes(directory);
        let subdirectories = todo.len();
        for &child in directory.children.values() {
            let place = &mut places[child.index()];
            match &tree.node(child).kind {
                Kind::Directory(_) => {
                    place.parent = id;
                    place.links = 2;
                    places[id.index()].links += 1;
                    todo.push(child);
                }
                kind => {
                    if place.links == 0 {
                        order.push(child);
                    }
                    place.links += 1;
                    if let Kind::Symlink(target) = kind {
                        place.bytes = target.len() as u64;
                    }
                }
            }
        }
        todo[subdirectories..].reverse();
    }
    (order, places)
}

/// The time that most inodes have; of several the earliest.
fn most_common_time(tree: &Tree, order: &[NodeId]) -> Time {
    let mut counts: HashMap<Time, u64> = HashMap::new();
    for &id in order {
        if !is_timeless(tree.node(id)) {
            *counts.entry(tree.node(id).meta.mtime).or_default() += 1;
        }
    }
    let best = counts.into_iter().max_by_key(|&(time, count)| (count, std::cmp::Reverse(time)));
    best.map(|(time, _)| time).unwrap_or_default()
}

/// Whether a node's time is nobody's business.
fn is_timeless(node: &Node) -> bool {
    matches!(node.kind, Kind::Whiteout | Kind::LowerLink(_))
}

/// The bytes of attributes that go after inodes, by set, and the attributes kept apart because several inodes have
/// them.
fn share_xattrs(tree: &Tree, order: &[NodeId], places: &[Place]) -> (Vec<Vec<u8>>, Vec<u8>) {
    let mut uses = vec![0u32; tree.xattrs.len()];
    for &id in order {
        uses[places[id.index()].set.index()] += 1;
    }
    let entries = |set: usize| {
        let mut rest = tree.xattrs.entries_at(set);
        std::iter::from_fn(move || {
            let (entry, next) = xattr::first_entry(rest)?;
            rest = next;
            Some(entry)
        })
    };
    let mut entry_uses: HashMap<&[u8], u32> = HashMap::new();
    for (set, &uses) in uses.iter().enumerate().filter(|(_, uses)| **uses > 0) {
        for entry in entries(set) {
            *entry_uses.entry(entry).or_default() += uses;
        }
    }
    let mut shared = Vec::new();
    let mut numbers: HashMap<&[u8], u32> = HashMap::new();
    let mut bodies = vec![Vec::new(); uses.len()];
    for (set, _) in uses.iter().enumerate().filter(|(_, uses)| **uses > 0) {
        let (mut ids, mut inline) = (Vec::new(), Vec::new());
        for entry in entries(set) {
            // A number takes 4 bytes and so could an attribute.
            if entry_uses.get(entry).is_some_and(|&uses| uses > 1) && entry.len() > 4 {
                let number = numbers.entry(entry).or_insert_with(|| {
                    shared.extend_from_slice(entry);
                    ((shared.len() - entry.len()) / 4) as u32
                });
                ids.extend_from_slice(&number.to_le_bytes());
            } else {
                inline.extend_from_slice(entry);
            }
        }
        if ids.is_empty() && inline.is_empty() {
            continue;
        }
        let body = &mut bodies[set];
        body.resize(XATTR_HEADER_BYTES, 0);
        body[4] = (ids.len() / 4) as u8;
        body.extend_from_slice(&ids);
        body.extend_from_slice(&inline);
    }
    (bodies, shared)
}

/// Free space in the metadata: what follows the end, and the last gap left before a block's end.
struct Room {
    end: u64,
    gap: std::ops::Range<u64>,
}

impl Room {
    /// A place for `bytes`, of which the first `together` must be in one block.
    fn take(&mut self, together: u64, bytes: u64) -> u64 {
        if bytes == together && bytes <= self.gap.end - self.gap.start {
            let at = self.gap.start;
            self.gap.start = (at + bytes).next_multiple_of(SLOT_BYTES).min(self.gap.end);
            return at;
        }
        let mut at = self.end;
        let block_end = (at + 1).next_multiple_of(BLOCK_BYTES);
        if at + together > block_end {
            self.gap = at..block_end;
            at = block_end;
        }
        self.end = (at + bytes).next_multiple_of(SLOT_BYTES);
        at
    }
}

/// A node's inode. Its attributes' size is not in it yet.
fn describe(node: &Node, place: &Place, time: Time, base: u32, serial: u32) -> Inode {
    let meta = node.meta;
    let content = if place.inline { DataLayout::Inline } else { DataLayout::Plain };
    let (kind, layout, bytes, at) = match &node.kind {
        Kind::Directory(_) => (mode::DIRECTORY, content, place.bytes, place.block),
        Kind::Symlink(_) => (mode::SYMLINK, content, place.bytes, place.block),
        Kind::File(File { bytes, data: Data::Run(0), .. }) => (mode::FILE, DataLayout::Plain, *bytes, 0),
        Kind::File(File { bytes, data: Data::Run(block), .. }) => {
            (mode::FILE, DataLayout::Plain, *bytes, base + block)
        }
        Kind::File(File { bytes, data: Data::Chunks { bits, .. }, .. }) => {
            (mode::FILE, DataLayout::Chunks, *bytes, u32::from(*bits))
        }
        Kind::CharDevice { major, minor } => {
            (mode::CHAR, DataLayout::Plain, 0, format::pack_device(*major, *minor))
        }
        Kind::BlockDevice { major, minor } => {
            (mode::BLOCK, DataLayout::Plain, 0, format::pack_device(*major, *minor))
        }
        Kind::Fifo => (mode::FIFO, DataLayout::Plain, 0, 0),
        Kind::Socket => (mode::SOCKET, DataLayout::Plain, 0, 0),
        Kind::Whiteout => (mode::CHAR, DataLayout::Plain, 0, 0),
        Kind::LowerLink(_) => (mode::FILE, DataLayout::Plain, 0, 0),
    };
    let own_time = (!is_timeless(node) && meta.mtime != time).then_some(meta.mtime);
    Inode {
        layout,
        mode: kind | meta.mode,
        links: place.links,
        uid: meta.uid,
        gid: meta.gid,
        time: own_time,
        bytes,
        place: at,
        xattr_count: 0,
        serial,
    }
}

impl Image {
    /// How many inodes the image has.
    pub(crate) fn inodes(&self) -> u64 {
        self.superblock.inodes
    }

    /// What was added to each layer's block addresses: where each layer starts, in blocks.
    pub(crate) fn bases(&self) -> &[u32] {
        &self.bases
    }

    /// Blocks of everything that the addresses count.
    pub(crate) fn total_blocks(&self) -> u32 {
        self.superblock.blocks
    }

    /// The metadata, whole blocks of it, and the image's first block up to the end of the superblock. Metadata that
    /// starts at block 0 has the superblock in it already.
    pub(crate) fn encode(&self, tree: &Tree) -> (Vec<u8>, Vec<u8>) {
        let mut out = vec![0; self.metadata_blocks as usize * BLOCK_BYTES as usize];
        for (serial, &id) in self.order.iter().enumerate() {
            self.encode_node(tree, id, serial as u32 + 1, &mut out);
        }
        let shared_start = out.len() - (self.shared_xattrs.len().next_multiple_of(BLOCK_BYTES as usize));
        out[shared_start..shared_start + self.shared_xattrs.len()].copy_from_slice(&self.shared_xattrs);
        let superblock = self.superblock.encode();
        if self.superblock.metadata_block == 0 {
            out[SUPERBLOCK_OFFSET..SUPERBLOCK_OFFSET + SUPERBLOCK_BYTES].copy_from_slice(&superblock);
        }
        let mut first = vec![0; SUPERBLOCK_OFFSET];
        first.extend_from_slice(&superblock);
        (out, first)
    }

    fn encode_node(&self, tree: &Tree, id: NodeId, serial: u32, out: &mut [u8]) {
        let node = tree.node(id);
        let place = &self.places[id.index()];
        let base = match &node.kind {
            Kind::File(file) => self.bases[usize::from(file.layer)],
            _ => 0,
        };
        let mut inode = describe(node, place, self.superblock.time, base, serial);
        if matches!(node.kind, Kind::Directory(_) | Kind::Symlink(_)) && place.block != 0 {
            inode.place = self.superblock.metadata_block + place.block;
        }
        let body = &self.xattr_bodies[place.set.index()];
        if !body.is_empty() {
            inode.xattr_count = ((body.len() - XATTR_HEADER_BYTES) / 4 + 1) as u16;
        }
        let mut at = place.offset as usize;
        inode.encode(&mut out[at..], self.superblock.time);
        at += if inode.is_compact() { COMPACT_BYTES } else { EXTENDED_BYTES } as usize;
        out[at..at + body.len()].copy_from_slice(body);
        at += body.len();
        match &node.kind {
            Kind::Symlink(target) => put_content(place, at, target, out),
            Kind::Directory(directory) => {
                let content = self.directory_content(tree, id, place.parent, directory);
                put_content(place, at, &content, out);
            }
            Kind::File(File { data: Data::Chunks { blocks, .. }, .. }) => {
                for (entry, &block) in out[at..].chunks_exact_mut(4).zip(blocks) {
                    let block = if block == HOLE { HOLE } else { base + block };
                    entry.copy_from_slice(&block.to_le_bytes());
                }
            }
            _ => {}
        }
    }

    fn directory_content(&self, tree: &Tree, id: NodeId, parent: NodeId, directory: &Directory) -> Vec<u8> {
        let mut content = Vec::new();
        let entries: Vec<_> = entries(directory, id, parent).collect();
        let mut rest = entries.as_slice();
        while !rest.is_empty() {
            let (mut count, mut used) = (0, 0);
            while let Some(&(name, _)) = rest.get(count)
                && used + DIRENT_BYTES + name.len() <= BLOCK_BYTES as usize
            {
                used += DIRENT_BYTES + name.len();
                count += 1;
            }
            let (block, after) = rest.split_at(count);
            content.resize(content.len().next_multiple_of(BLOCK_BYTES as usize), 0);
            let mut name_at = block.len() * DIRENT_BYTES;
            for &(name, child) in block {
                let nid = self.places[child.index()].offset / SLOT_BYTES;
                let kind = file_type(&tree.node(child).kind);
                content.extend_from_slice(&format::dirent(nid, name_at as u16, kind));
                name_at += name.len();
            }
            for &(name, _) in block {
                content.extend_from_slice(name);
            }
            rest = after;
        }
        content
    }
}

/// Puts a directory's or symlink's content into its blocks, and the tail after its inode if that is its place.
fn put_content(place: &Place, tail_at: usize, content: &[u8], out: &mut [u8]) {
    let split =
        if place.inline { content.len() - content.len() % BLOCK_BYTES as usize } else { content.len() };
    let (blocks, tail) = content.split_at(split);
    let start = place.block as usize * BLOCK_BYTES as usize;
    out[start..start + blocks.len()].copy_from_slice(blocks);
    out[tail_at..tail_at + tail.len()].copy_from_slice(tail);
}

/// A directory's entries with `.` and `..`, all in byte order.
fn entries(directory: &Directory, id: NodeId, parent: NodeId) -> impl Iterator<Item = (&[u8], NodeId)> {
    let mut dots = [(&b"."[..], id), (&b".."[..], parent)].into_iter().peekable();
    let mut children = directory.children.iter().map(|(name, &child)| (&**name, child)).peekable();
    std::iter::from_fn(move || match (dots.peek(), children.peek()) {
        (Some(dot), Some(child)) if child.0 < dot.0 => children.next(),
        (Some(_), _) => dots.next(),
        (None, _) => children.next(),
    })
}

/// The size of a directory's content: entries fill a block as long as they fit.
fn packed_bytes(directory: &Directory) -> u64 {
    let (mut whole, mut used) = (0, 0);
    for (name, _) in entries(directory, ROOT, ROOT) {
        let entry = (DIRENT_BYTES + name.len()) as u64;
        if used + entry > BLOCK_BYTES {
            whole += BLOCK_BYTES;
            used = 0;
        }
        used += entry;
    }
    whole + used
}

/// Linux's `FT_*` of a node.
pub(crate) fn file_type(kind: &Kind) -> u8 {
    match kind {
        Kind::File(_) | Kind::LowerLink(_) => 1,
        Kind::Directory(_) => 2,
        Kind::CharDevice { .. } | Kind::Whiteout => 3,
        Kind::BlockDevice { .. } => 4,
        Kind::Fifo => 5,
        Kind::Socket => 6,
        Kind::Symlink(_) => 7,
    }
}
