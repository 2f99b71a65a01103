//! From `kiln run` to the first output of a command in a fresh machine, phase by phase.

use std::collections::HashMap;
use std::process::{Command, Stdio};

use anyhow::{Context as _, Result, bail};
use kiln_testkit::image;
use serde_json::Value;

use crate::kiln;
use crate::report::Report;

/// What is measured: a name, and the events between which it lies.
const INTERVALS: &[(&str, &str, &str)] = &[
    ("create: start -> monitor process", "started", "monitor_spawned"),
    ("create: monitor process -> vCPU in guest", "monitor_spawned", "entered"),
    ("boot: vCPU in guest -> agent's first instruction", "entered", "agent_started"),
    ("boot: agent's first instruction -> listening", "agent_started", "ready"),
    ("set-up: listening -> root mounted", "ready", "setup_done"),
    ("exec: root mounted -> command started", "setup_done", "exec_started"),
    ("exec: command started -> first output", "exec_started", "first_output"),
    ("tti: start -> first output at the caller", "started", "first_output"),
    ("all: start -> exit code at the caller", "started", "exited"),
];

/// Shapes that take turns: memory and processors.
const SHAPES: &[(&str, &str)] = &[("128m", "1"), ("512m", "1"), ("512m", "2")];

pub(crate) fn run(report: &mut Report, runs: usize) -> Result<()> {
    let image = image::busybox()?.reference();
    let place = tempfile::tempdir().context("a directory")?;
    let kiln = kiln()?;
    let store = place.path().join("store");
    let pulled = Command::new(&kiln).args(["pull", "--quiet", &image]).env("KILN_ROOT", &store).output();
    let pulled = pulled.context("cannot start kiln")?;
    if !pulled.status.success() {
        bail!("kiln pull: {}", String::from_utf8_lossy(&pulled.stderr));
    }
    report.note(
        "command: /bin/echo in a busybox image that is in the store; nothing is pooled or restored"
            .to_owned(),
    );
    for _ in 0..runs {
        for (memory, cpus) in SHAPES {
            let events = place.path().join("events");
            let mut command = Command::new(&kiln);
            command
                .args(["run", "--no-snapshot", "--memory", memory, "--cpus", cpus, "--json-events"])
                .arg(&events);
            command
                .args([image.as_str(), "--", "/bin/echo", "out"])
                .env("KILN_ROOT", &store)
                .stdin(Stdio::null());
            let output = command.output().context("cannot start kiln")?;
            let shape = format!("{memory} {cpus} cpu");
            if output.stdout != b"out\n" {
                eprintln!("{shape}: {}", String::from_utf8_lossy(&output.stderr));
                report.fail(&format!("{shape}  {}", INTERVALS[0].0), "ms");
                continue;
            }
            let times = times(&std::fs::read_to_string(&events).context("the events")?)?;
            for (name, from, to) in INTERVALS {
                let name = format!("{shape}  {name}");
                match (times.get(*from), times.get(*to)) {
                    (Some(from), Some(to)) => report.add(&name, "ms", (to - from) as f64 / 1e6),
                    _ => report.fail(&name, "ms"),
                }
            }
        }
    }
    Ok(())
}

/// When each event happened, in nanoseconds of the host's monotonic clock.
fn times(events: &str) -> Result<HashMap<String, i64>> {
    let mut times = HashMap::new();
    for line in events.lines() {
        let event: Value = serde_json::from_str(line).with_context(|| line.to_owned())?;
        let name = event["event"].as_str().with_context(|| line.to_owned())?;
        times.insert(name.to_owned(), event["monotonic_ns"].as_i64().with_context(|| line.to_owned())?);
    }
    Ok(times)
}
