//! Snapshots in the store.

use std::ffi::OsString;
use std::fs;
use std::io::Read;
use std::os::unix::ffi::OsStringExt as _;
use std::os::unix::fs::FileExt;
use std::sync::mpsc;

use kiln_store::{
    ImageRecord, ObjectId, Session, SnapshotCommands, SnapshotImage, SnapshotKind, SnapshotRecord, Store,
    StoreError,
};
use kiln_support::digest::Digest;
use kiln_support::word::Word;

use crate::{check_all_files, content, empty_store, put_image};

/// Some of a snapshot's memory, and where.
fn put_memory(session: &Session, seed: u64) -> Result<ObjectId, StoreError> {
    let draft = session.new_draft()?;
    draft.file().set_len(8 << 20).expect("grown");
    draft.file().write_all_at(&content(seed, 5000), 1 << 20).expect("written");
    draft.adopt()
}

/// A template of an image, whose parts are not in the store yet.
pub(crate) fn snapshot_of(image: &ImageRecord, seed: u64) -> SnapshotRecord {
    SnapshotRecord {
        root: Some(Digest::of("root")),
        key: Digest::of(format!("key {seed}")),
        kind: SnapshotKind::Template,
        name: None,
        image: Some(SnapshotImage { reference: "one".into(), manifest: image.manifest }),
        service: None,
        commands: None,
        memory: ObjectId(Digest::EMPTY),
        state: Digest::EMPTY,
        scratch: Some(ObjectId(Digest::EMPTY)),
        memory_mib: 8,
        vcpus: 1,
        kernel: Digest::EMPTY,
        initramfs: Digest::EMPTY,
        created_unix_s: seed,
    }
}

/// Puts the parts of a snapshot, which differ with its time, and then the snapshot.
pub(crate) fn put_snapshot(store: &Store, snapshot: &SnapshotRecord) -> Result<SnapshotRecord, StoreError> {
    let session = store.session()?;
    let memory = put_memory(&session, snapshot.created_unix_s)?;
    let state = session.new_draft()?;
    state.file().write_all_at(format!("state {}", snapshot.created_unix_s).as_bytes(), 0).expect("written");
    let scratch = match snapshot.scratch {
        Some(_) => Some(put_memory(&session, snapshot.created_unix_s + 1_000_000)?),
        None => None,
    };
    let snapshot = SnapshotRecord { memory, state: state.adopt_as_blob()?, scratch, ..snapshot.clone() };
    session.put_snapshot(&snapshot)?;
    Ok(snapshot)
}

#[test]
fn a_snapshot_is_found_by_its_key_and_by_its_name() {
    let (_folder, store) = empty_store();
    let image = put_image(&store, "one", 1).expect("put");
    let wanted = SnapshotRecord { name: Some("ready".into()), ..snapshot_of(&image, 1) };
    let wanted = put_snapshot(&store, &wanted).expect("put");
    let mut open = store.open_snapshot(&wanted.key).expect("sound").expect("there");
    assert_eq!(open.record, wanted);
    let mut state = String::new();
    open.state.read_to_string(&mut state).expect("read");
    assert_eq!(state, "state 1");
    assert_eq!(open.memory.metadata().expect("known").len(), 8 << 20);
    for name in ["ready", &wanted.key.hex(), &wanted.key.hex()[..8], &wanted.key.to_string()] {
        assert_eq!(store.find_snapshot(name).expect("read"), Some(wanted.clone()), "{name}");
    }
    for name in ["read", &wanted.key.hex()[..5], ""] {
        assert_eq!(store.find_snapshot(name).expect("read"), None, "{name}");
    }
    assert!(store.open_snapshot(&Digest::EMPTY).expect("sound").is_none());
    check_all_files(&store);
}

#[test]
fn a_name_goes_over_to_the_newer_snapshot() {
    let (_folder, store) = empty_store();
    let image = put_image(&store, "one", 1).expect("put");
    let named = |seed| SnapshotRecord { name: Some("ready".into()), ..snapshot_of(&image, seed) };
    let old = put_snapshot(&store, &named(1)).expect("put");
    let new = put_snapshot(&store, &named(2)).expect("put");
    assert_eq!(store.find_snapshot("ready").expect("read"), Some(new));
    assert_eq!(store.snapshot(&old.key).expect("sound").expect("there").name, None);
}

#[test]
fn what_a_template_was_named_with_goes_with_the_name_and_what_a_machine_was_saved_with_stays() {
    let (_folder, store) = empty_store();
    let image = put_image(&store, "one", 1).expect("put");
    let env = ["A=1".into(), OsString::from_vec(vec![b'B', b'=', 0xff])].map(Word::from).to_vec();
    let commands = SnapshotCommands { env, user: "7".into(), working_directory: "/srv".into() };
    for (kind, stays) in [(SnapshotKind::Template, None), (SnapshotKind::Saved, Some(&commands))] {
        let (name, commands) = (Some("ready".into()), Some(commands.clone()));
        let old = SnapshotRecord { kind, name: name.clone(), commands, ..snapshot_of(&image, 1) };
        let old = put_snapshot(&store, &old).expect("put");
        assert_eq!(store.find_snapshot("ready").expect("read").as_ref(), Some(&old));
        put_snapshot(&store, &SnapshotRecord { name, ..snapshot_of(&image, 2) }).expect("put");
        let left = store.snapshot(&old.key).expect("sound").expect("there");
        assert_eq!((left.name, left.commands.as_ref()), (None, stays));
    }
}

