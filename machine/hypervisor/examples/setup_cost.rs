//! What each step of making a machine costs on this host.
//!
//! ```text
//! cargo run --release -p kiln-hypervisor --example setup_cost [RUNS]
//! ```
//!
//! Prints minimum, median, 99th percentile and maximum in microseconds, for a machine of one vCPU and 256 MiB.

use std::error::Error;
use std::time::{Duration, Instant};

use kiln_hypervisor::{Exit, Hypervisor, Kick, Kvm, Registers, Vcpu, Vm};
use kiln_memory::GuestMemory;

const MEMORY_BYTES: u64 = 256 << 20;

fn main() -> Result<(), Box<dyn Error>> {
    let runs = std::env::args().nth(1).map_or(Ok(50), |runs| runs.parse())?;
    let mut table: Vec<(&str, Vec<Duration>)> = Vec::new();
    for _ in 0..runs {
        for (row, (step, cost)) in one_machine()?.into_iter().enumerate() {
            if table.len() == row {
                table.push((step, Vec::new()));
            }
            table[row].1.push(cost);
        }
    }
    println!("{:28} {:>10} {:>10} {:>10} {:>10}", "step (us)", "min", "p50", "p99", "max");
    for (step, mut costs) in table {
        costs.sort_unstable();
        let at = |percent: usize| costs[(costs.len() - 1) * percent / 100].as_secs_f64() * 1e6;
        println!("{step:28} {:10.1} {:10.1} {:10.1} {:10.1}", at(0), at(50), at(99), at(100));
    }
    Ok(())
}

fn one_machine() -> Result<Vec<(&'static str, Duration)>, Box<dyn Error>> {
    let mut costs = Vec::new();
    let mut last = Instant::now();
    let mut done = |step, costs: &mut Vec<_>| {
        costs.push((step, last.elapsed()));
        last = Instant::now();
    };
    let kvm = Kvm::open()?;
    done("open and check /dev/kvm", &mut costs);
    let supported = kvm.supported_cpuid()?;
    done("supported_cpuid", &mut costs);
    let memory = GuestMemory::new(MEMORY_BYTES)?;
    done("memory", &mut costs);
    let mut vm = kvm.create_vm()?;
    done("create_vm", &mut costs);
    vm.map_memory(&memory)?;
    done("map_memory", &mut costs);
    vm.enable_interrupts()?;
    done("enable_interrupts", &mut costs);
    let mut vcpu = vm.create_vcpu(0)?;
    done("create_vcpu", &mut costs);
    vcpu.set_cpuid(&supported)?;
    done("set_cpuid", &mut costs);
    let system = vcpu.system_registers()?;
    vcpu.set_system_registers(&system)?;
    done("system_registers, get and set", &mut costs);
    vcpu.set_registers(&Registers { rflags: 2, ..Registers::default() })?;
    done("set_registers", &mut costs);
    vcpu.kick().kick();
    assert_eq!(vcpu.run()?, Exit::Kicked);
    done("first run, ended by a kick", &mut costs);
    drop((vcpu, vm));
    done("close", &mut costs);
    drop(memory);
    done("unmap", &mut costs);
    Ok(costs)
}
