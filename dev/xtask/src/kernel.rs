//! The guest kernel: `cargo xtask kernel`.
//!
//! Debian's source package + our config fragments + our patches → `target/kernel/<key>/vmlinux`. The key is a hash of
//! everything that goes in, so a kernel is built once and found in milliseconds from then on; the build's date, user and
//! host are fixed, so the same inputs give the same bytes and the file's own hash is an identity.

mod compile;
mod config;
mod key;
mod source;

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context as _, Result, bail};

use crate::{paths, process};

const USAGE: &str = "\
usage: cargo xtask kernel [--hash] [--keep-source]
  --hash          print the SHA-256 of vmlinux after its path
  --keep-source   leave the patched source and the object files behind, for work on the patches
environment:
  KILN_KERNEL     a kernel to use instead of building one";

/// Names a kernel to use instead of the one this would build.
const OWN_KERNEL: &str = "KILN_KERNEL";

/// A guest kernel, ready to boot.
pub(crate) struct Kernel {
    /// The uncompressed, stripped ELF file with its PVH note.
    pub(crate) vmlinux: PathBuf,
    /// SHA-256 of that file, in hex: part of Kiln's identity.
    pub(crate) sha256: String,
}

/// Builds the guest kernel and prints where it is.
///
/// # Errors
/// As [`ensure`], and for an unknown argument.
pub(crate) fn run(args: &[String]) -> Result<()> {
    let (mut print_hash, mut keep_source) = (false, false);
    for arg in args {
        match arg.as_str() {
            "--hash" => print_hash = true,
            "--keep-source" => keep_source = true,
            "--help" | "-h" => {
                println!("{USAGE}");
                return Ok(());
            }
            other => bail!("no argument {other}\n{USAGE}"),
        }
    }
    let kernel = find_or_build(keep_source)?;
    println!("{}", kernel.vmlinux.display());
    if print_hash {
        println!("{}", kernel.sha256);
    }
    Ok(())
}

/// Finds the guest kernel, or builds it: minutes once, milliseconds from then on.
///
/// # Errors
/// A missing package that cannot be installed, an option that did not land, a patch that does not apply, or a failed
/// compilation, with the end of the build's log.
pub(crate) fn ensure() -> Result<Kernel> {
    find_or_build(false)
}

/// As [`ensure`], for those who need the file only.
pub(crate) fn build() -> Result<PathBuf> {
    Ok(ensure()?.vmlinux)
}

/// Where the symbols of the kernel are that [`build`] returns.
pub(crate) fn system_map() -> Result<PathBuf> {
    Ok(build()?.with_file_name("System.map"))
}

fn find_or_build(keep_source: bool) -> Result<Kernel> {
    if let Some(own) = std::env::var_os(OWN_KERNEL) {
        let vmlinux = PathBuf::from(own);
        let sha256 = key::sha256_of_file(&vmlinux).context(OWN_KERNEL)?;
        return Ok(Kernel { vmlinux, sha256 });
    }
    let inputs = paths::root().join("guest/kernel");
    let cache = cache();
    fs::create_dir_all(&cache).with_context(|| format!("cannot make {}", cache.display()))?;

    source::require_packages()?;
    let key = key::of(&inputs)?;
    let place = cache.join(&key);
    if let Some(kernel) = find(&place) {
        point_current_at(&cache, &key)?;
        return Ok(kernel);
    }

    // Two builds at once would only take twice the time: the second waits, and finds what the first made.
    let lock = File::create(cache.join("lock")).context("cannot make the kernel cache's lock")?;
    if lock.try_lock().is_err() {
        eprintln!("kernel: another build is under way, waiting for it");
        lock.lock().context("cannot lock the kernel cache")?;
    }
    if find(&place).is_none() {
        let work = cache.join("work");
        make(&inputs, &work, &place)
            .with_context(|| format!("guest kernel (the whole log is {})", cache.join("log").display()))?;
        if !keep_source {
            fs::remove_dir_all(&work).with_context(|| format!("cannot remove {}", work.display()))?;
        }
    }
    point_current_at(&cache, &key)?;
    find(&place).context("the kernel that was just built is not there")
}

/// Where built kernels are kept: in the checkout whatever cargo's target directory is, since no profile changes them.
fn cache() -> PathBuf {
    paths::root().join("target/kernel")
}

fn find(place: &Path) -> Option<Kernel> {
    let vmlinux = place.join("vmlinux");
    let sha256 = fs::read_to_string(place.join("vmlinux.sha256")).ok()?;
    vmlinux.is_file().then(|| Kernel { vmlinux, sha256: sha256.trim().to_owned() })
}

/// Builds in `work` and moves what counts to `place` in one step, so that `place` is whole or absent.
fn make(inputs: &Path, work: &Path, place: &Path) -> Result<()> {
    eprintln!("kernel: building, some minutes");
    if work.exists() {
        fs::remove_dir_all(work).with_context(|| format!("cannot remove {}", work.display()))?;
    }
    let (source, objects, result) = (work.join("source"), work.join("objects"), work.join("result"));
    for dir in [&source, &objects, &result] {
        fs::create_dir_all(dir).with_context(|| format!("cannot make {}", dir.display()))?;
    }
    source::unpack(&source)?;
    source::patch(&source, &inputs.join("patches"))?;
    config::make(&source, &objects, &inputs.join("config"))?;
    compile::vmlinux(&source, &objects, &cache().join("log"))?;

    let vmlinux = result.join("vmlinux");
    process::run(
        Command::new("strip").arg("--strip-all").arg("-o").arg(&vmlinux).arg(objects.join("vmlinux")),
    )?;
    for (from, to) in [(".config", "config"), ("System.map", "System.map")] {
        fs::copy(objects.join(from), result.join(to)).with_context(|| format!("cannot copy {from}"))?;
    }
    let sha256 = key::sha256_of_file(&vmlinux)?;
    fs::write(result.join("vmlinux.sha256"), &sha256).context("cannot write vmlinux.sha256")?;
    if place.exists() {
        fs::remove_dir_all(place).with_context(|| format!("cannot remove {}", place.display()))?;
    }
    fs::rename(&result, place).with_context(|| format!("cannot make {}", place.display()))?;
    eprintln!("kernel: built, sha256 {sha256}");
    Ok(())
}

/// Lets `target/kernel/current` name the kernel in use, for people and scripts.
fn point_current_at(cache: &Path, key: &str) -> Result<()> {
    let current = cache.join("current");
    if fs::read_link(&current).is_ok_and(|now| now == Path::new(key)) {
        return Ok(());
    }
    let aside = cache.join(format!("current.{}", std::process::id()));
    std::os::unix::fs::symlink(key, &aside).context("cannot make a link in the kernel cache")?;
    fs::rename(&aside, &current).with_context(|| format!("cannot replace {}", current.display()))
}
