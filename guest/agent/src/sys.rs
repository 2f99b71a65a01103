//! All the agent does that the compiler cannot check: the device page, vsock addresses, starting and reaping a child.

#![allow(unsafe_code)]

mod page;
mod vsock;

pub use page::PowerPage;
pub use vsock::{accept_from_host, listen_on_vsock};
