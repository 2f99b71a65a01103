//! The contract of a hypervisor, run on every backend.
//!
//! Each test is a guest program twice over: machine code for a backend that executes, the exits it causes for one that
//! replays. The KVM half needs a readable and writable /dev/kvm and fails without one.

#[path = "contract/xsave.rs"]
mod xsave;

use std::sync::Arc;
use std::thread;

use kiln_hypervisor::{
    DescriptorTable, Error, Exit, Hypervisor, InternalError, Kick, Kvm, Msi, Registers, Scripted, Segment,
    Step, SystemRegisters, Vcpu, VcpuState, Vm,
};
use kiln_memory::{Gpa, GuestMemory};

const CODE: Gpa = Gpa(0x1000);
const HANDLER: Gpa = Gpa(0x2000);
const GDT: Gpa = Gpa(0x3000);
const IDT: Gpa = Gpa(0x4000);
const MMIO: u64 = 0xd000_0000;
const VECTOR: u8 = 0x31;
const BREAKPOINT: u8 = 3;

/// A backend under test.
trait Backend {
    type Hypervisor: Hypervisor;
    /// A hypervisor whose first vCPU will cause the exits of `script`, if it does not execute `code` anyway.
    fn open(script: Vec<Step>) -> Self::Hypervisor;
}

struct OnKvm;

impl Backend for OnKvm {
    type Hypervisor = Kvm;

    fn open(_: Vec<Step>) -> Kvm {
        Kvm::open().expect("these tests need KVM: a readable and writable /dev/kvm")
    }
}

struct OnScripted;

impl Backend for OnScripted {
    type Hypervisor = Scripted;

    fn open(script: Vec<Step>) -> Scripted {
        Scripted::new(vec![script])
    }
}

type VmOf<B> = <<B as Backend>::Hypervisor as Hypervisor>::Vm;
type VcpuOf<B> = <VmOf<B> as Vm>::Vcpu;

/// A machine whose first vCPU is about to run `code` in flat 32-bit protected mode, with `handler` behind [`VECTOR`]
/// and [`BREAKPOINT`].
fn machine<B: Backend>(code: &[u8], handler: &[u8], script: Vec<Step>) -> (VmOf<B>, VcpuOf<B>) {
    machine_in::<B>(&GuestMemory::new(1 << 20).expect("a mapping"), code, handler, script)
}

fn machine_in<B: Backend>(
    memory: &GuestMemory,
    code: &[u8],
    handler: &[u8],
    script: Vec<Step>,
) -> (VmOf<B>, VcpuOf<B>) {
    let hypervisor = B::open(script);
    memory.write(CODE, code).expect("RAM");
    memory.write(HANDLER, handler).expect("RAM");
    // Null, flat 32-bit code, flat data.
    for (at, descriptor) in [(8, 0x00cf_9b00_0000_ffff_u64), (16, 0x00cf_9300_0000_ffff)] {
        memory.write_u64(Gpa(GDT.0 + at), descriptor).expect("RAM");
    }
    // A present 32-bit interrupt gate to the handler.
    let gate = HANDLER.0 & 0xffff | 0x8 << 16 | 0x8e00 << 32;
    for vector in [BREAKPOINT, VECTOR] {
        memory.write_u64(Gpa(IDT.0 + u64::from(vector) * 8), gate).expect("RAM");
    }

    let mut vm = hypervisor.create_vm().expect("a machine");
    vm.map_memory(memory).expect("memory");
    vm.enable_interrupts().expect("local APICs");
    let mut vcpu = vm.create_vcpu(0).expect("a vCPU");
    vcpu.set_cpuid(&hypervisor.supported_cpuid().expect("CPUID")).expect("CPUID is taken");
    vcpu.set_system_registers(&protected_mode(&vcpu)).expect("system registers");
    vcpu.set_registers(&Registers { rip: CODE.0, rsp: 0x8000, rflags: 2, ..Registers::default() })
        .expect("registers");
    (vm, vcpu)
}

