//! The compilation: plain progress lines, the whole log in a file, its end shown on failure.

use std::collections::VecDeque;
use std::fs::File;
use std::io::{BufRead as _, BufReader, BufWriter, Write as _};
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::Instant;

use anyhow::{Context as _, Result, bail};

/// Lines of the log shown when the build fails.
const TAIL_LINES: usize = 40;
/// Objects between two lines of progress.
const PROGRESS_OBJECTS: usize = 200;

/// Compiles `objects/vmlinux`, on every processor this process may use.
pub(super) fn vmlinux(source: &Path, objects: &Path, log: &Path) -> Result<()> {
    let start = Instant::now();
    let jobs = std::thread::available_parallelism().map_or(1, std::num::NonZero::get);
    // One pipe for both streams, so that an error stands in the log where it happened.
    let (reader, writer) = std::io::pipe().context("cannot make a pipe")?;
    let mut make = Command::new("make");
    make.arg("-C")
        .arg(source)
        .arg(format!("O={}", objects.display()))
        .arg(format!("--jobs={jobs}"))
        .arg("vmlinux")
        // Whoever builds, wherever and whenever: the same bytes.
        .env("KBUILD_BUILD_TIMESTAMP", "Thu Jan  1 00:00:00 UTC 1970")
        .env("KBUILD_BUILD_VERSION", "1")
        .env("KBUILD_BUILD_USER", "kiln")
        .env("KBUILD_BUILD_HOST", "kiln")
        .env("LC_ALL", "C")
        .env_remove("MAKEFLAGS")
        .env_remove("CFLAGS")
        .stdin(Stdio::null())
        .stdout(writer.try_clone().context("cannot share the pipe")?)
        .stderr(writer);
    let mut child = make.spawn().context("cannot start make")?;
    drop(make); // With the pipe's write ends, so that it ends when the build does.

    let mut log =
        BufWriter::new(File::create(log).with_context(|| format!("cannot write {}", log.display()))?);
    let mut tail = VecDeque::with_capacity(TAIL_LINES);
    let mut built = 0;
    for line in BufReader::new(reader).lines() {
        let line = line.context("cannot read the build's output")?;
        writeln!(log, "{line}").context("cannot write the build's log")?;
        if line.starts_with("  CC ") || line.starts_with("  AS ") {
            built += 1;
            if built % PROGRESS_OBJECTS == 0 {
                eprintln!("kernel: {built} objects after {} s", start.elapsed().as_secs());
            }
        }
        if tail.len() == TAIL_LINES {
            tail.pop_front();
        }
        tail.push_back(line);
    }
    log.flush().context("cannot write the build's log")?;
    let status = child.wait().context("cannot wait for make")?;
    if !status.success() {
        let tail: Vec<_> = tail.into();
        bail!("make failed: {status}\n{}", tail.join("\n"));
    }
    eprintln!("kernel: {built} objects in {} s", start.elapsed().as_secs());
    Ok(())
}
