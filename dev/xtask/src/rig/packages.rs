//! The rig's kernel and emulator, unpacked from Debian packages into the cache; nothing is installed.

use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context as _, Result, bail};

use crate::process;

/// The oldest QEMU that emulates enough of SVM: before it, a guest's XSETBV is not intercepted, so that KVM never
/// learns the guest's XCR0 and guests with AVX die.
const QEMU_MAJOR: u32 = 10;
/// The kernel series the rig runs.
const KERNEL_PACKAGES: &str = "linux-image-6.12";

/// Debian's kernel: its image and the root under which its modules lie.
pub(super) struct Kernel {
    pub(super) image: PathBuf,
    pub(super) root: PathBuf,
    pub(super) release: String,
}

/// An emulator that can run the rig.
pub(super) struct Qemu {
    pub(super) program: PathBuf,
    pub(super) arguments: Vec<OsString>,
    pub(super) modules: Option<PathBuf>,
}

/// Finds Debian's kernel in the cache, or fetches it.
pub(super) fn kernel(cache: &Path) -> Result<Kernel> {
    let root = cache.join("kernel");
    if !root.exists() {
        let package = newest_kernel_package()?;
        eprintln!("rig: fetching {package}");
        fill(&root, |aside| {
            download(aside, &[], &[package])?;
            process::run(Command::new("depmod").arg("-b").arg(aside).arg(release(aside)?))
        })?;
    }
    let release = release(&root)?;
    Ok(Kernel { image: root.join(format!("boot/vmlinuz-{release}")), root, release })
}

/// The kernel's release, which is the one name under `lib/modules`.
fn release(root: &Path) -> Result<String> {
    let modules = root.join("lib/modules");
    let mut names = std::fs::read_dir(&modules).with_context(|| format!("no {}", modules.display()))?;
    let name = names.next().with_context(|| format!("{} is empty", modules.display()))??.file_name();
    name.into_string().ok().context("the kernel's release is not text")
}

/// The newest package with Debian's general kernel of the series; on a machine without package lists, after fetching
/// them.
fn newest_kernel_package() -> Result<String> {
    if let Some(name) = find_kernel_package()? {
        return Ok(name);
    }
    process::run(apt_get(&[]).arg("update").stdout(Stdio::null()))?;
    find_kernel_package()?.with_context(|| format!("apt knows no package {KERNEL_PACKAGES}*-amd64"))
}

fn find_kernel_package() -> Result<Option<String>> {
    let names = process::output(Command::new("apt-cache").args(["pkgnames", KERNEL_PACKAGES]))?;
    let names = names
        .lines()
        .filter(|name| name.ends_with("-amd64"))
        .filter(|name| ["cloud", "rt-amd64", "dbg"].iter().all(|other| !name.contains(other)));
    Ok(names.max_by_key(|name| numbers(name)).map(str::to_owned))
}

/// The numbers in a name in order, by which versions compare.
fn numbers(name: &str) -> Vec<u64> {
    name.split(|c: char| !c.is_ascii_digit()).filter_map(|digits| digits.parse().ok()).collect()
}

/// Finds an emulator that is new enough: the installed one, the one in the cache, or the one of the release's
/// backports, which is then put into the cache.
pub(super) fn qemu(cache: &Path) -> Result<Qemu> {
    if major("qemu-system-x86_64") >= QEMU_MAJOR {
        return Ok(Qemu { program: "qemu-system-x86_64".into(), arguments: Vec::new(), modules: None });
    }
    let root = cache.join("qemu");
    if !root.exists() {
        let (suite, lists) = backports(cache)?;
        eprintln!("rig: fetching QEMU from {suite}");
        let packages = ["qemu-system-x86", "qemu-system-common", "qemu-system-data", "seabios"];
        let packages = packages.map(|name| format!("{name}/{suite}"));
        fill(&root, |aside| download(aside, &lists, &packages))?;
    }
    let program = root.join("usr/bin/qemu-system-x86_64");
    if major(&program) < QEMU_MAJOR {
        bail!(
            "{} does not run or is older than QEMU {QEMU_MAJOR}\nhint: `cargo xtask setup rig` installs the libraries it needs",
            program.display()
        );
    }
    let share = root.join("usr/share");
    let data = |name: &str| ["-L".into(), share.join(name).into_os_string()];
    Ok(Qemu {
        program,
        arguments: [data("seabios"), data("qemu")].concat(),
        modules: Some(root.join("usr/lib/x86_64-linux-gnu/qemu")),
    })
}

