//! A machine that its guest parks, and what its host makes of it.

use std::fs::File;
use std::io::{Read, Seek, SeekFrom, Write};
use std::os::fd::{AsRawFd, OwnedFd};

use kiln_control::{
    Blame, Do, EndReason, Files, Happened, Pause, Portion, Prepare, Restore, Resume, SaveMemory, SaveState,
    Saved,
};
use kiln_vmm::mailbox::GENERATION_BYTES;

use crate::guest::{Guest, file};
use crate::monitor::{Monitor, no_files};

/// A guest that parks, takes its mail if `acknowledges`, becomes who it says, and powers off with what it counted.
fn parking(acknowledges: bool) -> Guest {
    let guest = Guest::default()
        // mov ebp, 41
        .code(&[0xbd, 41, 0, 0, 0])
        .ring(3)
        // mov ebx, the mailbox
        .code(&[0xbb, 0, 0, 1, 0]);
    let guest = if acknowledges {
        // The id's four words to the acknowledgement's.
        (0..4).fold(guest, |guest, word| guest.code(&[0x8b, 0x43, word * 4, 0x89, 0x43, 16 + word * 4]))
    } else {
        guest
    };
    // inc ebp; mov [POWER], ebp
    guest.ring(4).ring(5).ring(5).code(&[0x45, 0x89, 0x2d, 0, 0, 0, 0xd0]).halt()
}

/// A monitor whose guest is parked.
pub(crate) fn parked(guest: &Guest) -> Monitor {
    let monitor = Monitor::start(&guest.elf());
    assert!(matches!(monitor.event(), Happened::Booted(_)));
    assert!(matches!(monitor.event(), Happened::Parked(_)));
    monitor
}

pub(crate) fn generation(id: u8) -> Vec<u8> {
    vec![id; GENERATION_BYTES]
}

fn saved(monitor: &Monitor) -> Saved {
    let Happened::Saved(saved) = monitor.event() else { panic!("an answer to a save") };
    saved
}

/// The snapshot of a machine: its state and its memory.
pub(crate) fn save(monitor: &Monitor) -> [File; 2] {
    let files = [(); 2].map(|()| tempfile::tempfile().expect("a file"));
    let [state, memory] = &files;
    monitor.order(Do::SaveMemory(SaveMemory::default()), &[memory]);
    assert_eq!(saved(monitor).failure, "");
    let digest = vec![1; 32];
    let order = SaveState { kernel: digest.clone(), initramfs: digest.clone(), memory: digest };
    monitor.order(Do::SaveState(order), &[state]);
    assert_eq!(saved(monitor).failure, "");
    files
}

fn restore(files: &[File; 2], generation: Option<Vec<u8>>) -> Monitor {
    let monitor = Monitor::spawn();
    restore_in(&monitor, files, Restore { generation, ..Restore::default() });
    monitor
}

/// Has a monitor make the machine of a snapshot, whatever it was.
pub(crate) fn restore_in(monitor: &Monitor, files: &[File; 2], order: Restore) {
    for mut file in files {
        file.seek(SeekFrom::Start(0)).expect("it is a file");
    }
    let [first, second] = files;
    monitor.order(Do::Files(Files {}), &[first]);
    monitor.order(Do::Restore(Restore { state_fd: 0, memory_fd: 1, cid: 3, ..order }), &[second]);
}

fn entered(monitor: &Monitor) {
    assert!(matches!(monitor.event(), Happened::Entered(_)));
}

/// The events to the end of a machine, without the one that says it runs, which may come at any place.
fn to_the_end(monitor: &Monitor) -> Vec<String> {
    let mut events = Vec::new();
    loop {
        match monitor.event() {
            Happened::Entered(_) => {}
            Happened::Resumed(_) => events.push("resumed".into()),
            Happened::Adopted(_) => events.push("adopted".into()),
            Happened::Ended(ended) => {
                events.push(ended.detail);
                return events;
            }
            other => panic!("{other:?}"),
        }
    }
}

#[test]
fn a_parked_guest_goes_on_with_its_mail() {
    let monitor = parked(&parking(true));
    monitor.order(Do::Resume(Resume { generation: Some(generation(7)) }), &no_files());
    assert_eq!(to_the_end(&monitor), ["resumed", "adopted", "code 42"]);
}

#[test]
fn every_copy_of_a_parked_guest_takes_its_own_mail() {
    let source = parked(&parking(true));
    let files = save(&source);
    for id in 1..4 {
        assert_eq!(to_the_end(&restore(&files, Some(generation(id)))), ["resumed", "adopted", "code 42"]);
    }
    source.order(Do::Resume(Resume { generation: Some(generation(9)) }), &no_files());
    assert_eq!(to_the_end(&source), ["resumed", "adopted", "code 42"]);
}

