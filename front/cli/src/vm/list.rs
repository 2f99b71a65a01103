//! VMs listed and looked into.

use std::ffi::OsString;
use std::fmt::Write as _;
use std::time::{Duration, SystemTime};

use comfy_table::presets::NOTHING;
use indicatif::HumanBytes;
use kiln::detached::{Machines, Origin, Published, ScratchKind, State, VmRecord};
use serde_json::{Value, json};

use super::args::{Filter, Ps};
use super::port;
use crate::failure::Failure;
use crate::images::{ago, lines, short};
use crate::terminal::printable;
use crate::{Context, print};

/// The most characters of a command in a list.
const COMMAND_CHARACTERS: usize = 30;

/// `kiln ps`.
///
/// # Errors
/// When the records cannot be read.
pub(crate) fn list(context: &Context, machines: &Machines, args: &Ps) -> Result<(), Failure> {
    let (mut records, damaged) = machines.list()?;
    records.retain(|record| {
        let is_wanted = |filter: &Filter| match filter {
            Filter::Status(state) => record.state == *state,
            Filter::Name(part) => record.name.contains(part.as_str()),
        };
        (args.all || !args.filter.is_empty() || record.state.is_up()) && args.filter.iter().all(is_wanted)
    });
    let damaged = if args.filter.is_empty() { damaged } else { Vec::new() };
    if args.json {
        let sound = records.iter().map(describe);
        let damaged = damaged.iter().map(|name| json!({"name": name, "damaged": true}));
        return print(&format!("{:#}\n", Value::Array(sound.chain(damaged).collect())));
    }
    if context.global.quiet {
        let ids: String = records.iter().map(|record| record.id.clone() + "\n").collect();
        return print(&ids);
    }
    print(&table(&records, &damaged, SystemTime::now()))
}

fn table(records: &[VmRecord], damaged: &[String], now: SystemTime) -> String {
    let mut table = comfy_table::Table::new();
    table.load_preset(NOTHING).set_header(["ID", "NAME", "IMAGE", "COMMAND", "STATUS", "SINCE", "PORTS"]);
    for record in records {
        table.add_row([
            record.id.clone(),
            record.name.clone(),
            record.image.reference.clone(),
            record.main.as_ref().map_or_else(|| "-".to_owned(), |main| cut(&main.shown())),
            status(record),
            ago(now.duration_since(time(since(record))).unwrap_or_default()),
            ports(record),
        ]);
    }
    for name in damaged {
        table.add_row([String::new(), name.clone(), String::new(), String::new(), "damaged".to_owned()]);
    }
    lines(&table)
}

/// How a VM is; of one that has ended, with what.
fn status(record: &VmRecord) -> String {
    match record.exit {
        Some(exit) if record.state == State::Ended => format!("ended ({})", exit.code),
        _ => record.state.name().to_owned(),
    }
}

/// Where ports of a VM are reached.
fn ports(record: &VmRecord) -> String {
    let one = |port: &Published| port.bound.map(|bound| format!("{bound}->{}", port.guest));
    let bound: Vec<String> = record.ports.iter().filter_map(one).collect();
    bound.join(", ")
}

/// The start of a command, on one line.
fn cut(command: &str) -> String {
    let command = printable(command);
    match command.char_indices().nth(COMMAND_CHARACTERS) {
        Some((end, _)) => format!("{}...", &command[..end]),
        None => command,
    }
}

/// Since when a VM is as it is, in milliseconds since 1970.
fn since(record: &VmRecord) -> u64 {
    let known = match record.state {
        State::Created => None,
        State::Running => record.started_unix_ms,
        State::Paused => record.paused_unix_ms,
        State::Ended => record.ended_unix_ms,
    };
    known.unwrap_or(record.created_unix_ms)
}

fn time(unix_ms: u64) -> SystemTime {
    SystemTime::UNIX_EPOCH + Duration::from_millis(unix_ms.min(u64::from(u32::MAX) * 1000))
}

