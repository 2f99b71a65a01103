//! XSAVE and XRSTOR in a guest's kernel: by the processor, or finished by the backend where KVM emulates guest kernels.
//! Either way the guest must see the same.

use kiln_hypervisor::{
    DescriptorTable, Exit, Hypervisor, Kvm, KvmVcpu, KvmVm, Registers, Segment, SystemRegisters, Vcpu, Vm,
};
use kiln_memory::{Gpa, GuestMemory};

const CODE: u64 = 0x1000;
const GDT: u64 = 0x2000;
const IDT: u64 = 0x3000;
const STACK: u64 = 0x5000;
/// The first of four levels of tables, which map the first 2 MiB to themselves.
const TABLES: u64 = 0x8000;
const LEAF_TABLE: u64 = TABLES + 0x3000;
const SOURCE: u64 = 0x1_0fc0;
/// Crosses into the next page, which is mapped to the frame behind its own.
const TARGET: u64 = 0x2_0f00;
const SPLIT: usize = 0x100;

const PRESENT: u64 = 1;
const WRITABLE: u64 = 1 << 1;
const MARKED: u64 = 1 << 5 | 1 << 6;

const GENERAL_PROTECTION: u64 = 13;
const PAGE_FAULT: u64 = 14;

/// Enables x87 and SSE in XCR0, then `xrstor64 (%rdi)`, `xsave64 (%rsi)` with all bits of the mask set; `out %al, $0x10`.
const PROGRAM: &[u8] = &[
    0x31, 0xc9, 0x31, 0xd2, 0xb8, 3, 0, 0, 0, 0x0f, 0x01, 0xd1, 0xb8, 0xff, 0xff, 0xff, 0xff, 0xba, 0xff,
    0xff, 0xff, 0xff, 0x48, 0x0f, 0xae, 0x2f, 0x48, 0x0f, 0xae, 0x26, 0xe6, 0x10, 0xf4,
];
/// `pop %rax; out %al, $0xe; mov %cr2, %rax; out %eax, $0xf`
const ON_PAGE_FAULT: &[u8] = &[0x58, 0xe6, 0x0e, 0x0f, 0x20, 0xd0, 0xe7, 0x0f, 0xf4];
const PAGE_FAULT_HANDLER: u64 = CODE + 0x100;
/// `out %al, $0xd`
const ON_PROTECTION: &[u8] = &[0xe6, 0x0d, 0xf4];
const PROTECTION_HANDLER: u64 = CODE + 0x200;

/// A machine about to run [`PROGRAM`] in 64-bit mode. The source area says that `in_use` is in it.
fn machine(in_use: u64) -> (KvmVm, KvmVcpu, GuestMemory) {
    let hypervisor = Kvm::open().expect("these tests need KVM: a readable and writable /dev/kvm");
    let memory = GuestMemory::new(1 << 20).expect("a mapping");
    let write = |at: u64, bytes: &[u8]| memory.write(Gpa(at), bytes).expect("RAM");
    let write_u64 = |at: u64, value: u64| memory.write_u64(Gpa(at), value).expect("RAM");
    write(CODE, PROGRAM);
    write(PAGE_FAULT_HANDLER, ON_PAGE_FAULT);
    write(PROTECTION_HANDLER, ON_PROTECTION);
    write_u64(GDT + 8, 0x00af_9b00_0000_ffff);
    write_u64(GDT + 16, 0x00cf_9300_0000_ffff);
    for (vector, handler) in [(GENERAL_PROTECTION, PROTECTION_HANDLER), (PAGE_FAULT, PAGE_FAULT_HANDLER)] {
        // A present 64-bit interrupt gate.
        write_u64(IDT + vector * 16, handler | 0x8 << 16 | 0x8e00 << 32);
    }
    for level in 0..3 {
        let next = TABLES + (level + 1) * 0x1000;
        write_u64(TABLES + level * 0x1000, next | PRESENT | WRITABLE | MARKED);
    }
    for page in 0..0x100 {
        write_u64(LEAF_TABLE + page * 8, page << 12 | PRESENT | WRITABLE | MARKED);
    }
    map(&memory, TARGET + 0x1000, 0x3_0000 | PRESENT | WRITABLE | MARKED);

    // x87's control word, MXCSR, a pattern in XMM0 to XMM15, and the header.
    write(SOURCE, &0x27f_u16.to_le_bytes());
    write(SOURCE + 24, &0x1fa0_u32.to_le_bytes());
    write(SOURCE + 160, &pattern());
    write_u64(SOURCE + 512, in_use);

    let mut vm = hypervisor.create_vm().expect("a machine");
    vm.map_memory(&memory).expect("memory");
    vm.enable_interrupts().expect("local APICs");
    let mut vcpu = vm.create_vcpu(0).expect("a vCPU");
    vcpu.set_cpuid(&hypervisor.supported_cpuid().expect("CPUID")).expect("CPUID is taken");
    vcpu.set_system_registers(&long_mode(&vcpu)).expect("system registers");
    let registers =
        Registers { rip: CODE, rsp: STACK, rdi: SOURCE, rsi: TARGET, rflags: 2, ..Registers::default() };
    vcpu.set_registers(&registers).expect("registers");
    (vm, vcpu, memory)
}

fn pattern() -> [u8; 256] {
    std::array::from_fn(|at| at as u8 ^ 0x5a)
}

