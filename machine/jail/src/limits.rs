//! How much a jailed process may have of what the host has.
#![expect(unsafe_code, reason = "limits are set by a system call without a safe interface")]

use std::io;
use std::ptr;

/// The memory a monitor may have beside its guest's: stacks of 2 MiB a thread, heaps, buffers.
pub const OVERHEAD_BYTES: u64 = 128 << 20;
/// The address space it may have beside its guest's memory: the program, what the allocator reserves and never
/// touches (64 MiB a heap), the pages it shares with KVM.
const ADDRESS_OVERHEAD_BYTES: u64 = 1 << 30;
/// Descriptors: 300 files of a machine, twice while it is made, 512 connections, and the machine itself.
const FILES: u64 = 2048;
/// The threads a monitor may have: a vCPU each, a device each, and the first.
pub const THREADS_MAX: u64 = 64;
/// The most address space before the size of the machine is known.
const UNKNOWN_BYTES: u64 = 2 << 40;

/// The limits that are the same for all. What the host set lower stays so.
pub(crate) fn set() -> io::Result<()> {
    lower(libc::RLIMIT_CORE, 0)?;
    lower(libc::RLIMIT_NPROC, THREADS_MAX)?;
    lower(libc::RLIMIT_MEMLOCK, 0)?;
    lower(libc::RLIMIT_MSGQUEUE, 0)?;
    lower(libc::RLIMIT_NOFILE, FILES)?;
    lower(libc::RLIMIT_DATA, UNKNOWN_BYTES)?;
    lower(libc::RLIMIT_AS, UNKNOWN_BYTES)
}

/// Bounds this process to what the machine needs that it now knows of: guest memory of `memory_bytes` and
/// [`OVERHEAD_BYTES`] beside it, and files that do not grow past `file_bytes`. It can be bounded tighter later, and never wider.
///
/// # Errors
/// What the system says.
pub fn confine(memory_bytes: u64, file_bytes: u64) -> io::Result<()> {
    // All memory that is this process's own: of shared memory it can map files alone (`calls.rs`).
    lower(libc::RLIMIT_DATA, memory_bytes.saturating_add(OVERHEAD_BYTES))?;
    lower(libc::RLIMIT_AS, memory_bytes.saturating_add(ADDRESS_OVERHEAD_BYTES))?;
    lower(libc::RLIMIT_FSIZE, file_bytes)
}

/// Lowers both limits to `value`, the soft one also where it was lower.
fn lower(resource: libc::__rlimit_resource_t, value: u64) -> io::Result<()> {
    let mut limit = libc::rlimit { rlim_cur: 0, rlim_max: 0 };
    // SAFETY: a limit of ours is filled in, for this process.
    call(unsafe { libc::prlimit(0, resource, ptr::null(), &raw mut limit) })?;
    limit.rlim_max = limit.rlim_max.min(value);
    limit.rlim_cur = limit.rlim_max;
    // SAFETY: a limit of ours is read, for this process.
    call(unsafe { libc::prlimit(0, resource, &raw const limit, ptr::null_mut()) })
}

fn call(result: libc::c_int) -> io::Result<()> {
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}
