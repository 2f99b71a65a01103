//! The file that says how one memory differs from another.
//!
//! ```text
//! header  160 bytes: both memories, number of runs, a digest over the runs and one over the pages
//! runs    16 bytes each: first page, number of pages; ascending, none touches the next
//! pages   4096 bytes each, in the order of the runs, to the end of the file
//! ```
//!
//! As hostile as any snapshot. What comes of it is trusted only once the last byte was checked, and is then still to be compared
//! with the name of the memory it should be.

use std::fs::File;
use std::io::{self, Read};
use std::ops::Range;
use std::os::unix::fs::FileExt;

use kiln_support::digest::{Digest, Hasher};
use kiln_support::sparse;

use crate::header::Fields;

/// The version of the format that is written, and the only one that is read.
pub const DIFF_VERSION: u32 = 1;
/// The bytes of the header.
pub const DIFF_HEADER_BYTES: usize = 160;
/// The most runs: what 8 GiB of memory have at the worst, where every second page has changed.
pub const RUNS_MAX: usize = 1 << 20;

const MAGIC: [u8; 8] = *b"KILNDIFF";
const DIGESTED_BYTES: usize = DIFF_HEADER_BYTES - Digest::BYTES;
const RUN_BYTES: usize = 16;
const PAGE_BYTES: u64 = 4096;
/// How many pages are moved at a time.
const CHUNK_PAGES: u64 = 256;

