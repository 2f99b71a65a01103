//! When the registry is asked, and what a name means after that.

use std::sync::Arc;

use kiln_oci::{PullError, PullOptions, PullPolicy, Source, find, list, pull, remove};
use kiln_testkit::http::Server;
use kiln_testkit::layout::digest;
use kiln_testkit::registry::{Access, Registry};

use crate::redirects::Served;
use crate::{Place, Told, assert_has, layer, push};

#[tokio::test]
async fn a_tag_that_moved_is_resolved_again_as_the_policy_says() {
    let place = Place::new();
    let registry = Registry::start(Access::Open).expect("a registry");
    let name = registry.image("app:latest");
    let first = push(&registry, &place, "app:latest", &[layer("a", b"common"), layer("v", b"version one")]);
    assert_eq!(place.pull(&name).await.expect("pulled").digest.to_string(), first);
    let folder = Place::new();
    let second = push(&registry, &folder, "app:latest", &[layer("a", b"common"), layer("v", b"version two")]);
    assert_ne!(first, second);

    assert_eq!(place.pull(&name).await.expect("there").digest.to_string(), first, "missing: not asked again");
    let never = PullOptions { policy: PullPolicy::Never, ..PullOptions::default() };
    assert_eq!(place.pull_as(&name, &never).await.expect("there").digest.to_string(), first);
    let told = Arc::new(Told::default());
    let source: Source = name.parse().expect("a name");
    let always = PullOptions { policy: PullPolicy::Always, ..PullOptions::default() };
    let moved = pull(&place.store, &source, &always, told.clone()).await.expect("pulled");
    assert_eq!(moved.digest.to_string(), second);
    assert_has(&moved, b"version two");
    assert_eq!(
        told.count("Resolved 2 layers, 1 present"),
        1,
        "what did not change is not fetched: {:?}",
        told.lines()
    );
    assert_eq!(place.pull(&name).await.expect("there").digest.to_string(), second);

    // The image the name left is pinned by its digest still.
    let pinned = format!("{}@{first}", registry.image("app"));
    assert_has(&place.pull_as(&pinned, &never).await.expect("still there"), b"version one");
    drop(registry);
    assert_eq!(place.pull(&name).await.expect("there").digest.to_string(), second, "no registry is needed");
    place.pull_always(&name).await.expect_err("always asks");
}

#[tokio::test]
async fn always_costs_one_request_when_nothing_moved() {
    let place = Place::new();
    let served = Served::new(&place, &[layer("a", b"x")]);
    let registry = Server::start("127.0.0.1", move |request| served.answer(request)).expect("a server");
    let name = format!("{}/app:1", registry.address());
    place.pull(&name).await.expect("pulled");
    let before = registry.requests().len();
    let told = Arc::new(Told::default());
    let source: Source = name.parse().expect("a name");
    let always = PullOptions { policy: PullPolicy::Always, ..PullOptions::default() };
    pull(&place.store, &source, &always, told.clone()).await.expect("unchanged");
    let asked: Vec<_> = registry.requests()[before..].iter().map(|request| request.method.clone()).collect();
    // The GET finds out whether it speaks TLS.
    assert_eq!(asked.last().map(String::as_str), Some("HEAD"), "{asked:?}");
    assert_eq!(asked.iter().filter(|method| *method == "HEAD").count(), 1, "{asked:?}");
    assert_eq!(told.count("Done unchanged=true"), 1);
}

#[tokio::test]
async fn a_registry_that_knows_no_head_is_asked_otherwise() {
    let place = Place::new();
    let served = Served::new(&place, &[layer("a", b"x")]);
    let registry = Server::start("127.0.0.1", move |request| match request.method.as_str() {
        "HEAD" => kiln_testkit::http::Response::new(405, ""),
        _ => served.answer(request),
    })
    .expect("a server");
    let name = format!("{}/app:1", registry.address());
    let digest = place.pull_always(&name).await.expect("pulled").digest;
    assert_eq!(place.pull_always(&name).await.expect("pulled again").digest, digest);
    let blobs = registry.requests().iter().filter(|request| request.path.contains("/blobs/")).count();
    assert_eq!(blobs, 2, "config and layer, once");
}

