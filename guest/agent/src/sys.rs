//! All the agent does that the compiler cannot check: the device page, and the system calls rustix has not.

#![allow(unsafe_code)]

#[cfg(target_arch = "x86_64")]
mod x86_64;
#[cfg(target_arch = "x86_64")]
use x86_64 as arch;

mod child;
mod clock;
mod console;
mod heap;
mod page;
mod random;
mod read;
mod vsock;

pub(crate) use arch::RT_SIGTIMEDWAIT;
pub use child::{
    Child, END_WITH_ORPHANS, Ended, Failure, Stage, Start, reap, signal, signal_all, start, start_reaper,
};
pub use clock::{monotonic_ns, realtime_ns, ticks};
pub use console::say;
pub use heap::Heap;
pub use page::{Mail, Mailbox, PowerPage, notice, wipe};
pub use random::add_entropy;
pub use read::read_onto;
pub use vsock::{accept_from_host, knock, listen_on_vsock};
