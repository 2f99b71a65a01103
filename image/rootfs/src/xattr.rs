//! Extended attributes as EROFS stores them, each distinct set once.

use std::collections::HashMap;

/// Bytes of a value: EROFS counts them in 16 bits, one less than Linux would allow.
const VALUE_BYTES_MAX: usize = 65_535;

/// Bytes of a name with its prefix: Linux's `XATTR_NAME_MAX`.
const NAME_BYTES_MAX: usize = 255;

/// Attributes of one file: EROFS counts shared ones in 8 bits, and two places are kept for our own marks.
const SET_ATTRIBUTES_MAX: usize = 253;

/// Bytes of all attributes of one file as stored: below what EROFS can count, 4 * 65,535.
const SET_BYTES_MAX: usize = 128 << 10;

/// Attributes that say how layers are put together. A layer's tar has no say in that: its are dropped.
const OVERLAY_PREFIX: &[u8] = b"trusted.overlay.";
const OWN_PREFIX: &[u8] = b"trusted.kiln.";

/// Of a directory that hides the lower layers' children. Linux Documentation/filesystems/overlayfs.rst, "whiteouts
/// and opaque directories".
pub(crate) const OPAQUE: (&[u8], &[u8]) = (b"trusted.overlay.opaque", b"y");
/// Of a directory that says nothing of itself.
pub(crate) const IMPLICIT: &[u8] = b"trusted.kiln.implicit";
/// Of a file that stands for a link to a lower layer's file; the value is the path.
pub(crate) const LOWER_LINK: &[u8] = b"trusted.kiln.link";

/// Name prefixes that EROFS has a number for; the name stored is what follows. Linux `fs/erofs/erofs_fs.h`,
/// `EROFS_XATTR_INDEX_*`. The ACL ones stand for the whole name.
const PREFIXES: [(u8, &[u8], bool); 5] = [
    (1, b"user.", false),
    (2, b"system.posix_acl_access", true),
    (3, b"system.posix_acl_default", true),
    (4, b"trusted.", false),
    (6, b"security.", false),
];

/// One attribute with its full name.
pub(crate) type Xattr = (Vec<u8>, Vec<u8>);

/// A set of attributes in [`XattrSets`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(crate) struct SetId(u32);

impl SetId {
    /// No attributes.
    pub(crate) const EMPTY: Self = Self(0);

    pub(crate) fn index(self) -> usize {
        self.0 as usize
    }
}

/// The distinct sets of a tree, each as its entries in EROFS form in order of their names.
#[derive(Debug)]
pub(crate) struct XattrSets {
    sets: Vec<Box<[u8]>>,
    ids: HashMap<Box<[u8]>, SetId>,
}

impl Default for XattrSets {
    fn default() -> Self {
        let empty: Box<[u8]> = Box::default();
        Self { sets: vec![empty.clone()], ids: HashMap::from([(empty, SetId::EMPTY)]) }
    }
}

/// Why a set cannot be stored.
#[derive(Debug, Clone, Copy)]
pub(crate) struct BadSet(pub(crate) &'static str);

impl XattrSets {
    /// The id of a set given as its entries in EROFS form, and whether it is new.
    pub(crate) fn intern(&mut self, entries: Vec<u8>) -> (SetId, bool) {
        if let Some(&id) = self.ids.get(entries.as_slice()) {
            return (id, false);
        }
        // Fewer sets than nodes, and those are counted in 32 bits.
        let id = SetId(self.sets.len() as u32);
        let entries: Box<[u8]> = entries.into();
        self.sets.push(entries.clone());
        self.ids.insert(entries, id);
        (id, true)
    }

    /// A set's entries in EROFS form.
    pub(crate) fn entries(&self, id: SetId) -> &[u8] {
        &self.sets[id.index()]
    }

    /// The entries of the set that was the `index`th to come.
    pub(crate) fn entries_at(&self, index: usize) -> &[u8] {
        &self.sets[index]
    }

    /// How many sets there are, the empty one counted.
    pub(crate) fn len(&self) -> usize {
        self.sets.len()
    }
}

/// Puts the attributes of a tar entry into EROFS form: the last of each name, ordered. Those EROFS has no place for
/// and those that would steer the putting together of layers are left out, and counted.
pub(crate) fn from_tar(attributes: Vec<Xattr>) -> Result<(Vec<u8>, u64), BadSet> {
    if attributes.is_empty() {
        return Ok((Vec::new(), 0));
    }
    let mut dropped = 0;
    let mut kept = std::collections::BTreeMap::new();
    for (name, value) in attributes {
        if name.starts_with(OVERLAY_PREFIX) || name.starts_with(OWN_PREFIX) || split(&name).is_none() {
            dropped += 1;
        } else {
            kept.insert(name, value);
        }
    }
    if kept.len() > SET_ATTRIBUTES_MAX {
        return Err(BadSet("it has too many extended attributes"));
    }
    encode(kept.iter().map(|(name, value)| (name.as_slice(), value.as_slice()))).map(|set| (set, dropped))
}

/// Attributes in EROFS form, in the order given. `struct erofs_xattr_entry`.
pub(crate) fn encode<'a>(
    attributes: impl IntoIterator<Item = (&'a [u8], &'a [u8])>,
) -> Result<Vec<u8>, BadSet> {
    let mut set = Vec::new();
    for (name, value) in attributes {
        if name.len() > NAME_BYTES_MAX || name.contains(&0) {
            return Err(BadSet("an extended attribute's name is too long or holds a NUL byte"));
        }
        if value.len() > VALUE_BYTES_MAX {
            return Err(BadSet("an extended attribute's value is too large"));
        }
        let Some((index, rest)) = split(name) else {
            return Err(BadSet("an extended attribute's name is of no kind that can be stored"));
        };
        set.push(rest.len() as u8);
        set.push(index);
        set.extend_from_slice(&(value.len() as u16).to_le_bytes());
        set.extend_from_slice(rest);
        set.extend_from_slice(value);
        set.resize(set.len().next_multiple_of(4), 0);
        if set.len() > SET_BYTES_MAX {
            return Err(BadSet("its extended attributes are too large"));
        }
    }
    Ok(set)
}

