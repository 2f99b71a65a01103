//! What a pull tells its user while it works.

use std::time::Duration;

use kiln_support::digest::Digest;

/// Where a pull tells what it does. Called from several threads, often; must not block.
pub trait Progress: Send + Sync {
    /// Something happened.
    fn event(&self, event: Event<'_>);
}

/// Tells nobody.
impl Progress for () {
    fn event(&self, _: Event<'_>) {}
}

/// What happened in a pull. For each image: `Resolving`, `Resolved`, for each layer its events, `Merging`, `Done`.
#[derive(Debug, Clone, Copy)]
#[non_exhaustive]
pub enum Event<'a> {
    /// The source is asked what a name means.
    Resolving {
        /// The name in full.
        name: &'a str,
    },
    /// It is known what the image is made of.
    Resolved {
        /// The digest of its manifest.
        manifest: &'a Digest,
        /// Its layers from the lowest up.
        layers: &'a [LayerInfo],
    },
    /// Some of a layer arrived.
    LayerProgress {
        /// Which of the layers of `Resolved`.
        layer: usize,
        /// How many of its bytes have arrived by now.
        bytes: u64,
    },
    /// A layer is in the store.
    LayerDone {
        /// Which of the layers of `Resolved`.
        layer: usize,
    },
    /// A request failed in a way that may pass, and will be made again.
    Retrying {
        /// What is being fetched.
        what: &'a str,
        /// What went wrong.
        why: &'a str,
        /// How long the pull waits before it tries again.
        after: Duration,
    },
    /// All layers are there; their merged view is being made.
    Merging,
    /// The image is in the store and has its name.
    Done {
        /// The digest of its manifest.
        manifest: &'a Digest,
        /// True when the store had all of it already.
        unchanged: bool,
    },
}

/// A layer of an image that is being pulled.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LayerInfo {
    /// The digest of the layer as it travels.
    pub digest: Digest,
    /// Its size as it travels, in bytes.
    pub bytes: u64,
    /// True when it need not travel: the store has it, or it is in the image a second time.
    pub present: bool,
}
