extern crate std;

use alloc::borrow::ToOwned as _;
use alloc::format;
use alloc::string::{String, ToString as _};
use alloc::vec;
use alloc::vec::Vec;
use std::fs::{self, File};
use std::os::unix::ffi::OsStrExt as _;
use std::os::unix::fs::{MetadataExt as _, PermissionsExt as _, symlink};
use std::path::{Path, PathBuf};

use kiln_protocol::Entry;
use proptest::prelude::*;
use rustix::fs::{CWD, FileType, Mode};
use rustix::io::Errno;

use super::*;

const ANYTHING: Limits = Limits { entries: u64::MAX, bytes: u64::MAX, mode: 0o7777 };

fn scratch() -> (tempfile::TempDir, PathBuf) {
    let directory = tempfile::tempdir().expect("a temporary directory");
    let path = directory.path().to_owned();
    (directory, path)
}

fn bytes(path: &Path) -> &[u8] {
    path.as_os_str().as_bytes()
}

fn writer(to: &Path, naming: Naming<'_>, limits: Limits) -> Result<Writer, Failure> {
    Ok(Writer::new(Place::find(bytes(to), naming)?, Owner::Maker, limits))
}

fn copy(from: &str, to: &Path, naming: Naming<'_>) -> Result<Counts, Failure> {
    let mut walker = Walker::tree(from.as_bytes())?;
    let mut writer = writer(to, naming, ANYTHING)?;
    loop {
        let mut data = vec![];
        match walker.next(&mut data, 1000)? {
            Step::Entry(entry) => writer.entry(entry)?,
            Step::Data(_) => writer.data(&data)?,
            Step::End => return writer.finish(),
        }
    }
}

fn make(to: &Path, entries: &[Entry]) -> Result<Counts, Failure> {
    let mut writer = writer(to, Naming::Exact, ANYTHING)?;
    for entry in entries {
        writer.entry(entry.clone())?;
    }
    writer.finish()
}

fn directory(depth: u32, name: &str) -> Entry {
    Entry { depth, name: name.into(), mode: 0o040_755, ..Entry::default() }
}

fn file(depth: u32, name: &str) -> Entry {
    Entry { depth, name: name.into(), mode: 0o100_644, ..Entry::default() }
}

fn link(depth: u32, name: &str, target: &str) -> Entry {
    Entry { depth, name: name.into(), mode: 0o120_777, target: target.into(), ..Entry::default() }
}

/// All below a directory: path, mode, time, and contents or target.
fn listing(root: &Path) -> Vec<(String, u32, i64, Vec<u8>)> {
    let mut found = vec![];
    let mut waiting = vec![root.to_owned()];
    while let Some(path) = waiting.pop() {
        let metadata = fs::symlink_metadata(&path).expect("it is there");
        let contents = if metadata.is_symlink() {
            fs::read_link(&path).expect("a link").as_os_str().as_bytes().to_vec()
        } else if metadata.is_dir() {
            waiting.extend(fs::read_dir(&path).expect("a directory").map(|entry| entry.expect("one").path()));
            vec![]
        } else {
            fs::read(&path).expect("a file")
        };
        let name = path.strip_prefix(root).expect("below").to_string_lossy().to_string();
        found.push((name, metadata.mode(), metadata.mtime_nsec() ^ metadata.mtime(), contents));
    }
    found.sort();
    found
}

fn names(root: &Path) -> Vec<String> {
    listing(root).into_iter().map(|(name, ..)| name).filter(|name| !name.is_empty()).collect()
}

/// A tree with one of each.
fn sample(root: &Path) {
    fs::create_dir_all(root.join("a/b/c")).expect("directories");
    fs::write(root.join("a/large"), vec![7; 70_000]).expect("a file");
    fs::write(root.join("a/b/empty"), "").expect("a file");
    fs::write(root.join("a/b/c/tool"), "#!").expect("a file");
    fs::set_permissions(root.join("a/b/c/tool"), fs::Permissions::from_mode(0o4751)).expect("a mode");
    symlink("/no/such/file", root.join("a/dangling")).expect("a link");
    symlink("b", root.join("a/link")).expect("a link");
    File::create(root.join(std::ffi::OsStr::from_bytes(b"a/\xff name"))).expect("a file");
    fs::set_permissions(root.join("a/b"), fs::Permissions::from_mode(0o555)).expect("a mode");
}

