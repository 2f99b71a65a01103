//! VMs that run a command of their own: `kiln run -d`, and what is done with them.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use kiln_tests::{Outcome, Session, Terminal, Vm, busybox, kiln, store, wait_until_gone};
use rustix::process::{Signal, kill_process};
use serde_json::Value;

/// How long a process may take to go once what it lives by is gone. It stops a test that hangs; no test is about time.
const GONE_LIMIT: Duration = Duration::from_mins(2);

/// A command that says it runs, and does as it is told by files in `/tmp`.
const OBEY: &str = "echo ready; while ! [ -e /tmp/go ]; do usleep 1000; done; echo went";

#[test]
fn a_vm_runs_its_command_to_the_end_and_keeps_what_it_wrote() {
    let script = "echo one; echo two >&2; printf 'thr\\0ee\\n'; printf rest; echo $GREETING $PWD $(id -u) $$ >&2; exit 3";
    let vm = Vm::run(&store(), "whole", &["-e", "GREETING=hi", "-w", "/tmp", "-u", "1000"], script);
    vm.does(&["wait"]).code(3);
    assert_eq!(vm.does(&["wait"]).out(), "3\n", "it is remembered");
    let logs = vm.does(&["logs"]);
    assert_eq!(logs.code(0).out(), "one\nthr\0ee\nrest");
    assert_eq!(logs.err(), "two\nhi /tmp 1000 1\n", "it is process 1");
    vm.does(&["logs", "-f"]).code(0);
    let last = vm.does(&["logs", "--tail", "2"]);
    assert_eq!(last.out().lines().count() + last.err().lines().count(), 2, "{last:?}");
    assert_eq!(vm.does(&["logs", "--since", "2999-01-01"]).out(), "");
    let timed = vm.does(&["logs", "-t", "--since", "1h"]).out();
    let line = timed.lines().next().expect("a line");
    assert!(line.starts_with("20") && line.ends_with("Z one"), "{timed}");

    let inspected = vm.inspect();
    assert_eq!((&inspected["state"], &inspected["exit_code"]), (&"ended".into(), &3.into()), "{inspected}");
    assert_eq!(inspected["end"], "its main command exited with 3");
    assert_eq!(inspected["command"][0], "sh");
    let listed = |args: &[&str]| Outcome::of(&mut vm.kiln(args)).code(0).out();
    assert!(!listed(&["ps"]).contains("whole"));
    assert!(listed(&["ps", "--filter", "name=whole"]).contains("ended (3)"));
    let id = inspected["id"].as_str().expect("an id");
    assert_eq!(
        listed(&["ps", "-q", "--filter", "status=exited", "--filter", "name=whole"]),
        format!("{id}\n")
    );
    for verb in ["stop", "kill", "pause"] {
        vm.does(&[verb]).code(1).complains("does not run");
    }

    // It starts anew, with its command, and its log goes on.
    vm.vm(&["start", "whole"]).code(0);
    vm.does(&["wait"]).code(3);
    assert_eq!(vm.does(&["logs"]).out(), "one\nthr\0ee\nrestone\nthr\0ee\nrest");
    Outcome::of(&mut vm.kiln(&["rm", id])).prints("whole\n");
    vm.does(&["logs"]).code(1).complains("no VM is called whole").complains("hint: kiln ps -a");
    assert!(!vm.folder().exists());
}

#[test]
fn a_command_that_cannot_run_is_told_and_leaves_no_vm() {
    let vm = Vm::named(&store(), "refused");
    let image = busybox().reference();
    let run = |rest: &[&str]| Outcome::of(vm.kiln(&["--quiet", "run", "-d", "--name", "refused"]).args(rest));
    run(&[&image, "--", "nothing-of-this-name"]).code(127).complains("nothing-of-this-name");
    run(&[&image, "--", "/etc"]).code(126);
    run(&["--pull", "never", "nothing-of-this-name"]).code(125).complains("error:");
    run(&["-u", "nobody-of-this-name", &image, "--", "true"]).code(125).complains("nobody-of-this-name");
    vm.does(&["inspect"]).code(1).complains("no VM is called refused");
    assert!(!vm.folder().exists());
    run(&[&image, "--", "sleep", "1000"]).code(0);
    run(&[&image, "--", "true"])
        .code(125)
        .complains("there is a VM called refused already")
        .complains("kiln rm refused");
    vm.does(&["rm"]).code(1).complains("hint: stop it first: kiln stop refused");
}

