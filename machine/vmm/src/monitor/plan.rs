//! An order for a machine, checked whole before anything is done.

use std::collections::BTreeMap;
use std::fs::File;
use std::io;
use std::os::fd::OwnedFd;
use std::sync::Arc;

use kiln_control::{Blame, Disk as DiskSpec, Extent as ExtentSpec, Restore, Start};
use kiln_virtio::{Block, DataFile, Device, Disk, DiskError, DiskFault, Extent, Rng, Vsock, VsockPorts};

use super::PROGRAM_NAME;
use super::failure::{Failure, with_causes};
use crate::layout::MAX_VIRTIO_DEVICES;
use crate::shell::Shape;

/// The devices every machine has beside its disks: vsock and rng.
const OTHER_DEVICES: usize = 2;
/// The context ids a guest may have: those below are the hypervisor's and the host's, the highest means "any".
/// VIRTIO 1.2 §5.10.4 "Device configuration layout".
const GUEST_CIDS: std::ops::Range<u64> = 3..0xffff_ffff;

/// What a machine that boots is made of.
pub(super) struct BootPlan {
    pub(super) shape: Shape,
    pub(super) kernel: File,
    pub(super) initramfs: File,
    pub(super) command_line: String,
    pub(super) devices: Devices,
    pub(super) console: Option<OwnedFd>,
}

/// What a machine that is restored is made of.
pub(super) struct RestorePlan {
    pub(super) state: File,
    pub(super) memory: File,
    pub(super) devices: Devices,
    pub(super) console: Option<OwnedFd>,
    pub(super) generation: Option<Vec<u8>>,
    /// It is to wait.
    pub(super) stand: bool,
}

/// The virtio devices in the order of their windows, and the host's side of the one for streams.
pub(super) struct Devices {
    pub(super) virtio: Vec<Box<dyn Device>>,
    pub(super) ports: VsockPorts,
    /// Where the largest file ends that a disk may write to.
    pub(super) writable_bytes: u64,
}

impl BootPlan {
    /// Checks `start` and the descriptors that came with it.
    pub(super) fn check(start: Start, files: Vec<OwnedFd>) -> Result<Self, Failure> {
        let shape = Shape::new(start.memory_mib, start.vcpus)?;
        let files = Files::from(files);
        Ok(Self {
            shape,
            kernel: files.get(start.kernel_fd)?,
            initramfs: files.get(start.initramfs_fd)?,
            command_line: start.cmdline,
            devices: Devices::make(start.cid, &start.disks, &files)?,
            console: files.get_if(start.console_fd)?,
        })
    }
}

impl RestorePlan {
    /// Checks `restore` and the descriptors that came with it.
    pub(super) fn check(restore: Restore, files: Vec<OwnedFd>) -> Result<Self, Failure> {
        let files = Files::from(files);
        Ok(Self {
            state: files.get(restore.state_fd)?,
            memory: files.get(restore.memory_fd)?,
            devices: Devices::make(restore.cid, &restore.disks, &files)?,
            console: files.get_if(restore.console_fd)?,
            generation: restore.generation,
            stand: restore.stand,
        })
    }
}

impl Devices {
    fn make(cid: u64, disks: &[DiskSpec], files: &Files) -> Result<Self, Failure> {
        if !GUEST_CIDS.contains(&cid) {
            return Err(Failure::new(Blame::Kiln, format!("{cid} is no context id for a guest")));
        }
        if disks.len() + OTHER_DEVICES > MAX_VIRTIO_DEVICES {
            let most = MAX_VIRTIO_DEVICES - OTHER_DEVICES;
            return Err(Failure::new(Blame::Caller, format!("{} disks; at most {most}", disks.len())));
        }
        let mut data = BTreeMap::new();
        let mut virtio = Vec::with_capacity(disks.len() + OTHER_DEVICES);
        for (index, disk) in disks.iter().enumerate() {
            virtio.push(make_disk(index, disk, files, &mut data)?);
        }
        let (vsock, ports) = Vsock::new(cid);
        virtio.push(Box::new(vsock));
        virtio.push(Box::new(Rng::new()));
        let writable = disks.iter().filter(|disk| !disk.read_only).flat_map(|disk| &disk.extents);
        let ends = writable.map(|extent| extent.offset.saturating_add(extent.length));
        Ok(Self { virtio, ports, writable_bytes: ends.max().unwrap_or(0) })
    }
}

/// Files by which extents name them: data and digests.
type DataFiles = BTreeMap<(u32, Option<u32>), Arc<DataFile>>;

fn make_disk(
    index: usize,
    spec: &DiskSpec,
    files: &Files,
    data: &mut DataFiles,
) -> Result<Box<dyn Device>, Failure> {
    let fault = |error: DiskError| {
        let blame = if matches!(error, DiskError::Host(_)) { Blame::Host } else { Blame::Kiln };
        Failure::new(blame, format!("disk {index}: {}", with_causes(&error)))
    };
    let mut open = |fd: u32, digests_fd: Option<u32>| -> Result<Arc<DataFile>, Failure> {
        if let Some(file) = data.get(&(fd, digests_fd)) {
            return Ok(Arc::clone(file));
        }
        let file = match digests_fd {
            Some(digests) => DataFile::verified(files.get(fd)?, files.get(digests)?).map_err(fault)?,
            None => DataFile::trusted(files.get(fd)?),
        };
        let file = Arc::new(file);
        data.insert((fd, digests_fd), Arc::clone(&file));
        Ok(file)
    };
    let mut extents = Vec::with_capacity(spec.extents.len());
    for &ExtentSpec { fd, offset, length, digests_fd } in &spec.extents {
        extents.push(Extent { file: open(fd, digests_fd)?, offset, bytes: length });
    }
    let disk = if extents.is_empty() && spec.capacity_bytes > 0 {
        Disk::empty(spec.capacity_bytes, spec.read_only)
    } else if spec.read_only {
        Disk::read_only(extents)
    } else {
        match <[Extent; 1]>::try_from(extents) {
            Ok([extent]) => Disk::writable(extent),
            Err(_) => Err(DiskError::Shape("a writable disk has exactly one extent")),
        }
    };
    let disk = disk.and_then(|disk| match spec.capacity_bytes {
        0 => Ok(disk),
        bytes => disk.with_capacity(bytes),
    });
    let report =
        Box::new(move |fault: &DiskFault| eprintln!("{PROGRAM_NAME}: disk {index}, {}", with_causes(fault)));
    let block = disk.and_then(|disk| Block::new(disk, &spec.serial, report)).map_err(fault)?;
    Ok(Box::new(block))
}

/// The descriptors beside a command.
struct Files {
    files: Vec<File>,
}

impl From<Vec<OwnedFd>> for Files {
    fn from(files: Vec<OwnedFd>) -> Self {
        Self { files: files.into_iter().map(File::from).collect() }
    }
}

impl Files {
    /// The file of index `index`, when there is to be one.
    fn get_if(&self, index: Option<u32>) -> Result<Option<OwnedFd>, Failure> {
        Ok(index.map(|index| self.get(index)).transpose()?.map(OwnedFd::from))
    }

    /// The file of index `index`.
    fn get(&self, index: u32) -> Result<File, Failure> {
        let file = usize::try_from(index).ok().and_then(|index| self.files.get(index)).ok_or_else(|| {
            Failure::new(Blame::Kiln, format!("descriptor {index} of {} does not exist", self.files.len()))
        })?;
        file.try_clone().map_err(|error: io::Error| Failure::host("cannot duplicate a descriptor", &error))
    }
}
