//! Fuzzing: `cargo xtask fuzz [--seconds N] [TARGET...]`.
//!
//! The targets in `fuzz/` are those of cargo-fuzz and work with it. Here they are built with the same instrumentation
//! by the compiler at hand, so that a check of some seconds needs no further tool and no other toolchain.

use std::path::PathBuf;
use std::process::Command;

use anyhow::{Context as _, Result, bail};

use crate::{paths, process};

const TRIPLE: &str = "x86_64-unknown-linux-gnu";
/// Seconds for each target unless told otherwise.
const DEFAULT_SECONDS: u64 = 10;
/// What a target may use; more is a finding.
const LIMITS: [&str; 3] = ["-rss_limit_mb=2048", "-timeout=20", "-max_len=16384"];

/// What cargo-fuzz passes to the compiler: coverage counters for libFuzzer, and every assertion on.
const FLAGS: &str = "--cfg fuzzing -Cpasses=sancov-module -Cllvm-args=-sanitizer-coverage-level=4 \
    -Cllvm-args=-sanitizer-coverage-inline-8bit-counters -Cllvm-args=-sanitizer-coverage-pc-table \
    -Cllvm-args=-sanitizer-coverage-trace-compares -Ccodegen-units=1 -Zsanitizer=address";

/// Runs the named targets, or all, each for some seconds.
pub(crate) fn run(args: &[String]) -> Result<()> {
    let mut seconds = DEFAULT_SECONDS;
    let mut wanted = Vec::new();
    let mut args = args.iter();
    while let Some(arg) = args.next() {
        match arg.as_str() {
            "--seconds" => {
                let value = args.next().context("--seconds needs a number")?;
                seconds = value.parse().context("--seconds")?;
            }
            name => wanted.push(name.to_owned()),
        }
    }
    let all = targets()?;
    if let Some(unknown) = wanted.iter().find(|name| !all.contains(name)) {
        bail!("no fuzz target named {unknown}: {}", all.join(", "));
    }
    let wanted = if wanted.is_empty() { all } else { wanted };

    let fuzz = paths::root().join("fuzz");
    let target_dir = paths::target().join("fuzz");
    let mut build = process::cargo(["build", "--quiet", "--release", "--target", TRIPLE, "--manifest-path"]);
    build.arg(fuzz.join("Cargo.toml")).arg("--target-dir").arg(&target_dir);
    // The instrumentation's flags are unstable ones, which a stable compiler takes when told so.
    process::run(build.env("RUSTC_BOOTSTRAP", "1").env("RUSTFLAGS", FLAGS))?;
    for name in &wanted {
        eprintln!("== fuzz {name}: {seconds} s");
        let program = target_dir.join(TRIPLE).join("release").join(name);
        let dirs: [PathBuf; 2] = [fuzz.join("corpus").join(name), fuzz.join("artifacts").join(name)];
        for dir in &dirs {
            std::fs::create_dir_all(dir).with_context(|| dir.display().to_string())?;
        }
        let [corpus, artifacts] = dirs;
        let seeds = fuzz.join("seeds").join(name);
        let mut run = Command::new(program);
        run.arg(format!("-max_total_time={seconds}"))
            .arg(format!("-artifact_prefix={}/", artifacts.display()));
        run.args(LIMITS).args(["-verbosity=0", "-print_funcs=0", "-print_final_stats=1"]).arg(corpus);
        if seeds.is_dir() {
            run.arg(seeds);
        }
        process::run(&mut run)
            .with_context(|| format!("fuzz target {name}: the input is in {}", artifacts.display()))?;
    }
    Ok(())
}

/// The targets by the names of their files.
fn targets() -> Result<Vec<String>> {
    let dir = paths::root().join("fuzz/fuzz_targets");
    let mut names = Vec::new();
    for entry in std::fs::read_dir(&dir).with_context(|| dir.display().to_string())? {
        let path = entry?.path();
        if let Some(name) = path.file_stem().and_then(|name| name.to_str()) {
            names.push(name.to_owned());
        }
    }
    names.sort();
    Ok(names)
}
