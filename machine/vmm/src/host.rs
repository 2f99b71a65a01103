//! What kind of host this is.

use std::path::Path;
use std::sync::LazyLock;

/// What the guest kernel is told where its kernel mode is emulated. `interpreted` is a parameter of Kiln's kernel
/// (`guest/kernel/patches/*-x86-interpreted.patch`); others ignore it.
///
/// It hides what KVM's emulator does not know: POPCNT, CMPXCHG16B, BMI, and of XSAVE's family all but the two plain ones,
/// which the hypervisor crate completes; and what costs more there than it brings: string moves by the byte, SMAP,
/// asynchronous page faults, steal time, most ticks, messages of the boot that nobody sees. Processors are started one
/// after the other: started together, they spend the host's processors on waiting for each other. What takes seconds there
/// is no stall.
pub const PVM_COMMAND_LINE: &str = "interpreted cpuhp.parallel=0 rcupdate.rcu_cpu_stall_suppress=1";

/// Whether KVM here runs without hardware virtualization (a PVM host): guest user mode runs natively, guest kernel mode
/// in KVM's emulator.
///
/// It is looked up once: a monitor in its jail still knows it, and cannot look.
pub fn is_pvm() -> bool {
    // Only one vendor module serves /dev/kvm at a time.
    static IS_PVM: LazyLock<bool> = LazyLock::new(|| Path::new("/sys/module/kvm_pvm").exists());
    *IS_PVM
}