fn protected_mode(vcpu: &impl Vcpu) -> SystemRegisters {
    let flat = Segment {
        limit: u32::MAX,
        present: true,
        default_32: true,
        code_or_data: true,
        granular: true,
        ..Segment::default()
    };
    let data = Segment { selector: 0x10, kind: 3, ..flat };
    SystemRegisters {
        cs: Segment { selector: 0x8, kind: 0xb, ..flat },
        ds: data,
        es: data,
        fs: data,
        gs: data,
        ss: data,
        tr: Segment { limit: 0x67, kind: 0xb, present: true, ..Segment::default() },
        gdt: DescriptorTable { base: GDT.0, limit: 23 },
        idt: DescriptorTable { base: IDT.0, limit: (u16::from(VECTOR) + 1) * 8 - 1 },
        cr0: 0x11,
        ..vcpu.system_registers().expect("system registers")
    }
}

fn next<V: Vcpu>(vcpu: &mut V) -> Exit<'_> {
    vcpu.run().expect("the vCPU runs")
}

fn a_port_write_exits_with_what_was_written<B: Backend>() {
    // mov dx, 0x3f8; mov al, 'A'; out dx, al; hlt
    let code = [0x66, 0xba, 0xf8, 0x03, 0xb0, 0x41, 0xee, 0xf4];
    let script = vec![Step::PortWrite { port: 0x3f8, data: b"A".into() }];
    let (_vm, mut vcpu) = machine::<B>(&code, &[], script);
    assert_eq!(next(&mut vcpu), Exit::PortWrite { port: 0x3f8, data: b"A" });
}

fn the_answer_to_a_port_read_reaches_the_guest<B: Backend>() {
    // mov dx, 0x60; in eax, dx; out dx, eax; hlt
    let code = [0x66, 0xba, 0x60, 0x00, 0xed, 0xef, 0xf4];
    let script =
        vec![Step::PortRead { port: 0x60, size: 4 }, Step::PortWrite { port: 0x60, data: vec![1, 2, 3, 4] }];
    let (_vm, mut vcpu) = machine::<B>(&code, &[], script);
    let Exit::PortRead { port: 0x60, data } = next(&mut vcpu) else { panic!("a read of port 0x60") };
    data.copy_from_slice(&[1, 2, 3, 4]);
    assert_eq!(next(&mut vcpu), Exit::PortWrite { port: 0x60, data: &[1, 2, 3, 4] });
}

fn a_memory_write_outside_ram_exits_with_what_was_written<B: Backend>() {
    // mov eax, 0x04030201; mov [0xd0000000], eax; hlt
    let code = [0xb8, 1, 2, 3, 4, 0xa3, 0, 0, 0, 0xd0, 0xf4];
    let script = vec![Step::MmioWrite { gpa: MMIO, data: vec![1, 2, 3, 4] }];
    let (_vm, mut vcpu) = machine::<B>(&code, &[], script);
    assert_eq!(next(&mut vcpu), Exit::MmioWrite { gpa: MMIO, data: &[1, 2, 3, 4] });
}

fn the_answer_to_a_memory_read_reaches_the_guest<B: Backend>() {
    // mov eax, [0xd0000000]; mov [0xd0000000], eax; hlt
    let code = [0xa1, 0, 0, 0, 0xd0, 0xa3, 0, 0, 0, 0xd0, 0xf4];
    let script =
        vec![Step::MmioRead { gpa: MMIO, size: 4 }, Step::MmioWrite { gpa: MMIO, data: vec![5, 6, 7, 8] }];
    let (_vm, mut vcpu) = machine::<B>(&code, &[], script);
    let Exit::MmioRead { gpa: MMIO, data } = next(&mut vcpu) else { panic!("a read of {MMIO:#x}") };
    data.copy_from_slice(&[5, 6, 7, 8]);
    assert_eq!(next(&mut vcpu), Exit::MmioWrite { gpa: MMIO, data: &[5, 6, 7, 8] });
}

