//! Machines that outlive the command that started them: `kiln vm`.

use std::fs::{self, Permissions};
use std::os::unix::fs::PermissionsExt as _;
use std::path::Path;
use std::process::Command;
use std::time::Duration;

use kiln_testkit::copy_program;
use kiln_tests::{
    Outcome, Session, Vm, busybox, kiln, program, store, wait_until_gone, without_memory_device,
};
use rustix::process::{Pid, Signal, kill_process};
use serde_json::Value;

/// How long a process may take to go once what it lives by is gone. It stops a test that hangs; no test is about time.
const GONE_LIMIT: Duration = Duration::from_mins(2);
/// A command that counts in the guest's memory from then on, in the background.
const COUNT: &str = "(i=0; while true; do i=$((i+1)); echo $i >/dev/shm/next; mv /dev/shm/next /dev/shm/count; \
                     usleep 1000; done) >/dev/null 2>&1 & while ! [ -e /dev/shm/count ]; do usleep 1000; done";

/// What only these tests ask of a VM.
trait Counts {
    /// How far the command of [`COUNT`] is.
    fn count(&self) -> u64;
}

impl Counts for Vm {
    #[track_caller]
    fn count(&self) -> u64 {
        self.told("cat /dev/shm/count").parse().expect("a number")
    }
}

fn names(listed: &Outcome) -> Vec<String> {
    let listed: Value = serde_json::from_slice(&listed.code(0).stdout).expect("JSON");
    let names = listed.as_array().expect("an array").iter();
    names.map(|vm| vm["name"].as_str().expect("a name").to_owned()).collect()
}

#[test]
fn a_vm_is_created_started_used_stopped_started_again_and_removed() {
    let vm = Vm::named(&store(), "life");
    vm.vm(&["create", "--name", "life", "--memory", "256m", &busybox().reference()]).prints("life\n");
    assert!(!names(&vm.vm(&["ls", "--json"])).contains(&"life".to_owned()), "it does not run");
    assert!(names(&vm.vm(&["ls", "--all", "--json"])).contains(&"life".to_owned()));
    vm.script("true").code(125).complains("does not run").complains("hint: start it: kiln vm start life");
    vm.vm(&["create", "--name", "life", &busybox().reference()])
        .code(1)
        .complains("there is a VM called life");

    vm.vm(&["start", "life"]).prints("life\n");
    assert!(names(&vm.vm(&["ls", "--json"])).contains(&"life".to_owned()));
    vm.vm(&["start", "life"]).code(1).complains("the VM life runs");
    vm.vm(&["rm", "life"]).code(1).complains("the VM life runs");
    let inspected = vm.inspect();
    assert_eq!(
        (&inspected["state"], &inspected["memory_mib"]),
        (&"running".into(), &256.into()),
        "{inspected}"
    );
    // It is known by its id as well.
    let id = inspected["id"].as_str().expect("an id");
    vm.vm(&["exec", &id[..6], "hostname"]).prints("life\n");

    vm.script("echo out; echo err >&2; exit 3").code(3).complains("err");
    vm.vm(&["exec", "life", "nothing-of-this-name"]).code(127);
    vm.vm(&["exec", "life", "/etc"]).code(126);
    vm.vm(&[
        "exec",
        "-e",
        "GREETING=hi",
        "-w",
        "/tmp",
        "-u",
        "1000",
        "life",
        "--",
        "sh",
        "-c",
        "echo $GREETING $PWD $(id -u)",
    ])
    .prints("hi /tmp 1000\n");
    let mut piped = Command::new("sh");
    piped.args(["-c", "printf 'a\\nb\\n' | \"$KILN\" vm exec -i life wc -l"]).env("KILN_ROOT", store());
    Outcome::of(&mut piped).prints("2\n");
    // Commands come and go, what they leave stays.
    vm.script("echo kept >/root/file").code(0);
    assert_eq!(vm.told("cat /root/file"), "kept");

    let monitor = vm.monitor();
    vm.vm(&["stop", "--time", "1s", "life"]).code(0);
    assert!(wait_until_gone(monitor, GONE_LIMIT));
    let inspected = vm.inspect();
    assert_eq!(inspected["state"], "ended", "{inspected}");
    assert!(inspected["end"].as_str().expect("a reason").contains("powered off"), "{inspected}");
    vm.script("true").code(125).complains("does not run");
    vm.vm(&["start", "life"]).code(0);
    vm.script("cat /root/file").code(1);
    vm.vm(&["rm", "--force", "life"]).prints("life\n");
    vm.vm(&["inspect", "life"]).code(1).complains("no VM is called life");
}

