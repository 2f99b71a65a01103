//! The records of a pax extended header, as far as they change an entry.

use super::sparse::SparseRecords;
use crate::tree::Time;

/// Prefix of the records that carry extended attributes, from star; every image builder writes these.
const XATTR_PREFIX: &[u8] = b"SCHILY.xattr.";

/// What the extended headers before an entry say of it. `None`: the header block's own value stands.
#[derive(Default)]
pub(super) struct Pax {
    pub(super) path: Option<Vec<u8>>,
    pub(super) link_path: Option<Vec<u8>>,
    pub(super) size: Option<u64>,
    pub(super) uid: Option<u32>,
    pub(super) gid: Option<u32>,
    pub(super) mtime: Option<Time>,
    /// Names and values in the order they came.
    pub(super) xattrs: Vec<(Vec<u8>, Vec<u8>)>,
    pub(super) sparse: SparseRecords,
}

impl Pax {
    /// Takes the records of one extended header; later ones replace earlier.
    ///
    /// Keys that do not concern a layer are passed over, and an empty value keeps what the header block says.
    ///
    /// # Errors
    /// What is wrong with the bytes.
    pub(super) fn take(&mut self, mut bytes: &[u8]) -> Result<(), &'static str> {
        while !bytes.is_empty() {
            let (key, value, rest) = record(bytes).ok_or("a pax record is malformed")?;
            self.take_record(key, value)?;
            bytes = rest;
        }
        Ok(())
    }

    fn take_record(&mut self, key: &[u8], value: &[u8]) -> Result<(), &'static str> {
        if let Some(name) = key.strip_prefix(XATTR_PREFIX) {
            self.xattrs.push((name.to_vec(), value.to_vec()));
            return Ok(());
        }
        if value.is_empty() {
            return Ok(());
        }
        match key {
            b"path" | b"linkpath" if value.contains(&0) => return Err("a pax path holds a NUL byte"),
            b"path" => self.path = Some(value.to_vec()),
            b"linkpath" => self.link_path = Some(value.to_vec()),
            b"size" => self.size = Some(decimal(value).ok_or("the pax size is not a number")?),
            b"uid" => self.uid = Some(id(value).ok_or("the pax uid is not one")?),
            b"gid" => self.gid = Some(id(value).ok_or("the pax gid is not one")?),
            b"mtime" => self.mtime = Some(time(value).ok_or("the pax mtime is not a time")?),
            _ => {
                if let Some(field) = key.strip_prefix(b"GNU.sparse.") {
                    self.sparse.take(field, value)?;
                }
            }
        }
        Ok(())
    }
}

/// Splits the first record off: `LENGTH KEY=VALUE\n`, the length counting all of it.
/// POSIX.1-2017 pax, "pax Extended Header".
fn record(bytes: &[u8]) -> Option<(&[u8], &[u8], &[u8])> {
    let space = bytes.iter().take(20).position(|&b| b == b' ')?;
    let length = usize::try_from(decimal(&bytes[..space])?).ok()?;
    if length <= space + 1 || length > bytes.len() {
        return None;
    }
    let (whole, rest) = bytes.split_at(length);
    let body = whole[space + 1..].strip_suffix(b"\n")?;
    let equals = body.iter().position(|&b| b == b'=')?;
    (equals > 0).then(|| (&body[..equals], &body[equals + 1..], rest))
}

/// A decimal number of digits alone.
pub(super) fn decimal(digits: &[u8]) -> Option<u64> {
    if digits.is_empty() {
        return None;
    }
    digits.iter().try_fold(0u64, |value, &digit| {
        let digit = digit.wrapping_sub(b'0');
        (digit < 10).then_some(())?;
        value.checked_mul(10)?.checked_add(u64::from(digit))
    })
}

fn id(value: &[u8]) -> Option<u32> {
    u32::try_from(decimal(value)?).ok()
}

/// Seconds since the epoch with an optional sign and fraction; digits past nanoseconds are dropped.
fn time(value: &[u8]) -> Option<Time> {
    let (negative, value) = match value.strip_prefix(b"-") {
        Some(rest) => (true, rest),
        None => (false, value),
    };
    let dot = value.iter().position(|&b| b == b'.');
    let (whole, fraction) = match dot {
        Some(dot) => (&value[..dot], &value[dot + 1..]),
        None => (value, &[][..]),
    };
    let whole = if whole.is_empty() && !fraction.is_empty() { 0 } else { decimal(whole)? };
    let whole = i64::try_from(whole).ok()?;
    let mut nanos = 0u32;
    for place in 0..9 {
        let digit = fraction.get(place).map_or(0, |digit| digit.wrapping_sub(b'0'));
        (digit < 10).then_some(())?;
        nanos = nanos * 10 + u32::from(digit);
    }
    if fraction.iter().any(|b| !b.is_ascii_digit()) {
        return None;
    }
    Some(match (negative, nanos) {
        (false, _) => Time { secs: whole, nanos },
        (true, 0) => Time { secs: -whole, nanos: 0 },
        (true, _) => Time { secs: (-whole).checked_sub(1)?, nanos: 1_000_000_000 - nanos },
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn records_are_split_by_length_so_values_may_hold_anything() {
        let mut pax = Pax::default();
        pax.take(b"32 SCHILY.xattr.user.k=a\n=b\0c\xff\xfe\n").unwrap();
        assert_eq!(pax.xattrs, [(b"user.k".to_vec(), b"a\n=b\0c\xff\xfe".to_vec())]);
    }

    #[test]
    fn lengths_that_lie_are_refused() {
        for bad in [
            &b"5 a=b\n"[..],
            b"7 a=b\n",
            b"6a=b\n\n",
            b"6 =bc\n",
            b"6 abc\n",
            b"0 \n",
            b"99999999999999999999 a=b\n",
            b"18446744073709551615 a=b\n",
            b"-6 a=b\n",
        ] {
            assert!(Pax::default().take(bad).is_err(), "{}", bad.escape_ascii());
        }
        assert!(Pax::default().take(b"6 a=b\n").is_ok());
    }

    #[test]
    fn times_keep_nanoseconds_and_sign() {
        assert_eq!(time(b"1.5"), Some(Time { secs: 1, nanos: 500_000_000 }));
        assert_eq!(time(b"-1.5"), Some(Time { secs: -2, nanos: 500_000_000 }));
        assert_eq!(time(b"-2"), Some(Time { secs: -2, nanos: 0 }));
        assert_eq!(time(b"12.1234567891"), Some(Time { secs: 12, nanos: 123_456_789 }));
        assert_eq!(time(b"12.x"), None);
        assert_eq!(time(b"12.123456789x"), None);
        assert_eq!(time(b""), None);
        assert_eq!(time(b"."), None);
        assert_eq!(time(b"9223372036854775808"), None);
    }
}
