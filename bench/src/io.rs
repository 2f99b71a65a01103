//! Reads through virtio-blk beside reads of a host file: sequential by 1 MiB, random by 4 KiB.

use std::fs;
use std::io::{BufRead as _, BufReader, Write as _};
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};

use anyhow::{Context as _, Result};
use kiln_testkit::image;
use kiln_testkit::layout::{Layer, Layout};
use kiln_testkit::tar::{Entry, Tar};

use crate::kiln;
use crate::report::Report;

/// Bytes of incompressible data on the disk.
const DATA_BYTES: usize = 256 << 20;
/// What is read at a time, how often in a round, in what order.
const PATTERNS: &[(&str, usize, u64, &str)] =
    &[("sequential 1 MiB", 1 << 20, 64, "sequential"), ("random 4 KiB", 4096, 512, "random")];

pub(crate) fn run(report: &mut Report, runs: usize) -> Result<()> {
    let place = tempfile::tempdir_in(image::cache()).context("a directory")?;
    let data = noise();
    let file = place.path().join("data");
    fs::write(&file, &data).context("the host's file")?;
    let layers =
        [image::busybox_layer()?, Layer::plain(Tar::new().with(&Entry::file("data", &data)).finish())];
    let mut layout = Layout::create(&place.path().join("layout"))?;
    layout.image("io", serde_json::json!({"Env": ["PATH=/bin"]}), &layers)?;
    drop(data);

    let reference = format!("oci-layout:{}:io", layout.dir().display());
    let mut command = Command::new(kiln()?);
    command.args(["run", "-i", "--memory", "256m", "-q", &reference, "--", "/probe", "read", "/data"]);
    let mut guest = Reader::start(command.env("KILN_ROOT", place.path().join("store")))?;
    let mut host = Reader::start(Command::new(image::probe()?).arg("read").arg(&file))?;
    report.note(
        "guest and host read a file past their own page caches (O_DIRECT), the guest's on EROFS; its first round verifies"
            .into(),
    );
    for round in 0..runs {
        for (name, block, count, order) in PATTERNS {
            for (side, reader) in [("guest virtio-blk", &mut guest), ("host file", &mut host)] {
                let nanoseconds = reader.read(*block, *count, order)?;
                let first = if round == 0 && side != "host file" { ", first time" } else { "" };
                let mib = (*block as u64 * count) as f64 / f64::from(1 << 20);
                report.add(&format!("{side}, {name}{first}"), "MiB/s", mib / (nanoseconds / 1e9));
                report.add(&format!("{side}, {name}{first}, each"), "us", nanoseconds / 1e3 / *count as f64);
            }
        }
    }
    Ok(())
}

/// Bytes that no compression or deduplication makes fewer: xorshift64.
fn noise() -> Vec<u8> {
    let mut state = 0x9e37_79b9_7f4a_7c15_u64;
    let mut next = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state.to_le_bytes()
    };
    (0..DATA_BYTES / 8).flat_map(|_| next()).collect()
}

/// A probe that reads when told to.
struct Reader {
    child: Child,
    stdin: ChildStdin,
    stdout: BufReader<ChildStdout>,
}

impl Reader {
    fn start(command: &mut Command) -> Result<Self> {
        let mut child =
            command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().context("cannot start a reader")?;
        let stdin = child.stdin.take().context("stdin is piped")?;
        let stdout = BufReader::new(child.stdout.take().context("stdout is piped")?);
        let mut reader = Self { child, stdin, stdout };
        let size = reader.line()?;
        anyhow::ensure!(size.ends_with("bytes"), "the reader said {size:?}");
        Ok(reader)
    }

    fn line(&mut self) -> Result<String> {
        let mut line = String::new();
        self.stdout.read_line(&mut line).context("the reader's answer")?;
        Ok(line.trim().to_owned())
    }

    /// How many nanoseconds so many reads took.
    fn read(&mut self, block: usize, count: u64, order: &str) -> Result<f64> {
        writeln!(self.stdin, "{block} {count} {order}").context("the reader")?;
        let answer = self.line()?;
        answer.parse().with_context(|| format!("the reader said {answer:?}"))
    }
}

impl Drop for Reader {
    fn drop(&mut self) {
        // It ends by itself when its stdin does; this is for the case that it failed.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
