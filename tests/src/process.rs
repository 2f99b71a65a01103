//! Processes under test, and what they use.

use std::io::{BufRead as _, BufReader, Read, Write as _};
use std::process::{Child, ChildStderr, ChildStdin, ChildStdout, Command, ExitStatus, Stdio};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::process::{Pid, PidfdFlags, Signal, kill_process, pidfd_open};

/// How long any process of a test may take. It stops a test that hangs; no test is about time.
const LIMIT: Duration = Duration::from_mins(15);

/// How a program ended and what it wrote.
#[derive(Debug)]
pub struct Outcome {
    /// The program's exit status.
    pub status: ExitStatus,
    /// What it wrote to stdout.
    pub stdout: Vec<u8>,
    /// What it wrote to stderr.
    pub stderr: Vec<u8>,
}

impl Outcome {
    /// Runs `command` to its end, its stdin as the command has it.
    pub fn of(command: &mut Command) -> Self {
        let child =
            command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().expect("the program starts");
        let watchdog = Watchdog::start(&child);
        let output = child.wait_with_output().expect("the program is waited for");
        watchdog.end();
        Self { status: output.status, stdout: output.stdout, stderr: output.stderr }
    }

    /// Checks the exit code; a failure shows what the program said.
    #[track_caller]
    pub fn code(&self, code: i32) -> &Self {
        assert_eq!(self.status.code(), Some(code), "{}", self.said());
        self
    }

    /// Checks the exit code and the whole of stdout, and that nothing came on stderr.
    #[track_caller]
    pub fn prints(&self, stdout: &str) -> &Self {
        self.code(0);
        assert_eq!(self.out(), stdout, "{}", self.said());
        assert_eq!(self.err(), "", "{}", self.said());
        self
    }

    /// Checks that stderr has `text`.
    #[track_caller]
    pub fn complains(&self, text: &str) -> &Self {
        assert!(self.err().contains(text), "no {text:?} in stderr\n{}", self.said());
        self
    }

    /// Stdout as text.
    pub fn out(&self) -> String {
        String::from_utf8_lossy(&self.stdout).into_owned()
    }

    /// Stderr as text.
    pub fn err(&self) -> String {
        String::from_utf8_lossy(&self.stderr).into_owned()
    }

    fn said(&self) -> String {
        let text = |bytes: &[u8]| String::from_utf8_lossy(&bytes[..bytes.len().min(4000)]).into_owned();
        format!("{}\n--- stdout\n{}\n--- stderr\n{}", self.status, text(&self.stdout), text(&self.stderr))
    }
}

/// A program that a test speaks with while it runs. It is killed when the test lets go of it.
#[derive(Debug)]
pub struct Session {
    child: Child,
    stdin: Option<ChildStdin>,
    stdout: BufReader<ChildStdout>,
    stderr: Option<ChildStderr>,
    watchdog: Option<Watchdog>,
}

impl Session {
    /// Starts `command` with pipes for its streams.
    pub fn start(command: &mut Command) -> Self {
        let mut child = command
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .expect("the program starts");
        Self {
            stdin: child.stdin.take(),
            stdout: BufReader::new(child.stdout.take().expect("piped")),
            stderr: child.stderr.take(),
            watchdog: Some(Watchdog::start(&child)),
            child,
        }
    }

    /// The program's process id.
    pub fn pid(&self) -> Pid {
        Pid::from_child(&self.child)
    }

    /// Its next line of output without the end of line; empty at the end of output.
    pub fn line(&mut self) -> String {
        let mut line = Vec::new();
        self.stdout.read_until(b'\n', &mut line).expect("stdout is read");
        String::from_utf8_lossy(&line).trim_end_matches('\n').to_owned()
    }

    /// Reads its output until a line is `text`; a failure shows what came instead.
    #[track_caller]
    pub fn wait_for(&mut self, text: &str) {
        let mut before = Vec::new();
        loop {
            let line = self.line();
            if line == text {
                return;
            }
            assert!(!line.is_empty(), "output ended before {text:?}: {before:?}\n{}", self.stop());
            before.push(line);
        }
    }

    /// Reads what it says on stderr until a line is `text`, and nothing of its output.
    #[track_caller]
    pub fn wait_for_error(&mut self, text: &str) {
        let stderr = self.stderr.as_mut().expect("not taken");
        let (mut line, mut byte) = (Vec::new(), [0]);
        while line != text.as_bytes() {
            if byte == *b"\n" {
                line.clear();
            }
            assert_ne!(stderr.read(&mut byte).expect("stderr is read"), 0, "stderr ended before {text:?}");
            if byte != *b"\n" {
                line.push(byte[0]);
            }
        }
    }

    /// Reads exactly so many bytes of output; a failure shows what came on stderr.
    #[track_caller]
    pub fn read_exact(&mut self, buffer: &mut [u8]) {
        if let Err(error) = self.stdout.read_exact(buffer) {
            panic!("output ended early: {error}\n{}", self.stop());
        }
    }

