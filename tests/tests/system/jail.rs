//! Machines in their jails, as users meet them. The jail itself is tested in `machine/vmm`.

use std::fs::{self, Permissions};
use std::io::Write as _;
use std::os::unix::fs::PermissionsExt as _;
use std::path::Path;
use std::process::Command;

use kiln_testkit::copy_program;
use kiln_testkit::inject::Hostage;
use kiln_tests::{Outcome, Session, busybox, descendants, kiln, kiln_run, monitor_of, program};
use rustix::process::{Pid, Signal, kill_process};

/// An ordinary user: no name, no groups.
const USER: &str = "12345";
/// Runs `"$@"` as that user, where `/dev/kvm` is a device that this user may open. Nobody outside sees that device.
const AS_USER: &str = r#"
set -e
mount -t tmpfs none "$1"
mknod -m 666 "$1/kvm" c 10 232
mount --bind "$1/kvm" /dev/kvm
shift
exec setpriv --reuid "$KILN_TEST_USER" --regid "$KILN_TEST_USER" --clear-groups "$@"
"#;

/// A command that has begun, in a machine.
fn waiting() -> Session {
    let mut session = Session::start(&mut kiln_run(&[], &busybox(), &["sh", "-c", "echo ready; sleep 1000"]));
    session.wait_for("ready");
    session
}

fn status(pid: Pid, field: &str) -> String {
    let status = fs::read_to_string(format!("/proc/{}/status", pid.as_raw_nonzero())).expect("its status");
    let line = status.lines().find_map(|line| line.strip_prefix(field)?.strip_prefix(':'));
    line.expect("the field").split_whitespace().collect::<Vec<_>>().join(" ")
}

/// A copy of the image that every user may read.
pub(crate) fn image_for_all(folder: &Path) -> String {
    let reference = busybox().reference();
    let layout = reference.strip_prefix("oci-layout:").and_then(|rest| rest.rsplit_once(':'));
    let (layout, tag) = layout.expect("a layout in a folder");
    let copy = folder.join("image");
    let copied = Command::new("cp").args(["-r", layout]).arg(&copy).status().expect("cp runs");
    let allowed = Command::new("chmod").args(["-R", "a+rX"]).arg(&copy).status().expect("chmod runs");
    assert!(copied.success() && allowed.success());
    format!("oci-layout:{}:{tag}", copy.display())
}

/// From nothing: the base is booted, the template baked, the machine restored.
#[test]
fn an_ordinary_user_runs_a_machine() {
    assert!(rustix::process::geteuid().is_root(), "only root can become another user: run this test as root");
    let place = tempfile::tempdir().expect("a folder");
    let allow = |path: &Path, mode| fs::set_permissions(path, Permissions::from_mode(mode)).expect("allowed");
    allow(place.path(), 0o777);
    let at = |name: &str| place.path().join(name);
    copy_program(&program(), &at("kiln")).expect("copied");
    fs::create_dir(at("device")).expect("a folder");

    let mut unshare = Command::new("unshare");
    unshare.args(["--mount", "sh", "-c", AS_USER, "sh"]).arg(at("device")).arg(at("kiln"));
    unshare.args([
        "run",
        "--quiet",
        &image_for_all(place.path()),
        "--",
        "sh",
        "-c",
        "echo ready; read line; echo $line",
    ]);
    unshare.env("KILN_ROOT", at("store")).env("KILN_TEST_USER", USER).current_dir(place.path());
    let mut session = Session::start(unshare.env("HOME", place.path()));
    session.wait_for("ready");
    let monitor = monitor_of(session.pid());
    assert_eq!(status(monitor, "Uid"), [USER; 4].join(" "));
    assert_eq!(status(monitor, "Gid"), [USER; 4].join(" "));
    for set in ["CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb"] {
        assert_eq!(status(monitor, set), "0000000000000000", "{set}");
    }
    assert_eq!((status(monitor, "NoNewPrivs"), status(monitor, "Seccomp")), ("1".into(), "2".into()));
    for name in ["cgroup", "ipc", "mnt", "net", "pid", "user", "uts"] {
        let of = |pid: Pid| {
            fs::read_link(format!("/proc/{}/ns/{name}", pid.as_raw_nonzero())).expect("a namespace")
        };
        assert_ne!(of(monitor), of(session.pid()), "{name}");
    }
    assert_eq!(
        fs::read_dir(format!("/proc/{}/root", monitor.as_raw_nonzero())).expect("a folder").count(),
        0
    );
    session.signal(Signal::KILL);
    session.finish();
}

