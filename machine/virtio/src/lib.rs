//! Virtio devices over MMIO for drivers that cannot be trusted.
//!
//! ```text
//! vCPU thread ── MMIO exit ──▶ Transport ── start / kick / stop ──▶ Device ── own thread ──▶ files, sockets
//!                                 │                                   │
//!                                 └──────────── Session ──────────────┘
//!                              memory, queues, agreed features, Signal
//! ```
//!
//! [`Transport`] is the register state machine of virtio-mmio; it knows nothing of any device. A [`Device`] gets a
//! [`Session`] when the driver says it is ready and gives it back when it is stopped. A [`Queue`] refuses every shape
//! the driver may not build. Whatever the driver does wrong ends its device with "needs reset" and nothing else.
//!
//! Devices: [`Block`], [`Vsock`], [`Rng`]. A further one (net, fs, balloon) is one more module here with one type that
//! implements [`Device`]; nothing else changes.
#![forbid(unsafe_code)]

mod bell;
mod block;
mod device;
mod queue;
mod rng;
#[cfg(any(test, feature = "testing"))]
pub mod testing;
mod transport;
mod vsock;
mod worker;

pub use block::{Block, DataFile, Disk, DiskError, DiskFault, Extent};
pub use device::{Device, Interrupt, Session, Signal};
pub use queue::{Broken, Chain, MAX_QUEUE_ENTRIES, Queue, QueueLayout, QueueProgress};
pub use rng::Rng;
pub use transport::{QueueState, RestoreError, TRANSPORT_BYTES, Transport, TransportState};
pub use vsock::{ConnectError, OpenStream, Vsock, VsockPorts, unix_connector};
