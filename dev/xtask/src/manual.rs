//! Man pages and shell completions, from the parser's one definition.

use anyhow::{Result, bail};

/// Writes the man pages.
pub(crate) fn man(_args: &[String]) -> Result<()> {
    bail!("not part of this tree yet")
}

/// Writes the completions.
pub(crate) fn completions(_args: &[String]) -> Result<()> {
    bail!("not part of this tree yet")
}
