//! One layer: what is in the archive is in the image, whatever the archive's form.

use std::ffi::OsStr;
use std::fs::{self, File};
use std::io::{self, Cursor, Read, Seek, SeekFrom, Write};
use std::os::unix::ffi::OsStrExt as _;
use std::os::unix::fs::{FileExt as _, PermissionsExt as _, symlink};
use std::path::Path;
use std::process::Command;

use kiln_testkit::tar::{Entry, Tar};
use kiln_testkit::{capture, run};
use rustix::fs::{AtFlags, CWD, FileType, Mode, Timespec, Timestamps, XattrFlags};
use tempfile::TempDir;

use crate::facts::{self, Fact, Facts, Kind};
use crate::machine::{Mount, fsck, kernel_facts, layer, tar_facts, umoci_facts};

/// A tree with everything a root file system may have.
fn tree(root: &Path) {
    let at = |name: &str| root.join(name);
    for dir in ["usr", "usr/bin", "usr/lib", "dev", "run", "empty", "weird"] {
        fs::create_dir(at(dir)).unwrap();
    }
    fs::write(at("usr/bin/su"), vec![7; 5000]).unwrap();
    fs::write(at("usr/bin/ping"), vec![8; 4096]).unwrap();
    fs::write(at("usr/lib/empty"), "").unwrap();
    fs::write(at("usr/lib/large"), (0..3_000_000).map(|i| (i % 251) as u8).collect::<Vec<_>>()).unwrap();
    fs::hard_link(at("usr/bin/su"), at("usr/lib/su-too")).unwrap();
    fs::hard_link(at("usr/bin/su"), at("weird/su-three")).unwrap();
    symlink("usr/lib", at("lib")).unwrap();
    symlink("x".repeat(4000), at("weird/long-target")).unwrap();
    symlink("y".repeat(300), at("weird/target")).unwrap();
    symlink("/absolute/../../out", at("weird/out")).unwrap();
    fs::write(root.join(OsStr::from_bytes(b"weird/\xff\xfe\x80 \n")), "bytes").unwrap();
    fs::write(at("weird").join("n".repeat(255)), "long").unwrap();
    fs::write(at("weird/-"), "before the dots").unwrap();
    fs::write(at("weird/..."), "after the dots").unwrap();
    let mut deep = at("weird");
    for _ in 0..12 {
        deep.push("d".repeat(200));
        fs::create_dir(&deep).unwrap();
    }
    fs::write(deep.join("bottom"), "deep").unwrap();
    let node = |name: &str, kind, device| {
        rustix::fs::mknodat(CWD, at(name), kind, Mode::from_raw_mode(0o640), device)
            .expect("root makes devices");
    };
    node("dev/null", FileType::CharacterDevice, rustix::fs::makedev(1, 3));
    node("dev/far", FileType::CharacterDevice, rustix::fs::makedev(4095, 0xf_ffff));
    node("dev/disk", FileType::BlockDevice, rustix::fs::makedev(259, 300));
    node("run/pipe", FileType::Fifo, 0);
    rustix::fs::symlinkat("pipe", CWD, at("run/to-pipe")).unwrap();
    let sparse = |name: &str, bytes: u64, pieces: &[(u64, usize)]| {
        let file = File::create(at(name)).unwrap();
        file.set_len(bytes).unwrap();
        for &(offset, length) in pieces {
            file.write_all_at(&vec![b's'; length], offset).unwrap();
        }
    };
    sparse("weird/sparse", 10_000_001, &[(0, 10), (1_000_000, 70_000), (9_000_000, 1)]);
    sparse("weird/holes-only", 200 << 20, &[]);
    sparse("weird/sparse-end", 1 << 20, &[((1 << 20) - 1, 1)]);
    let many: Vec<(u64, usize)> = (0..200).map(|i| (i * 40_000, 4096)).collect();
    sparse("weird/sparse-many", 8_000_000, &many);

    let xattr = |name: &str, attribute: &str, value: &[u8]| {
        rustix::fs::lsetxattr(at(name), attribute, value, XattrFlags::empty()).unwrap();
    };
    let capability = [1, 0, 0, 2, 0, 0x20, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0];
    xattr("usr/bin/ping", "security.capability", &capability);
    xattr("usr/bin/su", "user.shared", b"the same value in two places");
    xattr("usr/lib", "user.shared", b"the same value in two places");
    xattr("usr/lib", "trusted.secret", b"\0\xff=\n");
    xattr("usr/lib/empty", "user.empty", b"");
    xattr("empty", "user.large", &[b'x'; 3000]);
    xattr("lib", "trusted.of-a-symlink", b"yes");
    xattr("dev/null", "trusted.of-a-device", b"yes");

    let owner =
        |name: &str, uid: u32, gid: u32| std::os::unix::fs::lchown(at(name), Some(uid), Some(gid)).unwrap();
    owner("usr/lib/empty", 65_536, 4_000_000_000);
    owner("lib", 12, 13);
    owner("empty", 70_000, 5);
    let mode =
        |name: &str, mode: u32| fs::set_permissions(at(name), fs::Permissions::from_mode(mode)).unwrap();
    mode("usr/bin/su", 0o4755);
    mode("usr/bin/ping", 0o2755);
    mode("run", 0o1777);
    mode("usr/lib/empty", 0);
    let time = |name: &str, tv_sec: i64, tv_nsec: i64| {
        let time = Timespec { tv_sec, tv_nsec };
        let times = Timestamps { last_access: time, last_modification: time };
        rustix::fs::utimensat(CWD, at(name), &times, AtFlags::SYMLINK_NOFOLLOW).unwrap();
    };
    time("usr/lib/large", 1, 999_999_999);
    time("usr/bin/ping", -2, 500_000_000);
    time("usr/lib/empty", 5_000_000_000, 0);
    time("lib", 3, 4);
    time("empty", 0, 0);
    time("", 1_700_000_000, 123);
}

