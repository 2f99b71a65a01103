//! Every gate that needs no virtual machine: `cargo xtask check`.

use std::time::Instant;

use anyhow::{Context as _, Result};

use crate::{layers, process};

/// Runs the gates in the order in which they are quick to fail.
pub(crate) fn run(_args: &[String]) -> Result<()> {
    gate("format", || process::run(&mut process::cargo(["fmt", "--all", "--check"])))?;
    gate("layers", || layers::run(&[]))?;
    gate("clippy", || {
        process::run(&mut process::cargo(["clippy", "--workspace", "--all-targets", "--", "-D", "warnings"]))
    })?;
    gate("docs", || {
        let mut doc = process::cargo(["doc", "--workspace", "--no-deps", "--document-private-items"]);
        process::run(doc.env("RUSTDOCFLAGS", "-D warnings"))
    })?;
    gate("unit tests", || {
        process::run(&mut process::cargo([
            "test",
            "--workspace",
            "--exclude",
            "kiln-tests",
            "--no-fail-fast",
        ]))
    })
}

/// Runs one gate, and says which it was and how long it took.
fn gate(name: &str, run: impl FnOnce() -> Result<()>) -> Result<()> {
    eprintln!("== {name}");
    let start = Instant::now();
    run().with_context(|| format!("gate `{name}`"))?;
    eprintln!("== {name}: {:.1} s", start.elapsed().as_secs_f64());
    Ok(())
}
