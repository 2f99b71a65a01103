//! All of RAM in a file, and a file in the place of RAM.
//!
//! In a file RAM is an *image*: its regions end to end, pages of zeros as holes.

use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;

use kiln_support::sparse;

use crate::page_map::page_map;
use crate::{Gpa, GuestMemory, PAGE_BYTES, Region};

/// How much is looked at together.
const CHUNK_BYTES: u64 = 1 << 20;
const PAGEMAP_ENTRY_BYTES: u64 = 8;
/// The page is in memory.
const PRESENT: u64 = 1 << 63;
/// The page is in swap space.
const SWAPPED: u64 = 1 << 62;
/// The page is the file's own.
const OF_FILE: u64 = 1 << 61;

impl GuestMemory {
    /// Writes all of RAM to `file`, which must be empty.
    ///
    /// Of a guest that runs, what it writes meanwhile may be in the file or not. Costs a copy of what the guest has touched, and
    /// nothing for what it has not.
    ///
    /// # Errors
    /// What the file system says; the file is of no use then.
    pub fn save(&self, file: &File) -> io::Result<()> {
        match &*self.base() {
            Some(base) => sparse::copy(base, file)?,
            None => file.set_len(self.bytes())?,
        }
        self.save_pages(file, &self.changed()?)
    }

    /// Writes what the guest has [changed](Self::changed) to `file`, which must be empty, and says what that is: put over what RAM
    /// was made from, it is all of RAM.
    ///
    /// # Errors
    /// What the file system says; the file is of no use then.
    pub fn save_changes(&self, file: &File) -> io::Result<Vec<Range<u64>>> {
        file.set_len(self.bytes())?;
        let changed = self.changed()?;
        self.save_pages(file, &changed)?;
        Ok(changed)
    }

    /// Puts the image in `file` in the place of all of RAM. What is written from now on stays in this process, and nothing is read
    /// before it is touched.
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
        *self.base() = Some(file.try_clone()?);
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

    /// The pages, as ranges of the image, that were written since RAM was made, or since the file was put in its place: those the
    /// process has of its own. In ascending order; neighbours are one range.
    ///
    /// # Errors
    /// What the host says when it does not let the process look at its own page table.
    pub fn changed(&self) -> io::Result<Vec<Range<u64>>> {
        let pagemap = page_map()?;
        let mut entries = Vec::new();
        let mut changed: Vec<Range<u64>> = Vec::new();
        let mut place = 0;
        for region in self.regions() {
            for start in (0..region.bytes).step_by((CHUNK_BYTES * 64) as usize) {
                let pages = (CHUNK_BYTES * 64).min(region.bytes - start) / PAGE_BYTES;
                entries.resize((pages * PAGEMAP_ENTRY_BYTES) as usize, 0);
                let first = (region.host_address + start) / PAGE_BYTES;
                pagemap.read_exact_at(&mut entries, first * PAGEMAP_ENTRY_BYTES)?;
                let (entries, _) = entries.as_chunks();
                for (page, _) in (0..).zip(entries).filter(|(_, entry)| is_own(u64::from_ne_bytes(**entry))) {
                    let at: u64 = place + start + page * PAGE_BYTES;
                    match changed.last_mut() {
                        Some(last) if last.end == at => last.end += PAGE_BYTES,
                        _ => changed.push(at..at + PAGE_BYTES),
                    }
                }
            }
            place += region.bytes;
        }
        Ok(changed)
    }

    /// Writes `ranges` of the image to their places in `file`, pages of zeros as holes.
    ///
    /// # Errors
    /// What the file system says; [`io::ErrorKind::InvalidInput`] for what is not of the image.
    pub fn save_pages(&self, file: &File, ranges: &[Range<u64>]) -> io::Result<()> {
        let mut chunk = Vec::new();
        for range in ranges {
            let mut at = range.start;
            while at < range.end {
                let (gpa, left) = self.at(at).ok_or(io::ErrorKind::InvalidInput)?;
                let bytes = CHUNK_BYTES.min(range.end - at).min(left);
                chunk.resize(bytes as usize, 0);
                self.read(gpa, &mut chunk).map_err(io::Error::other)?;
                sparse::write(file, &chunk, at)?;
                at += bytes;
            }
        }
        Ok(())
    }

    /// Where in RAM the place `at` of the image is, and how much of its region is left there.
    fn at(&self, at: u64) -> Option<(Gpa, u64)> {
        let mut place = 0;
        self.regions().find_map(|Region { at: start, bytes, .. }| {
            let offset = at.checked_sub(place)?;
            place += bytes;
            (offset < bytes).then(|| (Gpa(start.0 + offset), bytes - offset))
        })
    }
}

/// Whether a page is the process's own and not a file's, or nobody's.
fn is_own(entry: u64) -> bool {
    entry & SWAPPED != 0 || entry & (PRESENT | OF_FILE) == PRESENT
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
    fn changes_put_over_the_base_are_all_of_ram() {
        let memory = GuestMemory::new(4 << 30).expect("mapped");
        for place in [0x1000, 0x2000, 0x8000, HIGH_RAM_START.0] {
            memory.write_u64(Gpa(place), place | 1).expect("RAM");
        }
        let base = saved(&memory);
        let copy = GuestMemory::new(4 << 30).expect("mapped");
        copy.overlay(&base).expect("overlaid");
        assert_eq!(copy.changed().expect("a page table"), []);
        copy.read_u64(Gpa(0x8000)).expect("RAM");
        // A page that becomes zeros, one that was, and neighbours.
        copy.write_u64(Gpa(0x2000), 0).expect("RAM");
        copy.write_u64(Gpa(0x3000), 0).expect("RAM");
        copy.write_u64(Gpa(0x4000), 4).expect("RAM");
        copy.write_u64(Gpa(HIGH_RAM_START.0 + 0x5000), 5).expect("RAM");
        let changes = tempfile::tempfile().expect("a file");
        let changed = copy.save_changes(&changes).expect("saved");
        let high = 3 << 30;
        assert_eq!(changed, [0x2000..0x5000, high + 0x5000..high + 0x6000]);

        let merged = tempfile::tempfile().expect("a file");
        sparse::copy(&base, &merged).expect("copied");
        sparse::patch(&changes, &merged, &changed).expect("patched");
        let full = saved(&copy);
        let data = |file| sparse::data(file, 0).collect::<io::Result<Vec<_>>>().expect("a file with holes");
        assert_eq!(data(&merged), data(&full));
        let again = GuestMemory::new(4 << 30).expect("mapped");
        again.overlay(&merged).expect("overlaid");
        for place in [0x1000, 0x2000, 0x3000, 0x4000, 0x8000, HIGH_RAM_START.0, HIGH_RAM_START.0 + 0x5000] {
            assert_eq!(again.read_u64(Gpa(place)), copy.read_u64(Gpa(place)), "{place:#x}");
        }
    }

    #[test]
    fn a_file_of_another_length_is_refused() {
        let file = saved(&GuestMemory::new(1 << 20).expect("mapped"));
        let memory = GuestMemory::new(2 << 20).expect("mapped");
        let error = memory.overlay(&file).expect_err("refused");
        assert_eq!(error.kind(), io::ErrorKind::InvalidData);
    }
}