#[tokio::test]
async fn never_means_never() {
    let place = Place::new();
    let registry = Registry::start(Access::Open).expect("a registry");
    push(&registry, &place, "app:1", &[layer("a", b"x")]);
    let never = PullOptions { policy: PullPolicy::Never, ..PullOptions::default() };
    let error = place.pull_as(&registry.image("app:1"), &never).await.expect_err("not in the store");
    assert!(matches!(error, PullError::NotInStore { .. }), "{error}");
    assert!(error.hint().is_some_and(|hint| hint.starts_with("kiln pull ")), "{error}");
}

#[tokio::test]
async fn a_manifest_pinned_by_digest_is_verified() {
    let place = Place::new();
    let good = Served::new(&place, &[layer("a", b"good")]);
    let evil = Served::new(&place, &[layer("a", b"evil")]);
    let pinned = digest(&good.manifest);
    for (what, header) in [("says the truth", digest(&evil.manifest)), ("lies", pinned.clone())] {
        let (manifest, blobs) = (evil.manifest.clone(), evil.blobs.clone());
        let header = header.clone();
        let registry = Server::start("127.0.0.1", move |request| {
            let answer = Served { manifest: manifest.clone(), blobs: blobs.clone() }.answer(request);
            if request.path.contains("/manifests/") {
                let mut answer = answer;
                answer.headers.retain(|(name, _)| name != "Docker-Content-Digest");
                return answer.header("Docker-Content-Digest", header.clone());
            }
            answer
        })
        .expect("a server");
        for tag in ["", ":1"] {
            let error =
                place.pull(&format!("{}/app{tag}@{pinned}", registry.address())).await.expect_err(what);
            assert!(matches!(error, PullError::Corrupt { .. }), "{what}: {error}");
        }
        if what == "lies" {
            let error = place
                .pull(&format!("{}/app:1", registry.address()))
                .await
                .expect_err("header and content differ");
            assert!(matches!(error, PullError::Corrupt { .. }), "{error}");
        }
        place.assert_nothing_is_left();
    }
    let blobs = good.blobs.clone();
    let registry = Server::start("127.0.0.1", move |request| {
        Served { manifest: good.manifest.clone(), blobs: blobs.clone() }.answer(request)
    })
    .expect("a server");
    let name = format!("{}/app:1@{pinned}", registry.address());
    let image = place.pull(&name).await.expect("pulled");
    assert_eq!(image.digest.to_string(), pinned);
    let before = registry.requests().len();
    assert_eq!(place.pull(&name).await.expect("there").digest.to_string(), pinned);
    assert_eq!(
        place.pull(&format!("{}/app@{pinned}", registry.address())).await.expect("there").digest.to_string(),
        pinned
    );
    assert_eq!(registry.requests().len(), before, "a digest that is here means the same for ever");
}

/// Flips a bit in a file of the store.
fn damage(place: &Place, path: &str) {
    let path = place.store.root().join(path);
    let mut content = std::fs::read(&path).expect("the file to damage");
    let middle = content.len() / 2;
    content[middle] ^= 1;
    std::fs::write(&path, content).expect("written");
}

