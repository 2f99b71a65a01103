//! Writing a snapshot.

use std::io::{self, Write};

use kiln_support::digest::Digest;

use crate::header::{Header, Parsed};
use crate::{ENTRY_BYTES, NAME_BYTES_MAX, SECTION_BYTES_MAX, SECTIONS_MAX, Section, is_name};

/// A snapshot cannot be written.
#[derive(Debug, thiserror::Error)]
pub enum WriteError {
    /// It is more than the format has room for, or has a section twice. Kiln is to blame.
    #[error("a snapshot that cannot be read again: {0}")]
    Content(&'static str),
    /// The file system refuses.
    #[error("cannot write a snapshot")]
    Write(#[from] io::Error),
}

/// Writes a snapshot of `sections` to `out`. The same content gives the same bytes.
///
/// # Errors
/// [`WriteError`]; what has been written is no snapshot then.
pub fn write(header: &Header, sections: &[Section], out: &mut impl Write) -> Result<(), WriteError> {
    check(header, sections).map_err(WriteError::Content)?;
    let mut table = Vec::with_capacity(sections.len() * ENTRY_BYTES);
    for section in sections {
        let mut name = [0; NAME_BYTES_MAX];
        name[..section.name.len()].copy_from_slice(section.name.as_bytes());
        table.extend(name);
        table.extend(section.version.to_le_bytes());
        table.extend([0; 20]);
        table.extend((section.content.len() as u64).to_le_bytes());
        table.extend(Digest::of(&section.content).as_bytes());
    }
    let header = Parsed { header: header.clone(), sections: sections.len(), table: Digest::of(&table) };
    out.write_all(&header.encode())?;
    out.write_all(&table)?;
    for section in sections {
        out.write_all(&section.content)?;
    }
    Ok(())
}

fn check(header: &Header, sections: &[Section]) -> Result<(), &'static str> {
    if !header.is_writable() {
        return Err("the monitor's version is not printable");
    }
    if !(1..=SECTIONS_MAX).contains(&sections.len()) {
        return Err("too many sections, or none");
    }
    for (index, section) in sections.iter().enumerate() {
        if !is_name(section.name.as_bytes())
            || sections[..index].iter().any(|other| other.name == section.name)
        {
            return Err("a section without a name of its own");
        }
        if section.content.len() as u64 > SECTION_BYTES_MAX {
            return Err("a section that is too long");
        }
    }
    Ok(())
}
