//! Guests in wait: how soon one answers, what it takes to have one wait, and to make a used one as good as new.

use std::time::Instant;

use anyhow::Result;
use kiln_testkit::guest::Guest;

use crate::report::Report;
use crate::restore::generation;

const MEMORY_MIB: u32 = 256;
/// How many pages a guest has written, besides what it writes to become itself.
const WRITTEN_PAGES: [u64; 4] = [0, 100, 1000, 10_000];

pub(crate) fn run(report: &mut Report, runs: usize) -> Result<()> {
    let folder = crate::guest()?;
    let saved = Guest::boot(&folder, MEMORY_MIB, 1)?.park()?.save()?;
    report.note(format!("{MEMORY_MIB} MiB, 1 vCPU; in this process: without the way to a monitor and back"));
    for run in 0..runs as u64 {
        for pages in WRITTEN_PAGES {
            let start = Instant::now();
            let waiting = saved.in_wait()?;
            report.add("growth: nothing -> a guest in wait", "us", start.elapsed().as_secs_f64() * 1e6);
            waiting.write_pages(pages)?;
            let (guest, [resumed, adopted]) = waiting.claim(&generation(run))?;
            report.add(
                "ready: claim -> the waiting agent's acknowledgement",
                "us",
                resumed.as_secs_f64() * 1e6,
            );
            report.add("acknowledged -> adopted", "ms", adopted.as_secs_f64() * 1e3);
            let (next, took) = guest.recycle(&saved)?;
            report.add(&format!("recycle: {pages} pages written"), "us", took.as_secs_f64() * 1e6);
            let (guest, [resumed, _]) = next.claim(&generation(run + 1))?;
            report.add("ready: the same in a recycled machine", "us", resumed.as_secs_f64() * 1e6);
            drop(guest);
        }
    }
    Ok(())
}