/// The number of a name's prefix and the rest of the name.
fn split(name: &[u8]) -> Option<(u8, &[u8])> {
    PREFIXES.iter().find_map(|&(index, prefix, whole)| {
        let rest = name.strip_prefix(prefix)?;
        (rest.is_empty() == whole).then_some((index, rest))
    })
}

/// The first entry of a set in EROFS form and what follows it, or `None` when it does not fit.
pub(crate) fn first_entry(set: &[u8]) -> Option<(&[u8], &[u8])> {
    let value = usize::from(u16::from_le_bytes([*set.get(2)?, *set.get(3)?]));
    let length = (4 + usize::from(set[0]) + value).next_multiple_of(4);
    (length <= set.len()).then(|| set.split_at(length))
}

/// Name and value of an entry that [`first_entry`] split off, or `None` when its prefix is not known.
pub(crate) fn decode(entry: &[u8]) -> Option<Xattr> {
    let name_end = 4 + usize::from(*entry.first()?);
    let value = usize::from(u16::from_le_bytes([*entry.get(2)?, *entry.get(3)?]));
    let &(_, prefix, whole) = PREFIXES.iter().find(|prefix| prefix.0 == entry[1])?;
    let rest = entry.get(4..name_end)?;
    if rest.is_empty() != whole {
        return None;
    }
    Some(([prefix, rest].concat(), entry.get(name_end..name_end + value)?.to_vec()))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pair(name: &str, value: &str) -> Xattr {
        (name.as_bytes().to_vec(), value.as_bytes().to_vec())
    }

    fn decode_all(mut set: &[u8]) -> Vec<Xattr> {
        let mut all = Vec::new();
        while !set.is_empty() {
            let (entry, rest) = first_entry(set).unwrap();
            all.push(decode(entry).unwrap());
            set = rest;
        }
        all
    }

    #[test]
    fn sets_come_back_ordered_with_the_last_value_of_each_name() {
        let given = vec![
            pair("user.b", "1"),
            pair("security.capability", "\x01\0\0"),
            pair("user.a", ""),
            pair("user.b", "2"),
            pair("system.posix_acl_access", "acl"),
            pair("trusted.t", "x"),
        ];
        let (set, dropped) = from_tar(given).unwrap();
        assert_eq!(dropped, 0);
        assert_eq!(
            decode_all(&set),
            [
                pair("security.capability", "\x01\0\0"),
                pair("system.posix_acl_access", "acl"),
                pair("trusted.t", "x"),
                pair("user.a", ""),
                pair("user.b", "2"),
            ]
        );
    }

    #[test]
    fn attributes_that_steer_layering_are_dropped() {
        for name in
            ["trusted.overlay.redirect", "trusted.overlay.opaque", "trusted.kiln.link", "nfs.x", "user."]
        {
            let (set, dropped) = from_tar(vec![pair(name, "y")]).unwrap();
            assert!(set.is_empty() && dropped == 1, "{name}");
        }
    }

    #[test]
    fn sets_too_large_for_the_format_are_refused() {
        let long = "v".repeat(65_536);
        assert!(from_tar(vec![pair("user.x", &long)]).is_err());
        assert!(from_tar(vec![pair("user.x", &long[1..])]).is_ok());
        assert!(from_tar((0..3).map(|i| pair(&format!("user.{i}"), &long[1..])).collect()).is_err());
        assert!(from_tar((0..254).map(|i| pair(&format!("user.{i}"), "")).collect()).is_err());
        assert!(from_tar(vec![pair(&format!("user.{}", "n".repeat(251)), "")]).is_err());
        assert!(from_tar(vec![pair(&format!("user.{}", "n".repeat(250)), "")]).is_ok());
    }
}
