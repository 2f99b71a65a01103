//! The guest kernel's random number generator. Linux man page random(4).

use rustix::fd::{AsFd, AsRawFd};
use rustix::io::Errno;

use super::arch::{self, syscall};

const RNDADDENTROPY: usize = 0x4008_5203;
const RNDRESEEDCRNG: usize = 0x5207;
/// The most bytes credited; the kernel's pool holds 32.
const MAX_BYTES: usize = 256;

/// `struct rand_pool_info` with room for the bytes.
#[repr(C)]
struct PoolInfo {
    entropy_bits: i32,
    bytes: i32,
    buffer: [u8; MAX_BYTES],
}

/// Mixes the first 256 `bytes` into the kernel's generator, counts them as random, and has it start from them at
/// once. `device` is `/dev/urandom`.
///
/// # Errors
/// What ioctl(2) reports; `PERM` without `CAP_SYS_ADMIN`.
pub fn add_entropy(device: impl AsFd, bytes: &[u8]) -> Result<(), Errno> {
    let bytes = &bytes[..bytes.len().min(MAX_BYTES)];
    let mut info =
        PoolInfo { entropy_bits: bytes.len() as i32 * 8, bytes: bytes.len() as i32, buffer: [0; MAX_BYTES] };
    info.buffer[..bytes.len()].copy_from_slice(bytes);
    let device = device.as_fd().as_raw_fd() as usize;
    // SAFETY: the kernel reads a rand_pool_info, whose `bytes` says how many follow.
    let added =
        unsafe { syscall(arch::IOCTL, [device, RNDADDENTROPY, (&raw const info).expose_provenance(), 0, 0]) };
    super::wipe(&mut info.buffer);
    added?;
    // SAFETY: this request takes no argument.
    unsafe { syscall(arch::IOCTL, [device, RNDRESEEDCRNG, 0, 0, 0]) }?;
    Ok(())
}
