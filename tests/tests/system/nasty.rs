//! Images that break others: the guest sees what umoci unpacks, file by file, or the image is refused.

use std::path::Path;
use std::process::Command;

use kiln_testkit::image::Image;
use kiln_testkit::{capture, nasty};
use kiln_tests::{Outcome, kiln, run, script, store};

/// Compares `place` in a guest of `image` with what umoci makes of it.
fn guest_sees_what_umoci_unpacks(image: &Image, place: &str) {
    let outcome = run(&[], image, &["/probe", "list", place]);
    outcome.code(0);
    let bundle = tempfile::tempdir().expect("a directory");
    let root = image.unpack(&bundle.path().join("bundle")).expect("umoci takes the image");
    let mut probe = Command::new(kiln_testkit::image::probe().expect("the probe"));
    let listed =
        capture(probe.arg("list").arg(root.join(place.trim_start_matches('/')))).expect("the probe runs");
    let (ours, theirs) = (outcome.out(), String::from_utf8_lossy(&listed).into_owned());
    assert!(theirs.lines().count() > 10, "umoci unpacked next to nothing:\n{theirs}");
    let missing: Vec<&str> =
        theirs.lines().filter(|line| !ours.lines().any(|found| found == *line)).take(20).collect();
    let extra: Vec<&str> =
        ours.lines().filter(|line| !theirs.lines().any(|found| found == *line)).take(20).collect();
    assert!(
        missing.is_empty() && extra.is_empty(),
        "umoci has, the guest has not:\n{}\nthe guest has, umoci has not:\n{}",
        missing.join("\n"),
        extra.join("\n")
    );
}

#[test]
fn deletions_and_opaque_directories_are_those_of_umoci() {
    guest_sees_what_umoci_unpacks(&nasty::deletions().expect("the image"), nasty::PLACE);
}

#[test]
fn as_many_layers_as_an_image_may_have_are_one_root() {
    guest_sees_what_umoci_unpacks(&nasty::deep().expect("the image"), nasty::PLACE);
}

#[test]
fn every_kind_of_metadata_survives() {
    guest_sees_what_umoci_unpacks(&nasty::metadata().expect("the image"), nasty::PLACE);
}

#[test]
fn a_debian_is_what_umoci_unpacks() {
    guest_sees_what_umoci_unpacks(&kiln_testkit::image::debian_with_probe().expect("the image"), "/usr/bin");
}

/// Everything in the store by name and size, temporary files of running processes aside.
fn store_images() -> String {
    let outcome = Outcome::of(&mut kiln(["images", "--json"]));
    outcome.code(0);
    outcome.out()
}

#[test]
fn a_broken_layer_is_refused_and_leaves_no_image() {
    for tag in nasty::BROKEN {
        let image = nasty::broken(tag).expect("the image");
        let outcome = run(&[], &image, &["true"]);
        assert_eq!(outcome.status.code(), Some(125), "{tag}: {}", outcome.err());
        assert!(
            outcome.err().contains("sha256") || outcome.err().contains("layer"),
            "{tag}: {}",
            outcome.err()
        );
        assert!(!store_images().contains(tag), "{tag} is in the store");
    }
}

#[test]
fn paths_that_lead_out_stay_inside() {
    let outside = Path::new("/escaped");
    assert!(!outside.exists(), "/escaped is there before the test");
    for tag in nasty::ESCAPES {
        let image = nasty::escape(tag).expect("the image");
        let outcome = Outcome::of(kiln(["pull"]).arg(image.reference()));
        assert!(!outside.exists(), "{tag} wrote outside");
        if tag == "hard-link-out" && outcome.status.success() {
            let stolen = run(&[], &image, &["cat", "/stolen"]);
            assert!(!stolen.out().contains("root:"), "{tag} has the host's file");
        }
    }
    // The store has only its own files.
    assert!(store().is_dir());
}

/// A bit flips in the store after the image was made; the read that meets it fails, and other reads do not.
#[test]
fn a_flipped_bit_in_the_store_is_detected_on_use() {
    let own = tempfile::tempdir().expect("a directory");
    let image = kiln_testkit::image::busybox().expect("the image");
    let pull = Outcome::of(kiln(["pull"]).arg(image.reference()).env("KILN_ROOT", own.path()));
    pull.code(0);
    let largest = Command::new("find")
        .arg(own.path())
        .args(["-type", "f", "-size", "+500k", "-printf", "%s %p\n"])
        .output();
    let listing = String::from_utf8_lossy(&largest.expect("find runs").stdout).into_owned();
    let mut files: Vec<(u64, &str)> = listing
        .lines()
        .filter_map(|line| line.split_once(' '))
        .map(|(size, path)| (size.parse().unwrap_or(0), path))
        .collect();
    files.sort_unstable();
    assert!(!files.is_empty(), "the store has a large file");
    for (size, path) in files {
        let mut bytes = std::fs::read(path).expect("the object is read");
        for at in (0..bytes.len()).step_by(64 << 10) {
            bytes[at] ^= 0x10;
        }
        assert_eq!(bytes.len() as u64, size);
        let readable = std::fs::metadata(path).expect("metadata").permissions();
        std::fs::remove_file(path).expect("replaced");
        std::fs::write(path, bytes).expect("written");
        std::fs::set_permissions(path, readable).expect("permissions");
    }
    let mut command = kiln(["run", "--pull", "never"]);
    let outcome = Outcome::of(
        command.arg(image.reference()).args(["--", "/probe", "list", "/bin"]).env("KILN_ROOT", own.path()),
    );
    assert!(!outcome.status.success(), "damaged data was served: {}", outcome.out());
}

/// The commands of other distributions' images, each with a different builder and compression behind it.
#[test]
fn images_of_every_kind_run() {
    use kiln_testkit::image::{debian, scratch};
    let outcome = run(&[], &debian().expect("the image"), &["cat", "/etc/os-release"]);
    assert!(outcome.code(0).out().contains("Debian"), "{}", outcome.out());
    let outcome = run(&[], &scratch().expect("the image"), &[]);
    assert!(outcome.code(0).out().starts_with("uid 0 gid 0\n"), "{}", outcome.out());
}

#[test]
fn interpreters_run() {
    use kiln_testkit::image::{node, python};
    run(&[], &python().expect("the image"), &["python3", "-c", "print(sum(range(101)))"]).prints("5050\n");
    run(&[], &node().expect("the image"), &["node", "-e", "console.log([1, 2, 3].map(n => n * n).join())"])
        .prints("1,4,9\n");
}

#[test]
fn archives_of_both_kinds_run() {
    let place = tempfile::tempdir().expect("a directory");
    let image = kiln_testkit::image::busybox().expect("the image");
    for kind in ["docker-archive", "oci-archive"] {
        let file = place.path().join(kind);
        image.copy_to(&format!("{kind}:{}:test/busybox:latest", file.display()), &[]).expect("skopeo copies");
        let mut command = kiln(["run", "--quiet"]);
        command.arg(format!("{kind}:{}", file.display())).args(["--", "echo", kind]);
        Outcome::of(&mut command).prints(&format!("{kind}\n"));
    }
    // What was stored must not have changed what others see.
    script(&[], "true").code(0);
}
