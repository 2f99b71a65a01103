//! How large the programs are, and what it costs a process to have the monitor at hand.

use std::path::Path;
use std::time::Instant;

use anyhow::{Context as _, Result};
use kiln::MonitorProgram;

use crate::report::Report;

pub(crate) fn run(report: &mut Report, runs: usize) -> Result<()> {
    let guest = crate::guest()?;
    let programs = [
        ("kiln, with all that is in it", crate::kiln()?),
        ("the monitor in it", crate::given("KILN_MONITOR")?),
        ("the guest kernel in it", guest.join("vmlinux")),
        ("the agent in it, with its initramfs", guest.join("initramfs.cpio")),
    ];
    for (name, path) in programs {
        report.add(name, "MB", bytes(&path)? as f64 / 1e6);
    }
    let monitor = crate::monitor_part()?;
    for _ in 0..runs {
        let start = Instant::now();
        let program = MonitorProgram::built_in(monitor)?;
        let took = start.elapsed();
        report.add("once a process: the monitor put into a file to execute", "us", took.as_secs_f64() * 1e6);
        drop(program);
    }
    Ok(())
}

fn bytes(path: &Path) -> Result<u64> {
    Ok(std::fs::metadata(path).with_context(|| path.display().to_string())?.len())
}