fn a_kick_before_a_run_ends_it_and_the_guest_goes_on_after<B: Backend>() {
    let code = [0x66, 0xba, 0xf8, 0x03, 0xb0, 0x41, 0xee, 0xf4];
    let script = vec![Step::PortWrite { port: 0x3f8, data: b"A".into() }];
    let (_vm, mut vcpu) = machine::<B>(&code, &[], script);
    let kick = vcpu.kick();
    kick.kick();
    kick.kick();
    assert_eq!(next(&mut vcpu), Exit::Kicked);
    assert_eq!(next(&mut vcpu), Exit::PortWrite { port: 0x3f8, data: b"A" });
}

fn no_kick_is_lost_whenever_it_comes<B: Backend>() {
    // jmp $: only a kick gets it out, so a lost one hangs the test.
    let (_vm, mut vcpu) = machine::<B>(&[0xeb, 0xfe], &[], vec![]);
    for _ in 0..200 {
        let kick = vcpu.kick();
        let kicker = thread::spawn(move || kick.kick());
        assert_eq!(next(&mut vcpu), Exit::Kicked);
        kicker.join().expect("no panic");
    }
}

fn a_kick_outlives_its_vcpu<B: Backend>() {
    let (vm, mut vcpu) = machine::<B>(&[0xeb, 0xfe], &[], vec![]);
    let kick = vcpu.kick();
    kick.kick();
    assert_eq!(next(&mut vcpu), Exit::Kicked);
    drop((vcpu, vm));
    kick.kick();
}

fn a_vcpu_moves_between_threads<B: Backend>() {
    let (_vm, mut vcpu) = machine::<B>(&[0xeb, 0xfe], &[], vec![]);
    for _ in 0..3 {
        let kick = vcpu.kick();
        let runner = thread::spawn(move || {
            assert_eq!(next(&mut vcpu), Exit::Kicked);
            vcpu
        });
        kick.kick();
        vcpu = runner.join().expect("no panic");
    }
}

fn a_second_vcpu_waits_to_be_started<B: Backend>() {
    let (vm, _first) = machine::<B>(&[0xf4], &[], vec![]);
    let mut second = vm.create_vcpu(1).expect("a vCPU");
    let kick = second.kick();
    let kicker = thread::spawn(move || kick.kick());
    assert_eq!(next(&mut second), Exit::Kicked);
    kicker.join().expect("no panic");
}

fn a_message_interrupts_a_halted_guest<B: Backend>() {
    // mov dword [0xfee000f0], 0x1ff (local APIC on); mov al, 1; out 0x10, al; sti; hlt; jmp -3
    let code = [
        0xc7, 0x05, 0xf0, 0x00, 0xe0, 0xfe, 0xff, 0x01, 0x00, 0x00, 0xb0, 0x01, 0xe6, 0x10, 0xfb, 0xf4, 0xeb,
        0xfd,
    ];
    // mov al, 2; out 0x11, al; jmp $
    let handler = [0xb0, 0x02, 0xe6, 0x11, 0xeb, 0xfe];
    let script =
        vec![Step::PortWrite { port: 0x10, data: vec![1] }, Step::PortWrite { port: 0x11, data: vec![2] }];
    let (vm, mut vcpu) = machine::<B>(&code, &handler, script);
    assert_eq!(next(&mut vcpu), Exit::PortWrite { port: 0x10, data: &[1] });
    vm.signal_msi(Msi { address: 0xfee0_0000, data: VECTOR.into() }).expect("delivered");
    assert_eq!(next(&mut vcpu), Exit::PortWrite { port: 0x11, data: &[2] });
}

