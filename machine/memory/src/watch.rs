//! Which pages of RAM are written while somebody looks.
//!
//! The kernel write-protects the pages and lets the first write to each through at once, whoever makes it: a vCPU, a device's
//! thread, or a system call of one. Nobody waits for us, no write is missed, and no hypervisor is asked. Linux
//! `Documentation/admin-guide/mm/pagemap.rst` "Pagemap Scan IOCTL", `userfaultfd.rst` "Write Protect Notifications".
#![expect(unsafe_code, reason = "the kernel is handed structures of requests that libc does not know")]

use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};

use crate::page_map::page_map;
use crate::{GuestMemory, PAGE_BYTES};

const USER_MODE_ONLY: libc::c_int = 1;
const API: u64 = 0xaa;
const FEATURES: u64 = 1 | 1 << 13 | 1 << 15; // faults of writes, pages not there, without waiting
const REGISTER_WRITE_PROTECT: u64 = 1 << 1;

const UFFDIO_API: libc::c_ulong = 3 << 30 | 24 << 16 | 0xaa << 8 | 0x3f;
const UFFDIO_REGISTER: libc::c_ulong = 3 << 30 | 32 << 16 | 0xaa << 8;
const PAGEMAP_SCAN: libc::c_ulong = 3 << 30 | 96 << 16 | 0x66 << 8 | 16;

const SCAN_PROTECTS: u64 = 1;
const SCAN_CHECKS: u64 = 1 << 1;
const IS_WRITTEN: u64 = 1 << 1;
const IS_PRESENT: u64 = 1 << 3;
const IS_SWAPPED: u64 = 1 << 4;
/// The most pieces one call tells of.
const PIECES: usize = 1024;

/// `struct uffdio_api`, and `struct uffdio_register` with its fourth word.
#[repr(C)]
struct Words<const N: usize>([u64; N]);

/// `struct page_region`.
#[repr(C)]
#[derive(Clone, Copy, Default)]
struct Piece {
    start: u64,
    end: u64,
    categories: u64,
}

/// `struct pm_scan_arg`.
#[repr(C)]
#[derive(Default)]
struct Scan {
    size: u64,
    flags: u64,
    start: u64,
    end: u64,
    walk_end: u64,
    vec: u64,
    vec_len: u64,
    max_pages: u64,
    category_inverted: u64,
    category_mask: u64,
    category_anyof_mask: u64,
    return_mask: u64,
}

/// An eye on the writes to one machine's RAM. Ends when it is dropped.
#[derive(Debug)]
pub struct Watch {
    memory: GuestMemory,
    pagemap: &'static File,
    /// What protects the pages, for as long as it is open.
    _protection: OwnedFd,
}

impl GuestMemory {
    /// Starts to watch for writes. The guest may run; each page costs it one fault at its first write.
    ///
    /// RAM must not be [overlaid](Self::overlay) while it is watched.
    ///
    /// # Errors
    /// What the host says when it cannot: Linux 6.7 is the first that can.
    pub fn watch(&self) -> io::Result<Watch> {
        let flags = libc::O_CLOEXEC | libc::O_NONBLOCK | USER_MODE_ONLY;
        // SAFETY: the call takes flags and gives a descriptor.
        let made = unsafe { libc::syscall(libc::SYS_userfaultfd, flags) };
        if made < 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: it was just made and is nobody else's.
        let protection = unsafe { OwnedFd::from_raw_fd(made as libc::c_int) };
        let mut api = Words([API, FEATURES, 0]);
        // SAFETY: the request reads and writes three words.
        ioctl(unsafe { libc::ioctl(protection.as_raw_fd(), UFFDIO_API, &raw mut api) })?;
        for region in self.regions() {
            let mut register = Words([region.host_address, region.bytes, REGISTER_WRITE_PROTECT, 0]);
            // SAFETY: the request reads and writes four words. Its range is a region of ours, which stays mapped as long as
            // `memory` below; writes to it stay possible and say the same.
            ioctl(unsafe { libc::ioctl(protection.as_raw_fd(), UFFDIO_REGISTER, &raw mut register) })?;
        }
        let pagemap = page_map()?;
        let watch = Watch { memory: self.clone(), pagemap, _protection: protection };
        // Until it has been protected once, every page counts as written.
        watch.take()?;
        Ok(watch)
    }
}

