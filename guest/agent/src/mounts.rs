//! The file systems of the guest.
//!
//! The agent starts in the kernel's initial root, which holds itself and nothing else. What needs no image is mounted
//! there first, which a guest does before it parks as the base of many. Then it mounts the image and the writable layer, and then makes their overlay its own root, on top of the initial one: from then on no path
//! leads back. Only after that is anything looked up inside the image, so its links, however hostile, end inside it.
//!
//! The root is mounted `nodev`: a device node in an image, or one smuggled into the writable layer, opens nothing.

use alloc::ffi::CString;
use alloc::format;

use kiln_protocol::Failed;
use rustix::fd::OwnedFd;
use rustix::fs::{CWD, FileType, Mode, OFlags};
use rustix::io::Errno;
use rustix::mount::{FsPickFlags, MountFlags, MoveMountFlags, UnmountFlags};

use crate::failure::internal;
use crate::groups::{self, Groups};
use crate::{files, identity};

/// Where the image's file system is before it is part of the root.
const LOWER: &str = "/lower";
/// Where the writable file system is.
const SCRATCH: &str = "/scratch";
/// Where the overlay of both is made.
const ROOT: &str = "/root";
/// The options of the overlay. Renaming a directory of the image works (`redirect_dir`), copying for a change of
/// ownership alone is avoided nowhere (`metacopy`), and file handles are not exported (`index`). Linux
/// Documentation/filesystems/overlayfs.rst.
const OVERLAY: &str =
    "lowerdir=/lower,upperdir=/scratch/upper,workdir=/scratch/work,redirect_dir=on,metacopy=off,index=off";

/// The options of the writable file system: nothing is done in the background that may never be needed. The host's
/// tables are complete, and to read the maps of all its blocks ahead costs a guest of 10 GiB more than all the rest of
/// set-up. Linux Documentation/admin-guide/ext4.rst.
const SCRATCH_OPTIONS: &str = "noinit_itable,no_prefetch_block_bitmaps,noblock_validity";

/// How many groups' bitmaps the writable file system reads ahead, in sysfs below the device's name. None: it would make those
/// of sixteen groups for each new directory.
const READ_AHEAD_GROUPS: (&str, &[u8]) = ("mb_prefetch", b"0");

/// Where mounts wait in the initial root for the root they belong to.
const WAITING: &str = "/waiting";
const WAITING_SYS: &str = "/waiting/sys";
const WAITING_DEV: &str = "/waiting/dev";
const WAITING_PRIVATE: &str = "/waiting/kiln";
/// The agent's own sysfs, which can be written and stays out of the reach of commands.
const KNOBS: &str = "/waiting/knobs";

/// Devices every command may use: name and character device number. Linux Documentation/admin-guide/devices.txt.
const DEVICES: [(&str, (u32, u32)); 6] = [
    ("null", (1, 3)),
    ("zero", (1, 5)),
    ("full", (1, 7)),
    ("random", (1, 8)),
    ("urandom", (1, 9)),
    ("tty", (5, 0)),
];
/// Links in /dev. The first terminal is the console, when there is one.
const DEVICE_LINKS: [(&str, &str); 7] = [
    ("/proc/self/fd", "fd"),
    ("/proc/self/fd/0", "stdin"),
    ("/proc/self/fd/1", "stdout"),
    ("/proc/self/fd/2", "stderr"),
    ("/proc/kcore", "core"),
    ("pts/ptmx", "ptmx"),
    ("pts/0", "console"),
];
/// All control groups, out of the reach of commands: the agent is in their root, and the bounds of commands are above the commands' own.
const CONTROL_GROUPS: &str = "/waiting/groups";
/// Where commands find those that are theirs, before set-up.
const COMMANDS_GROUPS: &str = "/waiting/sys/fs/cgroup";
/// The file system of the agent's own files that commands see, and its size.
const PRIVATE: &str = "/run/kiln";
const PRIVATE_OPTIONS: &str = "mode=755,size=1m,nr_inodes=64";
/// The kernel's file in each /proc whose place the guest's own boot id takes.
const KERNEL_BOOT_ID: &str = "/proc/sys/kernel/random/boot_id";
/// Parts of /proc that commands may read and not write, root or not: through them the kernel runs programs of the
/// writer's choosing outside of any namespace (`kernel.core_pattern`, `kernel.modprobe`), or does what a key press
/// does.
const READ_ONLY_PROC: [&str; 2] = ["/proc/sys", "/proc/sysrq-trigger"];

