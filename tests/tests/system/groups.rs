//! Control groups around monitors, where the host has them. In the rig it does.

use std::fs;
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::process::Command;

use kiln_testkit::copy_program;
use kiln_testkit::inject::Hostage;
use kiln_tests::{Outcome, Session, busybox, kiln, kiln_run, monitor_of, wait_until_gone};
use rustix::process::{Pid, Signal, kill_process};

use crate::jail::image_for_all;

/// Where cgroup v2 is.
const ROOT: &str = "/sys/fs/cgroup";
/// What a machine has whose size nobody says.
const MEMORY_BYTES: u64 = 512 << 20;
/// More than the bound leaves beside that memory, and less than the limits of the process do.
const TOO_MUCH_BYTES: u64 = 900 << 20;

/// An ordinary user.
const USER: u32 = 12345;

/// A folder for the groups of one test.
struct Place(PathBuf);

impl Place {
    fn new(name: &str) -> Self {
        let root = Path::new(ROOT);
        fs::write(root.join("cgroup.subtree_control"), "+memory +pids").expect("cgroup v2 with controllers");
        let folder = root.join(format!("kiln-test-{name}-{}", std::process::id()));
        fs::create_dir(&folder).expect("a group");
        Self(folder)
    }

    fn groups(&self) -> Vec<String> {
        let entries = fs::read_dir(&self.0).expect("a folder").flatten();
        let names = entries.filter(|entry| entry.file_type().is_ok_and(|kind| kind.is_dir()));
        names.map(|entry| entry.file_name().into_string().expect("text")).collect()
    }

    /// A command that has begun in a machine, its monitor and its group.
    fn waiting(&self) -> (Session, Pid, PathBuf) {
        self.waiting_in(&kiln_tests::store())
    }

    /// The same of a machine of another store.
    fn waiting_in(&self, store: &Path) -> (Session, Pid, PathBuf) {
        let mut run = kiln_run(&[], &busybox(), &["sh", "-c", "echo ready; sleep 1000"]);
        let mut session = Session::start(run.env("KILN_CGROUP", &self.0).env("KILN_ROOT", store));
        session.wait_for("ready");
        let monitor = monitor_of(session.pid());
        let [group] = &self.groups()[..] else { panic!("one group: {:?}", self.groups()) };
        let group = self.0.join(group);
        (session, monitor, group)
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        // What is left in it keeps it, and a test that fails has said so.
        let _ = fs::remove_dir(&self.0);
    }
}

fn group_of(pid: Pid) -> String {
    fs::read_to_string(format!("/proc/{}/cgroup", pid.as_raw_nonzero())).expect("its groups")
}

fn read(group: &Path, file: &str) -> String {
    fs::read_to_string(group.join(file)).expect("it can be read").trim().to_owned()
}

#[test]
fn a_monitor_has_a_group_of_its_own_only_where_the_host_has_a_place_for_it() {
    let mut session = Session::start(&mut kiln_run(&[], &busybox(), &["sh", "-c", "echo ready; sleep 1000"]));
    session.wait_for("ready");
    let [host, monitor] = [session.pid(), monitor_of(session.pid())].map(group_of);
    let controllers = fs::read_to_string(Path::new(ROOT).join("cgroup.controllers")).unwrap_or_default();
    if controllers.contains("memory") {
        assert!(monitor.contains("/kiln/kiln-"), "{monitor}");
    } else {
        assert_eq!(monitor, host);
    }
    session.signal(Signal::KILL);
    session.finish();
}

#[test]
fn a_place_that_is_none_is_refused() {
    let folder = tempfile::tempdir().expect("a folder");
    let cases = [
        (folder.path().display().to_string(), "it is no folder of cgroup v2"),
        (folder.path().join("none").display().to_string(), "No such file or directory"),
        ("sys/fs/cgroup".to_owned(), "it is no absolute path"),
    ];
    for (place, why) in cases {
        let mut run = kiln_run(&[], &busybox(), &["true"]);
        let outcome = Outcome::of(run.env("KILN_CGROUP", &place));
        outcome.code(125).complains(&place).complains(why).complains("hint: KILN_CGROUP names");
        let outcome = Outcome::of(kiln(["doctor"]).env("KILN_CGROUP", &place));
        let told = outcome.code(1).out();
        let line = told.lines().find(|line| line.contains(" cgroups ")).expect("a line about it");
        assert!(line.starts_with("FAIL") && line.contains(why), "{line}");
    }
}