/// The facts without parts of a second, which not every form of archive carries.
fn without_nanoseconds(mut facts: Facts) -> Facts {
    for fact in facts.values_mut() {
        fact.mtime.1 = 0;
    }
    facts
}

fn without_xattrs(mut facts: Facts) -> Facts {
    for fact in facts.values_mut() {
        fact.xattrs.clear();
    }
    facts
}

#[test]
fn a_tree_survives_every_form_that_gnu_tar_writes() {
    let dir = TempDir::new().unwrap();
    let root = dir.path().join("root");
    fs::create_dir(&root).unwrap();
    tree(&root);
    let truth = facts::of_directory(&root);
    let pack = |options: &[&str]| {
        capture(
            Command::new("tar")
                .args(["--numeric-owner", "-C"])
                .arg(&root)
                .args(options)
                .args(["-cf", "-", "."]),
        )
        .expect("tar packs the tree")
    };
    let xattrs = ["--format=pax", "--xattrs", "--xattrs-include=*"];
    for sparse in [
        &["--sparse", "--sparse-version=1.0"][..],
        &["--sparse", "--sparse-version=0.1"],
        &["--sparse", "--sparse-version=0.0"],
    ] {
        let image = layer(&pack(&[&xattrs, sparse].concat()));
        assert!(image.len() < 10 << 20, "holes are stored");
        facts::assert_same(&facts::of_image(&image), &truth);
        facts::assert_same(&kernel_facts(&image), &truth);
    }
    // This form has no times before 1970 either: GNU tar writes them, in base 256.
    let image = layer(&pack(&["--format=gnu", "--sparse"]));
    let seconds = without_xattrs(without_nanoseconds(truth.clone()));
    facts::assert_same(&facts::of_image(&image), &seconds);
    // No holes in these, so without the largest files; ustar has limits of its own on everything.
    fs::remove_file(root.join("weird/holes-only")).unwrap();
    let truth = facts::of_directory(&root);
    facts::assert_same(&facts::of_image(&layer(&pack(&xattrs))), &truth);
    fs::remove_dir_all(root.join("weird")).unwrap();
    fs::remove_file(root.join("dev/far")).unwrap();
    fs::write(root.join("usr").join("p".repeat(100)), "prefix and name").unwrap();
    std::os::unix::fs::lchown(root.join("usr/lib/empty"), Some(0), Some(0)).unwrap();
    let plain = Timestamps {
        last_access: Timespec { tv_sec: 9, tv_nsec: 0 },
        last_modification: Timespec { tv_sec: 9, tv_nsec: 0 },
    };
    rustix::fs::utimensat(CWD, root.join("usr/bin/ping"), &plain, AtFlags::empty()).unwrap();
    let truth = without_xattrs(without_nanoseconds(facts::of_directory(&root)));
    facts::assert_same(&facts::of_image(&layer(&pack(&["--format=ustar"]))), &truth);
    let v7 = ["--format=v7", "--exclude=./dev", "--exclude=./run"];
    let v7_tree: Facts = truth
        .into_iter()
        .filter(|(path, _)| !path.starts_with(b"dev") && !path.starts_with(b"run"))
        .collect();
    fs::remove_file(root.join("usr").join("p".repeat(100))).unwrap();
    let ours = facts::of_image(&layer(&pack(&v7)));
    for (path, fact) in &ours {
        // Removing a file has changed its directory's time.
        if path != b"usr" {
            assert_eq!(Some(fact), v7_tree.get(path), "{}", path.escape_ascii());
        }
    }
}

