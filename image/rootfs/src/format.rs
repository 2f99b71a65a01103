//! EROFS on-disk structures, as far as our images use them. Linux Documentation/filesystems/erofs.rst, "On-disk
//! details"; field places from `fs/erofs/erofs_fs.h`. All numbers are little-endian.

use crate::tree::Time;

/// Where the superblock is, in bytes.
pub(crate) const SUPERBLOCK_OFFSET: usize = 1024;
/// Its size without extensions, in bytes.
pub(crate) const SUPERBLOCK_BYTES: usize = 128;
/// An inode's number is its place in the metadata in units of this many bytes.
pub(crate) const SLOT_BYTES: u64 = 32;
/// An inode without its own time, of a small file of a small owner.
pub(crate) const COMPACT_BYTES: u64 = 32;
/// An inode with everything.
pub(crate) const EXTENDED_BYTES: u64 = 64;
/// A directory entry without its name.
pub(crate) const DIRENT_BYTES: usize = 12;
/// What precedes an inode's attributes.
pub(crate) const XATTR_HEADER_BYTES: usize = 12;

const MAGIC: u32 = 0xe0f5_e1e2;
const BLOCK_BITS: u8 = 12;
/// Inode times are modification times.
const COMPAT_MTIME: u32 = 2;
/// Some files are in chunks.
const INCOMPAT_CHUNKED_FILE: u32 = 4;

/// How a file's data is found.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum DataLayout {
    /// In blocks in a row.
    Plain = 0,
    /// As plain, but the last, partial block is right after the inode.
    Inline = 2,
    /// In chunks, by a map after the inode.
    Chunks = 4,
}

/// What the superblock says.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Superblock {
    pub(crate) root_nid: u16,
    pub(crate) inodes: u64,
    /// The time of compact inodes.
    pub(crate) time: Time,
    /// Blocks of the whole image.
    pub(crate) blocks: u32,
    /// Where inode numbers count from.
    pub(crate) metadata_block: u32,
    /// Where shared attributes' numbers count from.
    pub(crate) xattr_block: u32,
    pub(crate) chunked: bool,
}

impl Superblock {
    /// As stored. No checksum: the whole image is verified by digest, and mounting it costs the guest less.
    pub(crate) fn encode(&self) -> [u8; SUPERBLOCK_BYTES] {
        let mut bytes = [0; SUPERBLOCK_BYTES];
        let mut put = |at: usize, field: &[u8]| bytes[at..at + field.len()].copy_from_slice(field);
        put(0, &MAGIC.to_le_bytes());
        put(8, &COMPAT_MTIME.to_le_bytes());
        put(12, &[BLOCK_BITS]);
        put(14, &self.root_nid.to_le_bytes());
        put(16, &self.inodes.to_le_bytes());
        put(24, &self.time.secs.to_le_bytes());
        put(32, &self.time.nanos.to_le_bytes());
        put(36, &self.blocks.to_le_bytes());
        put(40, &self.metadata_block.to_le_bytes());
        put(44, &self.xattr_block.to_le_bytes());
        put(80, &(if self.chunked { INCOMPAT_CHUNKED_FILE } else { 0 }).to_le_bytes());
        bytes
    }

    /// Reads one of an image of ours; `None` for anything else, other EROFS images too.
    pub(crate) fn decode(bytes: &[u8; SUPERBLOCK_BYTES]) -> Option<Self> {
        let superblock = Self {
            root_nid: le16(bytes, 14),
            inodes: le64(bytes, 16),
            time: Time { secs: le64(bytes, 24).cast_signed(), nanos: le32(bytes, 32) },
            blocks: le32(bytes, 36),
            metadata_block: le32(bytes, 40),
            xattr_block: le32(bytes, 44),
            chunked: le32(bytes, 80) & INCOMPAT_CHUNKED_FILE != 0,
        };
        (superblock.encode() == *bytes).then_some(superblock)
    }
}

/// What an inode says, besides its attributes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Inode {
    pub(crate) layout: DataLayout,
    /// Type and permissions, as `st_mode`.
    pub(crate) mode: u16,
    pub(crate) links: u32,
    pub(crate) uid: u32,
    pub(crate) gid: u32,
    /// `None`: the superblock's, in a compact inode.
    pub(crate) time: Option<Time>,
    /// Size in bytes.
    pub(crate) bytes: u64,
    /// The first block, the packed device number, or the chunk size's bits.
    pub(crate) place: u32,
    /// The size of the attributes, in the form EROFS counts them: 0, or 1 and the words after their header.
    pub(crate) xattr_count: u16,
    /// A number for 32-bit programs.
    pub(crate) serial: u32,
}

impl Inode {
    /// Whether the short form holds all of this.
    pub(crate) fn is_compact(&self) -> bool {
        self.time.is_none()
            && u32::try_from(self.bytes).is_ok()
            && u16::try_from(self.links).is_ok()
            && u16::try_from(self.uid).is_ok()
            && u16::try_from(self.gid).is_ok()
    }

