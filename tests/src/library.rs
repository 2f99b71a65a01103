//! The library under test, with the program, the guest and the store of the tests.

use kiln::detached::{Kept, Machines};
use kiln::store::Store;
use kiln::{GuestBundle, Image, ImageBuilder, MonitorProgram, Output, Vm};

/// An image of the tests, as the library's users describe one.
pub fn image(of: &kiln_testkit::image::Image) -> ImageBuilder {
    let guest = GuestBundle::from_dir(&crate::from_environment("KILN_TEST_GUEST")).expect("the tests' guest");
    Image::builder(of.reference())
        .store(&store())
        .guest(guest)
        .monitor_program(MonitorProgram::find().expect("the tests' monitor"))
        .memory_mib(256)
}

/// The store that the tests share.
pub fn store() -> Store {
    Store::open(crate::store()).expect("the tests' store")
}

/// Runs a test's future on a runtime of its own.
pub fn block_on<T>(test: impl Future<Output = T>) -> T {
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build();
    runtime.expect("a runtime").block_on(test)
}

/// A machine of the busybox image.
pub async fn start() -> Vm {
    let image = image(&crate::busybox()).build().await.expect("an image");
    image.start().await.expect("a machine")
}

/// What a command prints that succeeds.
#[track_caller]
pub fn told(output: Output) -> String {
    assert!(output.status.success(), "{output:?}");
    String::from_utf8(output.stdout).expect("text").trim().to_owned()
}

/// What a shell script in a machine prints that succeeds.
pub async fn sh(vm: &Vm, script: &str) -> String {
    told(vm.exec(["sh", "-c", script]).output().await.expect("a shell"))
}

/// A machine of the tests' store that `kiln vm start` has started.
pub fn kept(name: &str) -> Kept {
    let machines = Machines::open(crate::store().join("vms")).expect("the folder of machines");
    machines.reach(name).expect("a machine that runs")
}