#[test]
fn a_guest_that_does_not_acknowledge_has_not_resumed() {
    let monitor = parked(&parking(false));
    monitor.order(Do::Resume(Resume { generation: Some(generation(7)) }), &no_files());
    assert_eq!(to_the_end(&monitor), ["code 42"]);
    // Nor one that has no mail.
    let monitor = parked(&parking(true));
    monitor.order(Do::Resume(Resume::default()), &no_files());
    assert_eq!(to_the_end(&monitor), ["code 42"]);
}

/// The monitor gives it no mail: its host speaks with it.
#[test]
fn a_guest_parked_at_its_port_is_left_to_its_host() {
    // ring; cmp dword [0x300000], 0; je to the comparison
    let spinning = Guest::default().ring(2).code(&[0x83, 0x3d, 0, 0, 0x30, 0, 0, 0x74, 0xf7]).halt();
    let monitor = Monitor::start(&spinning.elf());
    while !matches!(monitor.event(), Happened::Ready(_)) {}
    let goes_on_at_port = |monitor: &Monitor| match monitor.event() {
        Happened::Entered(entered) => entered.at_port,
        other => panic!("{other:?}"),
    };
    monitor.order(Do::Pause(Pause { parked: true }), &no_files());
    assert!(matches!(monitor.event(), Happened::Parked(_)));
    assert!(matches!(monitor.event(), Happened::Paused(_)));
    let copy = restore(&save(&monitor), Some(generation(1)));
    assert!(goes_on_at_port(&copy));
    for generation in [Some(generation(7)), None] {
        monitor.order(Do::Resume(Resume { generation }), &no_files());
        assert!(goes_on_at_port(&monitor));
        monitor.order(Do::Pause(Pause { parked: true }), &no_files());
        assert!(matches!(monitor.event(), Happened::Parked(_)));
        assert!(matches!(monitor.event(), Happened::Paused(_)));
    }
    // Parked is what it was said to be, and not what it was once.
    monitor.order(Do::Resume(Resume::default()), &no_files());
    assert!(goes_on_at_port(&monitor));
    monitor.order(Do::Pause(Pause::default()), &no_files());
    assert!(matches!(monitor.event(), Happened::Paused(_)));
    let failed = restore(&save(&monitor), Some(generation(1))).failed();
    assert!(failed.message.contains("not parked"), "{failed:?}");
}

#[test]
fn a_machine_is_made_in_a_shell_that_was_made_ahead() {
    let files = save(&parked(&parking(true)));
    let prepared = |memory_mib| {
        let monitor = Monitor::spawn();
        monitor.order(Do::Prepare(Prepare { memory_mib, vcpus: 1 }), &no_files());
        assert!(matches!(monitor.event(), Happened::Prepared(_)));
        restore_in(&monitor, &files, Restore { generation: Some(generation(1)), ..Restore::default() });
        monitor
    };
    assert_eq!(to_the_end(&prepared(64)), ["resumed", "adopted", "code 42"]);
    let failed = prepared(128).failed();
    assert!(failed.message.contains("cannot be restored into one of"), "{failed:?}");
    let monitor = Monitor::spawn();
    monitor.order(Do::Prepare(Prepare { memory_mib: 1, vcpus: 1 }), &no_files());
    assert_eq!(monitor.failed().blame(), Blame::Caller);
    let monitor = Monitor::spawn();
    for _ in 0..2 {
        monitor.order(Do::Prepare(Prepare { memory_mib: 64, vcpus: 1 }), &no_files());
    }
    assert!(matches!(monitor.event(), Happened::Prepared(_)));
    assert_eq!(monitor.exit().code(), Some(125));
}

#[test]
fn a_used_machine_becomes_the_one_of_a_snapshot() {
    let source = parked(&parking(true));
    let files = save(&source);
    let order = || Restore { generation: Some(generation(3)), ..Restore::default() };
    restore_in(&source, &files, order());
    assert_eq!(to_the_end(&source), ["resumed", "adopted", "code 42"]);
    // One that runs does not go on, and what it wrote is not there.
    let spinning = Guest::default().ring(2).code(&[0xff, 0x05, 0, 0, 0x30, 0, 0xeb, 0xf8]);
    let monitor = Monitor::start(&spinning.elf());
    while !matches!(monitor.event(), Happened::Ready(_)) {}
    restore_in(&monitor, &files, order());
    assert_eq!(to_the_end(&monitor), ["resumed", "adopted", "code 42"]);
}

