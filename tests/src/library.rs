//! The library under test, with the program, the guest and the store of the tests.

use kiln::store::Store;
use kiln::{GuestBundle, Image, ImageBuilder, MonitorProgram};

/// An image of the tests, as the library's users describe one.
pub fn image(of: &kiln_testkit::image::Image) -> ImageBuilder {
    let guest = GuestBundle::from_dir(&crate::from_environment("KILN_TEST_GUEST")).expect("the tests' guest");
    Image::builder(of.reference())
        .store(&store())
        .guest(guest)
        .monitor_program(MonitorProgram::at(crate::program()))
        .memory_mib(256)
}

/// The store that the tests share.
pub fn store() -> Store {
    Store::open(crate::store()).expect("the tests' store")
}
