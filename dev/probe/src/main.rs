//! What a guest looks like from inside, said in lines that a test can compare.
//!
//! It is linked statically, so that it runs in an image that has nothing else, and on the host beside an image that
//! another tool unpacked: the same eyes on both sides.

#![deny(unsafe_code)]

mod listing;
mod reading;
mod registers;

use std::fs::File;
use std::io::{self, BufWriter, Read as _, Write as _};
use std::os::unix::ffi::OsStrExt as _;
use std::process::ExitCode;

const USAGE: &str = "\
usage: probe list DIR...      every file below, with all its metadata and the digest of its data
       probe touch MIB        writes to every page of so much memory, and reads it back
       probe hog              takes memory until it is killed
       probe argv [ARG...]    how many arguments came, their bytes, and a checksum of them
       probe count            how many bytes stdin had, and a checksum of them
       probe pattern BYTES    writes so many bytes of a fixed pattern to stdout
       probe append FILE      writes and syncs one numbered line after another, and says each when it is durable
       probe identity         user, groups, directory, host name, environment
       probe read FILE        for each line `BLOCK_BYTES COUNT sequential|random` on stdin, reads so, past the page cache,
                              and prints how many nanoseconds it took
       probe registers PROCESSES YIELDS
                              so many processes keep values of their own in all vector registers while they take turns
       probe beat             writes ! to the serial port, straight from user mode, every 100 us
       probe carry-registers  rings a Kiln machine's doorbell every 100 us, with values in all vector registers, and in
                              another way when one was lost
       probe exit CODE
";

/// Bytes of a page, the unit in which memory is touched.
const PAGE_BYTES: usize = 4096;
/// Bytes of a buffer for streams.
const BUFFER_BYTES: usize = 64 << 10;

fn main() -> ExitCode {
    let args: Vec<_> = std::env::args_os().collect();
    let words: Vec<&str> = args.iter().skip(1).filter_map(|arg| arg.to_str()).collect();
    let number = |word: &str| word.parse::<u64>().map_err(io::Error::other);
    let outcome = match words[..] {
        ["list", ..] => listing::print(&args[2..]),
        ["touch", mib] => number(mib).and_then(touch),
        ["hog"] => hog(),
        ["argv", ..] => argv(&args[2..]),
        ["count"] => count(),
        ["pattern", bytes] => number(bytes).and_then(pattern),
        ["append", file] => append(file),
        ["read", file] => reading::serve(file),
        ["registers", processes, yields] => number(processes)
            .and_then(|processes| Ok((processes, number(yields)?)))
            .and_then(|(processes, yields)| registers::share(processes, yields)),
        ["hold-registers", id, yields] => number(id)
            .and_then(|id| Ok((id, number(yields)?)))
            .and_then(|(id, yields)| registers::hold(id, yields)),
        ["beat", ..] => registers::beat(),
        ["carry-registers", ..] => registers::carry(),
        ["identity"] => identity(),
        ["exit", code] => return ExitCode::from(code.parse::<u8>().unwrap_or(1)),
        _ => {
            eprint!("{USAGE}");
            return ExitCode::from(2);
        }
    };
    match outcome {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("probe: {error}");
            ExitCode::FAILURE
        }
    }
}

/// Writes a number of its own to every page, then reads all of them back.
fn touch(mib: u64) -> io::Result<()> {
    let bytes = usize::try_from(mib << 20).map_err(io::Error::other)?;
    let mut memory = vec![0_u8; bytes];
    for (number, page) in memory.chunks_exact_mut(PAGE_BYTES).enumerate() {
        page[..8].copy_from_slice(&(number as u64 + 1).to_le_bytes());
    }
    for (number, page) in memory.chunks_exact(PAGE_BYTES).enumerate() {
        if page[..8] != (number as u64 + 1).to_le_bytes() {
            return Err(io::Error::other(format!("page {number} lost what was written to it")));
        }
    }
    println!("touched {mib} MiB");
    Ok(())
}

fn hog() -> io::Result<()> {
    let mut taken = Vec::new();
    loop {
        let mut more = vec![0_u8; 16 << 20];
        for page in more.chunks_exact_mut(PAGE_BYTES) {
            page[0] = 1;
        }
        taken.push(more);
        println!("{} MiB", taken.len() * 16);
        io::stdout().flush()?;
    }
}

fn argv(args: &[std::ffi::OsString]) -> io::Result<()> {
    let mut checksum = Checksum::default();
    let mut bytes = 0;
    for arg in args {
        bytes += arg.as_bytes().len();
        checksum.add(arg.as_bytes());
        checksum.add(&[0]);
    }
    writeln!(io::stdout(), "{} arguments, {bytes} bytes, checksum {}", args.len(), checksum.0)
}

fn count() -> io::Result<()> {
    let mut buffer = vec![0; BUFFER_BYTES];
    let (mut bytes, mut checksum) = (0, Checksum::default());
    loop {
        let count = io::stdin().read(&mut buffer)?;
        if count == 0 {
            return writeln!(io::stdout(), "{bytes} bytes, checksum {}", checksum.0);
        }
        bytes += count;
        checksum.add(&buffer[..count]);
    }
}

/// Writes the pattern: byte `i` is `i mod 251`, a prime, so that a lost or doubled block shows.
fn pattern(bytes: u64) -> io::Result<()> {
    let block: Vec<u8> = (0..251 * 256).map(|i| (i % 251) as u8).collect();
    let mut out = io::stdout().lock();
    let mut left = bytes;
    while left > 0 {
        let now = left.min(block.len() as u64) as usize;
        out.write_all(&block[..now])?;
        left -= now as u64;
    }
    out.flush()
}

fn append(path: &str) -> io::Result<()> {
    let mut file = File::create(path)?;
    for number in 0_u64.. {
        writeln!(file, "{number}")?;
        file.sync_all()?;
        println!("{number}");
        io::stdout().flush()?;
    }
    Ok(())
}

fn identity() -> io::Result<()> {
    let mut out = BufWriter::new(io::stdout().lock());
    let mut groups: Vec<u32> = rustix::process::getgroups()?.iter().map(|group| group.as_raw()).collect();
    groups.sort_unstable();
    writeln!(out, "uid {} gid {}", rustix::process::getuid().as_raw(), rustix::process::getgid().as_raw())?;
    writeln!(out, "groups {groups:?}")?;
    writeln!(out, "cwd {}", std::env::current_dir()?.display())?;
    writeln!(out, "host {}", rustix::system::uname().nodename().to_string_lossy())?;
    for (name, stream) in [("stdin", rustix::stdio::stdin()), ("stdout", rustix::stdio::stdout())] {
        writeln!(out, "{name} tty {}", rustix::termios::isatty(stream))?;
    }
    let mut vars: Vec<_> = std::env::vars_os().collect();
    vars.sort();
    for (name, value) in vars {
        out.write_all(&[b"env ", name.as_bytes(), b"=", value.as_bytes(), b"\n"].concat())?;
    }
    out.flush()
}

/// FNV-1a: enough to tell a byte lost from a byte kept, and quick to write again elsewhere.
struct Checksum(u64);

impl Default for Checksum {
    fn default() -> Self {
        Self(0xcbf2_9ce4_8422_2325)
    }
}

impl Checksum {
    fn add(&mut self, bytes: &[u8]) {
        for byte in bytes {
            self.0 = (self.0 ^ u64::from(*byte)).wrapping_mul(0x0100_0000_01b3);
        }
    }
}
