//! Makes the guest ready for commands.

use alloc::format;

use kiln_protocol::{Failed, Setup};
use rustix::fd::OwnedFd;
use rustix::fs::Mode;
use rustix::io::Errno;
use rustix::net::{AddressFamily, SendFlags, SocketFlags, SocketType};
use rustix::process::{Resource, Rlimit};
use rustix::thread::CapabilitySet;
use rustix::time::ClockId;

use crate::adopt::timespec;
use crate::failure::{internal, invalid, text, unusable_directory};
use crate::groups::Groups;
use crate::identity::{Files, Life};
use crate::mounts::Mounts;
use crate::workload::Place;
use crate::{files, mounts, sys};

/// What a root command keeps: Docker's default set without MKNOD, for there is no device cgroup here that would keep
/// a command from making itself a node for a disk or for memory.
///
/// What is missing matters as much. `SYS_RAWIO`: device memory, and with it the doorbell. `SYS_ADMIN`: mounts, and the
/// agent's hidden root. `SYS_PTRACE`, `SYS_MODULE`, `SYS_BOOT`, `DAC_READ_SEARCH`: ways around both.
const KEPT: CapabilitySet = CapabilitySet::CHOWN
    .union(CapabilitySet::DAC_OVERRIDE)
    .union(CapabilitySet::FOWNER)
    .union(CapabilitySet::FSETID)
    .union(CapabilitySet::KILL)
    .union(CapabilitySet::SETGID)
    .union(CapabilitySet::SETUID)
    .union(CapabilitySet::SETPCAP)
    .union(CapabilitySet::NET_BIND_SERVICE)
    .union(CapabilitySet::NET_RAW)
    .union(CapabilitySet::SYS_CHROOT)
    .union(CapabilitySet::AUDIT_WRITE)
    .union(CapabilitySet::SETFCAP);

/// Open files of a command: what programs that use select(2) can stand, and what they may raise it to.
const OPEN_FILES: Rlimit = Rlimit { current: Some(1024), maximum: Some(524_288) };
const UNLIMITED: Rlimit = Rlimit { current: None, maximum: None };
/// The longest host name. Linux man page hostname(7).
const MAX_HOSTNAME_BYTES: usize = 64;
/// The fewest random bytes the host must give: what the kernel's generator is keyed with.
const MIN_ENTROPY_BYTES: usize = 32;
/// The most volumes of an image.
const MAX_VOLUMES: usize = 256;

/// What of a guest's set-up needs neither image nor name, done ahead of it.
pub struct Prepared {
    /// The random generator, open for writing too.
    pub(crate) random: OwnedFd,
    mounts: Mounts,
    groups: Option<Groups>,
}

/// Does of a guest's set-up what can be done for all guests alike.
///
/// # Errors
/// [`Failed`] with the step that failed. The guest is of no use then.
pub fn prepare() -> Result<Prepared, Failed> {
    match loopback_up() {
        // A kernel without IP has no loopback to bring up.
        Ok(()) | Err(Errno::AFNOSUPPORT) => {}
        Err(error) => return Err(internal("bring the loopback interface up", error)),
    }
    let random = mounts::kernel_devices()?;
    // Modes are exact.
    rustix::process::umask(Mode::empty());
    let mut mounts = Mounts::make()?;
    limits().map_err(|error| internal("limit what commands may do", error))?;
    let groups = mounts.take_groups();
    Ok(Prepared { random, mounts, groups })
}

/// Carries out `setup`, once; the place for commands is what it leaves. `life` is whose the guest leads when it has
/// been restored before.
///
/// # Errors
/// [`Failed`] with the step that failed. The guest is of no use then.
pub fn set_up(setup: &Setup, life: Option<&Life>, prepared: Option<Prepared>) -> Result<Place, Failed> {
    check(setup)?;
    let Prepared { random, mounts, groups } = prepared.map_or_else(prepare, Ok)?;
    identity(setup)?;
    sys::add_entropy(&random, &setup.entropy)
        .map_err(|error| internal("seed the random generator", error))?;
    let scratch = mounts.root(&setup.root_device, &setup.scratch_device)?;

    // Modes below are exact; what commands inherit is the usual mask.
    rustix::process::umask(Mode::empty());
    let placed = mounts.place(setup.read_only);
    rustix::process::umask(Mode::WGRP | Mode::WOTH);
    placed?;
    let first = match life {
        Some(_) => None,
        None => Some(Life::first().map_err(|error| internal("draw the guest's ids", error))?),
    };
    let identity = life.or(first.as_ref()).map(|life| Files::provide(setup, life)).transpose()?;
    for volume in &setup.volumes {
        mounts::volume(volume)
            .map_err(|error| invalid(format!("cannot make the volume {volume}: {}", text(error))))?;
    }
    if setup.read_only {
        files::make_directories(&setup.working_directory)
            .map_err(|error| unusable_directory(&setup.working_directory, error))?;
        mounts::seal_root()?;
    }
    Ok(Place {
        null: mounts::null()?,
        terminals: mounts::terminals()?,
        hostname: setup.hostname.clone(),
        identity,
        groups,
        random,
        scratch,
        reaper: setup.reaper,
    })
}

