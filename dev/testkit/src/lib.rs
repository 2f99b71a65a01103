//! What tests need and users do not: images of every kind, made on this machine by the tools people use, and guests in
//! the tests' own process.

pub mod guest;
pub mod http;
pub mod image;
pub mod initramfs;
pub mod inject;
pub mod kernel;
pub mod layout;
pub mod nasty;
pub mod registry;
pub mod tar;
mod tool;

pub use tool::{capture, copy_program, run};
