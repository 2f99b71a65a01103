//! All of a vCPU's state, out of KVM and back into it.
//!
//! The order matters (Linux `Documentation/virt/kvm/api.rst`): system registers before the local APIC, whose mode is in
//! one of them; the local APIC before the registers, or the deadline of its timer is lost; XCR0 before the area that it
//! gives a meaning; whether the vCPU runs last.

use kvm_bindings::{
    KVM_MAX_MSR_ENTRIES, Msrs, kvm_debugregs, kvm_lapic_state, kvm_mp_state, kvm_msr_entry, kvm_regs,
    kvm_sregs, kvm_vcpu_events, kvm_xcrs,
};
use kvm_ioctls::VcpuFd;

use super::call;
use super::convert::{image_of, xsave_of};
use crate::{Error, Events, Msr, VcpuState};

const MSR_TSC: u32 = 0x10;
const MSR_TSC_DEADLINE: u32 = 0x6e0;
const XCR0: u32 = 0;
const LOCAL_APIC_BYTES: usize = 1024;
/// Where the task priority is in a local APIC. Intel SDM volume 3 "Local APIC Register Address Map".
const TASK_PRIORITY: usize = 0x80;

/// The state of the vCPU behind `fd`, with those of the registers `msrs` that can be read.
pub(super) fn save(fd: &VcpuFd, msrs: &[u32]) -> Result<VcpuState, Error> {
    let xcrs = fd.get_xcrs().map_err(call("KVM_GET_XCRS"))?;
    let used = xcrs.xcrs.iter().take(xcrs.nr_xcrs as usize);
    let debug = fd.get_debug_regs().map_err(call("KVM_GET_DEBUGREGS"))?;
    Ok(VcpuState {
        registers: (&fd.get_regs().map_err(call("KVM_GET_REGS"))?).into(),
        system_registers: (&fd.get_sregs().map_err(call("KVM_GET_SREGS"))?).into(),
        xcr0: used.clone().find(|xcr| xcr.xcr == XCR0).map_or(0, |xcr| xcr.value),
        xsave: image_of(&fd.get_xsave().map_err(call("KVM_GET_XSAVE"))?).to_vec(),
        local_apic: fd.get_lapic().map_err(call("KVM_GET_LAPIC"))?.regs.map(|byte| byte as u8).to_vec(),
        debug_registers: [debug.db[0], debug.db[1], debug.db[2], debug.db[3], debug.dr6, debug.dr7],
        events: (&fd.get_vcpu_events().map_err(call("KVM_GET_VCPU_EVENTS"))?).into(),
        run_state: fd.get_mp_state().map_err(call("KVM_GET_MP_STATE"))?.mp_state,
        msrs: readable(fd, msrs)?,
    })
}

/// Gives the vCPU behind `fd` that state, with another task priority if one is given.
pub(super) fn restore(fd: &VcpuFd, state: &VcpuState, priority: Option<u64>) -> Result<(), Error> {
    fd.set_sregs(&kvm_sregs::from(&state.system_registers)).map_err(call("KVM_SET_SREGS"))?;
    fd.set_regs(&kvm_regs::from(&state.registers)).map_err(call("KVM_SET_REGS"))?;
    if state.xcr0 != 0 {
        let mut xcrs = kvm_xcrs { nr_xcrs: 1, ..kvm_xcrs::default() };
        xcrs.xcrs[0].xcr = XCR0;
        xcrs.xcrs[0].value = state.xcr0;
        fd.set_xcrs(&xcrs).map_err(call("KVM_SET_XCRS"))?;
    }
    let image = state.xsave.as_slice().try_into();
    let image = image.map_err(|_| Error::Order("a vector register area of the wrong length"))?;
    // SAFETY: KVM reads 4096 bytes, which is what the structure has, unless the process has asked for features whose
    // area is larger (`ARCH_REQ_XCOMP_GUEST_PERM`), which it never does.
    unsafe { fd.set_xsave(&xsave_of(image)) }.map_err(call("KVM_SET_XSAVE"))?;
    let [d0, d1, d2, d3, dr6, dr7] = state.debug_registers;
    let debug = kvm_debugregs { db: [d0, d1, d2, d3], dr6, dr7, ..kvm_debugregs::default() };
    fd.set_debug_regs(&debug).map_err(call("KVM_SET_DEBUGREGS"))?;
    fd.set_lapic(&lapic_of(&state.local_apic, priority)?).map_err(call("KVM_SET_LAPIC"))?;
    write(fd, &state.msrs)?;
    fd.set_vcpu_events(&kvm_vcpu_events::from(&state.events)).map_err(call("KVM_SET_VCPU_EVENTS"))?;
    fd.set_mp_state(kvm_mp_state { mp_state: state.run_state }).map_err(call("KVM_SET_MP_STATE"))?;
    match fd.kvmclock_ctrl() {
        // A guest that does not use the clock need not be told that it stood still.
        Err(errno) if errno.errno() != libc::EINVAL => Err(call("KVM_KVMCLOCK_CTRL")(errno)),
        _ => Ok(()),
    }
}

