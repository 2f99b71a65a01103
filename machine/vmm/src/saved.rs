//! A paused machine as the sections of a snapshot, and back.
//!
//! Each section is one message, encoded as protobuf by its own canonical rules: what decodes to a message that encodes to
//! other bytes is refused, so there is nothing in a section that nobody looked at.

use kiln_hypervisor::{DescriptorTable, Events, Msr, Registers, Segment, SystemRegisters, VcpuState};
use kiln_memory::Gpa;
use kiln_snapshot::Section;
use kiln_virtio::{QueueLayout, QueueProgress, QueueState, TransportState};
use prost::Message;

use crate::devices::{DevicesState, IoapicState, SerialState};
use crate::paused::{MachineState, Parking};
use crate::shell::{Shape, ShapeError};

/// The version of a section's content.
fn version_of(name: &str) -> u32 {
    match name {
        // 2 says where an agent is parked, and not only whether. An agent of 3 knows a generation that bounds its guest's processes; one
        // before would not heed it.
        "machine" => 3,
        _ => 1,
    }
}

/// The sections are not those of a machine. Whoever the snapshot comes from is to blame.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum SectionError {
    /// One is missing, or another is in its place.
    #[error("the snapshot's section {0} is missing or out of place")]
    Missing(String),
    /// There is one that no machine of this shape has.
    #[error("the snapshot has a section {0} that is not known")]
    Unknown(String),
    /// One is of another version.
    #[error(
        "the snapshot's section {name} is of version {version}; this Kiln reads version {}",
        version_of(name)
    )]
    Version {
        /// Which one.
        name: String,
        /// Its version.
        version: u32,
    },
    /// One is not what it should be.
    #[error("the snapshot's section {0} is malformed")]
    Malformed(String),
    /// Its agent waits where this monitor would not look for it.
    #[error("the snapshot's guest is parked in a way that is not known, number {0}")]
    Parking(u32),
    /// The machine is of an impossible size.
    #[error("the snapshot's machine: {0}")]
    Shape(#[from] ShapeError),
}

impl MachineState {
    /// The sections of a snapshot, in their order.
    pub fn to_sections(&self) -> Vec<Section> {
        let machine = MachineMessage {
            memory_mib: self.shape.memory_mib(),
            vcpus: self.shape.vcpus().into(),
            clock_ns: self.clock_ns,
            tsc_khz: self.tsc_khz,
            parking: number_of(self.parking),
            virtio: self.devices.virtio.len() as u32,
        };
        let mut sections = vec![section("machine".into(), &machine)];
        for (index, vcpu) in self.vcpus.iter().enumerate() {
            sections.push(section(format!("vcpu.{index}"), &VcpuMessage::from(vcpu)));
        }
        sections.push(section("serial".into(), &SerialMessage::from(&self.devices.serial)));
        sections.push(section("ioapic".into(), &IoapicMessage::from(&self.devices.ioapic)));
        for (index, device) in self.devices.virtio.iter().enumerate() {
            sections.push(section(format!("virtio.{index}"), &TransportMessage::from(device)));
        }
        sections
    }

