//! Images from files: layouts, archives, and archives that mean harm.

use std::path::Path;
use std::process::Command;

use kiln_oci::{PullError, PullOptions, PullPolicy};
use kiln_testkit::layout::{Layer, Layout};
use kiln_testkit::tar::{Entry, Tar};
use serde_json::json;

use crate::{Place, assert_has, config, layer, noise, one_image};

fn skopeo(arguments: &[&str]) {
    kiln_testkit::run(Command::new("skopeo").args(["--insecure-policy", "copy", "-q"]).args(arguments))
        .expect("skopeo");
}

#[tokio::test]
async fn every_kind_of_file_gives_the_same_layers() {
    let place = Place::new();
    let folder = place.path("layout");
    let content = noise(1, 100_000);
    one_image(&folder, &[layer("a", &content), layer("b", b"second"), layer("a2", &content)]);
    let from = format!("oci:{}:latest", folder.display());
    let (oci, docker) = (place.path("oci.tar"), place.path("docker.tar"));
    skopeo(&[&from, &format!("oci-archive:{}:named", oci.display())]);
    skopeo(&[&from, &format!("docker-archive:{}:example.com/app:7", docker.display())]);
    let mut layers = Vec::new();
    for name in [
        format!("oci-layout:{}", folder.display()),
        format!("oci-layout:{}:latest", folder.display()),
        format!("oci-archive:{}", oci.display()),
        format!("oci-archive:{}:named", oci.display()),
        format!("docker-archive:{}", docker.display()),
        format!("docker-archive:{}:example.com/app:7", docker.display()),
    ] {
        let image = place.pull(&name).await.expect(&name);
        assert_eq!(image.name, name);
        assert_eq!(image.config.cmd, ["/bin/true"]);
        assert_has(&image, &content);
        layers.push(image.layers);
        let never = PullOptions { policy: PullPolicy::Never, ..PullOptions::default() };
        place.pull_as(&name, &never).await.expect("in the store now");
    }
    layers.dedup();
    assert_eq!(layers.len(), 1);
    assert_eq!(place.objects(), 3 + 1, "three layers, and one merged view: all images are the same");
}

#[tokio::test]
async fn a_file_that_changed_is_another_image() {
    let place = Place::new();
    let folder = place.path("layout");
    let name = format!("oci-layout:{}:latest", folder.display());
    one_image(&folder, &[layer("a", b"one")]);
    let first = place.pull(&name).await.expect("pulled");
    one_image(&folder, &[layer("a", b"two")]);
    let told = std::sync::Arc::new(crate::Told::default());
    let source: kiln_oci::Source = name.parse().expect("a source");
    let second =
        kiln_oci::pull(&place.store, &source, &PullOptions::default(), told.clone()).await.expect("pulled");
    assert_eq!(told.count("Done unchanged=false"), 1);
    kiln_oci::pull(&place.store, &source, &PullOptions::default(), told.clone()).await.expect("still there");
    assert_eq!((told.count("Done unchanged=true"), told.count("Resolved")), (1, 1), "{:?}", told.lines());
    assert_ne!(first.digest, second.digest);
    assert_has(&second, b"two");
}

#[tokio::test]
async fn the_name_of_an_image_in_a_file_must_say_which() {
    let place = Place::new();
    let folder = place.path("layout");
    let mut layout = Layout::create(&folder).expect("a layout");
    layout.image("one", config(), &[layer("a", b"one")]).expect("an image");
    layout.image("two", config(), &[layer("a", b"two")]).expect("an image");
    let named = |tag: &str| format!("oci-layout:{}{tag}", folder.display());
    assert_has(&place.pull(&named(":two")).await.expect("named"), b"two");
    for (tag, why) in [("", "several"), (":three", "it has one, two")] {
        let error = place.pull(&named(tag)).await.expect_err("not clear");
        assert!(matches!(error, PullError::NotFound { .. }) && error.to_string().contains(why), "{error}");
    }
    let error = place.pull("oci-layout:/nonexistent").await.expect_err("no such folder");
    assert!(error.to_string().contains("/nonexistent"), "{error}");
    let error = place.pull("docker-archive:/dev/zero").await.expect_err("no archive");
    assert!(matches!(error, PullError::File { .. }), "{error}");
}

/// Writes a Docker archive whose `manifest.json` says what it likes.
fn docker_archive(path: &Path, config: &str, layer_name: &str, more: Tar) {
    let layer = Tar::new().with(&Entry::file("a", "content")).finish();
    let diff_id = Layer::plain(layer.clone()).diff_id;
    let whole =
        json!({"os": "linux", "architecture": "amd64", "rootfs": {"type": "layers", "diff_ids": [diff_id]}});
    let manifest = json!([{"Config": config, "RepoTags": null, "Layers": [layer_name]}]);
    let tar = more
        .with(&Entry::file("config.json", whole.to_string()))
        .with(&Entry::file("layer.tar", layer))
        .with(&Entry::file("manifest.json", manifest.to_string()));
    std::fs::write(path, tar.finish()).expect("written");
}

#[tokio::test]
async fn an_archive_cannot_reach_out_of_itself() {
    let place = Place::new();
    let secret = place.path("secret");
    std::fs::write(&secret, "secret").expect("written");
    let path = place.path("docker.tar");
    let name = format!("docker-archive:{}", path.display());
    let outside = secret.display().to_string();
    let up = format!("{}{outside}", "../".repeat(20));
    for (config, layer) in [
        (outside.as_str(), "layer.tar"),
        (up.as_str(), "layer.tar"),
        ("link", "layer.tar"),
        ("config.json", outside.as_str()),
        ("config.json", "link"),
        ("config.json", "up/secret"),
    ] {
        let links =
            Tar::new().with(&Entry::symlink("link", outside.as_bytes())).with(&Entry::symlink("up", "../.."));
        docker_archive(&path, config, layer, links);
        let error = place.pull(&name).await.expect_err(layer);
        assert!(matches!(error, PullError::NotFound { .. }), "{config} {layer}: {error}");
        place.assert_nothing_is_left();
    }
    // Docker itself writes links from one layer to another; those are fine.
    docker_archive(
        &path,
        "./config.json",
        "x/layer.tar",
        Tar::new().with(&Entry::symlink("x/layer.tar", "../layer.tar")),
    );
    assert_has(&place.pull(&name).await.expect("inside"), b"content");
}

#[tokio::test]
async fn a_layer_that_a_docker_archive_packed_is_unpacked() {
    let place = Place::new();
    let path = place.path("docker.tar");
    let tar = Tar::new().with(&Entry::file("a", "packed content")).finish();
    let packed = Layer::gzip(&tar);
    let whole = json!({"os": "linux", "architecture": "amd64", "rootfs": {"type": "layers", "diff_ids": [packed.diff_id]}});
    let manifest = json!([{"Config": "c", "RepoTags": ["a:1", "b:2"], "Layers": ["l"]}]);
    let archive = Tar::new()
        .with(&Entry::file("c", whole.to_string()))
        .with(&Entry::file("l", packed.blob))
        .with(&Entry::file("manifest.json", manifest.to_string()));
    std::fs::write(&path, archive.finish()).expect("written");
    assert_has(
        &place.pull(&format!("docker-archive:{}:b:2", path.display())).await.expect("pulled"),
        b"packed content",
    );
    let error =
        place.pull(&format!("docker-archive:{}:c:2", path.display())).await.expect_err("another name");
    assert!(error.to_string().contains("a:1, b:2"), "{error}");
}