#[test]
fn the_same_archive_gives_the_same_bytes() {
    let tar = Tar::new()
        .with(&Entry::dir("a/"))
        .with(&Entry::file("a/b", "b").xattr("user.x", "1").mtime(5))
        .with(&Entry::file("a/c", "c").xattr("user.x", "1").mtime(6))
        .with(&Entry::file("a/d", "d").xattr("user.y", "1").mtime(6))
        .with(&Entry::file("a/e", "e").mtime(5))
        .finish();
    assert_eq!(layer(&tar), layer(&tar));
    let digest = kiln_testkit::layout::digest(&layer(&tar));
    // A change of these bytes asks for another FORMAT_VERSION: caches hold images by it.
    assert_eq!((kiln_rootfs::FORMAT_VERSION, digest.as_str()), (1, GOLDEN_DIGEST));
}

const GOLDEN_DIGEST: &str = "sha256:533d65903cd46cbcc6ad36de689605d80eea9d44972e044b96b3ac8dcd26e601";

#[test]
fn later_entries_replace_earlier_ones_as_unpacking_does() {
    let tar = Tar::new()
        .with(&Entry::dir("./"))
        .with(&Entry::file("twice", "first"))
        .with(&Entry::hard_link("keeps-first", "twice"))
        .with(&Entry::file("twice", "second").mode(0o600))
        .with(&Entry::dir("dir/").mode(0o700))
        .with(&Entry::file("dir/child", "child"))
        .with(&Entry::dir("dir/").mode(0o711).mtime(7))
        .with(&Entry::symlink("becomes-file", "dir"))
        .with(&Entry::file("becomes-file", "a file"))
        .with(&Entry::symlink("becomes-dir", "dir"))
        .with(&Entry::dir("becomes-dir/"))
        .with(&Entry::file("./file-becomes-dir", "f"))
        .with(&Entry::dir("file-becomes-dir"))
        .with(&Entry::file("file-becomes-dir/x", "x"))
        .with(&Entry::dir("gone/"))
        .with(&Entry::file("gone/child", "child"))
        .with(&Entry::file("gone", "a file now"))
        .with(&Entry::file("/absolute//odd/./path", "x").mtime(3))
        .with(&Entry::dir("absolute/odd").mtime(4))
        .with(&Entry::dir("absolute").mtime(5))
        .finish();
    let image = layer(&tar);
    let mut theirs = umoci_facts(&[tar]);
    // umoci leaves what it makes and then changes at the time of the change.
    let mut ours = facts::of_image(&image);
    for facts in [&mut ours, &mut theirs] {
        for path in [&b""[..], b"dir", b"file-becomes-dir", b"becomes-dir", b"absolute", b"absolute/odd"] {
            facts.get_mut(path).unwrap().mtime = (0, 0);
        }
        for fact in facts.values_mut() {
            fact.xattrs.clear();
        }
    }
    facts::assert_same(&ours, &theirs);
}