/// A VM as JSON.
fn describe(record: &VmRecord) -> Value {
    let origin = match &record.origin {
        Origin::Image => json!({"kind": "image"}),
        Origin::Snapshot { key } => json!({"kind": "snapshot", "key": key.to_string()}),
        Origin::Fork { of } => json!({"kind": "fork", "of": of}),
    };
    let scratch = match record.scratch {
        ScratchKind::Disk { bytes } => json!({"kind": "disk", "bytes": bytes}),
        ScratchKind::Memory => json!({"kind": "memory"}),
        ScratchKind::ReadOnly => json!({"kind": "none"}),
    };
    json!({
        "id": record.id,
        "name": record.name,
        "state": record.state.name(),
        "image": {"name": record.image.reference, "digest": record.image.manifest.to_string()},
        "made_from": origin,
        "memory_mib": record.memory_mib,
        "vcpus": record.vcpus,
        "scratch": scratch,
        "kernel": record.kernel,
        "command": record.main.as_ref().map(|main| {
            main.argv.iter().map(|word| OsString::from(word).to_string_lossy().into_owned()).collect::<Vec<_>>()
        }),
        "stop_signal": record.main.as_ref().map(|main| kiln::signal::name(main.stop_signal)),
        "hostname": record.hostname.as_ref().unwrap_or(&record.name),
        "ports": record.ports.iter().map(port::describe).collect::<Vec<_>>(),
        "remove_when_ended": record.remove_when_ended,
        "created_unix_ms": record.created_unix_ms,
        "started_unix_ms": record.started_unix_ms,
        "ended_unix_ms": record.ended_unix_ms,
        "end": record.end,
        "exit_code": record.exit.map(|exit| exit.code),
        "exit_signal": record.exit.and_then(|exit| exit.signal).map(kiln::signal::name),
        "paused_ms": paused_ms(record, SystemTime::now()),
        "keeper_pid": record.keeper_pid,
    })
}

/// How long a VM has been paused since it started, the pause it is in included.
fn paused_ms(record: &VmRecord, now: SystemTime) -> u64 {
    let current = record.paused_unix_ms.map_or(0, |since| {
        now.duration_since(time(since))
            .map_or(0, |passed| u64::try_from(passed.as_millis()).unwrap_or(u64::MAX))
    });
    record.paused_total_ms.saturating_add(current)
}

/// `kiln inspect`.
///
/// # Errors
/// When there is no such VM.
pub(crate) fn inspect(machines: &Machines, name: &str, as_json: bool) -> Result<(), Failure> {
    let record = machines.find(name)?;
    if as_json {
        return print(&format!("{:#}\n", describe(&record)));
    }
    let now = SystemTime::now();
    let when = |unix_ms: u64| ago(now.duration_since(time(unix_ms)).unwrap_or_default());
    let mut lines = vec![
        ("name", record.name.clone()),
        ("id", record.id.clone()),
        ("state", format!("{}, {}", status(&record), when(since(&record)))),
        ("image", format!("{} ({})", record.image.reference, short(&record.image.manifest))),
    ];
    lines.extend(record.main.as_ref().map(|main| ("command", main.shown())));
    match &record.origin {
        Origin::Image => {}
        Origin::Snapshot { key } => lines.push(("made from", format!("the snapshot {}", short(key)))),
        Origin::Fork { of } => lines.push(("made from", format!("the VM {of}"))),
    }
    let scratch = match record.scratch {
        ScratchKind::Disk { bytes } => format!("a disk of {}", HumanBytes(bytes)),
        ScratchKind::Memory => "guest memory".to_owned(),
        ScratchKind::ReadOnly => "none: its root is read-only".to_owned(),
    };
    lines.extend([
        ("memory", format!("{} MiB", record.memory_mib)),
        ("cpus", record.vcpus.to_string()),
        ("changes", scratch),
        ("created", when(record.created_unix_ms)),
    ]);
    lines.extend(record.started_unix_ms.map(|at| ("started", when(at))));
    lines.extend(record.ended_unix_ms.map(|at| ("ended", when(at))));
    lines.extend(record.end.as_ref().map(|end| ("because", end.clone())));
    lines.extend((!ports(&record).is_empty()).then(|| ("ports", ports(&record))));
    let paused = paused_ms(&record, now);
    if paused > 0 {
        lines.push(("paused for", format!("{:.1} s", Duration::from_millis(paused).as_secs_f64())));
    }
    lines.extend(record.keeper_pid.map(|pid| ("process", pid.to_string())));
    let mut text = String::new();
    for (name, value) in &lines {
        // A string takes all that is written to it.
        let _ = writeln!(text, "{name:<11} {}", printable(value));
    }
    print(&text)
}