#[test]
fn who_does_not_walk_its_way_to_the_first_answer_does_not_wait() {
    // It is in kernel mode, where no agent of Kiln's is.
    let files = save(&parked(&parking(true)));
    let monitor = Monitor::spawn();
    restore_in(&monitor, &files, Restore { stand: true, ..Restore::default() });
    let failed = monitor.failed();
    assert!(failed.message.contains("does not answer as one of Kiln's agents"), "{failed:?}");
    assert_eq!(failed.blame(), Blame::Caller);
}

fn save_memory(monitor: &Monitor, portion: Portion, file: &File) {
    monitor.order(Do::SaveMemory(SaveMemory { portion: portion.into() }), &[file]);
    assert_eq!(saved(monitor).failure, "");
}

fn content(file: &File) -> Vec<u8> {
    let (mut file, mut content) = (file, Vec::new());
    file.seek(SeekFrom::Start(0)).expect("it is a file");
    file.read_to_end(&mut content).expect("read");
    content
}

#[test]
fn memory_saved_ahead_and_the_rest_are_the_whole() {
    // ring; inc dword [0x300000]; jmp to the increment
    let counting = Guest::default().ring(2).code(&[0xff, 0x05, 0, 0, 0x30, 0, 0xeb, 0xf8]);
    let monitor = Monitor::start(&counting.elf());
    while !matches!(monitor.event(), Happened::Ready(_)) {}
    let new = || tempfile::tempfile().expect("a file");
    let go_on = || {
        monitor.order(Do::Resume(Resume::default()), &no_files());
        entered(&monitor);
    };
    let pause = || {
        monitor.order(Do::Pause(Pause::default()), &no_files());
        assert!(matches!(monitor.event(), Happened::Paused(_)));
    };
    // Until the guest has counted between the two, for which it may have had no time.
    let before = loop {
        let [parts, whole] = [new(), new()];
        save_memory(&monitor, Portion::Ahead, &parts);
        let ahead = content(&parts);
        pause();
        save_memory(&monitor, Portion::Rest, &parts);
        save_memory(&monitor, Portion::Whole, &whole);
        let whole = content(&whole);
        assert!(content(&parts) == whole);
        if ahead != whole {
            break whole;
        }
        go_on();
    };
    // What was saved ahead in one file is no part of another.
    let after = loop {
        go_on();
        save_memory(&monitor, Portion::Ahead, &new());
        pause();
        let whole = new();
        save_memory(&monitor, Portion::Whole, &whole);
        let whole = content(&whole);
        assert_eq!(before.len(), whole.len());
        if before != whole {
            break whole;
        }
    };
    let again = new();
    save_memory(&monitor, Portion::Rest, &again);
    assert!(content(&again) == after, "a rest of nothing is the whole");
}

#[test]
fn a_machine_is_paused_and_goes_on() {
    // ring; cmp dword [0x300000], 0; je to the comparison
    let spinning = Guest::default().ring(2).code(&[0x83, 0x3d, 0, 0, 0x30, 0, 0, 0x74, 0xf7]).halt();
    let monitor = Monitor::start(&spinning.elf());
    while !matches!(monitor.event(), Happened::Ready(_)) {}
    for _ in 0..5 {
        monitor.order(Do::Pause(Pause::default()), &no_files());
        assert!(matches!(monitor.event(), Happened::Paused(_)));
        monitor.order(Do::Resume(Resume::default()), &no_files());
        entered(&monitor);
    }
    monitor.order(Do::Pause(Pause::default()), &no_files());
    assert!(matches!(monitor.event(), Happened::Paused(_)));
    monitor.order(Do::Stop(kiln_control::Stop {}), &no_files());
    assert_eq!(monitor.ended().reason(), EndReason::Stopped);
    assert!(monitor.exit().success());
}

#[test]
fn a_machine_that_runs_is_saved_and_goes_on() {
    // Waits at the gate that a host opens, which is none; then says what it counted.
    let spinning = Guest::default().ring(2).code(&[0x83, 0x3d, 0, 0, 0x30, 0, 0, 0x74, 0xf7]).halt();
    let monitor = Monitor::start(&spinning.elf());
    while !matches!(monitor.event(), Happened::Ready(_)) {}
    let digest = vec![1; 32];
    let order = SaveState { kernel: digest.clone(), initramfs: digest.clone(), memory: digest };
    monitor.order(Do::SaveState(order), &[tempfile::tempfile().expect("a file")]);
    assert_eq!(saved(&monitor).failure, "the machine's memory was not saved");
    let copy = restore(&save(&monitor), None);
    entered(&copy);
    for monitor in [monitor, copy] {
        monitor.order(Do::Stop(kiln_control::Stop {}), &no_files());
        assert_eq!(monitor.ended().reason(), EndReason::Stopped);
    }
}

