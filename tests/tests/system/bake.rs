//! What a bake puts into a guest, and the service that runs when it is saved.
//!
//! A size of the scratch disk that no other test uses makes a template of a test's own.

use std::fs;
use std::path::Path;
use std::process::Command;

use kiln_tests::{Outcome, Session, busybox, kiln};
use serde_json::Value;

/// A server of files in /srv that takes its time to start.
const SERVER: &str = "sleep 1; mkdir -p /srv; cat /run/kiln/generation >/srv/born; echo served >/srv/index.html; \
                      exec httpd -f -p 8080 -h /srv";

/// `kiln bake OPTIONS IMAGE -- COMMAND`.
fn bake(options: &[&str], command: &[&str]) -> Outcome {
    Outcome::of(&mut baking(options, command))
}

fn baking(options: &[&str], command: &[&str]) -> Command {
    let mut kiln = kiln(["bake", "--quiet", "--json"]);
    kiln.args(options).arg(busybox().reference());
    if !command.is_empty() {
        kiln.arg("--").args(command);
    }
    kiln
}

fn record(outcome: &Outcome) -> Value {
    outcome.code(0);
    serde_json::from_str(&outcome.out()).expect("JSON")
}

fn key(outcome: &Outcome) -> String {
    record(outcome)["key"].as_str().expect("a key").to_owned()
}

/// Runs a script in a machine made from a snapshot.
fn script(snapshot: &str, script: &str) -> Outcome {
    Outcome::of(&mut kiln(["run", "--quiet", &format!("snapshot:{snapshot}"), "--", "sh", "-c", script]))
}

fn written(path: &Path, contents: impl AsRef<[u8]>, mode: u32) -> &str {
    use std::os::unix::fs::PermissionsExt as _;
    fs::write(path, contents).expect("written");
    fs::set_permissions(path, fs::Permissions::from_mode(mode)).expect("set");
    path.to_str().expect("a path")
}

#[test]
fn extra_files_are_there_before_warm_ups_and_part_of_the_key() {
    let folder = tempfile::tempdir().expect("a folder");
    let (small, large) = (folder.path().join("small"), folder.path().join("large"));
    // More than one message, and no multiple of one.
    let bytes: Vec<u8> = (0..600_001_u32).map(|at| (at % 251) as u8).collect();
    let small_extra = format!("{}:/etc/passwd", written(&small, "root:x:0:0::/:/bin/sh\n", 0o604));
    let large_extra = format!("{}:/opt/deep/large", written(&large, &bytes, 0o755));
    let options = ["--scratch-size", "3101m", "--name", "extra", "--extra-file", &small_extra];
    let warmup =
        "md5sum </opt/deep/large >/root/sum; stat -c '%a %u' /opt/deep/large /etc/passwd >/root/modes";
    let all = [&options[..], &["--extra-file", &large_extra, "--warmup", warmup]].concat();
    let first = key(&bake(&all, &[]));
    let expected = Outcome::of(Command::new("md5sum").stdin(fs::File::open(&large).expect("it")));
    script("extra", "cat /root/sum /root/modes /etc/passwd")
        .prints(&format!("{}755 0\n604 0\nroot:x:0:0::/:/bin/sh\n", expected.out()));
    assert_eq!(first, key(&bake(&all, &[])), "nothing has changed");
    written(&small, "root:x:0:0::/:/bin/ash\n", 0o604);
    let second = key(&bake(&all, &[]));
    assert_ne!(first, second, "a file has changed");
    script("extra", "cat /etc/passwd").prints("root:x:0:0::/:/bin/ash\n");
    written(&small, "root:x:0:0::/:/bin/ash\n", 0o644);
    assert_ne!(second, key(&bake(&all, &[])), "its permissions have changed");
}

#[test]
fn a_file_that_cannot_go_into_the_guest_fails_the_bake() {
    let folder = tempfile::tempdir().expect("a folder");
    let path = folder.path().join("file");
    let path = written(&path, "x", 0o644);
    let place =
        |place: &str| bake(&["--scratch-size", "3102m", "--extra-file", &format!("{path}:{place}")], &[]);
    place("/etc").code(1).complains("/etc").complains("is a directory");
    place("/probe/x").code(1).complains("not a directory");
    place("/etc/").code(2).complains("not a directory");
    let read_only = format!("{path}:/new");
    bake(&["--read-only", "--extra-file", &read_only], &[]).code(1).complains("read-only file system");
    bake(&["--extra-file", "/nonexistent:/x"], &[]).code(1).complains("/nonexistent");
    bake(&["--extra-file", &format!("{}:/x", folder.path().display())], &[])
        .code(1)
        .complains("not a regular file");
}

#[test]
fn a_script_of_the_hosts_warms_up_by_its_first_line_or_the_shell() {
    let folder = tempfile::tempdir().expect("a folder");
    let (shell, awk) = (folder.path().join("shell"), folder.path().join("awk"));
    // Neither needs to be a program here.
    let shell = written(&shell, "echo shell $WORD $(id -u) >>/tmp/log\n", 0o600);
    let awk = written(&awk, "#!/bin/awk -f\nBEGIN { print \"awk\" >>\"/tmp/log\" }\n", 0o600);
    let options = ["--scratch-size", "3103m", "--name", "scripts", "-e", "WORD=told"];
    let files = ["--warmup-file", shell, "--warmup-file", awk, "--warmup", "echo first >>/tmp/log"];
    let first = key(&bake(&[&options[..], &files].concat(), &[]));
    script("scripts", "cat /tmp/log; ls /run").prints("first\nshell told 0\nawk\nkiln\n");
    written(Path::new(shell), "echo other >>/tmp/log\n", 0o600);
    assert_ne!(first, key(&bake(&[&options[..], &files].concat(), &[])));
    written(Path::new(shell), "echo broken; exit 9\n", 0o600);
    bake(&[&options[..], &files].concat(), &[])
        .code(1)
        .complains(shell)
        .complains("ended with code 9")
        .complains("broken");
    // A read-only root has room for it too.
    written(Path::new(shell), "#!/bin/sh\necho fine >/tmp/log\n", 0o600);
    bake(&["--read-only", "--name", "sealed", "--warmup-file", shell], &[]).code(0);
    script("sealed", "cat /tmp/log").prints("fine\n");
}

