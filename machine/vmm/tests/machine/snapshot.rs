//! A machine that is paused, saved and restored: the guest goes on as if nothing had happened.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::sync::mpsc::Receiver;

use kiln_control::EndReason;
use kiln_hypervisor::Kvm;
use kiln_memory::Gpa;
use kiln_snapshot::Header;
use kiln_support::digest::Digest;
use kiln_virtio::{Device, Rng};
use kiln_vmm::{Console, Machine, MachineState, Observer, Paused, RestoreError, Saved, Shape, Shell, boot};

use crate::guest::{Guest, file, phases};

/// A word that the guest waits for to change.
const GATE: Gpa = Gpa(0x30_0000);
const RUNG: u32 = 7;

fn kvm() -> Kvm {
    Kvm::open().expect("these tests need KVM: a readable and writable /dev/kvm")
}

fn shape(vcpus: u32) -> Shape {
    Shape::new(64, vcpus).expect("a shape")
}

fn virtio() -> Vec<Box<dyn Device>> {
    vec![Box::new(Rng::new())]
}

/// A guest that keeps 41 in a register, says so, waits at the gate, and powers off with one more.
fn counting() -> Guest {
    Guest::default()
        // mov ebp, 41
        .code(&[0xbd, 41, 0, 0, 0])
        .say("before ")
        .ring(RUNG)
        // cmp dword [GATE], 0; je -9
        .code(&[0x83, 0x3d, 0, 0, 0x30, 0, 0, 0x74, 0xf7])
        .say("after")
        // inc ebp; mov [POWER], ebp
        .code(&[0x45, 0x89, 0x2d, 0, 0, 0, 0xd0])
        .halt()
}

fn start(guest: &Guest, shape: Shape, observer: Observer) -> Machine<Kvm> {
    let shell = Shell::create(&kvm(), shape).expect("a machine");
    let loaded = boot::load_kernel(shell.memory(), &file(&guest.elf())).expect("a good kernel");
    let entry = boot::prepare(shell.memory(), &loaded, None, shape, 1, "").expect("everything fits");
    Machine::start(shell, &entry, Console::new(None).expect("a console"), virtio(), observer)
        .expect("it starts")
}

/// A machine that waits at the gate.
fn waiting(vcpus: u32) -> (Machine<Kvm>, Receiver<u32>) {
    let (observer, rung) = phases();
    let machine = start(&counting(), shape(vcpus), observer);
    assert_eq!(rung.recv(), Ok(RUNG));
    (machine, rung)
}

fn paused(machine: Machine<Kvm>) -> Paused<Kvm> {
    machine.pause().unwrap_or_else(|machine| panic!("it has ended: {:?}", machine.wait().0))
}

/// Another machine with what `paused` has.
fn copy(paused: &mut Paused<Kvm>, console: &Console) -> Result<Paused<Kvm>, RestoreError> {
    let state = through_a_file(&paused.save().expect("saved"));
    let memory = tempfile::tempfile().expect("a file");
    paused.memory().save(&memory).expect("saved");
    restore(&state, &memory, console)
}

/// What a snapshot's file makes of `state`.
fn through_a_file(state: &MachineState) -> MachineState {
    let none = Digest::EMPTY;
    let header = Header {
        memory_bytes: u64::from(state.shape.memory_mib()) << 20,
        vcpus: state.shape.vcpus().into(),
        vmm: "0".into(),
        cpu: none,
        kernel: none,
        initramfs: none,
        memory: none,
    };
    let mut file = Vec::new();
    kiln_snapshot::write(&header, &state.to_sections(), &mut file).expect("written");
    let (read, sections) = kiln_snapshot::read(&mut &file[..]).expect("read");
    assert_eq!(read, header);
    MachineState::from_sections(&sections).expect("a machine")
}

fn restore(state: &MachineState, memory: &File, console: &Console) -> Result<Paused<Kvm>, RestoreError> {
    restore_to(state, memory, console, Box::new(|_| {}))
}

fn restore_to(
    state: &MachineState,
    memory: &File,
    console: &Console,
    observer: Observer,
) -> Result<Paused<Kvm>, RestoreError> {
    let shell = Shell::create(&kvm(), state.shape).expect("a machine");
    shell.memory().overlay(memory).expect("the memory fits");
    Paused::restore(shell, state, console.clone(), virtio(), observer)
}