    /// The machine of a snapshot's sections.
    ///
    /// # Errors
    /// [`SectionError`]
    pub fn from_sections(sections: &[Section]) -> Result<Self, SectionError> {
        let mut rest = sections.iter();
        let machine: MachineMessage = next(&mut rest, "machine")?;
        let shape = Shape::new(machine.memory_mib, machine.vcpus)?;
        let parking = parking_of(machine.parking).ok_or(SectionError::Parking(machine.parking))?;
        let mut vcpus = Vec::new();
        for index in 0..shape.vcpus() {
            let name = format!("vcpu.{index}");
            let vcpu: VcpuMessage = next(&mut rest, &name)?;
            vcpus.push(vcpu.state().ok_or(SectionError::Malformed(name))?);
        }
        let serial: SerialMessage = next(&mut rest, "serial")?;
        let serial = serial.state().ok_or_else(|| SectionError::Malformed("serial".into()))?;
        let ioapic: IoapicMessage = next(&mut rest, "ioapic")?;
        let ioapic = ioapic.state().ok_or_else(|| SectionError::Malformed("ioapic".into()))?;
        let mut virtio = Vec::new();
        // A claim of more than there are sections ends at the first that is missing.
        for index in 0..machine.virtio {
            let device: TransportMessage = next(&mut rest, &format!("virtio.{index}"))?;
            virtio.push(device.state());
        }
        if let Some(section) = rest.next() {
            return Err(SectionError::Unknown(section.name.clone()));
        }
        let devices = DevicesState { serial, ioapic, virtio };
        Ok(Self { shape, clock_ns: machine.clock_ns, tsc_khz: machine.tsc_khz, parking, vcpus, devices })
    }
}

/// The ways to be parked, as a section has them.
const PARKINGS: [Parking; 3] = [Parking::None, Parking::Doorbell, Parking::Port];

fn number_of(parking: Parking) -> u32 {
    match parking {
        Parking::None => 0,
        Parking::Doorbell => 1,
        Parking::Port => 2,
    }
}

fn parking_of(number: u32) -> Option<Parking> {
    PARKINGS.into_iter().find(|parking| number_of(*parking) == number)
}

fn section(name: String, message: &impl Message) -> Section {
    let version = version_of(&name);
    Section { name, version, content: message.encode_to_vec() }
}

/// The message of the next section, which must be `name`.
fn next<'a, M: Message + Default>(
    sections: &mut impl Iterator<Item = &'a Section>,
    name: &str,
) -> Result<M, SectionError> {
    let section = sections.next().filter(|section| section.name == name);
    let section = section.ok_or_else(|| SectionError::Missing(name.into()))?;
    if section.version != version_of(name) {
        return Err(SectionError::Version { name: name.into(), version: section.version });
    }
    let malformed = || SectionError::Malformed(name.into());
    let message = M::decode(&section.content[..]).map_err(|_| malformed())?;
    if message.encode_to_vec() != section.content {
        return Err(malformed());
    }
    Ok(message)
}

#[derive(Clone, PartialEq, Message)]
struct MachineMessage {
    #[prost(uint32, tag = "1")]
    memory_mib: u32,
    #[prost(uint32, tag = "2")]
    vcpus: u32,
    #[prost(uint64, tag = "3")]
    clock_ns: u64,
    #[prost(uint32, tag = "4")]
    virtio: u32,
    #[prost(uint32, tag = "5")]
    tsc_khz: u32,
    #[prost(uint32, tag = "6")]
    parking: u32,
}

#[derive(Clone, PartialEq, Message)]
struct VcpuMessage {
    /// The general registers, in the order of [`Registers`].
    #[prost(fixed64, repeated, tag = "1")]
    registers: Vec<u64>,
    /// CS, DS, ES, FS, GS, SS, TR, LDT.
    #[prost(message, repeated, tag = "2")]
    segments: Vec<SegmentMessage>,
    /// GDT base, GDT limit, IDT base, IDT limit, CR0, CR2, CR3, CR4, CR8, EFER, APIC base.
    #[prost(fixed64, repeated, tag = "3")]
    control: Vec<u64>,
    #[prost(fixed64, tag = "4")]
    xcr0: u64,
    #[prost(bytes = "vec", tag = "5")]
    xsave: Vec<u8>,
    #[prost(bytes = "vec", tag = "6")]
    local_apic: Vec<u8>,
    #[prost(fixed64, repeated, tag = "7")]
    debug_registers: Vec<u64>,
    /// The fields of [`Events`], in their order.
    #[prost(uint64, repeated, tag = "8")]
    events: Vec<u64>,
    #[prost(uint32, tag = "9")]
    run_state: u32,
    #[prost(uint32, repeated, tag = "10")]
    msr_indices: Vec<u32>,
    #[prost(fixed64, repeated, tag = "11")]
    msr_values: Vec<u64>,
}