/// Those of `indices` that can be read, in the order to write them in: the deadline is compared with the counter.
fn readable(fd: &VcpuFd, indices: &[u32]) -> Result<Vec<Msr>, Error> {
    let mut found = Vec::with_capacity(indices.len());
    let mut rest = indices;
    while !rest.is_empty() {
        let batch = &rest[..rest.len().min(KVM_MAX_MSR_ENTRIES)];
        let entries: Vec<_> =
            batch.iter().map(|&index| kvm_msr_entry { index, ..kvm_msr_entry::default() }).collect();
        let mut list = Msrs::from_entries(&entries).map_err(|_| Error::Msr(batch[0]))?;
        let read = fd.get_msrs(&mut list).map_err(call("KVM_GET_MSRS"))?;
        found.extend(list.as_slice()[..read].iter().map(|msr| Msr { index: msr.index, value: msr.data }));
        // KVM stops at the first one that this machine does not have.
        rest = &rest[if read < batch.len() { read + 1 } else { read }..];
    }
    found.sort_by_key(|msr| match msr.index {
        MSR_TSC => 0,
        MSR_TSC_DEADLINE => 2,
        _ => 1,
    });
    Ok(found)
}

/// Writes `msrs` in their order. One that KVM refuses to write must have its value already.
fn write(fd: &VcpuFd, msrs: &[Msr]) -> Result<(), Error> {
    let mut rest = msrs;
    while !rest.is_empty() {
        let batch = &rest[..rest.len().min(KVM_MAX_MSR_ENTRIES)];
        let entries: Vec<_> = batch
            .iter()
            .map(|msr| kvm_msr_entry { index: msr.index, data: msr.value, ..kvm_msr_entry::default() })
            .collect();
        let list = Msrs::from_entries(&entries).map_err(|_| Error::Msr(batch[0].index))?;
        let written = fd.set_msrs(&list).map_err(call("KVM_SET_MSRS"))?;
        rest = &rest[written..];
        if written < batch.len() {
            let refused = rest[0];
            if readable(fd, &[refused.index])? != [refused] {
                return Err(Error::Msr(refused.index));
            }
            rest = &rest[1..];
        }
    }
    Ok(())
}

/// The task priority of a saved vCPU, as CR8 shows it: the upper four bits of what the local APIC has.
pub(super) fn priority_of(state: &VcpuState) -> u64 {
    state.local_apic.get(TASK_PRIORITY).map_or(0, |priority| u64::from(priority >> 4))
}

fn lapic_of(bytes: &[u8], priority: Option<u64>) -> Result<kvm_lapic_state, Error> {
    let mut bytes: [u8; LOCAL_APIC_BYTES] =
        bytes.try_into().map_err(|_| Error::Order("a local APIC of the wrong length"))?;
    if let Some(priority) = priority {
        bytes[TASK_PRIORITY] = (priority << 4) as u8;
    }
    Ok(kvm_lapic_state { regs: bytes.map(|byte| byte as i8) })
}

impl From<&kvm_vcpu_events> for Events {
    fn from(events: &kvm_vcpu_events) -> Self {
        Self {
            flags: events.flags,
            exception_injected: events.exception.injected,
            exception_nr: events.exception.nr,
            exception_has_error_code: events.exception.has_error_code,
            exception_pending: events.exception.pending,
            exception_error_code: events.exception.error_code,
            exception_has_payload: events.exception_has_payload,
            exception_payload: events.exception_payload,
            interrupt_injected: events.interrupt.injected,
            interrupt_nr: events.interrupt.nr,
            interrupt_soft: events.interrupt.soft,
            interrupt_shadow: events.interrupt.shadow,
            nmi_injected: events.nmi.injected,
            nmi_pending: events.nmi.pending,
            nmi_masked: events.nmi.masked,
            sipi_vector: events.sipi_vector,
            smi_smm: events.smi.smm,
            smi_pending: events.smi.pending,
            smi_smm_inside_nmi: events.smi.smm_inside_nmi,
            smi_latched_init: events.smi.latched_init,
            triple_fault_pending: events.triple_fault.pending,
        }
    }
}

impl From<&Events> for kvm_vcpu_events {
    fn from(events: &Events) -> Self {
        let mut theirs = Self {
            flags: events.flags,
            sipi_vector: events.sipi_vector,
            exception_has_payload: events.exception_has_payload,
            exception_payload: events.exception_payload,
            ..Self::default()
        };
        theirs.exception.injected = events.exception_injected;
        theirs.exception.nr = events.exception_nr;
        theirs.exception.has_error_code = events.exception_has_error_code;
        theirs.exception.pending = events.exception_pending;
        theirs.exception.error_code = events.exception_error_code;
        theirs.interrupt.injected = events.interrupt_injected;
        theirs.interrupt.nr = events.interrupt_nr;
        theirs.interrupt.soft = events.interrupt_soft;
        theirs.interrupt.shadow = events.interrupt_shadow;
        theirs.nmi.injected = events.nmi_injected;
        theirs.nmi.pending = events.nmi_pending;
        theirs.nmi.masked = events.nmi_masked;
        theirs.smi.smm = events.smi_smm;
        theirs.smi.pending = events.smi_pending;
        theirs.smi.smm_inside_nmi = events.smi_smm_inside_nmi;
        theirs.smi.latched_init = events.smi_latched_init;
        theirs.triple_fault.pending = events.triple_fault_pending;
        theirs
    }
}
