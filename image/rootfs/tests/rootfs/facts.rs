//! What can be said of every file of a tree, from three places: a directory of this machine, an image read by the
//! crate `erofs-rs`, and a model. Trees are the same when these are.

use std::collections::BTreeMap;
use std::fmt;
use std::fs;
use std::hash::{DefaultHasher, Hash as _, Hasher as _};
use std::io::Read;
use std::os::unix::ffi::OsStrExt as _;
use std::os::unix::fs::{FileTypeExt as _, MetadataExt as _, PermissionsExt as _};
use std::path::Path;

use erofs_rs::EroFS;
use erofs_rs::backend::SliceImage;
use rustix::fs::FileType;

/// By path from the root, which itself is the empty path.
pub(crate) type Facts = BTreeMap<Vec<u8>, Fact>;

#[derive(Clone, PartialEq, Eq)]
pub(crate) struct Fact {
    pub(crate) kind: Kind,
    pub(crate) mode: u32,
    pub(crate) owner: (u32, u32),
    pub(crate) mtime: (i64, u32),
    pub(crate) xattrs: BTreeMap<Vec<u8>, Vec<u8>>,
    /// Hard links: how many names, and the first of them.
    pub(crate) links: (u64, Vec<u8>),
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Kind {
    Directory,
    /// Length and digest of the bytes.
    File(u64, u64),
    Symlink(Vec<u8>),
    Char(u32, u32),
    Block(u32, u32),
    Fifo,
    Socket,
}

impl fmt::Debug for Fact {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { kind, mode, owner, mtime, xattrs, links } = self;
        write!(out, "{kind:?} {mode:o} {owner:?} {mtime:?} {} x{}", links.1.escape_ascii(), links.0)?;
        for (name, value) in xattrs {
            let start = value[..value.len().min(20)].escape_ascii();
            write!(out, " {}={start}({})", name.escape_ascii(), value.len())?;
        }
        Ok(())
    }
}

/// What [`Kind::File`] says of these bytes. Zeros are cheap, since files with holes are large.
pub(crate) fn content(mut bytes: impl Read) -> Kind {
    static ZEROS: [u8; 64 << 10] = [0; 64 << 10];
    let mut hasher = DefaultHasher::new();
    let mut buffer = vec![0; ZEROS.len()];
    let mut length = 0;
    loop {
        // Whole buffers, so that the digest does not depend on how the bytes came.
        let mut filled = 0;
        while filled < buffer.len() {
            match bytes.read(&mut buffer[filled..]).unwrap() {
                0 => break,
                more => filled += more,
            }
        }
        if buffer[..filled] != ZEROS[..filled] {
            (length, &buffer[..filled]).hash(&mut hasher);
        }
        length += filled as u64;
        if filled < buffer.len() {
            return Kind::File(length, hasher.finish());
        }
    }
}

/// Of a directory tree of this machine.
pub(crate) fn of_directory(root: &Path) -> Facts {
    let mut found = Vec::new();
    let mut todo = vec![root.to_owned()];
    while let Some(path) = todo.pop() {
        let metadata = fs::symlink_metadata(&path).unwrap();
        let name = path.strip_prefix(root).unwrap().as_os_str().as_bytes().to_vec();
        let file_type = metadata.file_type();
        let device = (rustix::fs::major(metadata.rdev()), rustix::fs::minor(metadata.rdev()));
        let kind = if file_type.is_dir() {
            todo.extend(fs::read_dir(&path).unwrap().map(|entry| entry.unwrap().path()));
            Kind::Directory
        } else if file_type.is_symlink() {
            Kind::Symlink(fs::read_link(&path).unwrap().as_os_str().as_bytes().to_vec())
        } else if file_type.is_file() {
            content(fs::File::open(&path).unwrap())
        } else if file_type.is_char_device() {
            Kind::Char(device.0, device.1)
        } else if file_type.is_block_device() {
            Kind::Block(device.0, device.1)
        } else if file_type.is_fifo() {
            Kind::Fifo
        } else {
            Kind::Socket
        };
        let fact = Fact {
            kind,
            mode: metadata.mode() & 0o7777,
            owner: (metadata.uid(), metadata.gid()),
            mtime: (metadata.mtime(), metadata.mtime_nsec() as u32),
            xattrs: xattrs(&path),
            links: (metadata.nlink(), Vec::new()),
        };
        found.push((name, (metadata.dev(), metadata.ino()), fact));
    }
    with_first_names(found)
}
/// Notes at each file the first of its names: inode numbers differ between trees, names do not. File systems count
/// directories' links in several ways, so theirs say nothing.
fn with_first_names<Key: Ord>(found: Vec<(Vec<u8>, Key, Fact)>) -> Facts {
    let mut names: BTreeMap<&Key, &Vec<u8>> = BTreeMap::new();
    for (name, key, _) in &found {
        let first = names.entry(key).or_insert(name);
        *first = (*first).min(name);
    }
    let firsts: Vec<Vec<u8>> = found.iter().map(|(_, key, _)| names[key].clone()).collect();
    let mut facts = Facts::new();
    for ((name, _, mut fact), first) in found.into_iter().zip(firsts) {
        fact.links = if fact.kind == Kind::Directory { (0, Vec::new()) } else { (fact.links.0, first) };
        facts.insert(name, fact);
    }
    facts
}

