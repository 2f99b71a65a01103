//! The library against the real monitor, which is this same program under another name.

use std::fs::File;
use std::io::Read;
use std::os::fd::AsFd;

use kiln::monitor::{Monitor, Start, probe};
use kiln::{Blame, MachineEnd, MonitorError, MonitorProgram};

fn program() -> MonitorProgram {
    MonitorProgram::at(env!("CARGO_BIN_EXE_kiln"))
}

/// An order for a small machine whose kernel and initramfs are the one descriptor beside it.
fn order() -> Start {
    Start { memory_mib: 64, vcpus: 1, cid: 3, ..Start::default() }
}

fn file_with(content: &[u8]) -> File {
    use std::io::{Seek, Write};
    let mut file = tempfile::tempfile().expect("a temporary file");
    file.write_all(content).expect("written");
    file.rewind().expect("a file seeks");
    file
}

#[tokio::test]
async fn a_file_that_is_no_kernel_is_the_callers_fault() {
    let monitor = Monitor::spawn(&program()).expect("the monitor starts");
    let file = file_with(b"this is no kernel");
    monitor.start(order(), &[file.as_fd()]).await.expect("the order is sent");
    let Err(MonitorError::Ended(end)) = monitor.ready().await else { panic!("text cannot boot") };
    assert!(matches!(&*end, MachineEnd::Failed { blame: Blame::Caller, .. }), "{end:?}");
    assert!(end.to_string().contains("kernel"), "{end}");
}

#[tokio::test]
async fn a_dropped_handle_ends_the_process() {
    // The monitor holds the writing end of a pipe for as long as it lives: the console of its machine.
    let (mut reading, writing) = std::io::pipe().expect("a pipe");
    let monitor = Monitor::spawn(&program()).expect("the monitor starts");
    let kernel = file_with(b"");
    let start = Start { console_fd: Some(1), ..order() };
    monitor.start(start, &[kernel.as_fd(), writing.as_fd()]).await.expect("the order is sent");
    drop(writing);
    drop(monitor);
    let ended = tokio::task::spawn_blocking(move || reading.read_to_end(&mut Vec::new()));
    ended.await.expect("no panic").expect("the pipe reads to its end");
}

#[tokio::test]
async fn a_monitor_that_is_killed_is_reported_as_that() {
    let monitor = Monitor::spawn(&MonitorProgram::at("/bin/false")).expect("the program starts");
    let end = monitor.ended().await;
    assert!(
        matches!(&*end, MachineEnd::Died { status: Some(status), .. } if status.code() == Some(1)),
        "{end:?}"
    );
    let Err(MonitorError::Ended(_)) = monitor.connect(1).await else { panic!("nobody to connect to") };
}

#[tokio::test]
async fn a_program_that_is_not_there_is_named() {
    let error = Monitor::spawn(&MonitorProgram::at("/nonexistent/kiln")).expect_err("no such file");
    assert!(error.to_string().contains("/nonexistent/kiln"), "{error}");
}

#[tokio::test]
async fn a_monitor_without_orders_stops_when_told() {
    let monitor = Monitor::spawn(&program()).expect("the monitor starts");
    monitor.stop().await;
}

#[tokio::test]
async fn a_probe_answers() {
    let probe = probe(&program()).await.expect("the monitor answers");
    assert!(probe.open_error.is_some() || probe.max_vcpus.is_some());
}
