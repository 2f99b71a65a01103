//! Images in files on this machine: OCI layouts in folders and archives, and what `docker save` writes.
//!
//! Nothing is unpacked. A folder is read through names that cannot leave it; an archive is an index of where in the
//! file its members are, and a member's name is only ever looked up, never opened. OCI Image Specification 1.1,
//! "Image Layout".

use std::collections::HashMap;
use std::fs::File;
use std::io::{self, Read, Seek, SeekFrom};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use kiln_support::digest::{Digest, HashingReader};
use rustix::fs::{Mode, OFlags, ResolveFlags};
use serde::Deserialize;

use crate::config::{MAX_CONFIG_BYTES, parse_config};
use crate::layer::Compression;
use crate::manifest::{Document, MAX_LAYERS, MAX_MANIFEST_BYTES, parse_document, write_manifest};
use crate::{ParseReferenceError, PullError, Reference};

/// The most members of an archive.
const MAX_MEMBERS: usize = 100_000;
/// The most bytes of an archive that are not its members' content.
const MAX_HEADER_BYTES: u64 = 96 << 20;
/// The most links from one member of an archive to another that are followed.
const MAX_LINKS: usize = 8;

/// Files by name, confined to a folder or an archive.
#[derive(Debug)]
pub(crate) struct Files {
    path: PathBuf,
    kind: Kind,
    /// Content that is not stored under its digest: the layers and the config of a Docker archive.
    aliases: HashMap<Digest, String>,
    /// Content that is not in the files at all: the manifest made for a Docker archive.
    made: HashMap<Digest, Vec<u8>>,
}

#[derive(Debug)]
enum Kind {
    Folder(File),
    Archive { file: Arc<File>, members: HashMap<String, Member> },
}

#[derive(Debug, Clone)]
enum Member {
    Content { offset: u64, length: u64 },
    Link(String),
}

/// A part of a file, read from its start to its end.
#[derive(Debug)]
pub(crate) struct Part {
    file: Arc<File>,
    offset: u64,
    left: u64,
}

impl Part {
    /// How many bytes are left to read.
    pub(crate) fn left(&self) -> u64 {
        self.left
    }
}

impl Read for Part {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let most = buffer.len().min(usize::try_from(self.left).unwrap_or(usize::MAX));
        let count = self.file.read_at(&mut buffer[..most], self.offset)?;
        self.offset += count as u64;
        self.left -= count as u64;
        Ok(count)
    }
}

/// What a local source has for a name: a manifest or an index, and its digest.
pub(crate) struct Found {
    pub(crate) bytes: Vec<u8>,
    pub(crate) digest: Digest,
}

impl Files {
    /// Opens an OCI layout in a folder.
    pub(crate) fn layout(path: &Path) -> Result<Self, PullError> {
        let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let folder = rustix::fs::open(path, flags, Mode::empty());
        let folder = folder.map_err(io::Error::from).map_err(PullError::file(path))?;
        Ok(Self::new(path, Kind::Folder(folder.into())))
    }

    /// Opens an archive, of either kind.
    pub(crate) fn archive(path: &Path) -> Result<Self, PullError> {
        let file = File::open(path).map_err(PullError::file(path))?;
        if !file.metadata().map_err(PullError::file(path))?.is_file() {
            let why = io::Error::new(io::ErrorKind::InvalidInput, "it is not a regular file");
            return Err(PullError::file(path)(why));
        }
        let members = index(path, &file)?;
        Ok(Self::new(path, Kind::Archive { file: Arc::new(file), members }))
    }

    fn new(path: &Path, kind: Kind) -> Self {
        Self { path: path.to_owned(), kind, aliases: HashMap::new(), made: HashMap::new() }
    }

