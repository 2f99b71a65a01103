//! Pooled machines: how soon one that waits answers, what it takes to have one wait, and to make a used one as good as new.
//!
//! Through the library and jailed monitors, as its users have it, beside the load call of a Firecracker that was started before; and the
//! same in this process, without the way to a monitor and back, which shows the engine's part.

use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail};
use kiln::{Image, Pool, PoolStats, Vm};
use kiln_testkit::guest::Guest;

use crate::firecracker::Firecracker;
use crate::machines::Machines;
use crate::report::Report;
use crate::restore::generation;

const MEMORY_MIB: u32 = 256;
/// How many pages a guest has written, besides what it writes to become itself.
const WRITTEN_PAGES: [u64; 4] = [0, 100, 1000, 10_000];
/// Acquisitions that come at once.
const BURST: usize = 32;
/// How many questions for a pool's figures are one measurement.
const QUESTIONS: u32 = 10_000;

pub(crate) fn run(report: &mut Report, runs: usize, firecracker: Option<&Path>) -> Result<()> {
    report.note(format!(
        "{MEMORY_MIB} MiB, 1 vCPU; the thread that acquires is the one that hears of the answer"
    ));
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let machines = Machines::prepare(MEMORY_MIB)?;
    let image = runtime.block_on(machines.baked())?;
    let place = tempfile::tempdir().context("a folder")?;
    let theirs = firecracker.map(|program| {
        let vmlinux = crate::guest()?.join("vmlinux");
        Firecracker::prepare(program, &vmlinux, &crate::given("KILN_PROBE")?, place.path(), MEMORY_MIB)
    });
    let theirs = theirs.transpose()?;
    runtime.block_on(pooled(report, runs, &image, theirs.as_ref()))?;
    runtime.block_on(bursts(report, runs.div_ceil(10), &image))?;
    in_this_process(report, runs)
}

async fn pooled(report: &mut Report, runs: usize, image: &Image, theirs: Option<&Firecracker>) -> Result<()> {
    // Waiting, made on the way in a shell, and made on the way from nothing take turns.
    let waiting = image.pool().min(1).max(1).shells(0).idle_timeout(None).build();
    let in_shell = image.pool().min(0).max(1).shells(1).idle_timeout(None).build();
    let from_nothing = image.pool().min(0).max(1).shells(0).idle_timeout(None).build();
    for _ in 0..runs {
        // Nothing else is under way while the clock runs.
        until(&waiting, |stats| stats.idle == 1).await?;
        until(&in_shell, |stats| stats.shells == 1).await?;
        let what = "ready: acquire from those that wait -> the agent's acknowledgement";
        let (vm, ready) = acquired(report, what, &waiting).await?;
        drop(vm);
        let start = Instant::now();
        until(&waiting, |stats| stats.idle == 1).await?;
        report.add("recycle: released -> the next waits, nothing written", "us", microseconds(start));

        let what = "ready: acquire, restored in a shell on the way -> acknowledgement";
        let (vm, restored) = acquired(report, what, &in_shell).await?;
        vm.stop().await;

        let what = "ready: acquire, made from nothing -> acknowledgement";
        let (vm, _) = acquired(report, what, &from_nothing).await?;
        vm.stop().await;

        let start = Instant::now();
        for _ in 0..QUESTIONS {
            std::hint::black_box(waiting.stats());
        }
        report.add("stats", "us", microseconds(start) / f64::from(QUESTIONS));

        if let Some(theirs) = theirs {
            let load = theirs.restore()?.load.as_secs_f64() * 1e6;
            report.add("Firecracker, started before: its load and resume alone", "us", load);
            report.add("Firecracker's load over ours that wait", "x", load / ready);
            report.add("Firecracker's load over ours restored in a shell", "x", load / restored);
        }
    }
    for pool in [waiting, in_shell, from_nothing] {
        pool.shutdown().await;
    }
    Ok(())
}

