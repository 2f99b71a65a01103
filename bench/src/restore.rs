//! From a saved guest to its answer.

use std::path::PathBuf;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result};
use kiln_protocol::mailbox::Generation;
use kiln_testkit::guest::Guest;

use crate::report::Report;

const MEMORY_MIB: u32 = 256;
const VCPUS: u32 = 1;

pub(crate) fn run(report: &mut Report, runs: usize) -> Result<()> {
    let folder = std::env::var_os("KILN_TEST_GUEST").map(PathBuf::from);
    let folder = folder.context("KILN_TEST_GUEST is not set: benchmarks are run by `cargo xtask bench`")?;
    let start = Instant::now();
    let mut guest = Guest::boot(&folder, MEMORY_MIB, VCPUS)?;
    report.add("boot: start -> agent listens", "ms", milliseconds(start));
    report.note(format!(
        "{MEMORY_MIB} MiB, {VCPUS} vCPU; in this process, unpooled; no page of the guest is touched before"
    ));
    for _ in 0..runs {
        let (saved, source) = guest.save()?;
        guest = source;
        report.add("save: pause -> state", "ms", saved.state_took.as_secs_f64() * 1e3);
        report.add("save: memory", "ms", saved.memory_took.as_secs_f64() * 1e3);
        report.add("save: memory written", "MiB", saved.memory_bytes as f64 / f64::from(1 << 20));
        let start = Instant::now();
        let (copy, took) = saved.restore()?;
        report.add("engine: snapshot -> machine without a guest", "us", took.shell.as_secs_f64() * 1e6);
        report.add("engine: machine -> memory and state", "us", took.state.as_secs_f64() * 1e6);
        report.add("engine: -> vCPU in guest", "us", took.resume.as_secs_f64() * 1e6);
        copy.hello()?;
        report.add("ready by vsock: start -> agent's answer", "ms", milliseconds(start));
        let start = Instant::now();
        copy.hello()?;
        report.add("the next answer", "ms", milliseconds(start));
    }
    let parked = guest.park()?.save()?;
    for run in 0..runs {
        let (copy, took) = parked.claim(&generation(run as u64))?;
        let microseconds = |duration: Duration| duration.as_secs_f64() * 1e6;
        report.add("claim, engine: snapshot -> machine without a guest", "us", microseconds(took.shell));
        report.add("claim, engine: machine -> memory, state and mail", "us", microseconds(took.state));
        report.add("claim, ready: -> the parked agent's acknowledgement", "us", microseconds(took.resumed));
        report.add("claim: acknowledged -> adopted", "ms", took.adopted.as_secs_f64() * 1e3);
        let pooled = took.state + took.resumed;
        report.add("claim with a shell at hand: memory, state, acknowledgement", "us", microseconds(pooled));
        drop(copy);
    }
    Ok(())
}

fn milliseconds(since: Instant) -> f64 {
    since.elapsed().as_secs_f64() * 1e3
}

/// Another life for each run.
fn generation(run: u64) -> Generation {
    let mut id = [1; 16];
    id[..8].copy_from_slice(&(run + 1).to_le_bytes());
    Generation {
        id,
        realtime_ns: 0,
        entropy: [7; 64],
        machine_id: id,
        boot_id: id,
        hostname: format!("clone-{run}"),
    }
}
