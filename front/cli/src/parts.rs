//! `kiln parts`.

use std::path::Path;

use kiln::bundle::{INITRAMFS_FILE, KERNEL_FILE};
use kiln::monitor::MONITOR_NAME;

use crate::Context;
use crate::failure::Failure;

/// Writes the parts of this program that a program with the library needs beside itself, and says where they are.
///
/// # Errors
/// When they are not part of this build, or cannot be written.
pub(crate) fn parts(context: &Context, folder: &Path) -> Result<(), Failure> {
    let (Some((kernel, initramfs)), Some(monitor)) = (context.build.guest, context.build.monitor) else {
        let failure = Failure::caller("this build of kiln has no guest and no monitor in it");
        return Err(failure.hint("build it with `cargo xtask build`"));
    };
    let failed = |path: &Path, error| Failure::host(format!("cannot write {}: {error}", path.display()));
    std::fs::create_dir_all(folder).map_err(|error| failed(folder, error))?;
    for (name, part, executable) in
        [(KERNEL_FILE, kernel, false), (INITRAMFS_FILE, initramfs, false), (MONITOR_NAME, monitor, true)]
    {
        let path = folder.join(name);
        part.write(&path, executable).map_err(|error| failed(&path, error))?;
        crate::print(&format!("{}\n", path.display()))?;
    }
    Ok(())
}
