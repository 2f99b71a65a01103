//! Where the data of a sparse file lies: the old GNU form and the three pax forms.
//!
//! GNU tar manual, "Storing Sparse Files": 0.0 repeats a record for each offset and each length, 0.1 puts all of them
//! into one record, 1.0 puts them as text before the data.

use super::pax::decimal;

/// Pieces of data a sparse file may have. At 16 bytes each this bounds the memory one entry can ask for.
pub(super) const SEGMENTS_MAX: usize = 1 << 20;

/// A piece of a sparse file that has data.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Segment {
    /// Where in the file it starts, in bytes.
    pub(crate) offset: u64,
    /// How long it is, in bytes; never zero.
    pub(crate) length: u64,
}

/// The `GNU.sparse.*` records of an entry.
#[derive(Default)]
pub(super) struct SparseRecords {
    major: Option<u64>,
    minor: Option<u64>,
    /// The file's real name: in forms 0.1 and 1.0 the header's is a made-up one.
    pub(super) name: Option<Vec<u8>>,
    /// The file's size with its holes.
    pub(super) real_size: Option<u64>,
    pairs: Vec<(u64, u64)>,
    offset: Option<u64>,
    mapped: bool,
}

/// How an entry's sparse map is to be had.
pub(super) enum SparseForm {
    /// Not sparse.
    None,
    /// From the records alone.
    Records(Vec<(u64, u64)>),
    /// As text before the data.
    Data,
}

impl SparseRecords {
    /// Takes one record whose key is `GNU.sparse.` and `field`.
    pub(super) fn take(&mut self, field: &[u8], value: &[u8]) -> Result<(), &'static str> {
        const BAD: &str = "a sparse map holds what is not a number";
        match field {
            b"major" => self.major = Some(decimal(value).ok_or(BAD)?),
            b"minor" => self.minor = Some(decimal(value).ok_or(BAD)?),
            b"name" if value.contains(&0) => return Err("a pax path holds a NUL byte"),
            b"name" => self.name = Some(value.to_vec()),
            b"size" | b"realsize" => self.real_size = Some(decimal(value).ok_or(BAD)?),
            b"offset" if self.offset.is_some() => {
                return Err("a sparse map has an offset without a length");
            }
            b"offset" => self.offset = Some(decimal(value).ok_or(BAD)?),
            b"numbytes" => {
                let offset = self.offset.take().ok_or("a sparse map has a length without an offset")?;
                self.push(offset, decimal(value).ok_or(BAD)?)?;
            }
            b"map" => {
                self.pairs.clear();
                self.mapped = true;
                let mut numbers = value.split(|&b| b == b',').map(decimal);
                while let Some(offset) = numbers.next() {
                    let length = numbers.next().ok_or("a sparse map has an offset without a length")?;
                    self.push(offset.ok_or(BAD)?, length.ok_or(BAD)?)?;
                }
            }
            _ => {}
        }
        Ok(())
    }

    fn push(&mut self, offset: u64, length: u64) -> Result<(), &'static str> {
        if self.pairs.len() >= SEGMENTS_MAX {
            return Err("a sparse map has too many pieces");
        }
        self.mapped = true;
        self.pairs.push((offset, length));
        Ok(())
    }

    /// Which form the records announce.
    pub(super) fn form(&mut self) -> Result<SparseForm, &'static str> {
        match (self.major, self.minor) {
            (Some(1), Some(0)) => Ok(SparseForm::Data),
            (None | Some(0), None | Some(0 | 1)) => {
                if self.offset.is_some() {
                    return Err("a sparse map has an offset without a length");
                }
                if self.mapped || self.real_size.is_some() {
                    return Ok(SparseForm::Records(std::mem::take(&mut self.pairs)));
                }
                Ok(SparseForm::None)
            }
            _ => Err("the sparse format's version is not known"),
        }
    }
}

/// Reads the text map of form 1.0 as its bytes come: a count, then that many offsets and lengths, each on a line.
#[derive(Default)]
pub(super) struct TextMap {
    count: Option<u64>,
    numbers: Vec<u64>,
    current: Option<u64>,
}

impl TextMap {
    /// Takes the next bytes; true when the map is whole. The rest of that 512-byte block is padding.
    pub(super) fn take(&mut self, bytes: &[u8]) -> Result<bool, &'static str> {
        for &byte in bytes {
            match byte {
                b'0'..=b'9' => {
                    let digit = u64::from(byte - b'0');
                    let value = self.current.unwrap_or(0).checked_mul(10).and_then(|v| v.checked_add(digit));
                    self.current = Some(value.ok_or("a number in a sparse map is too large")?);
                }
                b'\n' => {
                    let value = self.current.take().ok_or("a sparse map has an empty line")?;
                    if self.count.is_none() {
                        if value > SEGMENTS_MAX as u64 {
                            return Err("a sparse map has too many pieces");
                        }
                        self.count = Some(value);
                    } else {
                        self.numbers.push(value);
                    }
                    if self.count.is_some_and(|count| self.numbers.len() as u64 == count * 2) {
                        return Ok(true);
                    }
                }
                _ => return Err("a sparse map holds what is not a number"),
            }
        }
        Ok(false)
    }

    /// The pairs read.
    pub(super) fn pairs(self) -> Vec<(u64, u64)> {
        self.numbers.chunks_exact(2).map(|pair| (pair[0], pair[1])).collect()
    }
}

/// The map as segments: in order, apart, inside the file, and as long together as the data stored.
///
/// # Errors
/// Which of these does not hold.
pub(super) fn checked(
    pairs: impl IntoIterator<Item = (u64, u64)>,
    file_bytes: u64,
    stored_bytes: u64,
) -> Result<Vec<Segment>, &'static str> {
    let (mut end, mut total) = (0u64, 0u64);
    let mut segments = Vec::new();
    for (offset, length) in pairs {
        if offset < end {
            return Err("the pieces of a sparse file overlap or are out of order");
        }
        end = offset.checked_add(length).ok_or("a sparse file is too large")?;
        if end > file_bytes {
            return Err("a sparse file has data past its end");
        }
        // Cannot overflow: the pieces are disjoint and end below 2^64.
        total += length;
        if length > 0 {
            segments.push(Segment { offset, length });
        }
    }
    if total != stored_bytes {
        return Err("a sparse file's map does not fit its data");
    }
    Ok(segments)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn maps_that_overlap_overrun_or_miscount_are_refused() {
        assert!(checked([(0, 512), (1024, 512)], 2048, 1024).is_ok());
        assert!(checked([(0, 512), (100, 512)], 2048, 1024).is_err());
        assert!(checked([(1024, 512), (0, 512)], 2048, 1024).is_err());
        assert!(checked([(0, 512), (1024, 1025)], 2048, 1537).is_err());
        assert!(checked([(0, 512)], 2048, 1024).is_err());
        assert!(checked([(u64::MAX, 2)], u64::MAX, 2).is_err());
        assert_eq!(checked([(2048, 0)], 2048, 0), Ok(vec![]));
    }

    #[test]
    fn a_text_map_may_come_in_any_pieces() {
        for cut in 0..12 {
            let text = b"2\n0\n5\n90\n7\nXX";
            let mut map = TextMap::default();
            let whole = map.take(&text[..cut.min(11)]).unwrap() || map.take(&text[cut.min(11)..]).unwrap();
            assert!(whole);
            assert_eq!(map.pairs(), [(0, 5), (90, 7)]);
        }
    }
}
