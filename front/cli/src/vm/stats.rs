//! `kiln stats`, and what it and `kiln top` show.

use std::collections::BTreeMap;
use std::io::{self, IsTerminal as _};
use std::time::{Duration, Instant, SystemTime};

use comfy_table::CellAlignment;
use comfy_table::presets::NOTHING;
use futures_util::future::join_all;
use indicatif::HumanBytes;
use kiln::Stats;
use kiln::detached::{DetachedError, Machines, State, VmRecord};
use serde_json::{Value, json};

use super::args::StatsArgs;
use crate::failure::Failure;
use crate::{images, print};

/// How often what is shown is measured anew.
pub(super) const INTERVAL: Duration = Duration::from_secs(1);
/// How long a VM has to say what it uses; it is shown without figures then.
const ANSWER_LIMIT: Duration = Duration::from_secs(5);
/// Puts a terminal's cursor at its start and clears what is there. ECMA-48 8.3.21 "CUP" and 8.3.39 "ED".
const CLEAR: &str = "\x1b[H\x1b[2J";

/// What a VM uses.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Usage {
    pub(super) id: String,
    pub(super) name: String,
    pub(super) state: State,
    pub(super) vcpus: u32,
    /// `None` for one that is paused or does not answer.
    pub(super) figures: Option<Figures>,
}

/// The figures of one that answers.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct Figures {
    /// Of one processor of the host's, since the last measurement, or since the VM started.
    pub(super) cpu_percent: f64,
    /// As the guest sees it.
    pub(super) memory_used_bytes: u64,
    pub(super) memory_bytes: u64,
    /// What would be free on the host without it.
    pub(super) host_bytes: u64,
    pub(super) processes: u32,
}

/// Measures, and remembers what was measured last.
#[derive(Debug, Default)]
pub(super) struct Meter {
    last: BTreeMap<String, (Instant, Duration)>,
}

impl Meter {
    /// Measures the VMs of these names, or all that run; those that have ended are left out.
    ///
    /// # Errors
    /// When the VMs cannot be listed.
    pub(super) async fn measure(
        &mut self,
        machines: &Machines,
        names: &[String],
    ) -> Result<Vec<Usage>, Failure> {
        // Whoever died meanwhile does not run.
        machines.reconcile()?;
        let (mut records, _) = machines.list()?;
        records.retain(|record| record.state.is_up() && (names.is_empty() || names.contains(&record.name)));
        let measured = join_all(records.iter().map(async |record| {
            let asking = async { machines.reach(&record.name).ok()?.stats().await.ok() };
            let stats = tokio::time::timeout(ANSWER_LIMIT, asking).await.ok().flatten();
            (stats, Instant::now())
        }));
        let measured = measured.await;
        let usages = records.into_iter().zip(measured);
        let usages = usages.map(|(record, (stats, at))| Usage {
            figures: stats.map(|stats| self.figures(&record, &stats, at)),
            id: record.id,
            name: record.name,
            state: record.state,
            vcpus: record.vcpus,
        });
        Ok(usages.collect())
    }

    fn figures(&mut self, record: &VmRecord, stats: &Stats, at: Instant) -> Figures {
        let cpu = stats.host.cpu_time;
        let (used, passed) = match self.last.insert(record.id.clone(), (at, cpu)) {
            Some((since, before)) => (cpu.saturating_sub(before), at.saturating_duration_since(since)),
            None => (cpu, running_for(record)),
        };
        Figures {
            cpu_percent: percent(used, passed),
            memory_used_bytes: stats.guest.memory_used_bytes,
            memory_bytes: stats.guest.memory_bytes,
            host_bytes: stats.host.private_bytes,
            processes: stats.guest.processes,
        }
    }
}

fn running_for(record: &VmRecord) -> Duration {
    let started = SystemTime::UNIX_EPOCH + Duration::from_millis(record.started_unix_ms.unwrap_or_default());
    SystemTime::now().duration_since(started).unwrap_or_default()
}

fn percent(used: Duration, passed: Duration) -> f64 {
    if passed.is_zero() { 0.0 } else { 100.0 * used.as_secs_f64() / passed.as_secs_f64() }
}

/// A timer for what is shown until its user has seen enough.
#[expect(
    clippy::disallowed_methods,
    reason = "a screen is drawn anew each second: time is what is waited for"
)]
pub(super) fn timer() -> tokio::time::Interval {
    let mut timer = tokio::time::interval(INTERVAL);
    timer.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    timer
}

