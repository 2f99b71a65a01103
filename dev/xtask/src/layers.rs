//! The folder rule.

use anyhow::{Result, bail};

/// Checks the folder rule.
pub(crate) fn run(_args: &[String]) -> Result<()> {
    bail!("not part of this tree yet")
}