#[test]
fn a_signal_to_a_client_ends_the_command_and_not_the_vm() {
    let vm = Vm::start("signals");
    let mut exec = kiln(["vm", "exec", "signals", "--", "sh", "-c", "echo ready; sleep 1000"]);
    let mut session = Session::start(&mut exec);
    session.wait_for("ready");
    session.signal(Signal::INT);
    session.finish().code(130);
    // Without a last word, too: the command goes with its client.
    let mut session = Session::start(&mut exec);
    session.wait_for("ready");
    session.signal(Signal::KILL);
    session.finish();
    assert_eq!(vm.told("while pidof sleep >/dev/null; do usleep 10000; done; echo none"), "none");
}

/// The processor time a process has used, in ticks: its threads', and those it had.
fn processor_ticks(pid: Pid) -> u64 {
    let stat = fs::read_to_string(format!("/proc/{}/stat", pid.as_raw_nonzero())).expect("it lives");
    let after_name = stat.rsplit(')').next().expect("a name in brackets");
    let fields: Vec<&str> = after_name.split_whitespace().collect();
    // Linux man page proc_pid_stat(5): utime and stime are fields 14 and 15, the state behind the name is the third.
    fields[11..=12].iter().map(|ticks| ticks.parse::<u64>().expect("a number")).sum()
}

#[test]
fn a_paused_vm_uses_no_processor_and_goes_on_where_it_stopped() {
    let vm = Vm::start("pausing");
    let mut exec =
        kiln(["vm", "exec", "-i", "pausing", "--", "sh", "-c", "echo ready; read line; echo got $line"]);
    let mut session = Session::start(&mut exec);
    session.wait_for("ready");
    vm.script("(while true; do true; done) >/dev/null 2>&1 &").code(0);
    let monitor = vm.monitor();
    vm.vm(&["pause", "pausing"]).code(0);
    let ticks = processor_ticks(monitor);
    vm.vm(&["pause", "pausing"]).code(0);
    vm.script("true").code(125).complains("paused");
    vm.vm(&["snapshot", "pausing"]).code(1).complains("paused");
    vm.vm(&["fork", "pausing"]).code(1).complains("hint: let it go on: kiln resume pausing");
    assert_eq!(vm.inspect()["state"], "paused");
    for _ in 0..20 {
        vm.vm(&["ls", "--all"]).code(0);
    }
    assert_eq!(processor_ticks(monitor), ticks, "a paused machine used the processor");
    vm.vm(&["resume", "pausing"]).code(0);
    session.write(b"it\n");
    session.wait_for("got it");
    session.finish().code(0);
    assert!(processor_ticks(monitor) > ticks, "the loop goes on");
    let inspected = vm.inspect();
    assert_eq!(inspected["state"], "running");
    assert!(inspected["paused_ms"].as_u64().expect("a number") > 0, "{inspected}");
    // A paused machine can be stopped as well.
    vm.vm(&["pause", "pausing"]).code(0);
    vm.vm(&["stop", "--time", "1s", "pausing"]).code(0);
}

#[test]
fn a_fork_is_another_machine_that_begins_where_the_first_is() {
    let source = Vm::start("source");
    let fork = Vm::named(&store(), "fork");
    source.script(COUNT).code(0);
    source.script("echo before >/root/file").code(0);
    // A command whose client is connected stays with the source.
    let mut exec =
        kiln(["vm", "exec", "-i", "source", "--", "sh", "-c", "echo ready; read line; echo got $line"]);
    let mut session = Session::start(&mut exec);
    session.wait_for("ready");
    let before = source.count();
    let outcome = Outcome::of(&mut kiln(["vm", "fork", "source", "--name", "fork"]));
    outcome.code(0).complains("source was frozen for");
    session.write(b"it\n");
    session.wait_for("got it");
    session.finish().code(0);
    for vm in [&source, &fork] {
        let one = vm.count();
        assert!(one >= before);
        vm.told(&format!("while [ $(cat /dev/shm/count) -le {one} ]; do usleep 1000; done"));
    }
    for script in [
        "hostname",
        "cat /proc/sys/kernel/random/boot_id",
        "cat /run/kiln/generation",
        "head -c 16 /dev/urandom | md5sum",
    ] {
        assert_ne!(source.told(script), fork.told(script), "{script}");
    }
    assert_eq!(fork.told("hostname"), "fork");
    // Each has its own disk from here on.
    fork.script("cat /root/file; echo fork >/root/file; sync").prints("before\n");
    source.script("cat /root/file; echo source >/root/file; sync").prints("before\n");
    fork.script("cat /root/file").prints("fork\n");
    // The fork of a fork; and the first may go.
    source.vm(&["rm", "--force", "source"]).code(0);
    let again = Vm::named(&store(), "fork-of-fork");
    fork.vm(&["fork", "fork", "--name", "fork-of-fork"]).prints("fork-of-fork\n");
    again.script("cat /root/file; hostname").prints("fork\nfork-of-fork\n");
    again.vm(&["stop", "--time", "1s", "fork-of-fork"]).code(0);
    again.vm(&["start", "fork-of-fork"]).code(1).complains("nothing is left to start it from");
}