/// Mounts the kernel's device nodes in the agent's own root, unless they are there, and opens its random generator.
pub(crate) fn kernel_devices() -> Result<OwnedFd, Failed> {
    if let Ok(random) = open("/dev/urandom", OFlags::RDWR) {
        return Ok(random);
    }
    make_directory("/dev").map_err(|error| internal("make /dev", error))?;
    rustix::mount::mount("dev", "/dev", "devtmpfs", MountFlags::NOSUID | MountFlags::NOEXEC, None)
        .map_err(|error| internal("mount devtmpfs", error))?;
    open("/dev/urandom", OFlags::RDWR).map_err(|error| internal("open /dev/urandom", error))
}

/// Mounts that need no image, made ahead of it: each is moved to its place once there is a root.
pub(crate) struct Mounts {
    sys: OwnedFd,
    dev: OwnedFd,
    private: OwnedFd,
    /// The control groups, if the kernel has any.
    groups: Option<Groups>,
    knobs: OwnedFd,
}

impl Mounts {
    /// Mounts what commands expect to find, /proc apart, which each PID namespace mounts for itself.
    pub(crate) fn make() -> Result<Self, Failed> {
        let closed = MountFlags::NOSUID | MountFlags::NODEV | MountFlags::NOEXEC;
        for directory in [WAITING, WAITING_SYS, WAITING_DEV, WAITING_PRIVATE, KNOBS, CONTROL_GROUPS] {
            make_directory(directory).map_err(|error| internal("make a mount point", error))?;
        }
        mount("sysfs", KNOBS, "sysfs", closed, "")?;
        mount("sysfs", WAITING_SYS, "sysfs", closed | MountFlags::RDONLY, "")?;
        let groups = control_groups(closed)?;
        mount("dev", WAITING_DEV, "tmpfs", MountFlags::NOSUID | MountFlags::NOEXEC, "mode=755,size=64k")?;
        let dev = directory(WAITING_DEV)?;
        devices(&dev).map_err(|error| internal("fill /dev", error))?;
        mount(
            "devpts",
            "/waiting/dev/pts",
            "devpts",
            MountFlags::NOSUID | MountFlags::NOEXEC,
            "ptmxmode=666,mode=620,gid=5",
        )?;
        mount("shm", "/waiting/dev/shm", "tmpfs", closed, "mode=1777")?;
        optional("mqueue", "/waiting/dev/mqueue", "mqueue", closed, "")?;
        mount("kiln", WAITING_PRIVATE, "tmpfs", closed, PRIVATE_OPTIONS)?;
        Ok(Self {
            sys: directory(WAITING_SYS)?,
            dev,
            private: directory(WAITING_PRIVATE)?,
            groups,
            knobs: directory(KNOBS)?,
        })
    }

    /// The control groups, once.
    pub(crate) fn take_groups(&mut self) -> Option<Groups> {
        self.groups.take()
    }

    /// Moves all to where they belong in the root there is now.
    pub(crate) fn place(&self, read_only: bool) -> Result<(), Failed> {
        for directory in ["/proc", "/sys", "/dev"] {
            files::make_directories(directory)
                .map_err(|error| internal(&format!("make {directory}"), error))?;
        }
        put(&self.sys, "/sys")?;
        put(&self.dev, "/dev")?;
        if read_only {
            for (directory, options) in [("/run", "mode=755"), ("/tmp", "mode=1777")] {
                files::make_directories(directory)
                    .map_err(|error| internal(&format!("make {directory}"), error))?;
                mount("tmpfs", directory, "tmpfs", MountFlags::NOSUID | MountFlags::NODEV, options)?;
            }
        }
        files::make_directories(PRIVATE).map_err(|error| internal(&format!("make {PRIVATE}"), error))?;
        put(&self.private, PRIVATE)
    }