#[derive(Clone, PartialEq, Message)]
struct SegmentMessage {
    #[prost(fixed64, tag = "1")]
    base: u64,
    #[prost(uint32, tag = "2")]
    limit: u32,
    #[prost(uint32, tag = "3")]
    selector: u32,
    /// Type, DPL, and then a bit each: present, default 32, code or data, long, granular.
    #[prost(uint32, tag = "4")]
    attributes: u32,
}

impl From<&Segment> for SegmentMessage {
    fn from(segment: &Segment) -> Self {
        let bits =
            [segment.present, segment.default_32, segment.code_or_data, segment.long, segment.granular];
        let flags = bits.iter().enumerate().fold(0, |flags, (at, bit)| flags | u32::from(*bit) << at);
        Self {
            base: segment.base,
            limit: segment.limit,
            selector: segment.selector.into(),
            attributes: u32::from(segment.kind) | u32::from(segment.dpl) << 4 | flags << 6,
        }
    }
}

impl SegmentMessage {
    fn state(&self) -> Option<Segment> {
        let bit = |at: u32| self.attributes >> (6 + at) & 1 != 0;
        (self.attributes < 1 << 11).then_some(())?;
        Some(Segment {
            base: self.base,
            limit: self.limit,
            selector: self.selector.try_into().ok()?,
            kind: (self.attributes & 0xf) as u8,
            dpl: (self.attributes >> 4 & 3) as u8,
            present: bit(0),
            default_32: bit(1),
            code_or_data: bit(2),
            long: bit(3),
            granular: bit(4),
        })
    }
}

impl From<&VcpuState> for VcpuMessage {
    fn from(state: &VcpuState) -> Self {
        let r = &state.registers;
        let s = &state.system_registers;
        let e = &state.events;
        Self {
            registers: vec![
                r.rax, r.rbx, r.rcx, r.rdx, r.rsi, r.rdi, r.rsp, r.rbp, r.r8, r.r9, r.r10, r.r11, r.r12,
                r.r13, r.r14, r.r15, r.rip, r.rflags,
            ],
            segments: [s.cs, s.ds, s.es, s.fs, s.gs, s.ss, s.tr, s.ldt].iter().map(Into::into).collect(),
            control: vec![
                s.gdt.base,
                s.gdt.limit.into(),
                s.idt.base,
                s.idt.limit.into(),
                s.cr0,
                s.cr2,
                s.cr3,
                s.cr4,
                s.cr8,
                s.efer,
                s.apic_base,
            ],
            xcr0: state.xcr0,
            xsave: state.xsave.clone(),
            local_apic: state.local_apic.clone(),
            debug_registers: state.debug_registers.to_vec(),
            events: vec![
                e.flags.into(),
                e.exception_injected.into(),
                e.exception_nr.into(),
                e.exception_has_error_code.into(),
                e.exception_pending.into(),
                e.exception_error_code.into(),
                e.exception_has_payload.into(),
                e.exception_payload,
                e.interrupt_injected.into(),
                e.interrupt_nr.into(),
                e.interrupt_soft.into(),
                e.interrupt_shadow.into(),
                e.nmi_injected.into(),
                e.nmi_pending.into(),
                e.nmi_masked.into(),
                e.sipi_vector.into(),
                e.smi_smm.into(),
                e.smi_pending.into(),
                e.smi_smm_inside_nmi.into(),
                e.smi_latched_init.into(),
                e.triple_fault_pending.into(),
            ],
            run_state: state.run_state,
            msr_indices: state.msrs.iter().map(|msr| msr.index).collect(),
            msr_values: state.msrs.iter().map(|msr| msr.value).collect(),
        }
    }
}

