//! Archives and images made to do harm: an error or a confined tree, never a panic, never more memory than allowed.

use std::io::{self, Cursor, Read};

use kiln_rootfs::{LayerError, LayerReader, LayerSummary, Limits};
use kiln_testkit::tar::{Entry, Tar};
use proptest::prelude::*;

use crate::facts;
use crate::machine::layer;

fn small() -> Limits {
    Limits { entries: 1000, metadata_bytes: 4 << 20, image_bytes: 16 << 20 }
}

fn write(tar: &[u8]) -> Result<LayerSummary, LayerError> {
    kiln_rootfs::write_layer_within(&small(), tar, Cursor::new(Vec::new()))
}

/// A bit of everything.
fn entries() -> [Entry; 11] {
    [
        Entry::dir("d/"),
        Entry::file("d/f", vec![1; 3000]).xattr("user.a", "b"),
        Entry::hard_link("l", "d/f"),
        Entry::symlink("s", "d/f"),
        Entry::fifo("p"),
        Entry::char_device("c", 1, 3),
        Entry::file("n".repeat(180), "long name"),
        sparse("5000,10,90000,20", "100000", 30),
        Entry::marker(".wh.gone"),
        Entry::marker("d/.wh..wh..opq"),
        Entry::hard_link("lower", "not/in/this/layer"),
    ]
}

fn mixed() -> Tar {
    entries().iter().fold(Tar::new(), Tar::with)
}

fn sparse(map: &str, size: &str, stored: usize) -> Entry {
    Entry::file("sparse", vec![2; stored]).pax("GNU.sparse.map", map).pax("GNU.sparse.size", size)
}

#[test]
fn an_archive_cut_off_inside_an_entry_is_an_error() {
    let whole = mixed().finish();
    // Where an entry ends, with or without the padding of its data, the archive may end too.
    let mut ends = vec![0];
    let mut tar = Tar::new();
    for entry in entries() {
        tar = tar.with(&entry);
        let end = tar.clone().unfinished().len();
        ends.extend([end, end - (entry.data.len().next_multiple_of(512) - entry.data.len())]);
    }
    for cut in (0..=whole.len()).step_by(512).chain((0..whole.len()).step_by(97)).chain(ends.clone()) {
        let whole_so_far = write(&whole[..cut]).is_ok();
        // One block of zeros is end mark enough.
        let may_end = ends.contains(&cut) || cut >= whole.len() - 512;
        assert_eq!(whole_so_far, may_end, "cut at {cut} of {}", whole.len());
    }
}

#[test]
fn a_source_that_fails_is_told_from_an_archive_that_ends() {
    let whole = mixed().finish();
    struct Fails;
    impl Read for Fails {
        fn read(&mut self, _: &mut [u8]) -> io::Result<usize> {
            Err(io::Error::other("digest mismatch"))
        }
    }
    let result = kiln_rootfs::write_layer(whole[..1000].chain(Fails), Cursor::new(Vec::new()));
    assert!(matches!(result, Err(LayerError::Read(error)) if error.to_string() == "digest mismatch"));
    // A digest can only be found wrong at the end, after the archive's own.
    let result = kiln_rootfs::write_layer(whole[..].chain(Fails), Cursor::new(Vec::new()));
    assert!(matches!(result, Err(LayerError::Read(_))));
}

#[test]
fn a_source_that_comes_in_small_pieces_and_is_interrupted_gives_the_same_image() {
    struct Pieces<'a>(&'a [u8], usize);
    impl Read for Pieces<'_> {
        fn read(&mut self, out: &mut [u8]) -> io::Result<usize> {
            self.1 += 1;
            if self.1.is_multiple_of(3) {
                return Err(io::ErrorKind::Interrupted.into());
            }
            let length = out.len().min(self.1 % 700);
            self.0.read(&mut out[..length.max(1)])
        }
    }
    let whole = mixed().finish();
    let mut image = Cursor::new(Vec::new());
    kiln_rootfs::write_layer(Pieces(&whole, 0), &mut image).unwrap();
    assert!(image.into_inner() == layer(&whole));
}