    /// Mounts the image and the writable layer, and makes their overlay the root of the agent and all its children.
    /// Returns the root of the writable file system, when a device holds it.
    pub(crate) fn root(&self, image: &str, scratch: &str) -> Result<Option<OwnedFd>, Failed> {
        for directory in [LOWER, SCRATCH, ROOT] {
            make_directory(directory).map_err(|error| internal("make a mount point", error))?;
        }
        mount(image, LOWER, "erofs", MountFlags::RDONLY | MountFlags::NOATIME | MountFlags::NODEV, "")?;
        let held = if scratch.is_empty() {
            mount("scratch", SCRATCH, "tmpfs", MountFlags::empty(), "mode=755")?;
            None
        } else {
            mount(scratch, SCRATCH, "ext4", MountFlags::NOATIME, SCRATCH_OPTIONS)?;
            self.read_nothing_ahead(scratch);
            Some(directory(SCRATCH)?)
        };
        for directory in ["/scratch/upper", "/scratch/work"] {
            make_directory(directory).map_err(|error| internal("make the overlay's directories", error))?;
        }
        mount("overlay", ROOT, "overlay", MountFlags::NODEV, OVERLAY)?;
        enter(ROOT).map_err(|error| internal("enter the image's root", error))?;
        Ok(held)
    }

    /// Tells the writable file system not to; one that knows of no such thing is only slower.
    fn read_nothing_ahead(&self, device: &str) {
        let (knob, value) = READ_AHEAD_GROUPS;
        let name = device.rsplit('/').next().unwrap_or_default();
        let path = format!("fs/ext4/{name}/{knob}");
        let flags = OFlags::WRONLY | OFlags::CLOEXEC;
        if let Ok(knob) = rustix::fs::openat(&self.knobs, path, flags, Mode::empty()) {
            let _ = rustix::io::write(&knob, value);
        }
    }
}

/// Makes the control groups, if the kernel has any, and shows commands their own. That is writable for the guest's root: how it divides what
/// it has among its processes is its own affair.
fn control_groups(closed: MountFlags) -> Result<Option<Groups>, Failed> {
    if !optional("cgroup", CONTROL_GROUPS, "cgroup2", closed, "nsdelegate")? {
        return Ok(None);
    }
    let groups = Groups::below(directory(CONTROL_GROUPS)?)
        .map_err(|error| internal("make the control groups", error))?;
    match rustix::mount::mount_bind(format!("{CONTROL_GROUPS}/{}", groups::COMMANDS), COMMANDS_GROUPS) {
        Ok(()) => Ok(Some(groups)),
        Err(error) => Err(internal(&format!("mount {COMMANDS_GROUPS}"), error)),
    }
}

/// Moves a mount to `to` in the root there is now.
fn put(what: &OwnedFd, to: &str) -> Result<(), Failed> {
    // Where an image has a link, that is followed, inside it.
    let flags = MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH | MoveMountFlags::MOVE_MOUNT_T_SYMLINKS;
    rustix::mount::move_mount(what, "", CWD, to, flags)
        .map_err(|error| internal(&format!("mount {to}"), error))
}

fn enter(root: &str) -> Result<(), Errno> {
    rustix::process::chdir(root)?;
    rustix::mount::mount_move(".", "/")?;
    rustix::process::chroot(".")
}

fn devices(dev: &OwnedFd) -> Result<(), Errno> {
    for (name, (major, minor)) in DEVICES {
        let mode = Mode::from_raw_mode(0o666);
        rustix::fs::mknodat(dev, name, FileType::CharacterDevice, mode, rustix::fs::makedev(major, minor))?;
    }
    for (target, name) in DEVICE_LINKS {
        rustix::fs::symlinkat(target, dev, name)?;
    }
    for directory in ["pts", "shm", "mqueue"] {
        rustix::fs::mkdirat(dev, directory, Mode::from_raw_mode(0o755))?;
    }
    Ok(())
}

/// Mounts /proc for the PID namespace of the calling process, in the root of all.
pub(crate) fn proc() -> Result<(), Errno> {
    let closed = MountFlags::NOSUID | MountFlags::NODEV | MountFlags::NOEXEC;
    rustix::mount::mount("proc", "/proc", "proc", closed, None)?;
    for path in READ_ONLY_PROC {
        close(path, closed)?;
    }
    match rustix::mount::mount_bind(identity::BOOT_ID, KERNEL_BOOT_ID) {
        // A kernel built without it, or commands without an identity.
        Ok(()) | Err(Errno::NOENT) => Ok(()),
        Err(error) => Err(error),
    }
}