/// mov dword [0xfee000f0], 0x1ff (local APIC on); mov al, 1; out 0x10, al; sti; mov al, 2; out 0x10, al; mov al, 3; out 0x10, al; hlt; jmp -3
const LETS_INTERRUPTS_IN: [u8; 26] = [
    0xc7, 0x05, 0xf0, 0x00, 0xe0, 0xfe, 0xff, 0x01, 0x00, 0x00, 0xb0, 0x01, 0xe6, 0x10, 0xfb, 0xb0, 0x02,
    0xe6, 0x10, 0xb0, 0x03, 0xe6, 0x10, 0xf4, 0xeb, 0xfd,
];
/// mov al, 4; out 0x11, al; jmp $
const SAYS_IT_WAS_INTERRUPTED: [u8; 6] = [0xb0, 0x04, 0xe6, 0x11, 0xeb, 0xfe];

fn a_held_interrupt_comes_when_it_is_let_through<B: Backend>() {
    let write = |port, value| Step::PortWrite { port, data: vec![value] };
    let script = vec![write(0x10, 1), write(0x10, 2), write(0x11, 4)];
    let (vm, mut vcpu) = machine::<B>(&LETS_INTERRUPTS_IN, &SAYS_IT_WAS_INTERRUPTED, script);
    assert_eq!(next(&mut vcpu), Exit::PortWrite { port: 0x10, data: &[1] });
    vcpu.hold_interrupts(true).expect("held");
    vcpu.hold_interrupts(true).expect("held as before");
    vm.signal_msi(Msi { address: 0xfee0_0000, data: VECTOR.into() }).expect("delivered");
    assert_eq!(next(&mut vcpu), Exit::PortWrite { port: 0x10, data: &[2] });
    vcpu.hold_interrupts(false).expect("let through");
    assert_eq!(next(&mut vcpu), Exit::PortWrite { port: 0x11, data: &[4] });
}

fn a_vcpu_is_restored_with_its_interrupts_held<B: Backend>() {
    let write = |port, value| Step::PortWrite { port, data: vec![value] };
    let guest = |script| machine::<B>(&LETS_INTERRUPTS_IN, &SAYS_IT_WAS_INTERRUPTED, script);
    let (_vm, mut vcpu) = guest(vec![write(0x10, 1)]);
    rest_behind_a_write(&mut vcpu);
    let state = vcpu.save().expect("saved");
    let (vm, mut other) = guest(vec![write(0x10, 2), write(0x10, 3), write(0x11, 4)]);
    other.restore(&state, true).expect("restored");
    vm.signal_msi(Msi { address: 0xfee0_0000, data: VECTOR.into() }).expect("delivered");
    assert_eq!(next(&mut other), Exit::PortWrite { port: 0x10, data: &[2] });
    // Now at the latest it would come.
    assert_eq!(next(&mut other), Exit::PortWrite { port: 0x10, data: &[3] });
    other.hold_interrupts(false).expect("let through");
    assert_eq!(next(&mut other), Exit::PortWrite { port: 0x11, data: &[4] });
}

