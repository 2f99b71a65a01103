//! Manifests, indexes and configs from a registry, and the names that users type.

#![no_main]

use kiln_oci::{Document, MAX_LAYERS, Reference};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|input: (u8, &[u8])| {
    let (kind, bytes) = input;
    let media_type = match kind % 5 {
        0 => None,
        1 => Some("application/vnd.oci.image.manifest.v1+json"),
        2 => Some("application/vnd.oci.image.index.v1+json"),
        3 => Some("application/vnd.docker.distribution.manifest.v2+json"),
        _ => Some("application/vnd.docker.distribution.manifest.list.v2+json"),
    };
    if let Ok(Document::Manifest(manifest)) = kiln_oci::parse_document(bytes, media_type) {
        assert!(manifest.layers.len() <= MAX_LAYERS);
    }
    let _ = kiln_oci::parse_config(bytes);
    if let Ok(name) = std::str::from_utf8(bytes)
        && let Ok(reference) = name.parse::<Reference>()
    {
        let shown = reference.to_string();
        assert_eq!(shown.parse::<Reference>().expect("what we print, we read"), reference);
    }
});
