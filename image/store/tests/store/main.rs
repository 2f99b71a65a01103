//! The store as several processes see it: sharing, collecting, damage, crashes, a full disk.

mod crash;
mod full;
mod snapshots;

use std::fs;
use std::io::{Read, Write};
use std::os::unix::fs::FileExt;
use std::path::Path;

use kiln_store::{ImageRecord, LayerRecord, ObjectId, Session, Store, StoreError, Tag};
use kiln_support::digest::Digest;

const FORMAT: u32 = 1;

fn empty_store() -> (tempfile::TempDir, Store) {
    let folder = tempfile::tempdir().expect("a folder");
    let store = Store::open(folder.path().join("store")).expect("a store");
    (folder, store)
}

/// Content that differs with `seed` and has all kinds of blocks.
fn content(seed: u64, length: usize) -> Vec<u8> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    (0..length)
        .map(|_| {
            state = state.wrapping_mul(0x5851_f42d_4c95_7f2d).wrapping_add(seed);
            (state >> 56) as u8
        })
        .collect()
}

fn put_object(session: &Session, content: &[u8]) -> Result<ObjectId, StoreError> {
    let mut writer = session.new_object()?;
    writer.write_all(content).map_err(|source| StoreError::Io {
        action: "write",
        path: "an object".into(),
        source,
    })?;
    writer.finish()
}

/// Puts an image of two layers made up from `seed` and tags it `name`.
fn put_image(store: &Store, name: &str, seed: u64) -> Result<ImageRecord, StoreError> {
    let session = store.session()?;
    let config = session.put_blob(format!("config {seed}").as_bytes())?;
    let manifest = session.put_blob(format!("manifest {seed}").as_bytes())?;
    let mut layers = Vec::new();
    for layer in 0..2 {
        let content = content(seed * 10 + layer, 150_000);
        let layer = LayerRecord { diff_id: Digest::of(&content), object: put_object(&session, &content)? };
        session.put_layer(layer, FORMAT)?;
        layers.push(layer);
    }
    let merged = put_object(&session, &content(seed * 10 + 2, 5000))?;
    let image = ImageRecord { manifest, config, layers, merged, format: FORMAT };
    session.put_image(&image)?;
    session.put_tag(&Tag {
        name: name.to_owned(),
        platform: "linux/amd64".to_owned(),
        target: manifest,
        manifest,
        pulled_unix_s: seed,
    })?;
    Ok(image)
}

/// Checks that the image `tag` means is there, all of it, to the last byte.
fn check_image(store: &Store, tag: &Tag) -> ImageRecord {
    let image = store.image(&tag.manifest).expect("a sound record").expect("the image of a tag");
    for blob in [&image.manifest, &image.config] {
        store.blob(blob).expect("a sound blob").expect("a blob of the image");
    }
    for object in store.image_objects(&image).expect("the objects of the image") {
        object.verify().expect("every block");
    }
    image
}

/// Checks every file of the store by its name, referred to or not: nothing half-written is ever in place.
fn check_all_files(store: &Store) {
    let names = |folder: &str| -> Vec<String> {
        fs::read_dir(store.root().join(folder))
            .expect("a folder")
            .map(|entry| entry.expect("an entry").file_name().into_string().expect("text"))
            .collect()
    };
    for name in names("blobs") {
        let name = Digest::from_hex(&name).expect("a digest");
        store.blob(&name).expect("a sound blob").expect("listed");
    }
    for name in names("objects") {
        if !name.ends_with(".digests") {
            let id = ObjectId(Digest::from_hex(&name).expect("a digest"));
            store.object(id).expect("an object").verify().expect("every block");
        }
    }
    for name in names("layers") {
        let diff_id = Digest::from_hex(name.split_once('.').expect("a format").0).expect("a digest");
        let layer = store.layer(&diff_id, FORMAT).expect("a sound record").expect("listed");
        store.object(layer.object).expect("the layer's object");
    }
    for name in names("images") {
        store.image(&Digest::from_hex(&name).expect("a digest")).expect("a sound record").expect("listed");
    }
    for tag in store.tags().expect("sound records") {
        check_image(store, &tag);
    }
    let (snapshots, damaged) = store.snapshots().expect("listed");
    assert_eq!(damaged, []);
    for snapshot in snapshots {
        store.open_snapshot(&snapshot.key).expect("sound").expect("all it is made of");
    }
}

