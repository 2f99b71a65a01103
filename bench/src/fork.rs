//! A VM that runs is made into two: for how long it stands still, and when the second runs a command. Memory it has written is
//! part of the measure, for a fork copies it.

use std::time::Instant;

use anyhow::{Context as _, Result};

use crate::machines::{Machines, succeed};
use crate::report::Report;

const MEMORY_MIB: u32 = 1024;
/// What the guest has written before, in MiB, besides what booting writes.
const WRITTEN_MIB: [u32; 2] = [0, 16];

pub(crate) fn run(report: &mut Report, runs: usize) -> Result<()> {
    let machines = Machines::prepare(MEMORY_MIB)?;
    report.note(format!("{MEMORY_MIB} MiB, 1 vCPU, a disk of 10 GiB, busybox; the source runs all the time"));
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().context("a runtime")?;
    runtime.block_on(async {
        for written in WRITTEN_MIB {
            let source = machines.start().await?;
            if written > 0 {
                succeed(
                    &source,
                    &["dd", "if=/dev/zero", "of=/dev/shm/written", "bs=1M", &format!("count={written}")],
                )
                .await?;
            }
            for _ in 0..runs {
                let start = Instant::now();
                let (copy, standstill) = source.copy(&machines.root()).await?;
                let copied = start.elapsed();
                let fork = machines.builder()?.from_copy(copy, &machines.image).start().await?;
                let made = start.elapsed();
                succeed(&fork, &["true"]).await?;
                let ran = start.elapsed();
                fork.stop().await;
                let mut add = |what: &str, took: std::time::Duration| {
                    report.add(&format!("{written} MiB written: {what}"), "ms", took.as_secs_f64() * 1e3);
                };
                add("the source stands still", standstill.still);
                add("its processes are frozen", standstill.frozen);
                add("order -> copied, the source goes on", copied);
                add("order -> the second has its identity", made);
                add("order -> the second has run `true`", ran);
            }
            source.stop().await;
        }
        Ok(())
    })
}