impl VcpuMessage {
    fn state(self) -> Option<VcpuState> {
        let [rax, rbx, rcx, rdx, rsi, rdi, rsp, rbp, r8, r9, r10, r11, r12, r13, r14, r15, rip, rflags] =
            self.registers.try_into().ok()?;
        let segments = self.segments.iter().map(SegmentMessage::state).collect::<Option<Vec<_>>>()?;
        let [cs, ds, es, fs, gs, ss, tr, ldt] = segments.try_into().ok()?;
        let [gdt_base, gdt_limit, idt_base, idt_limit, cr0, cr2, cr3, cr4, cr8, efer, apic_base] =
            self.control.try_into().ok()?;
        let table = |base, limit: u64| Some(DescriptorTable { base, limit: limit.try_into().ok()? });
        if self.msr_indices.len() != self.msr_values.len() {
            return None;
        }
        let msrs = self.msr_indices.into_iter().zip(self.msr_values);
        Some(VcpuState {
            registers: Registers {
                rax,
                rbx,
                rcx,
                rdx,
                rsi,
                rdi,
                rsp,
                rbp,
                r8,
                r9,
                r10,
                r11,
                r12,
                r13,
                r14,
                r15,
                rip,
                rflags,
            },
            system_registers: SystemRegisters {
                cs,
                ds,
                es,
                fs,
                gs,
                ss,
                tr,
                ldt,
                gdt: table(gdt_base, gdt_limit)?,
                idt: table(idt_base, idt_limit)?,
                cr0,
                cr2,
                cr3,
                cr4,
                cr8,
                efer,
                apic_base,
            },
            xcr0: self.xcr0,
            xsave: self.xsave,
            local_apic: self.local_apic,
            debug_registers: self.debug_registers.try_into().ok()?,
            events: events(&self.events)?,
            run_state: self.run_state,
            msrs: msrs.map(|(index, value)| Msr { index, value }).collect(),
        })
    }
}

fn events(fields: &[u64]) -> Option<Events> {
    let &[
        flags,
        exception_injected,
        exception_nr,
        exception_has_error_code,
        exception_pending,
        exception_error_code,
        exception_has_payload,
        exception_payload,
        interrupt_injected,
        interrupt_nr,
        interrupt_soft,
        interrupt_shadow,
        nmi_injected,
        nmi_pending,
        nmi_masked,
        sipi_vector,
        smi_smm,
        smi_pending,
        smi_smm_inside_nmi,
        smi_latched_init,
        triple_fault_pending,
    ] = fields
    else {
        return None;
    };
    Some(Events {
        flags: flags.try_into().ok()?,
        exception_injected: exception_injected.try_into().ok()?,
        exception_nr: exception_nr.try_into().ok()?,
        exception_has_error_code: exception_has_error_code.try_into().ok()?,
        exception_pending: exception_pending.try_into().ok()?,
        exception_error_code: exception_error_code.try_into().ok()?,
        exception_has_payload: exception_has_payload.try_into().ok()?,
        exception_payload,
        interrupt_injected: interrupt_injected.try_into().ok()?,
        interrupt_nr: interrupt_nr.try_into().ok()?,
        interrupt_soft: interrupt_soft.try_into().ok()?,
        interrupt_shadow: interrupt_shadow.try_into().ok()?,
        nmi_injected: nmi_injected.try_into().ok()?,
        nmi_pending: nmi_pending.try_into().ok()?,
        nmi_masked: nmi_masked.try_into().ok()?,
        sipi_vector: sipi_vector.try_into().ok()?,
        smi_smm: smi_smm.try_into().ok()?,
        smi_pending: smi_pending.try_into().ok()?,
        smi_smm_inside_nmi: smi_smm_inside_nmi.try_into().ok()?,
        smi_latched_init: smi_latched_init.try_into().ok()?,
        triple_fault_pending: triple_fault_pending.try_into().ok()?,
    })
}