    /// Ends it, and returns what it wrote to stderr.
    fn stop(&mut self) -> String {
        let mut stderr = String::new();
        // It may have ended by itself.
        let _ = self.child.kill();
        let _ = self.stderr.take().expect("not taken").read_to_string(&mut stderr);
        stderr
    }

    /// Writes to its stdin.
    pub fn write(&mut self, bytes: &[u8]) {
        let stdin = self.stdin.as_mut().expect("stdin is open");
        stdin.write_all(bytes).and_then(|()| stdin.flush()).expect("stdin takes it");
    }

    /// Ends its stdin.
    pub fn close_stdin(&mut self) {
        self.stdin = None;
    }

    /// Sends it a signal.
    pub fn signal(&self, signal: Signal) {
        kill_process(self.pid(), signal).expect("the process is there");
    }

    /// Waits for its end, and returns what it still wrote.
    pub fn finish(mut self) -> Outcome {
        self.stdin = None;
        let mut stderr = self.stderr.take().expect("not taken");
        let errors = thread::spawn(move || {
            let mut text = Vec::new();
            stderr.read_to_end(&mut text).map(|_| text)
        });
        let mut stdout = Vec::new();
        self.stdout.read_to_end(&mut stdout).expect("stdout is read");
        let stderr = errors.join().expect("the thread only reads").expect("stderr is read");
        let status = self.child.wait().expect("the program is waited for");
        self.watchdog.take().expect("not taken").end();
        Outcome { status, stdout, stderr }
    }
}

impl Drop for Session {
    fn drop(&mut self) {
        if let Some(watchdog) = self.watchdog.take() {
            // It may have ended by itself.
            let _ = self.child.kill();
            let _ = self.child.wait();
            watchdog.end();
        }
    }
}

/// Kills a process that outlives the limit, so that a test that would hang fails.
#[derive(Debug)]
struct Watchdog(JoinHandle<()>);

impl Watchdog {
    fn start(child: &Child) -> Self {
        let pid = Pid::from_child(child);
        Self(thread::spawn(move || {
            if !wait_until_gone(pid, LIMIT) {
                eprintln!("process {pid:?} exceeded the limit of {LIMIT:?}");
                // It may end at this very moment.
                let _ = kill_process(pid, Signal::KILL);
            }
        }))
    }

    fn end(self) {
        self.0.join().expect("the watchdog only waits");
    }
}

/// Waits for the end of any process, at most so long; whether it ended.
pub fn wait_until_gone(pid: Pid, limit: Duration) -> bool {
    let Ok(pidfd) = pidfd_open(pid, PidfdFlags::empty()) else { return true };
    let limit = Timespec { tv_sec: limit.as_secs().cast_signed(), tv_nsec: limit.subsec_nanos().into() };
    let mut fds = [PollFd::new(&pidfd, PollFlags::IN)];
    loop {
        match poll(&mut fds, Some(&limit)) {
            Err(rustix::io::Errno::INTR) => {}
            ended => return ended.expect("a pidfd can be waited for") > 0,
        }
    }
}

/// The processes that came of `pid`, itself not among them.
pub fn descendants(pid: Pid) -> Vec<Pid> {
    let mut found: Vec<Pid> = Vec::new();
    let mut next = vec![pid];
    while let Some(parent) = next.pop() {
        for entry in std::fs::read_dir("/proc").expect("/proc").flatten() {
            let Some(id) = entry.file_name().to_str().and_then(|name| name.parse::<i32>().ok()) else {
                continue;
            };
            // A process may end while it is looked at.
            let Ok(stat) = std::fs::read_to_string(entry.path().join("stat")) else { continue };
            let after_name = stat.rsplit(')').next().unwrap_or_default();
            let is_child = after_name.split_whitespace().nth(1) == Some(&parent.as_raw_nonzero().to_string());
            if let (true, Some(id)) = (is_child, Pid::from_raw(id)) {
                found.push(id);
                next.push(id);
            }
        }
    }
    found
}

/// The one monitor among the processes that came of `pid`.
///
/// # Panics
/// When there is none or more.
#[track_caller]
pub fn monitor_of(pid: Pid) -> Pid {
    let is_monitor = |pid: &Pid| {
        let words = std::fs::read(format!("/proc/{}/cmdline", pid.as_raw_nonzero())).unwrap_or_default();
        words.starts_with(b"kiln-monitor\0")
    };
    let monitors: Vec<Pid> = descendants(pid).into_iter().filter(is_monitor).collect();
    let [monitor] = monitors[..] else { panic!("one monitor: {monitors:?}") };
    monitor
}

/// The memory a process has resident, in bytes.
pub fn rss_bytes(pid: Pid) -> u64 {
    let path = format!("/proc/{}/status", pid.as_raw_nonzero());
    let status = std::fs::read_to_string(path).expect("the process is there");
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).expect("a line VmRSS");
    line.trim().trim_end_matches(" kB").parse::<u64>().expect("a number of KiB") << 10
}
