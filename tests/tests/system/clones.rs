//! Many guests of one snapshot: no two are alike, and none lives in the past.

use std::collections::HashSet;
use std::time::{SystemTime, UNIX_EPOCH};

use kiln_protocol::mailbox::{Bounds, Generation};
use kiln_testkit::guest::{Guest, Saved};
use kiln_tests::{from_environment, without_memory_device};
use kiln_vmm::Parking;

/// How many guests are made of one snapshot, unless `KILN_CLONES` says otherwise.
const CLONES: u64 = 1000;
/// How many are made where each takes the guest kernel.
const CLONES_WITHOUT_A_DOORBELL: u64 = 20;
/// How far from the host's a clone's clock may be.
const CLOCK_TOLERANCE_NS: u64 = 50_000_000;

fn generation(clone: u64) -> Generation {
    let mut id = [0xc1; 16];
    id[..8].copy_from_slice(&(clone + 1).to_le_bytes());
    let mut entropy = [0; 64];
    getrandom::fill(&mut entropy).expect("random bytes");
    let hostname = format!("clone-{clone}");
    Generation {
        id,
        realtime_ns: 0,
        entropy,
        machine_id: id,
        boot_id: id,
        hostname,
        bounds: Bounds::default(),
    }
}

fn realtime_ns() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).expect("after 1970").as_nanos() as u64
}

/// What clones have shown that no two may have in common.
#[derive(Default)]
struct Seen {
    random: HashSet<Vec<u8>>,
}

impl Seen {
    /// Makes a guest of `saved` and looks at it.
    fn claim(&mut self, saved: &Saved, clone: u64, asleep_at_ns: u64, lives: u64) -> Guest {
        let generation = generation(clone);
        let (guest, took) = saved.claim(&generation).expect("it becomes another");
        // One that is told at its port cannot know when in the conversation it was told the time.
        let tolerance_ns = match saved.parking {
            Parking::Port => CLOCK_TOLERANCE_NS + (took.resumed + took.adopted).as_nanos() as u64 / 2,
            Parking::Doorbell | Parking::None => CLOCK_TOLERANCE_NS,
        };
        self.look_at(&guest, clone, &generation, asleep_at_ns, lives, tolerance_ns);
        guest
    }

    fn look_at(
        &mut self,
        guest: &Guest,
        clone: u64,
        generation: &Generation,
        asleep_at_ns: u64,
        lives: u64,
        tolerance_ns: u64,
    ) {
        for _ in 0..2 {
            let before = realtime_ns();
            let welcome = guest.hello().expect("it answers");
            let after = realtime_ns();
            assert_eq!(welcome.hostname, generation.hostname);
            assert_eq!(welcome.generation, lives);
            let clock = welcome.realtime_ns;
            assert!(
                before - tolerance_ns <= clock && clock <= after + tolerance_ns,
                "clone {clone} says {clock} between {before} and {after}"
            );
            assert!(welcome.monotonic_ns >= asleep_at_ns, "the monotonic clock of clone {clone} went back");
            assert_eq!(welcome.random.len(), 32, "clone {clone} has no random numbers");
            assert!(self.random.insert(welcome.random), "clone {clone} repeats what another guest had");
        }
    }
}

#[test]
fn a_thousand_clones_of_one_snapshot_are_all_different() {
    let clones = std::env::var("KILN_CLONES").map_or(CLONES, |count| count.parse().expect("a number"));
    let guest = Guest::boot(&from_environment("KILN_TEST_GUEST"), 128, 1).expect("it boots");
    let asleep_at_ns = guest.hello().expect("it answers").monotonic_ns;
    let saved = guest.park().expect("it parks").save().expect("saved");
    let mut seen = Seen::default();
    for clone in 0..clones {
        seen.claim(&saved, clone, asleep_at_ns, 1);
    }
    assert_eq!(seen.random.len() as u64, 2 * clones);
}