/// Acquires a machine, as one of a server's tasks does, and reports how long that took and where.
async fn acquired(report: &mut Report, what: &str, pool: &Pool) -> Result<(Vm, f64)> {
    let pool = pool.clone();
    let acquiring = tokio::spawn(async move {
        let start = kiln_vmm::monotonic().0;
        pool.acquire().await.map(|vm| (vm, start, kiln_vmm::monotonic().0))
    });
    let (vm, start, end) = acquiring.await??;
    let kiln::Times::Restore(times) = vm.times() else { bail!("a machine that booted") };
    let us = |from: u64, to: u64| to.saturating_sub(from) as f64 / 1e3;
    report.add(what, "us", us(start, end));
    for (phase, from, to) in [
        ("its monitor has heard", start, times.ordered_ns),
        ("vCPU in guest", times.ordered_ns, times.entered_ns),
        ("the agent's acknowledgement", times.entered_ns, times.resumed_ns),
        ("the host knows", times.resumed_ns, end),
    ] {
        report.add(&format!("{what}: -> {phase}"), "us", us(from, to));
    }
    Ok((vm, us(start, end)))
}

/// All of a burst of acquisitions from a pool that has nothing.
async fn bursts(report: &mut Report, runs: usize, image: &Image) -> Result<()> {
    for _ in 0..runs {
        let pool = image.pool().min(0).max(BURST).shells(0).build();
        let start = Instant::now();
        let mut tasks = tokio::task::JoinSet::new();
        for _ in 0..BURST {
            let pool = pool.clone();
            tasks.spawn(async move { pool.acquire().await.map(|vm| (vm, start.elapsed())) });
        }
        let mut machines = Vec::new();
        while let Some(acquired) = tasks.join_next().await {
            let (vm, took) = acquired??;
            report.add(&format!("burst of {BURST} on an empty pool: each"), "ms", took.as_secs_f64() * 1e3);
            machines.push(vm);
        }
        report.add(
            &format!("burst of {BURST} on an empty pool: all"),
            "ms",
            start.elapsed().as_secs_f64() * 1e3,
        );
        for vm in machines {
            vm.stop().await;
        }
        pool.shutdown().await;
    }
    Ok(())
}

fn in_this_process(report: &mut Report, runs: usize) -> Result<()> {
    let folder = crate::guest()?;
    let saved = Guest::boot(&folder, MEMORY_MIB, 1)?.park()?.save()?;
    let of_engine = |what: &str| format!("engine, in one process: {what}");
    for run in 0..runs as u64 {
        for pages in WRITTEN_PAGES {
            let start = Instant::now();
            let waiting = saved.in_wait()?;
            report.add(&of_engine("nothing -> a guest in wait"), "us", microseconds(start));
            waiting.write_pages(pages)?;
            let (guest, [resumed, adopted]) = waiting.claim(&generation(run))?;
            report.add(&of_engine("claim -> acknowledgement"), "us", resumed.as_secs_f64() * 1e6);
            report.add(&of_engine("acknowledged -> adopted"), "ms", adopted.as_secs_f64() * 1e3);
            let (next, took) = guest.recycle(&saved)?;
            report.add(
                &of_engine(&format!("recycle, {pages} pages written")),
                "us",
                took.as_secs_f64() * 1e6,
            );
            let (guest, [resumed, _]) = next.claim(&generation(run + 1))?;
            report.add(&of_engine("claim in a recycled machine"), "us", resumed.as_secs_f64() * 1e6);
            drop(guest);
        }
    }
    Ok(())
}

/// Waits until a pool is as it is to be.
async fn until(pool: &Pool, is_so: impl Fn(&PoolStats) -> bool) -> Result<()> {
    let waited = tokio::time::timeout(Duration::from_mins(1), pool.until(is_so)).await;
    waited.map(drop).with_context(|| format!("the pool does not get there: {:?}", pool.stats()))
}

fn microseconds(since: Instant) -> f64 {
    since.elapsed().as_secs_f64() * 1e6
}
