//! What this host can do, for `kiln doctor`.
//!
//! The host tier does not link KVM, so it asks: `kiln-monitor --probe` prints one `name=value` a line.
//!
//! | name | value |
//! |---|---|
//! | `kvm.open` | `ok`, or why /dev/kvm cannot be opened; nothing else of KVM follows then |
//! | `kvm.api_version` | 12 on every Linux in use |
//! | `kvm.max_vcpus` | the most vCPUs KVM gives one machine |
//! | `kvm.missing` | a capability Kiln needs, why, and what would help, parted by tabs; a line each |
//! | `kvm.create_vm` | `ok`, or why a machine with one vCPU cannot be made |
//! | `host.pvm` | `yes` when guest kernels are emulated (KVM without hardware virtualization) |

use std::process::ExitCode;

use kiln_hypervisor::Kvm;

use super::failure::with_causes;
use crate::host;
use crate::shell::{MIN_MEMORY_MIB, Shape, Shell};

/// The argument that asks for it.
pub const PROBE_ARGUMENT: &str = "--probe";

/// Prints the facts. The exit status says whether a machine can be made.
pub(super) fn main() -> ExitCode {
    println!("host.pvm={}", if host::is_pvm() { "yes" } else { "no" });
    let kvm = match Kvm::open_unchecked() {
        Ok(kvm) => kvm,
        Err(error) => {
            println!("kvm.open={}", with_causes(&error));
            return ExitCode::FAILURE;
        }
    };
    println!("kvm.open=ok");
    println!("kvm.api_version={}", kvm.api_version());
    println!("kvm.max_vcpus={}", kvm.max_vcpus());
    let missing = kvm.missing();
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
