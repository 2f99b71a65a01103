//! What Kiln costs, beside what else there is: `cargo xtask bench boot|restore|snapshot|fork|pool|exec|density|churn|pull|rootfs|io|size [--runs N] [--firecracker PROGRAM] [--json FILE]`.
//!
//! Both sides of a comparison are interleaved in one run, because machines are shared and noisy; each figure says what
//! clock it is by its name. A missing input is a failure.

#![forbid(unsafe_code)]

mod boot;
mod churn;
mod density;
mod exec;
mod firecracker;
mod fork;
mod host;
mod io;
mod machines;
mod pool;
mod processes;
mod pull;
mod report;
mod restore;
mod rootfs;
mod size;
mod snapshot;

use std::path::PathBuf;

use anyhow::{Context as _, Result, bail};
use kiln::{BuiltIn, Digest, MonitorProgram};

use report::Report;

const USAGE: &str = "usage: cargo xtask bench boot|restore|snapshot|fork|pool|exec|density|churn|pull|rootfs|io|size [--runs N] [--firecracker PROGRAM] [--json FILE]";

fn main() -> Result<()> {
    let mut args = std::env::args().skip(1);
    let name = args.next().context(USAGE)?;
    let (mut runs, mut json, mut firecracker) = (None, None, None);
    while let Some(arg) = args.next() {
        let value = args.next().with_context(|| format!("{arg} needs a value\n{USAGE}"))?;
        match arg.as_str() {
            "--runs" => runs = Some(value.parse().context("--runs")?),
            "--firecracker" => firecracker = Some(PathBuf::from(value)),
            "--json" => json = Some(PathBuf::from(value)),
            _ => bail!("unknown option {arg}\n{USAGE}"),
        }
    }
    let mut report = Report::new(&name);
    match name.as_str() {
        "boot" => boot::run(&mut report, runs.unwrap_or(20))?,
        "restore" => restore::run(&mut report, runs.unwrap_or(50), firecracker.as_deref())?,
        "snapshot" => snapshot::run(&mut report, runs.unwrap_or(50), firecracker.as_deref())?,
        "fork" => fork::run(&mut report, runs.unwrap_or(50))?,
        "pool" => pool::run(&mut report, runs.unwrap_or(50), firecracker.as_deref())?,
        "pull" => pull::run(&mut report, runs.unwrap_or(10))?,
        "rootfs" => rootfs::run(&mut report, runs.unwrap_or(10))?,
        "exec" => exec::run(&mut report, runs.unwrap_or(50))?,
        "churn" => churn::run(&mut report, runs.unwrap_or(10), firecracker.as_deref())?,
        "density" => density::run(&mut report, runs.unwrap_or(64), firecracker.as_deref())?,
        "size" => size::run(&mut report, runs.unwrap_or(50))?,
        "io" => io::run(&mut report, runs.unwrap_or(20))?,
        other => bail!("no benchmark named {other}\n{USAGE}"),
    }
    print!("{}", report.table());
    if let Some(path) = json {
        std::fs::write(&path, report.json()).with_context(|| format!("cannot write {}", path.display()))?;
    }
    Ok(())
}

/// The `kiln` to measure.
fn kiln() -> Result<PathBuf> {
    given("KILN")
}

/// The monitor to measure, as it is part of the `kiln` to measure.
fn monitor_part() -> Result<BuiltIn> {
    let path = given("KILN_MONITOR")?;
    let bytes = std::fs::read(&path).with_context(|| path.display().to_string())?;
    // A few of them, for as long as this process is.
    let bytes: &'static [u8] = Vec::leak(bytes);
    Ok(BuiltIn { bytes, sha256: Digest::of(bytes) })
}

/// The same, to be executed.
fn monitor() -> Result<MonitorProgram> {
    MonitorProgram::built_in(monitor_part()?).context("a file in memory to execute")
}

/// The folder with the guest to measure.
fn guest() -> Result<PathBuf> {
    given("KILN_TEST_GUEST")
}

/// What `cargo xtask bench` names by this variable.
fn given(variable: &str) -> Result<PathBuf> {
    let path = std::env::var_os(variable).map(PathBuf::from);
    path.with_context(|| format!("{variable} is not set: benchmarks are run by `cargo xtask bench`"))
}