#[test]
fn entries_that_cannot_be_in_a_root_are_refused_by_name() {
    let long = |bytes: usize| "d/".repeat(bytes / 2);
    let refused = [
        ("a name too long", Entry::file("n".repeat(256), "")),
        ("a path too long", Entry::file(long(4098), "")),
        ("a NUL in a path", Entry::file("x", "").pax("path", "a\0b")),
        ("the root as a file", Entry::file("./", "")),
        ("the root as a file by dots", Entry::symlink("a/../..", "x")),
        ("an empty target", Entry::symlink("s", "")),
        ("a target too long", Entry::symlink("s", "t".repeat(4096))),
        ("a whiteout of nothing", Entry::marker(".wh.")),
        ("a whiteout of the directory", Entry::marker("d/.wh..")),
        ("a whiteout of its parent", Entry::marker("d/.wh...")),
        ("a directory with two names", Entry::hard_link("l", "/")),
        ("a type of its own", Entry { kind: b'M', ..Entry::file("m", "") }),
        ("a device number too large", Entry::char_device("c", 4096, 0)),
        ("a device number too large", Entry::block_device("c", 0, 1 << 20)),
        ("an attribute too large", Entry::file("f", "").xattr("user.x", vec![0; 65_536])),
        ("a user that is no number", Entry::file("f", "").pax("uid", "4294967296")),
        ("a time that is none", Entry::file("f", "").pax("mtime", "yesterday")),
        ("a size that is none", Entry::file("f", "").pax("size", "-1")),
        ("a map that overlaps", sparse("0,20,10,10", "100", 30)),
        ("a map past the end", sparse("0,10,90,20", "100", 30)),
        ("a map of other data", sparse("0,10,50,10", "100", 30)),
        ("a map cut short", sparse("0,10,50", "100", 10)),
        ("a sparse file too large", sparse("0,30", "9223372036854775808", 30)),
        ("an unknown sparse form", sparse("0,30", "100", 30).pax("GNU.sparse.major", "2")),
    ];
    for (why, entry) in refused {
        let error = write(&Tar::new().with(&entry).finish()).expect_err(why);
        assert!(error.is_images_fault(), "{why}: {error}");
    }
}

#[test]
fn parents_that_are_files_and_endless_symlinks_are_refused() {
    let file_parent = Tar::new().with(&Entry::file("f", "")).with(&Entry::file("f/x", ""));
    assert!(matches!(write(&file_parent.finish()), Err(LayerError::Refused { .. })));
    let circle = Tar::new()
        .with(&Entry::symlink("a", "b"))
        .with(&Entry::symlink("b", "a"))
        .with(&Entry::file("a/x", ""));
    assert!(matches!(write(&circle.finish()), Err(LayerError::Refused { .. })));
    // Each link doubles the path, so that without a limit on steps this would take for ever.
    let mut tar = Tar::new().with(&Entry::dir("d/")).with(&Entry::symlink("l0", "d/../d/.."));
    for number in 1..40 {
        let before = format!("l{}", number - 1);
        tar = tar.with(&Entry::symlink(format!("l{number}"), format!("{before}/{before}/{before}")));
    }
    assert!(matches!(write(&tar.with(&Entry::file("l39/x", "")).finish()), Err(LayerError::Refused { .. })));
}

