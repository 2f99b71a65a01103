//! The whole of Kiln as one file: `cargo xtask build`.

use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result};

use crate::{initramfs, kernel, paths, process};

const TRIPLE: &str = "x86_64-unknown-linux-gnu";

/// Builds Kiln and prints where it is.
pub(crate) fn run(_args: &[String]) -> Result<()> {
    println!("{}", build(&guest_dir()?)?.display());
    Ok(())
}

/// Builds `target/release/kiln` with the guest files in `guest` and the monitor inside, and returns its path.
///
/// `front/cli/build.rs` finds them by `KILN_GUEST_DIR` and `KILN_MONITOR`, and embeds them.
pub(crate) fn build(guest: &Path) -> Result<PathBuf> {
    process::run(
        process::cargo(["build", "--release", "--package", "kiln-cli", "--bin", "kiln"])
            .env("KILN_GUEST_DIR", guest)
            .env("KILN_MONITOR", monitor()?),
    )?;
    Ok(paths::target().join("release/kiln"))
}

/// Builds the monitor as a program of its own, linked statically, and returns its path.
///
/// It is executed once a machine: there is no linker to run and no library to map, and few pages to read.
pub(crate) fn monitor() -> Result<PathBuf> {
    static_program("kiln-vmm", "kiln-monitor", "monitor")
}

/// Builds a program of a package with a profile, linked statically, and returns its path.
pub(crate) fn static_program(package: &str, program: &str, profile: &str) -> Result<PathBuf> {
    let mut build = process::cargo(["build", "--package", package, "--bin", program, "--profile", profile]);
    process::run(build.args(["--target", TRIPLE]).env("RUSTFLAGS", "-C target-feature=+crt-static"))?;
    Ok(paths::target().join(TRIPLE).join(profile).join(program))
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
