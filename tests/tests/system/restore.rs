//! A guest that was saved goes on in other machines: the real kernel and agent, below the command line.

use kiln_protocol::mailbox::{self, Generation};
use kiln_testkit::guest::Guest;
use kiln_tests::from_environment;
use kiln_vmm::layout;

#[test]
fn a_saved_guest_goes_on_in_as_many_machines_as_wanted() {
    let guest = Guest::boot(&from_environment("KILN_TEST_GUEST"), 128, 1).expect("it boots");
    guest.hello().expect("it answers");
    let (saved, guest) = guest.save().expect("saved");
    let copies: Vec<_> = (0..3).map(|_| saved.restore().expect("restored").0).collect();
    for copy in &copies {
        copy.hello().expect("a copy answers");
        copy.hello().expect("and again");
    }
    guest.hello().expect("so does the source");
    // What was restored can be saved.
    let (again, _copy) = copies.into_iter().next().expect("three").save().expect("saved again");
    again.restore().expect("restored").0.hello().expect("it answers");
}

#[test]
fn a_saved_guest_with_several_processors_goes_on() {
    let guest = Guest::boot(&from_environment("KILN_TEST_GUEST"), 128, 2).expect("it boots");
    let (saved, _guest) = guest.save().expect("saved");
    saved.restore().expect("restored").0.hello().expect("it answers");
}

fn generation(id: u8) -> Generation {
    Generation {
        id: [id; 16],
        realtime_ns: 0,
        entropy: [id; 64],
        machine_id: [id; 16],
        boot_id: [id; 16],
        hostname: format!("clone-{id}"),
    }
}

#[test]
fn a_parked_guest_goes_on_as_many_others() {
    let guest = Guest::boot(&from_environment("KILN_TEST_GUEST"), 128, 1).expect("it boots");
    let saved = guest.park().expect("it parks").save().expect("saved");
    for id in 1..4 {
        let (copy, took) = saved.claim(&generation(id)).expect("it takes its mail");
        eprintln!("{took:?}");
        copy.hello().expect("it answers");
    }
    // A copy that has become one can become another.
    let (copy, _) = saved.claim(&generation(4)).expect("it takes its mail");
    let again = copy.park().expect("it parks again").save().expect("saved");
    let (copy, _) = again.claim(&generation(5)).expect("it takes its mail");
    copy.hello().expect("it answers");
}

/// Monitor and agent each have the numbers of their contract.
#[test]
fn monitor_and_agent_mean_the_same_mailbox() {
    assert_eq!(layout::MAILBOX.0, mailbox::GPA);
    assert_eq!(layout::MAILBOX_BYTES, mailbox::BYTES as u64);
    assert_eq!(kiln_vmm::mailbox::GENERATION_BYTES, mailbox::GENERATION_BYTES);
}

/// What the probe rings while its registers keep their values, and when one has lost it.
const BEAT: u32 = 0x21;
const LOST: u32 = 0x58;

/// Vector registers of a program that never leaves user mode, in the middle of its work.
#[test]
fn vector_registers_survive() {
    let probe = kiln_testkit::image::probe().expect("the probe");
    let guest = Guest::boot_program(&from_environment("KILN_TEST_GUEST"), &probe, "carry-registers")
        .expect("a machine");
    assert!(guest.hears(BEAT, 10, LOST).expect("it beats"));
    let (mut saved, _guest) = guest.save().expect("saved");
    for _ in 0..6 {
        let (copy, _) = saved.restore().expect("restored");
        // Past the end of a round, where the registers are looked at.
        assert!(copy.hears(BEAT, 300, LOST).expect("it goes on"), "a register was lost");
        saved = copy.save().expect("saved again").0;
    }
}
