//! What a built kernel is known by.

use std::fmt::Write as _;
use std::fs;
use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context as _, Result, bail};

use super::source;
use crate::process;

/// Counts changes to this builder that change what it builds.
const BUILDER_VERSION: u32 = 1;
/// Hex digits of the key: enough to never meet by accident, short enough to read.
const KEY_DIGITS: usize = 16;

/// The key of the kernel that would be built now: source version, compiler, linker, config fragments and patches.
pub(super) fn of(inputs: &Path) -> Result<String> {
    let mut all = format!("builder {BUILDER_VERSION}\nsource {}\n", source::version()?);
    for tool in ["gcc", "ld"] {
        let version = process::output(Command::new(tool).arg("--version"))?;
        writeln!(all, "{}", version.lines().next().unwrap_or_default())?;
    }
    for (dir, extension) in [("config", "config"), ("patches", "patch")] {
        for path in files(&inputs.join(dir), extension)? {
            let text =
                fs::read_to_string(&path).with_context(|| format!("cannot read {}", path.display()))?;
            writeln!(all, "{dir}/{}\n{text}", name(&path))?;
        }
    }
    let mut digest = sha256(&all)?;
    digest.truncate(KEY_DIGITS);
    Ok(digest)
}

/// The files of `dir` that end in `.extension`, by name: the order in which fragments are merged and patches applied.
pub(super) fn files(dir: &Path, extension: &str) -> Result<Vec<PathBuf>> {
    let mut found = Vec::new();
    for entry in fs::read_dir(dir).with_context(|| format!("cannot list {}", dir.display()))? {
        let path = entry.with_context(|| format!("cannot list {}", dir.display()))?.path();
        if path.extension().is_some_and(|end| end == extension) {
            found.push(path);
        }
    }
    if found.is_empty() {
        bail!("{} holds no .{extension} file", dir.display());
    }
    found.sort();
    Ok(found)
}

/// The last part of a path, for messages.
pub(super) fn name(path: &Path) -> String {
    path.file_name().unwrap_or_default().to_string_lossy().into_owned()
}

/// SHA-256 of a file, in hex.
pub(super) fn sha256_of_file(path: &Path) -> Result<String> {
    first_word(&process::output(Command::new("sha256sum").arg(path))?)
}

fn sha256(text: &str) -> Result<String> {
    let mut child = Command::new("sha256sum")
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .context("cannot start sha256sum")?;
    child.stdin.take().context("sha256sum has no stdin")?.write_all(text.as_bytes())?;
    first_word(&String::from_utf8(child.wait_with_output()?.stdout)?)
}

fn first_word(text: &str) -> Result<String> {
    Ok(text.split_whitespace().next().context("sha256sum printed nothing")?.to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_digest_is_sha256() {
        // FIPS 180-4, the one-block example "abc".
        let expected = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad";
        assert_eq!(sha256("abc").expect("sha256sum is part of coreutils"), expected);
    }
}
