//! Tar archives byte by byte, so that they can say what no well-behaved tool would.

/// Bytes of a tar record.
const BLOCK_BYTES: usize = 512;
/// The longest name or link target a plain header holds.
const NAME_BYTES: usize = 100;

/// A tar archive under construction: entries appear in the order in which they are added.
#[derive(Clone, Debug, Default)]
pub struct Tar(Vec<u8>);

/// One entry. Start from [`Entry::file`] and the like, change what matters, and [`Tar::with`] it.
#[derive(Clone, Debug)]
pub struct Entry {
    /// The name as it stands in the archive; nothing is cleaned.
    pub name: Vec<u8>,
    /// The type flag of POSIX ustar.
    pub kind: u8,
    /// The permission bits.
    pub mode: u32,
    /// Owner and group.
    pub owner: (u32, u32),
    /// Seconds since 1970.
    pub mtime: u64,
    /// The target of a link.
    pub link: Vec<u8>,
    /// Major and minor number of a device.
    pub device: (u32, u32),
    /// PAX records that go before the entry, such as extended attributes.
    pub pax: Vec<(String, Vec<u8>)>,
    /// The data of a file.
    pub data: Vec<u8>,
}

impl Entry {
    fn new(kind: u8, name: impl AsRef<[u8]>, mode: u32) -> Self {
        Self {
            name: name.as_ref().to_vec(),
            kind,
            mode,
            owner: (0, 0),
            mtime: 1_600_000_000,
            link: Vec::new(),
            device: (0, 0),
            pax: Vec::new(),
            data: Vec::new(),
        }
    }

    /// A regular file, mode 644.
    pub fn file(name: impl AsRef<[u8]>, data: impl AsRef<[u8]>) -> Self {
        Self { data: data.as_ref().to_vec(), ..Self::new(b'0', name, 0o644) }
    }

    /// A directory, mode 755.
    pub fn dir(name: impl AsRef<[u8]>) -> Self {
        Self::new(b'5', name, 0o755)
    }

    /// A symbolic link.
    pub fn symlink(name: impl AsRef<[u8]>, target: impl AsRef<[u8]>) -> Self {
        Self { link: target.as_ref().to_vec(), ..Self::new(b'2', name, 0o777) }
    }

    /// Another name of an entry before.
    pub fn hard_link(name: impl AsRef<[u8]>, first: impl AsRef<[u8]>) -> Self {
        Self { link: first.as_ref().to_vec(), ..Self::new(b'1', name, 0o644) }
    }

    /// A named pipe.
    pub fn fifo(name: impl AsRef<[u8]>) -> Self {
        Self::new(b'6', name, 0o644)
    }

    /// A character device.
    pub fn char_device(name: impl AsRef<[u8]>, major: u32, minor: u32) -> Self {
        Self { device: (major, minor), ..Self::new(b'3', name, 0o600) }
    }

    /// A block device.
    pub fn block_device(name: impl AsRef<[u8]>, major: u32, minor: u32) -> Self {
        Self { device: (major, minor), ..Self::new(b'4', name, 0o600) }
    }

    /// An empty file, as whiteouts and opaque markers are. OCI image specification, "Image Layer Filesystem Changeset".
    pub fn marker(name: impl AsRef<[u8]>) -> Self {
        Self::file(name, b"")
    }

    /// The same with other permission bits.
    #[must_use]
    pub fn mode(self, mode: u32) -> Self {
        Self { mode, ..self }
    }

    /// The same with another owner.
    #[must_use]
    pub fn owner(self, user: u32, group: u32) -> Self {
        Self { owner: (user, group), ..self }
    }

    /// The same with another time of change.
    #[must_use]
    pub fn mtime(self, mtime: u64) -> Self {
        Self { mtime, ..self }
    }

    /// The same with one more PAX record.
    #[must_use]
    pub fn pax(mut self, key: &str, value: impl AsRef<[u8]>) -> Self {
        self.pax.push((key.to_owned(), value.as_ref().to_vec()));
        self
    }

    /// The same with an extended attribute, in the form in which Docker and GNU tar write it.
    #[must_use]
    pub fn xattr(self, name: &str, value: impl AsRef<[u8]>) -> Self {
        self.pax(&format!("SCHILY.xattr.{name}"), value)
    }
}

impl Tar {
    /// An archive without entries.
    pub fn new() -> Self {
        Self::default()
    }

