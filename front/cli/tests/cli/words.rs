//! Help texts, errors and exit codes.

use std::process::Stdio;

use insta::assert_snapshot;

use super::{kiln, run, told};

#[test]
fn help_teaches() {
    assert_snapshot!("help", told(&["--help"]));
    assert_snapshot!("help_run", told(&["run", "--help"]));
    assert_snapshot!("help_pull", told(&["pull", "--help"]));
    assert_snapshot!("help_bake", told(&["bake", "--help"]));
    assert_snapshot!("help_snapshot", told(&["snapshot", "--help"]));
    assert_snapshot!("help_vm", told(&["vm", "--help"]));
    assert_snapshot!("help_vm_create", told(&["vm", "create", "--help"]));
    assert_snapshot!("help_vm_exec", told(&["vm", "exec", "--help"]));
    assert_snapshot!("help_vm_fork", told(&["vm", "fork", "--help"]));
    for verb in [
        "ps", "logs", "wait", "stop", "restart", "kill", "rm", "inspect", "cp", "stats", "top", "expose",
        "port", "events",
    ] {
        assert_snapshot!(format!("help_{verb}"), told(&[verb, "--help"]));
    }
    assert_snapshot!("help_doctor", told(&["doctor", "--help"]));
}

#[test]
fn nothing_said_shows_the_help_and_fails() {
    let output = run(&[]);
    assert_eq!(output.status.code(), Some(2));
    assert!(output.stdout.is_empty());
    assert!(String::from_utf8_lossy(&output.stderr).contains("Usage: kiln"));
}

#[test]
fn wrong_words_are_named() {
    assert_snapshot!("run_without_an_image", told(&["run"]));
    assert_snapshot!("unknown_command", told(&["rum"]));
    assert_snapshot!("unknown_vm", told(&["vm", "inspect", "nothing"]));
    assert_snapshot!("a_vm_name_that_is_none", told(&["vm", "create", "--name", "../x", "y"]));
    assert_snapshot!("unknown_option", told(&["run", "--memroy", "1g", "x"]));
    assert_snapshot!("memory_without_a_unit", told(&["run", "--memory", "512", "x"]));
    assert_snapshot!("too_many_cpus", told(&["run", "--cpus", "17", "x"]));
    assert_snapshot!("two_places_for_changes", told(&["run", "--read-only", "--scratch-in-memory", "x"]));
}

#[test]
fn wrong_words_about_vms_are_named() {
    assert_snapshot!("a_filter_that_is_none", told(&["ps", "--filter", "state=running"]));
    assert_snapshot!("a_state_that_is_none", told(&["ps", "--filter", "status=dead"]));
    assert_snapshot!("a_time_that_is_none", told(&["logs", "--since", "2026-13-01", "x"]));
    assert_snapshot!("a_signal_that_is_none", told(&["kill", "-s", "NOT", "x"]));
    assert_snapshot!("a_name_for_what_does_not_stay", told(&["run", "--name", "x", "y"]));
    assert_snapshot!("a_terminal_for_nobody", told(&["exec", "-dt", "x", "sh"]));
    assert_snapshot!("a_port_that_is_none", told(&["expose", "x", "80:http"]));
    assert_snapshot!("a_port_of_what_does_not_stay", told(&["run", "-p", "8080:80", "x"]));
    assert_snapshot!("a_screen_without_a_terminal", told(&["top"]));
    assert_snapshot!("two_places_here", told(&["cp", "a", "b"]));
    assert_snapshot!("unknown_vm_to_wait_for", told(&["wait", "nothing"]));
}

/// With and without `vm` before it a verb is the same.
#[test]
fn a_verb_needs_no_vm_before_it() {
    for verb in [
        "ps", "exec", "logs", "wait", "stop", "restart", "kill", "pause", "resume", "rm", "inspect", "cp",
        "stats", "top", "expose", "port", "events",
    ] {
        let [one, other] = [&[verb, "--help"][..], &["vm", verb, "--help"]].map(told);
        let options = |help: &str| help.split_once("Options:").map(|(_, rest)| rest.to_owned());
        assert!(options(&one).is_some(), "{verb}");
        assert_eq!(options(&one), options(&other), "{verb}");
    }
}

#[test]
fn options_after_the_image_belong_to_the_command() {
    // The image is refused by its name, after its arguments were taken as they are.
    let output = run(&["run", "no image", "--memory", "-x", "--", "--help"]);
    assert_eq!(output.status.code(), Some(125), "{output:?}");
    assert!(output.stdout.is_empty());
}

#[test]
fn a_terminal_that_is_none_is_refused_with_the_way_out() {
    assert_snapshot!("tty_without_a_terminal", told(&["run", "-it", "x"]));
}

#[test]
fn an_environment_file_that_is_not_there_is_named() {
    assert_snapshot!("no_env_file", told(&["run", "--env-file", "/nonexistent/env", "x"]));
}

#[test]
fn a_kernel_that_is_not_there_is_named() {
    let output = run(&["run", "--kernel", "/nonexistent/vmlinux", "x"]);
    assert_eq!(output.status.code(), Some(125));
}

#[test]
fn a_name_that_looks_like_a_key_is_refused() {
    assert_snapshot!("name_like_a_key", told(&["bake", "--name", "deadbeef", "x"]));
}

#[test]
fn completions_name_every_command() {
    for shell in ["bash", "zsh", "fish"] {
        let output = run(&["completion", shell]);
        assert!(output.status.success());
        let script = String::from_utf8(output.stdout).expect("a script is text");
        for command in kiln_cli::command().get_subcommands() {
            assert!(script.contains(command.get_name()), "{shell} lacks {}", command.get_name());
        }
    }
}

#[test]
fn version_as_json_has_what_a_report_needs() {
    let output = run(&["version", "--json"]);
    let value: serde_json::Value = serde_json::from_slice(&output.stdout).expect("JSON");
    assert_eq!(value["version"], env!("CARGO_PKG_VERSION"));
    for field in ["commit", "arch", "kernel", "agent"] {
        assert!(value.get(field).is_some(), "{field}");
    }
}

#[test]
fn doctor_as_json_says_for_each_check_how_it_stands() {
    let output = run(&["--root", "/tmp", "doctor", "--json"]);
    let findings: serde_json::Value = serde_json::from_slice(&output.stdout).expect("JSON");
    let findings = findings.as_array().expect("an array");
    let failed = findings.iter().any(|finding| finding["status"] == "failure");
    assert_eq!(output.status.code(), Some(i32::from(failed)), "{findings:?}");
    for check in
        ["kvm", "virtualization", "machine", "nx_huge_pages", "cgroups", "huge_pages", "userfaultfd", "jail"]
    {
        assert!(findings.iter().any(|finding| finding["check"] == check), "{check}");
    }
    for finding in findings.iter().filter(|finding| finding["status"] != "ok") {
        assert_ne!(finding["consequence"], "", "{finding}");
    }
}

#[test]
fn a_reader_that_goes_away_is_no_failure() {
    let mut child = kiln(&["completion", "bash"]).stdout(Stdio::piped()).spawn().expect("the program starts");
    drop(child.stdout.take());
    assert!(child.wait().expect("it ends").success());
}
