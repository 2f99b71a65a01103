//! The kernel's source: Debian's package, unpacked and patched.

use std::path::Path;
use std::process::{Command, Stdio};

use anyhow::{Context as _, Result, bail};

use super::key;
use crate::{process, setup};

/// Debian's package of the stable series the guest kernel follows, and the file in it.
const PACKAGE: &str = "linux-source-6.12";
const ARCHIVE: &str = "/usr/src/linux-source-6.12.tar.xz";

/// What a build needs beside the source.
const TOOLS: &[&str] =
    &["gcc", "make", "patch", "flex", "bison", "bc", "libelf-dev", "libc6-dev", "xz-utils"];

/// Parts of the source no x86 virtual machine without PCI compiles; left packed, unpacking takes half the time and a
/// quarter of the space. `Kconfig` files and makefiles are read all the same, so only C files and data stay out.
const LEFT_PACKED: &[&str] = &[
    "*/Documentation/*/*",
    "*/arch/[!x]*/*.[chS]",
    "*/arch/[!x]*/*.dts*",
    "*/arch/xtensa/*.[chS]",
    "*/drivers/accel/*.[ch]",
    "*/drivers/gpu/*.[ch]",
    "*/drivers/infiniband/*.[ch]",
    "*/drivers/media/*.[ch]",
    "*/drivers/net/ethernet/*.[ch]",
    "*/drivers/net/wireless/*.[ch]",
    "*/drivers/scsi/*.[ch]",
    "*/drivers/staging/*.[ch]",
    "*/sound/*.[ch]",
    "*/tools/perf/*",
    "*/tools/testing/*",
];

/// Installs what a build needs and this machine lacks.
pub(super) fn require_packages() -> Result<()> {
    let wanted: Vec<&str> = [PACKAGE].iter().chain(TOOLS).copied().collect();
    let missing = setup::missing(&wanted);
    if missing.is_empty() {
        return Ok(());
    }
    eprintln!("kernel: installing {}", missing.join(" "));
    setup::install(&missing).context("what the guest kernel is built with")
}

/// The version of the source package, which names the source exactly.
pub(super) fn version() -> Result<String> {
    process::output(Command::new("dpkg-query").args(["-W", "-f", "${Version}", PACKAGE]))
}

/// Unpacks the source into `dir`.
pub(super) fn unpack(dir: &Path) -> Result<()> {
    eprintln!("kernel: unpacking {PACKAGE} {}", version()?);
    let mut tar = Command::new("tar");
    tar.arg("--extract").arg("--file").arg(ARCHIVE).arg("--directory").arg(dir).arg("--strip-components=1");
    for pattern in LEFT_PACKED {
        tar.arg("--exclude").arg(pattern);
    }
    process::run(&mut tar)
}

/// Applies every patch of `patches` in the order of their names. A patch must fit exactly.
pub(super) fn patch(source: &Path, patches: &Path) -> Result<()> {
    for path in key::files(patches, "patch")? {
        let output = Command::new("patch")
            .args(["--strip=1", "--fuzz=0", "--forward", "--batch", "--no-backup-if-mismatch"])
            .arg("--input")
            .arg(&path)
            .current_dir(source)
            .stdin(Stdio::null())
            .output()
            .context("cannot start patch")?;
        if !output.status.success() {
            let said = String::from_utf8_lossy(&output.stdout);
            bail!("{} does not apply to {PACKAGE} {}:\n{said}", key::name(&path), version()?);
        }
        eprintln!("kernel: applied {}", key::name(&path));
    }
    Ok(())
}
