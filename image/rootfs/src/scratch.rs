//! An empty ext4 file system for a machine's writable disk, made for cheap mounting and cheap use.
//!
//! Where guest kernel instructions are slow (emulated), what counts is how few of them the file system takes. So: no
//! metadata checksums (they double the cost of creating and unlinking files), descriptors with checksums instead,
//! since they let the kernel take a group as empty without looking at its bitmaps; no backup superblocks; no journal,
//! for the disk lives as long as its machine; the overlay's two directories in place, beside each other. The result is the
//! same for the same size.
//!
//! It is best mounted with `MS_NOATIME` and the options `no_prefetch_block_bitmaps` and `noblock_validity`, and
//! `mb_prefetch` set to 0 in sysfs: reading bitmaps ahead of use takes the kernel three times as long as the mount.
//!
//! Linux Documentation/filesystems/ext4/, "Global Structures" and "Dynamic Structures"; field places from there.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;

/// Smallest size, in bytes.
pub const SCRATCH_BYTES_MIN: u64 = 16 << 20;

/// Largest size, in bytes: block numbers have 32 bits, and some room is kept.
pub const SCRATCH_BYTES_MAX: u64 = 8 << 40;

/// The directory of a scratch disk for what an overlay's files become when they are written.
const UPPER: &str = "upper";
/// The directory an overlay works in.
const WORK: &str = "work";

const BLOCK_BYTES: u64 = 4096;
/// As many as a bitmap of one block has bits.
const GROUP_BLOCKS: u64 = 32_768;
/// Groups whose bitmaps and inode tables lie together in the first of them.
const FLEX_GROUPS: u64 = 16;
const INODE_BYTES: u64 = 256;
const INODES_PER_BLOCK: u64 = BLOCK_BYTES / INODE_BYTES;
/// Space for each inode, in bytes; as mke2fs has it.
const BYTES_PER_INODE: u64 = 16_384;
const DESCRIPTOR_BYTES: u64 = 32;
/// The first inodes are the file system's own.
const OWN_INODES: u64 = 10;
const ROOT_INODE: u32 = 2;
/// The directories in the root, in the order of their inodes and blocks, which follow the file system's own and the root's.
const DIRECTORIES: [&str; 3] = ["lost+found", UPPER, WORK];
const USED_INODES: u64 = OWN_INODES + DIRECTORIES.len() as u64;
/// Blocks that a last group must have beside its metadata; a smaller one is left unused.
const LAST_GROUP_BLOCKS_MIN: u64 = 64;

const UUID: [u8; 16] = *b"kiln scratch fs\0";
const HASH_SEED: [u8; 16] = *b"kiln scratch ht\0";

/// The group has no inodes in use: its bitmap and table need not be read.
const GROUP_INODES_UNUSED: u16 = 1;
/// The group has no blocks in use but its own metadata: its bitmap need not be read.
const GROUP_BLOCKS_UNUSED: u16 = 2;
/// The inode table is zeroed: nobody needs to do it later.
const GROUP_TABLE_ZEROED: u16 = 4;

/// Why a scratch disk could not be made.
#[derive(Debug, thiserror::Error)]
pub enum ScratchError {
    /// The caller's fault.
    #[error(
        "a scratch disk of {bytes} bytes is not possible: from {SCRATCH_BYTES_MIN} to {SCRATCH_BYTES_MAX} is"
    )]
    Size {
        /// What was asked for.
        bytes: u64,
    },
    /// The file failed; the host's fault.
    #[error("the scratch disk could not be written")]
    Io(#[from] io::Error),
}