#[test]
fn a_template_goes_with_the_last_tag_of_its_image_and_a_base_stays() {
    let (_folder, store) = empty_store();
    let image = put_image(&store, "one", 1).expect("put");
    let template = put_snapshot(&store, &snapshot_of(&image, 1)).expect("put");
    let base =
        SnapshotRecord { kind: SnapshotKind::Base, image: None, scratch: None, ..snapshot_of(&image, 2) };
    let base = put_snapshot(&store, &base).expect("put");
    store.bake_lock(&base.key).expect("locked");
    let collected = store.collect().expect("collected");
    assert_eq!((collected.snapshots, collected.objects, collected.blobs), (0, 0, 0));
    check_all_files(&store);

    let mut open = store.open_snapshot(&template.key).expect("sound").expect("there");
    store.untag("one", "linux/amd64").expect("untagged");
    let collected = store.collect().expect("collected");
    // The image's three objects and two blobs among them.
    assert_eq!((collected.snapshots, collected.objects, collected.blobs), (1, 5, 3));
    assert!(store.open_snapshot(&template.key).expect("sound").is_none());
    assert!(store.open_snapshot(&base.key).expect("sound").is_some());
    let mut read = String::new();
    open.state.read_to_string(&mut read).expect("an open snapshot stays readable");
    assert_eq!(read, "state 1");
    assert_eq!(fs::read_dir(store.root().join("locks")).expect("a folder").count(), 0);

    assert!(store.remove_snapshot(&base.key).expect("removed"));
    assert!(!store.remove_snapshot(&base.key).expect("nothing to remove"));
    assert_eq!(store.collect().expect("collected").objects, 1);
    check_all_files(&store);
}

#[test]
fn a_saved_machine_keeps_its_image() {
    let (_folder, store) = empty_store();
    let image = put_image(&store, "one", 1).expect("put");
    let saved = SnapshotRecord { kind: SnapshotKind::Saved, ..snapshot_of(&image, 1) };
    let saved = put_snapshot(&store, &saved).expect("put");
    store.untag("one", "linux/amd64").expect("untagged");
    let collected = store.collect().expect("collected");
    assert_eq!((collected.snapshots, collected.images, collected.objects, collected.blobs), (0, 0, 0, 0));
    let kept = store.image(&image.manifest).expect("sound").expect("there");
    store.image_objects(&kept).expect("with all it is made of");
    store.remove_snapshot(&saved.key).expect("removed");
    let collected = store.collect().expect("collected");
    assert_eq!((collected.images, collected.objects, collected.blobs), (1, 5, 3));
    check_all_files(&store);
}

#[test]
fn a_snapshot_that_lacks_a_part_is_none() {
    let (_folder, store) = empty_store();
    let image = put_image(&store, "one", 1).expect("put");
    let snapshot = put_snapshot(&store, &snapshot_of(&image, 1)).expect("put");
    let scratch = snapshot.scratch.expect("it has one").0.hex();
    fs::remove_file(store.root().join("objects").join(scratch)).expect("removed");
    assert!(store.open_snapshot(&snapshot.key).expect("sound").is_none());
}

#[test]
fn a_damaged_record_is_told_and_collected() {
    let (_folder, store) = empty_store();
    let image = put_image(&store, "one", 1).expect("put");
    let snapshot = put_snapshot(&store, &snapshot_of(&image, 1)).expect("put");
    let other = put_snapshot(&store, &snapshot_of(&image, 2)).expect("put");
    let path = store.root().join("snapshots").join(snapshot.key.hex());
    let mut record = fs::read(&path).expect("read");
    record[20] ^= 1;
    fs::write(&path, &record).expect("written");
    let damaged = store.open_snapshot(&snapshot.key).expect_err("a flipped bit");
    assert!(damaged.is_damage(), "{damaged}");
    let (sound, damaged) = store.snapshots().expect("listed");
    assert_eq!((sound, damaged), (vec![other.clone()], vec![snapshot.key]));
    let collected = store.collect().expect("collected");
    assert_eq!((collected.snapshots, collected.objects), (1, 2));

    // One under another's name.
    fs::copy(store.root().join("snapshots").join(other.key.hex()), &path).expect("copied");
    assert!(store.snapshot(&snapshot.key).expect_err("another's").is_damage());
}

#[test]
fn one_at_a_time_bakes_a_key() {
    let (_folder, store) = empty_store();
    let key = Digest::of("key");
    let first = store.try_bake_lock(&key).expect("locked").expect("nobody has it");
    assert!(store.try_bake_lock(&key).expect("asked").is_none());
    store.try_bake_lock(&Digest::of("another")).expect("locked").expect("keys do not hinder each other");
    let (sender, receiver) = mpsc::channel();
    std::thread::scope(|scope| {
        let waiting = scope.spawn(|| {
            sender.send("waits").expect("heard");
            let lock = store.bake_lock(&key).expect("locked");
            sender.send("has it").expect("heard");
            drop(lock);
        });
        assert_eq!(receiver.recv(), Ok("waits"));
        // A lock that somebody holds is not swept away.
        store.collect().expect("collected");
        assert!(store.try_bake_lock(&key).expect("asked").is_none());
        assert!(receiver.try_recv().is_err());
        drop(first);
        assert_eq!(receiver.recv(), Ok("has it"));
        waiting.join().expect("no panic");
    });
}

#[test]
fn a_store_made_before_there_were_snapshots_takes_them() {
    let (_folder, store) = empty_store();
    for folder in ["snapshots", "locks"] {
        fs::remove_dir(store.root().join(folder)).expect("removed");
    }
    let store = Store::open(store.root()).expect("opened");
    let image = put_image(&store, "one", 1).expect("put");
    put_snapshot(&store, &snapshot_of(&image, 1)).expect("put");
    check_all_files(&store);
}
