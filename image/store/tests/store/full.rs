//! A disk that is really full: a small tmpfs, mounted in a user namespace of the test's own.

use std::path::Path;
use std::process::Command;

use kiln_store::{Store, StoreError};

use crate::{check_all_files, check_image, content, put_image, put_object};

const ROOT: &str = "KILN_STORE_TEST_SMALL_DISK";

#[test]
fn a_full_disk_is_a_clear_error_and_leaves_nothing_half_written() {
    let folder = tempfile::tempdir().expect("a folder");
    let script =
        "mount -t tmpfs -o size=2m none \"$1\" && exec \"$2\" --ignored --exact full::small_disk_child";
    let output = Command::new("unshare")
        .args(["--user", "--map-root-user", "--mount", "sh", "-c", script, "sh"])
        .arg(folder.path())
        .arg(std::env::current_exe().expect("this test"))
        .env(ROOT, folder.path())
        .output()
        .expect("unshare of util-linux, which every Debian has");
    let said = String::from_utf8_lossy(&output.stdout) + String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success() && said.contains("1 passed"), "{said}");
}

#[test]
#[ignore = "the part the test above plays in a child process"]
fn small_disk_child() {
    let root = std::env::var_os(ROOT).expect("set by the test that starts this one");
    let store = Store::open(Path::new(&root).join("store")).expect("a store");
    put_image(&store, "one", 1).expect("there is room for one");
    // Fill the disk up to where nothing fits any more, in steps that get smaller.
    let session = store.session().expect("a session");
    let mut length = 1 << 20;
    let mut refused = 0;
    for seed in 100.. {
        match put_object(&session, &content(seed, length)) {
            Ok(_) => {}
            Err(StoreError::Full { .. }) => refused += 1,
            Err(StoreError::Io { source, .. }) if source.kind() == std::io::ErrorKind::StorageFull => {
                refused += 1;
            }
            Err(error) => panic!("not the error of a full disk: {error:?}"),
        }
        check_all_files(&store);
        length /= 2;
        if length == 0 {
            break;
        }
    }
    assert!(refused > 0, "the disk was never full");
    let error = put_image(&store, "two", 2).expect_err("no room for two");
    assert!(matches!(error, StoreError::Full { .. } | StoreError::Io { .. }), "{error:?}");
    assert!(store.tag("two", "linux/amd64").expect("sound").is_none());
    check_all_files(&store);
    // Removing works on a full disk, and makes room.
    drop(session);
    store.untag("one", "linux/amd64").expect("untagged");
    store.collect().expect("collected");
    put_image(&store, "two", 2).expect("there is room now");
    check_image(&store, &store.tag("two", "linux/amd64").expect("sound").expect("tagged"));
}
