//! Records: small JSON files that end with the checksum of what they say.

use std::fs;
use std::io;
use std::path::Path;

use kiln_support::digest::Digest;
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use crate::error::Context;
use crate::{ObjectId, StoreError};

/// The most bytes of a record; 1,000 layers have about 200 KiB.
const MAX_RECORD_BYTES: u64 = 1 << 20;

/// What an image is made of.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ImageRecord {
    /// The digest of the image's manifest, whose blob is in the store.
    pub manifest: Digest,
    /// The digest of the image's config, whose blob is in the store.
    pub config: Digest,
    /// The layers from the lowest up.
    pub layers: Vec<LayerRecord>,
    /// The object with the merged metadata over all layers.
    pub merged: ObjectId,
    /// The version of the file system writer that made the objects.
    pub format: u32,
}

/// A layer and the object it was made into.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct LayerRecord {
    /// The digest of the layer's tar stream, uncompressed.
    pub diff_id: Digest,
    /// The object.
    pub object: ObjectId,
}

/// What a name means.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Tag {
    /// The name, in full: `docker.io/library/debian:12`.
    pub name: String,
    /// The platform, as `os/architecture[/variant]`. A name can mean one image for each.
    pub platform: String,
    /// What the name meant at its source when pulled: the digest of a manifest or of an index of several.
    pub target: Digest,
    /// The digest of the manifest for the platform: the image.
    pub manifest: Digest,
    /// When it was pulled, in seconds since 1970.
    pub pulled_unix_s: u64,
}

impl Tag {
    /// The file name of the record of what `name` means for `platform`.
    pub(crate) fn file_name(name: &str, platform: &str) -> String {
        Digest::of(format!("{platform}\0{name}")).hex()
    }
}

/// The bytes of the file that holds `record`.
pub(crate) fn encode(record: &impl Serialize) -> Result<Vec<u8>, StoreError> {
    let mut bytes = serde_json::to_vec(record)
        .map_err(|error| StoreError::damaged("a record", format!("it cannot be written as JSON: {error}")))?;
    let checksum = Digest::of(&bytes);
    bytes.extend_from_slice(format!("\n{}\n", checksum.hex()).as_bytes());
    if bytes.len() as u64 > MAX_RECORD_BYTES {
        return Err(StoreError::TooLarge {
            what: "a record",
            bytes: bytes.len() as u64,
            limit: MAX_RECORD_BYTES,
        });
    }
    Ok(bytes)
}

/// Reads the record at `path`, which `what` names in errors; `None` when there is none.
pub(crate) fn read<T: DeserializeOwned>(path: &Path, what: &str) -> Result<Option<T>, StoreError> {
    match fs::metadata(path) {
        Ok(metadata) if metadata.len() > MAX_RECORD_BYTES => {
            return Err(StoreError::damaged(what, "it is larger than any record"));
        }
        _ => {}
    }
    match fs::read(path) {
        Ok(bytes) => decode(&bytes, what).map(Some),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(error).context("read", path),
    }
}

fn decode<T: DeserializeOwned>(bytes: &[u8], what: &str) -> Result<T, StoreError> {
    // The last line is the checksum: 64 digits between two line ends.
    let split = bytes
        .len()
        .checked_sub(2 * Digest::BYTES + 2)
        .ok_or_else(|| StoreError::damaged(what, "it is cut off"))?;
    let (json, tail) = bytes.split_at(split);
    if tail != format!("\n{}\n", Digest::of(json).hex()).as_bytes() {
        return Err(StoreError::damaged(what, "it does not match its checksum"));
    }
    serde_json::from_slice(json).map_err(|error| StoreError::damaged(what, error.to_string()))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tag() -> Tag {
        Tag {
            name: "docker.io/library/debian:12".to_owned(),
            platform: "linux/amd64".to_owned(),
            target: Digest::EMPTY,
            manifest: Digest::EMPTY,
            pulled_unix_s: 7,
        }
    }

    #[test]
    fn a_record_reads_as_it_was_written() {
        let bytes = encode(&tag()).expect("encoded");
        assert_eq!(decode::<Tag>(&bytes, "the tag").expect("decoded"), tag());
    }

    #[test]
    fn any_flipped_bit_and_any_cut_is_seen() {
        let bytes = encode(&tag()).expect("encoded");
        for at in 0..bytes.len() {
            for bit in 0..8 {
                let mut flipped = bytes.clone();
                flipped[at] ^= 1 << bit;
                assert!(decode::<Tag>(&flipped, "the tag").is_err(), "bit {bit} of byte {at}");
            }
            assert!(decode::<Tag>(&bytes[..at], "the tag").is_err(), "cut at {at}");
        }
    }
}
