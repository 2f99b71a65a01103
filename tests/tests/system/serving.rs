//! VMs that serve: files go into them and come out, ports are published, and what they use is shown.

use std::fs;
use std::io::{Read as _, Write as _};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::process::Stdio;

use kiln_tests::{Outcome, Session, Terminal, Vm, busybox, store};
use rustix::process::Signal;
use serde_json::Value;

/// A server of files, and what says in the guest that it answers.
const SERVE: &str = "mkdir -p /srv; echo hello >/srv/index.html; exec httpd -f -p 80 -h /srv";
const ANSWERS: &str = "until wget -q -O /dev/null http://127.0.0.1/; do usleep 10000; done";

fn get(address: SocketAddr, path: &str) -> String {
    let mut stream = TcpStream::connect(address).expect("somebody listens");
    stream.write_all(format!("GET {path} HTTP/1.0\r\n\r\n").as_bytes()).expect("sent");
    let mut answer = String::new();
    stream.read_to_string(&mut answer).expect("an answer");
    answer.split_once("\r\n\r\n").map(|(_, body)| body.to_owned()).unwrap_or_default()
}

/// Where the ports of a VM are reached.
fn bound(vm: &Vm) -> Vec<SocketAddr> {
    let listed: Value = serde_json::from_slice(&vm.does(&["port", "--json"]).code(0).stdout).expect("JSON");
    let ports = listed.as_array().expect("an array").iter();
    ports.map(|port| port["bound"].as_str().expect("bound").parse().expect("an address")).collect()
}

#[test]
fn a_port_is_published_while_its_vm_runs_and_again_when_it_starts_anew() {
    let vm = Vm::run(&store(), "served", &["-p", "80"], SERVE);
    vm.script(ANSWERS).code(0);
    let [address] = bound(&vm)[..] else { panic!("one port is published") };
    assert!(address.ip().is_loopback(), "{address}");
    assert_eq!(get(address, "/"), "hello\n");
    assert_eq!(vm.does(&["port"]).out(), format!("80/tcp -> {address}\n"));
    let listed = Outcome::of(&mut vm.kiln(&["ps", "--filter", "name=served"]));
    assert!(listed.out().contains(&format!("{address}->80")), "{listed:?}");

    // One more, and away with it.
    let expose = |args: &[&str]| Outcome::of(vm.kiln(&["expose"]).args(args));
    let other = expose(&["served", "80"]).code(0).out();
    let other: SocketAddr = other.trim().parse().expect("an address");
    assert_eq!(get(other, "/"), "hello\n");
    expose(&["served", &format!("{other}:80")]).code(1).complains(&format!("cannot listen on {other}"));
    expose(&["--remove", "served", &format!("{other}:80")]).code(0);
    assert!(TcpStream::connect(other).is_err(), "nobody listens there any more");
    expose(&["--remove", "served", &format!("{other}:80")]).code(1).complains("is not published at");
    assert_eq!(bound(&vm), [address]);

    // A port that somebody has keeps a VM from starting, and leaves none.
    let taken = TcpListener::bind("127.0.0.1:0").expect("a port");
    let publish = format!("{}:80", taken.local_addr().expect("an address").port());
    let refused = Vm::named(&store(), "unserved");
    let image = busybox().reference();
    let run = ["--quiet", "run", "-d", "--name", "unserved", "-p", &publish, &image, "--", "sleep", "1000"];
    Outcome::of(&mut refused.kiln(&run)).code(125).complains("cannot listen on 127.0.0.1").complains("hint:");
    assert!(!refused.folder().exists());

    vm.does(&["kill"]).code(0);
    assert!(TcpStream::connect(address).is_err(), "nobody listens for a VM that has ended");
    assert_eq!(vm.does(&["port"]).out(), "80/tcp -> 127.0.0.1:0 when it runs\n");
    expose(&["served", "80"]).code(1).complains("does not run");
    vm.vm(&["start", "served"]).code(0);
    vm.script(ANSWERS).code(0);
    assert_eq!(get(bound(&vm)[0], "/"), "hello\n");
}

