//! What kind of host this is.

use std::path::Path;

/// What the guest kernel must leave alone where its kernel mode is emulated, and why it costs nothing elsewhere to leave
/// it on: the parameters are only given on such a host.
///
/// KVM's emulator knows neither POPCNT, CMPXCHG16B nor BMI; string moves cost it per byte, so ERMS and FSRM are hidden to
/// make the kernel copy by words; SMAP's instructions only add to the count. Of XSAVE's family the hypervisor crate
/// completes the two plain ones, which the kernel uses when it sees none of the others. A tick can take longer than the
/// time to the next, so ticks are stretched (a parameter of Kiln's kernel; others ignore it), and neither asynchronous
/// page faults nor steal time add to them. Processors are started one after the other: started together, they spend the
/// host's processors on waiting for each other. What takes seconds there is no stall.
pub(crate) const PVM_COMMAND_LINE: &str = "clearcpuid=popcnt,cx16,erms,fsrm,smap,bmi1,bmi2,\
                                           xsaveopt,xsavec,xgetbv1,xsaves cpuhp.parallel=0 \
                                           tick_stretch=5 no-kvmapf no-steal-acc \
                                           rcupdate.rcu_cpu_stall_suppress=1";

/// Whether KVM here runs without hardware virtualization (a PVM host): guest user mode runs natively, guest kernel mode
/// in KVM's emulator.
pub fn is_pvm() -> bool {
    // Only one vendor module serves /dev/kvm at a time.
    Path::new("/sys/module/kvm_pvm").exists()
}