    /// The manifest or index an OCI layout has under the name, or its only one when no name is given.
    pub(crate) fn find_in_layout(&self, name: Option<&str>) -> Result<Found, PullError> {
        let what = || format!("{} in {}", name.unwrap_or("an image"), self.path.display());
        let bytes = self.small("index.json", MAX_MANIFEST_BYTES)?;
        let malformed = |why: String| PullError::Malformed {
            what: format!("index.json of {}", self.path.display()),
            why,
        };
        let Document::Index(index) =
            parse_document(&bytes, None).map_err(|error| malformed(error.to_string()))?
        else {
            return Err(malformed("it lists no manifests".to_owned()));
        };
        let names = index.entries.iter().filter_map(|entry| entry.ref_name.clone()).collect::<Vec<_>>();
        let mut matching = index.entries.iter().filter(|entry| match (name, &entry.ref_name) {
            (None, _) => true,
            (Some(name), Some(ref_name)) => name == ref_name,
            (Some(_), None) => false,
        });
        let listed = || match names.len() {
            0 => "its images have no names".to_owned(),
            _ => format!("it has {}", names.join(", ")),
        };
        let entry = matching.next().ok_or_else(|| PullError::NotFound { what: what(), why: listed() })?;
        if matching.next().is_some() {
            // Several without a name given can still be one image for several platforms.
            if name.is_none()
                && index.entries.iter().all(|entry| entry.platform.is_some())
                && names.is_empty()
            {
                return Ok(Found { digest: Digest::of(&bytes), bytes });
            }
            let why = format!("several images match, add :NAME to say which; {}", listed());
            return Err(PullError::NotFound { what: what(), why });
        }
        let bytes = self.blob(&entry.blob.digest, MAX_MANIFEST_BYTES)?;
        Ok(Found { bytes, digest: entry.blob.digest })
    }

    /// The image a Docker archive has under the name, or its only one: a manifest is made for it.
    ///
    /// Cost: reading those of its layers once that are compressed, for nothing says their digests.
    pub(crate) fn find_in_docker_archive(&mut self, name: Option<&str>) -> Result<Found, PullError> {
        #[derive(Deserialize)]
        #[serde(rename_all = "PascalCase")]
        struct Item {
            config: String,
            #[serde(default, deserialize_with = "crate::manifest::null_is_default")]
            repo_tags: Vec<String>,
            #[serde(default, deserialize_with = "crate::manifest::null_is_default")]
            layers: Vec<String>,
        }
        let here = self.path.display().to_string();
        let malformed = |why: String| PullError::Malformed { what: format!("manifest.json of {here}"), why };
        let items: Vec<Item> = serde_json::from_slice(&self.small("manifest.json", MAX_MANIFEST_BYTES)?)
            .map_err(|error| malformed(error.to_string()))?;
        let wanted = name.map(full_name).transpose().map_err(|error| PullError::Name(error.into()))?;
        let mut matching = items.iter().filter(|item| match &wanted {
            None => true,
            Some(wanted) => item.repo_tags.iter().any(|tag| full_name(tag).is_ok_and(|tag| tag == *wanted)),
        });
        let what = || format!("{} in {here}", name.unwrap_or("an image"));
        let listed = || {
            let tags: Vec<&str> = items.iter().flat_map(|item| &item.repo_tags).map(String::as_str).collect();
            if tags.is_empty() {
                "its images have no names".to_owned()
            } else {
                format!("it has {}", tags.join(", "))
            }
        };
        let item = matching.next().ok_or_else(|| PullError::NotFound { what: what(), why: listed() })?;
        if matching.next().is_some() {
            let why = format!("several images match, add :NAME to say which; {}", listed());
            return Err(PullError::NotFound { what: what(), why });
        }
        if item.layers.len() > MAX_LAYERS {
            let why = format!("it has {} layers, at most {MAX_LAYERS} are supported", item.layers.len());
            return Err(PullError::Unsupported { what: what(), why });
        }

        let config = self.small(&item.config, MAX_CONFIG_BYTES)?;
        let config_digest = Digest::of(&config);
        let diff_ids =
            parse_config(&config).map_err(|error| malformed(format!("the config: {error}")))?.diff_ids;
        if diff_ids.len() != item.layers.len() {
            return Err(malformed(format!(
                "{} layers, the config says {}",
                item.layers.len(),
                diff_ids.len()
            )));
        }
        let mut layers = Vec::new();
        let mut aliases = vec![(config_digest, item.config.clone())];
        for (layer, diff_id) in item.layers.iter().zip(diff_ids) {
            let mut part = self.open(layer)?;
            let length = part.left();
            let mut magic = [0; 4];
            let known = part.file.read_at(&mut magic, part.offset).map_err(PullError::file(&self.path))?;
            let digest = match Compression::of(&magic[..known]) {
                Compression::None => diff_id,
                Compression::Gzip | Compression::Zstd => {
                    let mut hashing = HashingReader::new(&mut part);
                    io::copy(&mut hashing, &mut io::sink()).map_err(PullError::file(&self.path))?;
                    hashing.finish().1
                }
            };
            layers.push((digest, length));
            aliases.push((digest, layer.clone()));
        }
        let bytes = write_manifest((config_digest, config.len() as u64), &layers);
        let digest = Digest::of(&bytes);
        self.aliases.extend(aliases);
        self.made.insert(digest, bytes.clone());
        Ok(Found { bytes, digest })
    }

