//! Manifests and indexes, from bytes nobody vouches for.
//!
//! Read from OCI Image Specification 1.1, "Image Manifest" and "Image Index", and from Docker's image manifest
//! version 2, schema 2, whose documents have the same fields under other media types. Every list has a limit.

use kiln_support::digest::Digest;
use serde::{Deserialize, Deserializer, Serialize};

use crate::Platform;

/// The most bytes of a manifest or an index; OCI Distribution Specification 1.1, "Pushing Manifests".
pub const MAX_MANIFEST_BYTES: u64 = 4 << 20;
/// The most layers of an image; what Docker's engine can run.
pub const MAX_LAYERS: usize = 127;
/// The most images an index lists.
pub(crate) const MAX_INDEX_ENTRIES: usize = 4096;
/// The most URLs a layer can be had from.
pub(crate) const MAX_URLS: usize = 8;

/// The media types asked for when a manifest is wanted.
pub(crate) const ACCEPTED: [&str; 4] = [OCI_MANIFEST, DOCKER_MANIFEST, OCI_INDEX, DOCKER_LIST];

const OCI_MANIFEST: &str = "application/vnd.oci.image.manifest.v1+json";
const OCI_INDEX: &str = "application/vnd.oci.image.index.v1+json";
const DOCKER_MANIFEST: &str = "application/vnd.docker.distribution.manifest.v2+json";
const DOCKER_LIST: &str = "application/vnd.docker.distribution.manifest.list.v2+json";
const SCHEMA_1: [&str; 2] = [
    "application/vnd.docker.distribution.manifest.v1+json",
    "application/vnd.docker.distribution.manifest.v1+prettyjws",
];

/// A document a name can lead to.
#[derive(Debug, Clone, PartialEq)]
pub enum Document {
    /// One image.
    Manifest(Manifest),
    /// Several, to choose from by platform.
    Index(Index),
}

/// One image: its config and its layers.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Manifest {
    /// The config's blob.
    pub config: Descriptor,
    /// The layers' blobs from the lowest up.
    pub layers: Vec<Descriptor>,
}

/// Several images to choose from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Index {
    /// All of them, in the index's order.
    pub entries: Vec<Entry>,
}

/// What an index says of one document it lists.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Entry {
    /// The document's blob.
    pub blob: Descriptor,
    /// What it was built for, if the index says so.
    pub platform: Option<Platform>,
    /// True when it lists documents again.
    pub is_index: bool,
    /// The name it has in an OCI layout: `org.opencontainers.image.ref.name`.
    pub ref_name: Option<String>,
}

/// A blob: what it is called, and how many bytes it has.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Descriptor {
    /// What kind of content it says it is.
    pub media_type: String,
    /// Its SHA-256.
    pub digest: Digest,
    /// Its size in bytes.
    pub size: u64,
    /// Where else it can be had.
    pub urls: Vec<String>,
}

/// The bytes are no manifest or index Kiln can use.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ParseManifestError {
    /// They are not of the form the specification gives.
    #[error("malformed: {0}")]
    Malformed(String),
    /// They are well-formed and not supported.
    #[error("{0}")]
    Unsupported(String),
}

/// Reads a manifest or an index.
///
/// `media_type` is what the source says it is, which counts only when the document says nothing itself.
///
/// # Errors
/// When the document is malformed, is past a limit, or is not of an image.
pub fn parse_document(bytes: &[u8], media_type: Option<&str>) -> Result<Document, ParseManifestError> {
    let malformed = |why: String| ParseManifestError::Malformed(why);
    if bytes.len() as u64 > MAX_MANIFEST_BYTES {
        return Err(malformed(format!("it has more than {MAX_MANIFEST_BYTES} bytes")));
    }
    let raw: RawDocument = serde_json::from_slice(bytes).map_err(|error| malformed(error.to_string()))?;
    let outer = media_type.map(|text| text.split(';').next().unwrap_or_default().trim());
    let kind = raw.media_type.as_deref().filter(|kind| !kind.is_empty()).or(outer).unwrap_or_default();
    if raw.schema_version == 1 || SCHEMA_1.contains(&kind) {
        return Err(ParseManifestError::Unsupported(
            "it is a Docker schema 1 manifest, a format given up in 2017: push the image again with a current tool"
                .to_owned(),
        ));
    }
    if raw.schema_version != 2 {
        return Err(malformed(format!("schemaVersion is {}, expected 2", raw.schema_version)));
    }
    // A document with both lists could be read as either by different tools; OCI forbids it for that reason.
    match (raw.manifests, raw.config) {
        (Some(_), Some(_)) => Err(malformed("it has both \"manifests\" and \"config\"".to_owned())),
        (Some(_), None) if raw.layers.is_some() => {
            Err(malformed("it has both \"manifests\" and \"layers\"".to_owned()))
        }
        (Some(_), None) if [OCI_MANIFEST, DOCKER_MANIFEST].contains(&kind) => {
            Err(malformed(format!("it says it is {kind} and has \"manifests\"")))
        }
        (None, Some(_)) if [OCI_INDEX, DOCKER_LIST].contains(&kind) => {
            Err(malformed(format!("it says it is {kind} and has \"config\"")))
        }
        (Some(manifests), None) => index(manifests).map(Document::Index),
        (None, Some(config)) => {
            manifest(config, raw.layers.unwrap_or_default(), raw.artifact_type.as_deref())
                .map(Document::Manifest)
        }
        (None, None) if !kind.is_empty() && !ACCEPTED.contains(&kind) => {
            Err(ParseManifestError::Unsupported(format!("it is {kind:?}, not an image")))
        }
        (None, None) => Err(malformed("it has neither \"manifests\" nor \"config\"".to_owned())),
    }
}