#[test]
fn logs_are_followed_until_the_vm_ends_and_as_long_as_one_wants() {
    let vm = Vm::run(&store(), "followed", &[], &format!("{OBEY}; echo last >&2; exit 4"));
    let mut interrupted = Session::start(&mut vm.kiln(&["logs", "--follow", "followed"]));
    interrupted.wait_for("ready");
    let mut followed = Session::start(&mut vm.kiln(&["logs", "-f", "-n", "0", "followed"]));
    let waiting = Session::start(&mut vm.kiln(&["wait", "followed"]));
    let idle = Session::start(&mut vm.kiln(&["wait", "followed"]));
    for (session, name) in [(interrupted, "logs"), (idle, "wait")] {
        session.signal(Signal::INT);
        let ended = session.finish();
        assert_eq!(
            std::os::unix::process::ExitStatusExt::signal(&ended.status),
            Some(2),
            "{name}: {ended:?}"
        );
    }
    vm.set_off("touch /tmp/go");
    followed.wait_for("went");
    followed.finish().code(0).complains("last");
    let waited = waiting.finish();
    assert_eq!(waited.code(4).out(), "4\n");
    assert_eq!(vm.does(&["logs"]).out(), "ready\nwent\n");
}

#[test]
fn a_command_is_asked_to_stop_and_killed_when_its_time_is_up() {
    // With a trap it ends as it likes.
    let script =
        "trap 'echo bye; exit 7' TERM; trap 'echo hup' HUP; echo ready; while true; do usleep 1000; done";
    let vm = Vm::run(&store(), "polite", &[], script);
    let mut logs = Session::start(&mut vm.kiln(&["logs", "-f", "polite"]));
    logs.wait_for("ready");
    vm.does(&["kill", "-s", "HUP"]).code(0);
    logs.wait_for("hup");
    // A paused one goes on for it.
    vm.does(&["pause"]).code(0);
    vm.does(&["stop", "--time", "5m"]).code(0);
    logs.wait_for("bye");
    logs.finish().code(0);
    vm.does(&["wait"]).code(7);
    assert_eq!(vm.inspect()["end"], "its main command exited with 7");

    // A shell that is process 1 and has set nothing up for a signal does not get it.
    let vm = Vm::run(&store(), "stubborn", &[], "trap '' TERM; echo ready; while true; do usleep 1000; done");
    let mut logs = Session::start(&mut vm.kiln(&["logs", "-f", "stubborn"]));
    logs.wait_for("ready");
    vm.does(&["stop", "-t", "1s"]).code(0);
    vm.does(&["wait"]).code(137);
    let inspected = vm.inspect();
    assert_eq!(inspected["exit_signal"], "SIGKILL", "{inspected}");
    assert_eq!(inspected["end"], "its main command was ended by SIGKILL");

    // SIGKILL is for the machine.
    vm.vm(&["start", "stubborn"]).code(0);
    let first = vm.monitor();
    Outcome::of(&mut vm.kiln(&["--quiet", "restart", "-t", "1s", "stubborn"])).prints("stubborn\n");
    assert!(wait_until_gone(first, GONE_LIMIT));
    let monitor = vm.monitor();
    vm.does(&["kill"]).code(0);
    assert!(wait_until_gone(monitor, GONE_LIMIT));
    vm.does(&["wait"]).code(137);
    let bare = Vm::start("bare");
    bare.does(&["kill", "--signal", "HUP"]).code(1).complains("the VM bare has no main command");
    bare.does(&["logs"]).code(1).complains("runs no command of its own").complains("hint:");
    bare.does(&["kill"]).code(0);
    assert_eq!(bare.inspect()["state"], "ended");
}

#[test]
fn a_vm_that_is_to_be_removed_is_when_it_ends() {
    let vm = Vm::run(&store(), "passing", &["--rm"], &format!("{OBEY}; exit 5"));
    let waiting = Session::start(&mut vm.kiln(&["wait", "passing"]));
    let mut logs = Session::start(&mut vm.kiln(&["logs", "-f", "passing"]));
    logs.wait_for("ready");
    vm.set_off("touch /tmp/go");
    logs.wait_for("went");
    logs.finish().code(0);
    waiting.finish().code(5);
    assert!(!vm.folder().exists(), "who waits is told when nothing is left");
    vm.does(&["inspect"]).code(1).complains("no VM is called passing");

    let vm = Vm::run(&store(), "passing", &["--rm", "-i"], "cat; echo never");
    vm.does(&["stop", "-t", "1s"]).code(0);
    assert!(!vm.folder().exists());
    let vm = Vm::run(&store(), "passing", &["--rm"], "sleep 1000");
    vm.does(&["rm", "-f"]).prints("passing\n");
}