/// Makes `file` an empty ext4 file system of `bytes`, rounded down to 4096; what it held is gone.
///
/// The file is sparse: a few dozen KiB are written whatever the size, and nothing is synced.
///
/// # Errors
/// [`ScratchError`].
pub fn scratch(file: &File, bytes: u64) -> Result<(), ScratchError> {
    if !(SCRATCH_BYTES_MIN..=SCRATCH_BYTES_MAX).contains(&bytes) {
        return Err(ScratchError::Size { bytes });
    }
    let shape = Shape::new(bytes / BLOCK_BYTES);
    file.set_len(0)?;
    file.set_len(bytes / BLOCK_BYTES * BLOCK_BYTES)?;
    let put = |block: u64, bytes: &[u8]| file.write_all_at(bytes, block * BLOCK_BYTES);

    let descriptors: Vec<Descriptor> = (0..shape.groups).map(|group| shape.descriptor(group)).collect();
    for (group, descriptor) in descriptors.iter().enumerate() {
        let bitmap = shape.block_bitmap(group as u64);
        if descriptor.flags & GROUP_BLOCKS_UNUSED == 0 && bitmap.iter().any(|&b| b != 0) {
            put(descriptor.block_bitmap, &bitmap)?;
        }
    }
    put(descriptors[0].inode_bitmap, &shape.inode_bitmap())?;
    put(descriptors[0].inode_table, &shape.inodes())?;
    put(shape.root(), &root())?;
    for (place, inode) in (1..).zip(directory_inodes()) {
        put(shape.root() + place, &directory(&[(inode, "."), (ROOT_INODE, "..")]))?;
    }
    let table: Vec<u8> =
        descriptors.iter().enumerate().flat_map(|(group, it)| it.encode(group as u32)).collect();
    put(1, &table)?;
    // Last, so that a file system half written is none.
    file.write_all_at(&shape.superblock(&descriptors), 1024)?;
    Ok(())
}

/// Where everything is.
///
/// The first group of every sixteen has the metadata of all of them; the very first also has, after that, the
/// directories.
struct Shape {
    blocks: u64,
    groups: u64,
    inodes_per_group: u64,
}

impl Shape {
    fn new(blocks: u64) -> Self {
        let groups = blocks.div_ceil(GROUP_BLOCKS);
        let inodes_per_group =
            (blocks * BLOCK_BYTES / BYTES_PER_INODE).div_ceil(groups).next_multiple_of(INODES_PER_BLOCK);
        let shape = Self { blocks, groups, inodes_per_group };
        let last = blocks - (groups - 1) * GROUP_BLOCKS;
        if groups > 1 && last < 2 + shape.table_blocks() + LAST_GROUP_BLOCKS_MIN {
            return Self::new(blocks - last);
        }
        shape
    }

    fn table_blocks(&self) -> u64 {
        self.inodes_per_group / INODES_PER_BLOCK
    }

    fn descriptor_blocks(&self) -> u64 {
        (self.groups * DESCRIPTOR_BYTES).div_ceil(BLOCK_BYTES)
    }

    fn group_blocks(&self, group: u64) -> u64 {
        (self.blocks - group * GROUP_BLOCKS).min(GROUP_BLOCKS)
    }

    /// How many groups have their metadata where `group` has.
    fn flex_groups(&self, group: u64) -> u64 {
        (self.groups - group / FLEX_GROUPS * FLEX_GROUPS).min(FLEX_GROUPS)
    }

    /// Where the metadata of `group`'s sixteen starts.
    fn flex_start(&self, group: u64) -> u64 {
        let leader = group / FLEX_GROUPS * FLEX_GROUPS;
        if leader == 0 { 1 + self.descriptor_blocks() } else { leader * GROUP_BLOCKS }
    }

    /// Where it ends.
    fn flex_end(&self, group: u64) -> u64 {
        self.flex_start(group) + self.flex_groups(group) * (2 + self.table_blocks())
    }

    fn root(&self) -> u64 {
        self.flex_end(0)
    }

    /// How many blocks from a group's start are in use.
    fn used_blocks(&self, group: u64) -> u64 {
        match group {
            0 => self.root() + 1 + DIRECTORIES.len() as u64,
            _ if group.is_multiple_of(FLEX_GROUPS) => self.flex_end(group) - group * GROUP_BLOCKS,
            _ => 0,
        }
    }

    fn descriptor(&self, group: u64) -> Descriptor {
        let (start, count, member) = (self.flex_start(group), self.flex_groups(group), group % FLEX_GROUPS);
        let used = if group == 0 { USED_INODES } else { 0 };
        let mut flags = GROUP_TABLE_ZEROED;
        if group != 0 {
            flags |= GROUP_INODES_UNUSED;
        }
        // The last group's bitmap is always there, as it marks where the group ends.
        if !group.is_multiple_of(FLEX_GROUPS) && group != self.groups - 1 {
            flags |= GROUP_BLOCKS_UNUSED;
        }
        Descriptor {
            block_bitmap: start + member,
            inode_bitmap: start + count + member,
            inode_table: start + 2 * count + member * self.table_blocks(),
            free_blocks: self.group_blocks(group) - self.used_blocks(group),
            free_inodes: self.inodes_per_group - used,
            directories: if group == 0 { 1 + DIRECTORIES.len() as u16 } else { 0 },
            flags,
        }
    }

