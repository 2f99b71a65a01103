//! The demo image: `cargo xtask demo-image`.

use anyhow::{Result, bail};

/// Makes the demo image.
pub(crate) fn demo(_args: &[String]) -> Result<()> {
    bail!("not part of this tree yet")
}