fn files_in(store: &Store) -> Vec<String> {
    fn walk(folder: &Path, root: &Path, found: &mut Vec<String>) {
        for entry in fs::read_dir(folder).expect("a folder") {
            let path = entry.expect("an entry").path();
            if path.is_dir() {
                walk(&path, root, found);
            } else {
                found.push(path.strip_prefix(root).expect("inside").display().to_string());
            }
        }
    }
    let mut found = Vec::new();
    walk(store.root(), store.root(), &mut found);
    found.sort();
    found
}

#[test]
fn an_image_is_read_as_it_was_put() {
    let (_folder, store) = empty_store();
    let image = put_image(&store, "docker.io/library/one:1", 1).expect("put");
    let again = Store::open(store.root()).expect("opened again");
    let tag = again.tag("docker.io/library/one:1", "linux/amd64").expect("sound").expect("tagged");
    assert_eq!(check_image(&again, &tag), image);
    assert_eq!(again.tag("docker.io/library/one:1", "linux/arm64").expect("sound"), None);
    let mut read = Vec::new();
    let objects = again.image_objects(&image).expect("objects");
    objects[1].reader().expect("a reader").read_to_end(&mut read).expect("read");
    assert_eq!(read, content(10, 150_000));
    assert_eq!(again.layer(&Digest::of(&read), FORMAT).expect("sound"), Some(image.layers[0]));
    assert_eq!(again.layer(&Digest::of(&read), FORMAT + 1).expect("sound"), None);
}

#[test]
fn collecting_removes_what_no_tag_reaches_and_nothing_else() {
    let (_folder, store) = empty_store();
    let nothing = files_in(&store);
    put_image(&store, "one", 1).expect("put");
    let with_one = files_in(&store);
    put_image(&store, "two", 2).expect("put");
    put_image(&store, "alias-of-one", 1).expect("put");
    assert_eq!(store.collect().expect("collected").images, 0);
    assert!(store.untag("two", "linux/amd64").expect("untagged"));
    assert!(!store.untag("two", "linux/amd64").expect("nothing to untag"));
    assert!(store.untag("alias-of-one", "linux/amd64").expect("untagged"));
    let collected = store.collect().expect("collected");
    assert_eq!((collected.images, collected.objects, collected.blobs), (1, 3, 2));
    assert!(collected.bytes > 300_000, "{collected:?}");
    // The lock file came with the first session.
    assert_eq!(files_in(&store), with_one);
    assert!(store.untag("one", "linux/amd64").expect("untagged"));
    store.collect().expect("collected");
    assert_eq!(files_in(&store).into_iter().filter(|name| name != "lock").collect::<Vec<_>>(), nothing);
}

#[test]
fn what_a_live_session_put_or_uses_is_not_collected() {
    let (_folder, store) = empty_store();
    let image = put_image(&store, "one", 1).expect("put");
    let using = store.session().expect("a session");
    assert_eq!(using.use_image(&image.manifest).expect("sound"), Some(image.clone()));
    let putting = store.session().expect("a session");
    let blob = putting.put_blob(b"new").expect("put");
    let object = put_object(&putting, b"new").expect("put");
    assert!(store.untag("one", "linux/amd64").expect("untagged"));
    let collected = store.collect().expect("collected");
    assert_eq!((collected.images, collected.objects, collected.blobs), (0, 0, 0));
    assert!(store.blob(&blob).expect("sound").is_some());
    store.object(object).expect("still there").verify().expect("whole");
    assert_eq!(store.image_objects(&image).expect("still there").len(), 3);

    let open = store.image_objects(&image).expect("open");
    drop((using, putting));
    let collected = store.collect().expect("collected");
    assert_eq!((collected.images, collected.objects, collected.blobs), (1, 4, 3));
    assert!(matches!(store.object(object), Err(StoreError::Missing { .. })));
    for object in open {
        object.verify().expect("an open object stays readable");
    }
}