/// A guest that never parks, paused.
fn paused() -> Monitor {
    let spinning = Guest::default().ring(2).code(&[0xeb, 0xfe]);
    let monitor = Monitor::start(&spinning.elf());
    while !matches!(monitor.event(), Happened::Ready(_)) {}
    monitor.order(Do::Pause(Pause::default()), &no_files());
    assert!(matches!(monitor.event(), Happened::Paused(_)));
    monitor
}

#[test]
fn only_a_parked_machine_becomes_another() {
    let monitor = paused();
    let failed = restore(&save(&monitor), Some(generation(1))).failed();
    assert!(failed.message.contains("not parked"), "{failed:?}");
    monitor.order(Do::Resume(Resume { generation: Some(generation(1)) }), &no_files());
    assert_eq!(monitor.exit().code(), Some(125));
}

#[test]
fn a_machine_that_runs_may_be_told_to_go_on() {
    let monitor = paused();
    for _ in 0..3 {
        monitor.order(Do::Resume(Resume::default()), &no_files());
        entered(&monitor);
    }
    monitor.order(Do::Resume(Resume { generation: Some(generation(1)) }), &no_files());
    assert_eq!(monitor.exit().code(), Some(125));
}

#[test]
fn a_state_is_of_the_instant_its_memory_was_saved_at() {
    // Rings until the host has opened the gate, and parks then.
    let guest = Guest::default().ring(2).code(&[0x83, 0x3d, 0, 0, 0x30, 0, 0, 0x74, 0xf7]).halt();
    let monitor = Monitor::start(&guest.elf());
    while !matches!(monitor.event(), Happened::Ready(_)) {}
    let [memory, state, paused_state] = [(); 3].map(|()| tempfile::tempfile().expect("a file"));
    monitor.order(Do::SaveMemory(SaveMemory::default()), &[&memory]);
    assert_eq!(saved(&monitor).failure, "");
    monitor.order(Do::Pause(Pause::default()), &no_files());
    assert!(matches!(monitor.event(), Happened::Paused(_)));
    let digest = vec![1; 32];
    let order = SaveState { kernel: digest.clone(), initramfs: digest.clone(), memory: digest };
    for file in [&state, &paused_state] {
        monitor.order(Do::SaveState(order.clone()), &[file]);
        assert_eq!(saved(&monitor).failure, "");
    }
    let content = |file: &File| std::fs::read(format!("/proc/self/fd/{}", file.as_raw_fd())).expect("read");
    // The second is of later: its clocks say so.
    assert_ne!(content(&state), content(&paused_state));
}

#[test]
fn a_save_that_fails_says_so_and_the_machine_goes_on() {
    let monitor = parked(&parking(true));
    let full: OwnedFd = File::options().write(true).open("/dev/full").expect("there is a /dev/full").into();
    let digest = vec![1; 32];
    let order = SaveState { kernel: digest.clone(), initramfs: digest.clone(), memory: digest };
    monitor.order(Do::SaveState(order), &[full]);
    let failure = saved(&monitor).failure;
    assert!(failure.contains("No space left"), "{failure}");
    monitor.order(Do::Resume(Resume { generation: Some(generation(7)) }), &no_files());
    assert_eq!(to_the_end(&monitor), ["resumed", "adopted", "code 42"]);
}

#[test]
fn a_snapshot_that_is_not_whole_is_refused() {
    let source = parked(&parking(true));
    let [state, memory] = save(&source);
    let whole = std::fs::read(format!("/proc/self/fd/{}", state.as_raw_fd())).expect("read");
    let refused = |bytes: &[u8], memory: &File, part: &str| {
        let files = [file(bytes), memory.try_clone().expect("a descriptor")];
        let failed = restore(&files, Some(generation(1))).failed();
        assert!(failed.message.contains(part), "{part}: {failed:?}");
        assert_eq!(failed.blame(), Blame::Caller);
    };
    refused(b"", &memory, "cut off");
    refused(&whole[..whole.len() - 1], &memory, "cut off");
    let changed = |at: usize| {
        let mut bytes = whole.clone();
        bytes[at] ^= 1;
        bytes
    };
    refused(&changed(0), &memory, "not a snapshot");
    refused(&changed(100), &memory, "header");
    refused(&changed(whole.len() - 1), &memory, "virtio.1");
    let mut short = file(&[0; 4096]);
    short.write_all(&[0]).expect("space");
    refused(&whole, &short, "not as long");
}
