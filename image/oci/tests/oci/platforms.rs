//! Indexes: the right platform, or an error that lists what there is.

use kiln_oci::{Platform, PullError, PullOptions};
use kiln_testkit::layout::{Layer, Layout};
use kiln_testkit::registry::{Access, Registry};
use serde_json::json;

use crate::{Place, assert_has, config, layer};

/// A layout of an index with an image for each platform, each with its platform's name as content.
fn multi(folder: &std::path::Path, platforms: &[&str]) {
    let mut layout = Layout::create(folder).expect("a layout");
    for text in platforms {
        let platform: Platform = text.parse().expect("a platform");
        let mut said = json!({"os": platform.os, "architecture": platform.architecture});
        if let Some(variant) = text.split('/').nth(2) {
            said["variant"] = json!(variant);
        }
        layout.image_for(None, &said, config(), &[layer("platform", text.as_bytes())]).expect("an image");
    }
}

/// Makes a layout of several images one of a single index of them, as tools that copy want it.
fn nest(folder: &std::path::Path) {
    let index = std::fs::read(folder.join("index.json")).expect("read");
    let digest = kiln_testkit::layout::digest(&index);
    std::fs::write(folder.join("blobs").join(digest.replace(':', "/")), &index).expect("written");
    let entry = json!({"mediaType": INDEX, "digest": digest, "size": index.len()});
    let top = json!({"schemaVersion": 2, "mediaType": INDEX, "manifests": [entry]});
    std::fs::write(folder.join("index.json"), top.to_string()).expect("written");
}

const INDEX: &str = "application/vnd.oci.image.index.v1+json";

fn for_platform(text: &str) -> PullOptions {
    PullOptions { platform: Some(text.parse().expect("a platform")), ..PullOptions::default() }
}

#[tokio::test]
async fn the_image_for_the_platform_is_chosen() {
    let place = Place::new();
    let registry = Registry::start(Access::Open).expect("a registry");
    let folder = place.path("layout");
    let platforms = [
        "linux/arm/v6",
        "linux/arm64/v8",
        "linux/amd64/v3",
        "linux/amd64",
        "linux/amd64/v2",
        "windows/amd64",
        "linux/s390x",
    ];
    multi(&folder, &platforms);
    let nested = place.path("nested");
    multi(&nested, &platforms);
    nest(&nested);
    registry.push_with(&format!("oci:{}", nested.display()), "app:1", &["--all"]).expect("pushed");
    let (image, local) = (registry.image("app:1"), format!("oci-layout:{}", folder.display()));
    for (wanted, given) in [
        ("linux/amd64", "linux/amd64"),
        ("linux/amd64/v2", "linux/amd64/v2"),
        ("linux/amd64/v4", "linux/amd64/v3"),
        ("linux/arm64", "linux/arm64/v8"),
        ("linux/arm/v7", "linux/arm/v6"),
        ("linux/s390x", "linux/s390x"),
    ] {
        for name in [&image, &local] {
            let pulled = place.pull_as(name, &for_platform(wanted)).await.expect(wanted);
            assert_has(&pulled, given.as_bytes());
            // Again, now from the store.
            assert_eq!(place.pull_as(name, &for_platform(wanted)).await.expect(wanted).digest, pulled.digest);
        }
    }
    assert_eq!(place.pull(&image).await.expect("this host's").platform, Platform::host());

    for name in [&image, &local] {
        let error = place.pull_as(name, &for_platform("linux/riscv64")).await.expect_err("none");
        let PullError::NoPlatform { available, .. } = &error else { panic!("{error}") };
        assert!(available.contains(&"linux/arm64".to_owned()) && available.len() == 7, "{available:?}");
        assert!(error.to_string().contains("linux/s390x"), "{error}");
    }
}

#[tokio::test]
async fn an_image_without_an_index_for_another_platform_is_refused() {
    let place = Place::new();
    let registry = Registry::start(Access::Open).expect("a registry");
    let folder = place.path("layout");
    let mut layout = Layout::create(&folder).expect("a layout");
    let arm = json!({"os": "linux", "architecture": "arm64"});
    layout.image_for(Some("latest"), &arm, config(), &[layer("a", b"arm")]).expect("an image");
    registry.push(&format!("oci:{}:latest", folder.display()), "arm:1").expect("pushed");
    let error =
        place.pull_as(&registry.image("arm:1"), &for_platform("linux/amd64")).await.expect_err("not for us");
    assert!(
        matches!(&error, PullError::NoPlatform { available, .. } if available == &["linux/arm64"]),
        "{error}"
    );
    place.assert_nothing_is_left();
    place.pull_as(&registry.image("arm:1"), &for_platform("linux/arm64")).await.expect("asked for");
}