#[test]
fn two_writers_of_the_same_image_do_no_harm() {
    let (_folder, store) = empty_store();
    std::thread::scope(|scope| {
        for _ in 0..4 {
            scope.spawn(|| {
                for round in 0..5 {
                    put_image(&store, "one", 1).expect("put");
                    if round % 2 == 0 {
                        store.collect().expect("collected");
                    }
                }
            });
        }
    });
    check_all_files(&store);
    let tag = store.tag("one", "linux/amd64").expect("sound").expect("tagged");
    check_image(&store, &tag);
    assert_eq!(fs::read_dir(store.root().join("tmp")).expect("a folder").count(), 0);
}

#[test]
fn a_flipped_bit_is_detected_on_use() {
    let (_folder, store) = empty_store();
    let image = put_image(&store, "one", 1).expect("put");
    let flip = |path: &str, at: u64| {
        let file = fs::File::options().read(true).write(true).open(store.root().join(path)).expect("a file");
        let mut byte = [0];
        file.read_exact_at(&mut byte, at).expect("read");
        file.write_all_at(&[byte[0] ^ 4], at).expect("written");
    };
    let object = image.layers[1].object;
    let damaged = |error: StoreError, name: String| {
        assert!(matches!(error, StoreError::Damaged { .. }), "{error}");
        assert!(error.is_damage() && error.to_string().contains(&name), "{error}");
        assert!(error.hint().is_some_and(|hint| hint.contains("kiln pull --verify")), "{error}");
    };

    flip(&format!("blobs/{}", image.config.hex()), 3);
    damaged(store.blob(&image.config).expect_err("a flipped bit"), image.config.to_string());

    flip(&format!("objects/{}", object.0.hex()), 140_000);
    damaged(store.object(object).expect("opens").verify().expect_err("a flipped bit"), object.to_string());
    let mut before = vec![0; 131_072];
    let mut reader = store.object(object).expect("opens").reader().expect("a reader");
    reader.read_exact(&mut before).expect("the blocks before are sound");
    assert!(reader.read(&mut before).is_err(), "no byte of the damaged block is handed out");

    flip(&format!("objects/{}.digests", object.0.hex()), 40);
    damaged(store.object(object).expect_err("a flipped bit"), object.to_string());
    flip(&format!("objects/{}.digests", object.0.hex()), 40);
    let data = fs::File::options().write(true).open(store.root().join("objects").join(object.0.hex()));
    data.expect("a file").set_len(65_536).expect("cut");
    damaged(store.object(object).expect_err("a cut object"), object.to_string());

    flip(&format!("images/{}", image.manifest.hex()), 30);
    damaged(store.image(&image.manifest).expect_err("a flipped bit"), image.manifest.to_string());
    let before = files_in(&store);
    damaged(store.collect().expect_err("what the image needs is unknown"), "(one)".to_owned());
    assert_eq!(files_in(&store), before, "nothing is removed on a guess");
    assert!(store.untag("one", "linux/amd64").expect("untagged"));
    store.collect().expect("the damaged image is not needed any more");

    put_image(&store, "one", 1).expect("put again");
    check_all_files(&store);
}

#[test]
fn a_store_of_another_format_is_refused() {
    let (_folder, store) = empty_store();
    fs::write(store.root().join("format"), "kiln-store 99\n").expect("written");
    let error = Store::open(store.root()).expect_err("a store from the future");
    assert!(error.to_string().contains("kiln-store 99"), "{error}");
}
