//! What the guest reads from `cpuid`.
//!
//! Everything the host's KVM supports, less what a guest of Kiln has no use for (nested virtualization, performance
//! counters, enclaves), with the topology of this machine: one socket, one core a vCPU, one thread a core.
//! Intel SDM volume 2 "CPUID"; AMD64 APM volume 3 appendix E "Obtaining Processor Information Via the CPUID Instruction";
//! Linux `Documentation/virt/kvm/x86/cpuid.rst` "KVM CPUID bits".

use kiln_hypervisor::CpuidEntry;
use kiln_support::digest::{Digest, Hasher};

const LEAF_FEATURES: u32 = 1;
const LEAF_CACHES: u32 = 4;
const LEAF_EXTENDED_FEATURES: u32 = 7;
const LEAF_PERFORMANCE: u32 = 0xa;
const LEAF_TOPOLOGY: u32 = 0xb;
const LEAF_SGX: u32 = 0x12;
const LEAF_TOPOLOGY_V2: u32 = 0x1f;
const LEAF_HYPERVISOR: u32 = 0x4000_0000;
const LEAF_HYPERVISOR_FEATURES: u32 = 0x4000_0001;
const LEAF_HYPERVISOR_TIMING: u32 = 0x4000_0010;
const LEAF_AMD_FEATURES: u32 = 0x8000_0001;
const LEAF_POWER: u32 = 0x8000_0007;
const LEAF_AMD_SIZES: u32 = 0x8000_0008;
const LEAF_AMD_SVM: u32 = 0x8000_000a;
const LEAF_AMD_CACHES: u32 = 0x8000_001d;
const LEAF_AMD_TOPOLOGY: u32 = 0x8000_001e;
const LEAF_AMD_PERFORMANCE: u32 = 0x8000_0022;
const LEAF_AMD_TOPOLOGY_V2: u32 = 0x8000_0026;

const ECX1_VMX: u32 = 1 << 5;
const ECX1_PDCM: u32 = 1 << 15;
const ECX1_TSC_DEADLINE: u32 = 1 << 24;
const ECX1_HYPERVISOR: u32 = 1 << 31;
const EDX1_HTT: u32 = 1 << 28;
const EBX7_SGX: u32 = 1 << 2;
const ECX7_SGX_LC: u32 = 1 << 30;
const EDX_INVARIANT_TSC: u32 = 1 << 8;
const ECX_AMD_CMP_LEGACY: u32 = 1 << 1;
const ECX_AMD_SVM: u32 = 1 << 2;
const ECX_AMD_PERFCTR: u32 = 1 << 23;
const ECX_AMD_PERFCTR_NB: u32 = 1 << 24;
const ECX_AMD_PERFCTR_LLC: u32 = 1 << 28;

/// What a guest kernel does by hypercall: waking a vCPU, interrupting several, giving way to one.
const EAX_KVM_HYPERCALLS: u32 = 1 << 7 | 1 << 11 | 1 << 13;
/// TLB flushes that leave out vCPUs which do not run; the guest learns that with steal time, which it is told not to use.
const EAX_KVM_PV_TLB_FLUSH: u32 = 1 << 9;

/// What every guest of this host is told of its processor, whatever its shape and however fast its clock: a machine saved where
/// this is the same finds every instruction it may be using.
pub fn class(supported: &[CpuidEntry], on_pvm: bool) -> Digest {
    let mut hasher = Hasher::new();
    hasher.update(&[u8::from(on_pvm)]);
    for entry in for_vcpu(supported, 0, 1, 0, on_pvm) {
        let CpuidEntry { leaf, subleaf, has_subleaf, eax, ebx, ecx, edx } = entry;
        for word in [leaf, subleaf, has_subleaf.into(), eax, ebx, ecx, edx] {
            hasher.update(&word.to_le_bytes());
        }
    }
    hasher.finish()
}

/// The core-type number of a topology level.
const LEVEL_THREAD: u32 = 1;
const LEVEL_CORE: u32 = 2;
/// The rate of the local APICs' bus in kHz, as KVM emulates them.
const APIC_BUS_KHZ: u32 = 1_000_000;

