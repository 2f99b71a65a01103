//! No file by path, no socket of the host, no signal to others: what the kernel refuses even where a path led somewhere.
#![expect(unsafe_code, reason = "Landlock has system calls of its own")]

use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};

const CREATE_RULESET_VERSION: u32 = 1;
/// The rights that each version brought. Linux `Documentation/userspace-api/landlock.rst`.
const FILE_RIGHTS: [(i64, u64); 4] = [(1, 0x1fff), (2, 1 << 13), (3, 1 << 14), (5, 1 << 15)];
const NET_RIGHTS: (i64, u64) = (4, 0b11); // bind and connect of TCP
const SCOPES: (i64, u64) = (6, 0b11); // abstract Unix sockets and signals

/// `struct landlock_ruleset_attr`: what is forbidden where no rule allows it, of files, network and other processes.
#[repr(C)]
struct Handled {
    files: u64,
    net: u64,
    scopes: u64,
}

/// The version of Landlock that the kernel has.
///
/// # Errors
/// When it has none, or it is turned off.
pub fn version() -> io::Result<u32> {
    // SAFETY: asks for a version, with no attributes.
    let version = unsafe {
        libc::syscall(
            libc::SYS_landlock_create_ruleset,
            std::ptr::null::<Handled>(),
            0,
            CREATE_RULESET_VERSION,
        )
    };
    u32::try_from(version).map_err(|_| io::Error::last_os_error())
}

/// Forbids this process all that the kernel's Landlock knows: no rule allows anything.
pub(crate) fn restrict() -> io::Result<()> {
    let version = i64::from(version()?);
    let rights = |(since, rights): (i64, u64)| if version >= since { rights } else { 0 };
    let handled = Handled {
        files: FILE_RIGHTS.into_iter().map(rights).fold(0, |all, some| all | some),
        net: rights(NET_RIGHTS),
        scopes: rights(SCOPES),
    };
    // An older kernel takes the larger structure as long as what it does not know is zero.
    // SAFETY: a structure of the size that is said.
    let made = unsafe {
        libc::syscall(libc::SYS_landlock_create_ruleset, &raw const handled, size_of::<Handled>(), 0)
    };
    if made < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: it was just made and is nobody else's.
    let ruleset = unsafe { OwnedFd::from_raw_fd(made as libc::c_int) };
    // SAFETY: no pointers. It needs no capability where no new privileges can come, or one that is still there.
    let restricted = unsafe { libc::syscall(libc::SYS_landlock_restrict_self, ruleset.as_raw_fd(), 0) };
    if restricted < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}