#[test]
fn entries_below_a_symlink_of_the_same_layer_go_where_it_points_inside_the_root() {
    let tar = Tar::new()
        .with(&Entry::dir("usr/"))
        .with(&Entry::symlink("lib", "usr/lib"))
        .with(&Entry::file("lib/a", "in usr/lib"))
        .with(&Entry::symlink("up", "../../../usr"))
        .with(&Entry::file("up/b", "in usr"))
        .with(&Entry::symlink("root", "/"))
        .with(&Entry::file("root/c", "in the root"))
        .with(&Entry::hard_link("d", "lib/a"))
        .with(&Entry::file("../../e", "in the root"))
        .with(&Entry::symlink("shadow", "/etc/shadow"))
        .with(&Entry::file("shadow", "a file in place of the link"))
        .finish();
    let facts = facts::of_image(&layer(&tar));
    let paths: Vec<_> = facts.keys().map(|path| String::from_utf8_lossy(path).into_owned()).collect();
    assert_eq!(
        paths,
        ["", "c", "d", "e", "lib", "root", "shadow", "up", "usr", "usr/b", "usr/lib", "usr/lib/a"]
    );
    assert_eq!(facts[&b"d"[..]].links, (2, b"d".to_vec()));
    assert_eq!(facts[&b"shadow"[..]].kind, facts::content(&b"a file in place of the link"[..]));
}

#[test]
fn whiteouts_are_in_the_image_as_overlayfs_has_them() {
    let tar = Tar::new()
        .with(&Entry::marker("dir/.wh.gone"))
        .with(&Entry::marker("dir/.wh..wh..opq"))
        .with(&Entry::dir("dir/").mode(0o700))
        .with(&Entry::marker(".wh.replaced"))
        .with(&Entry::file("replaced", "new"))
        .with(&Entry::dir("again/"))
        .with(&Entry::marker(".wh.again"))
        .with(&Entry::char_device("as-overlayfs", 0, 0))
        .with(&Entry::file(".wh..wh.plnk/1.2", "kept by aufs for its links"))
        .with(&Entry::hard_link("linked", ".wh..wh.plnk/1.2"))
        .finish();
    let facts = kernel_facts(&layer(&tar));
    let kinds: Vec<_> = facts.iter().map(|(path, fact)| (path.as_slice(), &fact.kind)).collect();
    let (file, linked) = (facts::content(&b"new"[..]), facts::content(&b"kept by aufs for its links"[..]));
    assert_eq!(
        kinds,
        [
            (&b""[..], &Kind::Directory),
            (b"again", &Kind::Directory),
            (b"as-overlayfs", &Kind::Char(0, 0)),
            (b"dir", &Kind::Directory),
            (b"dir/gone", &Kind::Char(0, 0)),
            (b"linked", &linked),
            (b"replaced", &file),
        ]
    );
    let opaque = |path: &[u8]| facts[path].xattrs.get(&b"trusted.overlay.opaque"[..]).map(Vec::as_slice);
    assert_eq!(opaque(b"dir"), Some(&b"y"[..]));
    // A whiteout beside a directory of its name hides the lower one.
    assert_eq!(opaque(b"again"), Some(&b"y"[..]));
    assert_eq!(facts[&b"linked"[..]].links.0, 1);
}