#[test]
fn a_tree_comes_out_as_it_went_in() {
    let (_guard, root) = scratch();
    sample(&root);
    let counts = copy(&format!("{}/a", root.display()), &root.join("copy"), Naming::Exact).expect("copied");
    assert_eq!(counts, Counts { files: 4, directories: 3, links: 2, skipped: 0, bytes: 70_002 });
    assert_eq!(listing(&root.join("copy")), listing(&root.join("a")));
}

#[test]
fn names_follow_docker_cp() {
    let (_guard, root) = scratch();
    sample(&root);
    let at = |path: &str| format!("{}/{path}", root.display());
    fs::create_dir(root.join("there")).expect("a directory");
    let into = |from: &str, name: &str, to: &str| {
        copy(&at(from), &root.join(to), Naming::Into(name.as_bytes())).map_err(|failure| failure.error)
    };
    let tool = "a/b/c/tool";
    into(tool, "tool", "new").expect("a file of that name");
    into(tool, "tool", "new").expect("in its place");
    into(tool, "tool", "there").expect("into the directory");
    into("a/b/c", "c", "there").expect("into the directory");
    into("a/b/c", "c", "made").expect("as that directory");
    into("a/b/c", "c", "made-too/").expect("as that directory");
    assert_eq!(into(tool, "tool", "missing/"), Err(Errno::NOTDIR));
    assert_eq!(into(tool, "tool", "missing/below"), Err(Errno::NOENT));
    assert_eq!(into("a/b/c", "c", "new"), Err(Errno::NOTDIR));
    assert_eq!(into(tool, "there", "."), Err(Errno::ISDIR));
    copy(&at("a/b/c/."), &root.join("there"), Naming::Contents).expect("what is in it");
    copy(&at("a/b/c/."), &root.join("fresh"), Naming::Contents).expect("as that directory");
    copy(&at("a/link/."), &root.join("followed"), Naming::Contents).expect("where the link leads");
    let mut found = names(&root);
    found.retain(|name| !name.starts_with("a/") && name != "a");
    assert_eq!(
        found,
        [
            "followed",
            "followed/c",
            "followed/c/tool",
            "followed/empty",
            "fresh",
            "fresh/tool",
            "made",
            "made-too",
            "made-too/tool",
            "made/tool",
            "new",
            "there",
            "there/c",
            "there/c/tool",
            "there/tool"
        ]
    );
}

#[test]
fn what_has_no_name_or_place_of_its_own_is_refused() {
    let (_guard, root) = scratch();
    let to = root.join("in");
    for name in ["..", ".", "", "a/b", "/etc", "nul\0", &"x".repeat(256)] {
        let made = make(&to, &[directory(0, ""), file(1, name)]);
        assert_eq!(made.map_err(|failure| failure.error), Err(Errno::INVAL), "{name}");
    }
    for entries in [
        &[][..],
        &[file(1, "x")],
        &[directory(0, ""), directory(0, "")],
        &[directory(0, ""), file(2, "x")],
        &[file(0, ""), file(1, "x")],
        &[directory(0, ""), directory(1, "a"), file(1, "b"), file(2, "c")],
        &[directory(0, ""), link(1, "a", "")],
        &[directory(0, ""), link(1, "a", "x\0")],
    ] {
        let (_guard, root) = scratch();
        let made = make(&root.join("in"), entries).map_err(|failure| failure.error);
        assert_eq!(made, Err(Errno::INVAL), "{entries:?}");
    }
    assert_eq!(names(&root), ["in"]);
}

#[test]
fn no_link_is_followed_on_the_way() {
    let (_guard, root) = scratch();
    let (to, outside) = (root.join("in"), root.join("outside"));
    fs::create_dir(&outside).expect("a directory");
    fs::write(outside.join("file"), "untouched").expect("a file");
    let target = outside.to_str().expect("ASCII");
    let through = make(&to, &[directory(0, ""), link(1, "a", target), directory(1, "a"), file(2, "file")]);
    assert_eq!(through.map_err(|failure| failure.error), Err(Errno::NOTDIR));
    let over = [directory(0, ""), link(1, "b", &format!("{target}/file")), file(1, "b")];
    make(&to, &over).expect("the link is replaced");
    assert!(fs::symlink_metadata(to.join("b")).expect("a file").is_file());
    assert_eq!(fs::read(outside.join("file")).expect("the file"), b"untouched");
    assert_eq!(names(&outside), ["file"]);
}

