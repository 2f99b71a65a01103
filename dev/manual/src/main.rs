//! Writes man pages or shell completions into a directory: `kiln-manual man|completions DIR`.

#![forbid(unsafe_code)]

use std::path::Path;

use anyhow::{Context as _, Result, bail};
use clap::ValueEnum as _;
use clap_complete::Shell;

fn main() -> Result<()> {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let (what, dir) = match &args[..] {
        [what, dir] => (what.as_str(), Path::new(dir)),
        _ => bail!("usage: kiln-manual man|completions DIR"),
    };
    std::fs::create_dir_all(dir).with_context(|| format!("cannot make {}", dir.display()))?;
    match what {
        "man" => clap_mangen::generate_to(kiln_cli::command(), dir).context("man pages"),
        "completions" => {
            for shell in Shell::value_variants() {
                clap_complete::generate_to(*shell, &mut kiln_cli::command(), "kiln", dir)
                    .context("completions")?;
            }
            Ok(())
        }
        other => bail!("{other}: neither man nor completions"),
    }
}
