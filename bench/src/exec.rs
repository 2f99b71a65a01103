//! A command in a machine that runs: how long each step takes whoever asked for it, and on whose processor time.

use std::fs;
use std::time::Instant;

use anyhow::{Context as _, Result, ensure};
use kiln::Vm;
use rustix::time::{ClockId, clock_gettime};
use tokio::io::AsyncReadExt as _;

use crate::machines::{Machines, succeed};
use crate::processes::monitors;
use crate::report::Report;

const MEMORY_MIB: u32 = 256;
/// A command, and what it writes.
const COMMANDS: [(&str, &[&str], &str); 2] = [("true", &["true"], ""), ("echo", &["echo", "kiln"], "kiln\n")];

pub(crate) fn run(report: &mut Report, runs: usize) -> Result<()> {
    let machines = Machines::prepare(MEMORY_MIB)?;
    report.note(format!(
        "{MEMORY_MIB} MiB, 1 vCPU, busybox, restored from its template; host: this process; transport: the monitor but for its vCPU; \
         guest: the vCPU, with what KVM does for it"
    ));
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().context("a runtime")?;
    runtime.block_on(async {
        // Bakes.
        machines.start().await?.stop().await;
        for _ in 0..runs {
            // Of each machine the first command, which reads its program from the disk, and one when all is there.
            let start = Instant::now();
            let vm = machines.start().await?;
            let output = vm.exec(["echo", "kiln"]).output().await?;
            let tti = milliseconds(start);
            ensure!(output.stdout == b"kiln\n", "echo wrote something else");
            report.add("tti: create -> output of the first `echo`", "ms", tti);
            succeed(&vm, &["true"]).await?;
            for (name, argv, wanted) in COMMANDS {
                command(report, &vm, name, argv, wanted).await?;
            }
            vm.stop().await;
        }
        Ok(())
    })
}

async fn command(report: &mut Report, vm: &Vm, name: &str, argv: &[&str], wanted: &str) -> Result<()> {
    let before = Times::now()?;
    let start = Instant::now();
    let mut child = vm.exec(argv.iter().copied()).spawn().await?;
    report.add(&format!("{name}: request -> started"), "ms", milliseconds(start));
    let started = Instant::now();
    let mut stdout = child.stdout.take().context("a stream")?;
    let mut written = vec![0; 1];
    let count = stdout.read(&mut written).await?;
    written.truncate(count);
    let what = if wanted.is_empty() { "started -> end of output" } else { "started -> first byte" };
    report.add(&format!("{name}: {what}"), "ms", milliseconds(started));
    let answered = Instant::now();
    stdout.read_to_end(&mut written).await?;
    let status = child.wait().await?;
    report.add(&format!("{name}: -> exit status"), "ms", milliseconds(answered));
    report.add(&format!("{name}: all"), "ms", milliseconds(start));
    let after = Times::now()?;
    ensure!(status.success() && written == wanted.as_bytes(), "{name}: {status:?}, {written:?}");
    for (party, before, after) in [
        ("host", before.host, after.host),
        ("transport", before.transport, after.transport),
        ("guest", before.guest, after.guest),
    ] {
        let took = after.saturating_sub(before) as f64 / 1e6;
        report.add(&format!("{name}: processor time, {party}"), "ms", took);
    }
    Ok(())
}

/// How long whose threads have run, in nanoseconds.
struct Times {
    host: u64,
    transport: u64,
    guest: u64,
}

impl Times {
    /// Of this process and its one monitor.
    fn now() -> Result<Self> {
        let monitors = monitors()?;
        let [monitor] = monitors[..] else {
            anyhow::bail!("{} monitors where one should be", monitors.len())
        };
        let own = clock_gettime(ClockId::ProcessCPUTime);
        let host = own.tv_sec as u64 * 1_000_000_000 + own.tv_nsec as u64;
        let mut times = Self { host, transport: 0, guest: 0 };
        for task in fs::read_dir(format!("/proc/{monitor}/task")).context("threads")? {
            let task = task.context("a thread")?.path();
            // Linux Documentation/scheduler/sched-stats.rst "/proc/<pid>/schedstat": the first is time on a processor.
            let stat = fs::read_to_string(task.join("schedstat")).context("a thread's time")?;
            let ran = stat.split_whitespace().next().and_then(|word| word.parse::<u64>().ok());
            let name = fs::read_to_string(task.join("comm")).context("a thread's name")?;
            let party = if name.starts_with("vcpu") { &mut times.guest } else { &mut times.transport };
            *party += ran.context("a thread's time")?;
        }
        Ok(times)
    }
}

fn milliseconds(since: Instant) -> f64 {
    since.elapsed().as_secs_f64() * 1e3
}