#[test]
fn what_is_not_complete_has_no_name() {
    let (_guard, root) = scratch();
    fs::write(root.join("file"), "old").expect("a file");
    let mut writing = writer(&root.join("file"), Naming::Exact, ANYTHING).expect("a place");
    writing.entry(file(0, "")).expect("a file");
    writing.data(b"new").expect("contents");
    assert_eq!(fs::read(root.join("file")).expect("the file"), b"old");
    assert_eq!(names(&root).len(), 2);
    drop(writing);
    assert_eq!(names(&root), ["file"]);
    assert_eq!(fs::read(root.join("file")).expect("the file"), b"old");
}

#[test]
fn limits_hold() {
    let (_guard, root) = scratch();
    let to = root.join("in");
    let mut few = writer(&to, Naming::Exact, Limits { entries: 2, ..ANYTHING }).expect("a place");
    few.entry(directory(0, "")).expect("one");
    few.entry(file(1, "a")).expect("two");
    assert_eq!(few.entry(file(1, "b")).map_err(|failure| failure.error), Err(Errno::FBIG));
    let mut small = writer(&to, Naming::Exact, Limits { bytes: 3, ..ANYTHING }).expect("a place");
    small.entry(directory(0, "")).expect("a directory");
    small.entry(file(1, "a")).expect("a file");
    small.data(b"abc").expect("as much as there may be");
    assert_eq!(small.data(b"d").map_err(|failure| failure.error), Err(Errno::FBIG));
    let deep: Vec<_> =
        (0..=MAX_DEPTH as u32).map(|depth| directory(depth, if depth == 0 { "" } else { "d" })).collect();
    make(&to, &deep[..MAX_DEPTH]).expect("as deep as it may be");
    assert_eq!(make(&to, &deep).map_err(|failure| failure.error), Err(Errno::NAMETOOLONG));
    let mut deepest = to;
    for _ in 1..MAX_DEPTH {
        deepest.push("d");
    }
    Walker::tree(bytes(&root.join("in"))).expect("a walk");
    fs::create_dir(deepest.join("d")).expect("a directory");
    let too_deep = copy(root.join("in").to_str().expect("ASCII"), &root.join("out"), Naming::Exact);
    assert_eq!(too_deep.map_err(|failure| failure.error), Err(Errno::NAMETOOLONG));
}

#[test]
fn of_a_mode_only_what_is_wanted_is_kept() {
    let (_guard, root) = scratch();
    let limits = Limits { mode: 0o777, ..ANYTHING };
    let mut writing = writer(&root.join("tool"), Naming::Exact, limits).expect("a place");
    writing.entry(Entry { mode: 0o106_755, ..file(0, "") }).expect("a file");
    writing.finish().expect("a file");
    assert_eq!(fs::metadata(root.join("tool")).expect("the file").mode() & 0o7777, 0o755);
}

#[test]
fn a_directory_that_is_there_stays_as_it_is() {
    let (_guard, root) = scratch();
    let to = root.join("in");
    fs::create_dir_all(to.join("kept")).expect("directories");
    fs::set_permissions(&to, fs::Permissions::from_mode(0o711)).expect("a mode");
    fs::write(to.join("kept/file"), "x").expect("a file");
    make(&to, &[directory(0, ""), directory(1, "kept"), file(2, "more")]).expect("added to");
    assert_eq!(fs::metadata(&to).expect("it").mode() & 0o7777, 0o711);
    assert_eq!(names(&to), ["kept", "kept/file", "kept/more"]);
    let in_the_way = make(&to, &[directory(0, ""), file(1, "kept")]);
    assert_eq!(in_the_way.map_err(|failure| failure.error), Err(Errno::ISDIR));
    assert_eq!(names(&to), ["kept", "kept/file", "kept/more"]);
}

#[test]
fn what_is_no_file_is_counted_and_left_out_unopened() {
    let (_guard, root) = scratch();
    fs::create_dir(root.join("a")).expect("a directory");
    rustix::fs::mknodat(CWD, root.join("a/fifo"), FileType::Fifo, Mode::RWXU, 0).expect("a fifo");
    let _listener = std::os::unix::net::UnixListener::bind(root.join("a/socket")).expect("a socket");
    let counts = copy(&format!("{}/a", root.display()), &root.join("b"), Naming::Exact).expect("copied");
    assert_eq!((counts.skipped, counts.files), (2, 0));
    assert!(names(&root.join("b")).is_empty());
    let fifo = Walker::file(bytes(&root.join("a/fifo")));
    assert_eq!(fifo.map(drop).map_err(|failure| failure.error), Err(Errno::INVAL));
}

