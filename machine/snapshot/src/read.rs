//! Reading a snapshot, which may come from anywhere.

use std::io::{self, Read};

use kiln_support::digest::Digest;

use crate::header::{Fields, HEADER_BYTES, Header, HeaderError, Parsed};
use crate::{ENTRY_BYTES, NAME_BYTES_MAX, SECTION_BYTES_MAX, Section, is_name};

/// A snapshot cannot be used. Whoever it comes from is to blame, unless it cannot be read.
#[derive(Debug, thiserror::Error)]
pub enum LoadError {
    /// The header is not one.
    #[error("the snapshot's header: {0}")]
    Header(#[from] HeaderError),
    /// The table does not match its digest, or says what no table may say.
    #[error("the snapshot's table of sections: {0}")]
    Table(&'static str),
    /// A section's bytes are not those that were written.
    #[error("the snapshot's section {name}: does not match its digest")]
    Section {
        /// Which one.
        name: String,
    },
    /// It ends before it should.
    #[error("the snapshot is cut off in {0}")]
    CutOff(String),
    /// It goes on behind its last section.
    #[error("the snapshot goes on behind its end")]
    Longer,
    /// The file cannot be read.
    #[error("cannot read the snapshot")]
    Read(#[source] io::Error),
}

/// Reads the header alone.
///
/// # Errors
/// [`LoadError`]
pub fn read_header(input: &mut impl Read) -> Result<Header, LoadError> {
    Ok(parse_header(input)?.header)
}

/// Reads a whole snapshot: at most the limits' worth of memory, and nothing that does not match its digest.
///
/// # Errors
/// [`LoadError`]
pub fn read(input: &mut impl Read) -> Result<(Header, Vec<Section>), LoadError> {
    let parsed = parse_header(input)?;
    let mut table = vec![0; parsed.sections * ENTRY_BYTES];
    fill(input, &mut table, "its table of sections")?;
    if Digest::of(&table) != parsed.table {
        return Err(LoadError::Table("does not match its digest"));
    }
    let mut sections: Vec<Section> = Vec::with_capacity(parsed.sections);
    let mut digests = Vec::with_capacity(parsed.sections);
    for entry in table.chunks_exact(ENTRY_BYTES) {
        let (section, digest) = parse_entry(entry).map_err(LoadError::Table)?;
        if sections.iter().any(|other| other.name == section.name) {
            return Err(LoadError::Table("a section twice"));
        }
        sections.push(section);
        digests.push(digest);
    }
    for (section, digest) in sections.iter_mut().zip(digests) {
        fill(input, &mut section.content, &section.name)?;
        if Digest::of(&section.content) != digest {
            return Err(LoadError::Section { name: section.name.clone() });
        }
    }
    match fill(input, &mut [0], "") {
        Err(LoadError::CutOff(_)) => Ok((parsed.header, sections)),
        Ok(()) => Err(LoadError::Longer),
        Err(error) => Err(error),
    }
}

fn parse_header(input: &mut impl Read) -> Result<Parsed, LoadError> {
    let mut bytes = [0; HEADER_BYTES];
    fill(input, &mut bytes, "its header")?;
    Ok(Parsed::decode(&bytes)?)
}

/// The section of a place in the table, with room for its content, and the digest that has to have.
fn parse_entry(entry: &[u8]) -> Result<(Section, Digest), &'static str> {
    let mut rest = Fields(entry);
    let padded = rest.take::<NAME_BYTES_MAX>();
    let length = padded.iter().position(|byte| *byte == 0).unwrap_or(padded.len());
    let (name, padding) = padded.split_at(length);
    if !is_name(name) || padding.iter().any(|byte| *byte != 0) {
        return Err("a name that is no name");
    }
    let (version, unknown, bytes) = (rest.u32(), rest.take::<20>(), rest.u64());
    if unknown != [0; 20] {
        return Err("something where nothing is known");
    }
    if bytes > SECTION_BYTES_MAX {
        return Err("a section that is too long");
    }
    let name = name.iter().copied().map(char::from).collect();
    Ok((Section { name, version, content: vec![0; bytes as usize] }, rest.digest()))
}

fn fill(input: &mut impl Read, bytes: &mut [u8], what: &str) -> Result<(), LoadError> {
    input.read_exact(bytes).map_err(|error| match error.kind() {
        io::ErrorKind::UnexpectedEof => LoadError::CutOff(what.to_owned()),
        _ => LoadError::Read(error),
    })
}