/// Where the agent has no doorbell the source has to be told that it goes on as it was, and the fork who it is.
#[test]
fn without_a_doorbell_a_fork_is_another_machine_too() {
    let kernel = without_memory_device();
    let source = Vm::named(&store(), "no-doorbell");
    let fork = Vm::named(&store(), "no-doorbell-fork");
    let kernel = kernel.path().to_str().expect("a path");
    let image = busybox().reference();
    source.vm(&["create", "--name", source.name, "--kernel", kernel, &image]).code(0);
    source.vm(&["start", source.name]).code(0);
    source.script(COUNT).code(0);
    let mut exec =
        kiln(["vm", "exec", "-i", source.name, "--", "sh", "-c", "echo ready; read line; echo got $line"]);
    let mut session = Session::start(&mut exec);
    session.wait_for("ready");
    source.vm(&["fork", source.name, "--name", fork.name]).code(0);
    session.write(b"it\n");
    session.wait_for("got it");
    session.finish().code(0);
    for vm in [&source, &fork] {
        let one = vm.count();
        vm.told(&format!("while [ $(cat /dev/shm/count) -le {one} ]; do usleep 1000; done"));
    }
    for script in ["hostname", "cat /proc/sys/kernel/random/boot_id", "head -c 16 /dev/urandom | md5sum"] {
        assert_ne!(source.told(script), fork.told(script), "{script}");
    }
    assert_eq!(fork.told("hostname"), fork.name);
}

#[test]
fn a_saved_vm_is_restored_as_often_as_wanted() {
    for (name, scratch) in [("saved-disk", "--scratch-size=3g"), ("saved-memory", "--scratch-in-memory")] {
        let vm = Vm::named(&store(), name);
        vm.vm(&["create", "--name", name, scratch, &busybox().reference()]).code(0);
        vm.vm(&["start", name]).code(0);
        vm.script(COUNT).code(0);
        vm.script("echo before >/root/file").code(0);
        let saved = vm.vm(&["snapshot", "--json", "--name", name, name]);
        let saved: Value = serde_json::from_slice(&saved.code(0).stdout).expect("JSON");
        assert!(saved["frozen_ns"].as_u64() >= saved["still_ns"].as_u64(), "{saved}");
        vm.script("echo after >/root/file").code(0);
        let count = vm.count();
        vm.vm(&["rm", "--force", name]).code(0);

        let listed = Outcome::of(&mut kiln(["snapshot", "ls"])).out();
        assert!(listed.lines().any(|line| line.contains("saved") && line.contains(name)), "{listed}");
        Outcome::of(&mut kiln(["snapshot", "verify", name])).code(0);
        let restored: Vec<Vm> = ["restored-1", "restored-2"].map(|name| Vm::named(&store(), name)).into();
        for one in &restored {
            one.vm(&["restore", name, "--name", one.name]).prints(&format!("{}\n", one.name));
            one.script("cat /root/file; hostname").prints(&format!("before\n{}\n", one.name));
            let at = one.count();
            one.told(&format!("while [ $(cat /dev/shm/count) -le {at} ]; do usleep 1000; done"));
        }
        assert!(count > 0);
        let boot_ids = restored.iter().map(|vm| vm.told("cat /proc/sys/kernel/random/boot_id"));
        let [one, two] = boot_ids.collect::<Vec<_>>()[..].to_vec().try_into().expect("two");
        assert_ne!(one, two);
        // It starts from its snapshot again, for as long as there is one.
        let one = &restored[0];
        one.script("echo changed >/root/file").code(0);
        one.vm(&["stop", "--time", "1s", one.name]).code(0);
        one.vm(&["start", one.name]).code(0);
        one.script("cat /root/file").prints("before\n");
        Outcome::of(&mut kiln(["snapshot", "rm", name])).code(0);
        one.script("cat /root/file").prints("before\n");
        one.vm(&["stop", "--time", "1s", one.name]).code(0);
        one.vm(&["start", one.name]).code(1).complains("the snapshot is gone");
        one.vm(&["restore", name]).code(1).complains("no snapshot is called");
    }
}