#[test]
fn a_monitor_that_makes_a_call_it_must_not_is_reported_with_the_call() {
    let session = waiting();
    let monitor = monitor_of(session.pid());
    let hostage = Hostage::take(monitor.as_raw_nonzero().get()).expect("a thread that waits");
    hostage
        .leave_with(libc::SYS_socket, &[libc::AF_INET as u64, libc::SOCK_STREAM as u64])
        .expect("it is there");
    let words = format!("the monitor was killed by its own filter: system call {}", libc::SYS_socket);
    session.finish().code(125).complains(&words);
}

#[test]
fn a_monitor_that_is_killed_is_reported_and_leaves_nothing() {
    let session = waiting();
    let (kiln, monitor) = (session.pid(), monitor_of(session.pid()));
    kill_process(monitor, Signal::KILL).expect("it lives");
    session.finish().code(125).complains("the monitor process died");
    assert_eq!(descendants(kiln), []);
    assert!(!Path::new(&format!("/proc/{}", monitor.as_raw_nonzero())).exists());
}

/// It is a program of its own, in a file that nobody can write to: not even a monitor that its guest has taken over.
#[test]
fn a_monitor_is_the_one_that_is_built_in() {
    let session = waiting();
    let monitor = monitor_of(session.pid());
    let program = format!("/proc/{}/exe", monitor.as_raw_nonzero());
    let name = fs::read_link(&program).expect("its program");
    assert_eq!(name.to_str(), Some("/memfd:kiln-monitor (deleted)"));
    let error = fs::OpenOptions::new().write(true).open(&program).and_then(|mut file| file.write_all(b"x"));
    assert!(error.is_err(), "it was written to");
    assert!(fs::metadata(&program).expect("a file").len() < 2 << 20, "it is more than a monitor");
}

/// A switch of the kernel's, by pid namespace.
#[test]
fn where_no_file_in_memory_is_executed_kiln_is_its_own_monitor() {
    let mut unshare = Command::new("unshare");
    unshare.args(["--pid", "--fork", "--mount-proc", "sh", "-c"]);
    unshare.args([r#"echo 2 > /proc/sys/vm/memfd_noexec && exec "$@""#, "sh"]).arg(program());
    let image = busybox().reference();
    unshare.args(["run", "--quiet", &image, "--", "echo", "here"]).env("KILN_ROOT", kiln_tests::store());
    Outcome::of(&mut unshare).prints("here\n");
}

/// All that a jail is made of goes with its process: nothing of it has a name on the host.
#[test]
fn a_jail_leaves_no_trace_on_the_host() {
    let mounts = || fs::read_to_string("/proc/self/mountinfo").expect("the mounts");
    let before = mounts();
    let session = waiting();
    assert_eq!(mounts(), before);
    session.signal(Signal::KILL);
    session.finish();
    assert_eq!(mounts(), before);
}

#[test]
fn doctor_tries_the_jail() {
    let outcome = Outcome::of(&mut kiln(["doctor"]));
    let line = outcome.code(0).out();
    let line = line.lines().find(|line| line.contains(" jail ")).expect("a line about it");
    assert!(line.starts_with("ok "), "{line}");
    assert!(line.contains("Landlock"), "{line}");
}
