//! The guest's initramfs: `cargo xtask initramfs`.

use std::path::PathBuf;

use anyhow::{Result, bail};

/// Builds the initramfs and prints where it is.
pub(crate) fn run(_args: &[String]) -> Result<()> {
    println!("{}", build()?.display());
    Ok(())
}

/// Builds the agent, packs it, and returns the path of `initramfs.cpio`.
pub(crate) fn build() -> Result<PathBuf> {
    bail!("the initramfs build is not part of this tree yet")
}
