//! Machines are made from snapshots: baked once, restored from then on, whatever happens in between.
//!
//! A size of the scratch disk that no other test uses makes a template of a test's own; the base is everybody's.

use std::fs::{self, File, Permissions};
use std::os::unix::fs::{FileExt as _, PermissionsExt as _};
use std::path::Path;
use std::process::Command;

use kiln_tests::{Outcome, Session, busybox, kiln, kiln_run, run, script, store, without_memory_device};
use serde_json::Value;

/// Runs a command and returns what came of it, and the names of the phases it went through.
fn run_with_phases(options: &[&str], command: &[&str]) -> (Outcome, Vec<String>) {
    let events = tempfile::NamedTempFile::new().expect("a file");
    let path = events.path().to_str().expect("a path").to_owned();
    let outcome = run(&[options, &["--json-events", &path]].concat(), &busybox(), command);
    let phases = fs::read_to_string(events.path()).expect("the events").lines().map(name_of_event).collect();
    (outcome, phases)
}

fn name_of_event(line: &str) -> String {
    let event: Value = serde_json::from_str(line).expect("JSON");
    event["event"].as_str().expect("a name").to_owned()
}

fn has(phases: &[String], phase: &str) -> bool {
    phases.iter().any(|name| name == phase)
}

/// Bakes the template that `kiln run` with the same options is made from, in a store, and returns its record.
fn bake(root: &Path, options: &[&str]) -> Value {
    let mut command = kiln(["bake", "--quiet", "--json"]);
    let outcome = Outcome::of(command.env("KILN_ROOT", root).args(options).arg(busybox().reference()));
    outcome.code(0);
    serde_json::from_str(&outcome.out()).expect("JSON")
}

fn hex<'a>(record: &'a Value, part: &str) -> &'a str {
    record[part].as_str().expect("a digest").trim_start_matches("sha256:")
}

/// A file of the store's, to be damaged: its owner may write to none of them.
fn writable(path: &Path) -> File {
    fs::set_permissions(path, Permissions::from_mode(0o600)).expect("a file of the store");
    File::options().read(true).write(true).open(path).expect("a file of the store")
}

fn flip(path: &Path, at: u64) {
    let file = writable(path);
    let mut byte = [0];
    file.read_exact_at(&mut byte, at).expect("read");
    file.write_all_at(&[byte[0] ^ 0x10], at).expect("written");
}

#[test]
fn the_second_run_is_a_restore() {
    let command = ["sh", "-c", "hostname; cat /proc/sys/kernel/random/boot_id; date +%s"];
    run(&[], &busybox(), &command).code(0);
    let (one, phases) = run_with_phases(&["--hostname", "box-1"], &command);
    one.code(0);
    for phase in ["entered", "resumed", "adopted", "exec_started"] {
        assert!(has(&phases, phase), "no {phase} in {phases:?}");
    }
    for phase in ["agent_started", "base_baked", "template_baked"] {
        assert!(!has(&phases, phase), "{phase} in {phases:?}");
    }
    let (two, _) = run_with_phases(&["--hostname", "box-2"], &command);
    let (one, two) = (one.out(), two.out());
    let (one, two): (Vec<_>, Vec<_>) = (one.lines().collect(), two.lines().collect());
    assert_eq!((one[0], two[0]), ("box-1", "box-2"));
    assert_ne!(one[1], two[1], "two guests with one boot id");
    // The template was baked some time ago, and its clock stood still since.
    let now =
        std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).expect("after 1970").as_secs();
    let told: u64 = two[2].parse().expect("seconds");
    assert!(told <= now + 1 && now - told < 600, "the guest has {told} where the host has {now}");
}

