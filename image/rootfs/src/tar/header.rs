//! One 512-byte tar header: checked, and its fields as they are, not yet as they are meant.

/// Size of a header and of the unit that data is padded to, in bytes.
pub(super) const BLOCK_BYTES: usize = 512;

/// A header block whose checksum is right.
///
/// The layouts that exist (V7, ustar, GNU, star) share the first 257 bytes. POSIX.1-2017 pax, "ustar Interchange
/// Format"; GNU tar manual, "Basic Tar Format".
pub(super) struct Header<'a>(&'a [u8; BLOCK_BYTES]);

/// How a header names its layout: the magic at byte 257.
#[derive(PartialEq, Eq, Clone, Copy)]
enum Layout {
    Posix,
    Star,
    Gnu,
    V7,
}

impl<'a> Header<'a> {
    /// The header in `block`, or `None` when its checksum does not hold.
    ///
    /// Old tars summed signed bytes, so both sums count.
    pub(super) fn checked(block: &'a [u8; BLOCK_BYTES]) -> Option<Self> {
        let stored = number(&block[148..156])?;
        let field = &block[148..156];
        let unsigned: i64 = block.iter().map(|&b| i64::from(b)).sum::<i64>()
            - field.iter().map(|&b| i64::from(b)).sum::<i64>()
            + 8 * i64::from(b' ');
        if stored == unsigned {
            return Some(Self(block));
        }
        let signed: i64 = block.iter().map(|&b| i64::from(b.cast_signed())).sum::<i64>()
            - field.iter().map(|&b| i64::from(b.cast_signed())).sum::<i64>()
            + 8 * i64::from(b' ');
        (stored == signed).then_some(Self(block))
    }

    fn layout(&self) -> Layout {
        match (&self.0[257..263], &self.0[263..265]) {
            (b"ustar\0", _) if &self.0[508..512] == b"tar\0" => Layout::Star,
            (b"ustar\0", _) => Layout::Posix,
            (b"ustar ", b" \0") => Layout::Gnu,
            _ => Layout::V7,
        }
    }

    /// The entry's type letter.
    pub(super) fn type_flag(&self) -> u8 {
        self.0[156]
    }

    /// The name, with the prefix of layouts that have one.
    pub(super) fn name(&self) -> Vec<u8> {
        let prefix = match self.layout() {
            Layout::Posix => until_nul(&self.0[345..500]),
            Layout::Star => until_nul(&self.0[345..476]),
            Layout::Gnu | Layout::V7 => &[],
        };
        let name = until_nul(&self.0[..100]);
        if prefix.is_empty() {
            return name.to_vec();
        }
        let mut whole = Vec::with_capacity(prefix.len() + 1 + name.len());
        whole.extend_from_slice(prefix);
        whole.push(b'/');
        whole.extend_from_slice(name);
        whole
    }

    /// The target of a link.
    pub(super) fn link_name(&self) -> &'a [u8] {
        until_nul(&self.0[157..257])
    }

    /// Mode bits as stored.
    pub(super) fn mode(&self) -> Option<i64> {
        number(&self.0[100..108])
    }

    /// Owner.
    pub(super) fn uid(&self) -> Option<i64> {
        number(&self.0[108..116])
    }

    /// Group.
    pub(super) fn gid(&self) -> Option<i64> {
        number(&self.0[116..124])
    }

    /// Bytes of data that follow, if the type has any.
    pub(super) fn size(&self) -> Option<i64> {
        number(&self.0[124..136])
    }

    /// Seconds since the epoch.
    pub(super) fn mtime(&self) -> Option<i64> {
        number(&self.0[136..148])
    }

    /// Major and minor number of a device; zero in layouts that have none.
    pub(super) fn device(&self) -> Option<(i64, i64)> {
        if self.layout() == Layout::V7 {
            return Some((0, 0));
        }
        Some((number(&self.0[329..337])?, number(&self.0[337..345])?))
    }

    /// The first four pairs of a GNU `S` header's sparse map, and whether more follow.
    pub(super) fn gnu_sparse(&self) -> Option<(Vec<(i64, i64)>, bool)> {
        Some((sparse_pairs(&self.0[386..482])?, self.0[482] != 0))
    }

    /// The size of a GNU `S` header's file with its holes.
    pub(super) fn gnu_sparse_size(&self) -> Option<i64> {
        number(&self.0[483..495])
    }
}