/// A diff cannot be used. Whoever it comes from is to blame, unless a file cannot be read or written.
#[derive(Debug, thiserror::Error)]
pub enum DiffError {
    /// It is none, of another version, or its header or runs say what none may say.
    #[error("the memory's diff: {0}")]
    Malformed(&'static str),
    /// Its pages are not those that were written.
    #[error("the memory's diff: its pages do not match their digest")]
    Pages,
    /// It is a diff to another memory.
    #[error("the memory's diff is to another base, {needed}")]
    Base {
        /// The base it needs.
        needed: Digest,
    },
    /// A file cannot be read or written.
    #[error("cannot put a memory together")]
    Io(#[from] io::Error),
}

/// Writes what `ranges`, in bytes of the memory, hold: pages that `page_at` reads. `base` names the memory this is a diff to.
///
/// # Errors
/// What `page_at` or the file system says; [`io::ErrorKind::InvalidInput`] for ranges that are not pages in ascending order, or too many.
pub fn write_diff(
    base: Digest,
    memory_bytes: u64,
    ranges: &[Range<u64>],
    mut page_at: impl FnMut(u64, &mut [u8]) -> io::Result<()>,
    out: &File,
) -> io::Result<()> {
    let runs = to_runs(ranges, memory_bytes).ok_or(io::ErrorKind::InvalidInput)?;
    let mut at = (DIFF_HEADER_BYTES + runs.len()) as u64;
    let mut hasher = Hasher::new();
    let mut chunk = Vec::new();
    for piece in ranges.iter().flat_map(pieces) {
        chunk.resize((piece.end - piece.start) as usize, 0);
        page_at(piece.start, &mut chunk)?;
        hasher.update(&chunk);
        out.write_all_at(&chunk, at)?;
        at += chunk.len() as u64;
    }
    let mut header = Vec::with_capacity(DIFF_HEADER_BYTES);
    header.extend(MAGIC);
    header.extend(DIFF_VERSION.to_le_bytes());
    header.extend((ranges.len() as u32).to_le_bytes());
    header.extend(memory_bytes.to_le_bytes());
    header.extend([0; 8]);
    for digest in [base, Digest::of(&runs), hasher.finish()] {
        header.extend(digest.as_bytes());
    }
    let digest = Digest::of(&header);
    header.extend(digest.as_bytes());
    out.write_all_at(&header, 0)?;
    out.write_all_at(&runs, DIFF_HEADER_BYTES as u64)
}

/// Makes `out`, which is empty, the memory that `diff` makes of `base`, whose name is `base_id`.
///
/// # Errors
/// [`DiffError`]; `out` is of no use then.
pub fn apply_diff(diff: &mut impl Read, base_id: Digest, base: &File, out: &File) -> Result<(), DiffError> {
    let (ranges, pages) = read_runs(diff, base_id, base.metadata()?.len())?;
    sparse::copy(base, out)?;
    let mut hasher = Hasher::new();
    let mut chunk = Vec::new();
    for piece in ranges.iter().flat_map(pieces) {
        chunk.resize((piece.end - piece.start) as usize, 0);
        diff.read_exact(&mut chunk).map_err(cut_off)?;
        hasher.update(&chunk);
        sparse::write(out, &chunk, piece.start)?;
    }
    if hasher.finish() != pages {
        return Err(DiffError::Pages);
    }
    match diff.read(&mut [0])? {
        0 => Ok(()),
        _ => Err(DiffError::Malformed("it goes on behind its end")),
    }
}

/// The runs of a diff to a memory of `memory_bytes` called `base`, and the digest its pages must have.
fn read_runs(
    diff: &mut impl Read,
    base: Digest,
    memory_bytes: u64,
) -> Result<(Vec<Range<u64>>, Digest), DiffError> {
    use DiffError::Malformed;
    let mut bytes = [0; DIFF_HEADER_BYTES];
    diff.read_exact(&mut bytes).map_err(cut_off)?;
    let mut header = Fields(&bytes);
    if header.take::<8>() != MAGIC {
        return Err(Malformed("not a diff"));
    }
    if header.u32() != DIFF_VERSION {
        return Err(Malformed("it is of another version"));
    }
    if Digest::of(&bytes[..DIGESTED_BYTES]).as_bytes()[..] != bytes[DIGESTED_BYTES..] {
        return Err(Malformed("its header does not match its digest"));
    }
    let (count, of_bytes, padding) = (header.u32() as usize, header.u64(), header.u64());
    let (needed, runs_digest, pages) = (header.digest(), header.digest(), header.digest());
    if count > RUNS_MAX || padding != 0 {
        return Err(Malformed("its header says what none may say"));
    }
    if needed != base || of_bytes != memory_bytes {
        return Err(DiffError::Base { needed });
    }
    let mut runs = vec![0; count * RUN_BYTES];
    diff.read_exact(&mut runs).map_err(cut_off)?;
    if Digest::of(&runs) != runs_digest {
        return Err(Malformed("its runs do not match their digest"));
    }
    let mut ranges: Vec<Range<u64>> = Vec::with_capacity(count);
    for run in runs.chunks_exact(RUN_BYTES) {
        let mut run = Fields(run);
        let (first, count) = (run.u64(), run.u64());
        let start = first.checked_mul(PAGE_BYTES);
        let bytes = count.checked_mul(PAGE_BYTES).filter(|bytes| *bytes > 0);
        let range = start.zip(bytes).and_then(|(start, bytes)| Some(start..start.checked_add(bytes)?));
        let behind = ranges.last().map_or(0, |last| last.end);
        match range {
            Some(range) if range.end <= memory_bytes && (ranges.is_empty() || range.start > behind) => {
                ranges.push(range);
            }
            _ => return Err(Malformed("a run that is none")),
        }
    }
    Ok((ranges, pages))
}

/// The runs as they are in a file.
fn to_runs(ranges: &[Range<u64>], memory_bytes: u64) -> Option<Vec<u8>> {
    let mut runs = Vec::with_capacity(ranges.len() * RUN_BYTES);
    let mut behind = None;
    for range in ranges {
        let whole = range.start.is_multiple_of(PAGE_BYTES) && range.end.is_multiple_of(PAGE_BYTES);
        if !whole
            || range.is_empty()
            || range.end > memory_bytes
            || behind.is_some_and(|end| range.start <= end)
        {
            return None;
        }
        runs.extend((range.start / PAGE_BYTES).to_le_bytes());
        runs.extend(((range.end - range.start) / PAGE_BYTES).to_le_bytes());
        behind = Some(range.end);
    }
    (ranges.len() <= RUNS_MAX).then_some(runs)
}

/// A range in pieces that are moved at a time.
fn pieces(range: &Range<u64>) -> impl Iterator<Item = Range<u64>> + use<> {
    let end = range.end;
    let bytes = CHUNK_PAGES * PAGE_BYTES;
    range.clone().step_by(bytes as usize).map(move |start| start..end.min(start + bytes))
}

fn cut_off(error: io::Error) -> DiffError {
    match error.kind() {
        io::ErrorKind::UnexpectedEof => DiffError::Malformed("it is cut off"),
        _ => DiffError::Io(error),
    }
}

#[cfg(test)]
#[expect(clippy::single_range_in_vec_init, reason = "one range of pages is what is meant")]
mod tests {
    use super::*;

    const BYTES: u64 = 64 << 20;

    fn memory(pages: &[(u64, u8)]) -> File {
        let file = tempfile::tempfile().expect("a file");
        file.set_len(BYTES).expect("space");
        for (page, value) in pages {
            file.write_all_at(&[*value; PAGE_BYTES as usize], page * PAGE_BYTES).expect("space");
        }
        file
    }

    fn pages(ranges: &[Range<u64>]) -> Vec<Range<u64>> {
        ranges.iter().map(|range| range.start * PAGE_BYTES..range.end * PAGE_BYTES).collect()
    }

    fn diff(base: &str, full: &File, ranges: &[Range<u64>]) -> Vec<u8> {
        let out = tempfile::tempfile().expect("a file");
        let read = |at, page: &mut [u8]| full.read_exact_at(page, at);
        write_diff(Digest::of(base), BYTES, &pages(ranges), read, &out).expect("written");
        content(&out)
    }

    fn content(file: &File) -> Vec<u8> {
        let mut bytes = vec![0; file.metadata().expect("metadata").len() as usize];
        file.read_exact_at(&mut bytes, 0).expect("read");
        bytes
    }

    fn apply(diff: &[u8], base: &str, memory: &File) -> Result<Vec<u8>, String> {
        let out = tempfile::tempfile().expect("a file");
        let mut diff = diff;
        apply_diff(&mut diff, Digest::of(base), memory, &out).map_err(|error| error.to_string())?;
        Ok(content(&out))
    }

    #[test]
    fn base_and_diff_make_the_memory() {
        let base = memory(&[(0, 1), (1, 1), (7, 1), (16_383, 1)]);
        let full = memory(&[(0, 1), (1, 2), (3, 3), (16_383, 4), (4000, 5), (4001, 6)]);
        // Page 7 becomes zeros, page 9 was and stays zeros; a run longer than a chunk.
        let diff = diff("base", &full, &[1..2, 3..4, 7..10, 3900..4200, 16_383..16_384]);
        assert_eq!(apply(&diff, "base", &base).expect("applied"), content(&full));
    }

    #[test]
    fn an_empty_diff_changes_nothing() {
        let base = memory(&[(5, 1)]);
        let diff = diff("base", &base, &[]);
        assert_eq!(diff.len(), DIFF_HEADER_BYTES);
        assert_eq!(apply(&diff, "base", &base).expect("applied"), content(&base));
    }

    #[test]
    fn any_changed_or_missing_byte_is_refused() {
        let base = memory(&[]);
        let diff = diff("base", &memory(&[(1, 1), (9, 2)]), &[1..2, 9..10]);
        for at in 0..DIFF_HEADER_BYTES + 2 * RUN_BYTES + 64 {
            let mut damaged = diff.clone();
            damaged[at] ^= 1 << (at % 8);
            assert!(apply(&damaged, "base", &base).is_err(), "byte {at}");
        }
        for length in [0, 159, 160, 191, 192, 4095, diff.len() - 1] {
            assert!(
                apply(&diff[..length], "base", &base).expect_err("refused").contains("cut off"),
                "{length}"
            );
        }
        let longer = [diff, vec![0]].concat();
        assert!(apply(&longer, "base", &base).expect_err("refused").contains("behind its end"));
    }

    #[test]
    fn another_base_is_named() {
        let diff = diff("base", &memory(&[(1, 1)]), &[1..2]);
        let error = apply(&diff, "other", &memory(&[])).expect_err("refused");
        assert!(error.contains(&Digest::of("base").to_string()), "{error}");
        let small = tempfile::tempfile().expect("a file");
        assert!(apply(&diff, "base", &small).is_err(), "a base of another size");
    }

    #[test]
    fn runs_that_are_none_are_not_written_and_not_read() {
        let page = PAGE_BYTES;
        let wrong = [
            vec![0..page - 1],
            vec![page..page],
            vec![0..BYTES + page],
            vec![page..2 * page, 0..page],
            vec![0..page, page..2 * page],
        ];
        for ranges in wrong {
            assert!(to_runs(&ranges, BYTES).is_none(), "{ranges:?}");
        }
        for run in [[0, 0], [BYTES / page, 1], [u64::MAX, 1], [1, u64::MAX], [0, BYTES / page + 1]] {
            let runs: Vec<u8> = run.iter().flat_map(|word: &u64| word.to_le_bytes()).collect();
            let mut file = Vec::new();
            file.extend(MAGIC);
            file.extend(1_u32.to_le_bytes());
            file.extend(1_u32.to_le_bytes());
            file.extend(BYTES.to_le_bytes());
            file.extend([0; 8]);
            for digest in [Digest::of("base"), Digest::of(&runs), Digest::EMPTY] {
                file.extend(digest.as_bytes());
            }
            let digest = Digest::of(&file);
            file.extend(digest.as_bytes());
            file.extend(runs);
            let error = apply(&file, "base", &memory(&[])).expect_err("refused");
            assert!(error.contains("a run that is none"), "{run:?}: {error}");
        }
    }
}
