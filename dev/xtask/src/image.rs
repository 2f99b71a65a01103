//! The demo image: `cargo xtask demo-image`. Made by umoci from what this machine has; no registry is asked.

use std::fs;
use std::os::unix::fs::{PermissionsExt as _, symlink};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context as _, Result, bail};

use crate::{paths, process};

/// The default command of the image.
const HELLO: &str = include_str!("image/hello.sh");

/// Makes the demo image in a directory, `target/demo-image` unless named, and prints how Kiln names it.
pub(crate) fn demo(args: &[String]) -> Result<()> {
    let dir = args.first().map_or_else(|| paths::target().join("demo-image"), PathBuf::from);
    if dir.exists() {
        fs::remove_dir_all(&dir).with_context(|| format!("cannot remove {}", dir.display()))?;
    }
    let image = format!("{}:latest", dir.display());
    let bundle = dir.join("bundle");
    umoci(["init", "--layout"], &[dir.as_os_str()])?;
    umoci(["new", "--image"], &[image.as_ref()])?;
    umoci(["unpack", "--rootless"], &["--image".as_ref(), image.as_ref(), bundle.as_os_str()])?;
    fill(&bundle.join("rootfs"))?;
    umoci(["repack", "--image"], &[image.as_ref(), bundle.as_os_str()])?;
    let config = ["--config.cmd", "/bin/hello", "--config.env", "PATH=/bin"];
    umoci(["config", "--image"], &[&[image.as_ref()], &config.map(AsRef::as_ref)[..]].concat())?;
    fs::remove_dir_all(&bundle).context("the bundle")?;
    eprintln!("oci-layout:{image}");
    Ok(())
}

fn umoci(verb: [&str; 2], args: &[&std::ffi::OsStr]) -> Result<()> {
    let mut umoci = Command::new("umoci");
    let output = umoci.args(verb).args(args).stdin(Stdio::null()).output();
    let output = output.context("cannot start umoci\nhint: `cargo xtask setup demo` installs it")?;
    if !output.status.success() {
        bail!("umoci {} failed: {}", verb[0], String::from_utf8_lossy(&output.stderr));
    }
    Ok(())
}

/// Fills a root file system: busybox under all of its names, and the command.
fn fill(root: &Path) -> Result<()> {
    for dir in ["bin", "etc", "root", "tmp"] {
        fs::create_dir_all(root.join(dir)).context("a directory of the image")?;
    }
    fs::set_permissions(root.join("tmp"), fs::Permissions::from_mode(0o1777)).context("/tmp of the image")?;
    fs::write(root.join("etc/passwd"), "root:x:0:0:root:/root:/bin/sh\n")
        .context("/etc/passwd of the image")?;
    fs::write(root.join("etc/group"), "root:x:0:\n").context("/etc/group of the image")?;
    let busybox =
        ["/bin/busybox", "/usr/bin/busybox"].map(Path::new).into_iter().find(|place| place.exists());
    let busybox = busybox.context("no busybox\nhint: `cargo xtask setup demo` installs busybox-static")?;
    fs::copy(busybox, root.join("bin/busybox")).context("busybox")?;
    let applets = process::output(Command::new(busybox).arg("--list"))?;
    for name in applets.lines().filter(|name| *name != "busybox") {
        symlink("busybox", root.join("bin").join(name)).with_context(|| format!("the link {name}"))?;
    }
    let hello = root.join("bin/hello");
    fs::write(&hello, HELLO).context("the demo's command")?;
    fs::set_permissions(&hello, fs::Permissions::from_mode(0o755)).context("the demo's command")
}
