//! How much memory a machine takes of the host: 1 to 64 made of one image, idle, and after each has written to some.

use std::collections::BTreeMap;
use std::path::Path;

use anyhow::{Context as _, Result};
use kiln::Vm;

use crate::firecracker::{Firecracker, Process};
use crate::machines::{Machines, succeed};
use crate::processes::{self, host, monitors};
use crate::report::Report;

const MEMORY_MIB: u32 = 256;
/// How much memory a machine writes to, in MiB.
const TOUCHED_MIB: u32 = 64;
/// The same where guest kernels are emulated and a page takes a millisecond, and how many machines at most.
const TOUCHED_MIB_EMULATED: u32 = 8;
const TOUCHED_MACHINES_MAX_EMULATED: usize = 1;
const MIB: f64 = (1 << 20) as f64;

/// What the host counts as a whole and a machine adds to, and whether it is what is left.
const HOST_COUNTS: [(&str, bool); 6] = [
    ("MemAvailable", true),
    ("PageTables", false),
    ("SecPageTables", false),
    ("SUnreclaim", false),
    ("KernelStack", false),
    ("Percpu", false),
];

pub(crate) fn run(report: &mut Report, most: usize, firecracker: Option<&Path>) -> Result<()> {
    report.note(format!(
        "{MEMORY_MIB} MiB, 1 vCPU, busybox, each a process of its own, restored from one template; of each machine its share \
         (PSS: also of what all share), what is its alone (USS: also pages of files that only it has touched), and what of that it has \
         written; of the host what a machine adds (and whatever else runs)"
    ));
    let machines = Machines::prepare(MEMORY_MIB)?;
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().context("a runtime")?;
    runtime.block_on(async {
        // The first bakes.
        machines.start().await?.stop().await;
        let before = counts()?;
        let mut vms: Vec<Vm> = Vec::new();
        for count in steps(most) {
            while vms.len() < count {
                vms.push(machines.start().await?);
            }
            each(report, &format!("{count} idle"), &monitors()?)?;
            host_counts(report, &format!("{count} idle"), &before, count)?;
        }
        parts(report, "idle, written", &monitors()?)?;

        for vm in &vms {
            succeed(vm, &["true"]).await?;
        }
        each(report, &format!("{} after `true`", vms.len()), &monitors()?)?;
        parts(report, "after `true`, written", &monitors()?)?;
        let (of, mib) = if kiln_vmm::is_pvm() {
            (TOUCHED_MACHINES_MAX_EMULATED, TOUCHED_MIB_EMULATED)
        } else {
            (vms.len(), TOUCHED_MIB)
        };
        for vm in vms.drain(of..) {
            vm.stop().await;
        }
        for vm in &vms {
            succeed(vm, &["/probe", "touch", &mib.to_string()]).await?;
        }
        each(report, &format!("{of} after {mib} MiB written"), &monitors()?)?;
        for vm in vms {
            vm.stop().await;
        }
        anyhow::Ok(())
    })?;
    match firecracker {
        Some(program) => theirs(report, most, program),
        None => Ok(()),
    }
}

/// 1, 2, 4 and so on, to `most`.
fn steps(most: usize) -> impl Iterator<Item = usize> {
    std::iter::successors(Some(1), move |count| (*count < most).then(|| (count * 2).min(most)))
}

/// The share and the own memory of each process.
fn each(report: &mut Report, what: &str, processes: &[u32]) -> Result<()> {
    for process in processes {
        let memory = processes::memory(*process)?;
        report.add(&format!("{what}: share"), "MiB", memory.proportional as f64 / MIB);
        report.add(&format!("{what}: alone"), "MiB", memory.alone as f64 / MIB);
        report.add(&format!("{what}: alone and written"), "MiB", memory.written as f64 / MIB);
    }
    Ok(())
}

fn parts(report: &mut Report, what: &str, processes: &[u32]) -> Result<()> {
    for process in processes {
        for (part, bytes) in processes::written_by_part(*process, u64::from(MEMORY_MIB) << 20)? {
            report.add(&format!("{what}: {part}"), "KiB", bytes as f64 / 1024.0);
        }
    }
    Ok(())
}

type Counts = BTreeMap<&'static str, u64>;

fn counts() -> Result<Counts> {
    HOST_COUNTS.iter().map(|(name, _)| Ok((*name, host(name)?))).collect()
}

/// What the host has more of for each of so many machines.
fn host_counts(report: &mut Report, what: &str, before: &Counts, machines: usize) -> Result<()> {
    let now = counts()?;
    for (name, is_left) in HOST_COUNTS {
        let more = now[name] as f64 - before[name] as f64;
        let more = if is_left { -more } else { more };
        report.add(&format!("{what}: host's {name}, each"), "KiB", more / 1024.0 / machines as f64);
    }
    Ok(())
}

/// The same of Firecracker, whose guests stand still: they would beat for as long as they ran.
fn theirs(report: &mut Report, most: usize, program: &Path) -> Result<()> {
    let place = tempfile::tempdir().context("a folder")?;
    let (kernel, probe) = (crate::guest()?.join("vmlinux"), crate::given("KILN_PROBE")?);
    let firecracker = Firecracker::prepare(program, &kernel, &probe, place.path(), MEMORY_MIB)?;
    let before = counts()?;
    let mut running: Vec<Process> = Vec::new();
    for count in steps(most) {
        while running.len() < count {
            running.push(firecracker.restore_and_pause()?);
        }
        let processes: Vec<u32> = running.iter().map(Process::id).collect();
        each(report, &format!("Firecracker, {count} paused"), &processes)?;
        host_counts(report, &format!("Firecracker, {count} paused"), &before, count)?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn steps_double_to_the_most() {
        assert_eq!(steps(1).collect::<Vec<_>>(), [1]);
        assert_eq!(steps(6).collect::<Vec<_>>(), [1, 2, 4, 6]);
        assert_eq!(steps(64).last(), Some(64));
    }
}