fn index(manifests: Vec<RawDescriptor>) -> Result<Index, ParseManifestError> {
    if manifests.len() > MAX_INDEX_ENTRIES {
        return Err(ParseManifestError::Malformed(format!("it lists more than {MAX_INDEX_ENTRIES} images")));
    }
    let entries = manifests.into_iter().filter(RawDescriptor::may_be_image).map(|raw| {
        let platform = raw
            .platform
            .as_ref()
            .filter(|platform| !platform.architecture.is_empty())
            .map(|platform| Platform::new(&platform.os, &platform.architecture, &platform.variant));
        let ref_name = raw.annotations.as_ref().and_then(|annotations| annotations.ref_name.clone());
        let is_index = [OCI_INDEX, DOCKER_LIST].contains(&raw.media_type.as_str());
        Ok(Entry { blob: raw.check()?, platform, is_index, ref_name })
    });
    Ok(Index { entries: entries.collect::<Result<_, _>>()? })
}

fn manifest(
    config: RawDescriptor,
    layers: Vec<RawDescriptor>,
    artifact_type: Option<&str>,
) -> Result<Manifest, ParseManifestError> {
    let unsupported = |why: String| Err(ParseManifestError::Unsupported(why));
    if !matches!(
        config.media_type.as_str(),
        "application/vnd.oci.image.config.v1+json"
            | "application/vnd.docker.container.image.v1+json"
            | "application/octet-stream"
            | ""
    ) {
        let kind = artifact_type.filter(|kind| !kind.is_empty()).unwrap_or(&config.media_type);
        return unsupported(format!("it is an artifact of type {kind:?}, not an image to run"));
    }
    if layers.len() > MAX_LAYERS {
        return unsupported(format!("it has {} layers, at most {MAX_LAYERS} are supported", layers.len()));
    }
    for layer in &layers {
        if layer.media_type.ends_with("+encrypted") {
            return unsupported(format!("layer {} is encrypted", layer.digest));
        }
        if !is_layer(&layer.media_type) {
            return unsupported(format!(
                "layer {} has the unknown type {:?}",
                layer.digest, layer.media_type
            ));
        }
    }
    let layers = layers.into_iter().map(RawDescriptor::check).collect::<Result<_, _>>()?;
    Ok(Manifest { config: config.check()?, layers })
}

/// True for the types of tar layers, however compressed: what it is in fact is seen from the content.
fn is_layer(media_type: &str) -> bool {
    let base =
        media_type.strip_suffix("+gzip").or_else(|| media_type.strip_suffix("+zstd")).unwrap_or(media_type);
    matches!(
        base,
        "application/vnd.oci.image.layer.v1.tar"
            | "application/vnd.oci.image.layer.nondistributable.v1.tar"
            | "application/vnd.docker.image.rootfs.diff.tar"
            | "application/vnd.docker.image.rootfs.diff.tar.gzip"
            | "application/vnd.docker.image.rootfs.diff.tar.zstd"
            | "application/vnd.docker.image.rootfs.foreign.diff.tar"
            | "application/vnd.docker.image.rootfs.foreign.diff.tar.gzip"
            | "application/vnd.docker.image.rootfs.foreign.diff.tar.zstd"
    )
}