/// Makes what is at `path`, if anything is, a read-only mount of its own.
fn close(path: &str, flags: MountFlags) -> Result<(), Errno> {
    match rustix::mount::mount_bind(path, path) {
        // A kernel built without it.
        Err(Errno::NOENT) => return Ok(()),
        bound => bound?,
    }
    rustix::mount::mount_remount(path, MountFlags::BIND | MountFlags::RDONLY | flags, "")
}

/// Closes the agent's own files to commands. What has been bound elsewhere before stays as it is, and the agent writes
/// by what it has open.
pub(crate) fn seal_private() -> Result<(), Failed> {
    let flags = MountFlags::NOSUID | MountFlags::NODEV | MountFlags::NOEXEC;
    close(PRIVATE, flags).map_err(|error| internal(&format!("close {PRIVATE}"), error))
}

/// Takes away the /proc of a namespace that is gone.
pub(crate) fn undo_proc() {
    let _ = rustix::mount::unmount("/proc", UnmountFlags::DETACH);
}

/// Makes `volume` a mount of its own, with what the image has there. It stays writable when the root does not.
pub(crate) fn volume(volume: &str) -> Result<(), Errno> {
    files::make_directories(volume)?;
    rustix::mount::mount_bind(volume, volume)
}

/// Makes the root read-only. The mounts below it are not touched.
pub(crate) fn seal_root() -> Result<(), Failed> {
    let flags = MountFlags::BIND | MountFlags::RDONLY | MountFlags::NODEV;
    rustix::mount::mount_remount("/", flags, "").map_err(|error| internal("make the root read-only", error))
}

/// Writes everything out and leaves the writable file system clean, when `scratch` is one that outlives the guest.
pub(crate) fn settle(scratch: Option<&OwnedFd>) {
    let Some(scratch) = scratch else { return };
    let _ = rustix::fs::syncfs(scratch);
    // It cannot be unmounted, being under the agent's own root; read-only it is as clean. Should a writer be left, it
    // has just been synced, and its journal does the rest.
    let flags = FsPickFlags::FSPICK_CLOEXEC | FsPickFlags::FSPICK_EMPTY_PATH;
    let _ = rustix::mount::fspick(scratch, "", flags).and_then(|context| {
        rustix::mount::fsconfig_set_flag(&context, "ro")?;
        rustix::mount::fsconfig_reconfigure(&context)
    });
}

/// Opens the directory in which terminals are made.
pub(crate) fn terminals() -> Result<OwnedFd, Failed> {
    open("/dev/pts", OFlags::PATH | OFlags::DIRECTORY).map_err(|error| internal("open /dev/pts", error))
}

/// Opens /dev/null.
pub(crate) fn null() -> Result<OwnedFd, Failed> {
    open("/dev/null", OFlags::RDWR).map_err(|error| internal("open /dev/null", error))
}

fn mount(source: &str, target: &str, kind: &str, flags: MountFlags, options: &str) -> Result<(), Failed> {
    try_mount(source, target, kind, flags, options)
        .map_err(|error| internal(&format!("mount {source} ({kind}) at {target}"), error))
}

/// Mounts what a guest can do without, unless its kernel has no such file system; returns whether it has.
fn optional(
    source: &str,
    target: &str,
    kind: &str,
    flags: MountFlags,
    options: &str,
) -> Result<bool, Failed> {
    match try_mount(source, target, kind, flags, options) {
        Ok(()) => Ok(true),
        Err(Errno::NODEV | Errno::NOENT) => Ok(false),
        Err(error) => Err(internal(&format!("mount {kind} at {target}"), error)),
    }
}

fn try_mount(source: &str, target: &str, kind: &str, flags: MountFlags, options: &str) -> Result<(), Errno> {
    let options = CString::new(options).map_err(|_| Errno::INVAL)?;
    rustix::mount::mount(source, target, kind, flags, options.as_c_str())
}

fn make_directory(path: &str) -> Result<(), Errno> {
    match rustix::fs::mkdir(path, Mode::from_raw_mode(0o755)) {
        Ok(()) | Err(Errno::EXIST) => Ok(()),
        Err(error) => Err(error),
    }
}

fn directory(path: &str) -> Result<OwnedFd, Failed> {
    open(path, OFlags::RDONLY | OFlags::DIRECTORY).map_err(|error| internal(&format!("open {path}"), error))
}

fn open(path: &str, flags: OFlags) -> Result<OwnedFd, Errno> {
    rustix::fs::open(path, flags | OFlags::CLOEXEC, Mode::empty())
}
