//! The library's examples, as its users run them.

use std::path::Path;
use std::process::Command;

use kiln_testkit::copy_program;
use kiln_tests::{Outcome, busybox, from_environment, kiln, store};

fn example(name: &str, arguments: &[&str]) -> Outcome {
    example_with(name, arguments, &[])
}

fn example_with(name: &str, arguments: &[&str], environment: &[(&str, &Path)]) -> Outcome {
    let mut command = Command::new(from_environment("KILN_EXAMPLES").join(name));
    command.arg(busybox().reference()).args(arguments);
    command.env("KILN_ROOT", store()).env("KILN_GUEST_DIR", from_environment("KILN_TEST_GUEST"));
    Outcome::of(command.envs(environment.iter().copied()))
}

#[track_caller]
fn says(name: &str, arguments: &[&str], lines: &[&str]) {
    let outcome = example(name, arguments);
    outcome.code(0);
    for line in lines {
        assert!(outcome.out().contains(line), "{name}: '{line}' in {outcome:?}");
    }
}

#[test]
fn exec_passes_output_and_code_on() {
    let outcome = example("exec", &["sh", "-c", "echo out; exit 7"]);
    outcome.code(7);
    assert_eq!(outcome.out(), "out\n");
}

#[test]
fn a_program_finds_beside_it_what_kiln_writes_there() {
    let place = tempfile::tempdir().expect("a folder");
    let (program, parts) = (place.path().join("program"), place.path().join("kiln-guest"));
    copy_program(&from_environment("KILN_EXAMPLES").join("exec"), &program).expect("copied");
    // Again over what is there.
    for _ in 0..2 {
        let written = Outcome::of(kiln(["parts"]).arg(&parts));
        written.code(0);
        assert_eq!(written.out().lines().count(), 3, "{written:?}");
    }
    let mut command = Command::new(program);
    command.arg(busybox().reference()).args(["echo", "found"]).env("KILN_ROOT", store());
    let outcome = Outcome::of(command.env_remove("KILN_MONITOR").env_remove("KILN_GUEST_DIR"));
    outcome.code(0);
    assert_eq!(outcome.out(), "found\n");
    let nowhere = Outcome::of(kiln(["parts"]).arg("/dev/null/parts"));
    nowhere.code(3);
    assert!(nowhere.err().contains("cannot write /dev/null/parts"), "{nowhere:?}");
}

#[test]
fn pool_keeps_snippets_apart() {
    says(
        "pool",
        &[],
        &[
            "echo $((6 * 7)): ended with 0, said '42'",
            "cat /tmp/secret: ended with 1, said ''",
            "exit 3: ended with 3",
            "yes: failed: the command wrote more than 65536 bytes to its stdout",
        ],
    );
}

#[test]
fn listener_answers_over_the_hosts_port() {
    says("listener", &[], &["127.0.0.1:", "leads to port 8080 of the guest", "hello from "]);
}

#[test]
fn warm_up_leaves_what_it_did() {
    says("warm_up", &[], &["/var/table: OK"]);
}

#[test]
fn extra_files_go_in_and_results_come_out() {
    let file = tempfile::NamedTempFile::new().expect("a file");
    std::fs::write(file.path(), "b\na\nc\n").expect("written");
    says("extra_files", &[file.path().to_str().expect("text")], &["2 files: 3 lines"]);
}

#[test]
fn by_name_finds_what_was_baked_and_saved_as_it_was() {
    let place = tempfile::tempdir().expect("a folder");
    // Of its own, for its names.
    let root = [("KILN_ROOT", place.path())];
    let outcome = example_with("by_name", &[], &root);
    outcome.code(0);
    let said = ["baked: blue, user 1000, in /srv, no note", "saved: blue, user 1000, in /srv, hello"];
    assert_eq!(outcome.out().lines().collect::<Vec<_>>(), said);
    let mut run = kiln(["run", "--quiet", "--env", "SIZE=large", "snapshot:toolbox", "sh", "-c"]);
    run.arg("echo $SIZE and $COLOR, user $(id -u), in $PWD").envs(root);
    assert_eq!(Outcome::of(&mut run).out(), "large and blue, user 1000, in /srv\n");
    Outcome::of(kiln(["vm", "restore", "--name", "by-name", "with-note"]).envs(root)).code(0);
    let told = Outcome::of(kiln(["exec", "by-name", "sh", "-c", "echo $COLOR, $(id -u), $PWD"]).envs(root));
    Outcome::of(kiln(["rm", "--force", "by-name"]).envs(root)).code(0);
    assert_eq!(told.out(), "blue, 1000, /srv\n");
}

#[test]
fn volumes_are_writable_where_the_root_is_not() {
    says("volumes", &[], &["cat /data/file: kept", "Read-only file system"]);
}

#[test]
fn without_a_runtime_it_is_the_same() {
    says("without_a_runtime", &[], &["HELLO FROM A THREAD", "ended with 0"]);
}