/// In a store of its own, so that it is this test's commands that find what is left.
#[test]
fn a_keeper_that_is_killed_leaves_a_log_and_the_next_command_puts_the_rest_right() {
    let root = tempfile::tempdir().expect("a folder");
    let vm = Vm::run(root.path(), "crashed", &[], "echo before; sleep 1000");
    let passing = Vm::run(root.path(), "passing", &["--rm"], "echo before; sleep 1000");
    for one in [&vm, &passing] {
        let mut logs = Session::start(&mut one.kiln(&["logs", "-f", one.name]));
        logs.wait_for("before");
        let waiting = Session::start(&mut one.kiln(&["wait", one.name]));
        let (keeper, monitor) = (one.keeper(), one.monitor());
        kill_process(keeper, Signal::KILL).expect("it lives");
        assert!(wait_until_gone(keeper, GONE_LIMIT));
        assert!(wait_until_gone(monitor, GONE_LIMIT), "the machine outlived its keeper");
        logs.finish().code(0);
        assert_eq!(waiting.finish().code(137).out(), "137\n");
    }
    // One of those who waited has put it right already; a crash that nobody waited for is told.
    assert_eq!(vm.does(&["logs"]).code(0).out(), "before\n");
    assert_eq!(vm.inspect()["state"], "ended");
    assert!(!passing.folder().exists());
    vm.vm(&["start", "crashed"]).code(0);
    let keeper = vm.keeper();
    kill_process(keeper, Signal::KILL).expect("it lives");
    assert!(wait_until_gone(keeper, GONE_LIMIT));
    let listed = Outcome::of(&mut vm.kiln(&["ps", "-a"]));
    listed.code(0).complains("note: the VM crashed has ended: the process it belonged to died");
    assert!(listed.out().contains("ended (137)"), "{}", listed.out());
    assert_eq!(vm.does(&["logs"]).err(), "", "it is told once");
}

#[test]
fn of_many_that_want_a_name_one_runs() {
    let vm = Vm::named(&store(), "contested");
    let image = busybox().reference();
    let outcomes: Vec<Outcome> = std::thread::scope(|scope| {
        let run = || {
            let mut kiln =
                vm.kiln(&["--quiet", "run", "-d", "--name", "contested", &image, "--", "sleep", "1000"]);
            Outcome::of(&mut kiln)
        };
        let threads: Vec<_> = (0..4).map(|_| scope.spawn(run)).collect();
        threads.into_iter().map(|thread| thread.join().expect("no panic")).collect()
    });
    let (got, refused): (Vec<_>, Vec<_>) = outcomes.iter().partition(|outcome| outcome.status.success());
    assert_eq!(got.len(), 1, "{outcomes:?}");
    for outcome in refused {
        outcome.code(125).complains("there is a VM called contested already");
    }
    assert_eq!(vm.inspect()["state"], "running");
}

#[test]
fn what_happens_is_told_as_it_happens() {
    let root = tempfile::tempdir().expect("a folder");
    let mut events = kiln(["events", "--json"]);
    let mut events = Session::start(events.env("KILN_ROOT", root.path()));
    let vm = Vm::run(root.path(), "told", &[], "while true; do usleep 1000; done");
    vm.does(&["pause"]).code(0);
    vm.does(&["unpause"]).code(0);
    vm.script("exit 6").code(6);
    vm.does(&["kill"]).code(0);
    vm.does(&["rm"]).code(0);
    let id = |event: &Value| event["id"].as_str().expect("an id").to_owned();
    let told: Vec<Value> =
        (0..9).map(|_| serde_json::from_str(&events.line()).expect("an event is a line of JSON")).collect();
    let names: Vec<&str> = told.iter().map(|event| event["event"].as_str().expect("a name")).collect();
    assert_eq!(
        names,
        ["create", "start", "pause", "resume", "exec_start", "exec_end", "kill", "die", "destroy"]
    );
    assert!(told.iter().all(|event| event["name"] == "told" && id(event) == id(&told[0])), "{told:?}");
    assert_eq!(told[5]["details"]["exit_code"], "6");
    assert_eq!(told[7]["details"]["exit_code"], "137");
    events.signal(Signal::INT);
    let ended = events.finish();
    assert_eq!(std::os::unix::process::ExitStatusExt::signal(&ended.status), Some(2), "{ended:?}");
    // And afterwards, for people.
    let told = Outcome::of(&mut vm.kiln(&["events", "--since", "1h", "--no-stream"])).code(0).out();
    assert_eq!(told.lines().count(), 9, "{told}");
    assert!(told.lines().nth(7).expect("a line").contains(" die "), "{told}");
}