/// A user's own kernel may give the agent no doorbell: then a run boots once and is restored from then on all the same, by way of
/// a connection. Which way it was is told.
#[test]
fn a_kernel_without_a_doorbell_is_restored_too() {
    const NAMES: &str = "hostname; cat /proc/sys/kernel/random/boot_id /run/kiln/generation; head -c 16 /dev/urandom | md5sum; date +%s";
    let kernel = without_memory_device();
    let options = ["--kernel", kernel.path().to_str().expect("a path"), "--scratch-size", "73m"];
    let baked = run_with_phases(&options, &["true"]);
    baked.0.code(0);
    assert!(has(&baked.1, "base_baked") && has(&baked.1, "template_baked"), "{:?}", baked.1);
    let mut seen = std::collections::HashSet::new();
    for number in 0..20 {
        let name = format!("box-{number}");
        let (outcome, phases) =
            run_with_phases(&[&options[..], &["--hostname", &name]].concat(), &["sh", "-c", NAMES]);
        outcome.code(0);
        assert!(has(&phases, "resumed_without_doorbell") && has(&phases, "adopted"), "{phases:?}");
        assert!(!has(&phases, "resumed") && !has(&phases, "agent_started"), "{phases:?}");
        let out = outcome.out();
        let lines: Vec<_> = out.lines().collect();
        assert_eq!(lines[0], name);
        // Once as the base and once as the template.
        assert!(lines[2].starts_with("2 "), "{out}");
        let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH);
        let (now, told) = (now.expect("after 1970").as_secs(), lines[4].parse::<u64>().expect("seconds"));
        assert!(told <= now + 1 && now - told < 60, "the guest has {told} where the host has {now}");
        for unique in &lines[1..4] {
            assert!(seen.insert((*unique).to_owned()), "two guests have {unique}");
        }
    }
}

#[test]
fn without_a_snapshot_the_guest_boots() {
    let (outcome, phases) = run_with_phases(&["--no-snapshot", "--hostname", "cold"], &["hostname"]);
    outcome.prints("cold\n");
    assert!(has(&phases, "agent_started") && has(&phases, "setup_done"), "{phases:?}");
    assert!(!has(&phases, "resumed"), "{phases:?}");
}

#[test]
fn what_a_restored_guest_writes_is_its_own() {
    for options in [&[][..], &["--scratch-in-memory"]] {
        let write = "cat /root/file 2>/dev/null; echo mine >/root/file; cat /root/file";
        for _ in 0..2 {
            script(options, write).prints("mine\n");
        }
    }
}

#[test]
fn two_first_runs_at_once_bake_once() {
    let options = ["--scratch-size", "3001m"];
    let runs: Vec<_> = std::thread::scope(|scope| {
        let run = || run_with_phases(&options, &["echo", "done"]);
        let threads: Vec<_> = (0..2).map(|_| scope.spawn(run)).collect();
        threads.into_iter().map(|thread| thread.join().expect("no panic")).collect()
    });
    for (outcome, phases) in &runs {
        outcome.prints("done\n");
        assert!(has(phases, "resumed"), "{phases:?}");
    }
    let bakes = runs.iter().filter(|(_, phases)| has(phases, "template_baked")).count();
    assert_eq!(bakes, 1);
}

#[test]
fn a_snapshot_can_go_while_a_machine_made_from_it_lives() {
    let options = ["--scratch-size", "3002m"];
    let record = bake(&store(), &options);
    let program = "echo ready; read line; cat /bin/busybox | md5sum; dd if=/dev/zero of=/root/file bs=64k count=64 \
                   2>/dev/null; sync; echo still here";
    let mut interactive = options.to_vec();
    interactive.push("--interactive");
    let mut session = Session::start(&mut kiln_run(&interactive, &busybox(), &["sh", "-c", program]));
    session.wait_for("ready");
    Outcome::of(&mut kiln(["snapshot", "rm", hex(&record, "key")])).code(0);
    for object in ["memory", "scratch"] {
        assert!(
            !store().join("objects").join(hex(&record, object)).exists(),
            "{object} is still in the store"
        );
    }
    session.write(b"go on\n");
    session.wait_for("still here");
    session.finish().code(0);
    let (outcome, phases) = run_with_phases(&options, &["true"]);
    outcome.code(0);
    assert!(has(&phases, "template_baked"), "{phases:?}");
}

