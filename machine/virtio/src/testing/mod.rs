//! The other side of every device, for tests and fuzz targets: a driver that can do anything, right or wrong.
//!
//! Behind the feature `testing`. Functions here panic on misuse, as test code does.

mod driver;
mod fuzz;
mod guest_queue;

pub use driver::{Driver, Raised};
pub use fuzz::{fuzz_block, fuzz_queue, fuzz_registers, fuzz_vsock};
pub use guest_queue::{DESC_F_INDIRECT, DESC_F_NEXT, DESC_F_WRITE, GuestQueue, RawDescriptor};
