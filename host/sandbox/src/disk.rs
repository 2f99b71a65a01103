//! What a machine's block devices are made of.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use kiln_control::MAX_START_FDS;
use kiln_oci::{DiskPart, Image, PullError};
use kiln_support::sparse;

/// The size that every guest sees its disks as having, in bytes. What is behind them is smaller and says so itself, or
/// nothing: so a machine that was saved with one disk is restored with another in its place.
pub(crate) const DISK_CAPACITY_BYTES: u64 = 1 << 43;

/// A block device of a machine.
#[derive(Debug)]
pub struct Disk {
    /// The guest may not write.
    pub read_only: bool,
    /// The pieces of files it consists of, in order; a writable disk has exactly one. Without any it reads as zeros and
    /// takes no writes.
    pub extents: Vec<Extent>,
}

impl Disk {
    /// A disk that nothing is behind.
    pub(crate) fn placeholder(read_only: bool) -> Self {
        Self { read_only, extents: Vec::new() }
    }

    /// A disk that takes writes, `size_bytes` of `file`.
    pub(crate) fn writable(file: File, size_bytes: u64) -> Self {
        let length = size_bytes & !4095;
        Self { read_only: false, extents: vec![Extent { data: file, offset: 0, length, digests: None }] }
    }

    /// The disk an image's files are on: its merged metadata and layers end to end, each checked as it is read.
    ///
    /// # Errors
    /// When an object of the image is missing from the store or damaged.
    pub fn from_image(image: &Image) -> Result<Self, PullError> {
        let extent = |part: DiskPart| Extent {
            data: part.data,
            offset: 0,
            length: part.length,
            digests: Some(part.digests),
        };
        Ok(Self { read_only: true, extents: image.disk()?.into_iter().map(extent).collect() })
    }
}

/// A piece of a file on a disk.
#[derive(Debug)]
pub struct Extent {
    /// The file, open for writing as well when the disk is writable.
    pub data: File,
    /// Where the piece starts in the file, in bytes; a multiple of 4096.
    pub offset: u64,
    /// How long it is, in bytes; a multiple of 4096.
    pub length: u64,
    /// The digests of the file's 64 KiB blocks, against which the monitor checks what it reads.
    pub digests: Option<File>,
}

/// Where the guest's changes to its root go.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Scratch {
    /// An ext4 file system on a disk that grows as it is written, in a file without a name in `folder`: nothing is
    /// left of it when the machine is gone, however it goes.
    Disk {
        /// Where the file is made.
        folder: PathBuf,
        /// What the guest sees as its size, in bytes.
        size_bytes: u64,
    },
    /// Guest memory (tmpfs).
    Memory,
    /// Nowhere: the root is read-only, with tmpfs at /tmp, /run and the image's volumes.
    ReadOnly,
}

/// Why there is no scratch disk.
#[derive(Debug, thiserror::Error)]
pub enum ScratchError {
    /// The file could not be made.
    #[error("cannot make a scratch file in {}", folder.display())]
    File {
        /// The folder.
        folder: PathBuf,
        /// What the system said.
        #[source]
        source: io::Error,
    },
    /// The file system could not be made in it.
    #[error("cannot make a scratch file system")]
    Format(#[from] kiln_rootfs::ScratchError),
}

/// Makes a scratch disk. Blocks for the milliseconds it takes to write an empty file system.
pub(crate) fn scratch_disk(folder: &Path, size_bytes: u64) -> Result<Disk, ScratchError> {
    let file =
        nameless_file(folder).map_err(|source| ScratchError::File { folder: folder.into(), source })?;
    kiln_rootfs::scratch(&file, size_bytes)?;
    Ok(Disk::writable(file, size_bytes))
}

/// Makes a scratch disk with what another has. Blocks for as long as copying its data takes.
pub(crate) fn scratch_copy(folder: &Path, from: &File) -> Result<Disk, ScratchError> {
    let error = |source| ScratchError::File { folder: folder.into(), source };
    let file = nameless_file(folder).map_err(error)?;
    let copied = sparse::copy(from, &file).and_then(|()| from.metadata());
    Ok(Disk::writable(file, copied.map_err(error)?.len()))
}

/// A file that no folder lists, so that it is gone with its last user.
fn nameless_file(folder: &Path) -> io::Result<File> {
    let flags = rustix::fs::OFlags::TMPFILE | rustix::fs::OFlags::EXCL;
    OpenOptions::new().read(true).write(true).mode(0o600).custom_flags(flags.bits() as i32).open(folder)
}

/// The descriptors of one order, counted as they are added.
#[derive(Debug, Default)]
pub(crate) struct Descriptors<'fd> {
    fds: Vec<BorrowedFd<'fd>>,
}

impl<'fd> Descriptors<'fd> {
    /// Adds one and returns its place.
    pub(crate) fn add(&mut self, file: &'fd impl AsFd) -> u32 {
        self.fds.push(file.as_fd());
        self.fds.len() as u32 - 1
    }

    pub(crate) fn as_slice(&self) -> &[BorrowedFd<'fd>] {
        &self.fds
    }

    /// Whether an order can carry them.
    pub(crate) fn fit(&self) -> bool {
        self.fds.len() <= MAX_START_FDS
    }
}

/// The disks as an order for a machine has them, their files added to its descriptors.
pub(crate) fn describe<'fd>(
    disks: &[&'fd Disk],
    descriptors: &mut Descriptors<'fd>,
) -> Vec<kiln_control::Disk> {
    let describe = |(index, disk): (usize, &&'fd Disk)| {
        let extents = disk
            .extents
            .iter()
            .map(|extent| kiln_control::Extent {
                fd: descriptors.add(&extent.data),
                offset: extent.offset,
                length: extent.length,
                digests_fd: extent.digests.as_ref().map(|digests| descriptors.add(digests)),
            })
            .collect();
        kiln_control::Disk {
            read_only: disk.read_only,
            extents,
            serial: format!("kiln-{index}"),
            capacity_bytes: DISK_CAPACITY_BYTES,
        }
    };
    disks.iter().enumerate().map(describe).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_scratch_file_has_no_name() {
        let folder = tempfile::tempdir().expect("a temporary folder");
        nameless_file(folder.path())
            .expect("the file system of temporary files has O_TMPFILE")
            .set_len(1)
            .expect("grown");
        assert_eq!(std::fs::read_dir(folder.path()).expect("listed").count(), 0);
    }

    #[test]
    fn a_file_of_several_disks_is_counted_in_order() {
        let file = || File::open("/dev/null").expect("there is a /dev/null");
        let extent = |digests| Extent { data: file(), offset: 0, length: 4096, digests };
        let disks = [
            Disk { read_only: true, extents: vec![extent(Some(file())), extent(None)] },
            Disk { read_only: false, extents: vec![extent(None)] },
        ];
        let mut descriptors = Descriptors::default();
        let kernel = file();
        descriptors.add(&kernel);
        let described = describe(&[&disks[0], &disks[1]], &mut descriptors);
        let fds: Vec<_> =
            described.iter().flat_map(|disk| &disk.extents).map(|e| (e.fd, e.digests_fd)).collect();
        assert_eq!(fds, [(1, Some(2)), (3, None), (4, None)]);
        assert_eq!(descriptors.as_slice().len(), 5);
    }
}