impl Watch {
    /// The pages, as ranges of the image, that may have been written since this was last asked: all that were, and a few
    /// that were only read for the first time. What is written from now on is told the next time.
    ///
    /// # Errors
    /// What the host says; what was written is lost then.
    pub fn take(&self) -> io::Result<Vec<Range<u64>>> {
        let mut written = Vec::new();
        let mut place = 0;
        for region in self.memory.regions() {
            let end = region.host_address + region.bytes;
            let mut start = region.host_address;
            while start < end {
                let mut pieces = vec![Piece::default(); PIECES];
                let mut scan = Scan {
                    size: size_of::<Scan>() as u64,
                    flags: SCAN_PROTECTS | SCAN_CHECKS,
                    start,
                    end,
                    vec: pieces.as_mut_ptr().expose_provenance() as u64,
                    vec_len: PIECES as u64,
                    category_mask: IS_WRITTEN,
                    category_anyof_mask: IS_PRESENT | IS_SWAPPED,
                    return_mask: IS_WRITTEN,
                    ..Scan::default()
                };
                // SAFETY: the request reads a scan of the size it says and writes its end and at most `vec_len` pieces.
                let count =
                    ioctl(unsafe { libc::ioctl(self.pagemap.as_raw_fd(), PAGEMAP_SCAN, &raw mut scan) })?;
                for piece in &pieces[..count.min(PIECES)] {
                    let at = place + piece.start - region.host_address;
                    written.push(at..at + (piece.end - piece.start));
                }
                if scan.walk_end <= start {
                    return Err(io::ErrorKind::UnexpectedEof.into());
                }
                start = scan.walk_end;
            }
            place += region.bytes;
        }
        debug_assert!(written.iter().all(|range| range.start.is_multiple_of(PAGE_BYTES)));
        Ok(written)
    }
}

fn ioctl(result: libc::c_int) -> io::Result<usize> {
    usize::try_from(result).map_err(|_| io::Error::last_os_error())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Gpa;

    const MIB: u64 = 1 << 20;

    fn pages(ranges: &[Range<u64>]) -> Vec<u64> {
        ranges.iter().flat_map(|range| range.clone().step_by(PAGE_BYTES as usize)).collect()
    }

    #[test]
    fn every_write_is_told_once() {
        let memory = GuestMemory::new(4 << 30).expect("mapped");
        for place in [0x1000, 0x2000, 0x9000, 5 * MIB] {
            memory.write_u64(Gpa(place), 1).expect("RAM");
        }
        let watch = memory.watch().expect("Linux 6.7 or later");
        assert_eq!(watch.take().expect("told"), []);
        memory.read_u64(Gpa(0x9000)).expect("RAM");
        assert_eq!(watch.take().expect("told"), []);
        memory.write_u64(Gpa(0x2000), 2).expect("RAM");
        // One that was never touched.
        memory.write_u64(Gpa((4 << 30) + 0x3000), 2).expect("RAM");
        assert_eq!(pages(&watch.take().expect("told")), [0x2000, (3 << 30) + 0x3000]);
        assert_eq!(watch.take().expect("told"), []);
        memory.write_u64(Gpa(0x2000), 3).expect("RAM");
        assert_eq!(pages(&watch.take().expect("told")), [0x2000]);
    }

    #[test]
    fn what_the_kernel_writes_for_us_is_told_too() {
        use std::os::unix::fs::FileExt;
        let memory = GuestMemory::new(MIB).expect("mapped");
        memory.write(Gpa(0), &vec![1; 0x8000]).expect("RAM");
        let watch = memory.watch().expect("Linux 6.7 or later");
        let file = tempfile::tempfile().expect("a file");
        file.write_all_at(&[7; 0x1000], 0).expect("space");
        let slices = memory.slices(&[crate::Span::new(Gpa(0x3000), 0x1000)]).expect("RAM");
        slices.read_at(&file, 0).expect("read");
        assert_eq!(pages(&watch.take().expect("told")), [0x3000]);
    }

    #[test]
    fn writes_over_a_file_are_told() {
        let memory = GuestMemory::new(MIB).expect("mapped");
        memory.write(Gpa(0), &vec![1; 0x8000]).expect("RAM");
        let file = tempfile::tempfile().expect("a file");
        memory.save(&file).expect("saved");
        let copy = GuestMemory::new(MIB).expect("mapped");
        copy.overlay(&file).expect("overlaid");
        copy.write_u64(Gpa(0x1000), 2).expect("RAM");
        let watch = copy.watch().expect("Linux 6.7 or later");
        copy.write_u64(Gpa(0x5000), 2).expect("RAM");
        assert!(pages(&watch.take().expect("told")).contains(&0x5000));
        drop(watch);
        copy.write_u64(Gpa(0x6000), 2).expect("RAM");
        assert_eq!(copy.read_u64(Gpa(0x6000)), Ok(2));
    }

    #[test]
    fn many_pieces_are_all_told() {
        let memory = GuestMemory::new(64 * MIB).expect("mapped");
        let watch = memory.watch().expect("Linux 6.7 or later");
        let places: Vec<u64> = (0..3000).map(|index| index * 2 * PAGE_BYTES).collect();
        for place in &places {
            memory.write_u64(Gpa(*place), 1).expect("RAM");
        }
        assert_eq!(pages(&watch.take().expect("told")), places);
    }
}