/// `kiln stats`: until it is interrupted, or the VMs that were named have ended.
///
/// # Errors
/// When one that is named does not run, or nothing can be printed.
pub(crate) async fn stats(machines: &Machines, args: &StatsArgs) -> Result<(), Failure> {
    let mut names = Vec::new();
    for vm in &args.vms {
        let record = machines.find(vm)?;
        if !record.state.is_up() {
            return Err(DetachedError::NotRunning(record.name).into());
        }
        names.push(record.name);
    }
    let is_screen = io::stdout().is_terminal() && !args.no_stream && !args.json;
    let (mut meter, mut timer) = (Meter::default(), timer());
    loop {
        timer.tick().await;
        let usages = meter.measure(machines, &names).await?;
        let text = if args.json { lines(&usages) } else { table(&usages) };
        print(&format!("{}{text}", if is_screen { CLEAR } else { "" }))?;
        if args.no_stream || (usages.is_empty() && !names.is_empty()) {
            return Ok(());
        }
    }
}

fn lines(usages: &[Usage]) -> String {
    let line = |usage: &Usage| format!("{}\n", describe(usage));
    usages.iter().map(line).collect()
}

fn describe(usage: &Usage) -> Value {
    let figures = usage.figures.as_ref();
    json!({
        "id": usage.id,
        "name": usage.name,
        "state": usage.state.name(),
        "cpu_percent": figures.map(|figures| (figures.cpu_percent * 100.0).round() / 100.0),
        "memory_used_bytes": figures.map(|figures| figures.memory_used_bytes),
        "memory_bytes": figures.map(|figures| figures.memory_bytes),
        "host_bytes": figures.map(|figures| figures.host_bytes),
        "processes": figures.map(|figures| figures.processes),
    })
}

fn table(usages: &[Usage]) -> String {
    let mut table = comfy_table::Table::new();
    table.load_preset(NOTHING).set_header(["ID", "NAME", "CPU", "MEMORY", "ON HOST", "PROCESSES"]);
    for usage in usages {
        table.add_row(
            [usage.id.clone(), usage.name.clone()].into_iter().chain(cells(usage)).collect::<Vec<_>>(),
        );
    }
    for index in 2..6 {
        if let Some(column) = table.column_mut(index) {
            column.set_cell_alignment(CellAlignment::Right);
        }
    }
    images::lines(&table)
}

/// The figures of a VM in words: processor, memory in the guest, memory on the host, processes.
pub(super) fn cells(usage: &Usage) -> [String; 4] {
    let Some(figures) = usage.figures else {
        let why = if usage.state == State::Paused { "paused" } else { "-" };
        return [why, "-", "-", "-"].map(ToOwned::to_owned);
    };
    [
        format!("{:.1}%", figures.cpu_percent),
        format!("{} / {}", HumanBytes(figures.memory_used_bytes), HumanBytes(figures.memory_bytes)),
        HumanBytes(figures.host_bytes).to_string(),
        figures.processes.to_string(),
    ]
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;

    /// What a VM with this name uses.
    pub(in crate::vm) fn usage(
        name: &str,
        cpu_percent: f64,
        memory_used_bytes: u64,
        processes: u32,
    ) -> Usage {
        let figures = Figures {
            cpu_percent,
            memory_used_bytes,
            memory_bytes: 512 << 20,
            host_bytes: 1 << 20,
            processes,
        };
        let (id, name) = ("0123456789ab".to_owned(), name.to_owned());
        Usage { id, name, state: State::Running, vcpus: 1, figures: Some(figures) }
    }

    #[test]
    fn processor_time_is_told_for_what_has_passed() {
        let second = Duration::from_secs(1);
        assert!((percent(second / 2, second) - 50.0).abs() < 1e-9);
        assert!((percent(second * 3, second * 2) - 150.0).abs() < 1e-9);
        assert!(percent(second, Duration::ZERO).abs() < 1e-9);
    }

    #[test]
    fn one_that_does_not_answer_is_listed_without_figures() {
        let paused = Usage { state: State::Paused, figures: None, ..usage("still", 0.0, 0, 0) };
        let shown = table(&[usage("web", 12.34, 64 << 20, 7), paused]);
        let shown: Vec<Vec<&str>> = shown
            .lines()
            .map(|line| line.split("  ").map(str::trim).filter(|word| !word.is_empty()).collect())
            .collect();
        assert_eq!(shown[1], ["0123456789ab", "web", "12.3%", "64.00 MiB / 512.00 MiB", "1.00 MiB", "7"]);
        assert_eq!(shown[2], ["0123456789ab", "still", "paused", "-", "-", "-"]);
    }

    #[test]
    fn as_json_each_is_a_line() {
        let lines = lines(&[usage("a", 1.0, 2, 3), usage("b", 1.239, 2, 3)]);
        let second: Value = serde_json::from_str(lines.lines().nth(1).expect("two lines")).expect("JSON");
        assert_eq!((&second["name"], &second["cpu_percent"]), (&"b".into(), &1.24.into()));
    }
}
