//! SHA-256 digests: the names of content, and the hashing of streams and of blocks.
//!
//! A big object is named by a tree of two levels: each 64 KiB block has its SHA-256, and the object's name is the
//! SHA-256 over those digests laid end to end ([`tree_id`]). So one block can be checked by itself when it is first
//! read, against a list that is checked against the name once.

use std::fmt;
use std::io::{self, Read, Write};
use std::str::FromStr;

use sha2::{Digest as _, Sha256};

/// The bytes of one block of an object; the last block may be shorter.
pub const BLOCK_BYTES: usize = 64 << 10;

/// A SHA-256 digest.
///
/// Written as OCI writes it, `sha256:` and 64 lower-case hexadecimal digits; no other form is read. OCI Image
/// Specification 1.1, "Content Descriptors", "Digests".
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Digest([u8; Digest::BYTES]);

/// The text is no SHA-256 digest.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{0:?} is not a digest: expected sha256: and 64 lower-case hexadecimal digits")]
pub struct ParseDigestError(String);

impl Digest {
    /// The bytes of a digest.
    pub const BYTES: usize = 32;
    /// The digest of no bytes.
    pub const EMPTY: Self = Self([
        0xe3, 0xb0, 0xc4, 0x42, 0x98, 0xfc, 0x1c, 0x14, 0x9a, 0xfb, 0xf4, 0xc8, 0x99, 0x6f, 0xb9, 0x24, 0x27,
        0xae, 0x41, 0xe4, 0x64, 0x9b, 0x93, 0x4c, 0xa4, 0x95, 0x99, 0x1b, 0x78, 0x52, 0xb8, 0x55,
    ]);

    /// Takes the digest's bytes.
    pub const fn from_bytes(bytes: [u8; Self::BYTES]) -> Self {
        Self(bytes)
    }

    /// Hashes `content`.
    pub fn of(content: impl AsRef<[u8]>) -> Self {
        Self(Sha256::digest(content.as_ref()).into())
    }

    /// The digest's bytes.
    pub const fn as_bytes(&self) -> &[u8; Self::BYTES] {
        &self.0
    }

    /// The 64 hexadecimal digits, without `sha256:`.
    pub fn hex(&self) -> String {
        let mut text = String::with_capacity(2 * Self::BYTES);
        for byte in self.0 {
            for digit in [byte >> 4, byte & 15] {
                text.push(char::from(b"0123456789abcdef"[usize::from(digit)]));
            }
        }
        text
    }

    /// Reads 64 lower-case hexadecimal digits.
    ///
    /// # Errors
    /// When `text` is anything else.
    pub fn from_hex(text: &str) -> Result<Self, ParseDigestError> {
        let refused = || ParseDigestError(text.chars().take(80).collect());
        let digit = |byte: u8| match byte {
            b'0'..=b'9' => Ok(byte - b'0'),
            b'a'..=b'f' => Ok(byte - b'a' + 10),
            _ => Err(refused()),
        };
        let (pairs, rest) = text.as_bytes().as_chunks::<2>();
        if pairs.len() != Self::BYTES || !rest.is_empty() {
            return Err(refused());
        }
        let mut bytes = [0; Self::BYTES];
        for (byte, [high, low]) in bytes.iter_mut().zip(pairs) {
            *byte = digit(*high)? << 4 | digit(*low)?;
        }
        Ok(Self(bytes))
    }
}

impl fmt::Display for Digest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "sha256:{}", self.hex())
    }
}

impl fmt::Debug for Digest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl FromStr for Digest {
    type Err = ParseDigestError;

    fn from_str(text: &str) -> Result<Self, ParseDigestError> {
        let hex =
            text.strip_prefix("sha256:").ok_or_else(|| ParseDigestError(text.chars().take(80).collect()))?;
        Self::from_hex(hex)
    }
}

#[cfg(feature = "serde")]
impl serde::Serialize for Digest {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

#[cfg(feature = "serde")]
impl<'de> serde::Deserialize<'de> for Digest {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        String::deserialize(deserializer)?.parse().map_err(serde::de::Error::custom)
    }
}

/// Hashes what is handed to it piece by piece.
#[derive(Clone, Default)]
pub struct Hasher {
    state: Sha256,
    bytes: u64,
}

impl Hasher {
    /// Starts with nothing hashed.
    pub fn new() -> Self {
        Self::default()
    }

    /// Hashes `content` after what came before.
    pub fn update(&mut self, content: &[u8]) {
        self.state.update(content);
        self.bytes += content.len() as u64;
    }

    /// How many bytes were hashed.
    pub fn bytes(&self) -> u64 {
        self.bytes
    }

    /// The digest of all of it.
    pub fn finish(self) -> Digest {
        Digest(self.state.finalize().into())
    }
}

impl fmt::Debug for Hasher {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Hasher").field("bytes", &self.bytes).finish_non_exhaustive()
    }
}

/// Reads from `R` and hashes what passes.
#[derive(Debug)]
pub struct HashingReader<R> {
    inner: R,
    hasher: Hasher,
}

impl<R> HashingReader<R> {
    /// Hashes what is read from `inner` from here on.
    pub fn new(inner: R) -> Self {
        Self { inner, hasher: Hasher::new() }
    }

