//! Linux KVM.

mod completion;
mod convert;
mod kick;
mod page_walk;
mod save;
mod vcpu;
mod xstate;

use std::fs::OpenOptions;
use std::io;
use std::ops::RangeInclusive;
use std::os::fd::{FromRawFd, IntoRawFd, OwnedFd};
use std::sync::{Arc, OnceLock};

use kiln_memory::{GuestMemory, MMIO_HOLE_START, PAGE_BYTES};
use kvm_bindings::{
    KVM_CAP_SPLIT_IRQCHIP, KVM_MAX_CPUID_ENTRIES, kvm_clock_data, kvm_enable_cap, kvm_msi,
    kvm_userspace_memory_region,
};
use kvm_ioctls::VmFd;

use crate::{CpuidEntry, Error, Hypervisor, IOAPIC_PINS, MAX_VCPUS, Msi, Vm, requirements};

pub use kick::KvmKick;
pub use vcpu::KvmVcpu;

const DEVICE: &str = "/dev/kvm";
/// The only version there is. Linux `Documentation/virt/kvm/api.rst` §4.1 "`KVM_GET_API_VERSION`".
const API_VERSION: i32 = 12;
/// Three pages below 4 GiB that KVM needs on Intel processors that cannot run real mode; no RAM is there.
const TSS_ADDRESS: usize = 0xfffb_d000;
/// Registers of an interface that guests are not offered, among them clocks that never stand still. Hypervisor Top Level
/// Functional Specification 6.0b, appendix B "MSRs".
const HYPERV_MSRS: RangeInclusive<u32> = 0x4000_0000..=0x4000_0fff;
/// "N" on such a processor; there is no such file where KVM runs on anything but Intel's extensions.
const UNRESTRICTED_GUEST: &str = "/sys/module/kvm_intel/parameters/unrestricted_guest";

/// The host's KVM.
#[derive(Debug)]
pub struct Kvm {
    device: kvm_ioctls::Kvm,
    /// Machines need [`TSS_ADDRESS`]. It is a hidden memory slot, and a second slot waits for milliseconds, so it is
    /// not given to those that do not.
    needs_tss: bool,
    /// The model-specific registers that are part of a vCPU's state.
    msrs: Arc<[u32]>,
    /// What it said of the processor. On a host that is a machine itself each of its CPUID instructions is an exit, together a third of
    /// a millisecond.
    supported: OnceLock<Vec<CpuidEntry>>,
}

impl Kvm {
    /// The host's KVM, with everything Kiln needs of it.
    ///
    /// # Errors
    /// [`Error::Open`] when /dev/kvm cannot be opened, [`Error::Missing`] when it lacks something.
    pub fn open() -> Result<Self, Error> {
        let device = OpenOptions::new().read(true).write(true).open(DEVICE);
        Self::from_device(device.map_err(|source| Error::Open { path: DEVICE, source })?.into())
    }

    /// The same, of a descriptor that somebody else has opened: a process in a jail cannot.
    ///
    /// # Errors
    /// [`Error::Missing`] when it lacks something.
    pub fn from_device(device: OwnedFd) -> Result<Self, Error> {
        let kvm = Self::from_device_unchecked(device)?;
        let missing = kvm.missing();
        if !missing.is_empty() {
            return Err(Error::Missing(missing));
        }
        Ok(kvm)
    }

    /// The same, whatever it lacks: to say what that is.
    ///
    /// # Errors
    /// [`Error::Call`] when the descriptor is not one of KVM.
    pub fn from_device_unchecked(device: OwnedFd) -> Result<Self, Error> {
        // SAFETY: the descriptor is open, and nobody else's from here on.
        let device = unsafe { kvm_ioctls::Kvm::from_raw_fd(device.into_raw_fd()) };
        kick::install_handler();
        let needs_tss = std::fs::read(UNRESTRICTED_GUEST).is_ok_and(|value| value.starts_with(b"N"));
        let msrs = device.get_msr_index_list().map_err(call("KVM_GET_MSR_INDEX_LIST"))?;
        let is_ours = |index: &u32| !HYPERV_MSRS.contains(index);
        let msrs = msrs.as_slice().iter().copied().filter(is_ours).collect();
        Ok(Self { needs_tss, msrs, supported: OnceLock::new(), device })
    }

    /// What [`crate::REQUIREMENTS`] names and this KVM does not have.
    pub fn missing(&self) -> Vec<&'static crate::Requirement> {
        requirements::missing(|number| self.device.check_extension_raw(number.into()) > 0)
    }

    /// The version of the interface, [`Kvm::expected_api_version`] on every Linux since 2.6.22.
    pub fn api_version(&self) -> i32 {
        self.device.get_api_version()
    }

    /// The version Kiln is written for.
    pub fn expected_api_version() -> i32 {
        API_VERSION
    }

    /// The most vCPUs this KVM gives one machine.
    pub fn max_vcpus(&self) -> usize {
        self.device.get_max_vcpus()
    }
}

impl Hypervisor for Kvm {
    type Vm = KvmVm;

    fn supported_cpuid(&self) -> Result<Vec<CpuidEntry>, Error> {
        if let Some(entries) = self.supported.get() {
            return Ok(entries.clone());
        }
        let cpuid = self
            .device
            .get_supported_cpuid(KVM_MAX_CPUID_ENTRIES)
            .map_err(call("KVM_GET_SUPPORTED_CPUID"))?;
        let mut entries: Vec<_> = cpuid.as_slice().iter().map(CpuidEntry::from).collect();
        completion::complete_cpuid(&mut entries);
        Ok(self.supported.get_or_init(|| entries).clone())
    }

