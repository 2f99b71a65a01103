//! Several layers as one file system.

use std::fs;
use std::io::Cursor;

use kiln_rootfs::{LayerReader, MergeError};
use kiln_testkit::tar::{Entry, Tar};

use crate::facts::{self, Facts, Kind};
use crate::machine::{device, kernel_facts, layer, merge, umoci_facts};

/// Compares with umoci and the kernel at once.
#[track_caller]
fn assert_as_umoci(tars: &[Tar]) -> Facts {
    let tars: Vec<_> = tars.iter().map(|tar| tar.clone().finish()).collect();
    let device = device(&tars);
    let facts = facts::of_image(&device);
    facts::assert_same(&facts, &umoci_facts(&tars));
    facts::assert_same(&kernel_facts(&device), &facts);
    facts
}

fn paths(facts: &Facts) -> Vec<&str> {
    facts.keys().map(|path| std::str::from_utf8(path).unwrap()).collect()
}

/// Every directory is described, since umoci leaves those that are not at the time of unpacking.
fn base() -> Tar {
    Tar::new().with(&Entry::dir("./")).with(&Entry::dir("t/"))
}

#[test]
fn a_file_deleted_and_added_again_is_the_new_one() {
    let facts = assert_as_umoci(&[
        base().with(&Entry::file("t/f", "first").mode(0o4755)).with(&Entry::file("t/g", "g")),
        base().with(&Entry::marker("t/.wh.f")).with(&Entry::marker("t/.wh.g")),
        base().with(&Entry::file("t/f", "third")),
    ]);
    assert_eq!(paths(&facts), ["", "t", "t/f"]);
    assert_eq!(facts[&b"t/f"[..]].kind, facts::content(&b"third"[..]));
    assert_eq!(facts[&b"t/f"[..]].mode, 0o644);
}

#[test]
fn an_opaque_directory_hides_lower_children_only() {
    for marker_first in [true, false] {
        let marker = Entry::marker("t/d/.wh..wh..opq");
        let mut second = base().with(&Entry::dir("t/d/").mode(0o700));
        if marker_first {
            second = second.with(&marker);
        }
        second = second.with(&Entry::file("t/d/upper", "u")).with(&Entry::dir("t/d/sub/"));
        if !marker_first {
            second = second.with(&marker);
        }
        let tars = [
            base()
                .with(&Entry::dir("t/d/"))
                .with(&Entry::file("t/d/lower", "l"))
                .with(&Entry::dir("t/d/sub/"))
                .with(&Entry::file("t/d/sub/lower", "l")),
            second,
            base().with(&Entry::dir("t/d/")).with(&Entry::file("t/d/third", "3")),
        ]
        .map(Tar::finish);
        let (mut facts, mut theirs) = (facts::of_image(&device(&tars)), umoci_facts(&tars));
        // umoci leaves this one at the time it took things out of it.
        for facts in [&mut facts, &mut theirs] {
            facts.get_mut(&b"t/d/sub"[..]).unwrap().mtime = (0, 0);
        }
        facts::assert_same(&facts, &theirs);
        assert_eq!(paths(&facts), ["", "t", "t/d", "t/d/sub", "t/d/third", "t/d/upper"]);
    }
}

#[test]
fn an_opaque_marker_in_a_new_directory_is_no_trouble() {
    let facts = assert_as_umoci(&[
        base().with(&Entry::file("t/f", "f")),
        base()
            .with(&Entry::dir("t/new/"))
            .with(&Entry::marker("t/new/.wh..wh..opq"))
            .with(&Entry::file("t/new/file", "n")),
    ]);
    assert_eq!(paths(&facts), ["", "t", "t/f", "t/new", "t/new/file"]);
}

#[test]
fn an_opaque_root_leaves_nothing_below() {
    let (first, second) =
        (base().with(&Entry::file("t/f", "")), Tar::new().with(&Entry::marker(".wh..wh..opq")));
    let device = device(&[first.finish(), second.with(&Entry::file("only", "")).finish()]);
    assert_eq!(paths(&facts::of_image(&device)), ["", "only"]);
}

