//! The guest kernel: `cargo xtask kernel`.

use std::path::PathBuf;

use anyhow::{Result, bail};

/// Builds the guest kernel and prints where it is.
pub(crate) fn run(_args: &[String]) -> Result<()> {
    println!("{}", build()?.display());
    Ok(())
}

/// Builds the guest kernel, or finds it built, and returns the path of `vmlinux`.
pub(crate) fn build() -> Result<PathBuf> {
    bail!("the kernel build is not part of this tree yet")
}
