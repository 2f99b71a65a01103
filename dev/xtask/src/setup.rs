//! What a fresh Debian lacks: `cargo xtask setup`.

use anyhow::{Result, bail};

/// Installs what is missing.
pub(crate) fn run(_args: &[String]) -> Result<()> {
    bail!("not part of this tree yet")
}
