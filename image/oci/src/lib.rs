//! Images from registries, OCI layouts and archives into the store.
//!
//! [`pull()`] goes from a name to an [`Image`] in the store: resolve the name to a manifest, choose the platform, fetch
//! the layers that are not there, each in one stream from the network through its checks into an EROFS image, merge
//! them, name the result. What arrives is checked against its digest before anything is named after it; what is in
//! the store is checked by the store.
//!
//! Everything a registry, an archive or an image says is hostile until checked, and every list, size, wait and retry
//! has a limit.
#![forbid(unsafe_code)]

mod auth;
mod config;
mod credentials;
mod error;
mod fetch;
mod http;
mod image;
mod layer;
mod local;
mod manifest;
mod platform;
mod progress;
mod pull;
mod reference;
mod registry;
mod source;

pub use config::{Config, ImageConfig, MAX_CONFIG_BYTES, ParseConfigError, parse_config};
pub use error::{Blame, PullError};
pub use image::{Details, DiskPart, Image, Removed, Summary, find, list, open, remove};
pub use manifest::{
    Descriptor, Document, Entry, Index, MAX_LAYERS, MAX_MANIFEST_BYTES, Manifest, ParseManifestError,
    parse_document,
};
pub use platform::{ParsePlatformError, Platform};
pub use progress::{Event, LayerInfo, Progress};
pub use pull::{ParsePolicyError, PullOptions, PullPolicy, pull};
pub use reference::{ParseReferenceError, Reference};
pub use source::{ParseSourceError, Source};