#[test]
fn limits_hold() {
    let many =
        (0..1001).fold(Tar::new(), |tar, number| tar.with(&Entry::fifo(format!("f{number}")))).finish();
    assert!(matches!(write(&many), Err(LayerError::TooLarge { limit: 1000, .. })));
    let large = Tar::new().with(&Entry::file("f", vec![0; 17 << 20])).finish();
    assert!(matches!(write(&large), Err(LayerError::TooLarge { .. })));
    // Refused by its size alone: the data is not there at all.
    let lies = Tar::new().with(&Entry::file("f", "").pax("size", "8000000000000")).finish();
    assert!(matches!(write(&lies), Err(LayerError::TooLarge { .. })));
    // A sparse file costs its map at least, and a block for each piece.
    let far: Vec<String> = (0..1000_u64).map(|at| format!("{},1", at << 40)).collect();
    let far = Tar::new().with(&sparse(&far.join(","), &(1_u64 << 51).to_string(), 1000)).finish();
    assert!(matches!(write(&far), Err(LayerError::TooLarge { .. })));
    let deep = (0..1000).fold(Tar::new(), |tar, number| {
        tar.with(&Entry::file(format!("{number}/{}", "d/".repeat(1900)), ""))
    });
    assert!(matches!(write(&deep.finish()), Err(LayerError::TooLarge { limit: 4_194_304, .. })));
    let header = Tar::new().with(&Entry::file("f", "").xattr("user.x", vec![0; 2 << 20])).finish();
    assert!(matches!(write(&header), Err(LayerError::TooLarge { limit: 1_048_576, .. })));
}

#[test]
fn a_long_path_through_symlinks_makes_a_tree_deeper_than_any_path() {
    let part = "d/".repeat(400);
    let mut tar = Tar::new().with(&Entry::dir(&part)).with(&Entry::symlink("l0", &part));
    let mut at = part.clone();
    for number in 1..8 {
        // Each step goes into the directory the last one reached, by way of the link to it.
        let below = format!("l{}/{part}", number - 1);
        tar = tar.with(&Entry::dir(&below));
        tar = tar.with(&Entry::symlink(format!("l{number}"), &below));
        at.push_str(&part);
    }
    let image = layer(&tar.finish());
    let reader = LayerReader::open(Cursor::new(&image)).unwrap();
    let mut merged = Vec::new();
    kiln_rootfs::merge(&[reader], &mut merged).unwrap();
    let deepest = facts::of_image(&merged).keys().map(|path| path.split(|&b| b == b'/').count()).max();
    assert_eq!(deepest, Some(3200));
}

#[test]
fn other_file_systems_are_not_layers() {
    for bytes in [vec![], vec![0; 4096], vec![0xff; 100_000]] {
        assert!(LayerReader::open(Cursor::new(bytes)).is_err());
    }
    let mut image = layer(&mixed().finish());
    image.extend([0; 4096]);
    assert!(LayerReader::open(Cursor::new(&image)).is_err(), "longer than it says");
    image.truncate(image.len() - 8192);
    assert!(LayerReader::open(Cursor::new(&image)).is_err(), "shorter than it says");
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 2000, ..ProptestConfig::default() })]

    #[test]
    fn arbitrary_bytes_are_never_more_than_an_error(bytes in prop::collection::vec(any::<u8>(), 1..5000)) {
        prop_assert!(write(&bytes).is_err());
    }

    #[test]
    fn a_damaged_archive_never_panics(changes in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..8)) {
        let mut tar = mixed().finish();
        for (place, byte) in changes {
            let place = place.index(tar.len());
            tar[place] = byte;
            // Right checksums, so that the damage is looked at.
            for header in tar.chunks_exact_mut(512) {
                header[148..156].fill(b' ');
                let sum: u32 = header.iter().map(|&byte| u32::from(byte)).sum();
                header[148..156].copy_from_slice(format!("{sum:06o}\0 ").as_bytes());
            }
        }
        let _ = write(&tar);
    }

    #[test]
    fn a_damaged_image_never_panics_and_what_is_read_can_be_merged(
        changes in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..6),
    ) {
        let whole = layer(&mixed().finish());
        let mut image = whole.clone();
        let metadata = 4096 * u32::from_le_bytes(image[1064..1068].try_into().unwrap()) as usize;
        for (place, byte) in changes {
            // Mostly the used part of the metadata, sometimes the superblock.
            let place = place.index(2000);
            let place = if place < 100 { 1024 + place } else { metadata + place - 100 };
            image[place] = byte;
        }
        if let Ok(reader) = LayerReader::open(Cursor::new(&image)) {
            let mut merged = Vec::new();
            let _ = kiln_rootfs::merge(&[reader], &mut merged);
        }
    }
}
