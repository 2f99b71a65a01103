//! The rig's initramfs: busybox, the modules in the order in which they load, and two scripts.

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context as _, Result, bail};

use super::packages::Kernel;
use crate::process;

const INIT: &str = include_str!("init.sh");
const SESSION: &str = include_str!("session.sh");

/// What the machine needs to find its root and to be a KVM host, in this order. A name that is no module is built in.
const MODULES: &[&str] = &[
    "virtio_pci",
    "qemu_fw_cfg",
    "9pnet_virtio",
    "9p",
    "overlay",
    "virtio_console",
    "virtio_rng",
    "kvm_amd",
    "crc32c_generic",
    "loop",
    "ext4",
    "erofs",
    "tun",
];

/// Finds the initramfs in the cache, or packs it. It is packed anew when a script or the kernel is another.
pub(super) fn initramfs(cache: &Path, kernel: &Kernel) -> Result<PathBuf> {
    let tree = cache.join("initramfs");
    let packed = cache.join("initramfs.cpio");
    let made_of = format!("{}\n{MODULES:?}\n{INIT}\n{SESSION}", kernel.release);
    let note = cache.join("initramfs.made-of");
    if packed.exists() && std::fs::read_to_string(&note).is_ok_and(|old| old == made_of) {
        return Ok(packed);
    }
    if tree.exists() {
        std::fs::remove_dir_all(&tree).context("the old initramfs")?;
    }
    for dir in ["bin", "dev", "proc", "sys", "modules", "lower", "upper", "root"] {
        std::fs::create_dir_all(tree.join(dir)).context("the initramfs tree")?;
    }
    copy_busybox(&tree.join("bin/busybox"))?;
    write_script(&tree.join("init"), INIT)?;
    write_script(&tree.join("session"), SESSION)?;
    let mut order = String::new();
    for module in load_order(kernel)? {
        let name = module.file_name().and_then(|name| name.to_str()).context("a module's name")?;
        let name = name.split('.').next().unwrap_or(name);
        unpack_module(&module, &tree.join(format!("modules/{name}.ko")))?;
        order.extend([name, "\n"]);
    }
    std::fs::write(tree.join("modules/order"), order).context("the load order")?;

    let aside = packed.with_extension("new");
    let file = std::fs::File::create(&aside).context("the initramfs")?;
    let pack = "find . | cpio --quiet -o -H newc -R 0:0";
    process::run(Command::new("sh").args(["-c", pack]).current_dir(&tree).stdout(file))?;
    std::fs::rename(&aside, &packed).context("the initramfs")?;
    std::fs::write(&note, made_of).context("the initramfs")?;
    std::fs::remove_dir_all(&tree).context("the initramfs tree")?;
    Ok(packed)
}

fn copy_busybox(to: &Path) -> Result<()> {
    for place in ["/bin/busybox", "/usr/bin/busybox"] {
        if std::fs::copy(place, to).is_ok() {
            let kind = process::output(Command::new(to).arg("--help").stderr(Stdio::null()))?;
            if !kind.contains("BusyBox") {
                bail!("{place} is not busybox");
            }
            return Ok(());
        }
    }
    bail!("no busybox\nhint: `cargo xtask setup rig` installs busybox-static")
}

fn write_script(path: &Path, text: &str) -> Result<()> {
    use std::os::unix::fs::PermissionsExt as _;
    std::fs::write(path, text).with_context(|| path.display().to_string())?;
    std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o755))
        .with_context(|| path.display().to_string())
}

/// The module files to load, each after those it depends on, by the kernel's `modules.dep`.
fn load_order(kernel: &Kernel) -> Result<Vec<PathBuf>> {
    let base = kernel.root.join("lib/modules").join(&kernel.release);
    let text = std::fs::read_to_string(base.join("modules.dep")).context("modules.dep")?;
    let mut needs: HashMap<String, (PathBuf, Vec<String>)> = HashMap::new();
    for line in text.lines() {
        let (file, on) = line.split_once(':').with_context(|| format!("modules.dep: {line}"))?;
        let on = on.split_whitespace().map(module_name).collect();
        needs.insert(module_name(file), (base.join(file), on));
    }
    let mut order = Vec::new();
    for module in MODULES {
        add(module, &needs, &mut order);
    }
    Ok(order)
}

/// Adds a module after its dependencies, unless it is there or built in.
fn add(name: &str, needs: &HashMap<String, (PathBuf, Vec<String>)>, order: &mut Vec<PathBuf>) {
    let Some((file, on)) = needs.get(name) else { return };
    // modules.dep lists the whole closure, the nearest first.
    for dependency in on.iter().rev() {
        add(dependency, needs, order);
    }
    if !order.contains(file) {
        order.push(file.clone());
    }
}

/// `kernel/fs/9p/9p.ko.xz` → `9p`; the kernel takes `-` and `_` for the same.
fn module_name(file: &str) -> String {
    let name = file.rsplit('/').next().unwrap_or(file);
    name.split('.').next().unwrap_or(name).replace('-', "_")
}

fn unpack_module(from: &Path, to: &Path) -> Result<()> {
    let program = match from.extension().and_then(|extension| extension.to_str()) {
        Some("xz") => "xz",
        Some("zst") => "zstd",
        _ => return std::fs::copy(from, to).map(drop).with_context(|| from.display().to_string()),
    };
    let to = std::fs::File::create(to).with_context(|| to.display().to_string())?;
    process::run(Command::new(program).arg("-dc").arg(from).stdout(to))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_module_loads_after_what_it_depends_on() {
        let entry = |name: &str, on: &[&str]| {
            (name.to_owned(), (PathBuf::from(name), on.iter().map(|on| (*on).to_owned()).collect::<Vec<_>>()))
        };
        let needs = HashMap::from([entry("a", &["b", "c"]), entry("b", &["c"]), entry("c", &[])]);
        let mut order = Vec::new();
        add("a", &needs, &mut order);
        assert_eq!(order, ["c", "b", "a"].map(PathBuf::from));
    }
}
