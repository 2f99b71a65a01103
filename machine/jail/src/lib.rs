//! The jail around a monitor: a process that has been taken over by its guest can hurt nothing but itself.
//!
//! ```text
//! host: spawn ──clone, exec──▶ monitor: enter(prepare) ─▶ serves its host ─▶ confine, once it knows its machine
//!        user¹ and pid               the other namespaces,                     address space, files
//!        namespace                   an empty root, Landlock,
//!                                    no capabilities, system calls
//! ```
//! ¹ of a host that is root: in `enter`, after root's user id was given up.
//!
//! Five layers, of which each holds by itself: *namespaces* (no other process, file, network, host name), *Landlock* (no
//! file and no socket, should there be one after all), *no capabilities* and no way to new ones, a *list of system calls*
//! ([`calls::CALLS`]), and *limits* on memory, files and threads. There is no way to leave one out.
//!
//! Nothing is opened by path in a jail: files come as descriptors, and what little of `/proc` and `/sys` a monitor needs,
//! it opens while [`enter`](enter()) lets it.

mod calls;
mod deadline;
mod enter;
mod filter;
mod landlock;
mod limits;
mod spawn;

pub use calls::{CALLS, Call, Need, Rule};
pub use deadline::{EXIT_OVERDUE, deadline};
pub use enter::{EnterError, Jailed, enter};
pub use landlock::version as landlock_version;
pub use limits::{OVERHEAD_BYTES, THREADS_MAX, confine};
pub use spawn::{Child, Launch, Program, SpawnError, spawn};
