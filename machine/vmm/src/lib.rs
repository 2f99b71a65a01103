//! The monitor of one virtual machine: boot, devices, exit loop.
//!
//! ```text
//! Shell::create ─▶ boot::load_kernel, boot::prepare ─▶ Machine::start ─▶ … ─▶ Machine::wait
//! memory, local     kernel, initramfs, tables          devices,             how it ended
//! APICs, vCPUs      in guest memory                    a thread a vCPU
//! ```
//!
//! A running machine can be [paused](Machine::pause), and what is [saved](Paused::save) of it
//! [restored](Paused::restore) in another shell: there it goes on at the same instruction.
#![forbid(unsafe_code)]

pub mod boot;
mod clock;
mod console;
mod control;
mod cpuid;
mod devices;
mod host;
pub mod layout;
mod live;
mod machine;
pub mod mailbox;
pub mod monitor;
mod paused;
mod rehearsal;
mod saved;
mod shell;

pub use clock::{Nanoseconds, monotonic};
pub use console::Console;
pub use control::End;
pub use cpuid::class as cpu_class;
pub use devices::power;
pub use devices::{DeviceError, DevicesState, IoapicState, SerialState};
pub use host::{PVM_COMMAND_LINE, is_pvm};
pub use live::{LiveError, LiveState, Saved};
pub use machine::{Machine, Notice, Observer, StartError};
pub use paused::{MachineState, Parking, Paused, RestoreError, SaveError};
pub use rehearsal::RehearsalError;
pub use saved::SectionError;
pub use shell::{MAX_MEMORY_MIB, MIN_MEMORY_MIB, Shape, ShapeError, Shell, ShellError};