    /// Adds an entry; names and targets too long for a plain header get GNU's long records before it.
    #[must_use]
    pub fn with(mut self, entry: &Entry) -> Self {
        if !entry.pax.is_empty() {
            let records: Vec<u8> = entry.pax.iter().flat_map(|(key, value)| pax_record(key, value)).collect();
            self.raw(&Entry { kind: b'x', ..Entry::file("pax", &records) });
        }
        for (kind, text) in [(b'L', &entry.name), (b'K', &entry.link)] {
            if text.len() > NAME_BYTES {
                self.raw(&Entry { kind, ..Entry::file("././@LongLink", [&text[..], b"\0"].concat()) });
            }
        }
        self.raw(entry);
        self
    }

    /// Adds the entries of an archive that another tool wrote.
    #[must_use]
    pub fn append_archive(mut self, archive: &[u8]) -> Self {
        // The end is two blocks of zeros, and tools pad after it.
        let end = archive.iter().rposition(|byte| *byte != 0).map_or(0, |last| last + 1);
        self.0.extend_from_slice(&archive[..end]);
        self.0.resize(self.0.len().next_multiple_of(BLOCK_BYTES), 0);
        self
    }

    /// The bytes with the end of the archive.
    pub fn finish(mut self) -> Vec<u8> {
        self.0.resize(self.0.len() + 2 * BLOCK_BYTES, 0);
        self.0
    }

    /// The bytes without the end, as an archive that was cut off.
    pub fn unfinished(self) -> Vec<u8> {
        self.0
    }

    fn raw(&mut self, entry: &Entry) {
        let mut header = [0_u8; BLOCK_BYTES];
        let mut put = |at: usize, bytes: &[u8]| header[at..at + bytes.len()].copy_from_slice(bytes);
        put(0, &entry.name[..entry.name.len().min(NAME_BYTES)]);
        put(100, &number(entry.mode.into(), 8));
        put(108, &number(entry.owner.0.into(), 8));
        put(116, &number(entry.owner.1.into(), 8));
        put(124, &number(entry.data.len() as u64, 12));
        put(136, &number(entry.mtime, 12));
        put(148, b"        ");
        put(156, &[entry.kind]);
        put(157, &entry.link[..entry.link.len().min(NAME_BYTES)]);
        put(257, b"ustar  \0");
        put(329, &number(entry.device.0.into(), 8));
        put(337, &number(entry.device.1.into(), 8));
        let sum: u32 = header.iter().map(|byte| u32::from(*byte)).sum();
        header[148..156].copy_from_slice(format!("{sum:06o}\0 ").as_bytes());
        self.0.extend_from_slice(&header);
        self.0.extend_from_slice(&entry.data);
        self.0.resize(self.0.len().next_multiple_of(BLOCK_BYTES), 0);
    }
}

/// A numeric field: octal where it fits, GNU's binary form where not.
fn number(value: u64, width: usize) -> Vec<u8> {
    let text = format!("{value:0digits$o}\0", digits = width - 1);
    if text.len() == width {
        return text.into_bytes();
    }
    let mut bytes = vec![0; width];
    bytes[width - 8..].copy_from_slice(&value.to_be_bytes());
    bytes[0] |= 0x80;
    bytes
}

/// `length key=value\n`, where the length counts itself. POSIX pax, "pax Extended Header".
fn pax_record(key: &str, value: &[u8]) -> Vec<u8> {
    let rest = key.len() + value.len() + 3;
    let mut length = rest + 1;
    while rest + length.to_string().len() != length {
        length = rest + length.to_string().len();
    }
    [format!("{length} {key}=").as_bytes(), value, b"\n"].concat()
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write as _;
    use std::process::{Command, Stdio};

    #[test]
    fn gnu_tar_reads_what_is_written() {
        let long = "d/".to_owned() + &"n".repeat(200);
        let archive = Tar::new()
            .with(&Entry::dir("d/"))
            .with(&Entry::file(&long, "data").mode(0o4755).owner(3_000_000, 7).xattr("user.a", "b"))
            .with(&Entry::symlink("s", "t".repeat(150)))
            .finish();
        let mut tar = Command::new("tar")
            .args(["--numeric-owner", "-tvf", "-"])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .expect("tar is installed");
        tar.stdin.take().expect("piped").write_all(&archive).expect("written");
        let output = tar.wait_with_output().expect("tar ends");
        let listing = String::from_utf8_lossy(&output.stdout).into_owned();
        assert!(output.status.success(), "{listing}");
        assert!(listing.contains(&long) && listing.contains("-rwsr-xr-x 3000000/7"), "{listing}");
        assert!(listing.contains(&format!("s -> {}", "t".repeat(150))), "{listing}");
    }
}
