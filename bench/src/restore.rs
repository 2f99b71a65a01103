//! From a saved guest to its answer: in this process, in a process of its own, and beside Firecracker.

use std::fs::File;
use std::os::fd::AsFd as _;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result};
use kiln::MonitorProgram;
use kiln::monitor::{Monitor, Restore};
use kiln_protocol::mailbox::{Bounds, Generation};
use kiln_testkit::guest::{Guest, Saved};

use crate::firecracker::Firecracker;
use crate::report::Report;

const MEMORY_MIB: u32 = 256;
const VCPUS: u32 = 1;

pub(crate) fn run(report: &mut Report, runs: usize, firecracker: Option<&Path>) -> Result<()> {
    let folder = crate::guest()?;
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
    for _ in 0..runs {
        let (source, [pause, resume]) = guest.pause()?;
        report.add("pause: order -> every vCPU and device stands still", "us", pause.as_secs_f64() * 1e6);
        report.add("resume: order -> every vCPU has a thread", "us", resume.as_secs_f64() * 1e6);
        let (source, [pause, took]) = source.save_running()?;
        report.add("save while it runs: it stands still", "us", pause.as_secs_f64() * 1e6);
        report.add("save while it runs: all", "ms", took.as_secs_f64() * 1e3);
        guest = source;
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
    processes(report, runs, &parked, &folder, firecracker)
}

/// A process for each machine: ours and Firecracker's take turns.
fn processes(
    report: &mut Report,
    runs: usize,
    parked: &Saved,
    guest: &Path,
    firecracker: Option<&Path>,
) -> Result<()> {
    let place = tempfile::tempdir().context("a folder")?;
    let files = parked.write_to(place.path())?;
    let theirs = firecracker.map(|program| -> Result<Firecracker> {
        let probe = crate::given("KILN_PROBE")?;
        let folder = place.path().join("firecracker");
        std::fs::create_dir(&folder).context("a folder")?;
        let theirs = Firecracker::prepare(program, &guest.join("vmlinux"), &probe, &folder, MEMORY_MIB)?;
        report.add("Firecracker: full snapshot", "ms", theirs.snapshot_took.as_secs_f64() * 1e3);
        Ok(theirs)
    });
    let theirs = theirs.transpose()?;
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().context("a runtime")?;
    let program = crate::monitor()?;
    for cold in [false, true] {
        let name = if cold { "files dropped from the page cache" } else { "files in the page cache" };
        for run in 0..runs {
            if cold {
                drop_from_cache(&files)?;
            }
            let (ours, phases) = runtime.block_on(claim_in_process(&program, &files, run as u64))?;
            report.add(&format!("{name}: process spawned -> agent's acknowledgement"), "ms", ours);
            for (phase, took_ms) in phases {
                report.add(&format!("{name}:   {phase}"), "ms", took_ms);
            }
            if let Some(theirs) = &theirs {
                if cold {
                    drop_from_cache(&theirs.files())?;
                }
                let took = theirs.restore()?;
                let ready = took.ready.as_secs_f64() * 1e3;
                report.add(&format!("{name}: Firecracker spawned -> first port write"), "ms", ready);
                report.add(
                    &format!("{name}: Firecracker's load and resume"),
                    "ms",
                    took.load.as_secs_f64() * 1e3,
                );
                report.add(&format!("{name}: Firecracker's time over ours"), "x", ready / ours);
            }
        }
    }
    Ok(())
}

/// Starts a monitor, has it restore the snapshot, and waits until the guest has acknowledged its generation: how long that took in
/// all, and its phases, in milliseconds.
async fn claim_in_process(
    program: &MonitorProgram,
    files: &[PathBuf; 2],
    run: u64,
) -> Result<(f64, [(&'static str, f64); 5])> {
    let [state, memory] = files;
    let files = [File::open(state).context("the state")?, File::open(memory).context("the memory")?];
    let (start, start_ns) = (Instant::now(), kiln_vmm::monotonic().0);
    let monitor = Monitor::spawn(program)?;
    let generation = Some(generation(run).encode().to_vec());
    let order = Restore { state_fd: 0, memory_fd: 1, cid: 3, generation, ..Restore::default() };
    let times = monitor.restore(order, &[files[0].as_fd(), files[1].as_fd()]).await?;
    let (took, end_ns) = (milliseconds(start), kiln_vmm::monotonic().0);
    monitor.stop().await;
    let between = |from: u64, to: u64| to.saturating_sub(from) as f64 / 1e6;
    let phases = [
        ("spawned -> the monitor's first own act", between(start_ns, times.spawned_ns)),
        ("-> the order has come", between(times.spawned_ns, times.ordered_ns)),
        ("engine: -> vCPU in guest", between(times.ordered_ns, times.entered_ns)),
        ("-> the agent's acknowledgement", between(times.entered_ns, times.resumed_ns)),
        ("-> the host knows", between(times.resumed_ns, end_ns)),
    ];
    Ok((took, phases))
}

/// Has the host read the files from its disk the next time.
fn drop_from_cache(files: &[PathBuf]) -> Result<()> {
    for path in files {
        let file = File::open(path).with_context(|| path.display().to_string())?;
        file.sync_all().context("sync")?;
        rustix::fs::fadvise(&file, 0, None, rustix::fs::Advice::DontNeed).context("fadvise")?;
    }
    Ok(())
}

fn milliseconds(since: Instant) -> f64 {
    since.elapsed().as_secs_f64() * 1e3
}

/// Another life for each run.
pub(crate) fn generation(run: u64) -> Generation {
    let mut id = [1; 16];
    id[..8].copy_from_slice(&(run + 1).to_le_bytes());
    Generation {
        id,
        realtime_ns: 0,
        entropy: [7; 64],
        machine_id: id,
        boot_id: id,
        hostname: format!("clone-{run}"),
        bounds: Bounds::default(),
    }
}
