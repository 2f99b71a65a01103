//! Machines that run guests of a few instructions, on this host's KVM, and the monitor program around them.
//!
//! They need a readable and writable /dev/kvm and fail without one. What a real kernel does is tested elsewhere; here
//! each claim is one guest that is only that claim.

mod deadline;
mod exits;
mod guest;
mod jail;
mod kernel_files;
mod linux;
mod monitor;
mod parked;
mod snapshot;
mod start;