    /// Reads a small blob whole and checks it.
    pub(crate) fn blob(&self, digest: &Digest, limit: u64) -> Result<Vec<u8>, PullError> {
        if let Some(made) = self.made.get(digest) {
            return Ok(made.clone());
        }
        let content = self.small(&self.blob_name(digest), limit)?;
        if Digest::of(&content) != *digest {
            return Err(PullError::Corrupt {
                what: format!("blob {digest} in {}", self.path.display()),
                why: format!("its digest is {}", Digest::of(&content)),
            });
        }
        Ok(content)
    }

    /// Opens a blob. Its content is not checked.
    pub(crate) fn open_blob(&self, digest: &Digest) -> Result<Part, PullError> {
        self.open(&self.blob_name(digest))
    }

    fn blob_name(&self, digest: &Digest) -> String {
        self.aliases.get(digest).cloned().unwrap_or_else(|| format!("blobs/sha256/{}", digest.hex()))
    }

    fn small(&self, name: &str, limit: u64) -> Result<Vec<u8>, PullError> {
        let part = self.open(name)?;
        if part.left() > limit {
            return Err(PullError::Unsupported {
                what: format!("{name} in {}", self.path.display()),
                why: format!("it has more than {limit} bytes"),
            });
        }
        let mut content = Vec::new();
        // The file can have grown since; the limit holds all the same, for a part ends where it ended when opened.
        { part }.read_to_end(&mut content).map_err(PullError::file(&self.path))?;
        Ok(content)
    }

    fn open(&self, name: &str) -> Result<Part, PullError> {
        match &self.kind {
            Kind::Folder(folder) => {
                let path = self.path.join(name);
                // NONBLOCK: a name that turns out to be a fifo must not make us wait.
                let flags = OFlags::RDONLY | OFlags::CLOEXEC | OFlags::NONBLOCK;
                let confined = ResolveFlags::BENEATH | ResolveFlags::NO_MAGICLINKS;
                let file = rustix::fs::openat2(folder, name, flags, Mode::empty(), confined);
                let file: File = match file {
                    Ok(file) => file.into(),
                    Err(rustix::io::Errno::NOENT) => return Err(self.absent(name)),
                    Err(rustix::io::Errno::XDEV) => {
                        let why = io::Error::other("a link in it leads out of the folder");
                        return Err(PullError::file(&path)(why));
                    }
                    Err(error) => return Err(PullError::file(&path)(error.into())),
                };
                let metadata = file.metadata().map_err(PullError::file(&path))?;
                if !metadata.is_file() {
                    let why = io::Error::new(io::ErrorKind::InvalidInput, "it is not a regular file");
                    return Err(PullError::file(&path)(why));
                }
                Ok(Part { file: Arc::new(file), offset: 0, left: metadata.len() })
            }
            Kind::Archive { file, members } => {
                let mut name = normal(name).ok_or_else(|| self.absent(name))?;
                for _ in 0..=MAX_LINKS {
                    match members.get(&name) {
                        None => return Err(self.absent(&name)),
                        Some(Member::Content { offset, length }) => {
                            return Ok(Part { file: Arc::clone(file), offset: *offset, left: *length });
                        }
                        Some(Member::Link(target)) => name.clone_from(target),
                    }
                }
                Err(PullError::Malformed {
                    what: format!("{name} in {}", self.path.display()),
                    why: "its links go round in circles".to_owned(),
                })
            }
        }
    }

