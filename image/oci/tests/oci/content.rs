//! Layers that are not what they should be: an error, never a part of a root file system.

use kiln_oci::PullError;
use kiln_testkit::layout::{Layer, digest};
use kiln_testkit::registry::{Access, Registry};
use kiln_testkit::tar::{Entry, Tar};

use crate::{Place, layer, noise, one_image};

/// Each way a layer can be broken, and a word of what is said about it.
fn broken() -> Vec<(&'static str, Layer, &'static str)> {
    let archive = Tar::new().with(&Entry::file("f", noise(1, 300_000))).finish();
    let good = Layer::gzip(&archive);
    let half = |bytes: &[u8]| bytes[..bytes.len() / 2].to_vec();
    let mut flipped = good.blob.clone();
    flipped[150_000] ^= 1;
    vec![
        ("gzip cut off", good.clone().with_blob(half(&good.blob)), "corrupt"),
        ("tar cut off", Layer::plain(half(&archive)), "cannot be used"),
        ("a flipped bit", good.clone().damaged(flipped.clone()), "corrupt"),
        ("a flipped bit from the start", good.clone().with_blob(flipped), "layer"),
        ("cut off and shorter", good.clone().damaged(half(&good.blob)), "corrupt"),
        ("another diff id", Layer { diff_id: digest(b"other"), ..good }, "config says"),
        ("no archive", Layer::plain(b"this is no tar archive; ".repeat(100)), "cannot be used"),
        ("nothing", Layer::plain(Vec::new()), "cannot be used"),
    ]
}

#[tokio::test]
async fn a_broken_layer_is_an_error_and_never_a_partial_root() {
    let registry = Registry::start(Access::Open).expect("a registry");
    for (what, layer_like_that, word) in broken() {
        let place = Place::new();
        let folder = place.path("layout");
        one_image(&folder, &[layer("good", what.as_bytes()), layer_like_that.clone()]);
        let local = format!("oci-layout:{}", folder.display());
        let error = match place.pull(&local).await {
            Err(error) => error,
            // An archive of no bytes is an empty one to some.
            Ok(_) if what == "nothing" => continue,
            Ok(_) => panic!("{what}: taken"),
        };
        assert!(error.to_string().contains(word), "{what}: {error}");
        assert!(error.to_string().contains(&layer_like_that.digest), "{what} is not named: {error}");
        assert_eq!(place.store.tags().expect("sound"), [], "{what}");
        assert!(place.store.image(&kiln_support_digest(&folder)).expect("sound").is_none(), "{what}");

        // The registry refuses what it can see is wrong; what it takes, we must see.
        let pushed = registry.push(&format!("oci:{}:latest", folder.display()), "app:1");
        if pushed.is_ok() {
            let error = place.pull(&registry.image("app:1")).await.expect_err(what);
            assert!(error.to_string().contains(word), "{what} from a registry: {error}");
        }
        place.store.collect().expect("collected");
        place.assert_nothing_is_left();
    }
}

/// The digest of the one manifest of a layout.
fn kiln_support_digest(folder: &std::path::Path) -> kiln_support::digest::Digest {
    let index = std::fs::read(folder.join("index.json")).expect("read");
    let index: serde_json::Value = serde_json::from_slice(&index).expect("JSON");
    index["manifests"][0]["digest"].as_str().and_then(|text| text.parse().ok()).expect("a digest")
}

#[tokio::test]
async fn layers_that_the_config_does_not_count_are_refused() {
    let place = Place::new();
    let folder = place.path("layout");
    one_image(&folder, &[layer("a", b"x"), layer("b", b"y")]);
    // Rewrites the manifest with one layer fewer than its config says.
    let old = kiln_support_digest(&folder);
    let path = |digest: &str| folder.join("blobs").join(digest.replace(':', "/"));
    let mut manifest: serde_json::Value =
        serde_json::from_slice(&std::fs::read(path(&old.to_string())).expect("read")).expect("JSON");
    manifest["layers"].as_array_mut().expect("a list").pop();
    let bytes = manifest.to_string().into_bytes();
    std::fs::write(path(&digest(&bytes)), &bytes).expect("written");
    let index = std::fs::read_to_string(folder.join("index.json")).expect("read");
    let index = index.replace(&old.to_string(), &digest(&bytes));
    std::fs::write(folder.join("index.json"), index).expect("written");
    let error = place.pull(&format!("oci-layout:{}", folder.display())).await.expect_err("refused");
    assert!(matches!(&error, PullError::Malformed { why, .. } if why.contains("2 layers")), "{error}");
    place.assert_nothing_is_left();
}

#[tokio::test]
async fn the_same_layer_twice_is_fetched_once() {
    let place = Place::new();
    let registry = Registry::start(Access::Open).expect("a registry");
    let twice = layer("a", b"again and again");
    crate::push(&registry, &place, "app:1", &[twice.clone(), layer("b", b"between"), twice]);
    let told = std::sync::Arc::new(crate::Told::default());
    let source: kiln_oci::Source = registry.image("app:1").parse().expect("a name");
    let options = kiln_oci::PullOptions::default();
    let image = kiln_oci::pull(&place.store, &source, &options, told.clone()).await.expect("pulled");
    assert_eq!(
        (told.count("Resolved 3 layers, 1 present"), told.count("LayerDone")),
        (1, 2),
        "{:?}",
        told.lines()
    );
    assert_eq!(image.layers.len(), 3);
    assert_eq!(image.layers[0], image.layers[2]);
    assert_eq!(image.disk().expect("a disk").len(), 4);
    assert_eq!(place.objects(), 3);
}

#[tokio::test]
async fn an_image_without_layers_is_an_empty_root() {
    let place = Place::new();
    let folder = place.path("layout");
    one_image(&folder, &[]);
    let image = place.pull(&format!("oci-layout:{}", folder.display())).await.expect("pulled");
    assert_eq!(image.disk().expect("a disk").len(), 1);
}
