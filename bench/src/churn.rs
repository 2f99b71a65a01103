//! How many machines come and go in a second on one core: each a process, made from a snapshot, ended at its guest's first answer.

use std::collections::VecDeque;
use std::fs::File;
use std::os::fd::AsFd as _;
use std::path::{Path, PathBuf};
use std::time::Instant;

use anyhow::{Context as _, Result};
use kiln::monitor::{Monitor, Restore};
use kiln::{MonitorProgram, Pool, Vm};
use kiln_testkit::guest::Guest;
use rustix::thread::{CpuSet, sched_getaffinity, sched_setaffinity};
use tokio::task::JoinSet;

use crate::firecracker::Firecracker;
use crate::machines::Machines;
use crate::report::Report;
use crate::restore::generation;

const MEMORY_MIB: u32 = 256;
/// How many machines are made and ended for one value.
const MACHINES: usize = 50;
/// How many machines the pool has.
const POOL: usize = 8;
/// How many are under way at once: while one waits for the kernel to let go of it, others use the processor.
const AT_ONCE: [usize; 3] = [1, 4, 16];

pub(crate) fn run(report: &mut Report, runs: usize, firecracker: Option<&Path>) -> Result<()> {
    let place = tempfile::tempdir().context("a folder")?;
    let files = Guest::boot(&crate::guest()?, MEMORY_MIB, 1)?.park()?.save()?.write_to(place.path())?;
    let theirs = firecracker.map(|program| prepare(program, place.path())).transpose()?;
    let program = crate::monitor()?;
    let machines = Machines::prepare(MEMORY_MIB)?;
    report.note(format!(
        "{MEMORY_MIB} MiB, 1 vCPU, unpooled but for the pool, whose machines have the image of busybox mounted; this process, its \
         machines and the kernel's work for them share one processor; a value is of {MACHINES} machines, of Firecracker fewer"
    ));
    // Before there is a second thread, so that all threads and processes to come inherit it.
    use_one_processor()?;
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().context("a runtime")?;
    let image = runtime.block_on(machines.baked())?;
    let pool = {
        let _in_runtime = runtime.enter();
        image.pool().min(POOL).max(POOL).build()
    };
    let mut had = VecDeque::new();
    for _ in 0..runs {
        let rate = runtime.block_on(pooled(&pool, &mut had))?;
        report.add(&format!("a pool of {POOL}: acquired and answered, dropped and recycled"), "/s", rate);
        for at_once in AT_ONCE {
            let start = Instant::now();
            runtime.block_on(come_and_go(&program, &files, at_once))?;
            let rate = MACHINES as f64 / start.elapsed().as_secs_f64();
            report.add(&format!("{at_once} at a time: restored, answered, gone"), "/s", rate);
        }
        if let Some(theirs) = &theirs {
            let (count, start) = (MACHINES.div_ceil(10), Instant::now());
            for _ in 0..count {
                drop(theirs.load()?);
            }
            let rate = count as f64 / start.elapsed().as_secs_f64();
            report.add("Firecracker, 1 at a time: loaded and resumed, killed", "/s", rate);
        }
    }
    drop(had);
    runtime.block_on(pool.shutdown());
    Ok(())
}

fn prepare(program: &Path, place: &Path) -> Result<Firecracker> {
    let folder = place.join("firecracker");
    std::fs::create_dir(&folder).context("a folder")?;
    let kernel = crate::guest()?.join("vmlinux");
    Firecracker::prepare(program, &kernel, &crate::given("KILN_PROBE")?, &folder, MEMORY_MIB)
}

/// Has this thread, and what comes of it, run on the first processor that it may use.
fn use_one_processor() -> Result<()> {
    let allowed = sched_getaffinity(None).context("the processors to use")?;
    let first = (0..CpuSet::MAX_CPU).find(|cpu| allowed.is_set(*cpu)).context("a processor to use")?;
    let mut one = CpuSet::new();
    one.set(first);
    sched_setaffinity(None, &one).context("one processor to use")
}

/// How many machines a second come out of a pool and go back to it. All of them are had afterwards and stand still, so that nothing
/// goes on beside what is measured next.
async fn pooled(pool: &Pool, had: &mut VecDeque<Vm>) -> Result<f64> {
    // Some are had while others are recycled, at the end as at the beginning.
    had.truncate(POOL / 2);
    while had.len() < POOL / 2 {
        had.push_back(pool.acquire().await?);
    }
    let start = Instant::now();
    for _ in 0..MACHINES {
        drop(had.pop_front());
        had.push_back(pool.acquire().await?);
    }
    let rate = MACHINES as f64 / start.elapsed().as_secs_f64();
    while had.len() < POOL {
        had.push_back(pool.acquire().await?);
    }
    for vm in had {
        vm.pause().await?;
    }
    Ok(rate)
}

async fn come_and_go(program: &MonitorProgram, files: &[PathBuf; 2], at_once: usize) -> Result<()> {
    let mut under_way = JoinSet::new();
    for number in 0..MACHINES {
        if under_way.len() == at_once {
            under_way.join_next().await.context("one is under way")???;
        }
        under_way.spawn(one(program.clone(), files.clone(), number as u64));
    }
    while let Some(ended) = under_way.join_next().await {
        ended??;
    }
    Ok(())
}

async fn one(program: MonitorProgram, files: [PathBuf; 2], number: u64) -> Result<()> {
    let [state, memory] = files.map(File::open);
    let (state, memory) = (state.context("the state")?, memory.context("the memory")?);
    let monitor = Monitor::spawn(&program)?;
    let generation = Some(generation(number).encode().to_vec());
    let order = Restore { state_fd: 0, memory_fd: 1, cid: 3, generation, ..Restore::default() };
    monitor.restore(order, &[state.as_fd(), memory.as_fd()]).await?;
    monitor.stop().await;
    Ok(())
}
