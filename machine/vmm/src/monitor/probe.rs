//! What this host can do, for `kiln doctor`.
//!
//! The host tier does not link KVM, so it asks: `kiln-monitor --probe` prints one `name=value` a line.
//!
//! | name | value |
//! |---|---|
//! | `jail` | `ok`, or why a monitor cannot be jailed here, and what would help, parted by a tab; nothing else follows then |
//! | `jail.landlock` | the kernel's version of Landlock |
//! | `kvm.open` | `ok`, or why /dev/kvm is of no use; nothing else of KVM follows then |
//! | `kvm.api_version` | 12 on every Linux in use |
//! | `kvm.max_vcpus` | the most vCPUs KVM gives one machine |
//! | `kvm.missing` | a capability Kiln needs, why, and what would help, parted by tabs; a line each |
//! | `kvm.create_vm` | `ok`, or why a machine with one vCPU cannot be made |
//! | `host.pvm` | `yes` when guest kernels are emulated (KVM without hardware virtualization) |

use std::os::fd::OwnedFd;
use std::process::ExitCode;

use kiln_hypervisor::{Kvm, Requirement};

use super::device;
use super::failure::{Failure, with_causes};
use crate::host;
use crate::shell::{MIN_MEMORY_MIB, Shape, Shell, ShellError};

/// The argument that asks for it.
pub const PROBE_ARGUMENT: &str = "--probe";

/// Prints the facts. The exit status says whether a machine can be made.
pub(super) fn main() -> ExitCode {
    let landlock = kiln_jail::landlock_version().ok();
    let kvm = match kiln_jail::enter(open) {
        Ok(jailed) => jailed.prepared,
        Err(error) => {
            println!("jail={}\t{}", with_causes(&error), error.hint());
            return ExitCode::FAILURE;
        }
    };
    println!("jail=ok");
    if let Some(version) = landlock {
        println!("jail.landlock={version}");
    }
    println!("host.pvm={}", if host::is_pvm() { "yes" } else { "no" });
    let (kvm, missing) = match kvm {
        Ok(opened) => opened,
        Err(failure) => {
            println!("kvm.open={}", failure.message);
            return ExitCode::FAILURE;
        }
    };
    println!("kvm.open=ok");
    for need in &missing {
        println!("kvm.missing={}\t{}\t{}", need.name, need.why, need.fix);
    }
    let smallest = Shape::new(MIN_MEMORY_MIB, 1).expect("the smallest shape is one");
    match Shell::create(&kvm, smallest) {
        Ok(_) => println!("kvm.create_vm=ok"),
        Err(error) => {
            println!("kvm.create_vm={}", with_causes(&error));
            return ExitCode::FAILURE;
        }
    }
    if missing.is_empty() { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}

/// The host's KVM and what it lacks. What is asked here, a monitor in its jail does not ask.
fn open(files: Vec<OwnedFd>) -> Result<(Kvm, Vec<&'static Requirement>), Failure> {
    host::is_pvm();
    let kvm = Kvm::from_device_unchecked(device(files)?).map_err(ShellError::from)?;
    println!("kvm.api_version={}", kvm.api_version());
    println!("kvm.max_vcpus={}", kvm.max_vcpus());
    let missing = kvm.missing();
    Ok((kvm, missing))
}
