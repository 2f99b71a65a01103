//! What an image says about its command, and what a user says over it.

use kiln_testkit::image::Image;
use kiln_testkit::nasty;
use kiln_tests::{busybox, run};

fn config(tag: &str) -> Image {
    nasty::config(tag).expect("the image")
}

#[test]
fn a_numeric_user_has_the_groups_of_its_name() {
    let outcome = run(&[], &config("user-1000"), &[]);
    outcome.code(0);
    assert!(outcome.out().starts_with("uid 1000 gid 1000\ngroups [10, 50, 1000]\n"), "{}", outcome.out());
    assert!(outcome.out().contains("env HOME=/home/ada\n"), "{}", outcome.out());
}

#[test]
fn a_named_group_is_the_only_one() {
    let outcome = run(&[], &config("user-name-group"), &[]);
    outcome.code(0);
    assert!(outcome.out().starts_with("uid 1000 gid 1843\n"), "{}", outcome.out());
    assert!(!outcome.out().contains("10,"), "no supplementary groups: {}", outcome.out());
}

#[test]
fn an_unknown_user_is_an_error_that_names_it() {
    run(&[], &config("user-unknown"), &[]).code(125).complains("nobody-here");
}

#[test]
fn a_working_directory_is_made_when_missing() {
    run(&[], &config("workdir"), &[]).prints("/made/for/this\n");
}

#[test]
fn arguments_replace_cmd_and_stay_behind_the_entrypoint() {
    run(&[], &config("entrypoint"), &[]).prints("entry default\n");
    run(&[], &config("entrypoint"), &["mine", "--flag"]).prints("entry mine --flag\n");
    // An entrypoint of one's own drops the image's CMD with its entrypoint.
    run(&["--entrypoint", "/bin/echo"], &config("entrypoint"), &[]).prints("\n");
}

#[test]
fn the_shell_form_gets_the_arguments_as_the_shells_own() {
    run(&[], &config("shell-form"), &["zero", "one", "two"]).prints("shell-form zero 2\n");
}

#[test]
fn a_volume_is_writable_even_when_the_root_is_not() {
    run(&["--read-only"], &config("volume"), &[]).prints("x\n");
}

#[test]
fn a_working_directory_is_made_even_when_the_root_is_read_only() {
    run(&["--read-only"], &config("workdir"), &[]).prints("/made/for/this\n");
}

#[test]
fn options_set_environment_user_directory_and_name() {
    let file = tempfile::NamedTempFile::new().expect("a file");
    std::fs::write(file.path(), "# comment\nFROM_FILE=a b\nBOTH=file\n").expect("written");
    let path = file.path().to_str().expect("a path");
    let options = [
        "-e",
        "WORD=one two",
        "-e",
        "BOTH=word",
        "-e",
        "EMPTY=",
        "--env-file",
        path,
        "-u",
        "ada",
        "-w",
        "/made/here",
        "--hostname",
        "forge",
        "--entrypoint",
        "/probe",
    ];
    let outcome = run(&options, &busybox(), &["identity"]);
    outcome.code(0);
    let out = outcome.out();
    for line in [
        "uid 1000 gid 1000",
        "cwd /made/here",
        "host forge",
        "env WORD=one two",
        "env BOTH=word",
        "env EMPTY=",
        "env FROM_FILE=a b",
        "env PATH=/bin:/usr/bin",
        "stdin tty false",
    ] {
        assert!(out.lines().any(|found| found == line), "no line {line:?} in\n{out}");
    }
}