/// In a store of its own, so that it is this test's commands that find what is left.
#[test]
fn a_crash_leaves_a_record_and_nothing_else() {
    let root = tempfile::tempdir().expect("a folder");
    let vm = Vm::start_in(root.path(), "crash");
    let told = || Outcome::of(kiln(["vm", "ls", "--all"]).env("KILN_ROOT", root.path()));

    let (keeper, monitor) = (vm.keeper(), vm.monitor());
    kill_process(keeper, Signal::KILL).expect("it lives");
    assert!(wait_until_gone(keeper, GONE_LIMIT));
    assert!(wait_until_gone(monitor, GONE_LIMIT), "the machine outlived its keeper");
    let listed = told();
    listed.code(0).complains("the VM crash has ended");
    assert!(listed.out().contains("ended"), "{}", listed.out());
    assert_eq!(told().err(), "", "it is told once");
    assert!(!root.path().join("vms/crash/socket").exists());

    vm.vm(&["start", "crash"]).code(0);
    let (keeper, monitor) = (vm.keeper(), vm.monitor());
    kill_process(monitor, Signal::KILL).expect("it lives");
    assert!(wait_until_gone(keeper, GONE_LIMIT), "the keeper outlived its machine");
    assert_eq!(told().err(), "", "its keeper has seen to it");
    let inspected = vm.inspect();
    assert_eq!(inspected["state"], "ended");
    assert!(inspected["end"].as_str().expect("a reason").contains("monitor process died"), "{inspected}");

    // A command in it ends with the machine.
    vm.vm(&["start", "crash"]).code(0);
    let mut exec = kiln(["vm", "exec", "crash", "--", "sh", "-c", "echo ready; sleep 1000"]);
    let mut session = Session::start(exec.env("KILN_ROOT", root.path()));
    session.wait_for("ready");
    kill_process(vm.keeper(), Signal::KILL).expect("it lives");
    session.finish().code(125).complains("hint: kiln inspect crash");
    vm.vm(&["rm", "--force", "crash"]).code(0);
    let left: Vec<_> = fs::read_dir(root.path().join("vms")).expect("the folder").flatten().collect();
    let is_of_all = |entry: &fs::DirEntry| {
        [".lock", ".events", ".events.lock"].iter().any(|name| entry.file_name() == *name)
    };
    assert!(left.iter().all(is_of_all), "{left:?}");
}

#[test]
fn of_many_that_want_a_name_one_gets_it() {
    let vm = Vm::named(&store(), "wanted");
    let reference = busybox().reference();
    let outcomes: Vec<Outcome> = std::thread::scope(|scope| {
        let create = || vm.vm(&["create", "--name", "wanted", &reference]);
        let threads: Vec<_> = (0..6).map(|_| scope.spawn(create)).collect();
        threads.into_iter().map(|thread| thread.join().expect("no panic")).collect()
    });
    let (got, refused): (Vec<_>, Vec<_>) = outcomes.iter().partition(|outcome| outcome.status.success());
    assert_eq!(got.len(), 1);
    for outcome in refused {
        outcome.code(1).complains("there is a VM called wanted already");
    }
}

/// The folder keeps others away; and if it did not, the keeper would.
#[test]
fn another_user_is_refused() {
    assert!(rustix::process::geteuid().is_root(), "only root can become another user: run this test as root");
    let root = tempfile::tempdir().expect("a folder");
    let folder_for_all = tempfile::tempdir().expect("a folder");
    let program_for_all = folder_for_all.path().join("kiln");
    copy_program(&program(), &program_for_all).expect("copied");
    let allow = |path: &Path, mode| fs::set_permissions(path, Permissions::from_mode(mode)).expect("allowed");
    allow(folder_for_all.path(), 0o755);
    let vm = Vm::start_in(root.path(), "mine");
    let as_nobody = || {
        let mut setpriv = Command::new("setpriv");
        setpriv.args(["--reuid", "65534", "--regid", "65534", "--clear-groups"]).arg(&program_for_all);
        Outcome::of(setpriv.args(["vm", "pause", "mine"]).env("KILN_ROOT", root.path()))
    };
    as_nobody().code(3).complains("Permission denied");
    allow(root.path(), 0o755);
    let vms = root.path().join("vms");
    for (path, mode) in [
        ("", 0o755),
        (".lock", 0o666),
        ("mine", 0o755),
        ("mine/life", 0o666),
        ("mine/vm.json", 0o644),
        ("mine/socket", 0o777),
    ] {
        allow(&vms.join(path), mode);
    }
    as_nobody().code(4).complains("did not answer");
    assert_eq!(vm.inspect()["state"], "running");
    vm.vm(&["pause", "mine"]).code(0);
}