fn page_tables_that_were_replaced_behind_the_guest_count_once_memory_is_forgotten<B: Backend>() {
    const TABLES: [u64; 4] = [0x9000, 0xa000, 0xb000, 0xc000];
    const BEFORE: u64 = 0xd000;
    const AFTER: u64 = 0xe000;
    // Present, writable, of user mode.
    const USERS: u64 = 7;
    // mov eax, [0x1ff000]; mov [0x1fe000], eax; jmp -16: in user mode, where no hypervisor emulates.
    let code =
        [0x8b, 0x04, 0x25, 0x00, 0xf0, 0x1f, 0x00, 0x89, 0x04, 0x25, 0x00, 0xe0, 0x1f, 0x00, 0xeb, 0xf0];
    let memory = GuestMemory::new(1 << 20).expect("a mapping");
    let tells = |value: u8| Step::MmioWrite { gpa: MMIO, data: vec![value, 0, 0, 0] };
    let (vm, mut vcpu) = machine_in::<B>(&memory, &code, &[], vec![tells(1), tells(1), tells(2)]);
    let write = |at: u64, value: u64| memory.write_u64(Gpa(at), value).expect("RAM");
    for (table, next) in TABLES.iter().zip(&TABLES[1..]) {
        write(*table, next | USERS);
    }
    let page = |index: u64, frame: u64| write(TABLES[3] + index * 8, frame | USERS);
    page(CODE.0 >> 12, CODE.0);
    page(0x1fe, MMIO);
    page(0x1ff, BEFORE);
    write(BEFORE, 1);
    write(AFTER, 2);
    let mut system = protected_mode(&vcpu);
    let long = Segment { dpl: 3, selector: 0x1b, default_32: false, long: true, ..system.cs };
    let data = Segment { dpl: 3, selector: 0x23, ..system.ds };
    system = SystemRegisters { cs: long, ds: data, es: data, fs: data, gs: data, ss: data, ..system };
    // Paging, with the page tables of 64-bit mode.
    (system.cr0, system.cr3, system.cr4, system.efer) = (0x8000_0011, TABLES[0], 0x20, 0x500);
    vcpu.set_system_registers(&system).expect("system registers");
    let told = |value| Exit::MmioWrite { gpa: MMIO, data: value };
    assert_eq!(next(&mut vcpu), told(&[1, 0, 0, 0]));
    assert_eq!(next(&mut vcpu), told(&[1, 0, 0, 0]));
    page(0x1ff, AFTER);
    vm.forget_memory().expect("forgotten");
    assert_eq!(next(&mut vcpu), told(&[2, 0, 0, 0]));
}

fn a_message_nobody_takes_is_no_error<B: Backend>() {
    let (vm, _vcpu) = machine::<B>(&[0xf4], &[], vec![]);
    vm.signal_msi(Msi { address: 0xfee0_7000, data: VECTOR.into() }).expect("dropped");
}

fn a_triple_fault_is_a_shutdown<B: Backend>() {
    // ud2, with no gate behind vector 6 nor behind those of the faults that follow.
    let (_vm, mut vcpu) = machine::<B>(&[0x0f, 0x0b], &[], vec![Step::Shutdown]);
    assert_eq!(next(&mut vcpu), Exit::Shutdown);
}

fn a_breakpoint_in_the_guest_kernel_reaches_its_handler<B: Backend>() {
    // nop; int3
    let code = [0x90, 0xcc];
    // pop eax; out 0x10, eax; jmp $: where the guest would go on, behind the breakpoint.
    let handler = [0x58, 0xe7, 0x10, 0xeb, 0xfe];
    let behind = (CODE.0 as u32 + 2).to_le_bytes();
    let script = vec![Step::PortWrite { port: 0x10, data: behind.into() }];
    let (_vm, mut vcpu) = machine::<B>(&code, &handler, script);
    loop {
        match next(&mut vcpu) {
            // The backend delivers it by itself, or with a run in between.
            Exit::Kicked => {}
            exit => return assert_eq!(exit, Exit::PortWrite { port: 0x10, data: &behind }),
        }
    }
}

fn running_outside_ram_is_an_internal_error<B: Backend>() {
    // mov eax, 0xd0000000; jmp eax
    let code = [0xb8, 0, 0, 0, 0xd0, 0xff, 0xe0];
    let emulation = InternalError { suberror: 1, ..InternalError::default() };
    let (_vm, mut vcpu) = machine::<B>(&code, &[], vec![Step::InternalError(emulation)]);
    let Exit::InternalError(error) = next(&mut vcpu) else { panic!("an internal error") };
    assert_eq!(error.suberror, 1);
}