/// Opens the gate and waits for the end.
fn finish(paused: Paused<Kvm>) -> (String, String) {
    paused.memory().write_u32(GATE, 1).expect("RAM");
    let (end, console) = paused.resume().expect("it goes on").wait();
    assert_eq!(end.reason, EndReason::PowerOff, "{end:?}");
    (end.detail, String::from_utf8_lossy(&console.tail(usize::MAX)).into_owned())
}

#[test]
fn a_paused_machine_goes_on_where_it_was() {
    let (machine, _rung) = waiting(1);
    let mut machine = paused(machine);
    for _ in 0..10 {
        machine = paused(machine.resume().expect("it goes on"));
    }
    assert_eq!(finish(machine), ("code 42".into(), "before after".into()));
}

#[test]
fn a_restored_machine_goes_on_where_it_was_saved_and_so_does_the_source() {
    let (machine, _rung) = waiting(4);
    let mut source = paused(machine);
    let copies: Vec<_> = (0..3)
        .map(|_| copy(&mut source, &Console::new(None).expect("a console")).expect("restored"))
        .collect();
    for copy in copies {
        assert_eq!(finish(copy), ("code 42".into(), "after".into()));
    }
    assert_eq!(finish(source), ("code 42".into(), "before after".into()));
}

#[test]
fn what_is_saved_again_is_what_was_restored() {
    /// The time stamp counter, which never stands still.
    const TSC: u32 = 0x10;
    let (machine, _rung) = waiting(2);
    let mut source = paused(machine);
    let console = Console::new(None).expect("a console");
    let mut copy = copy(&mut source, &console).expect("restored");
    let [mut one, mut other] = [&mut source, &mut copy].map(|machine| machine.save().expect("saved"));
    for state in [&mut one, &mut other] {
        state.clock_ns = 0;
        state.vcpus.iter_mut().for_each(|vcpu| vcpu.msrs.retain(|msr| msr.index != TSC));
    }
    assert_eq!(one, other);
}

#[test]
fn a_state_that_does_not_fit_is_refused() {
    let (machine, _rung) = waiting(1);
    let mut source = paused(machine);
    let state = source.save().expect("saved");
    let memory = tempfile::tempfile().expect("a file");
    source.memory().save(&memory).expect("saved");
    let console = Console::new(None).expect("a console");
    let refused =
        |state: &MachineState| restore(state, &memory, &console).err().expect("refused").to_string();

    let mut more = state.clone();
    more.vcpus.push(state.vcpus[0].clone());
    assert_eq!(refused(&more), "2 saved vCPUs");
    let mut no_device = state.clone();
    no_device.devices.virtio.clear();
    assert_eq!(refused(&no_device), "1 virtio devices where 0 were saved");
    let mut other_device = state.clone();
    other_device.devices.virtio[0].device_type = 2;
    assert!(refused(&other_device).starts_with("virtio device 0: a device of type 4"));
    let mut cut = state.clone();
    cut.vcpus[0].xsave.pop();
    assert!(refused(&cut).contains("wrong length"));
    let mut apic = state;
    apic.vcpus[0].local_apic.clear();
    assert!(refused(&apic).contains("wrong length"));
}

#[test]
fn a_machine_that_has_ended_is_not_paused() {
    let machine = start(&Guest::default().ring(RUNG).power_off(3), shape(1), Box::new(|_| {}));
    rustix::event::poll(
        &mut [rustix::event::PollFd::new(&machine.ended_fd(), rustix::event::PollFlags::IN)],
        None,
    )
    .expect("it ends");
    let Err(machine) = machine.pause() else { panic!("it has ended") };
    assert_eq!(machine.wait().0.detail, "code 3");
}