#[test]
fn files_directories_and_links_change_place() {
    let facts = assert_as_umoci(&[
        base()
            .with(&Entry::file("t/file", "f"))
            .with(&Entry::dir("t/dir/"))
            .with(&Entry::file("t/dir/child", "c"))
            .with(&Entry::symlink("t/link", "dir"))
            .with(&Entry::dir("t/tree/"))
            .with(&Entry::dir("t/tree/a/"))
            .with(&Entry::file("t/tree/a/b", "b")),
        base()
            .with(&Entry::dir("t/file/"))
            .with(&Entry::file("t/file/child", "c"))
            .with(&Entry::file("t/dir", "d"))
            .with(&Entry::dir("t/link/").mode(0o750))
            .with(&Entry::marker("t/.wh.tree")),
        base()
            .with(&Entry::dir("t/tree/"))
            .with(&Entry::file("t/tree/c", "c"))
            .with(&Entry::marker("t/.wh.never-was")),
    ]);
    assert_eq!(paths(&facts), ["", "t", "t/dir", "t/file", "t/file/child", "t/link", "t/tree", "t/tree/c"]);
}

#[test]
fn a_directory_is_as_the_upper_layer_says_and_a_parent_that_none_describes_stays() {
    let facts = assert_as_umoci(&[
        base()
            .with(&Entry::dir("t/d/").mode(0o700).owner(5, 6).mtime(100).xattr("user.lower", "1"))
            .with(&Entry::file("t/d/lower", "l"))
            .with(&Entry::dir("t/kept/").mode(0o711).owner(7, 8).mtime(200).xattr("user.kept", "1")),
        base()
            .with(&Entry::dir("t/d/").mode(0o755).owner(1, 2).mtime(300).xattr("user.upper", "2"))
            .with(&Entry::file("t/d/upper", "u")),
    ]);
    assert_eq!(facts[&b"t/d"[..]].owner, (1, 2));
    let images = [
        base().with(&Entry::dir("t/kept/").mode(0o711).owner(7, 8).mtime(200).xattr("user.kept", "1")),
        // No entry for t nor for t/kept.
        Tar::new().with(&Entry::file("t/kept/file", "f")).with(&Entry::marker("t/kept/.wh.gone")),
    ]
    .map(|tar| layer(&tar.finish()));
    let facts = facts::of_image(&merge(&images).0);
    let kept = &facts[&b"t/kept"[..]];
    assert_eq!((kept.mode, kept.owner, kept.mtime), (0o711, (7, 8), (200, 0)));
    assert_eq!(kept.xattrs.keys().collect::<Vec<_>>(), [b"user.kept"]);
    assert!(facts.contains_key(&b"t/kept/file"[..]));
    assert_eq!(facts[&b""[..]].mtime, (1_600_000_000, 0), "the root is as the first layer says");
}

#[test]
fn hard_links_stay_links_within_and_across_layers() {
    let facts = assert_as_umoci(&[
        base()
            .with(&Entry::dir("t/a/"))
            .with(&Entry::file("t/a/one", "linked").xattr("user.l", "1"))
            .with(&Entry::hard_link("t/two", "t/a/one"))
            .with(&Entry::hard_link("t/three", "t/two"))
            .with(&Entry::file("t/alone", "alone"))
            .with(&Entry::symlink("t/symlink", "a")),
        base()
            .with(&Entry::marker("t/.wh.two"))
            // The layer below has these files.
            .with(&Entry::dir("t/b/"))
            .with(&Entry::hard_link("t/b/four", "t/a/one"))
            .with(&Entry::hard_link("t/b/five", "/t/b/four"))
            .with(&Entry::hard_link("t/b/alone-too", "t/alone"))
            .with(&Entry::hard_link("t/b/symlink-too", "t/symlink")),
        base().with(&Entry::file("t/three", "another file now")),
    ]);
    assert_eq!(facts[&b"t/a/one"[..]].links, (3, b"t/a/one".to_vec()));
    assert_eq!(facts[&b"t/b/five"[..]].links, (3, b"t/a/one".to_vec()));
    assert_eq!(facts[&b"t/alone"[..]].links.0, 2);
    assert_eq!(facts[&b"t/b/symlink-too"[..]].kind, Kind::Symlink(b"a".to_vec()));
    assert_eq!(facts[&b"t/three"[..]].links.0, 1);
}

#[test]
fn a_hard_link_to_nothing_below_is_an_error_that_names_it() {
    for target in ["nowhere", "below", "../../etc/shadow"] {
        let images = [base().with(&Entry::dir("below/")), base().with(&Entry::hard_link("t/l", target))]
            .map(|tar| layer(&tar.finish()));
        let readers = images.map(|image| LayerReader::open(Cursor::new(image)).unwrap());
        let error = kiln_rootfs::merge(&readers, Vec::new()).unwrap_err();
        let MergeError::LinkTarget { layer: 1, path } = error else { panic!("{error}") };
        assert_eq!(path, target.trim_start_matches("../"));
    }
}

