//! The guest's initramfs: `cargo xtask initramfs`.
//!
//! A cpio archive in the "newc" form that the kernel unpacks (Linux Documentation/driver-api/early-userspace/
//! buffer-format.rst), not compressed, because unpacking costs guest-kernel instructions and memory is shared. It
//! holds the agent as `/init` and the console node the kernel opens for it, and is the same bytes for the same agent.

use std::path::PathBuf;

use anyhow::{Context as _, Result};

use crate::{paths, process};

/// Builds the initramfs and prints where it is.
pub(crate) fn run(_args: &[String]) -> Result<()> {
    println!("{}", build()?.display());
    Ok(())
}

/// Builds the agent, packs it, and returns the path of `initramfs.cpio`.
pub(crate) fn build() -> Result<PathBuf> {
    // The profile's own folder of the target directory.
    let dir = paths::target().join("guest");
    let args = ["build", "--quiet", "--locked", "--package", "kiln-agent", "--features", "program"];
    process::run(process::cargo(args).args(["--profile", "guest"]))?;
    let agent = dir.join("kiln-agent");
    let agent = std::fs::read(&agent).with_context(|| agent.display().to_string())?;

    let packed = dir.join("initramfs.cpio");
    let archive = pack(&agent);
    // Left alone when nothing changed, so that its time says when the guest last did.
    if std::fs::read(&packed).ok().as_deref() != Some(&archive) {
        let aside = dir.join(format!("initramfs.cpio.{}", std::process::id()));
        std::fs::write(&aside, &archive).with_context(|| aside.display().to_string())?;
        std::fs::rename(&aside, &packed).with_context(|| packed.display().to_string())?;
    }
    Ok(packed)
}

/// What kind of file an entry is, and its permissions: `st_mode`.
const DIRECTORY_0755: u32 = 0o040_755;
const FILE_0755: u32 = 0o100_755;
const CHARACTER_DEVICE_0600: u32 = 0o020_600;

/// The archive that holds `agent` as `/init`.
fn pack(agent: &[u8]) -> Vec<u8> {
    let mut archive = Vec::with_capacity(agent.len() + 1024);
    entry(&mut archive, "dev", DIRECTORY_0755, (0, 0), &[]);
    entry(&mut archive, "dev/console", CHARACTER_DEVICE_0600, (5, 1), &[]);
    entry(&mut archive, "init", FILE_0755, (0, 0), agent);
    entry(&mut archive, "TRAILER!!!", 0, (0, 0), &[]);
    archive
}

/// Appends an entry: a header of 13 hexadecimal fields, the name with its NUL, the data; both padded to 4 bytes.
fn entry(archive: &mut Vec<u8>, name: &str, mode: u32, (major, minor): (u32, u32), data: &[u8]) {
    let inode = 0;
    let (uid, gid, links, modified) = (0, 0, 1, 0);
    let (on_major, on_minor, checksum) = (0, 0, 0);
    let fields = [
        inode,
        mode,
        uid,
        gid,
        links,
        modified,
        data.len() as u32,
        on_major,
        on_minor,
        major,
        minor,
        name.len() as u32 + 1,
        checksum,
    ];
    archive.extend_from_slice(b"070701");
    for field in fields {
        archive.extend_from_slice(format!("{field:08x}").as_bytes());
    }
    archive.extend_from_slice(name.as_bytes());
    archive.push(0);
    pad(archive);
    archive.extend_from_slice(data);
    pad(archive);
}

fn pad(archive: &mut Vec<u8>) {
    archive.resize(archive.len().next_multiple_of(4), 0);
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write as _;
    use std::process::{Command, Stdio};

    #[test]
    fn cpio_lists_what_was_packed() {
        let mut child = Command::new("cpio")
            .args(["-itv", "--quiet", "--numeric-uid-gid"])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .expect("cpio runs; install it with: apt-get install cpio");
        child.stdin.take().expect("a pipe").write_all(&pack(b"agent")).expect("cpio reads");
        let output = child.wait_with_output().expect("cpio ends");
        let listing = String::from_utf8(output.stdout).expect("a listing in ASCII");
        let lines: Vec<Vec<&str>> = listing.lines().map(|line| line.split_whitespace().collect()).collect();
        assert!(output.status.success());
        assert_eq!(lines.len(), 3, "{listing}");
        assert_eq!((lines[0][0], lines[0].last()), ("drwxr-xr-x", Some(&"dev")));
        assert_eq!((lines[1][0], lines[1][4], lines[1][5]), ("crw-------", "5,", "1"));
        assert_eq!((lines[2][0], lines[2][4], lines[2].last()), ("-rwxr-xr-x", "5", Some(&"init")));
    }

    #[test]
    fn the_same_agent_packs_to_the_same_bytes() {
        assert_eq!(pack(b"agent"), pack(b"agent"));
        assert_ne!(pack(b"agent"), pack(b"other"));
    }
}