    fn absent(&self, name: &str) -> PullError {
        PullError::NotFound {
            what: format!("{name} in {}", self.path.display()),
            why: "there is no such file in it".to_owned(),
        }
    }
}

fn full_name(name: &str) -> Result<String, ParseReferenceError> {
    Ok(name.parse::<Reference>()?.to_string())
}

/// Where in an archive its members are.
fn index(path: &Path, file: &File) -> Result<HashMap<String, Member>, PullError> {
    let malformed = |why: String| PullError::Malformed { what: path.display().to_string(), why };
    let mut magic = [0; 4];
    let known = file.read_at(&mut magic, 0).map_err(PullError::file(path))?;
    if Compression::of(&magic[..known]) != Compression::None {
        return Err(PullError::Unsupported {
            what: path.display().to_string(),
            why: "it is compressed, and must be unpacked with gunzip or unzstd first".to_owned(),
        });
    }
    let bounded = Bounded { file, left: MAX_HEADER_BYTES };
    let mut archive = tar::Archive::new(bounded);
    let entries = archive.entries_with_seek().map_err(|error| malformed(error.to_string()))?;
    let mut members = HashMap::new();
    for entry in entries {
        let entry = entry.map_err(|error| match members.len() {
            0 => malformed("it is not a tar archive".to_owned()),
            _ => malformed(error.to_string()),
        })?;
        let Some(name) = std::str::from_utf8(&entry.path_bytes()).ok().and_then(normal) else { continue };
        let kind = entry.header().entry_type();
        let member = if kind.is_file() || kind.is_contiguous() {
            Member::Content { offset: entry.raw_file_position(), length: entry.size() }
        } else if kind.is_symlink() || kind.is_hard_link() {
            let link = entry.link_name_bytes();
            let target = link.as_deref().and_then(|target| std::str::from_utf8(target).ok());
            // A symbolic link starts from the folder it is in, a hard link from the root of the archive.
            let target = target.and_then(|target| match name.rsplit_once('/') {
                Some((folder, _)) if kind.is_symlink() => normal(&format!("{folder}/{target}")),
                _ => normal(target),
            });
            let Some(target) = target else { continue };
            Member::Link(target)
        } else {
            continue;
        };
        members.insert(name, member);
        if members.len() > MAX_MEMBERS {
            return Err(malformed(format!("it has more than {MAX_MEMBERS} members")));
        }
    }
    Ok(members)
}

/// The name with `.` and `..` worked out; `None` when it is absolute or leads out of the archive.
fn normal(name: &str) -> Option<String> {
    let mut parts = Vec::new();
    if name.starts_with('/') {
        return None;
    }
    for part in name.split('/') {
        match part {
            "" | "." => {}
            ".." => {
                parts.pop()?;
            }
            part => parts.push(part),
        }
    }
    (!parts.is_empty()).then(|| parts.join("/"))
}

/// Reads a file up to a limit; what is skipped does not count.
struct Bounded<'a> {
    file: &'a File,
    left: u64,
}

impl Read for Bounded<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let count = self.file.read(buffer)?;
        self.left = self.left.checked_sub(count as u64).ok_or_else(|| {
            io::Error::new(
                io::ErrorKind::InvalidData,
                format!("more than {MAX_HEADER_BYTES} bytes of headers"),
            )
        })?;
        Ok(count)
    }
}