/// The major version of a QEMU; 0 when it does not run.
fn major(program: impl AsRef<std::ffi::OsStr>) -> u32 {
    let said = Command::new(program).arg("--version").stderr(Stdio::null()).output();
    let said = said.map(|said| String::from_utf8_lossy(&said.stdout).into_owned()).unwrap_or_default();
    let version = said.split_whitespace().nth(3).unwrap_or_default();
    version.split('.').next().and_then(|major| major.parse().ok()).unwrap_or(0)
}

/// Package lists of this release's backports, beside the machine's own and from the mirror it uses: the suite, and
/// the options that make apt use the lists.
fn backports(cache: &Path) -> Result<(String, Vec<String>)> {
    let os = std::fs::read_to_string("/etc/os-release").context("/etc/os-release")?;
    let release =
        os.lines().find_map(|line| line.strip_prefix("VERSION_CODENAME=")).context("not a Debian release")?;
    let targets = ["indextargets", "--format", "$(CODENAME) $(REPO_URI)", "Created-By: Packages"];
    let targets = process::output(Command::new("apt-get").args(targets))?;
    let mirror = targets.lines().find_map(|line| line.strip_prefix(release)?.strip_prefix(' '));
    let mirror =
        mirror.with_context(|| format!("apt has no mirror of {release}\nhint: run `apt-get update`"))?;
    let suite = format!("{release}-backports");

    let apt = cache.join("apt");
    std::fs::create_dir_all(apt.join("lists/partial")).context("apt's lists")?;
    let source = apt.join("backports.list");
    std::fs::write(&source, format!("deb {mirror} {suite} main\n")).context("apt's source")?;
    let options: Vec<String> = [
        format!("Dir::Etc::SourceList={}", source.display()),
        "Dir::Etc::SourceParts=/dev/null".into(),
        format!("Dir::State::Lists={}", apt.join("lists").display()),
        "Dir::Cache::PkgCache=".into(),
        "Dir::Cache::SrcPkgCache=".into(),
    ]
    .into();
    process::run(apt_get(&options).arg("update").stdout(Stdio::null()))?;
    Ok((suite, options))
}

fn apt_get(options: &[String]) -> Command {
    let mut apt = Command::new("apt-get");
    apt.args(["-q", "-o", "APT::Sandbox::User=root"]);
    for option in options {
        apt.args(["-o", option]);
    }
    apt
}

/// Downloads packages and unpacks them into `root`.
fn download(root: &Path, apt_options: &[String], packages: &[impl AsRef<std::ffi::OsStr>]) -> Result<()> {
    let debs = root.join("debs");
    std::fs::create_dir_all(&debs).context("the download directory")?;
    process::run(
        apt_get(apt_options).arg("download").args(packages).current_dir(&debs).stdout(Stdio::null()),
    )?;
    for deb in std::fs::read_dir(&debs).context("the download directory")? {
        process::run(Command::new("dpkg-deb").arg("-x").arg(deb?.path()).arg(root))?;
    }
    std::fs::remove_dir_all(&debs).context("the download directory")
}

/// Makes `place` whole or not at all: `make` fills a directory aside, which then takes the name.
fn fill(place: &Path, make: impl FnOnce(&Path) -> Result<()>) -> Result<()> {
    let aside = place.with_extension("new");
    if aside.exists() {
        std::fs::remove_dir_all(&aside).with_context(|| format!("cannot remove {}", aside.display()))?;
    }
    std::fs::create_dir_all(&aside).with_context(|| format!("cannot make {}", aside.display()))?;
    make(&aside)?;
    std::fs::rename(&aside, place).with_context(|| format!("cannot make {}", place.display()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn versions_compare_by_number_and_not_by_letter() {
        assert!(numbers("linux-image-6.12.9+deb12-amd64") < numbers("linux-image-6.12.111+deb12-amd64"));
    }
}