#[derive(Clone, PartialEq, Message)]
struct SerialMessage {
    #[prost(bytes = "vec", tag = "1")]
    divisor: Vec<u8>,
    #[prost(uint32, tag = "2")]
    interrupt_enable: u32,
    #[prost(bool, tag = "3")]
    fifo: bool,
    #[prost(uint32, tag = "4")]
    line_control: u32,
    #[prost(uint32, tag = "5")]
    modem_control: u32,
    #[prost(uint32, tag = "6")]
    scratch: u32,
    #[prost(bool, tag = "7")]
    transmitter_pending: bool,
}

impl From<&SerialState> for SerialMessage {
    fn from(state: &SerialState) -> Self {
        Self {
            divisor: state.divisor.to_vec(),
            interrupt_enable: state.interrupt_enable.into(),
            fifo: state.fifo,
            line_control: state.line_control.into(),
            modem_control: state.modem_control.into(),
            scratch: state.scratch.into(),
            transmitter_pending: state.transmitter_pending,
        }
    }
}

impl SerialMessage {
    fn state(self) -> Option<SerialState> {
        Some(SerialState {
            divisor: self.divisor.try_into().ok()?,
            interrupt_enable: self.interrupt_enable.try_into().ok()?,
            fifo: self.fifo,
            line_control: self.line_control.try_into().ok()?,
            modem_control: self.modem_control.try_into().ok()?,
            scratch: self.scratch.try_into().ok()?,
            transmitter_pending: self.transmitter_pending,
        })
    }
}

#[derive(Clone, PartialEq, Message)]
struct IoapicMessage {
    #[prost(uint32, tag = "1")]
    select: u32,
    #[prost(uint32, tag = "2")]
    id: u32,
    #[prost(fixed64, repeated, tag = "3")]
    redirections: Vec<u64>,
    #[prost(uint32, tag = "4")]
    waiting: u32,
}

impl From<&IoapicState> for IoapicMessage {
    fn from(state: &IoapicState) -> Self {
        Self {
            select: state.select.into(),
            id: state.id.into(),
            redirections: state.redirections.to_vec(),
            waiting: state.waiting,
        }
    }
}

impl IoapicMessage {
    fn state(self) -> Option<IoapicState> {
        Some(IoapicState {
            select: self.select.try_into().ok()?,
            id: self.id.try_into().ok()?,
            redirections: self.redirections.try_into().ok()?,
            waiting: self.waiting,
        })
    }
}

#[derive(Clone, PartialEq, Message)]
struct TransportMessage {
    #[prost(uint32, tag = "1")]
    device_type: u32,
    #[prost(uint32, tag = "2")]
    status: u32,
    #[prost(bool, tag = "3")]
    needs_reset: bool,
    #[prost(uint32, tag = "4")]
    device_features_sel: u32,
    #[prost(uint32, tag = "5")]
    driver_features_sel: u32,
    #[prost(fixed64, tag = "6")]
    driver_features: u64,
    #[prost(uint32, tag = "7")]
    queue_sel: u32,
    #[prost(uint32, tag = "8")]
    interrupt_status: u32,
    #[prost(uint32, tag = "9")]
    config_generation: u32,
    #[prost(bool, tag = "10")]
    kept: bool,
    #[prost(message, repeated, tag = "11")]
    queues: Vec<QueueMessage>,
}

#[derive(Clone, PartialEq, Message)]
struct QueueMessage {
    #[prost(uint32, tag = "1")]
    entries: u32,
    #[prost(fixed64, tag = "2")]
    descriptors: u64,
    #[prost(fixed64, tag = "3")]
    available: u64,
    #[prost(fixed64, tag = "4")]
    used: u64,
    #[prost(bool, tag = "5")]
    ready: bool,
    /// Of a running device: next available, next used and considered used index, 16 bits each from the lowest.
    #[prost(fixed64, optional, tag = "6")]
    progress: Option<u64>,
}

