//! Man pages and shell completions, from the command line's one definition.

use std::path::PathBuf;

use anyhow::Result;

use crate::{paths, process};

/// Writes the man pages into a directory, `target/man` unless named.
pub(crate) fn man(args: &[String]) -> Result<()> {
    write("man", args)
}

/// Writes the completions into a directory, `target/completions` unless named.
pub(crate) fn completions(args: &[String]) -> Result<()> {
    write("completions", args)
}

/// Runs the crate that links the command line, which would make this program slow to build.
fn write(what: &str, args: &[String]) -> Result<()> {
    let dir = args.first().map_or_else(|| paths::target().join(what), PathBuf::from);
    let mut writer = process::cargo(["run", "--quiet", "--package", "kiln-manual", "--", what]);
    process::run(writer.arg(std::path::absolute(&dir)?))?;
    println!("{}", dir.display());
    Ok(())
}
