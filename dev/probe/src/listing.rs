//! A tree of files as text: one line a file, sorted, with everything a copy can lose.

use std::collections::HashMap;
use std::ffi::{CString, OsString};
use std::fmt::Write as _;
use std::fs::{File, Metadata};
use std::io::{self, BufWriter, Read as _, Write as _};
use std::os::unix::ffi::OsStrExt as _;
use std::os::unix::fs::{FileTypeExt as _, MetadataExt as _};
use std::path::{Path, PathBuf};

use sha2::{Digest as _, Sha256};

/// Bytes read at once when data is digested.
const READ_BYTES: usize = 1 << 20;
/// The most bytes of a list of attribute names or of a value. xattr(7): 64 KiB each.
const XATTR_BYTES: usize = 64 << 10;

/// Prints each tree. Paths are printed from the named directory on, so that two trees compare wherever they lie.
pub(crate) fn print(trees: &[OsString]) -> io::Result<()> {
    let mut out = BufWriter::new(io::stdout().lock());
    for tree in trees {
        let mut lister = Lister { root: PathBuf::from(tree), first_names: HashMap::new() };
        lister.walk(Path::new(""), &mut out)?;
    }
    out.flush()
}

struct Lister {
    root: PathBuf,
    /// Inodes with several names → the first name in sorted order.
    first_names: HashMap<(u64, u64), String>,
}

impl Lister {
    fn walk(&mut self, path: &Path, out: &mut impl io::Write) -> io::Result<()> {
        let real = self.root.join(path);
        let metadata = std::fs::symlink_metadata(&real)?;
        let line = self.line(path, &real, &metadata)?;
        writeln!(out, "{line}")?;
        if metadata.is_dir() {
            let mut names = std::fs::read_dir(&real)?
                .map(|entry| Ok(entry?.file_name()))
                .collect::<io::Result<Vec<_>>>()?;
            names.sort();
            for name in names {
                self.walk(&path.join(name), out)?;
            }
        }
        Ok(())
    }

    fn line(&mut self, path: &Path, real: &Path, metadata: &Metadata) -> io::Result<String> {
        let name = printable(path.as_os_str().as_bytes());
        let kind = metadata.file_type();
        let what = if kind.is_dir() {
            "dir".to_owned()
        } else if kind.is_symlink() {
            format!("link {}", printable(std::fs::read_link(real)?.as_os_str().as_bytes()))
        } else if kind.is_file() {
            format!("file {} {}", metadata.len(), digest(real)?)
        } else if kind.is_fifo() {
            "fifo".to_owned()
        } else if kind.is_socket() {
            "socket".to_owned()
        } else {
            let device = metadata.rdev();
            let (major, minor) = (rustix::fs::major(device), rustix::fs::minor(device));
            format!("{} {major}:{minor}", if kind.is_char_device() { "char" } else { "block" })
        };
        let mut line = format!(
            "/{name} {what} mode {:o} owner {}:{} mtime {}.{:09}",
            metadata.mode() & 0o7777,
            metadata.uid(),
            metadata.gid(),
            metadata.mtime(),
            metadata.mtime_nsec()
        );
        if !kind.is_dir() && metadata.nlink() > 1 {
            let first =
                self.first_names.entry((metadata.dev(), metadata.ino())).or_insert_with(|| name.clone());
            let _ = write!(line, " names {} first /{first}", metadata.nlink());
        }
        for (attribute, value) in attributes(real)? {
            let _ = write!(line, " xattr {attribute}={value}");
        }
        Ok(line)
    }
}

fn digest(path: &Path) -> io::Result<String> {
    let mut file = File::open(path)?;
    let mut hasher = Sha256::new();
    let mut buffer = vec![0; READ_BYTES];
    loop {
        let count = file.read(&mut buffer)?;
        if count == 0 {
            return Ok(hex(&hasher.finalize()));
        }
        hasher.update(&buffer[..count]);
    }
}

/// The extended attributes in order of name, but for those by which overlayfs and `SELinux` keep their own books.
fn attributes(path: &Path) -> io::Result<Vec<(String, String)>> {
    let mut names = vec![0_u8; XATTR_BYTES];
    let length = match rustix::fs::llistxattr(path, &mut names) {
        Ok(length) => length,
        Err(rustix::io::Errno::OPNOTSUPP) => return Ok(Vec::new()),
        Err(errno) => return Err(errno.into()),
    };
    let mut found = Vec::new();
    for name in names[..length].split(|byte| *byte == 0).filter(|name| !name.is_empty()) {
        if name.starts_with(b"trusted.overlay.") || name == b"security.selinux" {
            continue;
        }
        let key = CString::new(name).map_err(io::Error::other)?;
        let mut value = vec![0_u8; XATTR_BYTES];
        let length = rustix::fs::lgetxattr(path, &key, &mut value)?;
        found.push((printable(name), hex(&value[..length])));
    }
    found.sort();
    Ok(found)
}

/// Bytes as text on one line: what is no visible ASCII is `\xNN`, and so are space and backslash.
fn printable(bytes: &[u8]) -> String {
    let mut text = String::new();
    for byte in bytes {
        if byte.is_ascii_graphic() && *byte != b'\\' {
            text.push(char::from(*byte));
        } else {
            let _ = write!(text, "\\x{byte:02x}");
        }
    }
    text
}

fn hex(bytes: &[u8]) -> String {
    let mut text = String::with_capacity(bytes.len() * 2);
    for byte in bytes {
        let _ = write!(text, "{byte:02x}");
    }
    text
}
