//! What README and guide show is what happens.
//!
//! In their `console` blocks a line that starts with `$ ` is typed into a shell; below it stand its output, `...` where
//! more may follow, and the exit code in brackets where it is not 0. Images go by the names readers would use. The examples
//! of a document share a folder.

use std::path::Path;
use std::process::{Command, Stdio};

use kiln_testkit::image::{self, Image};
use kiln_tests::{Outcome, program, store};

/// A command as it is shown.
#[derive(Debug)]
struct Example {
    command: String,
    output: String,
    code: i32,
}

/// The examples of a document, in its order.
fn examples(document: &str) -> Vec<Example> {
    let mut examples: Vec<Example> = Vec::new();
    let mut shown = false;
    for line in document.lines() {
        if line.starts_with("```") {
            shown = line == "```console";
        } else if let Some(command) = line.strip_prefix("$ ").filter(|_| shown) {
            examples.push(Example { command: command.to_owned(), output: String::new(), code: 0 });
        } else if shown {
            let example = examples.last_mut().expect("a block starts with a command");
            match line.strip_prefix('[').and_then(|rest| rest.strip_suffix(']')) {
                Some(code) => example.code = code.parse().expect("an exit code in brackets"),
                None => example.output.extend([line, "\n"]),
            }
        }
    }
    examples
}

/// Types every example of `document` into a shell, with `images` under the names readers would use.
fn check(document: &str, images: &[(&str, Image)]) {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).parent().expect("the workspace");
    let text = std::fs::read_to_string(root.join(document)).expect(document);
    let examples = examples(&text);
    assert!(!examples.is_empty(), "{document} has no examples");
    let path = format!(
        "{}:{}",
        program().parent().expect("a directory").display(),
        std::env::var("PATH").expect("a search path")
    );
    let folder = tempfile::tempdir().expect("a folder");
    for example in examples {
        let words = example.command.split(' ').map(|word| {
            images
                .iter()
                .find(|(name, _)| *name == word)
                .map_or(word.to_owned(), |(_, image)| image.reference())
        });
        let typed = words.collect::<Vec<_>>().join(" ");
        let mut shell = Command::new("bash");
        shell.args(["-c", &typed]).env("PATH", &path).env("KILN_ROOT", store()).stdin(Stdio::null());
        shell.current_dir(folder.path());
        let outcome = Outcome::of(&mut shell);
        outcome.code(example.code);
        match example.output.strip_suffix("...\n") {
            Some(start) => assert!(outcome.out().starts_with(start), "{example:?}: {}", outcome.out()),
            None => assert_eq!(outcome.out(), example.output, "{example:?}"),
        }
    }
}

#[test]
fn the_examples_of_the_readme_work() {
    let debian = image::debian().expect("the image");
    let python = image::python().expect("the image");
    let busybox = image::busybox().expect("the image");
    // What an earlier run of the test left.
    Outcome::of(Command::new(program()).args(["rm", "--force", "hello"]).env("KILN_ROOT", store()));
    check("README.md", &[("debian:12", debian), ("python:3.12", python), ("busybox", busybox)]);
}

#[test]
fn the_examples_of_the_guide_work() {
    for document in ["docs/guide/running.md", "docs/guide/baking.md", "docs/guide/security.md"] {
        check(document, &[("demo", image::busybox().expect("the image"))]);
    }
}

#[test]
fn the_examples_of_the_guide_to_vms_work() {
    let mut names = Command::new(program());
    names.args(["vm", "rm", "--force", "job", "web", "web-2", "web-3"]).env("KILN_ROOT", store());
    // What an earlier run of the test left.
    Outcome::of(&mut names);
    check("docs/guide/vms.md", &[("demo", image::busybox().expect("the image"))]);
}