/// The leaves vCPU `index` of `vcpus` gets, from those KVM supports.
///
/// `tsc_khz` is the guest's time stamp counter's rate. `on_pvm` says that guest kernels are emulated here: KVM's emulator
/// then meets a hypercall by writing the right one over it, at an address that a kernel protects from being written, so
/// that the guest gets a page fault in the middle of an interrupt to others. Nothing that takes hypercalls is offered.
pub(crate) fn for_vcpu(
    supported: &[CpuidEntry],
    index: u8,
    vcpus: u8,
    tsc_khz: u32,
    on_pvm: bool,
) -> Vec<CpuidEntry> {
    let topology = Topology { id: index.into(), count: vcpus.into() };
    let mut leaves: Vec<CpuidEntry> = supported
        .iter()
        .filter(|entry| !is_rewritten(entry.leaf))
        .map(|entry| adjusted(*entry, topology))
        .collect();
    if on_pvm {
        for entry in leaves.iter_mut().filter(|entry| entry.leaf == LEAF_HYPERVISOR_FEATURES) {
            entry.eax &= !(EAX_KVM_HYPERCALLS | EAX_KVM_PV_TLB_FLUSH);
        }
    }
    if supported.iter().any(|entry| entry.leaf == LEAF_TOPOLOGY) {
        leaves.extend(topology.leaves());
    }
    leaves.push(CpuidEntry {
        leaf: LEAF_HYPERVISOR_TIMING,
        eax: tsc_khz,
        ebx: APIC_BUS_KHZ,
        ..CpuidEntry::default()
    });
    leaves
}

/// Leaves that are left out, or made anew.
fn is_rewritten(leaf: u32) -> bool {
    matches!(
        leaf,
        LEAF_PERFORMANCE
            | LEAF_TOPOLOGY
            | LEAF_SGX
            | LEAF_TOPOLOGY_V2
            | LEAF_HYPERVISOR_TIMING
            | LEAF_AMD_SVM
            | LEAF_AMD_PERFORMANCE
            | LEAF_AMD_TOPOLOGY_V2
    )
}

fn adjusted(mut entry: CpuidEntry, topology: Topology) -> CpuidEntry {
    match entry.leaf {
        LEAF_FEATURES => {
            entry.ebx = entry.ebx & 0x0000_ffff | topology.count << 16 | topology.id << 24;
            entry.ecx &= !(ECX1_VMX | ECX1_PDCM);
            entry.ecx |= ECX1_HYPERVISOR | ECX1_TSC_DEADLINE;
            set(&mut entry.edx, EDX1_HTT, topology.count > 1);
        }
        // No cache is shared between cores except the last level, which all share.
        LEAF_CACHES if entry.eax & 0x1f != 0 => {
            let level = entry.eax >> 5 & 7;
            let sharing = if level >= 3 { topology.count - 1 } else { 0 };
            entry.eax = entry.eax & 0x3fff | sharing << 14 | (topology.count - 1) << 26;
        }
        LEAF_EXTENDED_FEATURES if entry.subleaf == 0 => {
            entry.ebx &= !EBX7_SGX;
            entry.ecx &= !ECX7_SGX_LC;
        }
        LEAF_HYPERVISOR => entry.eax = entry.eax.max(LEAF_HYPERVISOR_TIMING),
        LEAF_AMD_FEATURES => {
            entry.ecx &= !(ECX_AMD_SVM | ECX_AMD_PERFCTR | ECX_AMD_PERFCTR_NB | ECX_AMD_PERFCTR_LLC);
            if topology.count == 1 {
                entry.ecx &= !ECX_AMD_CMP_LEGACY;
            }
        }
        // A guest that trusts its TSC for life would not survive a move to another machine; without this it takes
        // kvm-clock, which is as fast and is told of such things.
        LEAF_POWER => entry.edx &= !EDX_INVARIANT_TSC,
        LEAF_AMD_SIZES => {
            entry.ecx = entry.ecx & !0xf0ff | topology.id_bits() << 12 | (topology.count - 1);
        }
        LEAF_AMD_CACHES if entry.eax & 0x1f != 0 => {
            let level = entry.eax >> 5 & 7;
            let sharing = if level >= 3 { topology.count - 1 } else { 0 };
            entry.eax = entry.eax & !(0xfff << 14) | sharing << 14;
        }
        LEAF_AMD_TOPOLOGY => {
            entry.eax = topology.id;
            entry.ebx = topology.id; // core id, one thread a core
            entry.ecx = 0; // one node
            entry.edx = 0;
        }
        _ => {}
    }
    entry
}

fn set(word: &mut u32, bit: u32, on: bool) {
    if on {
        *word |= bit;
    } else {
        *word &= !bit;
    }
}

/// One vCPU's place among the others.
#[derive(Clone, Copy)]
struct Topology {
    id: u32,
    count: u32,
}

impl Topology {
    /// How many bits tell the cores apart.
    fn id_bits(self) -> u32 {
        self.count.next_power_of_two().trailing_zeros()
    }