    fn create_vm(&self) -> Result<KvmVm, Error> {
        let vm = loop {
            match self.device.create_vm() {
                // A signal can interrupt the creation; nothing was made then.
                Err(errno) if errno.errno() == libc::EINTR => {}
                other => break other.map_err(call("KVM_CREATE_VM"))?,
            }
        };
        Ok(KvmVm {
            vm,
            memory: None,
            has_interrupts: false,
            needs_tss: self.needs_tss,
            msrs: Arc::clone(&self.msrs),
        })
    }
}

/// A machine of KVM.
#[derive(Debug)]
pub struct KvmVm {
    // Closed before the memory below is let go: fields drop in this order.
    vm: VmFd,
    /// What the memory slots point into.
    memory: Option<GuestMemory>,
    has_interrupts: bool,
    needs_tss: bool,
    msrs: Arc<[u32]>,
}

impl Vm for KvmVm {
    type Vcpu = KvmVcpu;

    fn map_memory(&mut self, memory: &GuestMemory) -> Result<(), Error> {
        if self.memory.is_some() || self.has_interrupts {
            return Err(Error::Order("memory is mapped once, and before interrupts are enabled"));
        }
        // From the first slot on the machine refers to the memory, whatever becomes of the others.
        let memory = self.memory.insert(memory.clone());
        for slot in slots(memory) {
            // SAFETY: as `set_slot` wants it: the memory was kept a line above.
            unsafe { set_slot(&self.vm, slot) }?;
        }
        if self.needs_tss {
            self.vm.set_tss_address(TSS_ADDRESS).map_err(call("KVM_SET_TSS_ADDR"))?;
        }
        Ok(())
    }

    fn forget_memory(&self) -> Result<(), Error> {
        let memory = self.memory.as_ref().and_then(|memory| slots(memory).last());
        let memory = memory.ok_or(Error::Order("there is no memory to forget"))?;
        // A slot that goes takes with it all page tables made from any (Linux `Documentation/virt/kvm/api.rst`,
        // `KVM_X86_QUIRK_SLOT_ZAP_ALL`): one of a page, which no vCPU runs to see, costs less than to make those of the memory anew.
        let (slot, guest_phys_addr) = (memory.slot + 1, MMIO_HOLE_START.0);
        let passing =
            kvm_userspace_memory_region { slot, guest_phys_addr, memory_size: PAGE_BYTES, ..memory };
        // SAFETY: as `set_slot` wants it: it is memory that the machine keeps.
        unsafe { set_slot(&self.vm, passing) }?;
        // SAFETY: no memory is behind a slot of no size.
        unsafe { set_slot(&self.vm, kvm_userspace_memory_region { memory_size: 0, ..passing }) }
    }

    fn enable_interrupts(&mut self) -> Result<(), Error> {
        if self.memory.is_none() || self.has_interrupts {
            return Err(Error::Order("interrupts are enabled once, and after memory is mapped"));
        }
        let mut cap = kvm_enable_cap { cap: KVM_CAP_SPLIT_IRQCHIP, ..kvm_enable_cap::default() };
        cap.args[0] = IOAPIC_PINS.into();
        self.vm.enable_cap(&cap).map_err(call("KVM_ENABLE_CAP KVM_CAP_SPLIT_IRQCHIP"))?;
        self.has_interrupts = true;
        Ok(())
    }

    fn create_vcpu(&self, index: u8) -> Result<KvmVcpu, Error> {
        if !self.has_interrupts || index >= MAX_VCPUS {
            return Err(Error::Order("a vCPU is made after interrupts are enabled, with an index below 16"));
        }
        let fd = self.vm.create_vcpu(index.into()).map_err(call("KVM_CREATE_VCPU"))?;
        let memory = self.memory.clone().expect("interrupts are enabled after memory is mapped");
        KvmVcpu::new(fd, memory, Arc::clone(&self.msrs))
    }

    fn signal_msi(&self, msi: Msi) -> Result<(), Error> {
        let msi = kvm_msi { address_lo: msi.address, data: msi.data, ..kvm_msi::default() };
        // The count is how many local APICs took it; none is the guest's business.
        self.vm.signal_msi(msi).map_err(call("KVM_SIGNAL_MSI"))?;
        Ok(())
    }

    fn clock_ns(&self) -> Result<u64, Error> {
        Ok(self.vm.get_clock().map_err(call("KVM_GET_CLOCK"))?.clock)
    }

    fn set_clock_ns(&self, clock_ns: u64) -> Result<(), Error> {
        let clock = kvm_clock_data { clock: clock_ns, ..kvm_clock_data::default() };
        self.vm.set_clock(&clock).map_err(call("KVM_SET_CLOCK"))
    }
}

/// The slots that show `memory` to a guest.
fn slots(memory: &GuestMemory) -> impl Iterator<Item = kvm_userspace_memory_region> {
    (0..).zip(memory.regions()).map(|(slot, region)| kvm_userspace_memory_region {
        slot,
        guest_phys_addr: region.at.0,
        memory_size: region.bytes,
        userspace_addr: region.host_address,
        flags: 0,
    })
}

/// Sets a slot.
///
/// # Safety
/// What is behind it must be memory of which this VM and each of its vCPUs keep a clone: it is not unmapped then before the last
/// descriptor of the machine is closed.
unsafe fn set_slot(vm: &VmFd, slot: kvm_userspace_memory_region) -> Result<(), Error> {
    // SAFETY: the caller's promise.
    unsafe { vm.set_user_memory_region(slot) }.map_err(call("KVM_SET_USER_MEMORY_REGION"))
}

/// Turns an errno into an error that names the call.
fn call(call: &'static str) -> impl Fn(kvm_ioctls::Error) -> Error {
    move |errno| Error::Call { call, source: io::Error::from_raw_os_error(errno.errno()) }
}