/// A guest that for ever writes a count to a page, then the next page, over 4 MiB, and the count to a register: every page's count is
/// the register's or one less, and those before the last page written are the higher ones. It rings after each round.
fn scribbling() -> Guest {
    Guest::default()
        .ring(RUNG)
        // mov ebp, 0
        .code(&[0xbd, 0, 0, 0, 0])
        // inc ebp (as add ebp, 1); mov ebx, 0x400000
        .code(&[0x83, 0xc5, 1, 0xbb, 0, 0, 0x40, 0])
        // mov [ebx], ebp; add ebx, 0x1000; cmp ebx, 0x800000; jne to the store
        .code(&[0x89, 0x2b, 0x81, 0xc3, 0, 0x10, 0, 0, 0x81, 0xfb, 0, 0, 0x80, 0, 0x75, 0xf0])
        .ring(RUNG)
        // jmp to the increment
        .code(&[0xeb, 0xdb])
}

#[test]
fn a_machine_saved_while_it_runs_is_as_it_was_at_one_instant() {
    let (observer, rung) = phases();
    let mut source = start(&scribbling(), shape(1), observer);
    assert_eq!(rung.recv(), Ok(RUNG));
    let mut last = (0, 0);
    for _ in 0..5 {
        assert_eq!(rung.recv(), Ok(RUNG), "it goes on");
        let memory = tempfile::tempfile().expect("a file");
        let (machine, saved) = source.save_running(&memory);
        let Saved::Running(machine) = machine else { panic!("it goes on") };
        source = machine;
        let state = through_a_file(&saved.expect("saved").state);
        let console = Console::new(None).expect("a console");
        let copy = restore(&state, &memory, &console).expect("restored");
        let count = state.vcpus[0].registers.rbp as u32;
        let next = state.vcpus[0].registers.rbx;
        assert!((count, next) >= last, "the source goes on: {count}, {next:#x} after {last:?}");
        last = (count, next);
        for page in (0x40_0000..0x80_0000).step_by(0x1000) {
            let found = copy.memory().read_u32(Gpa(page)).expect("RAM");
            // The instant may lie between a store and the step to the next page.
            let expected = count - u32::from(page > next);
            assert!(
                found == expected || page == next && found + 1 == expected,
                "{page:#x}: {found}, not {expected}"
            );
        }
        drop(copy.resume().expect("it goes on too"));
    }
}

/// All that is in a memory's file: where it has data, and that.
fn content(file: &File) -> Vec<(std::ops::Range<u64>, Vec<u8>)> {
    kiln_support::sparse::data(file, 0)
        .map(|piece| {
            let piece = piece.expect("a file system with holes");
            let mut bytes = vec![0; (piece.end - piece.start) as usize];
            file.read_exact_at(&mut bytes, piece.start).expect("read");
            (piece, bytes)
        })
        .collect()
}

#[test]
fn a_chain_of_fifty_diffs_is_the_machine_byte_for_byte() {
    let (observer, rung) = phases();
    let machine = start(&scribbling(), shape(1), observer);
    assert_eq!(rung.recv(), Ok(RUNG));
    let mut source = paused(machine);
    let mut base = tempfile::tempfile().expect("a file");
    source.memory().save(&base).expect("saved");
    let mut state = source.save().expect("saved");
    let console = Console::new(None).expect("a console");
    let mut changed_pages = 0;
    for link in 0..50_u64 {
        let (observer, rung) = phases();
        let copy = restore_to(&state, &base, &console, observer).expect("restored");
        let running = copy.resume().expect("it goes on");
        assert_eq!(rung.recv(), Ok(RUNG));
        let mut copy = paused(running);
        let next = copy.save().expect("saved");
        let [full, diff, merged] = [(); 3].map(|()| tempfile::tempfile().expect("a file"));
        copy.memory().save(&full).expect("saved");
        let changed = copy.memory().changed().expect("a page table");
        changed_pages += changed.iter().map(|range| (range.end - range.start) / 4096).sum::<u64>();
        let (id, bytes) = (Digest::of(link.to_le_bytes()), copy.memory().bytes());
        kiln_snapshot::write_diff(id, bytes, &changed, |at, page| full.read_exact_at(page, at), &diff)
            .expect("written");
        kiln_snapshot::apply_diff(&mut &diff, id, &base, &merged).expect("applied");
        // Too long to be shown.
        assert!(content(&merged) == content(&full), "link {link}");
        (base, state) = (merged, next);
    }
    assert!(changed_pages > 50, "{changed_pages} pages");
    let last = restore(&state, &base, &console).expect("restored");
    drop(last.resume().expect("it goes on"));
}
