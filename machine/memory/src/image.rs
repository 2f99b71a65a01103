//! All of RAM in a file, and a file in the place of RAM.

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;
use std::sync::atomic::Ordering;

use crate::{GuestMemory, PAGE_BYTES, Region};

/// How much is looked at together.
const CHUNK_BYTES: u64 = 1 << 20;
/// One 64-bit entry for each page of the process; zero for one that was never touched. Linux
/// `Documentation/admin-guide/mm/pagemap.rst`.
const PAGEMAP: &str = "/proc/self/pagemap";
const PAGEMAP_ENTRY_BYTES: u64 = 8;

impl GuestMemory {
    /// Writes all of RAM to `file`: its regions end to end, pages of zeros as holes.
    ///
    /// The guest must not run. Costs a copy of what the guest has touched, and nothing for what it has not.
    ///
    /// # Errors
    /// What the file system says; the file is of no use then.
    pub fn save(&self, file: &File) -> io::Result<()> {
        file.set_len(0)?;
        file.set_len(self.bytes())?;
        let pagemap = File::open(PAGEMAP)?;
        let mut chunk = vec![0; CHUNK_BYTES as usize];
        let mut place = 0;
        for region in self.regions() {
            for start in (0..region.bytes).step_by(CHUNK_BYTES as usize) {
                let bytes = CHUNK_BYTES.min(region.bytes - start);
                let touched = self.touched(&pagemap, region, start, bytes)?;
                self.save_pages(file, &mut chunk, crate::Gpa(region.at.0 + start), place + start, &touched)?;
            }
            place += region.bytes;
        }
        Ok(())
    }

    /// Puts the content of `file`, as [`save`](Self::save) wrote it, in the place of all of RAM. What is written from now on stays
    /// in this process, and nothing is read before it is touched.
    ///
    /// Whoever can change or cut the file changes, or ends, this machine: it must be sealed, or nobody else's.
    ///
    /// # Errors
    /// [`io::ErrorKind::InvalidData`] when the file's length is not that of RAM; otherwise what the host says, and the RAM is
    /// of no use then.
    pub fn overlay(&self, file: &File) -> io::Result<()> {
        if file.metadata()?.len() != self.bytes() {
            return Err(io::ErrorKind::InvalidData.into());
        }
        self.overlaid().store(true, Ordering::Relaxed);
        let mut place = 0;
        for region in self.regions() {
            // SAFETY: the range is a region of ours, mapped as long as `self` lives, and stays so: one mapping takes the
            // place of the other. Nobody holds a reference into guest memory.
            let mapped = unsafe {
                libc::mmap(
                    region.host_address as *mut libc::c_void,
                    region.bytes as usize,
                    libc::PROT_READ | libc::PROT_WRITE,
                    libc::MAP_PRIVATE | libc::MAP_NORESERVE | libc::MAP_FIXED,
                    file.as_raw_fd(),
                    place as libc::off_t,
                )
            };
            if mapped == libc::MAP_FAILED {
                return Err(io::Error::last_os_error());
            }
            place += region.bytes;
        }
        Ok(())
    }

    /// Which pages of the chunk at `start` may hold something.
    fn touched(&self, pagemap: &File, region: Region, start: u64, bytes: u64) -> io::Result<Vec<bool>> {
        let pages = bytes / PAGE_BYTES;
        if self.overlaid().load(Ordering::Relaxed) {
            // A page that this process never touched has what the file has.
            return Ok(vec![true; pages as usize]);
        }
        let mut entries = vec![0; (pages * PAGEMAP_ENTRY_BYTES) as usize];
        let first = (region.host_address + start) / PAGE_BYTES;
        pagemap.read_exact_at(&mut entries, first * PAGEMAP_ENTRY_BYTES)?;
        Ok(entries.chunks_exact(PAGEMAP_ENTRY_BYTES as usize).map(|entry| entry != [0; 8]).collect())
    }