impl Seek for Bounded<'_> {
    fn seek(&mut self, target: SeekFrom) -> io::Result<u64> {
        self.file.seek(target)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;

    fn archive(
        members: &[(&str, &str, tar::EntryType)],
    ) -> (tempfile::NamedTempFile, Result<Files, PullError>) {
        let mut file = tempfile::NamedTempFile::new().expect("a file");
        let mut builder = tar::Builder::new(Vec::new());
        for (name, content, kind) in members {
            let mut header = tar::Header::new_gnu();
            // Written raw: the builder would refuse the hostile names this is about.
            header.as_old_mut().name[..name.len()].copy_from_slice(name.as_bytes());
            header.set_entry_type(*kind);
            let data = if kind.is_file() { content.as_bytes() } else { b"" };
            if !kind.is_file() {
                header.as_old_mut().linkname[..content.len()].copy_from_slice(content.as_bytes());
            }
            header.set_size(data.len() as u64);
            header.set_cksum();
            builder.append(&header, data).expect("appended");
        }
        file.write_all(&builder.into_inner().expect("finished")).expect("written");
        let opened = Files::archive(file.path());
        (file, opened)
    }

    #[test]
    fn members_are_found_by_name_and_through_links_inside() {
        use tar::EntryType::{Link, Regular, Symlink};
        let (_file, files) = archive(&[
            ("./a/b", "one", Regular),
            ("a/b", "two", Regular),
            ("c/d", "../a/b", Symlink),
            ("e", "a/b", Link),
            ("out", "../../etc/passwd", Symlink),
            ("abs", "/etc/passwd", Symlink),
            ("../../escape", "three", Regular),
            ("/absolute", "four", Regular),
            ("loop", "loop", Link),
        ]);
        let files = files.expect("an archive");
        for name in ["a/b", "./a//b", "c/d", "e", "x/../a/b"] {
            assert_eq!(files.small(name, 10).expect(name), b"two", "{name}");
        }
        for name in
            ["out", "abs", "escape", "../escape", "../../escape", "/absolute", "absolute", "", "a", "../a/b"]
        {
            assert!(matches!(files.open(name), Err(PullError::NotFound { .. })), "{name}");
        }
        assert!(matches!(files.open("loop"), Err(PullError::Malformed { .. })));
        assert!(matches!(files.small("a/b", 2), Err(PullError::Unsupported { .. })));
    }

    #[test]
    fn what_is_no_archive_is_refused() {
        let refused = |content: &[u8]| {
            let mut file = tempfile::NamedTempFile::new().expect("a file");
            file.write_all(content).expect("written");
            Files::archive(file.path()).expect_err("no archive").to_string()
        };
        assert!(refused(&[7; 2000]).ends_with("malformed: it is not a tar archive"));
        assert!(refused(&[0x1f, 0x8b, 8, 0, 0]).contains("gunzip"));
        assert!(matches!(Files::archive(Path::new("/dev/null")), Err(PullError::File { .. })));
        assert!(matches!(Files::archive(Path::new("/nonexistent")), Err(PullError::File { .. })));
    }

    #[test]
    fn a_layout_folder_cannot_lead_out_of_itself() {
        let folder = tempfile::tempdir().expect("a folder");
        let outside = tempfile::NamedTempFile::new().expect("a file");
        let layout = folder.path().join("layout");
        std::fs::create_dir(&layout).expect("made");
        std::fs::write(layout.join("inside"), b"content").expect("written");
        std::os::unix::fs::symlink("inside", layout.join("link")).expect("linked");
        std::os::unix::fs::symlink(outside.path(), layout.join("out")).expect("linked");
        std::os::unix::fs::symlink("../layout/inside", layout.join("round")).expect("linked");
        rustix::fs::mknodat(
            rustix::fs::CWD,
            layout.join("fifo"),
            rustix::fs::FileType::Fifo,
            Mode::from_raw_mode(0o600),
            0,
        )
        .expect("a fifo");
        let files = Files::layout(&layout).expect("a layout");
        assert_eq!(files.small("link", 10).expect("inside"), b"content");
        for name in ["out", "round", "fifo", "../layout/inside", "/etc/passwd"] {
            assert!(matches!(files.open(name), Err(PullError::File { .. })), "{name}");
        }
        assert!(matches!(files.open("absent"), Err(PullError::NotFound { .. })));
    }
}
