//! The content-addressed store on disk, shared by processes and safe against crashes.
//!
//! # What is in it
//! ```text
//! <root>/format           the version of this layout
//!        lock             flock: shared to open and to publish, exclusive to collect
//!        blobs/<hex>      small content (manifests, configs), named by its SHA-256
//!        objects/<hex>    big content (file system images), named by its digest tree's root
//!        objects/<hex>.digests   the SHA-256 of each 64 KiB block of it
//!        layers/<hex>.<format>   record: which object a layer (by its diff id) was made into
//!        images/<hex>     record: what an image (by its manifest's digest) is made of
//!        tags/<hex>       record: what a name means, and for which platform
//!        snapshots/<hex>  record: what a saved machine (by its key) is made of
//!        locks/<hex>      flock: held by who makes the snapshot of a key
//!        tmp/<random>/    one writer's session: what it is writing, and pins on what it relies on
//! ```
//!
//! # Rules
//! - What is named by its content never changes; it is written in a session's folder, synced, and renamed into place.
//!   So a reader sees it whole or not at all, two writers of the same thing do no harm, and `kill -9` leaves litter
//!   in `tmp/` at worst. The litter's owner held a lock; when the lock is free the owner is dead, and the next
//!   [`Store::open`] sweeps it, and [`Store::swept`] says so.
//! - Everything read is checked: blobs against their name at each read, records against the checksum they end with,
//!   the digests of an object against its name when it is opened, its blocks against the digests when they are read.
//! - Nothing is removed but by [`Store::collect`]: what neither a tag nor a snapshot reaches and no live session has
//!   pinned. A template is reached while a tag means its image. Open files stay readable, so running machines do not notice.
//!
//! Blocks shared below layers and policies of collection change what is behind [`Object`] and what untags; neither
//! changes these rules.
#![forbid(unsafe_code)]

mod collect;
mod draft;
mod error;
mod object;
mod record;
mod session;
mod snapshot;
mod store;
mod writer;

pub use collect::{Collected, Swept};
pub use draft::Draft;
pub use error::StoreError;
pub use object::{Object, ObjectId, ObjectReader};
pub use record::{ImageRecord, LayerRecord, Tag};
pub use session::Session;
pub use snapshot::{
    BakeLock, Snapshot, SnapshotCommands, SnapshotImage, SnapshotKind, SnapshotRecord, is_snapshot_name,
};
pub use store::{MAX_BLOB_BYTES, Store};
pub use writer::{MAX_OBJECT_BYTES, ObjectWriter};
