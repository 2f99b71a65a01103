//! `kiln doctor`: what this host offers, each fact with its consequence and the fix.
//!
//! A check reads files below a root, which is `/` but in tests, and returns a [`Finding`]. What cannot be read that
//! way (can the device be opened, what does KVM offer) is asked for elsewhere and judged here.

mod host;
mod kvm;

use std::fmt::Write as _;
use std::path::Path;

use serde::Serialize;

use crate::Context;
use crate::failure::Failure;

/// How bad a finding is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "lowercase")]
pub(crate) enum Status {
    /// As it should be.
    Ok,
    /// Things work, but slower or with less.
    Warning,
    /// `kiln run` cannot work.
    Failure,
}

/// One fact about the host.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub(crate) struct Finding {
    /// What was looked at, in one word.
    pub(crate) check: &'static str,
    /// How bad it is.
    pub(crate) status: Status,
    /// What was found.
    pub(crate) fact: String,
    /// What follows from it, when it is not as it should be.
    #[serde(skip_serializing_if = "String::is_empty")]
    pub(crate) consequence: String,
    /// What to do about it, when something can be done.
    #[serde(skip_serializing_if = "String::is_empty")]
    pub(crate) fix: String,
}

impl Finding {
    fn ok(check: &'static str, fact: impl Into<String>) -> Self {
        Self { check, status: Status::Ok, fact: fact.into(), consequence: String::new(), fix: String::new() }
    }

    fn warning(
        check: &'static str,
        fact: impl Into<String>,
        consequence: &str,
        fix: impl Into<String>,
    ) -> Self {
        Self {
            status: Status::Warning,
            consequence: consequence.into(),
            fix: fix.into(),
            ..Self::ok(check, fact)
        }
    }

    fn failure(
        check: &'static str,
        fact: impl Into<String>,
        consequence: &str,
        fix: impl Into<String>,
    ) -> Self {
        Self { status: Status::Failure, ..Self::warning(check, fact, consequence, fix) }
    }
}

/// Prints what was found and returns the exit code: 1 when `kiln run` cannot work here.
///
/// # Errors
/// When the findings cannot be printed.
pub(crate) async fn doctor(context: &Context, json: bool) -> Result<u8, Failure> {
    let root = Path::new("/");
    let store = context.root()?;
    let mut findings = vec![kvm::device(root), kvm::kind(root)];
    findings.extend(kvm::monitor(&context.monitor()).await);
    findings.extend([
        kvm::nx_huge_pages(root),
        host::guest(context.guest()),
        host::store(&store),
        host::memory(root),
        host::overcommit(root),
        host::huge_pages(root),
        host::cgroups(root, kiln::monitor::groups()),
        host::user_namespaces(root),
        host::userfaultfd(root),
        host::landlock(),
    ]);
    let works = findings.iter().all(|finding| finding.status < Status::Failure);
    let text = if json {
        serde_json::to_string_pretty(&findings).map_err(Failure::host)? + "\n"
    } else {
        report(&findings, works)
    };
    crate::print(&text)?;
    Ok(u8::from(!works))
}

fn report(findings: &[Finding], works: bool) -> String {
    let mut text = String::new();
    for finding in findings {
        let mark = match finding.status {
            Status::Ok => "ok  ",
            Status::Warning => "warn",
            Status::Failure => "FAIL",
        };
        let _ = writeln!(text, "{mark}  {:<16} {}", finding.check, finding.fact);
        for (label, words) in [("so", &finding.consequence), ("fix", &finding.fix)] {
            if !words.is_empty() {
                let _ = writeln!(text, "{:22} {label}: {words}", "");
            }
        }
    }
    text + if works {
        "\n`kiln run` can work here.\n"
    } else {
        "\n`kiln run` cannot work here: see FAIL above.\n"
    }
}

/// A short text file below a root, trimmed; `None` when it cannot be read.
fn text(root: &Path, path: &str) -> Option<String> {
    Some(std::fs::read_to_string(root.join(path)).ok()?.trim().to_owned())
}

/// The word in brackets of a file that lists choices, such as `always [madvise] never`.
fn chosen(list: &str) -> &str {
    list.split_once('[').and_then(|(_, rest)| rest.split_once(']')).map_or(list, |(word, _)| word)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A root with the given files.
    pub(super) fn root(files: &[(&str, &str)]) -> tempfile::TempDir {
        let root = tempfile::tempdir().expect("a temporary folder");
        for (path, content) in files {
            let path = root.path().join(path);
            std::fs::create_dir_all(path.parent().expect("a file in a folder")).expect("made");
            std::fs::write(path, content).expect("written");
        }
        root
    }

    #[test]
    fn a_report_says_what_follows_and_what_to_do() {
        let findings =
            [Finding::ok("a", "fine"), Finding::failure("b", "broken", "nothing works", "mend it")];
        insta::assert_snapshot!(report(&findings, false));
    }

    #[test]
    fn the_chosen_word_is_the_one_in_brackets() {
        assert_eq!(chosen("always [madvise] never"), "madvise");
        assert_eq!(chosen("plain"), "plain");
    }
}
