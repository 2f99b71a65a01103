//! The header: what a snapshot needs of its host.

use kiln_support::digest::Digest;

use crate::SECTIONS_MAX;

/// The version of the format that is written, and the only one that is read.
pub const FORMAT_VERSION: u32 = 1;
/// The bytes of the header.
pub const HEADER_BYTES: usize = 320;
/// The most bytes of the monitor's version.
pub const VMM_BYTES_MAX: usize = 32;

const MAGIC: [u8; 8] = *b"KILNSNAP";
/// Everything before the digest over it.
const DIGESTED_BYTES: usize = HEADER_BYTES - Digest::BYTES;

/// What a snapshot needs of its host, and what it was made from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Header {
    /// The guest's memory in bytes.
    pub memory_bytes: u64,
    /// The number of vCPUs.
    pub vcpus: u32,
    /// The version of the monitor that saved it, printable ASCII of at most [`VMM_BYTES_MAX`] bytes.
    pub vmm: String,
    /// What the guest was told of its processor.
    pub cpu: Digest,
    /// The guest kernel.
    pub kernel: Digest,
    /// The initramfs, the agent in it.
    pub initramfs: Digest,
    /// The memory, as the store names it.
    pub memory: Digest,
}

/// A header cannot be used.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum HeaderError {
    /// It is none.
    #[error("not a snapshot")]
    Magic,
    /// It is of another version.
    #[error("format version {0}; this Kiln reads version {FORMAT_VERSION}")]
    Version(u32),
    /// Its bytes are not those that were written.
    #[error("does not match its digest")]
    Digest,
    /// It says what no header may say.
    #[error("{0}")]
    Content(&'static str),
}

/// The header with what only the file knows.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Parsed {
    pub(crate) header: Header,
    pub(crate) sections: usize,
    /// The digest over the table.
    pub(crate) table: Digest,
}

impl Parsed {
    /// The header as it is in a file.
    pub(crate) fn encode(&self) -> [u8; HEADER_BYTES] {
        let header = &self.header;
        let mut vmm = [0; VMM_BYTES_MAX];
        vmm[..header.vmm.len()].copy_from_slice(header.vmm.as_bytes());
        let parts: [&[u8]; 13] = [
            &MAGIC,
            &FORMAT_VERSION.to_le_bytes(),
            &(self.sections as u32).to_le_bytes(),
            &header.memory_bytes.to_le_bytes(),
            &header.vcpus.to_le_bytes(),
            &[0; 4],
            &vmm,
            header.cpu.as_bytes(),
            header.kernel.as_bytes(),
            header.initramfs.as_bytes(),
            header.memory.as_bytes(),
            self.table.as_bytes(),
            // Room for what is not known yet.
            &[0; 64],
        ];
        let mut bytes = [0; HEADER_BYTES];
        let mut at = 0;
        for part in parts {
            bytes[at..at + part.len()].copy_from_slice(part);
            at += part.len();
        }
        let digest = Digest::of(&bytes[..DIGESTED_BYTES]);
        bytes[DIGESTED_BYTES..].copy_from_slice(digest.as_bytes());
        bytes
    }

    /// Reads a header, whole or not at all.
    pub(crate) fn decode(bytes: &[u8; HEADER_BYTES]) -> Result<Self, HeaderError> {
        let mut rest = Fields(bytes);
        if rest.take::<8>() != MAGIC {
            return Err(HeaderError::Magic);
        }
        let version = rest.u32();
        if version != FORMAT_VERSION {
            return Err(HeaderError::Version(version));
        }
        if Digest::of(&bytes[..DIGESTED_BYTES]).as_bytes()[..] != bytes[DIGESTED_BYTES..] {
            return Err(HeaderError::Digest);
        }
        let sections = rest.u32() as usize;
        if !(1..=SECTIONS_MAX).contains(&sections) {
            return Err(HeaderError::Content("an impossible number of sections"));
        }
        let (memory_bytes, vcpus, padding) = (rest.u64(), rest.u32(), rest.u32());
        let vmm = text(&rest.take::<VMM_BYTES_MAX>())?;
        let header = Header {
            memory_bytes,
            vcpus,
            vmm,
            cpu: rest.digest(),
            kernel: rest.digest(),
            initramfs: rest.digest(),
            memory: rest.digest(),
        };
        let parsed = Self { header, sections, table: rest.digest() };
        if padding != 0 || rest.take::<64>() != [0; 64] {
            return Err(HeaderError::Content("something where nothing is known"));
        }
        Ok(parsed)
    }
}

impl Header {
    /// Whether it can be written.
    pub(crate) fn is_writable(&self) -> bool {
        self.vmm.len() <= VMM_BYTES_MAX
            && !self.vmm.is_empty()
            && self.vmm.bytes().all(|byte| byte.is_ascii_graphic())
    }
}

/// Printable ASCII, padded with zeros.
fn text(padded: &[u8]) -> Result<String, HeaderError> {
    let length = padded.iter().position(|byte| *byte == 0).unwrap_or(padded.len());
    let (text, padding) = padded.split_at(length);
    if text.is_empty() || !text.iter().all(u8::is_ascii_graphic) || padding.iter().any(|byte| *byte != 0) {
        return Err(HeaderError::Content("a version that is no version"));
    }
    Ok(text.iter().copied().map(char::from).collect())
}

/// Fields of fixed width, one after the other, of bytes that have room for them all.
pub(crate) struct Fields<'a>(pub(crate) &'a [u8]);

impl Fields<'_> {
    pub(crate) fn take<const N: usize>(&mut self) -> [u8; N] {
        let (field, rest) = self.0.split_first_chunk().expect("the caller counts its fields");
        self.0 = rest;
        *field
    }

    pub(crate) fn u32(&mut self) -> u32 {
        u32::from_le_bytes(self.take())
    }

    pub(crate) fn u64(&mut self) -> u64 {
        u64::from_le_bytes(self.take())
    }

    pub(crate) fn digest(&mut self) -> Digest {
        Digest::from_bytes(self.take())
    }
}