    fn block_bitmap(&self, group: u64) -> Vec<u8> {
        bitmap(self.used_blocks(group), self.group_blocks(group))
    }

    fn inode_bitmap(&self) -> Vec<u8> {
        bitmap(USED_INODES, self.inodes_per_group)
    }

    /// The first block of the inode table.
    fn inodes(&self) -> Vec<u8> {
        let mut table = vec![0; BLOCK_BYTES as usize];
        let mut put = |number: u32, mode: u16, links: u16, block: u64| {
            let at = (u64::from(number - 1) * INODE_BYTES) as usize;
            directory_inode(&mut table[at..at + INODE_BYTES as usize], mode, links, block);
        };
        put(ROOT_INODE, 0o040_755, 2 + DIRECTORIES.len() as u16, self.root());
        for (place, (number, name)) in (1..).zip(directory_inodes().zip(DIRECTORIES)) {
            let mode = if name == UPPER { 0o040_755 } else { 0o040_700 };
            put(number, mode, 2, self.root() + place);
        }
        table
    }

    fn superblock(&self, descriptors: &[Descriptor]) -> Vec<u8> {
        let free_blocks: u64 = descriptors.iter().map(|it| it.free_blocks).sum();
        let free_inodes: u64 = descriptors.iter().map(|it| it.free_inodes).sum();
        // Everything but the directories.
        let overhead = self.blocks - free_blocks - 1 - DIRECTORIES.len() as u64;
        let mut out = vec![0; 1024];
        put32(&mut out, 0x00, self.inodes_per_group * self.groups);
        put32(&mut out, 0x04, self.blocks);
        put32(&mut out, 0x0c, free_blocks);
        put32(&mut out, 0x10, free_inodes);
        put32(&mut out, 0x18, 2); // block size 1024 << 2
        put32(&mut out, 0x1c, 2);
        put32(&mut out, 0x20, GROUP_BLOCKS);
        put32(&mut out, 0x24, GROUP_BLOCKS);
        put32(&mut out, 0x28, self.inodes_per_group);
        put16(&mut out, 0x36, 0xffff); // mounts until a check: never
        put16(&mut out, 0x38, 0xef53); // magic
        put16(&mut out, 0x3a, 1); // clean
        put16(&mut out, 0x3c, 1); // on errors, continue
        put32(&mut out, 0x4c, 1); // revision
        put32(&mut out, 0x54, OWN_INODES + 1); // the first that is not its own
        put16(&mut out, 0x58, INODE_BYTES as u16);
        put32(&mut out, 0x5c, 0x228); // xattrs, directory index, sparse_super2 (with no backups)
        put32(&mut out, 0x60, 0x242); // file types, extents, flex groups
        put32(&mut out, 0x64, 0x7b); // sparse, large and huge files, descriptor checksums, many links, large inodes
        out[0x68..0x78].copy_from_slice(&UUID);
        out[0xec..0xfc].copy_from_slice(&HASH_SEED);
        out[0xfc] = 1; // half MD4
        put32(&mut out, 0x100, 0xc); // mount options: user xattrs, ACLs
        put16(&mut out, 0x15c, 32); // extra inode size, least and wanted
        put16(&mut out, 0x15e, 32);
        put32(&mut out, 0x160, 1); // directory hashes take signed bytes
        out[0x174] = FLEX_GROUPS.ilog2() as u8;
        put32(&mut out, 0x248, overhead);
        out
    }
}

struct Descriptor {
    block_bitmap: u64,
    inode_bitmap: u64,
    inode_table: u64,
    free_blocks: u64,
    free_inodes: u64,
    directories: u16,
    flags: u16,
}

impl Descriptor {
    fn encode(&self, group: u32) -> Vec<u8> {
        let mut out = vec![0; DESCRIPTOR_BYTES as usize];
        put32(&mut out, 0x00, self.block_bitmap);
        put32(&mut out, 0x04, self.inode_bitmap);
        put32(&mut out, 0x08, self.inode_table);
        // Each at most 32,768.
        put16(&mut out, 0x0c, self.free_blocks as u16);
        put16(&mut out, 0x0e, self.free_inodes as u16);
        put16(&mut out, 0x10, self.directories);
        put16(&mut out, 0x12, self.flags);
        // Inodes at the table's end that were never used; the first group's are those after the own ones.
        put16(&mut out, 0x1c, self.free_inodes as u16);
        let sum = crc16(crc16(crc16(0xffff, &UUID), &group.to_le_bytes()), &out[..0x1e]);
        put16(&mut out, 0x1e, sum);
        out
    }
}