#[test]
fn commands_run_beside_the_vms_own() {
    let vm = Vm::run(&store(), "beside", &["-it"], "echo hello; read line");
    // On a terminal, for a person.
    let mut shell =
        Terminal::start(&vm.kiln(&["exec", "-it", "-e", "PS1=at-home: ", "beside", "sh"]), 24, 80);
    shell.wait_for("at-home: ");
    shell.type_in("stty size; tty; exit 9\n");
    shell.wait_for("24 80");
    shell.wait_for("/dev/pts/");
    assert_eq!(shell.finish().code(), Some(9));
    // In the background, for nobody: what it writes does not end it.
    let script = "while ! [ -e /tmp/stop ]; do echo noise; usleep 1000; done; touch /tmp/stopped; exit 8";
    vm.does(&["exec", "-d"]).code(125);
    Outcome::of(&mut vm.kiln(&["exec", "-d", "beside", "--", "sh", "-c", script])).prints("");
    Outcome::of(&mut vm.kiln(&["exec", "-d", "beside", "nothing-of-this-name"])).code(127);
    vm.script("touch /tmp/stop; while ! [ -e /tmp/stopped ]; do usleep 1000; done").code(0);
    let told = || Outcome::of(&mut vm.kiln(&["events", "--since", "1h", "--no-stream"])).code(0).out();
    let is_end =
        |line: &str| line.contains(" beside ") && line.contains("exec_end") && line.contains("exit_code=8");
    let mut events = Session::start(&mut vm.kiln(&["events", "--since", "1h"]));
    while !is_end(&events.line()) {}
    assert!(told().lines().any(is_end));
    // Its own has a terminal and an open stdin.
    assert_eq!(vm.does(&["logs"]).out(), "hello\r\n");
    assert_eq!(vm.inspect()["state"], "running");
}

/// A store whose VMs are in a file system of their own, of this size. What guests' memory is made from is beside it: a
/// file of a full tmpfs cannot even be read where it has holes.
struct SmallDisk(tempfile::TempDir);

impl SmallDisk {
    fn new(bytes: u64) -> Self {
        let disk = Self(tempfile::tempdir().expect("a folder"));
        fs::create_dir(disk.vms()).expect("made");
        let mut mount = Command::new("mount");
        mount.args(["-t", "tmpfs", "-o", &format!("size={bytes}"), "tmpfs"]).arg(disk.vms());
        Outcome::of(&mut mount).code(0);
        disk
    }

    fn grow(&self, bytes: u64) {
        let mut mount = Command::new("mount");
        mount.args(["-o", &format!("remount,size={bytes}")]).arg(self.vms());
        Outcome::of(&mut mount).code(0);
    }

    fn root(&self) -> &Path {
        self.0.path()
    }

    fn vms(&self) -> PathBuf {
        self.root().join("vms")
    }
}

impl Drop for SmallDisk {
    fn drop(&mut self) {
        // What is still open goes with its process.
        Outcome::of(Command::new("umount").arg("--lazy").arg(self.vms()));
    }
}

#[test]
fn a_disk_that_is_full_holds_up_no_command_and_leaves_no_half_of_a_vm() {
    let disk = SmallDisk::new(1 << 20);
    let flood = "head -c 2000000 /dev/zero; echo; touch /tmp/full; \
                 while ! [ -e /tmp/go ]; do usleep 1000; done; echo after";
    let vm = Vm::run(disk.root(), "flood", &["--scratch-in-memory"], flood);
    vm.script("until [ -e /tmp/full ]; do usleep 1000; done").code(0);
    // What the log has left over is taken as well.
    let filler = disk.vms().join("filler");
    let mut fill = Command::new("dd");
    Outcome::of(fill.args(["if=/dev/zero", "bs=4096"]).arg(format!("of={}", filler.display())))
        .complains("No space left");
    let other = Vm::named(disk.root(), "other");
    let image = busybox().reference();
    let mut run = other.kiln(&["--quiet", "run", "-d", "--name", "other", &image, "--", "true"]);
    let refused = Outcome::of(&mut run);
    refused.code(125).complains("No space left");
    assert!(!other.folder().exists());
    vm.does(&["pause"]).code(3).complains("No space left");
    disk.grow(64 << 20);
    vm.does(&["resume"]).code(0);
    vm.set_off("touch /tmp/go");
    vm.does(&["wait"]).code(0);
    let logs = vm.does(&["logs"]);
    logs.code(0).complains("of the log are missing here");
    assert!(logs.out().ends_with("after\n"));
    assert!(logs.stdout.len() < 2_000_000, "{}", logs.stdout.len());
}