fn registers_read_as_they_were_set<B: Backend>() {
    let (_vm, mut vcpu) = machine::<B>(&[0xf4], &[], vec![]);
    let registers =
        Registers { rax: 1, rbx: u64::MAX, r15: 15, rip: 0x1234, rflags: 0x202, ..Registers::default() };
    vcpu.set_registers(&registers).expect("registers");
    assert_eq!(vcpu.registers().expect("registers"), registers);
    let mut system = vcpu.system_registers().expect("system registers");
    system.cr3 = 0x9000;
    system.gdt = DescriptorTable { base: 0x500, limit: 31 };
    vcpu.set_system_registers(&system).expect("system registers");
    let read = vcpu.system_registers().expect("system registers");
    assert_eq!((read.cr3, read.gdt), (system.cr3, system.gdt));
    assert_eq!(read.cs.base, system.cs.base);
}

/// Runs to the first port write and on to a rest behind it.
fn rest_behind_a_write<V: Vcpu>(vcpu: &mut V) {
    assert!(matches!(next(vcpu), Exit::PortWrite { port: 0x10, .. }));
    vcpu.kick().kick();
    assert_eq!(next(vcpu), Exit::Kicked);
}

/// mov ebx, 0x55667788; out 0x10, al; mov eax, ebx; out 0x11, eax; jmp $
const KEEPS_A_VALUE: [u8; 13] =
    [0xbb, 0x88, 0x77, 0x66, 0x55, 0xe6, 0x10, 0x89, 0xd8, 0xe7, 0x11, 0xeb, 0xfe];

fn a_vcpu_goes_on_in_another_machine<B: Backend>() {
    let write = |port, data: &[u8]| Step::PortWrite { port, data: data.into() };
    let (vm, mut vcpu) = machine::<B>(&KEEPS_A_VALUE, &[], vec![write(0x10, &[0])]);
    rest_behind_a_write(&mut vcpu);
    let state = vcpu.save().expect("saved");
    let clock = vm.clock_ns().expect("a clock");
    drop((vcpu, vm));
    let value = [0x88, 0x77, 0x66, 0x55];
    let (vm, mut other) = machine::<B>(&KEEPS_A_VALUE, &[], vec![write(0x11, &value)]);
    vm.set_clock_ns(clock + 5_000_000_000).expect("set");
    other.restore(&state, false).expect("restored");
    assert_eq!(next(&mut other), Exit::PortWrite { port: 0x11, data: &value });
    assert!(vm.clock_ns().expect("a clock") >= clock + 5_000_000_000);
}

fn what_is_restored_is_what_was_saved<B: Backend>() {
    const MOVING: [u32; 1] = [0x10];
    let script = || vec![Step::PortWrite { port: 0x10, data: vec![0] }];
    let (_vm, mut vcpu) = machine::<B>(&KEEPS_A_VALUE, &[], script());
    rest_behind_a_write(&mut vcpu);
    let mut saved = vcpu.save().expect("saved");
    saved.registers.r15 = 15;
    // The task priority, in all of its places; the processor's follows it.
    saved.system_registers.cr8 = 3;
    for register in [0x80, 0xa0] {
        if let Some(priority) = saved.local_apic.get_mut(register) {
            *priority = 3 << 4;
        }
    }
    saved.debug_registers[0] = 0x1234;
    if let Some(area) = saved.xsave.get_mut(..1024) {
        // XMM3, and the bit that says that such registers have values.
        area[208..224].copy_from_slice(b"sixteen bytes...");
        area[512] |= 0b10;
    }
    let at_rest = |mut state: VcpuState| {
        state.msrs.retain(|msr| !MOVING.contains(&msr.index));
        state
    };
    for hold in [false, true] {
        let (_other_vm, mut other) = machine::<B>(&KEEPS_A_VALUE, &[], script());
        other.restore(&saved, hold).expect("restored");
        let found = other.save().expect("saved again");
        assert_eq!(at_rest(found), at_rest(saved.clone()));
    }
}

fn a_vcpu_that_waits_for_an_answer_is_not_saved<B: Backend>() {
    let (_vm, mut vcpu) =
        machine::<B>(&KEEPS_A_VALUE, &[], vec![Step::PortWrite { port: 0x10, data: vec![0] }]);
    vcpu.save().expect("it has not run");
    next(&mut vcpu);
    assert!(matches!(vcpu.save(), Err(Error::Order(_))));
}

