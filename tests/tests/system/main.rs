//! Whole machines: the real `kiln`, real images, real KVM. Run by `cargo xtask test`.
//!
//! A guest takes seconds to boot where KVM has no hardware to use, so a test asks one guest as much as belongs
//! together.

#![forbid(unsafe_code)]

mod bake;
mod cli;
mod clones;
mod config;
mod detached;
mod disk;
mod examples;
mod exit;
mod files;
mod groups;
mod guide;
mod images;
mod jail;
mod lifetime;
mod machine;
mod nasty;
mod pools;
mod ports;
mod restore;
mod serving;
mod signals;
mod streams;
mod templates;
mod terminal;
mod vms;
