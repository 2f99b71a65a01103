//! Run OCI images as hardware-isolated microVMs.
//!
//! A [`Vm`] is a machine with an image's root file system, ready for commands; a [`Child`] is a command in it, with
//! the streams, signals and exit status of a local process. Each machine is one process, the *monitor*
//! ([`monitor`]), which this library starts and speaks to; it never touches guest memory or KVM itself. Dropping a
//! handle ends what it stands for.

#![forbid(unsafe_code)]

pub mod agent;
mod baked;
mod blame;
pub mod blocking;
pub mod bundle;
pub mod detached;
mod disk;
mod files;
pub mod launch;
pub mod monitor;
mod pool;
mod ports;
mod readiness;
mod sealed;
pub mod signal;
mod snapshot;
mod vm;

pub use agent::{AgentError, Child, ExitStatus};
pub use baked::{Image, ImageBuilder, ImageError, WarmingUp};
pub use blame::Blame;
pub use bundle::{BuiltIn, BundleError, GuestBundle};
pub use disk::{Disk, Extent, Scratch, ScratchError};
pub use files::{Copied, CopyOptions, FileError, GuestFile};
pub use kiln_oci as image;
pub use kiln_protocol::{Reason, WindowSize};
pub use kiln_store as store;
pub use kiln_support::causes::with_causes;
pub use kiln_support::digest::Digest;
pub use monitor::{BootTimes, MachineEnd, MonitorError, MonitorProgram, RestoreTimes};
pub use pool::{OnRelease, Pool, PoolBuilder, PoolError, PoolStats, SizeError};
pub use ports::{EXPOSED_CONNECTIONS_MAX, ExposeError, ExposedPort, GuestStream};
pub use snapshot::{
    Bake, BakeError, HostFile, HostFileError, LogPattern, LogPatternError, SnapshotError, Trigger, verify,
};
pub use vm::{
    AskError, ExecBuilder, ExecError, GuestStats, HostStats, MEMORY_MIN_MIB, MachineCopy, Output, Phase,
    Standstill, Stats, Times, VCPUS_MAX, Vm, VmBuilder, VmError, random_name,
};