#[test]
fn a_directory_of_a_hundred_thousand_files_is_found_in_by_name() {
    const FILES: usize = 100_000;
    let name = |number: usize| format!("{}-{number}", number * 7919 % FILES);
    let mut tar = Tar::new().with(&Entry::dir("big/"));
    for number in 0..FILES {
        tar = tar
            .with(&Entry::file(format!("big/{}", name(number)), if number % 1000 == 0 { "x" } else { "" }));
    }
    let image = layer(&tar.finish());
    let mut file = tempfile::NamedTempFile::new().unwrap();
    file.write_all(&image).unwrap();
    fsck(file.path());
    let mount = Mount::new(file.path(), "ro");
    let big = mount.path().join("big");
    assert_eq!(fs::read_dir(&big).unwrap().count(), FILES);
    for number in (0..FILES).step_by(97) {
        assert_eq!(fs::metadata(big.join(name(number))).unwrap().len(), u64::from(number % 1000 == 0));
    }
    for missing in ["", "0", "~", "-1", "99999"] {
        assert!(missing.is_empty() || fs::metadata(big.join(missing)).is_err(), "{missing}");
    }
    assert_eq!(facts::of_image(&image).len(), FILES + 2);
}

/// A file that keeps runs of zeros as holes: what is large here is mostly zeros.
struct Holes(File);

impl Write for Holes {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        static ZEROS: [u8; 1 << 20] = [0; 1 << 20];
        let piece = &bytes[..bytes.len().min(ZEROS.len())];
        if *piece == ZEROS[..piece.len()] {
            self.0.seek(SeekFrom::Current(piece.len() as i64))?;
            return Ok(piece.len());
        }
        self.0.write(piece)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.0.flush()
    }
}

impl Seek for Holes {
    fn seek(&mut self, to: SeekFrom) -> io::Result<u64> {
        self.0.seek(to)
    }
}

#[test]
fn a_file_larger_than_four_gibibytes_keeps_its_size_and_its_end() {
    let bytes = (4_u64 << 30) + 10_000;
    // The size is in a pax record, as it would be for a file past ustar's 8 GiB, and zero in the header.
    let head = Tar::new().with(&Entry::file("large", "").pax("size", bytes.to_string())).unfinished();
    let tar = Cursor::new(head)
        .chain(&b"head"[..])
        .chain(io::repeat(0).take(bytes - 8))
        .chain(&b"tail"[..])
        .chain(io::repeat(0).take(bytes.next_multiple_of(512) - bytes + 1024));
    let image = tempfile::NamedTempFile::new().unwrap();
    let summary = kiln_rootfs::write_layer(tar, Holes(image.reopen().unwrap())).unwrap();
    image.as_file().set_len(summary.image_bytes).unwrap();
    let mount = Mount::new(image.path(), "ro");
    let large = File::open(mount.path().join("large")).unwrap();
    assert_eq!(large.metadata().unwrap().len(), bytes);
    let mut tail = [0; 10];
    large.read_exact_at(&mut tail, bytes - 10).unwrap();
    assert_eq!(&tail, b"\0\0\0\0\0\0tail");
    let mut head = [0; 5];
    large.read_exact_at(&mut head, 0).unwrap();
    assert_eq!(&head, b"head\0");
}

#[test]
fn a_sparse_file_larger_than_four_gibibytes_costs_what_its_data_costs() {
    let bytes = 5_u64 << 30;
    let entry = Entry::file("sparse", "head--tail")
        .pax("GNU.sparse.map", format!("0,6,{},4", bytes - 4))
        .pax("GNU.sparse.size", bytes.to_string());
    let image = layer(&Tar::new().with(&entry).finish());
    assert!(image.len() < 1 << 20, "{}", image.len());
    let mut file = tempfile::NamedTempFile::new().unwrap();
    file.write_all(&image).unwrap();
    let mount = Mount::new(file.path(), "ro");
    let sparse = File::open(mount.path().join("sparse")).unwrap();
    assert_eq!(sparse.metadata().unwrap().len(), bytes);
    for (offset, expected) in
        [(0, b"head--\0\0"), (3 << 30, b"\0\0\0\0\0\0\0\0"), (bytes - 8, b"\0\0\0\0tail")]
    {
        let mut found = [0; 8];
        sparse.read_exact_at(&mut found, offset).unwrap();
        assert_eq!(&found, expected);
    }
}

