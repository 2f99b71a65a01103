//! Layers, merges and scratch disks against those who know: the kernel, `fsck.erofs`, `e2fsck`, `erofs-rs`, umoci, GNU
//! tar, and a model of OCI layering.
#![allow(clippy::unwrap_used, reason = "a panic is how a test fails")]

mod facts;
mod hostile;
mod layers;
mod machine;
mod merges;
mod model;
mod scratch;