    /// How many bytes passed.
    pub fn passed(&self) -> u64 {
        self.hasher.bytes()
    }

    /// The reader, and the digest of what passed.
    pub fn finish(self) -> (R, Digest) {
        (self.inner, self.hasher.finish())
    }
}

impl<R: Read> Read for HashingReader<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let count = self.inner.read(buffer)?;
        self.hasher.update(&buffer[..count]);
        Ok(count)
    }
}

/// Writes to `W` and hashes what passes.
#[derive(Debug)]
pub struct HashingWriter<W> {
    inner: W,
    hasher: Hasher,
}

impl<W> HashingWriter<W> {
    /// Hashes what is written to `inner` from here on.
    pub fn new(inner: W) -> Self {
        Self { inner, hasher: Hasher::new() }
    }

    /// How many bytes passed.
    pub fn passed(&self) -> u64 {
        self.hasher.bytes()
    }

    /// The writer, and the digest of what passed.
    pub fn finish(self) -> (W, Digest) {
        (self.inner, self.hasher.finish())
    }
}

impl<W: Write> Write for HashingWriter<W> {
    fn write(&mut self, buffer: &[u8]) -> io::Result<usize> {
        let count = self.inner.write(buffer)?;
        self.hasher.update(&buffer[..count]);
        Ok(count)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.inner.flush()
    }
}

/// Splits what is handed to it into blocks of [`BLOCK_BYTES`] and hashes each.
#[derive(Debug, Default)]
pub struct BlockHasher {
    digests: Vec<Digest>,
    current: Hasher,
}

impl BlockHasher {
    /// Starts with nothing hashed.
    pub fn new() -> Self {
        Self::default()
    }

    /// Hashes `content` after what came before.
    pub fn update(&mut self, mut content: &[u8]) {
        while !content.is_empty() {
            let room = BLOCK_BYTES - self.current.bytes() as usize;
            let (now, later) = content.split_at(room.min(content.len()));
            self.current.update(now);
            if self.current.bytes() as usize == BLOCK_BYTES {
                self.digests.push(std::mem::take(&mut self.current).finish());
            }
            content = later;
        }
    }

    /// The digests of all blocks in order. No content has no blocks.
    pub fn finish(mut self) -> Vec<Digest> {
        if self.current.bytes() > 0 {
            self.digests.push(self.current.finish());
        }
        self.digests
    }
}

/// The name of an object whose block digests, laid end to end, are `digests`.
pub fn tree_id(digests: &[u8]) -> Digest {
    Digest::of(digests)
}

/// How many blocks `length` bytes have.
pub const fn block_count(length: u64) -> u64 {
    length.div_ceil(BLOCK_BYTES as u64)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn the_empty_digest_is_that_of_nothing() {
        assert_eq!(Digest::of(b""), Digest::EMPTY);
        assert_eq!(
            Digest::EMPTY.to_string(),
            "sha256:e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"
        );
    }

    #[test]
    fn only_the_canonical_form_is_read() {
        let hex = Digest::EMPTY.hex();
        assert_eq!(format!("sha256:{hex}").parse(), Ok(Digest::EMPTY));
        for text in [
            hex.clone(),
            format!("sha256:{}", hex.to_uppercase()),
            format!("sha512:{hex}"),
            format!("sha256:{}", &hex[1..]),
            format!("sha256:{hex}0"),
            format!("sha256:{}é", &hex[2..]),
            "sha256:../../../../../../../../../../../../../../../../../../etc/pass".to_owned(),
            String::new(),
        ] {
            assert!(text.parse::<Digest>().is_err(), "{text}");
        }
    }

    #[test]
    fn readers_and_writers_hash_what_passes() {
        let content = vec![7; 100_000];
        let mut writer = HashingWriter::new(Vec::new());
        let mut reader = HashingReader::new(&content[..]);
        assert_eq!(io::copy(&mut reader, &mut writer).ok(), Some(100_000));
        assert_eq!(reader.finish().1, Digest::of(&content));
        assert_eq!(writer.finish(), (content.clone(), Digest::of(&content)));
    }

    proptest! {
        #[test]
        fn blocks_hash_the_same_however_the_content_is_cut(
            length in 0..4 * BLOCK_BYTES,
            cuts in proptest::collection::vec(1..3 * BLOCK_BYTES, 0..6),
        ) {
            let content: Vec<u8> = (0..length).map(|i| (i * 31 % 251) as u8).collect();
            let mut hasher = BlockHasher::new();
            let mut rest = &content[..];
            for cut in cuts {
                let (now, later) = rest.split_at(cut.min(rest.len()));
                hasher.update(now);
                rest = later;
            }
            hasher.update(rest);
            let expected: Vec<Digest> = content.chunks(BLOCK_BYTES).map(Digest::of).collect();
            prop_assert_eq!(expected.len() as u64, block_count(length as u64));
            prop_assert_eq!(hasher.finish(), expected);
        }

        #[test]
        fn text_and_digest_are_one_to_one(bytes: [u8; 32]) {
            let digest = Digest::from_bytes(bytes);
            prop_assert_eq!(digest.to_string().parse(), Ok(digest));
        }
    }
}
