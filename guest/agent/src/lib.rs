//! Process 1 of a Kiln guest: carries out what the host asks for, and stands between it and the guest's processes.
//!
//! A request comes in on a connection ([`listen`], [`server`]), is carried out by what knows nothing of connections
//! (`setup`, `workload`), and a command's streams then travel between its pipes and the connection (`session`). The
//! agent has one thread and no standard library: what it is made of is what a restored guest touches first.
//!
//! A guest that is to be saved parks: its processes are frozen (`freezer`), its disk is written out, and the agent
//! stands at the doorbell ([`power`]), in user mode; without one, it waits for the host at its port (`caller`). One that
//! goes on with mail becomes another guest (`adopt`, `identity`), tells the image (`hooks`), and only then lets its processes go on. `docs/guide/clones.md` is what users
//! see of it.

#![no_std]
#![deny(unsafe_code)]

extern crate alloc;

mod adopt;
mod awaited;
mod caller;
mod command;
mod connection;
mod extra;
mod failure;
mod files;
mod freezer;
mod groups;
mod hooks;
mod identity;
pub mod listen;
mod measure;
mod mounts;
pub mod power;
mod relay;
pub mod server;
mod session;
pub mod setup;
mod signals;
pub mod sys;
mod transfer;
mod user;
mod workload;

pub use groups::Groups;
pub use identity::{Files as IdentityFiles, Life};
pub use workload::Place;