    /// Writes it to the start of `out`; the size is that of the form [`Self::is_compact`] tells.
    pub(crate) fn encode(&self, out: &mut [u8], time: Time) {
        let mut put = |at: usize, field: &[u8]| out[at..at + field.len()].copy_from_slice(field);
        let compact = self.is_compact();
        let format = (self.layout as u16) << 1 | u16::from(!compact);
        put(0, &format.to_le_bytes());
        put(2, &self.xattr_count.to_le_bytes());
        put(4, &self.mode.to_le_bytes());
        put(16, &self.place.to_le_bytes());
        put(20, &self.serial.to_le_bytes());
        if compact {
            put(6, &(self.links as u16).to_le_bytes());
            put(8, &(self.bytes as u32).to_le_bytes());
            put(24, &(self.uid as u16).to_le_bytes());
            put(26, &(self.gid as u16).to_le_bytes());
        } else {
            let time = self.time.unwrap_or(time);
            put(8, &self.bytes.to_le_bytes());
            put(24, &self.uid.to_le_bytes());
            put(28, &self.gid.to_le_bytes());
            put(32, &time.secs.to_le_bytes());
            put(40, &time.nanos.to_le_bytes());
            put(44, &self.links.to_le_bytes());
        }
    }

    /// Reads the inode at the start of `bytes`, and its size without attributes. `None` when it is cut off or of a
    /// form that our images do not have.
    pub(crate) fn decode(bytes: &[u8]) -> Option<(Self, usize)> {
        let format = le16(bytes.get(..COMPACT_BYTES as usize)?, 0);
        let layout = match format >> 1 {
            0 => DataLayout::Plain,
            2 => DataLayout::Inline,
            4 => DataLayout::Chunks,
            _ => return None,
        };
        let common = Self {
            layout,
            mode: le16(bytes, 4),
            links: u32::from(le16(bytes, 6)),
            uid: u32::from(le16(bytes, 24)),
            gid: u32::from(le16(bytes, 26)),
            time: None,
            bytes: u64::from(le32(bytes, 8)),
            place: le32(bytes, 16),
            xattr_count: le16(bytes, 2),
            serial: le32(bytes, 20),
        };
        if format & 1 == 0 {
            return Some((common, COMPACT_BYTES as usize));
        }
        let bytes = bytes.get(..EXTENDED_BYTES as usize)?;
        let time = Time { secs: le64(bytes, 32).cast_signed(), nanos: le32(bytes, 40) };
        let inode = Self {
            links: le32(bytes, 44),
            uid: le32(bytes, 24),
            gid: le32(bytes, 28),
            time: Some(time),
            bytes: le64(bytes, 8),
            ..common
        };
        Some((inode, EXTENDED_BYTES as usize))
    }
}

/// A directory entry without its name, as stored.
pub(crate) fn dirent(nid: u64, name_offset: u16, file_type: u8) -> [u8; DIRENT_BYTES] {
    let mut bytes = [0; DIRENT_BYTES];
    bytes[..8].copy_from_slice(&nid.to_le_bytes());
    bytes[8..10].copy_from_slice(&name_offset.to_le_bytes());
    bytes[10] = file_type;
    bytes
}

/// The number at `at`, which must be inside.
pub(crate) fn le16(bytes: &[u8], at: usize) -> u16 {
    u16::from_le_bytes([bytes[at], bytes[at + 1]])
}

/// The number at `at`, which must be inside.
pub(crate) fn le32(bytes: &[u8], at: usize) -> u32 {
    u32::from_le_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]])
}

/// The number at `at`, which must be inside.
pub(crate) fn le64(bytes: &[u8], at: usize) -> u64 {
    u64::from(le32(bytes, at)) | u64::from(le32(bytes, at + 4)) << 32
}

/// File type bits of `st_mode`.
pub(crate) mod mode {
    pub(crate) const TYPE: u16 = 0o170_000;
    pub(crate) const FIFO: u16 = 0o010_000;
    pub(crate) const CHAR: u16 = 0o020_000;
    pub(crate) const DIRECTORY: u16 = 0o040_000;
    pub(crate) const BLOCK: u16 = 0o060_000;
    pub(crate) const FILE: u16 = 0o100_000;
    pub(crate) const SYMLINK: u16 = 0o120_000;
    pub(crate) const SOCKET: u16 = 0o140_000;
}

/// A device number as Linux packs it into 32 bits.
pub(crate) fn pack_device(major: u32, minor: u32) -> u32 {
    (minor & 0xff) | (major << 8) | ((minor & !0xff) << 12)
}

/// The major and minor number of a packed device number.
pub(crate) fn unpack_device(packed: u32) -> (u32, u32) {
    ((packed >> 8) & 0xfff, (packed & 0xff) | ((packed >> 12) & 0xfff00))
}
