//! Pulling from real registries, and what is then in the store.

use std::path::Path;
use std::process::Command;

use kiln_testkit::image;
use kiln_testkit::registry::{Access, PASSWORD, Registry, USER, basic_auth};
use kiln_tests::{Outcome, kiln, kiln_run};

/// `kiln ARGS` with a store and a Docker configuration of its own.
fn in_own(own: &Path, args: &[&str]) -> Command {
    let mut command = kiln(args);
    command.env("KILN_ROOT", own.join("store")).env("DOCKER_CONFIG", own);
    command
}

fn log_in(own: &Path, registry: &Registry, password: &str) {
    let auth = basic_auth(USER, password);
    let config = serde_json::json!({"auths": {registry.host(): {"auth": auth}}});
    std::fs::write(own.join("config.json"), config.to_string()).expect("the Docker configuration");
}

#[test]
fn an_image_runs_straight_from_a_registry_with_passwords() {
    let own = tempfile::tempdir().expect("a directory");
    let registry = Registry::start(Access::Password).expect("a registry");
    registry.push(&image::busybox().expect("the image").skopeo(), "tools/busybox:1").expect("pushed");
    let name = registry.image("tools/busybox:1");
    Outcome::of(&mut in_own(own.path(), &["run", &name, "--", "true"])).code(125).complains("busybox");
    log_in(own.path(), &registry, "wrong");
    Outcome::of(&mut in_own(own.path(), &["run", &name, "--", "true"])).code(125);
    log_in(own.path(), &registry, PASSWORD);
    let outcome = Outcome::of(&mut in_own(own.path(), &["run", &name, "--", "echo", "from a registry"]));
    outcome.code(0);
    assert_eq!(outcome.out(), "from a registry\n");
    // What the store has needs no registry.
    drop(registry);
    Outcome::of(&mut in_own(own.path(), &["run", &name, "--", "echo", "again"])).prints("again\n");
}

#[test]
fn a_registry_with_tokens_gives_them_to_anybody_for_what_is_public() {
    let own = tempfile::tempdir().expect("a directory");
    let registry = Registry::start(Access::Token).expect("a registry");
    let scratch = image::scratch().expect("the image").skopeo();
    registry.push(&scratch, "public/scratch:1").expect("pushed");
    registry.push(&scratch, "private/scratch:1").expect("pushed");
    Outcome::of(&mut in_own(own.path(), &["pull", &registry.image("public/scratch:1")])).code(0);
    let refused = Outcome::of(&mut in_own(own.path(), &["pull", &registry.image("private/scratch:1")]));
    assert!(!refused.status.success(), "{}", refused.out());
    log_in(own.path(), &registry, PASSWORD);
    Outcome::of(&mut in_own(own.path(), &["pull", &registry.image("private/scratch:1")])).code(0);
}

/// A tag that moved: `missing` keeps what the store has, `always` asks, `never` does not.
#[test]
fn the_pull_policy_decides_when_a_tag_is_resolved() {
    let own = tempfile::tempdir().expect("a directory");
    let registry = Registry::start(Access::Open).expect("a registry");
    let name = registry.image("moving:latest");
    let run = |pull: &str| {
        Outcome::of(&mut in_own(
            own.path(),
            &["run", "--pull", pull, "--entrypoint", "/probe", &name, "--", "exit", "0"],
        ))
    };
    run("never").code(125).complains("moving");
    let first =
        registry.push(&image::scratch().expect("the image").skopeo(), "moving:latest").expect("pushed");
    run("missing").code(0);
    let second =
        registry.push(&image::busybox().expect("the image").skopeo(), "moving:latest").expect("pushed");
    assert_ne!(first, second);
    let id = || Outcome::of(&mut in_own(own.path(), &["image", "inspect", &name])).code(0).out();
    run("missing").code(0);
    assert!(id().contains(&first) && !id().contains(&second), "{}", id());
    run("always").code(0);
    assert!(id().contains(&second), "{}", id());
    // A digest says which image is meant, wherever the tag is.
    let pinned = format!("{}@{first}", registry.image("moving"));
    Outcome::of(&mut in_own(own.path(), &["run", "--entrypoint", "/probe", &pinned, "--", "exit", "9"]))
        .code(9);
}

#[test]
fn progress_is_for_stderr_and_the_digest_for_stdout() {
    let own = tempfile::tempdir().expect("a directory");
    let registry = Registry::start(Access::Open).expect("a registry");
    let digest = registry.push(&image::busybox().expect("the image").skopeo(), "busybox:1").expect("pushed");
    let outcome = Outcome::of(&mut in_own(own.path(), &["pull", &registry.image("busybox:1")]));
    outcome.code(0);
    assert!(outcome.out().contains(&digest), "{}", outcome.out());
    assert!(!outcome.stderr.contains(&0x1b), "no terminal, so no colours or bars: {}", outcome.err());
}

/// Two processes pull the same image into the same store at once: both succeed, and it is there once.
#[test]
fn pulls_at_once_share_the_store() {
    let own = tempfile::tempdir().expect("a directory");
    let registry = Registry::start(Access::Open).expect("a registry");
    registry.push(&image::python().expect("the image").skopeo(), "python:1").expect("pushed");
    let name = registry.image("python:1");
    let pull = || {
        let mut command = in_own(own.path(), &["pull", &name]);
        std::thread::spawn(move || Outcome::of(&mut command))
    };
    for pull in [pull(), pull(), pull()] {
        pull.join().expect("the thread only waits").code(0);
    }
    let listed = Outcome::of(&mut in_own(own.path(), &["images", "--json"]));
    let listed: serde_json::Value = serde_json::from_slice(&listed.code(0).stdout).expect("JSON");
    assert_eq!(listed.as_array().map(Vec::len), Some(1), "{listed}");
}

/// Killed at any point, a pull leaves nothing that a later one stumbles over.
#[test]
fn a_killed_pull_is_repeated_cleanly() {
    let own = tempfile::tempdir().expect("a directory");
    let reference = image::busybox().expect("the image");
    for _ in 0..5 {
        let mut pull = in_own(own.path(), &["pull", &reference.reference()]).spawn().expect("kiln starts");
        pull.kill().expect("kiln is there");
        pull.wait().expect("kiln is waited for");
    }
    let mut run = kiln_run(&[], &reference, &["echo", "whole"]);
    Outcome::of(run.env("KILN_ROOT", own.path().join("store"))).prints("whole\n");
}
