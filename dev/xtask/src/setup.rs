//! What a fresh Debian lacks: `cargo xtask setup`.

use std::process::Command;

use anyhow::{Context as _, Result, bail};

use crate::{paths, process};

/// When a package is needed.
#[derive(Clone, Copy, PartialEq)]
enum Group {
    /// To build the guest kernel and Kiln.
    Build,
    /// To make the demo image.
    Demo,
    /// For the system tests.
    Test,
    /// For the emulated KVM host.
    Rig,
}

/// Debian's package, when it is needed, and for what.
const PACKAGES: &[(&str, Group, &str)] = &[
    ("gcc", Group::Build, "the linker, and the guest kernel's compiler"),
    ("libc6-dev", Group::Build, "the C library Rust programs link"),
    ("make", Group::Build, "the guest kernel's build"),
    ("patch", Group::Build, "the guest kernel's quirks"),
    ("flex", Group::Build, "the guest kernel's configuration"),
    ("bison", Group::Build, "the guest kernel's configuration"),
    ("bc", Group::Build, "the guest kernel's build"),
    ("libelf-dev", Group::Build, "the guest kernel's objtool"),
    ("xz-utils", Group::Build, "the guest kernel's source"),
    ("e2fsprogs", Group::Build, "scratch disks, and their check in tests"),
    ("busybox-static", Group::Demo, "the demo image's programs"),
    ("umoci", Group::Demo, "making images without a registry, and the oracle for layers"),
    ("skopeo", Group::Test, "copying images, and the baseline for pulls"),
    ("buildah", Group::Test, "images from another builder"),
    ("docker-registry", Group::Test, "a real registry on loopback"),
    ("apache2-utils", Group::Test, "htpasswd, for a registry with passwords"),
    ("openssl", Group::Test, "certificates and tokens of test registries"),
    ("debootstrap", Group::Test, "Debian images"),
    ("erofs-utils", Group::Test, "the oracle for EROFS images"),
    ("attr", Group::Test, "extended attributes in images"),
    ("libcap2-bin", Group::Test, "file capabilities in images"),
    ("g++", Group::Test, "libFuzzer"),
    ("strace", Group::Test, "watching a process for sleeps"),
    ("qemu-system-x86", Group::Rig, "the emulator's libraries"),
    ("util-linux", Group::Rig, "setpriv"),
    ("cpio", Group::Test, "initramfs archives: the rig's, and a test's own"),
    ("kmod", Group::Rig, "the order of kernel modules"),
];

/// Installs what is missing, of the named groups or of all.
pub(crate) fn run(args: &[String]) -> Result<()> {
    let mut groups = Vec::new();
    for arg in args {
        match arg.as_str() {
            "build" => groups.push(Group::Build),
            "demo" => groups.extend([Group::Build, Group::Demo]),
            "test" => groups.extend([Group::Build, Group::Demo, Group::Test]),
            "rig" => groups.extend([Group::Build, Group::Demo, Group::Test, Group::Rig]),
            other => bail!("no group named {other}: build, demo, test, rig"),
        }
    }
    let missing: Vec<_> = PACKAGES
        .iter()
        .filter(|(_, group, _)| groups.is_empty() || groups.contains(group))
        .filter(|(name, _, _)| !is_installed(name))
        .collect();
    if missing.is_empty() {
        return Ok(());
    }
    eprintln!("setup: these Debian packages are missing:");
    for (name, _, why) in &missing {
        eprintln!("  {name:<16} {why}");
    }
    let names: Vec<&str> = missing.iter().map(|(name, _, _)| *name).collect();
    install(&names)
}

/// Those of `packages` that are not installed.
pub(crate) fn missing<'a>(packages: &[&'a str]) -> Vec<&'a str> {
    packages.iter().copied().filter(|name| !is_installed(name)).collect()
}

fn is_installed(package: &str) -> bool {
    let status = Command::new("dpkg-query").args(["-W", "-f", "${db:Status-Status}", package]).output();
    status.is_ok_and(|output| output.stdout == b"installed")
}

/// Installs packages, with sudo where we are not root.
pub(crate) fn install(names: &[&str]) -> Result<()> {
    let root = process::output(Command::new("id").arg("-u"))?.trim() == "0";
    if !root && !process::is_installed("sudo") {
        bail!("not root, and there is no sudo\nhint: as root, apt-get install {}", names.join(" "));
    }
    let apt = |args: &[&str]| {
        let mut command = if root { Command::new("apt-get") } else { Command::new("sudo") };
        if !root {
            command.arg("apt-get");
        }
        process::run(
            command.arg("-q").args(args).env("DEBIAN_FRONTEND", "noninteractive").current_dir(paths::root()),
        )
    };
    apt(&["update"]).context("package lists")?;
    let install = ["install", "-y", "--no-install-recommends"];
    apt(&[&install[..], names].concat()).context("installing packages")
}