fn the_clock_has_a_rate<B: Backend>() {
    let (_vm, vcpu) = machine::<B>(&[0xf4], &[], vec![]);
    assert!(vcpu.tsc_khz().expect("a rate") > 0);
}

fn calls_out_of_order_are_refused<B: Backend>() {
    let is_order = |result: Result<(), Error>| matches!(result, Err(Error::Order(_)));
    let hypervisor = B::open(vec![]);
    let memory = GuestMemory::new(1 << 20).expect("a mapping");
    let mut vm = hypervisor.create_vm().expect("a machine");
    assert!(is_order(vm.enable_interrupts()), "before memory");
    assert!(is_order(vm.create_vcpu(0).map(drop)), "before interrupts");
    vm.map_memory(&memory).expect("memory");
    assert!(is_order(vm.map_memory(&memory)), "twice");
    vm.enable_interrupts().expect("local APICs");
    assert!(is_order(vm.enable_interrupts()), "twice");
    assert!(is_order(vm.create_vcpu(16).map(drop)), "beyond the most vCPUs");
}

fn memory_on_both_sides_of_the_hole_is_mapped<B: Backend>() {
    let hypervisor = B::open(vec![]);
    let memory = GuestMemory::new(8 << 30).expect("a mapping");
    let mut vm = hypervisor.create_vm().expect("a machine");
    vm.map_memory(&memory).expect("memory");
    vm.enable_interrupts().expect("local APICs");
    for index in 0..16 {
        vm.create_vcpu(index).expect("a vCPU");
    }
}

fn machines_are_independent<B: Backend>() {
    let code = [0x66, 0xba, 0xf8, 0x03, 0xb0, 0x41, 0xee, 0xf4];
    let script = vec![Step::PortWrite { port: 0x3f8, data: b"A".into() }];
    let (first_vm, mut first) = machine::<B>(&code, &[], script.clone());
    let (_second_vm, mut second) = machine::<B>(&code, &[], script);
    let first_vm = Arc::new(first_vm);
    assert_eq!(next(&mut first), Exit::PortWrite { port: 0x3f8, data: b"A" });
    drop((first, first_vm));
    assert_eq!(next(&mut second), Exit::PortWrite { port: 0x3f8, data: b"A" });
}

macro_rules! contract {
    ($($claim:ident)*) => {
        mod kvm {
            $(#[test] fn $claim() { super::$claim::<super::OnKvm>(); })*
        }
        mod scripted {
            $(#[test] fn $claim() { super::$claim::<super::OnScripted>(); })*
        }
    };
}

contract! {
    a_port_write_exits_with_what_was_written
    the_answer_to_a_port_read_reaches_the_guest
    a_memory_write_outside_ram_exits_with_what_was_written
    the_answer_to_a_memory_read_reaches_the_guest
    a_kick_before_a_run_ends_it_and_the_guest_goes_on_after
    no_kick_is_lost_whenever_it_comes
    a_kick_outlives_its_vcpu
    a_vcpu_moves_between_threads
    a_second_vcpu_waits_to_be_started
    a_message_interrupts_a_halted_guest
    a_held_interrupt_comes_when_it_is_let_through
    a_vcpu_is_restored_with_its_interrupts_held
    page_tables_that_were_replaced_behind_the_guest_count_once_memory_is_forgotten
    a_message_nobody_takes_is_no_error
    a_triple_fault_is_a_shutdown
    a_breakpoint_in_the_guest_kernel_reaches_its_handler
    running_outside_ram_is_an_internal_error
    registers_read_as_they_were_set
    a_vcpu_goes_on_in_another_machine
    what_is_restored_is_what_was_saved
    a_vcpu_that_waits_for_an_answer_is_not_saved
    the_clock_has_a_rate
    calls_out_of_order_are_refused
    memory_on_both_sides_of_the_hole_is_mapped
    machines_are_independent
}