fn map(memory: &GuestMemory, linear: u64, entry: u64) {
    memory.write_u64(Gpa(LEAF_TABLE + linear / 0x1000 * 8), entry).expect("RAM");
}

fn long_mode(vcpu: &impl Vcpu) -> SystemRegisters {
    let code = Segment {
        limit: u32::MAX,
        selector: 0x8,
        kind: 0xb,
        present: true,
        code_or_data: true,
        long: true,
        granular: true,
        ..Segment::default()
    };
    let data = Segment { selector: 0x10, kind: 3, long: false, default_32: true, ..code };
    SystemRegisters {
        cs: code,
        ds: data,
        es: data,
        fs: data,
        gs: data,
        ss: data,
        tr: Segment { limit: 0x67, kind: 0xb, present: true, ..Segment::default() },
        gdt: DescriptorTable { base: GDT, limit: 23 },
        idt: DescriptorTable { base: IDT, limit: 0xfff },
        // Paging, write protection of the kernel, protected mode.
        cr0: 1 << 31 | 1 << 16 | 1 << 5 | 1 << 4 | 1,
        cr3: TABLES,
        // OSXSAVE, OSFXSR, PAE.
        cr4: 1 << 18 | 1 << 9 | 1 << 5,
        // Long mode, enabled and active.
        efer: 1 << 10 | 1 << 8,
        ..vcpu.system_registers().expect("system registers")
    }
}

/// The next write to a port: which, and what.
fn next_write(vcpu: &mut KvmVcpu) -> (u16, Vec<u8>) {
    loop {
        match vcpu.run().expect("the vCPU runs") {
            Exit::Kicked => {}
            Exit::PortWrite { port, data } => return (port, data.to_vec()),
            exit => panic!("{exit:?}"),
        }
    }
}

/// What the guest reports of a page fault: the error code and the address.
fn fault(vcpu: &mut KvmVcpu) -> (u8, u64) {
    let (port, code) = next_write(vcpu);
    assert_eq!(port, 0x0e);
    let (port, at) = next_write(vcpu);
    assert_eq!(port, 0x0f);
    (code[0], u32::from_le_bytes(at.try_into().expect("four bytes")).into())
}

#[test]
fn registers_go_from_one_area_to_the_other() {
    let (_vm, mut vcpu, memory) = machine(0b11);
    assert_eq!(next_write(&mut vcpu).0, 0x10);
    let mut area = [0; 576];
    memory.read(Gpa(TARGET), &mut area[..SPLIT]).expect("RAM");
    memory.read(Gpa(0x3_0000), &mut area[SPLIT..]).expect("RAM");
    assert_eq!(area[..2], 0x27f_u16.to_le_bytes());
    assert_eq!(area[24..28], 0x1fa0_u32.to_le_bytes());
    assert_eq!(area[160..416], pattern());
    assert_eq!(area[416..512], [0; 96]);
    assert_eq!(area[512] & 0b10, 0b10, "SSE is in use");
}

#[test]
fn what_is_not_in_use_is_initial() {
    let (_vm, mut vcpu, memory) = machine(0);
    assert_eq!(next_write(&mut vcpu).0, 0x10);
    assert_eq!(memory.read_array(Gpa(TARGET)), Ok(0x37f_u16.to_le_bytes()));
    assert_eq!(memory.read_array(Gpa(TARGET + 24)), Ok(0x1fa0_u32.to_le_bytes()), "MXCSR is always loaded");
    assert_eq!(memory.read_array(Gpa(TARGET + 160)), Ok([0; 16]));
}

#[test]
fn a_protected_page_is_a_fault_the_guest_can_handle() {
    let (_vm, mut vcpu, memory) = machine(0b11);
    map(&memory, TARGET + 0x1000, 0x3_0000 | PRESENT | MARKED);
    assert_eq!(fault(&mut vcpu), (0b11, TARGET & !0xfff | 0x1000));
    assert_eq!(memory.read_array(Gpa(0x3_0000)), Ok([0; 64]), "nothing was written");
}

#[test]
fn a_missing_page_is_a_fault_the_guest_can_handle() {
    let (_vm, mut vcpu, memory) = machine(0b11);
    map(&memory, SOURCE, 0);
    assert_eq!(fault(&mut vcpu), (0, SOURCE));
}

#[test]
fn a_malformed_or_misaligned_area_is_a_protection_fault() {
    // A component that XCR0 does not have.
    let (_vm, mut vcpu, _memory) = machine(0b111);
    assert_eq!(next_write(&mut vcpu).0, 0x0d);
    let (_vm, mut vcpu, _memory) = machine(0b11);
    let registers = vcpu.registers().expect("registers");
    vcpu.set_registers(&Registers { rdi: SOURCE + 16, ..registers }).expect("registers");
    assert_eq!(next_write(&mut vcpu).0, 0x0d);
}

/// Only where the backend does it: a real processor checks by itself, and an emulated one (QEMU's) does not.
#[test]
fn a_reserved_bit_of_mxcsr_is_a_protection_fault_where_kernels_are_emulated() {
    let (_vm, mut vcpu, memory) = machine(0b11);
    memory.write_u32(Gpa(SOURCE + 24), 1 << 30).expect("RAM");
    let port = next_write(&mut vcpu).0;
    if std::path::Path::new("/sys/module/kvm_pvm").exists() {
        assert_eq!(port, 0x0d);
    }
}