/// The bytes of an OCI manifest for an image that came without one, such as from a Docker archive.
pub(crate) fn write_manifest(config: (Digest, u64), layers: &[(Digest, u64)]) -> Vec<u8> {
    #[derive(Serialize)]
    #[serde(rename_all = "camelCase")]
    struct Blob {
        media_type: &'static str,
        digest: Digest,
        size: u64,
    }
    #[derive(Serialize)]
    #[serde(rename_all = "camelCase")]
    struct Written {
        schema_version: u32,
        media_type: &'static str,
        config: Blob,
        layers: Vec<Blob>,
    }
    let blob = |media_type, (digest, size): (Digest, u64)| Blob { media_type, digest, size };
    let written = Written {
        schema_version: 2,
        media_type: OCI_MANIFEST,
        config: blob("application/vnd.oci.image.config.v1+json", config),
        layers: layers.iter().map(|layer| blob("application/vnd.oci.image.layer.v1.tar", *layer)).collect(),
    };
    serde_json::to_vec(&written).expect("plain structs with text keys are always JSON")
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct RawDocument {
    #[serde(default)]
    schema_version: u64,
    media_type: Option<String>,
    artifact_type: Option<String>,
    manifests: Option<Vec<RawDescriptor>>,
    config: Option<RawDescriptor>,
    layers: Option<Vec<RawDescriptor>>,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct RawDescriptor {
    #[serde(default, deserialize_with = "null_is_default")]
    media_type: String,
    digest: String,
    size: u64,
    #[serde(default, deserialize_with = "null_is_default")]
    urls: Vec<String>,
    platform: Option<RawPlatform>,
    annotations: Option<RawAnnotations>,
    artifact_type: Option<String>,
}

#[derive(Deserialize)]
struct RawPlatform {
    #[serde(default, deserialize_with = "null_is_default")]
    os: String,
    #[serde(default, deserialize_with = "null_is_default")]
    architecture: String,
    #[serde(default, deserialize_with = "null_is_default")]
    variant: String,
}

#[derive(Deserialize)]
struct RawAnnotations {
    #[serde(rename = "org.opencontainers.image.ref.name")]
    ref_name: Option<String>,
    #[serde(rename = "vnd.docker.reference.type")]
    reference_type: Option<String>,
}

impl RawDescriptor {
    /// False for what an index lists beside images: attestations, signatures, other artifacts.
    fn may_be_image(&self) -> bool {
        let attached =
            self.annotations.as_ref().is_some_and(|annotations| annotations.reference_type.is_some());
        let unknown = self.platform.as_ref().is_some_and(|platform| platform.architecture == "unknown");
        let artifact = self.artifact_type.as_ref().is_some_and(|kind| !kind.is_empty());
        let known = self.media_type.is_empty() || ACCEPTED.contains(&self.media_type.as_str());
        known && !attached && !unknown && !artifact
    }

    fn check(self) -> Result<Descriptor, ParseManifestError> {
        let digest = self.digest.parse().map_err(|error: kiln_support::digest::ParseDigestError| {
            ParseManifestError::Malformed(error.to_string())
        })?;
        if self.size > i64::MAX as u64 || self.urls.len() > MAX_URLS {
            return Err(ParseManifestError::Malformed(format!(
                "blob {digest} has an impossible size or many URLs"
            )));
        }
        Ok(Descriptor { media_type: self.media_type, digest, size: self.size, urls: self.urls })
    }
}

/// Go writes an empty list or map as `null`; both mean the same.
pub(crate) fn null_is_default<'de, D: Deserializer<'de>, T: Deserialize<'de> + Default>(
    deserializer: D,
) -> Result<T, D::Error> {
    Option::<T>::deserialize(deserializer).map(Option::unwrap_or_default)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use serde_json::json;

    fn digest(seed: u8) -> String {
        Digest::of([seed]).to_string()
    }

    fn image(config: &str, layers: &[&str]) -> serde_json::Value {
        let layers: Vec<_> =
            layers.iter().map(|kind| json!({"mediaType": kind, "digest": digest(1), "size": 5})).collect();
        json!({
            "schemaVersion": 2,
            "config": {"mediaType": config, "digest": digest(0), "size": 2},
            "layers": layers,
        })
    }

    fn parse(value: &serde_json::Value) -> Result<Document, ParseManifestError> {
        parse_document(&serde_json::to_vec(value).expect("JSON"), None)
    }

    fn refused(value: &serde_json::Value, why: &str) {
        let said = parse(value).expect_err(why).to_string();
        assert!(said.contains(why), "{said}");
    }

    #[test]
    fn oci_and_docker_manifests_are_read() {
        for (config, layer) in [
            ("application/vnd.oci.image.config.v1+json", "application/vnd.oci.image.layer.v1.tar+zstd"),
            ("application/vnd.oci.image.config.v1+json", "application/vnd.oci.image.layer.v1.tar"),
            (
                "application/vnd.oci.image.config.v1+json",
                "application/vnd.oci.image.layer.nondistributable.v1.tar+gzip",
            ),
            (
                "application/vnd.docker.container.image.v1+json",
                "application/vnd.docker.image.rootfs.diff.tar.gzip",
            ),
            (
                "application/vnd.docker.container.image.v1+json",
                "application/vnd.docker.image.rootfs.foreign.diff.tar.gzip",
            ),
        ] {
            let Ok(Document::Manifest(manifest)) = parse(&image(config, &[layer])) else { panic!("{layer}") };
            assert_eq!(manifest.layers[0].digest, Digest::of([1]));
            assert_eq!(manifest.config.size, 2);
        }
    }

    #[test]
    fn what_is_no_image_is_refused_with_the_reason() {
        let config = "application/vnd.oci.image.config.v1+json";
        let layer = "application/vnd.oci.image.layer.v1.tar";
        refused(&json!({"schemaVersion": 1, "fsLayers": []}), "schema 1");
        refused(&json!({"schemaVersion": 3, "manifests": []}), "schemaVersion is 3");
        refused(&json!({"schemaVersion": 2}), "neither");
        refused(&image("application/vnd.cncf.helm.config.v1+json", &[]), "artifact of type");
        refused(&image(config, &["application/vnd.in-toto+json"]), "unknown type");
        refused(&image(config, &["application/vnd.oci.image.layer.v1.tar+gzip+encrypted"]), "encrypted");
        refused(&image(config, &[layer; MAX_LAYERS + 1]), "128 layers");
        let mut both = image(config, &[layer]);
        both["manifests"] = json!([]);
        refused(&both, "both");
        let mut bad = image(config, &[layer]);
        bad["layers"][0]["digest"] = json!("sha256:../../x");
        refused(&bad, "not a digest");
        let mut bad = image(config, &[layer]);
        bad["layers"][0]["size"] = json!(-1);
        refused(&bad, "malformed");
        let mut lying = image(config, &[layer]);
        lying["mediaType"] = json!(OCI_INDEX);
        refused(&lying, "it says it is");
        assert!(parse_document(b"<html>", None).is_err());
        assert!(parse_document(&vec![b' '; MAX_MANIFEST_BYTES as usize + 1], None).is_err());
        let said = parse_document(b"{}", Some(SCHEMA_1[1])).expect_err("schema 1").to_string();
        assert!(said.contains("schema 1"), "{said}");
    }

    #[test]
    fn an_index_lists_images_and_nothing_else() {
        let entry = |seed: u8, platform: serde_json::Value| json!({"mediaType": OCI_MANIFEST, "digest": digest(seed), "size": 9, "platform": platform});
        let mut attestation = entry(3, json!({"os": "unknown", "architecture": "unknown"}));
        attestation["annotations"] = json!({"vnd.docker.reference.type": "attestation-manifest"});
        let mut artifact = entry(4, json!(null));
        artifact["artifactType"] = json!("application/vnd.example");
        let index = json!({
            "schemaVersion": 2,
            "mediaType": OCI_INDEX,
            "manifests": [
                entry(1, json!({"os": "linux", "architecture": "amd64"})),
                entry(2, json!({"os": "linux", "architecture": "arm64", "variant": "v8"})),
                attestation,
                artifact,
                {"mediaType": "application/vnd.example.sbom", "digest": digest(5), "size": 1},
                {"mediaType": OCI_INDEX, "digest": digest(6), "size": 1, "annotations": null},
            ],
        });
        let Ok(Document::Index(index)) = parse(&index) else { panic!("an index") };
        let listed: Vec<_> = index
            .entries
            .iter()
            .map(|entry| (entry.platform.as_ref().map(ToString::to_string), entry.is_index))
            .collect();
        let text = |text: &str| Some(text.to_owned());
        assert_eq!(listed, [(text("linux/amd64"), false), (text("linux/arm64"), false), (None, true)]);
    }

    #[test]
    fn a_written_manifest_is_read_again() {
        let bytes = write_manifest((Digest::of("c"), 1), &[(Digest::of("l"), 2)]);
        let Ok(Document::Manifest(manifest)) = parse_document(&bytes, None) else { panic!("a manifest") };
        assert_eq!((manifest.config.digest, manifest.layers[0].digest), (Digest::of("c"), Digest::of("l")));
    }

    proptest! {
        #[test]
        fn parsing_bytes_never_panics(bytes: Vec<u8>) {
            let _ = parse_document(&bytes, None);
        }
    }
}
