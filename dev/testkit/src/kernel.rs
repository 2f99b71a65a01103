//! Guest kernels that lack something.

use std::fs;
use std::path::Path;

use anyhow::{Context as _, Result, ensure};

/// An entry of `devlist`: name, operations, modes. Linux `drivers/char/mem.c`.
const ENTRY_BYTES: usize = 24;
/// `/dev/mem` is the second; `CONFIG_DEVMEM` decides whether it is there. The fourth, `/dev/null`, always is.
const MEM: usize = 1;
const NULL: usize = 3;

/// Writes to `to` the kernel `vmlinux` without its memory device: what it is when it is built without `CONFIG_DEVMEM`, with the one
/// piece of data that this makes another, an entry of zeros in its list of memory devices. `map` is its System.map.
///
/// # Errors
/// When the kernel is not one that `map` is of, or the file system fails.
pub fn without_memory_device(vmlinux: &Path, map: &Path, to: &Path) -> Result<()> {
    let mut kernel = fs::read(vmlinux).with_context(|| vmlinux.display().to_string())?;
    let map = fs::read_to_string(map).with_context(|| map.display().to_string())?;
    let [list, mem, null] = ["devlist", "mem_fops", "null_fops"].map(|symbol| address(&map, symbol));
    let at = offset(&kernel, list?).context("devlist is not in the kernel")?;
    let operations = |entry: usize| number(&kernel, at + ENTRY_BYTES * entry + 8);
    ensure!(operations(MEM) == Some(mem?) && operations(NULL) == Some(null?), "the map is another kernel's");
    kernel[at + ENTRY_BYTES * MEM..][..ENTRY_BYTES].fill(0);
    fs::write(to, kernel).with_context(|| to.display().to_string())
}

fn address(map: &str, symbol: &str) -> Result<u64> {
    let line = map.lines().find(|line| line.split(' ').nth(2) == Some(symbol));
    let address = line.and_then(|line| u64::from_str_radix(line.split(' ').next()?, 16).ok());
    address.with_context(|| format!("no {symbol} in the map"))
}

/// Where the file has the byte at `address`. ELF-64 Object File Format, "Program Header Table".
fn offset(elf: &[u8], address: u64) -> Option<usize> {
    const LOAD: u64 = 1;
    let headers = usize::try_from(number(elf, 32)?).ok()?;
    let count = u16::from_le_bytes(elf.get(56..58)?.try_into().ok()?);
    (0..usize::from(count)).map(|index| headers + 56 * index).find_map(|header| {
        let [from, start, bytes] = [8, 16, 32].map(|field| number(elf, header + field));
        let within = address.checked_sub(start?).filter(|within| Some(*within) < bytes)?;
        let is_loaded = number(elf, header)? & 0xffff_ffff == LOAD;
        is_loaded.then(|| usize::try_from(from? + within).ok()).flatten()
    })
}

fn number(bytes: &[u8], at: usize) -> Option<u64> {
    Some(u64::from_le_bytes(bytes.get(at..at + 8)?.try_into().ok()?))
}