#[test]
#[ignore = "bounds of control groups need cgroup v2 with a memory controller: this runs in the rig"]
fn a_monitor_is_born_in_a_group_that_bounds_it_and_goes_with_it() {
    let place = Place::new("bound");
    let (session, monitor, group) = place.waiting();
    assert_eq!(read(&group, "cgroup.procs"), monitor.as_raw_nonzero().to_string());
    let name = group.file_name().expect("a name").to_string_lossy().into_owned();
    assert!(name.contains(&format!("-{}-", session.pid().as_raw_nonzero())), "{name} says whose it is");
    // The guest's, a 64th of it for page tables, 128 MiB of the monitor's own and as much of the kernel's.
    let bound = MEMORY_BYTES + MEMORY_BYTES / 64 + (256 << 20);
    assert_eq!(read(&group, "memory.max"), bound.to_string());
    assert_eq!(read(&group, "memory.swap.max"), "max");
    assert_eq!(read(&group, "pids.max"), "64");
    assert_ne!(read(&group, "memory.current"), "0");
    session.signal(Signal::TERM);
    session.finish();
    assert_eq!(place.groups(), [""; 0]);
    let mut run = kiln_run(&[], &busybox(), &["true"]);
    Outcome::of(run.env("KILN_CGROUP", &place.0)).code(0);
    assert_eq!(place.groups(), [""; 0]);
}

/// Memory that is shared with nobody is what the limits of a process do not see (and what its filter refuses).
#[test]
#[ignore = "bounds of control groups need cgroup v2 with a memory controller: this runs in the rig"]
fn a_monitor_above_its_bound_is_killed_and_that_is_told() {
    let place = Place::new("above");
    let (session, monitor, _) = place.waiting();
    let hostage = Hostage::take_without_filter(monitor.as_raw_nonzero().get()).expect("a thread that waits");
    let [protection, flags] =
        [libc::PROT_READ | libc::PROT_WRITE, libc::MAP_SHARED | libc::MAP_ANONYMOUS | libc::MAP_POPULATE];
    let arguments = [0, TOO_MUCH_BYTES, protection as u64, flags as u64, u64::MAX, 0];
    let mapped = hostage.call(libc::SYS_mmap, &arguments);
    assert!(mapped.is_err(), "{mapped:?}");
    drop(hostage);
    session.finish().code(125).complains("more memory than its control group may have");
    assert_eq!(place.groups(), [""; 0]);
}

/// What it reads of its snapshot and writes to its disk is memory then, which the kernel cannot take back.
#[test]
#[ignore = "bounds of control groups need cgroup v2 with a memory controller: this runs in the rig"]
fn a_machine_whose_store_is_memory_has_no_bound_of_memory() {
    let place = Place::new("store");
    let store = tempfile::tempdir_in("/dev/shm").expect("a folder in a tmpfs");
    let (session, _, group) = place.waiting_in(store.path());
    assert_eq!(read(&group, "memory.max"), "max");
    assert_eq!(read(&group, "pids.max"), "64");
    session.signal(Signal::TERM);
    session.finish();
}

