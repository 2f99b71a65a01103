//! Puts the guest (kernel and initramfs), the monitor, their digests and the commit into the program.
//!
//! `KILN_GUEST_DIR` names a folder with `vmlinux` and `initramfs.cpio`, which become part of the binary; without it
//! the binary looks for a guest when it runs. `KILN_MONITOR` names a `kiln-monitor` that becomes part of it; without it the
//! binary is its own monitor. `KILN_COMMIT` overrides what git says.

#![forbid(unsafe_code)]

use std::env;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use sha2::{Digest, Sha256};

const GUEST: &str = "KILN_GUEST_DIR";
const MONITOR: &str = "KILN_MONITOR";

fn main() {
    println!("cargo::rerun-if-env-changed={GUEST}");
    println!("cargo::rerun-if-env-changed={MONITOR}");
    println!("cargo::rerun-if-env-changed=KILN_COMMIT");
    let out = env::var("OUT_DIR").expect("cargo sets OUT_DIR");
    fs::write(Path::new(&out).join("built_in.rs"), guest() + &monitor()).expect("OUT_DIR can be written");
    println!("cargo::rustc-env=KILN_COMMIT={}", commit());
}

fn guest() -> String {
    const TYPE: &str = "const GUEST: Option<(kiln_cli::BuiltIn, kiln_cli::BuiltIn)>";
    let Some(folder) = named(GUEST) else { return format!("{TYPE} = None;\n") };
    let part = |name: &str| built_in(GUEST, &folder.join(name));
    format!("{TYPE} = Some(({}, {}));\n", part("vmlinux"), part("initramfs.cpio"))
}

fn monitor() -> String {
    const TYPE: &str = "const MONITOR: Option<kiln_cli::BuiltIn>";
    match named(MONITOR) {
        Some(path) => format!("{TYPE} = Some({});\n", built_in(MONITOR, &path)),
        None => format!("{TYPE} = None;\n"),
    }
}

fn named(variable: &str) -> Option<PathBuf> {
    env::var_os(variable).filter(|path| !path.is_empty()).map(PathBuf::from)
}

/// The file that `variable` has named, as an expression.
fn built_in(variable: &str, path: &Path) -> String {
    let path =
        fs::canonicalize(path).unwrap_or_else(|error| panic!("{variable}: {}: {error}", path.display()));
    println!("cargo::rerun-if-changed={}", path.display());
    let content = fs::read(&path).unwrap_or_else(|error| panic!("{variable}: {}: {error}", path.display()));
    let sha256: [u8; 32] = Sha256::digest(&content).into();
    // As a string literal of Rust's.
    let path = format!("{:?}", path.to_str().unwrap_or_else(|| panic!("{variable} is not valid UTF-8")));
    format!(
        "kiln_cli::BuiltIn {{ bytes: include_bytes!({path}), sha256: kiln_cli::Digest::from_bytes({sha256:?}) }}"
    )
}

fn commit() -> String {
    if let Ok(commit) = env::var("KILN_COMMIT")
        && !commit.is_empty()
    {
        return commit;
    }
    // The log of HEAD gains a line with each commit and checkout. Outside a repository there is nothing to watch.
    let log = git(&["rev-parse", "--path-format=absolute", "--git-path", "logs/HEAD"]);
    match log.filter(|log| Path::new(log).exists()) {
        Some(log) => println!("cargo::rerun-if-changed={log}"),
        None => println!("cargo::rerun-if-changed=build.rs"),
    }
    git(&["rev-parse", "--short=12", "HEAD"]).unwrap_or_else(|| "unknown".to_owned())
}

fn git(arguments: &[&str]) -> Option<String> {
    let output = Command::new("git").args(arguments).output().ok()?;
    let text = String::from_utf8(output.stdout).ok()?;
    (output.status.success() && !text.trim().is_empty()).then(|| text.trim().to_owned())
}