/// One machine, guest after guest, each of which has rehearsed and waited.
#[test]
fn guests_that_waited_are_all_different_in_one_machine() {
    const GUESTS: u64 = 40;
    for vcpus in [1, 2] {
        let guest = Guest::boot(&from_environment("KILN_TEST_GUEST"), 128, vcpus).expect("it boots");
        let asleep_at_ns = guest.hello().expect("it answers").monotonic_ns;
        let saved = guest.park().expect("it parks").save().expect("saved");
        let mut waiting = saved.in_wait().expect("it waits");
        let mut seen = Seen::default();
        for clone in 0..GUESTS {
            let generation = generation(clone);
            let (guest, _) = waiting.claim(&generation).expect("it becomes another");
            seen.look_at(&guest, clone, &generation, asleep_at_ns, 1, CLOCK_TOLERANCE_NS);
            (waiting, _) = guest.recycle(&saved).expect("the machine takes the next");
        }
    }
}

/// What a guest leaves in its machine is not there for the next: registers, devices and every byte of memory.
#[test]
fn a_used_machine_with_its_next_guest_is_as_one_made_for_it() {
    for vcpus in [1, 2] {
        let guest = Guest::boot(&from_environment("KILN_TEST_GUEST"), 128, vcpus).expect("it boots");
        let saved = guest.park().expect("it parks").save().expect("saved");
        let fresh = || saved.in_wait().expect("it waits").save().expect("saved");
        let (one, other) = (fresh(), fresh());
        // The time is in a handful of pages: where KVM tells it, and where the agent has noted it.
        let clocks = one.differences(&other).expect("both can be read");
        assert!(clocks.len() <= 6 && clocks.iter().all(|other| other.starts_with("page")), "{clocks:?}");
        let (used, _) = saved.in_wait().expect("it waits").claim(&generation(1)).expect("it becomes another");
        used.hello().expect("it answers");
        let (next, _) = used.recycle(&saved).expect("the machine takes the next");
        let next = next.save().expect("saved");
        let mut others = next.differences(&one).expect("both can be read");
        others.retain(|page| !clocks.contains(page));
        assert_eq!(others, Vec::<String>::new());
    }
}

/// The kernel that a user without `/dev/mem` brings: the guest cannot reach its doorbell, so all of it goes by way of the guest
/// kernel, whose processor is idle in it when the machine is saved.
#[test]
fn clones_of_a_guest_without_a_doorbell_are_all_different() {
    let kernel = without_memory_device();
    let folder = from_environment("KILN_TEST_GUEST");
    for (vcpus, clones) in [(1, CLONES_WITHOUT_A_DOORBELL), (2, 4)] {
        let guest = Guest::boot_kernel(kernel.path(), &folder, 128, vcpus).expect("it boots");
        let asleep_at_ns = guest.hello().expect("it answers").monotonic_ns;
        let parked = guest.park().expect("it parks");
        assert_eq!(parked.parking(), Parking::Port);
        // It may go on as it was, and be parked again.
        let guest = parked.go_on().expect("it goes on");
        let source = guest.hello().expect("it answers");
        assert_eq!(source.generation, 0);
        let saved = guest.park().expect("it parks").save().expect("saved");
        let mut seen = Seen::default();
        assert!(seen.random.insert(source.random));
        for clone in 0..clones {
            seen.claim(&saved, clone, asleep_at_ns, 1);
        }
        // A clone can be a source.
        let clone = seen.claim(&saved, clones, asleep_at_ns, 1);
        let saved = clone.park().expect("it parks").save().expect("saved");
        seen.claim(&saved, clones + 1, asleep_at_ns, 2);
    }
}

/// Parked, saved and made another, again and again.
#[test]
fn a_chain_of_lives_goes_on() {
    const LIVES: u64 = 12;
    let guest = Guest::boot(&from_environment("KILN_TEST_GUEST"), 128, 2).expect("it boots");
    let mut asleep_at_ns = guest.hello().expect("it answers").monotonic_ns;
    let mut saved = guest.park().expect("it parks").save().expect("saved");
    let mut seen = Seen::default();
    for life in 0..LIVES {
        let guest = seen.claim(&saved, life, asleep_at_ns, life + 1);
        asleep_at_ns = guest.hello().expect("it answers").monotonic_ns;
        saved = guest.park().expect("it parks").save().expect("saved");
    }
}
