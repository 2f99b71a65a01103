//! The kernel's configuration: fragments by purpose, over nothing at all.
//!
//! The base is `allnoconfig`, so each enabled option is one a fragment asks for or one that such an option selects.
//! Kconfig drops silently what does not fit together; here an option that did not land is an error that names it.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;
use std::process::Command;

use anyhow::{Context as _, Result, bail};

use super::key;
use crate::process;

/// What a fragment asks for an option: its value, or `None` for "not set".
type Wish = Option<String>;

/// Writes `objects/.config` from the fragments in `fragments`, and checks that every option landed.
pub(super) fn make(source: &Path, objects: &Path, fragments: &Path) -> Result<()> {
    let wishes = read(fragments)?;
    let merged = objects.join("fragments");
    let text: String = wishes.iter().map(|(option, (wish, _))| line(option, wish)).collect();
    fs::write(&merged, text).with_context(|| format!("cannot write {}", merged.display()))?;
    process::output(
        Command::new("make")
            .arg("--silent")
            .arg("-C")
            .arg(source)
            .arg(format!("O={}", objects.display()))
            .arg(format!("KCONFIG_ALLCONFIG={}", merged.display()))
            .arg("allnoconfig"),
    )?;
    let result = fs::read_to_string(objects.join(".config")).context("cannot read the configuration")?;
    let failed = not_landed(&wishes, &options(&result)?);
    if !failed.is_empty() {
        bail!("options that did not land:\n  {}", failed.join("\n  "));
    }
    Ok(())
}

/// Every option the fragments ask for, with the fragment that asks.
fn read(fragments: &Path) -> Result<BTreeMap<String, (Wish, String)>> {
    let mut wishes = BTreeMap::new();
    for path in key::files(fragments, "config")? {
        let name = key::name(&path);
        let text = fs::read_to_string(&path).with_context(|| format!("cannot read {}", path.display()))?;
        for (option, wish) in options(&text).with_context(|| name.clone())? {
            if let Some((_, other)) = wishes.insert(option.clone(), (wish, name.clone())) {
                bail!("{option} is in {other} and in {name}");
            }
        }
    }
    Ok(wishes)
}

/// The options a configuration sets or declines. Other comments and empty lines say nothing.
fn options(text: &str) -> Result<BTreeMap<String, Wish>> {
    let mut found = BTreeMap::new();
    for line in text.lines() {
        let declined = line.strip_prefix("# ").and_then(|rest| rest.strip_suffix(" is not set"));
        let (option, wish) = match (declined, line.split_once('=')) {
            (Some(option), _) if option.starts_with("CONFIG_") => (option, None),
            (_, Some((option, value))) if option.starts_with("CONFIG_") => (option, Some(value.to_owned())),
            _ if line.is_empty() || line.starts_with('#') => continue,
            _ => bail!("neither an option nor a comment: {line}"),
        };
        if found.insert(option.to_owned(), wish).is_some() {
            bail!("{option} is named twice");
        }
    }
    Ok(found)
}

/// The wishes that `result` does not grant, each with the fragment it is from.
fn not_landed(wishes: &BTreeMap<String, (Wish, String)>, result: &BTreeMap<String, Wish>) -> Vec<String> {
    let mut failed = Vec::new();
    for (option, (wish, fragment)) in wishes {
        // An option whose dependencies are off is absent, which is as good as "not set".
        let landed = result.get(option).cloned().flatten();
        if landed != *wish {
            let shown = |wish: &Wish| wish.clone().unwrap_or_else(|| "not set".to_owned());
            failed.push(format!("{option}: {fragment} asks for {}, got {}", shown(wish), shown(&landed)));
        }
    }
    failed
}

fn line(option: &str, wish: &Wish) -> String {
    match wish {
        Some(value) => format!("{option}={value}\n"),
        None => format!("# {option} is not set\n"),
    }
}

#[cfg(test)]
mod tests {
    use std::path::PathBuf;

    use super::*;
    use crate::paths;

    fn inputs() -> PathBuf {
        paths::root().join("guest/kernel")
    }

    fn wishes(text: &str) -> BTreeMap<String, (Wish, String)> {
        let options = options(text).expect("well-formed");
        options.into_iter().map(|(option, wish)| (option, (wish, "a.config".to_owned()))).collect()
    }

    #[test]
    fn an_option_that_did_not_land_is_named_with_its_fragment() {
        let wishes = wishes("CONFIG_A=y\nCONFIG_B=y\n# CONFIG_C is not set\nCONFIG_D=\"x\"\n");
        let result = options("CONFIG_A=y\nCONFIG_C=y\nCONFIG_D=\"y\"\n").expect("well-formed");
        assert_eq!(
            not_landed(&wishes, &result),
            [
                "CONFIG_B: a.config asks for y, got not set",
                "CONFIG_C: a.config asks for not set, got y",
                "CONFIG_D: a.config asks for \"x\", got \"y\""
            ]
        );
    }

    #[test]
    fn an_option_declined_and_absent_has_landed() {
        assert!(not_landed(&wishes("# CONFIG_A is not set\n"), &BTreeMap::new()).is_empty());
    }

    #[test]
    fn a_line_that_is_no_option_is_refused() {
        for text in ["CONFIG_A y", "A=y", "CONFIG_A=y\nCONFIG_A=y"] {
            assert!(options(text).is_err(), "{text}");
        }
    }

    /// What programs in a guest look for, from `guest/kernel/*.requirements`: option, and the reason when it is left out.
    #[test]
    fn every_required_option_is_asked_for_by_a_fragment() {
        let wishes = read(&inputs().join("config")).expect("the fragments are well-formed");
        let mut missing = Vec::new();
        for path in key::files(&inputs(), "requirements").expect("there are requirement lists") {
            let text = fs::read_to_string(&path).expect("a checked-in file");
            for line in text.lines().filter(|line| !line.is_empty() && !line.starts_with('#')) {
                let (option, left_out) = match line.split_once("  ") {
                    Some((option, reason)) => (option, !reason.trim().is_empty()),
                    None => (line, false),
                };
                let asked = wishes
                    .get(&format!("CONFIG_{option}"))
                    .is_some_and(|(wish, _)| wish.as_deref() == Some("y"));
                if asked == left_out {
                    missing.push(format!("{}: {option}", key::name(&path)));
                }
            }
        }
        assert!(missing.is_empty(), "not asked for, or asked for and yet listed as left out: {missing:#?}");
    }
}
