//! Files with holes: where their data is, and copies that leave the holes out. Linux man page lseek(2), "Seeking file data and
//! holes".

use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::unix::fs::FileExt;

use rustix::fs::{FallocateFlags, SeekFrom};
use rustix::io::Errno;

/// What a hole is made of, in bytes.
const PAGE_BYTES: usize = 4096;
static ZEROS: [u8; PAGE_BYTES] = [0; PAGE_BYTES];
/// How much is copied at a time, in bytes.
const CHUNK_BYTES: u64 = 1 << 20;

/// The pieces of `file` from `at` on that hold data, in order. What lies between them reads as zeros.
///
/// Moves the file's offset, which whoever shares the descriptor sees.
pub fn data(file: &File, at: u64) -> impl Iterator<Item = io::Result<Range<u64>>> {
    let mut next = Some(at);
    std::iter::from_fn(move || {
        let piece = piece(file, next?);
        next = match &piece {
            Ok(Some(range)) => Some(range.end),
            _ => None,
        };
        piece.transpose()
    })
}

/// The first piece of data at or behind `at`.
fn piece(file: &File, at: u64) -> io::Result<Option<Range<u64>>> {
    let start = match rustix::fs::seek(file, SeekFrom::Data(at)) {
        Ok(start) => start,
        Err(Errno::NXIO) => return Ok(None),
        Err(error) => return Err(error.into()),
    };
    // There is always a hole at the end.
    let end = rustix::fs::seek(file, SeekFrom::Hole(start))?;
    Ok(Some(start..end))
}

/// Where a file has holes, asked from its start to its end.
#[derive(Debug)]
pub struct Holes<'a> {
    file: &'a File,
    length: u64,
    data: Range<u64>,
}

impl<'a> Holes<'a> {
    /// The holes of `file`, `length` bytes of it.
    pub fn of(file: &'a File, length: u64) -> Self {
        Self { file, length, data: 0..0 }
    }

    /// Whether all of `range`, which begins at or behind the one asked for before, lies in a hole.
    ///
    /// # Errors
    /// What the file system says.
    pub fn have(&mut self, range: Range<u64>) -> io::Result<bool> {
        if self.data.end <= range.start {
            self.data = piece(self.file, range.start)?.unwrap_or(self.length..self.length);
        }
        Ok(range.end <= self.data.start)
    }
}

/// Makes `to` a copy of `from` with the same length and holes. `to` must be empty, or all of it a hole.
///
/// # Errors
/// What the file system says; `to` is of no use then.
pub fn copy(from: &File, to: &File) -> io::Result<()> {
    if rustix::fs::ioctl_ficlone(to, from).is_ok() {
        return Ok(());
    }
    to.set_len(from.metadata()?.len())?;
    let mut chunk = Vec::new();
    for piece in data(from, 0) {
        let piece = piece?;
        let mut at = piece.start;
        while at < piece.end {
            let bytes = CHUNK_BYTES.min(piece.end - at);
            chunk.resize(bytes as usize, 0);
            from.read_exact_at(&mut chunk, at)?;
            to.write_all_at(&chunk, at)?;
            at += bytes;
        }
    }
    Ok(())
}

/// Writes `content` at `at`, a multiple of a page like its length, pages of zeros as holes.
///
/// # Errors
/// What the file system says.
pub fn write(file: &File, content: &[u8], at: u64) -> io::Result<()> {
    let is_zero = |page: &[u8]| page == &ZEROS[..page.len()];
    let mut rest = content;
    let mut at = at;
    while let Some(first) = rest.chunks(PAGE_BYTES).next() {
        let pages = rest.chunks(PAGE_BYTES).take_while(|page| is_zero(page) == is_zero(first)).count();
        let (run, behind) = rest.split_at(rest.len().min(pages * PAGE_BYTES));
        if is_zero(first) {
            hole(file, at..at + run.len() as u64)?;
        } else {
            file.write_all_at(run, at)?;
        }
        at += run.len() as u64;
        rest = behind;
    }
    Ok(())
}

/// Makes `ranges` of `to` what they are in `from`, holes as holes.
///
/// # Errors
/// What the file system says; `to` is of no use then.
pub fn patch(from: &File, to: &File, ranges: &[Range<u64>]) -> io::Result<()> {
    let mut chunk = Vec::new();
    for range in ranges {
        let mut at = range.start;
        while at < range.end {
            let bytes = CHUNK_BYTES.min(range.end - at);
            chunk.resize(bytes as usize, 0);
            from.read_exact_at(&mut chunk, at)?;
            write(to, &chunk, at)?;
            at += bytes;
        }
    }
    Ok(())
}

/// Makes a range of `file` a hole, when it is not one.
fn hole(file: &File, range: Range<u64>) -> io::Result<()> {
    match piece(file, range.start)? {
        Some(data) if data.start < range.end => {
            let how = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
            Ok(rustix::fs::fallocate(file, how, range.start, range.end - range.start)?)
        }
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn file(bytes: u64, pieces: &[(u64, &[u8])]) -> File {
        let file = tempfile::tempfile().expect("a file");
        file.set_len(bytes).expect("space");
        for (at, content) in pieces {
            file.write_all_at(content, *at).expect("space");
        }
        file
    }

    fn pieces(file: &File, at: u64) -> Vec<Range<u64>> {
        data(file, at).collect::<io::Result<_>>().expect("a file system with holes")
    }

    #[test]
    fn data_is_between_holes() {
        let file = file(1 << 30, &[(0x10_0000, &[1; 0x2000]), (0x20_0000, &[2; 0x1000])]);
        assert_eq!(pieces(&file, 0), [0x10_0000..0x10_2000, 0x20_0000..0x20_1000]);
        assert_eq!(pieces(&file, 0x10_1000), [0x10_1000..0x10_2000, 0x20_0000..0x20_1000]);
        assert_eq!(pieces(&file, 0x20_1000), []);
    }

    #[test]
    fn an_empty_file_has_no_data() {
        assert_eq!(pieces(&file(0, &[]), 0), []);
        assert_eq!(pieces(&file(1 << 20, &[]), 0), []);
    }

    #[test]
    fn a_copy_has_the_same_content_and_the_same_holes() {
        let big = vec![3; (CHUNK_BYTES + 5000) as usize];
        let from = file(1 << 30, &[(0x3000, &big), (0x3ff0_0000, &[2; 10])]);
        let to = file(0, &[]);
        copy(&from, &to).expect("copied");
        assert_eq!(to.metadata().expect("metadata").len(), 1 << 30);
        assert_eq!(pieces(&to, 0), pieces(&from, 0));
        let mut content = vec![0; big.len() + 2];
        to.read_exact_at(&mut content, 0x2fff).expect("read");
        assert_eq!((content[0], &content[1..=big.len()]), (0, &big[..]));
        assert_eq!(to.read_at(&mut content[..4], 0x3ff0_0008).expect("read"), 4);
        assert_eq!(content[..4], [2, 2, 0, 0]);
    }
}