#[test]
#[ignore = "control groups need cgroup v2 with a memory controller: this runs in the rig"]
fn a_folder_with_processes_of_its_own_is_refused() {
    let place = Place::new("busy");
    let mut shell = Command::new("sh");
    shell
        .args(["-c", r#"echo $$ >"$KILN_CGROUP/cgroup.procs" && exec "$@""#, "sh"])
        .arg(kiln_tests::program());
    shell
        .args(["run", "--quiet", &busybox().reference(), "--", "true"])
        .env("KILN_ROOT", kiln_tests::store());
    let outcome = Outcome::of(shell.env("KILN_CGROUP", &place.0));
    outcome.code(125).complains("cannot use the control group").complains("hint: a folder whose groups");
}

/// As `Delegate=yes` gives it: a folder that is the user's, and the host in a group below.
#[test]
#[ignore = "control groups need cgroup v2 with a memory controller: this runs in the rig"]
fn an_ordinary_user_has_groups_in_a_folder_that_was_delegated() {
    let place = Place::new("user");
    let files = tempfile::tempdir().expect("a folder");
    fs::set_permissions(files.path(), fs::Permissions::from_mode(0o777)).expect("allowed");
    let at = |name: &str| files.path().join(name);
    copy_program(&kiln_tests::program(), &at("kiln")).expect("copied");
    let host = place.0.join("host");
    fs::create_dir(&host).expect("a group");
    for folder in [&place.0, &host] {
        for file in ["", "cgroup.procs", "cgroup.subtree_control"] {
            std::os::unix::fs::chown(folder.join(file), Some(USER), Some(USER)).expect("given");
        }
    }
    let script = r#"echo $$ >"$KILN_CGROUP/host/cgroup.procs" &&
        exec setpriv --reuid "$1" --regid "$1" --clear-groups "$2" run --quiet "$3" -- sh -c "echo ready; sleep 1000""#;
    let mut shell = Command::new("sh");
    shell.args(["-c", script, "sh", &USER.to_string()]).arg(at("kiln"));
    shell.arg(image_for_all(files.path())).env("KILN_ROOT", at("store")).env("HOME", files.path());
    let mut session = Session::start(shell.env("KILN_CGROUP", &place.0).current_dir(files.path()));
    session.wait_for("ready");
    let monitor = monitor_of(session.pid());
    let groups: Vec<String> = place.groups().into_iter().filter(|name| name != "host").collect();
    let [group] = &groups[..] else { panic!("one group: {groups:?}") };
    assert_eq!(read(&place.0.join(group), "cgroup.procs"), monitor.as_raw_nonzero().to_string());
    session.signal(Signal::TERM);
    session.finish();
    assert_eq!(place.groups(), ["host"]);
    fs::remove_dir(&host).expect("it is empty");
}

/// One that its guest has taken over need not go when its host has: here it does not even run.
#[test]
#[ignore = "control groups need cgroup v2 with a memory controller: this runs in the rig"]
fn a_monitor_that_outlives_its_host_is_killed_at_the_next_start() {
    let place = Place::new("outlives");
    let (session, monitor, group) = place.waiting();
    kill_process(monitor, Signal::STOP).expect("it lives");
    session.signal(Signal::KILL);
    session.finish();
    assert_eq!(read(&group, "cgroup.procs"), monitor.as_raw_nonzero().to_string());
    let next = || Outcome::of(kiln(["ps"]).env("KILN_CGROUP", &place.0)).code(0).err();
    assert_eq!(
        next(),
        "note: removed the control group of 1 machine whose host died, of which 1 still ran\n"
    );
    assert_eq!(place.groups(), [""; 0]);
    assert!(wait_until_gone(monitor, std::time::Duration::from_mins(1)));
    assert_eq!(next(), "");
}

/// What belongs to a process that lives is nobody else's business.
#[test]
#[ignore = "control groups need cgroup v2 with a memory controller: this runs in the rig"]
fn a_machine_whose_host_lives_is_left_alone() {
    let place = Place::new("lives");
    let (session, monitor, group) = place.waiting();
    // In another pid namespace, a host that nobody there can see.
    let stranger = place.0.join("kiln-1-2147483000-1-0");
    fs::create_dir(&stranger).expect("a group");
    assert_eq!(Outcome::of(kiln(["ps"]).env("KILN_CGROUP", &place.0)).code(0).err(), "");
    assert_eq!(read(&group, "cgroup.procs"), monitor.as_raw_nonzero().to_string());
    fs::remove_dir(&stranger).expect("it was left alone");
    session.signal(Signal::TERM);
    session.finish();
}