#[test]
fn files_go_into_a_vm_and_come_out() {
    let vm = Vm::start("copied");
    let folder = tempfile::tempdir().expect("a folder");
    let at = |name: &str| folder.path().join(name).display().to_string();
    fs::create_dir(at("site")).expect("made");
    fs::write(at("site/index.html"), "hello\n").expect("written");
    let copy = |args: &[&str]| Outcome::of(vm.kiln(&["cp"]).args(args));
    copy(&[&at("site"), "copied:/srv"]).code(0).complains("copied 1 file, 1 directory, 6 B");
    assert_eq!(vm.told("cat /srv/index.html"), "hello");
    vm.script("mkdir /out; printf 'a\\0b' >/out/bytes; ln -s bytes /out/link; mkfifo /out/fifo").code(0);
    copy(&["copied:/out", &at("out")]).code(0).complains("left out 1 that are no files");
    assert_eq!(fs::read(at("out/bytes")).expect("copied"), b"a\0b");
    assert_eq!(fs::read_link(at("out/link")).expect("a link").as_os_str(), "bytes");
    assert_eq!(copy(&["-q", "copied:/out/.", &at("again")]).code(0).err(), "");
    assert!(fs::exists(at("again/bytes")).expect("looked at"));

    // One file as a stream.
    let source = fs::File::open(at("out/bytes")).expect("there");
    let mut from_stdin = vm.kiln(&["--quiet", "cp", "-", "copied:tmp/in"]);
    Outcome::of(from_stdin.stdin(Stdio::from(source))).prints("");
    assert_eq!(copy(&["copied:/tmp/in", "-"]).code(0).stdout, b"a\0b");

    copy(&["copied:/nothing", &at("x")]).code(1).complains("/nothing");
    copy(&["copied:/out", "copied:/other"]).code(1).complains("one of the two is in a VM").complains("hint:");
    copy(&[&at("nothing"), "copied:/x"]).code(3).complains("nothing");
    copy(&["a", "unknown-vm:/x"]).code(1).complains("no VM is called unknown-vm");
}

#[test]
fn what_vms_use_is_shown() {
    let vm = Vm::run(&store(), "measured", &[], "sleep 1000 & while true; do usleep 1000; done");
    vm.script("until pidof sleep; do usleep 1000; done").code(0);
    let once = vm.does(&["stats", "--no-stream", "--json"]);
    let once: Value = serde_json::from_slice(&once.code(0).stdout).expect("a line of JSON");
    assert!(once["processes"].as_u64() >= Some(2), "{once}");
    assert!(once["memory_used_bytes"].as_u64() > Some(1 << 20), "{once}");
    assert!(once["memory_bytes"].as_u64() <= Some(512 << 20), "{once}");
    assert!(once["host_bytes"].as_u64() > Some(0) && once["cpu_percent"].as_f64() > Some(0.0), "{once}");
    let mut stream = Session::start(&mut vm.kiln(&["stats", "--json", "measured"]));
    for _ in 0..2 {
        let line: Value = serde_json::from_str(&stream.line()).expect("a line of JSON");
        assert_eq!(line["name"], "measured");
    }
    vm.does(&["pause"]).code(0);
    let listed = vm.does(&["stats", "--no-stream"]).code(0).out();
    assert!(listed.lines().nth(1).expect("a line").contains("paused"), "{listed}");
    vm.does(&["resume"]).code(0);

    // As a screen, which goes when it is told to, and takes nothing along.
    let mut top = Terminal::start(&vm.kiln(&["top"]), 24, 110);
    top.wait_for("kiln top: ");
    top.wait_for("measured");
    assert!(!top.is_cooked());
    top.type_in("nmq");
    assert_eq!(top.finish().code(), Some(0));
    assert!(top.is_cooked());
    let mut top = Terminal::start(&vm.kiln(&["top"]), 24, 110);
    top.wait_for("measured");
    top.signal(Signal::TERM);
    assert_eq!(top.finish().code(), Some(143));
    assert!(top.is_cooked());

    vm.does(&["kill"]).code(0);
    stream.finish().code(0);
    vm.does(&["stats"]).code(1).complains("does not run");
}