#[tokio::test]
async fn attestations_and_nested_indexes_are_no_obstacle() {
    let place = Place::new();
    let folder = place.path("layout");
    let mut layout = Layout::create(&folder).expect("a layout");
    let platform = json!({"os": "linux", "architecture": "amd64"});
    let image = layout.image_for(None, &platform, config(), &[layer("a", b"the image")]).expect("an image");
    let index: serde_json::Value =
        serde_json::from_slice(&std::fs::read(folder.join("index.json")).expect("read")).expect("JSON");
    let entry = index["manifests"][0].clone();
    assert_eq!(entry["digest"], json!(image));
    let mut attestation = entry.clone();
    attestation["platform"] = json!({"os": "unknown", "architecture": "unknown"});
    attestation["annotations"] = json!({"vnd.docker.reference.type": "attestation-manifest"});
    let kind = "application/vnd.oci.image.index.v1+json";
    let nest = |entries: Vec<serde_json::Value>| {
        let bytes = serde_json::to_vec(&json!({"schemaVersion": 2, "mediaType": kind, "manifests": entries}))
            .expect("JSON");
        let digest = kiln_testkit::layout::digest(&bytes);
        layout.blob(&digest, &bytes).expect("written");
        json!({"mediaType": kind, "digest": digest, "size": bytes.len()})
    };
    let inner = nest(vec![attestation, entry]);
    let outer = nest(vec![inner]);
    let top = json!({"schemaVersion": 2, "mediaType": kind, "manifests": [outer]});
    std::fs::write(folder.join("index.json"), top.to_string()).expect("written");
    let pulled = place
        .pull_as(&format!("oci-layout:{}", folder.display()), &for_platform("linux/amd64"))
        .await
        .expect("found");
    assert_has(&pulled, b"the image");
}

#[tokio::test]
async fn an_index_that_leads_to_itself_ends() {
    let place = Place::new();
    let folder = place.path("layout");
    let layout = Layout::create(&folder).expect("a layout");
    let kind = "application/vnd.oci.image.index.v1+json";
    let mut entry = json!({"mediaType": kind, "digest": kiln_testkit::layout::digest(b""), "size": 1});
    // A long chain, as no digest can lead to itself.
    for _ in 0..100 {
        let bytes = serde_json::to_vec(&json!({"schemaVersion": 2, "manifests": [entry]})).expect("JSON");
        let digest = kiln_testkit::layout::digest(&bytes);
        layout.blob(&digest, &bytes).expect("written");
        entry = json!({"mediaType": kind, "digest": digest, "size": bytes.len()});
    }
    std::fs::write(folder.join("index.json"), json!({"schemaVersion": 2, "manifests": [entry]}).to_string())
        .expect("written");
    let error = place.pull(&format!("oci-layout:{}", folder.display())).await.expect_err("no image");
    assert!(matches!(error, PullError::Unsupported { .. }), "{error}");
}

#[tokio::test]
async fn what_is_no_image_is_refused_by_name() {
    let place = Place::new();
    let registry = kiln_testkit::http::Server::start("127.0.0.1", |request| match request.path.as_str() {
        "/v2/" => kiln_testkit::http::Response::new(200, ""),
        _ => kiln_testkit::http::Response::new(200, r#"{"schemaVersion":1,"name":"x","fsLayers":[]}"#)
            .header("Content-Type", "application/vnd.docker.distribution.manifest.v1+prettyjws"),
    })
    .expect("a server");
    let error = place.pull(&format!("{}/old:1", registry.address())).await.expect_err("too old");
    assert!(error.to_string().contains("schema 1"), "{error}");
    let folder = place.path("layout");
    let mut layout = Layout::create(&folder).expect("a layout");
    layout
        .image(
            "chart",
            config(),
            &[Layer {
                media_type: "application/vnd.cncf.helm.chart.content.v1.tar+gzip",
                ..layer("a", b"x")
            }],
        )
        .expect("an image");
    let error = place.pull(&format!("oci-layout:{}:chart", folder.display())).await.expect_err("no layer");
    assert!(error.to_string().contains("helm"), "{error}");
    place.assert_nothing_is_left();
}
