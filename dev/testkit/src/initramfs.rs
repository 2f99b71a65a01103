//! Initramfs archives with one program in them.

use std::fs::File;
use std::io::{Seek as _, Write as _};
use std::path::Path;
use std::process::{Command, Stdio};

use anyhow::{Context as _, Result, bail};

/// An archive in which `program` is `/init`.
///
/// # Errors
/// When cpio(1) is missing or fails.
pub fn with_init(program: &Path) -> Result<File> {
    let root = tempfile::tempdir().context("a folder")?;
    std::fs::create_dir(root.path().join("dev")).context("a folder")?;
    std::fs::copy(program, root.path().join("init")).context("the program")?;
    let mut archive = tempfile::tempfile().context("an archive")?;
    let mut cpio = Command::new("cpio")
        .args(["--create", "--format=newc", "--quiet"])
        .current_dir(root.path())
        .stdin(Stdio::piped())
        .stdout(archive.try_clone().context("an archive")?)
        .spawn()
        .context("cannot start cpio; install it with: apt-get install cpio")?;
    cpio.stdin.take().context("a pipe")?.write_all(b"dev\ninit\n").context("cpio")?;
    if !cpio.wait().context("cpio")?.success() {
        bail!("cpio failed");
    }
    archive.rewind().context("an archive")?;
    Ok(archive)
}