/// Refuses what cannot be carried out, before anything is.
fn check(setup: &Setup) -> Result<(), Failed> {
    let name = &setup.hostname;
    let is_good = |byte: u8| byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'.' | b'_');
    if name.is_empty() || name.len() > MAX_HOSTNAME_BYTES || !name.bytes().all(is_good) {
        return Err(invalid(format!("{name:?} cannot be a host name")));
    }
    if setup.entropy.len() < MIN_ENTROPY_BYTES {
        return Err(invalid(format!("fewer than {MIN_ENTROPY_BYTES} random bytes")));
    }
    if setup.volumes.len() > MAX_VOLUMES {
        return Err(invalid(format!("more than {MAX_VOLUMES} volumes")));
    }
    let is_volume =
        |path: &str| path.starts_with('/') && !path.contains('\0') && !path.trim_matches('/').is_empty();
    if let Some(volume) = setup.volumes.iter().find(|volume| !is_volume(volume)) {
        return Err(invalid(format!("{volume:?} cannot be a volume")));
    }
    let directory = &setup.working_directory;
    if !directory.is_empty() && !directory.starts_with('/') {
        return Err(invalid(format!("the working directory {directory:?} is not an absolute path")));
    }
    let is_device = |path: &str| path.starts_with("/dev/");
    if !is_device(&setup.root_device)
        || !(setup.scratch_device.is_empty() || is_device(&setup.scratch_device))
    {
        return Err(invalid("disks are named by paths in /dev".into()));
    }
    Ok(())
}

/// The time and the host name.
fn identity(setup: &Setup) -> Result<(), Failed> {
    if setup.realtime_ns > 0 {
        rustix::time::clock_settime(ClockId::Realtime, timespec(setup.realtime_ns))
            .map_err(|error| internal("set the clock", error))?;
    }
    rustix::system::sethostname(setup.hostname.as_bytes())
        .map_err(|error| internal("set the host name", error))
}

/// Brings up `lo`, the first interface of every network namespace, by an `RTM_NEWLINK` message. rtnetlink(7).
fn loopback_up() -> Result<(), Errno> {
    const RTM_NEWLINK: u16 = 16;
    const NLM_F_REQUEST: u16 = 1;
    const IFF_UP: u32 = 1;
    const LOOPBACK_INDEX: u32 = 1;
    let mut message = [0; 32];
    // struct nlmsghdr: length, type, flags, sequence number, port.
    message[0..4].copy_from_slice(&32_u32.to_ne_bytes());
    message[4..6].copy_from_slice(&RTM_NEWLINK.to_ne_bytes());
    message[6..8].copy_from_slice(&NLM_F_REQUEST.to_ne_bytes());
    // struct ifinfomsg: family, type, index, flags, which flags change.
    message[20..24].copy_from_slice(&LOOPBACK_INDEX.to_ne_bytes());
    message[24..28].copy_from_slice(&IFF_UP.to_ne_bytes());
    message[28..32].copy_from_slice(&IFF_UP.to_ne_bytes());
    let socket =
        rustix::net::socket_with(AddressFamily::NETLINK, SocketType::RAW, SocketFlags::CLOEXEC, None)?;
    // Without an address it goes to the kernel, which acts before send returns.
    rustix::net::send(&socket, &message, SendFlags::empty()).map(|_| ())
}

/// Limits what any child can ever do. The agent keeps what it has, for it never executes anything.
fn limits() -> Result<(), Errno> {
    // CAP_CHECKPOINT_RESTORE, 40, is the last; a kernel that knows fewer refuses the rest.
    for capability in CapabilitySet::all().difference(KEPT).iter() {
        match rustix::thread::remove_capability_from_bounding_set(capability) {
            Ok(()) | Err(Errno::INVAL) => {}
            Err(error) => return Err(error),
        }
    }
    for (resource, limit) in [(Resource::Nofile, OPEN_FILES), (Resource::Nproc, UNLIMITED)] {
        match rustix::process::setrlimit(resource, limit) {
            // Not in a guest: an agent that may not raise limits (SYS_RESOURCE) leaves them.
            Ok(()) | Err(Errno::PERM) => {}
            Err(error) => return Err(error),
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use alloc::string::String;
    use alloc::vec;

    fn setup() -> Setup {
        Setup {
            root_device: "/dev/vda".into(),
            scratch_device: "/dev/vdb".into(),
            hostname: "box".into(),
            volumes: vec!["/data".into()],
            entropy: vec![7; 32],
            ..Setup::default()
        }
    }

    #[test]
    fn what_could_write_lines_of_its_own_is_no_host_name() {
        assert_eq!(check(&setup()), Ok(()));
        let long = "a".repeat(65);
        for bad in ["", "a b", "a\n10.0.0.1 example.com", "a\0", long.as_str()] {
            assert!(check(&Setup { hostname: bad.into(), ..setup() }).is_err(), "{bad:?}");
        }
    }

    #[test]
    fn a_volume_is_an_absolute_path_below_the_root() {
        for bad in ["", "/", "//", "data", "/a\0"] {
            assert!(check(&Setup { volumes: vec![bad.into()], ..setup() }).is_err(), "{bad:?}");
        }
    }

    #[test]
    fn a_working_directory_is_an_absolute_path() {
        assert_eq!(check(&Setup { working_directory: "/srv".into(), ..setup() }), Ok(()));
        assert!(check(&Setup { working_directory: "srv".into(), ..setup() }).is_err());
    }

    #[test]
    fn too_little_entropy_is_refused() {
        assert!(check(&Setup { entropy: vec![7; 31], ..setup() }).is_err());
    }

    #[test]
    fn a_disk_is_a_device() {
        assert!(check(&Setup { root_device: "/etc/passwd".into(), ..setup() }).is_err());
        assert!(check(&Setup { scratch_device: "scratch".into(), ..setup() }).is_err());
        assert_eq!(check(&Setup { scratch_device: String::new(), ..setup() }), Ok(()));
    }
}