#[tokio::test]
async fn damage_in_the_store_is_found_and_repaired() {
    let place = Place::new();
    let registry = Registry::start(Access::Open).expect("a registry");
    push(&registry, &place, "app:1", &[layer("a", &vec![b'a'; 200_000]), layer("b", b"two")]);
    let name = registry.image("app:1");
    let image = place.pull(&name).await.expect("pulled");
    let record = place.store.image(&image.digest).expect("sound").expect("there");
    let object = image.layers[0].object.0.hex();
    let verify = PullOptions { verify: true, ..PullOptions::default() };
    for (path, seen_at_once) in [
        (format!("blobs/{}", image.id.hex()), true),
        (format!("images/{}", image.digest.hex()), true),
        (format!("objects/{object}.digests"), true),
        (format!("objects/{}.digests", record.merged.0.hex()), true),
        // Blocks are checked when a machine reads them; until then only a full check finds out.
        (format!("objects/{object}"), false),
        (format!("objects/{}", record.merged.0.hex()), false),
    ] {
        damage(&place, &path);
        let opened = match place.pull(&name).await {
            Ok(image) => image.disk().map(drop),
            Err(error) => Err(error),
        };
        match opened {
            Err(error) => {
                assert!(seen_at_once, "{path}: {error}");
                assert!(error.to_string().contains("damaged"), "{path}: {error}");
                assert!(
                    error.hint().is_some_and(|hint| hint.contains("kiln pull --verify")),
                    "{path}: {error}"
                );
                assert!(list(&place.store).expect("listed")[0].details.is_err(), "{path}: the list says so");
                place.pull_always(&name).await.expect("what is seen at once is repaired by always");
                damage(&place, &path);
            }
            Ok(()) => assert!(!seen_at_once, "{path}"),
        }
        let repaired = place.pull_as(&name, &verify).await.expect(&path);
        assert_eq!(repaired.layers, image.layers, "{path}");
        for object in place.store.image_objects(&record).expect("sound") {
            object.verify().expect(&path);
        }
        place.pull(&name).await.expect("sound again").disk().expect("sound again");
    }
    drop(registry);
    place.pull_as(&name, &verify).await.expect_err("repairing asks the registry");
}

#[tokio::test]
async fn images_are_listed_found_and_removed() {
    let place = Place::new();
    let registry = Registry::start(Access::Open).expect("a registry");
    push(&registry, &place, "one:1", &[layer("a", b"common"), layer("v", b"one")]);
    push(&registry, &place, "two:1", &[layer("a", b"common"), layer("v", b"two")]);
    let (one, two) = (registry.image("one:1"), registry.image("two:1"));
    let image = place.pull(&one).await.expect("pulled");
    place.pull(&two).await.expect("pulled");
    let summaries = list(&place.store).expect("listed");
    assert_eq!(
        summaries.iter().map(|image| image.name.clone()).collect::<Vec<_>>(),
        [one.clone(), two.clone()]
    );
    let details = summaries[0].details.as_ref().expect("sound");
    assert_eq!(
        (details.id, details.layers, details.created.as_deref()),
        (image.id, 2, Some("2020-01-01T00:00:00Z"))
    );
    assert!(details.disk_bytes > 0);

    for name in [one.as_str(), &image.digest.hex()[..12], &image.id.to_string(), &image.digest.to_string()] {
        assert_eq!(find(&place.store, name, None).expect(name).digest, image.digest, "{name}");
    }
    assert!(matches!(find(&place.store, "absent", None), Err(PullError::NotInStore { .. })));
    assert!(matches!(find(&place.store, "Bad Name", None), Err(PullError::Name(_))));
    assert!(matches!(remove(&place.store, "absent", None), Err(PullError::NotInStore { .. })));

    let open = image.disk().expect("open");
    let removed = remove(&place.store, &one, None).expect("removed");
    assert_eq!(removed.names, std::slice::from_ref(&one));
    assert!(removed.bytes_freed > 0);
    assert_eq!(open.len(), 3, "what a machine has open stays with it");
    assert!(matches!(find(&place.store, &one, None), Err(PullError::NotInStore { .. })));
    assert_has(&find(&place.store, &two, None).expect("still there"), b"common");
    assert_eq!(place.objects(), 3);
    remove(&place.store, &two, None).expect("removed");
    assert_eq!(place.objects(), 0);
    assert_has(&place.pull(&one).await.expect("pulled again"), b"one");
}
