//! OCI image layouts written by hand: every descriptor can be made to lie. OCI image specification, "Image Layout".

use std::fs;
use std::io::Write as _;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result};
use serde_json::{Value, json};
use sha2::{Digest as _, Sha256};

use crate::tar::Tar;

const MANIFEST: &str = "application/vnd.oci.image.manifest.v1+json";
const CONFIG: &str = "application/vnd.oci.image.config.v1+json";
const LAYER: &str = "application/vnd.oci.image.layer.v1.tar";
const LAYER_GZIP: &str = "application/vnd.oci.image.layer.v1.tar+gzip";

/// A layout in a directory.
#[derive(Debug)]
pub struct Layout {
    dir: PathBuf,
    manifests: Vec<Value>,
}

/// A layer as a layout carries it.
#[derive(Clone, Debug)]
pub struct Layer {
    /// What the manifest says it is.
    pub media_type: &'static str,
    /// The bytes of the blob.
    pub blob: Vec<u8>,
    /// What the config says the uncompressed archive's digest is.
    pub diff_id: String,
    /// What the manifest says the blob's digest is.
    pub digest: String,
}

impl Layer {
    /// An archive as it is.
    pub fn plain(archive: Vec<u8>) -> Self {
        Self { media_type: LAYER, diff_id: digest(&archive), digest: digest(&archive), blob: archive }
    }

    /// An archive compressed by gzip.
    pub fn gzip(archive: &[u8]) -> Self {
        let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
        let blob =
            encoder.write_all(archive).and_then(|()| encoder.finish()).expect("writes to memory do not fail");
        Self { media_type: LAYER_GZIP, diff_id: digest(archive), digest: digest(&blob), blob }
    }

    /// A well-formed gzip layer of an archive's entries.
    pub fn of(tar: Tar) -> Self {
        Self::gzip(&tar.finish())
    }

    /// The same with other bytes under a digest that fits them: a blob that is broken and was so from the start.
    #[must_use]
    pub fn with_blob(self, blob: Vec<u8>) -> Self {
        Self { digest: digest(&blob), blob, ..self }
    }

    /// The same with other bytes under the old digest: a blob that was damaged later.
    #[must_use]
    pub fn damaged(self, blob: Vec<u8>) -> Self {
        Self { blob, ..self }
    }
}

/// `sha256:` and the hexadecimal digest.
pub fn digest(bytes: &[u8]) -> String {
    format!("sha256:{}", hex::encode(Sha256::digest(bytes)))
}

impl Layout {
    /// A layout without images.
    ///
    /// # Errors
    /// When the directory cannot be made.
    pub fn create(dir: &Path) -> Result<Self> {
        fs::create_dir_all(dir.join("blobs/sha256"))
            .with_context(|| format!("cannot make {}", dir.display()))?;
        fs::write(dir.join("oci-layout"), r#"{"imageLayoutVersion":"1.0.0"}"#).context("oci-layout")?;
        let layout = Self { dir: dir.to_owned(), manifests: Vec::new() };
        layout.write_index()?;
        Ok(layout)
    }

    /// Where it is.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// Writes a blob under the digest it claims to have.
    ///
    /// # Errors
    /// When it cannot be written.
    pub fn blob(&self, digest: &str, bytes: &[u8]) -> Result<()> {
        let name = digest.strip_prefix("sha256:").context("not a sha256 digest")?;
        fs::write(self.dir.join("blobs/sha256").join(name), bytes).context("cannot write a blob")
    }

    /// Adds an image for linux/amd64 whose config has `config` as its `config` object; returns its manifest's digest.
    ///
    /// # Errors
    /// When it cannot be written.
    pub fn image(&mut self, tag: &str, config: Value, layers: &[Layer]) -> Result<String> {
        let platform = json!({"os": "linux", "architecture": "amd64"});
        self.image_for(Some(tag), &platform, config, layers)
    }

    /// Adds an image for any platform, with a tag or without.
    ///
    /// # Errors
    /// When it cannot be written.
    pub fn image_for(
        &mut self,
        tag: Option<&str>,
        platform: &Value,
        config: Value,
        layers: &[Layer],
    ) -> Result<String> {
        let diff_ids: Vec<&str> = layers.iter().map(|layer| layer.diff_id.as_str()).collect();
        let mut whole = json!({
            "created": "2020-01-01T00:00:00Z",
            "rootfs": {"type": "layers", "diff_ids": diff_ids},
        });
        whole["config"] = config;
        for (key, value) in platform.as_object().context("a platform is an object")? {
            whole[key] = value.clone();
        }
        let config = self.json_blob(CONFIG, &whole)?;
        let mut described = Vec::new();
        for layer in layers {
            self.blob(&layer.digest, &layer.blob)?;
            described.push(json!({
                "mediaType": layer.media_type, "digest": layer.digest, "size": layer.blob.len(),
            }));
        }
        let manifest =
            json!({"schemaVersion": 2, "mediaType": MANIFEST, "config": config, "layers": described});
        let mut descriptor = self.json_blob(MANIFEST, &manifest)?;
        descriptor["platform"] = platform.clone();
        if let Some(tag) = tag {
            descriptor["annotations"] = json!({"org.opencontainers.image.ref.name": tag});
        }
        let name = descriptor["digest"].as_str().unwrap_or_default().to_owned();
        self.manifests.push(descriptor);
        self.write_index()?;
        Ok(name)
    }

    fn json_blob(&self, media_type: &str, value: &Value) -> Result<Value> {
        let bytes = value.to_string().into_bytes();
        let digest = digest(&bytes);
        self.blob(&digest, &bytes)?;
        Ok(json!({"mediaType": media_type, "digest": digest, "size": bytes.len()}))
    }

    fn write_index(&self) -> Result<()> {
        let index = json!({"schemaVersion": 2, "manifests": self.manifests});
        fs::write(self.dir.join("index.json"), index.to_string()).context("index.json")
    }
}
