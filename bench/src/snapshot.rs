//! A guest is saved, standing still and running; Firecracker saves its own of the same size in turn.

use std::path::Path;
use std::time::Instant;

use anyhow::{Context as _, Result};
use kiln_testkit::guest::Guest;

use crate::firecracker::Firecracker;
use crate::given;
use crate::report::Report;

const MEMORY_MIB: u32 = 256;

pub(crate) fn run(report: &mut Report, runs: usize, firecracker: Option<&Path>) -> Result<()> {
    let folder = crate::guest()?;
    let place = tempfile::tempdir().context("a folder")?;
    let mut guest = Guest::boot(&folder, MEMORY_MIB, 1)?;
    let mut theirs = match firecracker {
        Some(program) => Some(Firecracker::boot(
            program,
            &folder.join("vmlinux"),
            &given("KILN_PROBE")?,
            place.path(),
            MEMORY_MIB,
        )?),
        None => None,
    };
    report
        .note(format!("{MEMORY_MIB} MiB, 1 vCPU; to files in memory, Firecracker's in the temporary folder"));
    for _ in 0..runs {
        let start = Instant::now();
        let (saved, source) = guest.save()?;
        let whole = start.elapsed().as_secs_f64() * 1e3;
        report.add("standing still: pause -> state, memory, running again", "ms", whole);
        report.add("standing still: memory alone", "ms", saved.memory_took.as_secs_f64() * 1e3);
        report.add("memory written", "MiB", saved.memory_bytes as f64 / f64::from(1 << 20));
        let (source, [still, took]) = source.save_running()?;
        report.add("running: it stands still", "ms", still.as_secs_f64() * 1e3);
        report.add("running: all", "ms", took.as_secs_f64() * 1e3);
        guest = source;
        if let Some((process, theirs)) = &mut theirs {
            let took = theirs.save(process)?.as_secs_f64() * 1e3;
            report.add("Firecracker, paused already: full snapshot", "ms", took);
            report.add("Firecracker's time over ours", "x", took / whole);
        }
    }
    Ok(())
}
