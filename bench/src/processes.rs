//! What processes have of the host's memory, as `/proc` tells it.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use anyhow::{Context as _, Result};

/// The memory of one process, in bytes.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Memory {
    /// Its own, and its share of what it shares with others.
    pub(crate) proportional: u64,
    /// What nobody else has at the moment, pages of files among it.
    pub(crate) alone: u64,
    /// The part of that that it has written: what would be free without it.
    pub(crate) written: u64,
}

/// Bytes that `/proc/PID/smaps_rollup` or a part of `/proc/PID/smaps` counts under a name.
fn counted(text: &str, name: &str) -> u64 {
    let lines = text.lines().filter_map(|line| line.strip_prefix(name)?.strip_prefix(':'));
    lines.filter_map(|line| line.trim().strip_suffix(" kB")?.trim().parse::<u64>().ok()).sum::<u64>() << 10
}

/// The memory of a process. Only root may look into a jailed one.
pub(crate) fn memory(process: u32) -> Result<Memory> {
    let text = read(process, "smaps_rollup")?;
    let written = counted(&text, "Private_Dirty");
    Ok(Memory {
        proportional: counted(&text, "Pss"),
        alone: counted(&text, "Private_Clean") + written,
        written,
    })
}

/// What a process has written and nobody else has, by what it is for. `guest_bytes` is how much memory its guest has.
pub(crate) fn written_by_part(process: u32, guest_bytes: u64) -> Result<BTreeMap<&'static str, u64>> {
    let mut parts = by_part(&read(process, "smaps")?, guest_bytes);
    let status = read(process, "status")?;
    parts.insert("page tables", counted(&status.replace('\t', " "), "VmPTE"));
    Ok(parts)
}

fn by_part(smaps: &str, guest_bytes: u64) -> BTreeMap<&'static str, u64> {
    let mut parts = BTreeMap::new();
    // Each mapping is a line that begins with its addresses, and lines that begin with a name and a colon.
    let is_head =
        |line: &str| line.split_once('-').is_some_and(|(from, _)| u64::from_str_radix(from, 16).is_ok());
    let mut lines = smaps.lines().peekable();
    let mut before = "";
    while let Some(head) = lines.next() {
        let mut body = String::new();
        while let Some(line) = lines.next_if(|line| !is_head(line)) {
            body += line;
            body += "\n";
        }
        let part = part(head, before, counted(&body, "Size"), guest_bytes);
        *parts.entry(part).or_default() += counted(&body, "Private_Dirty");
        before = part;
    }
    parts
}

/// What a mapping is for, by its line in `smaps`, what lies below it, and how long it is.
fn part(head: &str, below: &'static str, bytes: u64, guest_bytes: u64) -> &'static str {
    let mut words = head.split_whitespace();
    let (protection, name) = (words.nth(1).unwrap_or_default(), words.nth(3));
    match name {
        _ if bytes >= guest_bytes / 2 => "guest memory",
        Some("[heap]") => "heap",
        Some("[stack]") => "stacks",
        Some(name) if name.contains("kvm-vcpu") => "pages shared with KVM",
        Some(name) if name.contains("kiln-monitor") || name.contains("/kiln") => "program",
        Some(name) if name.starts_with("[v") => "kernel's pages",
        Some(_) => "libraries and other files",
        // What a program has beside its file.
        None if below == "program" => "program",
        None if protection.starts_with("---") => "stacks",
        None => "stacks and other memory",
    }
}

fn read(process: u32, file: &str) -> Result<String> {
    let path = format!("/proc/{process}/{file}");
    fs::read_to_string(&path).with_context(|| path)
}

/// The monitors that are this process's.
pub(crate) fn monitors() -> Result<Vec<u32>> {
    let own = std::process::id().to_string();
    let mut monitors = Vec::new();
    for entry in fs::read_dir("/proc").context("/proc")?.flatten() {
        let Some(id) = entry.file_name().to_str().and_then(|name| name.parse().ok()) else { continue };
        // A process may end while it is looked at.
        let words = fs::read(entry.path().join("cmdline")).unwrap_or_default();
        if words.starts_with(b"kiln-monitor\0") && parent(&entry.path()).as_deref() == Some(&own) {
            monitors.push(id);
        }
    }
    Ok(monitors)
}

fn parent(process: &Path) -> Option<String> {
    let stat = fs::read_to_string(process.join("stat")).ok()?;
    let after_name = stat.rsplit(')').next()?;
    after_name.split_whitespace().nth(1).map(ToOwned::to_owned)
}

/// Bytes that the whole host counts under a name of `/proc/meminfo`.
pub(crate) fn host(name: &str) -> Result<u64> {
    Ok(counted(&fs::read_to_string("/proc/meminfo").context("/proc/meminfo")?, name))
}

#[cfg(test)]
mod tests {
    use super::*;

    const SMAPS: &str = "\
555555000000-555555021000 rw-p 00000000 00:00 0                          [heap]
Size:                132 kB
Private_Clean:         4 kB
Private_Dirty:        60 kB
VmFlags: rd wr mr
7f0000000000-7f0010000000 rw-p 00000000 fe:00 12                         /store/memory
Size:             262144 kB
Private_Clean:         8 kB
Private_Dirty:       196 kB
7f0010000000-7f0010200000 rw-p 00000000 00:00 0 
Size:               2048 kB
Private_Dirty:        16 kB
7f0010200000-7f0010203000 rw-p 00190000 00:01 9                          /memfd:kiln-monitor (deleted)
Size:                 12 kB
Private_Dirty:        12 kB
7f0010203000-7f0010206000 rw-p 00000000 00:00 0 
Size:                 12 kB
Private_Dirty:         4 kB
";

    #[test]
    fn what_is_written_is_told_by_what_it_is_for() {
        let parts = by_part(SMAPS, 256 << 20);
        let kib = |part: &str| parts[part] >> 10;
        assert_eq!((kib("heap"), kib("guest memory"), kib("program")), (60, 196, 16));
        assert_eq!(kib("stacks and other memory"), 16);
        assert_eq!(parts.len(), 4);
    }

    #[test]
    fn this_process_has_memory_of_its_own() {
        let memory = memory(std::process::id()).expect("it is there");
        assert!(memory.written > 0 && memory.written <= memory.alone, "{memory:?}");
        let written: u64 = written_by_part(std::process::id(), u64::MAX).expect("it is there").values().sum();
        assert!(written > 0);
        assert!(host("MemAvailable").expect("Linux has it") > 0);
    }
}