    /// Writes the touched pages of a chunk that are not all zeros, neighbours together.
    fn save_pages(
        &self,
        file: &File,
        chunk: &mut [u8],
        at: crate::Gpa,
        place: u64,
        touched: &[bool],
    ) -> io::Result<()> {
        const PAGE: usize = PAGE_BYTES as usize;
        let mut run = 0..0;
        for (page, touched) in touched.iter().enumerate() {
            let bytes = page * PAGE..(page + 1) * PAGE;
            if !touched {
                continue;
            }
            let content = &mut chunk[bytes.clone()];
            self.read(crate::Gpa(at.0 + bytes.start as u64), content).map_err(io::Error::other)?;
            if content.iter().all(|byte| *byte == 0) {
                continue;
            }
            if run.end == bytes.start && !run.is_empty() {
                run.end = bytes.end;
            } else {
                file.write_all_at(&chunk[run.clone()], place + run.start as u64)?;
                run = bytes;
            }
        }
        file.write_all_at(&chunk[run.clone()], place + run.start as u64)
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::MetadataExt;

    use super::*;
    use crate::{Gpa, HIGH_RAM_START};

    fn saved(memory: &GuestMemory) -> File {
        let file = tempfile::tempfile().expect("a file");
        memory.save(&file).expect("saved");
        file
    }

    #[test]
    fn what_is_saved_comes_back_on_both_sides_of_the_hole() {
        let memory = GuestMemory::new(4 << 30).expect("mapped");
        let places = [Gpa(0), Gpa(0x1ffc), Gpa(0x5000), Gpa(0xbfff_fff8), HIGH_RAM_START, Gpa((5 << 30) - 8)];
        for (value, place) in (1..).zip(places) {
            memory.write_u64(place, value).expect("RAM");
        }
        let file = saved(&memory);
        assert_eq!(file.metadata().expect("metadata").len(), 4 << 30);
        let other = GuestMemory::new(4 << 30).expect("mapped");
        other.write_u64(Gpa(0x9000), 9).expect("RAM");
        other.overlay(&file).expect("overlaid");
        for (value, place) in (1..).zip(places) {
            assert_eq!(other.read_u64(place), Ok(value), "{place}");
        }
        assert_eq!(other.read_u64(Gpa(0x9000)), Ok(0), "nothing of before is left");
    }

    #[test]
    fn zeros_take_no_room() {
        let memory = GuestMemory::new(64 << 20).expect("mapped");
        memory.write(Gpa(0), &vec![0; 8 << 20]).expect("RAM");
        memory.write_u16(Gpa(40 << 20), 1).expect("RAM");
        let file = saved(&memory);
        assert!(file.metadata().expect("metadata").blocks() * 512 <= 64 << 10);
    }

    #[test]
    fn what_is_written_over_a_file_stays_in_the_process_and_is_saved_with_the_rest() {
        let memory = GuestMemory::new(1 << 20).expect("mapped");
        memory.write_u64(Gpa(0x1000), 1).expect("RAM");
        memory.write_u64(Gpa(0x8000), 2).expect("RAM");
        let file = saved(&memory);
        let [one, other] = [(); 2].map(|()| {
            let memory = GuestMemory::new(1 << 20).expect("mapped");
            memory.overlay(&file).expect("overlaid");
            memory
        });
        one.write_u64(Gpa(0x1000), 7).expect("RAM");
        assert_eq!(other.read_u64(Gpa(0x1000)), Ok(1));
        let again = GuestMemory::new(1 << 20).expect("mapped");
        again.overlay(&saved(&one)).expect("overlaid");
        assert_eq!([0x1000, 0x8000].map(|at| again.read_u64(Gpa(at))), [Ok(7), Ok(2)]);
    }

    #[test]
    fn a_file_of_another_length_is_refused() {
        let file = saved(&GuestMemory::new(1 << 20).expect("mapped"));
        let memory = GuestMemory::new(2 << 20).expect("mapped");
        let error = memory.overlay(&file).expect_err("refused");
        assert_eq!(error.kind(), io::ErrorKind::InvalidData);
    }
}