fn xattrs(path: &Path) -> BTreeMap<Vec<u8>, Vec<u8>> {
    let mut names = vec![0; 64 << 10];
    let length = rustix::fs::llistxattr(path, &mut names).unwrap();
    let names = names[..length].split(|&b| b == 0).filter(|name| !name.is_empty());
    names
        .map(|name| {
            let mut value = vec![0; 64 << 10];
            let length = rustix::fs::lgetxattr(path, name, &mut value).unwrap();
            value.truncate(length);
            (name.to_vec(), value)
        })
        .collect()
}

/// Of an EROFS image.
pub(crate) fn of_image(image: &[u8]) -> Facts {
    let fs = EroFS::new(SliceImage::new(image)).unwrap();
    let mut found = Vec::new();
    let root = fs.get_inode(fs.super_block().root_inode_id()).unwrap();
    let mut todo = vec![(Vec::new(), root)];
    for entry in fs.walk_dir("/").unwrap() {
        let entry = entry.unwrap();
        let path = entry.dir_entry.path().as_bytes().to_vec();
        todo.push((path.strip_prefix(b"/").unwrap_or(&path).to_vec(), entry.inode));
    }
    for (path, inode) in todo {
        let device = inode.device().unwrap_or_default();
        let kind = match inode.file_type() {
            FileType::Directory => Kind::Directory,
            FileType::RegularFile => content(fs.open_inode_file(inode).unwrap()),
            FileType::Symlink => Kind::Symlink(fs.read_link_inode(inode).unwrap().as_bytes().to_vec()),
            FileType::CharacterDevice => Kind::Char(device.0, device.1),
            FileType::BlockDevice => Kind::Block(device.0, device.1),
            FileType::Fifo => Kind::Fifo,
            _ => Kind::Socket,
        };
        let fact = Fact {
            kind,
            mode: inode.permissions().mode(),
            owner: (inode.uid(), inode.gid()),
            mtime: inode.modified_unix(),
            xattrs: fs.xattrs_inode(inode).unwrap().into_iter().collect(),
            links: (u64::from(inode.nlink()), Vec::new()),
        };
        found.push((path, inode.id(), fact));
    }
    with_first_names(found)
}

/// Fails with the differences alone, since whole trees are long.
#[track_caller]
pub(crate) fn assert_same(ours: &Facts, theirs: &Facts) {
    let mut differences = Vec::new();
    for path in ours.keys().chain(theirs.keys().filter(|path| !ours.contains_key(*path))) {
        let (our, their) = (ours.get(path), theirs.get(path));
        if our != their {
            differences.push(format!("{}\n  ours   {our:?}\n  theirs {their:?}", path.escape_ascii()));
        }
    }
    assert!(
        differences.is_empty(),
        "{} of {} differ:\n{}",
        differences.len(),
        theirs.len(),
        differences.iter().take(10).map(String::as_str).collect::<Vec<_>>().join("\n")
    );
}
