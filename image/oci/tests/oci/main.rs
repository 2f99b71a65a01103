//! Pulls from real registries and from servers that misbehave, over real sockets.

mod auth;
mod child;
mod content;
mod local;
mod platforms;
mod policy;
mod redirects;
mod transfer;

use std::path::Path;
use std::sync::{Arc, Mutex};

use kiln_oci::{Event, Image, Progress, PullError, PullOptions, PullPolicy, Source, pull};
use kiln_store::Store;
use kiln_testkit::layout::{Layer, Layout};
use kiln_testkit::registry::Registry;
use kiln_testkit::tar::{Entry, Tar};
use serde_json::{Value, json};

/// A folder with a store and room for more, which goes when dropped.
struct Place {
    folder: tempfile::TempDir,
    store: Store,
}

impl Place {
    fn new() -> Self {
        let folder = tempfile::tempdir().expect("a folder");
        let store = Store::open(folder.path().join("store")).expect("a store");
        Self { folder, store }
    }

    fn path(&self, name: &str) -> std::path::PathBuf {
        self.folder.path().join(name)
    }

    async fn pull(&self, name: &str) -> Result<Image, PullError> {
        self.pull_as(name, &PullOptions::default()).await
    }

    async fn pull_always(&self, name: &str) -> Result<Image, PullError> {
        self.pull_as(name, &PullOptions { policy: PullPolicy::Always, ..PullOptions::default() }).await
    }

    async fn pull_as(&self, name: &str, options: &PullOptions) -> Result<Image, PullError> {
        let source: Source = name.parse().expect("a source");
        pull(&self.store, &source, options, Arc::new(())).await
    }

    /// How many objects the store has.
    fn objects(&self) -> usize {
        let files = std::fs::read_dir(self.store.root().join("objects")).expect("a folder");
        files
            .filter(|file| {
                !file.as_ref().expect("an entry").file_name().to_string_lossy().ends_with(".digests")
            })
            .count()
    }

    /// Checks that a failed pull left no trace: no name, no object, nothing under way.
    fn assert_nothing_is_left(&self) {
        assert_eq!(self.store.tags().expect("sound"), []);
        assert_eq!(self.objects(), 0);
        let under_way = std::fs::read_dir(self.store.root().join("tmp")).expect("a folder").count();
        assert_eq!(under_way, 0);
    }
}

/// A layer with one file.
fn layer(name: &str, content: &[u8]) -> Layer {
    Layer::of(Tar::new().with(&Entry::file(name, content)))
}

/// Content that does not compress, different for each seed.
fn noise(seed: u64, length: usize) -> Vec<u8> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let mut bytes = Vec::with_capacity(length + 8);
    while bytes.len() < length {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        bytes.extend_from_slice(&state.to_le_bytes());
    }
    bytes.truncate(length);
    bytes
}

/// A layout at `folder` with one image named `latest`.
fn one_image(folder: &Path, layers: &[Layer]) -> String {
    let mut layout = Layout::create(folder).expect("a layout");
    layout.image("latest", config(), layers).expect("an image")
}

fn config() -> Value {
    json!({"Cmd": ["/bin/true"], "Env": ["PATH=/bin"]})
}

/// Pushes a new image of these layers and says its digest.
fn push(registry: &Registry, place: &Place, name: &str, layers: &[Layer]) -> String {
    let folder = place.path(&format!("layout-{}", name.replace(['/', ':'], "-")));
    one_image(&folder, layers);
    registry.push(&format!("oci:{}:latest", folder.display()), name).expect("pushed")
}

/// Reads one file of the image's root file system from the store, through the merged view.
fn disk_bytes(image: &Image) -> Vec<u8> {
    use std::os::unix::fs::FileExt;
    let mut all = Vec::new();
    for part in image.disk().expect("a disk") {
        let length = part.data.metadata().expect("a file").len();
        let start = all.len();
        all.resize(start + part.length as usize, 0);
        part.data.read_exact_at(&mut all[start..start + length as usize], 0).expect("read");
    }
    all
}

/// Checks that the image's disk is there and has the content somewhere in its data.
fn assert_has(image: &Image, content: &[u8]) {
    let disk = disk_bytes(image);
    assert!(disk.windows(content.len()).any(|window| window == content), "the disk lacks the content");
}

/// Remembers what a pull told.
#[derive(Default)]
struct Told(Mutex<Vec<String>>);

impl Told {
    fn lines(&self) -> Vec<String> {
        self.0.lock().expect("not poisoned").clone()
    }

    fn count(&self, start: &str) -> usize {
        self.lines().iter().filter(|line| line.starts_with(start)).count()
    }
}

impl Progress for Told {
    fn event(&self, event: Event<'_>) {
        let line = match event {
            Event::LayerProgress { .. } => return,
            Event::Retrying { why, after, .. } => format!("Retrying after {} ms: {why}", after.as_millis()),
            Event::Resolved { layers, .. } => {
                let present = layers.iter().filter(|layer| layer.present).count();
                format!("Resolved {} layers, {present} present", layers.len())
            }
            Event::Done { unchanged, .. } => format!("Done unchanged={unchanged}"),
            event => format!("{event:?}"),
        };
        self.0.lock().expect("not poisoned").push(line);
    }
}
