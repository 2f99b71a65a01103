//! The commands that start no machine.

use kiln_testkit::image;
use kiln_tests::{Outcome, kiln};
use serde_json::Value;

#[test]
fn version_names_every_part_as_json() {
    let outcome = Outcome::of(&mut kiln(["version", "--json"]));
    let version: Value = serde_json::from_slice(&outcome.code(0).stdout).expect("JSON");
    assert!(version.to_string().contains("kernel"), "{version}");
}

#[test]
fn doctor_finds_that_this_host_can_run_machines() {
    let outcome = Outcome::of(&mut kiln(["doctor", "--json"]));
    let facts: Value = serde_json::from_slice(&outcome.code(0).stdout).expect("JSON");
    assert!(facts.as_array().is_some_and(|facts| facts.len() > 5), "{facts}");
    Outcome::of(&mut kiln(["doctor"])).code(0);
}

#[test]
fn an_image_is_pulled_listed_inspected_and_removed() {
    let own = tempfile::tempdir().expect("a directory");
    let reference = image::scratch().expect("the image").reference();
    let in_own = |args: &[&str]| Outcome::of(kiln(args).env("KILN_ROOT", own.path()));
    in_own(&["pull", &reference]).code(0);
    let listed: Value = serde_json::from_slice(&in_own(&["images", "--json"]).code(0).stdout).expect("JSON");
    assert_eq!(listed.as_array().map(Vec::len), Some(1), "{listed}");
    let inspected: Value =
        serde_json::from_slice(&in_own(&["image", "inspect", &reference]).code(0).stdout).expect("JSON");
    assert!(inspected.to_string().contains("/probe"), "{inspected}");
    in_own(&["rmi", &reference]).code(0);
    let listed: Value = serde_json::from_slice(&in_own(&["images", "--json"]).code(0).stdout).expect("JSON");
    assert_eq!(listed.as_array().map(Vec::len), Some(0), "{listed}");
    assert!(!in_own(&["rmi", &reference]).status.success(), "what is gone cannot be removed");
}

#[test]
fn wrong_usage_is_2_and_says_what_is_right() {
    Outcome::of(&mut kiln(["no-such-command"])).code(2).complains("Usage");
    Outcome::of(&mut kiln(["completion", "bash"])).code(0);
}
