//! A guest that was saved goes on in other machines: the real kernel and agent, below the command line.

use kiln_testkit::guest::Guest;
use kiln_tests::from_environment;

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
