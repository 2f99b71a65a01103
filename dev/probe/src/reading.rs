//! Reads of a file or block device, timed where they happen.

use std::fs::File;
use std::io::{self, BufRead as _, Write as _};
use std::os::unix::fs::{FileExt as _, OpenOptionsExt as _};
use std::time::Instant;

/// What `O_DIRECT` asks of a buffer's address, its length and the offset.
const ALIGNMENT_BYTES: usize = 4096;

/// Answers each line of stdin with the nanoseconds that its reads took.
pub(crate) fn serve(path: &str) -> io::Result<()> {
    let file = File::options()
        .read(true)
        .custom_flags(rustix::fs::OFlags::DIRECT.bits().cast_signed())
        .open(path)?;
    let size = rustix::fs::seek(&file, rustix::fs::SeekFrom::End(0))?;
    println!("{size} bytes");
    io::stdout().flush()?;
    for line in io::stdin().lock().lines() {
        let line = line?;
        let words: Vec<&str> = line.split_whitespace().collect();
        let [block, count, order] = words[..] else { return Err(io::Error::other(line)) };
        let block: usize = block.parse().map_err(io::Error::other)?;
        let count: u64 = count.parse().map_err(io::Error::other)?;
        println!("{}", read(&file, size, block, count, order == "random")?);
        io::stdout().flush()?;
    }
    Ok(())
}

fn read(file: &File, size: u64, block: usize, count: u64, random: bool) -> io::Result<u128> {
    let mut space = vec![0_u8; block + ALIGNMENT_BYTES];
    let start = space.as_ptr().align_offset(ALIGNMENT_BYTES);
    let buffer = &mut space[start..start + block];
    let blocks = (size / block as u64).max(1);
    let mut at = 0;
    let began = Instant::now();
    for _ in 0..count {
        file.read_exact_at(buffer, at * block as u64)?;
        // A fixed sequence, the same on every side: Knuth's MMIX generator.
        at = if random {
            at.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407)
        } else {
            at + 1
        };
        at = if random { (at >> 11) % blocks } else { at % blocks };
    }
    Ok(began.elapsed().as_nanos())
}
