//! What Kiln needs of KVM, as data.

use kvm_bindings as kvm;

/// A thing KVM must be able to do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Requirement {
    /// Its name in `linux/kvm.h`.
    pub name: &'static str,
    /// Its number there.
    pub number: u32,
    /// What Kiln does with it.
    pub why: &'static str,
    /// What a user can do when it is missing.
    pub fix: &'static str,
}

const NEWER_KERNEL: &str = "use a host kernel of 5.10 or later with KVM for x86-64";

/// Everything Kiln needs of KVM. All of it is checked before the first machine is made.
pub const REQUIREMENTS: &[Requirement] = &[
    Requirement {
        name: "KVM_CAP_USER_MEMORY",
        number: kvm::KVM_CAP_USER_MEMORY,
        why: "guest memory is memory of the monitor",
        fix: NEWER_KERNEL,
    },
    Requirement {
        name: "KVM_CAP_EXT_CPUID",
        number: kvm::KVM_CAP_EXT_CPUID,
        why: "each vCPU gets its own CPUID",
        fix: NEWER_KERNEL,
    },
    Requirement {
        name: "KVM_CAP_SPLIT_IRQCHIP",
        number: kvm::KVM_CAP_SPLIT_IRQCHIP,
        why: "local APICs in the kernel, the I/O APIC in the monitor",
        fix: NEWER_KERNEL,
    },
    Requirement {
        name: "KVM_CAP_SIGNAL_MSI",
        number: kvm::KVM_CAP_SIGNAL_MSI,
        why: "devices interrupt by message",
        fix: NEWER_KERNEL,
    },
    Requirement {
        name: "KVM_CAP_IMMEDIATE_EXIT",
        number: kvm::KVM_CAP_IMMEDIATE_EXIT,
        why: "stopping a vCPU never loses a race",
        fix: NEWER_KERNEL,
    },
    Requirement {
        name: "KVM_CAP_TSC_DEADLINE_TIMER",
        number: kvm::KVM_CAP_TSC_DEADLINE_TIMER,
        why: "the guest's only timer, as there is no PIT and no HPET",
        fix: "a host CPU with the TSC deadline timer or a host kernel that emulates it",
    },
    Requirement {
        name: "KVM_CAP_GET_TSC_KHZ",
        number: kvm::KVM_CAP_GET_TSC_KHZ,
        why: "the guest is told its clock's rate instead of measuring it",
        fix: NEWER_KERNEL,
    },
    Requirement {
        name: "KVM_CAP_ADJUST_CLOCK",
        number: kvm::KVM_CAP_ADJUST_CLOCK,
        why: "kvm-clock is the guest's clock",
        fix: NEWER_KERNEL,
    },
    Requirement {
        name: "KVM_CAP_VCPU_EVENTS",
        number: kvm::KVM_CAP_VCPU_EVENTS,
        why: "exceptions that KVM's emulator cannot deliver are delivered by the monitor",
        fix: NEWER_KERNEL,
    },
    Requirement {
        name: "KVM_CAP_MP_STATE",
        number: kvm::KVM_CAP_MP_STATE,
        why: "vCPUs other than the first wait until the guest starts them",
        fix: NEWER_KERNEL,
    },
];

/// One line that names everything in `missing`, why it is needed and what would help.
pub(crate) fn describe(missing: &[&'static Requirement]) -> String {
    let parts: Vec<String> =
        missing.iter().map(|need| format!("KVM lacks {} ({}; {})", need.name, need.why, need.fix)).collect();
    parts.join("; ")
}

/// The requirements for which `has` answers no.
pub(crate) fn missing(has: impl Fn(u32) -> bool) -> Vec<&'static Requirement> {
    REQUIREMENTS.iter().filter(|need| !has(need.number)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_missing_capability_is_named_with_its_reason_and_fix() {
        let lacking = missing(|number| number != kvm::KVM_CAP_SIGNAL_MSI);
        assert_eq!(lacking.len(), 1);
        let text = crate::Error::Missing(lacking).to_string();
        assert!(text.contains("KVM_CAP_SIGNAL_MSI"), "{text}");
        assert!(text.contains("devices interrupt by message"), "{text}");
        assert!(text.contains("5.10"), "{text}");
    }

    #[test]
    fn every_missing_capability_is_named() {
        assert_eq!(missing(|_| false).len(), REQUIREMENTS.len());
        assert!(missing(|_| true).is_empty());
    }
}