#[test]
fn everything_a_file_can_be_survives_the_merge() {
    let capability = [1, 0, 0, 2, 0, 0x20, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0];
    let mut first = base()
        .with(&Entry::file("t/setuid", "s").mode(0o4755))
        .with(&Entry::file("t/owned", "o").owner(4_000_000_000, 3_000_000_001))
        .with(&Entry::file("t/capable", "c").mode(0o755).xattr("security.capability", capability))
        .with(&Entry::file("t/nanoseconds", "e").pax("mtime", "1600000000.123456789"))
        .with(&Entry::fifo("t/pipe").mode(0o640).owner(3, 4))
        .with(&Entry::char_device("t/null", 1, 3).mode(0o666))
        .with(&Entry::block_device("t/large-numbers", 259, 1_000_000))
        .with(&Entry::symlink("t/long-target", "x/".repeat(400)))
        .with(&Entry::file(b"t/not-utf8-\xff\xfe\x80", "n"))
        .with(&Entry::file(["t/", &"n".repeat(255)].concat(), "n"));
    let mut second = base();
    for size in [0, 1, 4095, 4096, 4097, 65_537] {
        let data: Vec<u8> = (0..size).map(|at| (at % 253) as u8).collect();
        first = first.with(&Entry::file(format!("t/first-{size}"), &data));
        second = second.with(&Entry::file(format!("t/second-{size}"), &data).xattr("user.x", "the same"));
    }
    assert_as_umoci(&[first, second]);
}

#[test]
fn sparse_files_of_upper_layers_find_their_data() {
    let sparse = |name: &str, byte: u8| {
        Entry::file(name, vec![byte; 5000])
            .pax("GNU.sparse.map", "0,1000,500000,4000")
            .pax("GNU.sparse.size", "1000000")
    };
    let tars = [base().with(&sparse("t/a", 1)), base().with(&sparse("t/b", 2))].map(Tar::finish);
    let facts = kernel_facts(&device(&tars));
    for (name, byte) in [(&b"t/a"[..], 1), (b"t/b", 2)] {
        let mut bytes = vec![0; 1_000_000];
        bytes[..1000].fill(byte);
        bytes[500_000..504_000].fill(byte);
        assert_eq!(facts[name].kind, facts::content(&bytes[..]));
    }
}

#[test]
fn eighty_layers_are_one_file_system() {
    let mut tars = Vec::new();
    for number in 0..80 {
        let mut tar = base()
            .with(&Entry::file("t/every", number.to_string()))
            .with(&Entry::file(format!("t/only-{number}"), vec![number as u8; 5000]));
        if number > 0 && number % 3 == 0 {
            tar = tar.with(&Entry::marker(format!("t/.wh.only-{}", number - 1)));
        }
        tars.push(tar.finish());
    }
    let facts = kernel_facts(&device(&tars));
    assert_eq!(facts[&b"t/every"[..]].kind, facts::content(&b"79"[..]));
    for number in 0..80_u8 {
        let fact = facts.get(format!("t/only-{number}").as_bytes());
        if number % 3 == 2 && number < 79 {
            assert_eq!(fact, None);
        } else {
            assert_eq!(fact.unwrap().kind, facts::content(&[number; 5000][..]));
        }
    }
}

#[test]
fn no_layers_are_an_empty_root() {
    let (device, summary) = merge(&[]);
    assert_eq!((facts::of_image(&device).len(), summary.inodes), (1, 1));
}

#[test]
fn the_merge_is_the_same_each_time_and_small() {
    let mut tar = base();
    for number in 0..1000 {
        tar = tar.with(&Entry::file(format!("t/file-{number:04}"), vec![1; 4096]));
    }
    let image = layer(&tar.finish());
    let (device, summary) = merge(std::slice::from_ref(&image));
    assert_eq!(device, merge(&[image]).0);
    // An inode and a directory entry for each file: compact, as all have one time.
    assert!(summary.metadata_bytes < 1000 * (32 + 12 + 9) + 3 * 4096, "{summary:?}");
}

#[test]
fn a_layer_image_of_its_own_is_what_its_only_merge_is() {
    let tar = base().with(&Entry::file("t/f", "f")).with(&Entry::hard_link("t/g", "t/f")).finish();
    let image = layer(&tar);
    facts::assert_same(&facts::of_image(&merge(std::slice::from_ref(&image)).0), &facts::of_image(&image));
    let dir = tempfile::TempDir::new().unwrap();
    fs::write(dir.path().join("image"), image).unwrap();
    crate::machine::fsck(&dir.path().join("image"));
}