    /// Leaf 0xb: a level of threads, a level of cores, and the end.
    fn leaves(self) -> [CpuidEntry; 3] {
        let level = |subleaf, kind, shift, processors| CpuidEntry {
            leaf: LEAF_TOPOLOGY,
            subleaf,
            has_subleaf: true,
            eax: shift,
            ebx: processors,
            ecx: kind << 8 | subleaf,
            edx: self.id,
        };
        [level(0, LEVEL_THREAD, 0, 1), level(1, LEVEL_CORE, self.id_bits(), self.count), level(2, 0, 0, 0)]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn leaf(leaf: u32, subleaf: u32, words: [u32; 4]) -> CpuidEntry {
        let [eax, ebx, ecx, edx] = words;
        CpuidEntry { leaf, subleaf, has_subleaf: false, eax, ebx, ecx, edx }
    }

    fn find(leaves: &[CpuidEntry], number: u32) -> Vec<CpuidEntry> {
        leaves.iter().filter(|entry| entry.leaf == number).copied().collect()
    }

    #[test]
    fn each_vcpu_reads_its_own_id_everywhere() {
        let supported = [leaf(1, 0, [0; 4]), leaf(0xb, 0, [0; 4]), leaf(LEAF_AMD_TOPOLOGY, 0, [9, 9, 9, 9])];
        for id in 0..5 {
            let leaves = for_vcpu(&supported, id, 5, 1, false);
            assert_eq!(find(&leaves, 1)[0].ebx >> 24, u32::from(id));
            assert!(find(&leaves, 0xb).iter().all(|entry| entry.edx == u32::from(id)));
            assert_eq!(find(&leaves, LEAF_AMD_TOPOLOGY)[0].eax, u32::from(id));
        }
    }

    #[test]
    fn five_cores_need_three_bits() {
        let leaves = for_vcpu(&[leaf(0xb, 0, [0; 4])], 0, 5, 1, false);
        let levels = find(&leaves, 0xb);
        assert_eq!((levels[1].eax, levels[1].ebx), (3, 5));
        assert_eq!(levels[2].ebx, 0);
    }

    #[test]
    fn nested_virtualization_and_counters_are_hidden() {
        let supported = [
            leaf(1, 0, [0, 0, u32::MAX, u32::MAX]),
            leaf(0xa, 0, [u32::MAX; 4]),
            leaf(LEAF_AMD_FEATURES, 0, [u32::MAX; 4]),
            leaf(LEAF_AMD_SVM, 0, [u32::MAX; 4]),
        ];
        let leaves = for_vcpu(&supported, 0, 1, 1, false);
        assert_eq!(find(&leaves, 1)[0].ecx & ECX1_VMX, 0);
        assert_eq!(find(&leaves, LEAF_AMD_FEATURES)[0].ecx & ECX_AMD_SVM, 0);
        assert!(find(&leaves, 0xa).is_empty());
        assert!(find(&leaves, LEAF_AMD_SVM).is_empty());
    }

    #[test]
    fn the_hypervisor_says_how_fast_the_clock_is() {
        let leaves =
            for_vcpu(&[leaf(LEAF_HYPERVISOR, 0, [LEAF_HYPERVISOR + 1, 0, 0, 0])], 0, 1, 2_345_678, false);
        assert_eq!(find(&leaves, LEAF_HYPERVISOR)[0].eax, LEAF_HYPERVISOR_TIMING);
        assert_eq!(find(&leaves, LEAF_HYPERVISOR_TIMING)[0].eax, 2_345_678);
    }

    #[test]
    fn a_class_is_what_the_processor_can_do() {
        let host = [leaf(1, 0, [1, 0x0001_0800, 2, 3]), leaf(7, 0, [0, 4, 5, 6])];
        assert_eq!(class(&host, false), class(&host, false));
        assert_ne!(class(&host, false), class(&host, true));
        let mut other = host;
        other[1].ebx ^= 1 << 5;
        assert_ne!(class(&host, false), class(&other, false));
        // On which of its processors the host was asked.
        other = host;
        other[0].ebx ^= 0xff << 24;
        assert_eq!(class(&host, false), class(&other, false));
    }

    #[test]
    fn no_hypercall_is_offered_where_guest_kernels_are_emulated() {
        let supported = [leaf(LEAF_HYPERVISOR_FEATURES, 0, [0x0100_7efb, 0, 0, 0])];
        let features = |on_pvm| find(&for_vcpu(&supported, 0, 2, 1, on_pvm), LEAF_HYPERVISOR_FEATURES)[0].eax;
        assert_eq!(features(false), 0x0100_7efb);
        assert_eq!(features(true), 0x0100_547b);
    }
}
