//! System tests and benchmarks.

use anyhow::{Result, bail};

/// Runs the system tests.
pub(crate) fn run(_args: &[String]) -> Result<()> {
    bail!("not part of this tree yet")
}

/// Runs a benchmark.
pub(crate) fn bench(_args: &[String]) -> Result<()> {
    bail!("not part of this tree yet")
}