#[test]
fn the_output_is_written_in_order_but_for_the_first_block() {
    /// Notes where writing goes on elsewhere.
    struct Watched(Cursor<Vec<u8>>, Vec<u64>);
    impl Write for Watched {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            self.0.write(bytes)
        }
        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }
    impl Seek for Watched {
        fn seek(&mut self, to: SeekFrom) -> io::Result<u64> {
            let place = self.0.seek(to)?;
            self.1.push(place);
            Ok(place)
        }
    }
    let mut tar = Tar::new();
    for number in 0..300 {
        tar = tar.with(&Entry::file(format!("f{number}"), vec![1; number * 100]));
    }
    let tar = tar.finish();
    let mut watched = Watched(Cursor::new(Vec::new()), Vec::new());
    kiln_rootfs::write_layer(&tar[..], &mut watched).unwrap();
    assert_eq!(watched.1, [0]);
    assert!(watched.0.position() <= 4096);
    assert_eq!(watched.0.into_inner(), layer(&tar));
}

#[test]
fn the_stream_is_read_to_its_end() {
    let mut tar = Tar::new().with(&Entry::file("f", "data")).finish();
    tar.extend([0; 20 * 512]);
    let mut reader = Cursor::new(&tar);
    kiln_rootfs::write_layer(&mut reader, Cursor::new(Vec::new())).unwrap();
    assert_eq!(reader.position(), tar.len() as u64);
}

#[test]
fn attributes_without_a_place_are_counted_and_those_of_the_overlay_kept_out() {
    let tar = Tar::new()
        .with(
            &Entry::dir("d/")
                .xattr("trusted.overlay.opaque", "y")
                .xattr("trusted.overlay.redirect", "/etc")
                .xattr("trusted.kiln.link", "etc/shadow")
                .xattr("nosuch.namespace", "x")
                .xattr("trusted.kept", "x"),
        )
        .finish();
    let mut image = Cursor::new(Vec::new());
    let summary = kiln_rootfs::write_layer(&tar[..], &mut image).unwrap();
    assert_eq!(summary.dropped_xattrs, 4);
    let facts = facts::of_image(image.get_ref());
    let names: Vec<_> = facts[&b"d"[..]].xattrs.keys().collect();
    assert_eq!(names, [b"trusted.kept"]);
}

#[test]
fn many_distinct_and_shared_attributes_are_all_readable() {
    let mut tar = Tar::new().with(&Entry::dir("./"));
    for number in 0..200 {
        let mut entry = Entry::file(format!("f{number}"), "x");
        for attribute in 0..number % 20 {
            entry = entry.xattr(&format!("user.shared{attribute}"), vec![b'v'; attribute * 9]);
        }
        tar = tar.with(&entry.xattr("user.own", number.to_string().repeat(number)));
    }
    let tar = tar.finish();
    let image = layer(&tar);
    let theirs = tar_facts(&tar);
    facts::assert_same(&facts::of_image(&image), &theirs);
    facts::assert_same(&kernel_facts(&image), &theirs);
}

#[test]
fn an_empty_layer_is_an_image_of_an_empty_root() {
    let facts = kernel_facts(&layer(&Tar::new().finish()));
    let root: &Fact = &facts[&b""[..]];
    assert_eq!((facts.len(), &root.kind, root.mode), (1, &Kind::Directory, 0o755));
}

#[test]
fn fsck_extracts_what_the_tree_was() {
    let tar = Tar::new()
        .with(&Entry::dir("./").mtime(3))
        .with(&Entry::dir("d/").mode(0o750).owner(5, 6).mtime(4))
        .with(&Entry::file("d/f", vec![b'f'; 9000]).mode(0o711).owner(7, 8).mtime(5))
        .with(&Entry::symlink("s", "d/f").mtime(6))
        .finish();
    let dir = TempDir::new().unwrap();
    let (image, out) = (dir.path().join("image"), dir.path().join("out"));
    fs::write(&image, layer(&tar)).unwrap();
    run(Command::new("fsck.erofs").arg(format!("--extract={}", out.display())).arg(&image))
        .expect("fsck.erofs extracts (apt package erofs-utils)");
    facts::assert_same(&facts::of_directory(&out), &facts::of_image(&layer(&tar)));
}
