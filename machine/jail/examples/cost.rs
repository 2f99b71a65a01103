//! What it costs to start a process into a jail, step by step: `cargo run --release -p kiln-jail --example cost [RUNS]`.
//!
//! The process is this program again. It says when it began and when its jail was closed; where it goes on to serve a guest, a monitor
//! does. A plain start of the same program is beside it.
#![forbid(unsafe_code)]

use std::fs::File;
use std::io::{Read as _, Write as _};
use std::os::fd::AsFd as _;
use std::path::Path;
use std::process::{Command, Stdio};

use kiln_jail::{Launch, Program};
use rustix::time::{ClockId, clock_gettime};

const PROGRAM: &str = "/proc/self/exe";
const RUNS: usize = 300;

fn now_us() -> f64 {
    let now = clock_gettime(ClockId::Monotonic);
    now.tv_sec as f64 * 1e6 + now.tv_nsec as f64 / 1e3
}

fn main() {
    let begun = now_us();
    let mut args = std::env::args();
    match (args.next().as_deref(), args.next()) {
        (Some("jailed"), _) => {
            kiln_jail::enter(drop).expect("a jail");
            say(begun);
        }
        (_, Some(word)) if word == "plain" => say(begun),
        (_, runs) => measure(runs.map_or(RUNS, |runs| runs.parse().expect("a number of runs"))),
    }
}

fn say(begun: f64) {
    let mut stdout = std::io::stdout();
    stdout.write_all(&[begun, now_us()].map(f64::to_ne_bytes).concat()).expect("somebody listens");
    stdout.flush().expect("somebody listens");
}

fn measure(runs: usize) {
    let null = File::open("/dev/null").expect("/dev/null");
    let mut rows: [(&str, Vec<f64>); 6] = [
        ("plain: start -> first act", vec![]),
        ("plain: start -> gone", vec![]),
        ("jailed: spawn returns", vec![]),
        ("jailed: start -> first act", vec![]),
        ("jailed: first act -> in jail", vec![]),
        ("jailed: start -> gone", vec![]),
    ];
    for _ in 0..runs {
        let start = now_us();
        let plain = Command::new(PROGRAM).arg("plain").stdin(Stdio::null()).output().expect("it runs");
        let gone = now_us();
        let (begun, _) = times(&plain.stdout);
        rows[0].1.push(begun - start);
        rows[1].1.push(gone - start);

        let (mut reading, stdout) = std::io::pipe().expect("a pipe");
        let stderr = std::io::stderr();
        let fds = [null.as_fd(), stdout.as_fd(), stderr.as_fd()];
        let start = now_us();
        let program = Program::Path(Path::new(PROGRAM));
        let child = kiln_jail::spawn(&Launch { program, args: &["jailed"], fds: &fds, cgroup: None });
        let child = child.expect("a process");
        let spawned = now_us();
        drop(stdout);
        let mut said = Vec::new();
        reading.read_to_end(&mut said).expect("it speaks");
        child.wait().expect("it ends");
        let gone = now_us();
        let (begun, jailed) = times(&said);
        let took = [spawned - start, begun - start, jailed - begun, gone - start];
        for (row, took) in rows[2..].iter_mut().zip(took) {
            row.1.push(took);
        }
    }
    for (name, mut values) in rows {
        values.sort_by(f64::total_cmp);
        let at = |part: f64| values[(values.len() as f64 * part) as usize];
        println!("{name:32} p50 {:8.1} us   p90 {:8.1} us", at(0.5), at(0.9));
    }
}

fn times(said: &[u8]) -> (f64, f64) {
    let (words, _) = said.as_chunks();
    (f64::from_ne_bytes(words[0]), f64::from_ne_bytes(words[1]))
}
