//! Guest physical memory: regions, checked access, the address map.
//!
//! The guest runs while we read and write its memory, so nothing here hands out a reference into it: values are copied
//! in and out, ring indices are atomics, and bulk data moves between guest memory and files by the kernel
//! ([`Slices`]). An address from the guest is checked at each use; a bad one is an [`OutOfRange`], never a panic.
//!
//! The map, which the whole machine shares:
//!
//! ```text
//! 0            RAM, up to 3 GiB
//! 0xc000_0000  the MMIO hole: devices, IOAPIC, local APICs
//! 4 GiB        the rest of RAM
//! ```
//!
//! A restored machine maps its snapshot file `MAP_PRIVATE` over the same host addresses: [`GuestMemory::overlay`].

mod address;
#[expect(unsafe_code, reason = "one mapping takes the place of another")]
mod image;
mod memory;
mod page_map;
mod slices;
mod watch;

pub use address::{Gpa, Span};
pub use memory::{GuestMemory, HIGH_RAM_START, MMIO_HOLE_START, MapError, OutOfRange, PAGE_BYTES, Region};
pub use page_map::open_page_map;
pub use slices::Slices;
pub use watch::Watch;