impl From<&TransportState> for TransportMessage {
    fn from(state: &TransportState) -> Self {
        Self {
            device_type: state.device_type,
            status: state.status,
            needs_reset: state.needs_reset,
            device_features_sel: state.device_features_sel,
            driver_features_sel: state.driver_features_sel,
            driver_features: state.driver_features,
            queue_sel: state.queue_sel,
            interrupt_status: state.interrupt_status,
            config_generation: state.config_generation,
            kept: state.kept,
            queues: state.queues.iter().map(Into::into).collect(),
        }
    }
}

impl TransportMessage {
    fn state(&self) -> TransportState {
        TransportState {
            device_type: self.device_type,
            status: self.status,
            needs_reset: self.needs_reset,
            device_features_sel: self.device_features_sel,
            driver_features_sel: self.driver_features_sel,
            driver_features: self.driver_features,
            queue_sel: self.queue_sel,
            interrupt_status: self.interrupt_status,
            config_generation: self.config_generation,
            kept: self.kept,
            queues: self.queues.iter().map(QueueMessage::state).collect(),
        }
    }
}

impl From<&QueueState> for QueueMessage {
    fn from(state: &QueueState) -> Self {
        Self {
            entries: state.layout.entries,
            descriptors: state.layout.descriptors.0,
            available: state.layout.available.0,
            used: state.layout.used.0,
            ready: state.ready,
            progress: state.progress.map(|progress| {
                u64::from(progress.next_available)
                    | u64::from(progress.next_used) << 16
                    | u64::from(progress.considered_used) << 32
            }),
        }
    }
}