/// The pairs of a block that continues a GNU sparse map, and whether another follows.
pub(super) fn gnu_sparse_more(block: &[u8; BLOCK_BYTES]) -> Option<(Vec<(i64, i64)>, bool)> {
    Some((sparse_pairs(&block[..504])?, block[504] != 0))
}

/// Offset and length pairs of 12 bytes each, up to the first whose length field is empty.
fn sparse_pairs(bytes: &[u8]) -> Option<Vec<(i64, i64)>> {
    let mut pairs = Vec::new();
    for pair in bytes.chunks_exact(24) {
        if pair[0] == 0 && pair[12] == 0 {
            break;
        }
        pairs.push((number(&pair[..12])?, number(&pair[12..])?));
    }
    Some(pairs)
}

fn until_nul(bytes: &[u8]) -> &[u8] {
    let end = bytes.iter().position(|&b| b == 0).unwrap_or(bytes.len());
    &bytes[..end]
}

/// A number field: octal digits between spaces and NULs, or GNU base 256 (first bit set, big-endian two's complement
/// in the rest). An empty field is zero.
fn number(field: &[u8]) -> Option<i64> {
    if let Some(&first) = field.first()
        && first & 0x80 != 0
    {
        let negative = first & 0x40 != 0;
        let head = if negative { i128::from(first) - 0x100 } else { i128::from(first & 0x7f) };
        let value = field[1..].iter().try_fold(head, |value, &byte| {
            let next = (value << 8) | i128::from(byte);
            (next >= i128::from(i64::MIN) && next <= i128::from(i64::MAX)).then_some(next)
        })?;
        return i64::try_from(value).ok();
    }
    let start = field.iter().position(|&b| b != b' ' && b != 0).unwrap_or(field.len());
    let digits = &field[start..];
    let end = digits.iter().position(|&b| b == b' ' || b == 0).unwrap_or(digits.len());
    digits[..end].iter().try_fold(0i64, |value, &digit| match digit {
        b'0'..=b'7' => value.checked_mul(8)?.checked_add(i64::from(digit - b'0')),
        _ => None,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn octal_fields_end_at_space_or_nul_and_empty_ones_are_zero() {
        assert_eq!(number(b"0000644\0"), Some(0o644));
        assert_eq!(number(b"  644 \0\0"), Some(0o644));
        assert_eq!(number(b"\0\0\0\0\0\0\0\0"), Some(0));
        assert_eq!(number(b"        "), Some(0));
        assert_eq!(number(b"77777777777"), Some(0o77_777_777_777));
        assert_eq!(number(b"0000648\0"), None);
        assert_eq!(number(b"-000644\0"), None);
    }

    #[test]
    fn base_256_fields_hold_large_and_negative_numbers() {
        assert_eq!(number(&[0x80, 0, 0, 0, 0, 0, 0, 2, 0, 0, 0, 0]), Some(8 << 30));
        assert_eq!(number(&[0xff; 12]), Some(-1));
        assert_eq!(number(&[0x80, 0, 0, 0x80, 0, 0, 0, 0, 0, 0, 0, 0]), None);
        assert_eq!(number(&[0xbf; 12]), None);
        assert_eq!(number(&[0xc0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0]), None);
    }

    #[test]
    fn a_changed_byte_fails_the_checksum() {
        let mut block = [0u8; BLOCK_BYTES];
        block[..4].copy_from_slice(b"name");
        block[148..156].fill(b' ');
        let sum: u32 = block.iter().map(|&b| u32::from(b)).sum();
        block[148..156].copy_from_slice(format!("{sum:06o}\0 ").as_bytes());
        assert!(Header::checked(&block).is_some());
        block[0] ^= 1;
        assert!(Header::checked(&block).is_none());
    }
}