#[test]
fn a_tree_may_change_while_it_is_walked() {
    let (_guard, root) = scratch();
    let from = root.join("a");
    fs::create_dir(&from).expect("a directory");
    for name in ["file", "gone", "cut"] {
        fs::write(from.join(name), "0123456789").expect("a file");
    }
    fs::create_dir(from.join("becomes")).expect("a directory");
    let mut walker = Walker::tree(bytes(&from)).expect("a walk");
    let mut out = vec![];
    let mut next = || walker.next(&mut out, 4).expect("a walk goes on");
    assert!(matches!(next(), Step::Entry(_)));
    // The names have been read once there is one.
    let first = loop {
        if let Step::Entry(entry) = next() {
            break entry.name;
        }
    };
    for name in ["file", "gone", "cut"] {
        if name.as_bytes() != first {
            fs::remove_file(from.join(name)).expect("a file");
        }
    }
    if first != b"becomes" {
        fs::remove_dir(from.join("becomes")).expect("a directory");
        fs::write(from.join("becomes"), "a file").expect("a file");
    }
    for _ in 0..100 {
        match next() {
            Step::End => return,
            Step::Entry(entry) => assert_eq!(entry.name, b"becomes"),
            Step::Data(_) => {}
        }
    }
    panic!("no end");
}

#[test]
fn a_file_that_grows_is_cut_and_one_without_a_size_is_read_to_its_end() {
    let (_guard, root) = scratch();
    let path = root.join("log");
    fs::write(&path, "0123").expect("a file");
    let mut walker = Walker::file(bytes(&path)).expect("a file");
    fs::write(&path, "0123456789").expect("more");
    let mut out = vec![];
    while walker.next(&mut out, 3).expect("a file") != Step::End {}
    assert_eq!(out, b"0123");
    let mut walker = Walker::file(b"/proc/self/status").expect("a file");
    let mut out = vec![];
    while walker.next(&mut out, 100).expect("a file") != Step::End {}
    assert!(out.starts_with(b"Name:") && out.len() > 100);
}

fn any_entry() -> impl Strategy<Value = Entry> {
    let name = prop::sample::select(vec!["", "a", "b", "..", ".", "a/b", "/tmp", "c\0"]);
    let kind = prop::sample::select(vec![0o040_000_u32, 0o100_000, 0o120_000, 0o010_000, 0]);
    let target = prop::sample::select(vec!["", "..", "../outside", "/", "a"]);
    (0..4_u32, name, kind, 0..0o10000_u32, target, any::<i64>(), any::<u32>()).prop_map(
        |(depth, name, kind, mode, target, mtime_s, mtime_ns)| Entry {
            depth,
            name: name.into(),
            // A directory that its maker may not use ends the run early.
            mode: kind | mode | 0o700,
            target: target.into(),
            mtime_s,
            mtime_ns,
            ..Entry::default()
        },
    )
}

proptest! {
    #[test]
    fn nothing_outside_of_the_root_is_touched(
        entries in prop::collection::vec((any_entry(), any::<bool>()), 0..24),
        named in any::<bool>(),
    ) {
        let (_guard, root) = scratch();
        fs::create_dir(root.join("outside")).expect("a directory");
        fs::write(root.join("outside/a"), "untouched").expect("a file");
        fs::create_dir(root.join("to")).expect("a directory");
        let naming = if named { Naming::Into(b"in") } else { Naming::Contents };
        let before = listing(&root.join("outside"));
        let mut writer = writer(&root.join("to"), naming, ANYTHING).expect("a place");
        for (entry, contents) in entries {
            let went_on = writer.entry(entry).and_then(|()| if contents { writer.data(b"x") } else { Ok(()) });
            if went_on.is_err() {
                break;
            }
        }
        let _ = writer.finish();
        prop_assert_eq!(listing(&root.join("outside")), before);
        prop_assert_eq!(fs::read_dir(&root).expect("the directory").count(), 2);
        let left_aside = names(&root.join("to")).iter().any(|name| name.contains(".kiln-"));
        prop_assert!(!left_aside);
    }
}
