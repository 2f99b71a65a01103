//! What a guest may write, and what stays of it.

use std::fs::{self, File};
use std::io::Read as _;
use std::os::unix::fs::FileTypeExt as _;
use std::process::Command;

use kiln_testkit::run as run_tool;
use kiln_tests::{Session, busybox, descendants, kiln_run, script, wait_until_gone};
use rustix::process::{Signal, kill_process};

#[test]
fn a_read_only_root_refuses_writes_and_leaves_places_for_them() {
    let outcome = script(
        &["--read-only"],
        "touch /new 2>/dev/null && echo 'root written'; echo x >/etc/passwd && echo 'file written'; \
         for dir in /tmp /run /dev/shm; do echo x >$dir/file && echo \"$dir\"; done",
    );
    outcome.code(0);
    assert_eq!(outcome.out(), "/tmp\n/run\n/dev/shm\n");
}

/// Root in the guest goes for the device itself: it has no node, cannot make one, and the device is read-only anyway.
/// The next guest of the image finds it as it was.
#[test]
fn the_images_disk_refuses_writes() {
    let outcome = script(
        &[],
        "ls /dev/vda && echo there; mknod /tmp/vda b $(tr : ' ' </sys/block/vda/dev) && echo made; \
         echo 0 >/sys/block/vda/ro; cat /sys/block/vda/ro; echo changed >/etc/passwd; head -n1 /etc/passwd",
    );
    assert_eq!(outcome.out(), "1\nchanged\n", "{}", outcome.err());
    script(&[], "head -n1 /etc/passwd").prints("root:x:0:0:root:/root:/bin/sh\n");
}

/// Each line is printed after fsync returned, so each line printed must be on the disk that the dead machine leaves.
#[test]
fn acknowledged_fsync_survives_the_kill_of_the_machine() {
    let mut session = Session::start(&mut kiln_run(&[], &busybox(), &["/probe", "append", "/root/log"]));
    session.wait_for("20");
    let monitor = *descendants(session.pid()).first().expect("a monitor");
    // The scratch disk has no name any more; while we hold it, it lives on.
    let mut disk = scratch_disk(monitor.as_raw_nonzero().get());
    kill_process(monitor, Signal::KILL).expect("the monitor is there");
    let outcome = session.finish();
    assert_eq!(outcome.status.code(), Some(125), "{}", outcome.err());
    let printed = outcome.out().lines().last().map_or(20, |last| last.parse::<u64>().expect("a number"));

    let place = tempfile::tempdir().expect("a directory");
    let (image, mounted) = (place.path().join("scratch.ext4"), place.path().join("mounted"));
    copy_sparse(&mut disk, &image);
    // Mounting replays the journal, as the next boot would.
    fs::create_dir(&mounted).expect("a directory");
    run_tool(Command::new("mount").args(["-o", "loop"]).arg(&image).arg(&mounted))
        .expect("the scratch disk mounts");
    let log =
        Command::new("find").arg(&mounted).args(["-name", "log", "-path", "*root*"]).output().expect("find");
    let path = String::from_utf8_lossy(&log.stdout).trim().to_owned();
    let text = fs::read_to_string(&path);
    run_tool(Command::new("umount").arg(&mounted)).expect("unmounted");
    let text = text.unwrap_or_else(|error| panic!("no log on the scratch disk ({path:?}): {error}"));
    let durable: Vec<&str> = text.lines().collect();
    assert!(durable.len() as u64 > printed, "{printed} acknowledged, {} on the disk", durable.len());
    assert!(durable.iter().enumerate().all(|(at, line)| *line == at.to_string()), "lines are missing");
}

/// The one large regular file that a monitor has open for writing.
fn scratch_disk(pid: i32) -> File {
    for entry in fs::read_dir(format!("/proc/{pid}/fd")).expect("the monitor's descriptors").flatten() {
        let Ok(target) = fs::metadata(entry.path()) else { continue };
        let info = fs::read_to_string(format!("/proc/{pid}/fdinfo/{}", entry.file_name().display()))
            .unwrap_or_default();
        let flags = info.lines().find_map(|line| line.strip_prefix("flags:")).unwrap_or("0").trim();
        let writable = u32::from_str_radix(flags, 8).unwrap_or(0) & 0o3 == 0o2;
        let named_memory = fs::read_link(entry.path()).is_ok_and(|name| name.starts_with("/memfd:"));
        if writable
            && target.is_file()
            && !target.file_type().is_char_device()
            && !named_memory
            && target.len() >> 30 > 0
        {
            return File::open(entry.path()).expect("the scratch disk opens");
        }
    }
    panic!("the monitor has no scratch disk open");
}

/// Copies what a sparse file holds.
fn copy_sparse(from: &mut File, to: &std::path::Path) {
    let source = format!("/proc/{}/fd/{}", std::process::id(), std::os::fd::AsRawFd::as_raw_fd(from));
    run_tool(Command::new("cp").args(["--sparse=always", &source]).arg(to)).expect("the disk is copied");
    let mut start = [0; 4];
    File::open(to).and_then(|mut file| file.read_exact(&mut start)).expect("the copy is read");
}

/// Both see the same image and neither the other's changes.
#[test]
fn two_machines_of_one_image_run_at_once_and_apart() {
    let command = ["sh", "-c", "echo $0 >/root/mine; echo ready; read -r go; cat /root/*", "first"];
    let mut second = command;
    second[3] = "second";
    let mut machines =
        [command, second].map(|command| Session::start(&mut kiln_run(&["-i"], &busybox(), &command)));
    for machine in &mut machines {
        machine.wait_for("ready");
    }
    for machine in &mut machines {
        machine.write(b"go\n");
    }
    let [first, second] = machines.map(Session::finish);
    first.prints("first\n");
    second.prints("second\n");
}

#[test]
fn nothing_outlives_a_killed_kiln() {
    let mut session = Session::start(&mut kiln_run(&[], &busybox(), &["sh", "-c", "echo ready; sleep 1000"]));
    session.wait_for("ready");
    let others = descendants(session.pid());
    assert!(!others.is_empty(), "a machine is a process of its own");
    session.signal(Signal::KILL);
    session.finish();
    for pid in others {
        assert!(wait_until_gone(pid, std::time::Duration::from_mins(1)), "{pid:?} outlives its kiln");
    }
}