/// Whatever part of a snapshot is damaged, the run notices, bakes anew, and the command runs.
#[test]
fn a_damaged_snapshot_is_baked_anew() {
    type Damage = (&'static str, fn(&Value));
    let options = ["--scratch-size", "3003m"];
    let damages: [Damage; 5] = [
        ("a flipped bit in the state", |record| {
            flip(&store().join("blobs").join(hex(record, "state")), 3000);
        }),
        ("a flipped bit in the state's header", |record| {
            flip(&store().join("blobs").join(hex(record, "state")), 70);
        }),
        ("a memory that is cut off", |record| {
            let memory = store().join("objects").join(hex(record, "memory"));
            writable(&memory).set_len(1 << 20).expect("cut");
        }),
        ("a record with a flipped bit", |record| {
            flip(&store().join("snapshots").join(hex(record, "key")), 30);
        }),
        ("a disk that is gone", |record| {
            fs::remove_file(store().join("objects").join(hex(record, "scratch"))).expect("removed");
        }),
    ];
    for (what, damage) in damages {
        damage(&bake(&store(), &[&options[..], &["--name", "hurt"]].concat()));
        let (outcome, phases) = run_with_phases(&options, &["echo", "sound"]);
        outcome.prints("sound\n");
        assert!(has(&phases, "template_baked") && has(&phases, "resumed"), "{what}: {phases:?}");
        // Its name is in the record, if that can be read.
        let named = Outcome::of(&mut kiln(["snapshot", "inspect", "hurt"]));
        assert_eq!(named.out().contains("\"hurt\""), !what.contains("record"), "{what}: {}", named.err());
        let (_, phases) = run_with_phases(&options, &["true"]);
        assert!(!has(&phases, "template_baked"), "{what}: baked for ever: {phases:?}");
    }
}

/// A bake is killed at each of the renames that put its parts in place, and at the last, that of the record. Nothing half
/// is ever seen, and nothing is left over.
#[test]
fn a_bake_killed_at_any_step_leaves_nothing_half() {
    let place = tempfile::tempdir().expect("a folder");
    let root = place.path().join("store");
    // The base, so that what is killed is the making of a template.
    bake(&root, &["--scratch-in-memory"]);
    let options = ["--scratch-size", "3004m"];
    let template = bake(&root, &options);
    let key = hex(&template, "key").to_owned();
    let remove = || {
        Outcome::of(kiln(["snapshot", "rm", "--quiet", &key]).env("KILN_ROOT", &root)).code(0);
    };
    remove();
    let record = root.join("snapshots").join(&key);
    // Runs a bake that is killed as one of its threads is about to rename for the nth time; whether one came so far.
    let killed = |step: &usize| {
        let mut strace = Command::new("strace");
        strace.args(["-f", "-qq", "-o", "/dev/null", "-e", "trace=rename"]);
        strace.args(["-e", &format!("inject=rename:signal=KILL:when={step}")]);
        let mut run = kiln_run(&options, &busybox(), &["true"]);
        strace.arg(run.env("KILN_ROOT", &root).get_program()).args(run.get_args());
        let was_killed = !Outcome::of(strace.env("KILN_ROOT", &root)).status.success();
        Outcome::of(kiln(["snapshot", "verify"]).env("KILN_ROOT", &root)).code(0);
        if was_killed {
            let left = fs::read_dir(root.join("tmp")).expect("a folder").count();
            assert_eq!(left, 0, "{step}: something of the dead process is left");
        }
        if record.exists() {
            remove();
        }
        was_killed
    };
    // Any thread may put the next part, so how many steps one of them takes differs. A memory has two files, put by one.
    let steps = (1..20).take_while(killed).count();
    assert!(steps >= 2, "{steps}");
    let outcome = Outcome::of(kiln_run(&options, &busybox(), &["echo", "done"]).env("KILN_ROOT", &root));
    outcome.prints("done\n");
    assert!(record.exists());
}

#[test]
fn a_full_disk_is_told_and_the_guest_boots() {
    let place = tempfile::tempdir().expect("a folder");
    // Room for the image and what a guest writes, and not for its memory.
    let mounting = "mount -t tmpfs -o size=14m none \"$1\" && shift && exec \"$@\"";
    let on_small_disk = |command: &Command| {
        let mut unshare = Command::new("unshare");
        unshare.args(["--mount", "sh", "-c", mounting, "sh"]).arg(place.path());
        unshare
            .arg(command.get_program())
            .args(command.get_args())
            .env("KILN_ROOT", place.path().join("store"));
        Outcome::of(&mut unshare)
    };
    let reference = busybox().reference();
    let outcome = on_small_disk(&kiln(["run", &reference, "--", "echo", "booted"]));
    outcome.code(0).complains("booting without a snapshot").complains("No space left on device");
    assert_eq!(outcome.out(), "booted\n");
    on_small_disk(&kiln(["bake", &reference])).code(3).complains("No space left on device");
}

#[test]
fn snapshots_are_listed_inspected_checked_and_removed() {
    let options = ["--scratch-size", "3005m", "--name", "listed"];
    let record = bake(&store(), &options);
    assert_eq!(record["name"], "listed");
    let key = hex(&record, "key");
    let outcome = Outcome::of(&mut kiln(["snapshot", "ls"]));
    let listed = outcome.code(0).out();
    let line = listed.lines().find(|line| line.starts_with(&key[..12])).expect("it is listed");
    assert!(line.contains("template") && line.contains("listed") && line.contains("512 MiB"), "{line}");
    let inspected = Outcome::of(&mut kiln(["snapshot", "inspect", "listed"]));
    assert_eq!(serde_json::from_str::<Value>(&inspected.code(0).out()).expect("JSON"), record);
    Outcome::of(&mut kiln(["snapshot", "verify", "listed"])).code(0);

    // A bit that no restore looks at, for the page it is in is not touched.
    let memory = store().join("objects").join(hex(&record, "memory"));
    let data = rustix::fs::seek(File::open(&memory).expect("a file"), rustix::fs::SeekFrom::Data(1 << 20));
    flip(&memory, data.expect("the guest's kernel is there"));
    Outcome::of(&mut kiln(["snapshot", "verify", "listed"])).code(3).complains("damaged").complains("hint:");
    Outcome::of(&mut kiln(["snapshot", "rm", "listed"])).code(0);
    Outcome::of(&mut kiln(["snapshot", "inspect", "listed"]))
        .code(1)
        .complains("no snapshot is called listed");
}

#[test]
fn a_warm_up_that_fails_fails_the_bake() {
    let mut command = kiln(["bake", "--quiet", "--scratch-size", "3006m", "-e", "WORD=told"]);
    let outcome = Outcome::of(command.args(["--warmup", "echo $WORD; exit 7"]).arg(busybox().reference()));
    outcome.code(1).complains("echo $WORD; exit 7").complains("ended with code 7").complains("told");
    let warm = |warmup: &str| bake(&store(), &["--scratch-size", "3006m", "--warmup", warmup]);
    let (one, again, two) = (warm("true"), warm("true"), warm(":"));
    assert_eq!(one["key"], again["key"]);
    assert_ne!(one["key"], two["key"]);
}

#[test]
fn a_machine_begins_where_the_warm_up_ended() {
    let warmup = "echo from disk >/root/file; echo from memory >/dev/shm/file";
    let options = ["--scratch-size", "3007m", "--name", "warm", "--memory", "256m", "--warmup", warmup];
    let record = bake(&store(), &options);
    let show = ["sh", "-c", "hostname; cat /root/file /dev/shm/file"];
    for name in ["warm", hex(&record, "key")] {
        let mut command = kiln(["run", "--hostname", "warm-1", &format!("snapshot:{name}"), "--"]);
        Outcome::of(command.args(show)).prints("warm-1\nfrom disk\nfrom memory\n");
    }
    Outcome::of(&mut kiln(["snapshot", "rm", "--quiet", "warm"])).code(0);
    Outcome::of(&mut kiln(["run", "snapshot:warm", "--", "true"]))
        .code(125)
        .complains("no snapshot is called");
}
