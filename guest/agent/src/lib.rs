//! Process 1 of a Kiln guest: carries out what the host asks for, and stands between it and the guest's processes.
//!
//! A request comes in on a connection ([`listen`], [`server`]), is carried out by what knows nothing of connections
//! (`setup`, `workload`), and a command's streams then travel between its pipes and the connection (`session`). The
//! agent has one thread and no standard library: what it is made of is what a restored guest touches first.

#![no_std]
#![deny(unsafe_code)]

extern crate alloc;

mod adopt;
mod command;
mod failure;
mod files;
mod freezer;
mod hooks;
mod identity;
pub mod listen;
mod mounts;
pub mod power;
pub mod server;
mod session;
pub mod setup;
pub mod sys;
mod user;
mod workload;

pub use freezer::Groups;
pub use identity::{Files as IdentityFiles, Life};
pub use workload::Place;