impl QueueMessage {
    fn state(&self) -> QueueState {
        QueueState {
            layout: QueueLayout {
                entries: self.entries,
                descriptors: Gpa(self.descriptors),
                available: Gpa(self.available),
                used: Gpa(self.used),
            },
            ready: self.ready,
            progress: self.progress.map(|indices| QueueProgress {
                next_available: indices as u16,
                next_used: (indices >> 16) as u16,
                considered_used: (indices >> 32) as u16,
            }),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A machine in which no two fields are alike.
    fn machine() -> MachineState {
        let mut next = 0_u8;
        let mut n = || {
            next = next.wrapping_add(1);
            next
        };
        let mut segment = |present| Segment {
            base: n().into(),
            limit: n().into(),
            selector: n().into(),
            kind: n() & 0xf,
            present,
            dpl: 3,
            default_32: true,
            code_or_data: false,
            long: true,
            granular: present,
        };
        let system_registers = SystemRegisters {
            cs: segment(true),
            ds: segment(false),
            es: segment(true),
            fs: segment(true),
            gs: segment(true),
            ss: segment(true),
            tr: segment(true),
            ldt: segment(false),
            gdt: DescriptorTable { base: 1 << 40, limit: u16::MAX },
            idt: DescriptorTable { base: 2 << 40, limit: 0xfff },
            cr0: 3 << 32,
            cr2: 4,
            cr3: 5,
            cr4: 6,
            cr8: 7,
            efer: 8,
            apic_base: 9,
        };
        let registers =
            Registers { rax: 1, rsp: u64::MAX, r15: 15, rip: 16, rflags: 2, ..Registers::default() };
        let events = Events {
            flags: 0xd,
            exception_nr: 14,
            exception_error_code: u32::MAX,
            exception_payload: u64::MAX,
            nmi_masked: 1,
            sipi_vector: 0x99,
            triple_fault_pending: 1,
            ..Events::default()
        };
        let vcpu = VcpuState {
            registers,
            system_registers,
            xcr0: 7,
            xsave: vec![0xa5; 4096],
            local_apic: vec![0x5a; 1024],
            debug_registers: [1, 2, 3, 4, 5, 6],
            events,
            run_state: 3,
            msrs: vec![Msr { index: 0x10, value: 77 }, Msr { index: 0xc000_0080, value: 0xd01 }],
        };
        let layout = QueueLayout { entries: 256, descriptors: Gpa(1), available: Gpa(2), used: Gpa(3) };
        let progress = QueueProgress { next_available: 7, next_used: 8, considered_used: 9 };
        let queue = QueueState { layout, ready: true, progress: Some(progress) };
        let device = TransportState {
            device_type: 2,
            status: 15,
            driver_features: u64::MAX,
            interrupt_status: 1,
            kept: true,
            queues: vec![queue, QueueState::default()],
            ..TransportState::default()
        };
        MachineState {
            shape: Shape::new(256, 2).expect("a shape"),
            clock_ns: 123_456_789,
            tsc_khz: 2_345_678,
            parking: Parking::Port,
            vcpus: vec![vcpu.clone(), VcpuState { run_state: 1, ..vcpu }],
            devices: DevicesState {
                serial: SerialState { divisor: [1, 2], fifo: true, scratch: 9, ..SerialState::default() },
                ioapic: IoapicState { select: 1, id: 2, redirections: [1 << 16; 24], waiting: 8 },
                virtio: vec![device, TransportState::default()],
            },
        }
    }

    #[test]
    fn a_machine_comes_back_from_its_sections() {
        let machine = machine();
        assert_eq!(MachineState::from_sections(&machine.to_sections()), Ok(machine));
    }

    #[test]
    fn a_section_that_is_missing_or_too_many_is_named() {
        let sections = machine().to_sections();
        for index in 0..sections.len() {
            let mut fewer = sections.clone();
            let gone = fewer.remove(index);
            let error = MachineState::from_sections(&fewer).expect_err("refused");
            assert_eq!(error, SectionError::Missing(gone.name.clone()));
            let mut newer = sections.clone();
            newer[index].version += 1;
            let error = MachineState::from_sections(&newer).expect_err("refused");
            assert_eq!(error, SectionError::Version { name: gone.name, version: gone.version + 1 });
        }
        let mut more = sections.clone();
        more.push(Section { name: "net.0".into(), ..sections[0].clone() });
        assert_eq!(MachineState::from_sections(&more), Err(SectionError::Unknown("net.0".into())));
    }

    #[test]
    fn bytes_that_nobody_looks_at_are_refused() {
        let sections = machine().to_sections();
        for index in 0..sections.len() {
            let mut longer = sections.clone();
            // Field 15, a number: protobuf passes over what it does not know.
            longer[index].content.extend([0x78, 1]);
            let name = sections[index].name.clone();
            assert_eq!(MachineState::from_sections(&longer), Err(SectionError::Malformed(name)));
        }
    }

    #[test]
    fn where_an_agent_is_parked_is_kept_and_what_is_not_known_is_refused() {
        for parking in PARKINGS {
            let machine = MachineState { parking, ..machine() };
            assert_eq!(MachineState::from_sections(&machine.to_sections()), Ok(machine));
        }
        let message =
            MachineMessage { memory_mib: 64, vcpus: 1, clock_ns: 0, virtio: 0, tsc_khz: 0, parking: 3 };
        let unknown = [section("machine".into(), &message)];
        assert_eq!(MachineState::from_sections(&unknown), Err(SectionError::Parking(3)));
        for version in [1, 2] {
            let mut old = machine().to_sections();
            old[0].version = version;
            let refused = MachineState::from_sections(&old);
            assert_eq!(refused, Err(SectionError::Version { name: "machine".into(), version }));
        }
    }

    #[test]
    fn an_impossible_shape_is_refused() {
        let message =
            MachineMessage { memory_mib: 63, vcpus: 1, clock_ns: 0, virtio: 0, tsc_khz: 0, parking: 0 };
        let sections = [section("machine".into(), &message)];
        assert_eq!(MachineState::from_sections(&sections), Err(SectionError::Shape(ShapeError::Memory(63))));
    }
}
