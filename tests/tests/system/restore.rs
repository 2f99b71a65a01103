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
        bounds: mailbox::Bounds::default(),
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

/// Monitor and agent each have the numbers of their contract, because neither links the other.
#[test]
fn monitor_and_agent_mean_the_same_by_every_number() {
    use kiln_protocol::power as agents;
    use kiln_vmm::power as monitors;
    let pairs = [
        ("the power page", layout::POWER_PAGE.0, kiln_protocol::POWER_GPA),
        ("the page's size", layout::WINDOW_BYTES, agents::PAGE_BYTES as u64),
        ("the port of one who listens", layout::READY_PORT.into(), kiln_protocol::READY_PORT.into()),
        ("off", monitors::POWER_OFF, agents::OFF as u64),
        ("notice", monitors::NOTICE, agents::NOTICE as u64),
        ("doorbell", monitors::DOORBELL, agents::DOORBELL as u64),
        ("magic", monitors::MAGIC, agents::MAGIC as u64),
        ("magic value", monitors::MAGIC_VALUE.into(), agents::MAGIC_VALUE.into()),
        ("started", monitors::PHASE_STARTED.into(), agents::PHASE_STARTED.into()),
        ("listening", monitors::PHASE_READY.into(), agents::PHASE_LISTENING.into()),
        ("parked", monitors::PHASE_PARKED.into(), agents::PHASE_PARKED.into()),
        ("resumed", monitors::PHASE_RESUMED.into(), agents::PHASE_RESUMED.into()),
        ("adopted", monitors::PHASE_ADOPTED.into(), agents::PHASE_ADOPTED.into()),
        ("not adopted", monitors::NOTICE_NOT_ADOPTED.into(), agents::NOTICE_NOT_ADOPTED.into()),
        ("the mailbox", layout::MAILBOX.0, mailbox::GPA),
        ("its size", layout::MAILBOX_BYTES, mailbox::BYTES as u64),
        ("a generation", kiln_vmm::mailbox::GENERATION_BYTES as u64, mailbox::GENERATION_BYTES as u64),
        ("an id", size_of::<kiln_vmm::mailbox::Id>() as u64, mailbox::ID_BYTES as u64),
        ("its echo", kiln_vmm::mailbox::ACKNOWLEDGED_AT as u64, mailbox::ACKNOWLEDGED_AT as u64),
        ("its rehearsal", kiln_vmm::mailbox::REHEARSAL_AT as u64, mailbox::REHEARSAL_AT as u64),
        ("its clock", kiln_vmm::mailbox::REALTIME_AT as u64, mailbox::REALTIME_AT as u64),
    ];
    for (what, monitors, agents) in pairs {
        assert_eq!(monitors, agents, "{what}");
    }
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