#[test]
fn a_service_answers_in_every_clone() {
    let options = ["--scratch-size", "3104m", "--name", "served", "--ready-port", "8080"];
    let server = ["sh", "-c", SERVER];
    let baked = record(&bake(&options, &server));
    assert!(baked["service"].as_str().is_some_and(|words| words.contains("httpd")), "{baked}");
    assert_eq!(baked["key"], key(&bake(&options, &server)), "baked again");
    let unnamed = ["--scratch-size", "3104m", "--ready-port", "8080"];
    assert_ne!(baked["key"], key(&bake(&unnamed, &["httpd", "-f", "-p", "8080"])), "another command");

    let ask = "wget -qO- http://127.0.0.1:8080/; cat /srv/born /run/kiln/generation; read line";
    let mut clones: Vec<_> = (0..2)
        .map(|_| {
            let mut run = kiln(["run", "--quiet", "--interactive", "snapshot:served", "--"]);
            Session::start(run.args(["sh", "-c", ask]))
        })
        .collect();
    // Both live at once: neither ends before the other has answered.
    let said: Vec<[String; 3]> = clones.iter_mut().map(|clone| [(); 3].map(|()| clone.line())).collect();
    for clone in &mut clones {
        clone.write(b"\n");
    }
    for clone in clones {
        clone.finish().code(0);
    }
    assert_eq!([&said[0][0], &said[1][0]], ["served", "served"]);
    assert_eq!(said[0][1], said[1][1], "the service was born once");
    assert_ne!(said[0][2], said[1][2], "two clones of one generation");
    assert_ne!(said[0][1], said[0][2], "the clone is the guest that was baked");

    // There is nothing to attach to, and a second server would be no use.
    Outcome::of(&mut kiln(["run", "snapshot:served"]))
        .code(125)
        .complains("running already")
        .complains("hint:");
}

#[test]
fn a_service_is_saved_when_its_file_or_its_words_appear() {
    let program = "mkdir -p /srv/state; echo one line; sleep 1; touch /srv/state/up; echo ready to serve >&2; \
                   while :; do sleep 1; echo tick; echo tick >>/srv/ticks; done";
    for (option, value) in [("--ready-file", "/srv/state/up"), ("--ready-log", "^[a-z ]*ready to ser(ve|f)")]
    {
        for init in [&[][..], &["--init"]] {
            let options = ["--scratch-size", "3105m", "--name", "ticks", option, value];
            record(&bake(&[&options[..], init].concat(), &["sh", "-c", program]));
            // It goes on from where it was, though nobody reads what it writes.
            let look = "test -e /srv/state/up || exit 5; rm -f /srv/ticks; \
                        until test -e /srv/ticks; do sleep 0.1; done; echo goes on";
            script("ticks", look).prints("goes on\n");
        }
    }
}

#[test]
fn a_service_that_is_never_ready_stores_nothing() {
    let place = tempfile::tempdir().expect("a folder");
    let root = place.path().join("store");
    let bake =
        |options: &[&str], command: &[&str]| Outcome::of(baking(options, command).env("KILN_ROOT", &root));
    let program = "echo starting; echo and waiting >&2; sleep 1000";
    for (option, value, missing) in [
        ("--ready-port", "8080", "no listener on port 8080"),
        ("--ready-file", "/srv/none/such", "no file /srv/none/such"),
        ("--ready-log", "started", "no 'started' in its output"),
    ] {
        let never = bake(&[option, value, "--ready-timeout", "10s"], &["sh", "-c", program]);
        never.code(1).complains("not ready within 10 s").complains(missing);
        never.complains("starting").complains("and waiting");
        let ended = bake(&[option, value], &["sh", "-c", "echo gone; exit 3"]);
        ended.code(1).complains("ended with code 3").complains(missing).complains("gone");
    }
    bake(&["--ready-port", "1"], &["no-such-program"]).code(1).complains("no-such-program");
    let listed = Outcome::of(kiln(["snapshot", "ls", "--json"]).env("KILN_ROOT", &root));
    let listed: Value = serde_json::from_str(&listed.code(0).out()).expect("JSON");
    let kinds: Vec<_> = listed.as_array().expect("a list").iter().map(|one| &one["kind"]).collect();
    assert_eq!(kinds, ["base"], "{listed}");
    assert_eq!(fs::read_dir(root.join("tmp")).expect("a folder").count(), 0, "something is left over");
}

#[test]
fn what_does_not_go_together_is_told() {
    bake(&["--ready-port", "80", "--ready-file", "/x"], &[]).code(2).complains("cannot be used with");
    bake(&[], &["a-command"]).code(2).complains("--ready-");
    bake(&["--ready-timeout", "1s"], &[]).code(2).complains("--ready-");
    for wrong in [
        ["--ready-port", "0"],
        ["--ready-port", "65536"],
        ["--ready-file", "x"],
        ["--ready-log", ""],
        ["--ready-log", "up("],
    ] {
        bake(&wrong, &[]).code(2);
    }
}
