//! The whole of Kiln as one file: `cargo xtask build`.

use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result};

use crate::{initramfs, kernel, paths, process};

/// Builds Kiln and prints where it is.
pub(crate) fn run(_args: &[String]) -> Result<()> {
    println!("{}", build(&guest_dir()?)?.display());
    Ok(())
}

/// Builds `target/release/kiln` with the guest files in `guest` inside, and returns its path.
///
/// `front/cli/build.rs` finds the directory by `KILN_GUEST_DIR` and embeds both.
pub(crate) fn build(guest: &Path) -> Result<PathBuf> {
    process::run(
        process::cargo(["build", "--release", "--package", "kiln-cli", "--bin", "kiln"])
            .env("KILN_GUEST_DIR", guest),
    )?;
    Ok(paths::target().join("release/kiln"))
}

/// Builds both guest files and returns the directory that holds them as `vmlinux` and `initramfs.cpio`.
pub(crate) fn guest_dir() -> Result<PathBuf> {
    let dir = paths::target().join("guest-files");
    std::fs::create_dir_all(&dir).with_context(|| format!("cannot make {}", dir.display()))?;
    place(&kernel::build()?, &dir.join("vmlinux"))?;
    place(&initramfs::build()?, &dir.join("initramfs.cpio"))?;
    Ok(dir)
}

/// Copies `from` to `to` unless `to` has the same bytes already, so that cargo sees a change only where there is one.
fn place(from: &Path, to: &Path) -> Result<()> {
    let bytes = std::fs::read(from).with_context(|| format!("cannot read {}", from.display()))?;
    if std::fs::read(to).is_ok_and(|old| old == bytes) {
        return Ok(());
    }
    let aside = to.with_extension("new");
    std::fs::write(&aside, bytes).with_context(|| format!("cannot write {}", aside.display()))?;
    std::fs::rename(&aside, to).with_context(|| format!("cannot write {}", to.display()))
}