/// A bitmap whose first `used` bits are set, and those from `size` on, which stand for nothing.
fn bitmap(used: u64, size: u64) -> Vec<u8> {
    let mut bits = vec![0u8; BLOCK_BYTES as usize];
    for bit in (0..used).chain(size..BLOCK_BYTES * 8) {
        bits[(bit / 8) as usize] |= 1 << (bit % 8);
    }
    bits
}

/// The inode of a directory of one block.
fn directory_inode(out: &mut [u8], mode: u16, links: u16, block: u64) {
    put16(out, 0x00, mode);
    put32(out, 0x04, BLOCK_BYTES);
    put16(out, 0x1a, links);
    put32(out, 0x1c, BLOCK_BYTES / 512);
    put32(out, 0x20, 0x8_0000); // has extents
    put16(out, 0x28, 0xf30a); // extent header: magic, one of at most four, a leaf
    put16(out, 0x2a, 1);
    put16(out, 0x2c, 4);
    // The extent: one block, from logical block 0.
    put16(out, 0x38, 1);
    put32(out, 0x3c, block);
    put16(out, 0x80, 32); // extra size
}

fn directory_inodes() -> impl Iterator<Item = u32> {
    OWN_INODES as u32 + 1..=USED_INODES as u32
}

/// The root's only block.
fn root() -> Vec<u8> {
    let own = [(ROOT_INODE, "."), (ROOT_INODE, "..")];
    directory(&own.into_iter().chain(directory_inodes().zip(DIRECTORIES)).collect::<Vec<_>>())
}

/// A directory's only block; its entries are directories.
fn directory(entries: &[(u32, &str)]) -> Vec<u8> {
    let mut out = vec![0; BLOCK_BYTES as usize];
    let mut at = 0;
    for (index, &(number, name)) in entries.iter().enumerate() {
        let length =
            if index + 1 == entries.len() { out.len() - at } else { (8 + name.len()).next_multiple_of(4) };
        put32(&mut out, at, u64::from(number));
        put16(&mut out, at + 4, length as u16);
        out[at + 6] = name.len() as u8;
        out[at + 7] = 2;
        out[at + 8..at + 8 + name.len()].copy_from_slice(name.as_bytes());
        at += length;
    }
    out
}

fn put16(out: &mut [u8], at: usize, value: u16) {
    out[at..at + 2].copy_from_slice(&value.to_le_bytes());
}

/// Block and inode counts here are all below 2^32.
fn put32(out: &mut [u8], at: usize, value: u64) {
    out[at..at + 4].copy_from_slice(&(value as u32).to_le_bytes());
}

/// CRC-16 with the reflected polynomial 0x8005, as group descriptors have it.
fn crc16(mut crc: u16, bytes: &[u8]) -> u16 {
    for &byte in bytes {
        crc ^= u16::from(byte);
        for _ in 0..8 {
            crc = if crc & 1 == 1 { (crc >> 1) ^ 0xa001 } else { crc >> 1 };
        }
    }
    crc
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn crc16_is_the_one_called_arc() {
        assert_eq!(crc16(0, b"123456789"), 0xbb3d);
    }

    #[test]
    fn metadata_of_sixteen_groups_fits_into_the_first_whatever_the_size() {
        for blocks in (4096..3_000_000).step_by(997).chain([SCRATCH_BYTES_MAX / BLOCK_BYTES]) {
            let shape = Shape::new(blocks);
            for group in (0..shape.groups).step_by(FLEX_GROUPS as usize) {
                assert!(
                    shape.used_blocks(group) < shape.group_blocks(group),
                    "{blocks} blocks, group {group}"
                );
            }
        }
    }

    #[test]
    fn sizes_out_of_range_are_refused_before_the_file_is_touched() {
        let file = tempfile::tempfile().unwrap();
        file.set_len(7).unwrap();
        for bytes in [0, SCRATCH_BYTES_MIN - 1, SCRATCH_BYTES_MAX + 1, u64::MAX] {
            assert!(matches!(scratch(&file, bytes), Err(ScratchError::Size { .. })));
        }
        assert_eq!(file.metadata().unwrap().len(), 7);
    }
}
