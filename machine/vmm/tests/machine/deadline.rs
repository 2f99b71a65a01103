//! A guest that keeps its monitor from hearing its host, and what ends the monitor then: the real one, process 1 of its namespace, behind
//! its filter, in the guest. The guest is a snapshot of somebody hostile, as a shared template may be.

use std::fs::File;
use std::io::{BufReader, Seek as _, SeekFrom};
use std::time::Duration;

use kiln_control::Restore;
use kiln_testkit::inject::Hostage;
use kiln_vmm::MachineState;
use libc::{itimerval, timeval};

use crate::guest::Guest;
use crate::monitor::Monitor;
use crate::parked::{generation, parked, restore_in, save};

/// The request in which a guest runs. Linux `Documentation/virt/kvm/api.rst`, 4.10 `KVM_RUN`.
const KVM_RUN: u64 = 0xae80;
/// What a guest has to answer in, in microseconds: `ANSWER_LIMIT` of the monitor.
const ANSWER_LIMIT_US: i64 = 60_000_000;
/// The deadline as these tests set it forward, and again, should it fall into the moment in which the monitor is held.
const SOON: timeval = timeval { tv_sec: 0, tv_usec: 100_000 };
/// By when one is given up that does not end: far more than a busy host needs.
const GIVEN_UP: Duration = Duration::from_mins(2);

/// A snapshot of a guest that is parked in user mode, as an agent is, and will do nothing ever after.
fn spinning() -> [File; 2] {
    let source = parked(&Guest::default().ring(3).code(&[0xeb, 0xfe]));
    let [mut state, memory] = save(&source);
    state.seek(SeekFrom::Start(0)).expect("it is a file");
    let (header, sections) = kiln_snapshot::read(&mut BufReader::new(state)).expect("a snapshot");
    let mut machine = MachineState::from_sections(&sections).expect("a machine");
    let system = &mut machine.vcpus[0].system_registers;
    for segment in [&mut system.cs, &mut system.ss] {
        segment.dpl = 3;
        segment.selector |= 3;
    }
    let mut state = tempfile::tempfile().expect("a file");
    kiln_snapshot::write(&header, &machine.to_sections(), &mut state).expect("written");
    [state, memory]
}

/// Stops the monitor's first thread, which hears its host, while it is in the guest.
fn in_the_guest(monitor: &Monitor) -> Hostage {
    loop {
        let hostage = Hostage::take_without_filter(monitor.id().cast_signed()).expect("it lives");
        let (call, arguments) = hostage.waits_in();
        if (call, arguments[1]) == (libc::SYS_ioctl, KVM_RUN) {
            return hostage;
        }
        drop(hostage);
        std::thread::yield_now();
    }
}

/// How long until the deadline of the process, in microseconds.
fn deadline_us(hostage: &Hostage) -> i64 {
    let at = hostage.put(&[0; size_of::<itimerval>()]).expect("room");
    let got = hostage.call(libc::SYS_getitimer, &[libc::ITIMER_REAL as u64, at]);
    assert_eq!(got.expect("it is there"), 0);
    let mut value = [[0; 8]; 2];
    hostage.get(16, value.as_flattened_mut()).expect("it is there");
    let [seconds, microseconds] = value.map(i64::from_ne_bytes);
    seconds * 1_000_000 + microseconds
}

/// Sets the deadline forward: the same one, sooner.
fn hasten(hostage: &Hostage) {
    let words = [SOON.tv_sec, SOON.tv_usec].repeat(2);
    let at = hostage.put(&words.into_iter().flat_map(i64::to_ne_bytes).collect::<Vec<_>>()).expect("room");
    let set = hostage.call(libc::SYS_setitimer, &[libc::ITIMER_REAL as u64, at, 0]);
    assert_eq!(set.expect("it is there"), 0);
}

/// A monitor whose guest has it ends by itself when its time is over, with nobody left to end it.
#[track_caller]
fn ends_by_itself(monitor: Monitor) {
    let hostage = in_the_guest(&monitor);
    let left = deadline_us(&hostage);
    hasten(&hostage);
    drop(hostage);
    let status = monitor.exit_alone(GIVEN_UP).expect("it ends by itself");
    // Last, so that a test that fails leaves nothing that spins.
    assert!(0 < left && left <= ANSWER_LIMIT_US, "{left} us");
    assert_eq!(status.code(), Some(kiln_jail::EXIT_OVERDUE));
}

#[test]
fn a_monitor_whose_guest_does_not_rehearse_ends_by_itself() {
    let monitor = Monitor::spawn();
    restore_in(&monitor, &spinning(), Restore { stand: true, ..Restore::default() });
    ends_by_itself(monitor);
}

#[test]
fn a_monitor_whose_guest_does_not_take_its_mail_ends_by_itself() {
    let monitor = Monitor::spawn();
    restore_in(&monitor, &spinning(), Restore { generation: Some(generation(1)), ..Restore::default() });
    ends_by_itself(monitor);
}
