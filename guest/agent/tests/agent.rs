//! The agent as it is, on a host: real namespaces, real processes, a Unix socket in place of vsock.
//!
//! Each test has an agent of its own in a thread with its own mounts and root: the host's /usr, and an /etc, /dev and
//! /proc made for it. Needs root and the tools of a Debian base system.

#![forbid(unsafe_code)]

#[path = "agent/groups.rs"]
mod groups;
#[path = "agent/guest.rs"]
mod guest;
#[path = "agent/machine.rs"]
mod machine;

#[path = "agent/chains.rs"]
mod chains;
#[path = "agent/commands.rs"]
mod commands;
#[path = "agent/files.rs"]
mod files;
#[path = "agent/namespaces.rs"]
mod namespaces;
#[path = "agent/parking.rs"]
mod parking;
#[path = "agent/ports.rs"]
mod ports;
#[path = "agent/rules.rs"]
mod rules;
#[path = "agent/setup.rs"]
mod setup;
#[path = "agent/streams.rs"]
mod streams;
#[path = "agent/terminals.rs"]
mod terminals;
#[path = "agent/trees.rs"]
mod trees;
#[path = "agent/whole.rs"]
mod whole;
