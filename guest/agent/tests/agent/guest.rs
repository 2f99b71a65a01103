//! An agent to talk to, and the host's half of the conversation.

use std::cell::RefCell;
use std::io::{Read, Write};
use std::os::fd::OwnedFd;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::PathBuf;
use std::thread::JoinHandle;
use std::time::Duration;

use kiln_agent::listen::Listener;
use kiln_agent::power::Power;
use kiln_agent::server::{Agent, Fault, SetUp};
use kiln_agent::setup::Prepared;
use kiln_agent::{Life, Place};
use kiln_protocol::frame::{self, HEADER_BYTES, Kind};
use kiln_protocol::{
    Call, Exec, Exited, Failed, INITIAL_CREDIT_BYTES, MAX_DATA_BYTES, Outcome, PowerOff, Reason, Reply,
    Request, Setup,
};
use prost::Message;
use rustix::fs::{CWD, FileType, Mode, OFlags};
use rustix::mount::{MountFlags, MountPropagationFlags};
use rustix::thread::UnshareFlags;

use crate::groups;

const PASSWD: &str = "root:x:0:0:root:/root:/bin/sh\napp:x:1000:1001:App:/home/app:/bin/sh\n";
const GROUP: &str = "root:x:0:\nwheel:x:10:app\napps:x:1001:\naudio:x:29:app\n";
/// A file system that is there only for the test: mounted over this directory in its own namespace.
const ROOT: &str = "/mnt";

/// How long an agent may be silent, however busy the host: a test that waits longer has failed.
pub(crate) const ANSWERED_WITHIN: Duration = Duration::from_mins(1);

/// A running agent. Dropping it powers it off, and waits for that.
pub(crate) struct Guest {
    directory: tempfile::TempDir,
    socket: PathBuf,
    thread: Option<JoinHandle<Result<(), Fault>>>,
}

thread_local! {
    /// A directory of the test's, which commands see as /host.
    static SHARED: RefCell<PathBuf> = RefCell::default();
}

impl Guest {
    /// An agent that has not been set up.
    pub(crate) fn bare() -> Self {
        Self::begin(own_mounts, make_root, || {})
    }

    /// An agent that has not been set up: `before` gives its thread a place, `set_up` makes it ready, and `after` sees
    /// what it leaves.
    pub(crate) fn begin(
        before: impl FnOnce() + Send + 'static,
        set_up: SetUp,
        after: impl FnOnce() + Send + 'static,
    ) -> Self {
        Self::begin_on(Power::none, before, set_up, after)
    }

    /// The same on a machine.
    pub(crate) fn begin_on(
        power: impl FnOnce() -> Power + Send + 'static,
        before: impl FnOnce() + Send + 'static,
        set_up: SetUp,
        after: impl FnOnce() + Send + 'static,
    ) -> Self {
        let directory = tempfile::tempdir().expect("a temporary directory");
        let socket = directory.path().join("agent");
        let listener = UnixListener::bind(&socket).expect("a Unix socket");
        listener.set_nonblocking(true).expect("a socket");
        let shared = directory.path().to_owned();
        let thread = std::thread::spawn(move || {
            SHARED.set(shared);
            before();
            let power = power();
            let agent = Agent::new(Listener::Unix(listener.into()), set_up, &power).expect("an agent");
            let outcome = agent.run();
            after();
            groups::remove();
            outcome
        });
        Self { directory, socket, thread: Some(thread) }
    }

    /// An agent whose first command is process 1, as with `docker run`.
    pub(crate) fn new() -> Self {
        Self::set_up(false)
    }

    /// An agent with a reaper, as with `docker run --init`.
    pub(crate) fn with_reaper() -> Self {
        Self::set_up(true)
    }

    fn set_up(reaper: bool) -> Self {
        Self::bare().ready(reaper)
    }

    /// Has been set up.
    pub(crate) fn ready(self, reaper: bool) -> Self {
        let guest = self;
        let done = guest.call(Call::Setup(Setup { hostname: "box".into(), reaper, ..Setup::default() }));
        assert!(matches!(done, Outcome::Done(_)), "{done:?}");
        guest
    }

    /// What commands see as /host.
    pub(crate) fn shared(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    pub(crate) fn connect(&self) -> Stream {
        let socket = UnixStream::connect(&self.socket).expect("the agent listens");
        socket.set_read_timeout(Some(ANSWERED_WITHIN)).expect("a socket");
        Stream { socket, granted: [INITIAL_CREDIT_BYTES; 2] }
    }

    pub(crate) fn call(&self, call: Call) -> Outcome {
        let mut stream = self.connect();
        stream.request(call);
        stream.reply()
    }

    /// Starts a command and returns its stream, past the reply.
    pub(crate) fn start(&self, exec: Exec) -> Stream {
        let (stream, outcome) = self.try_start(exec);
        assert!(matches!(outcome, Outcome::Started(_)), "{outcome:?}");
        stream
    }

    pub(crate) fn try_start(&self, exec: Exec) -> (Stream, Outcome) {
        let mut stream = self.connect();
        stream.request(Call::Exec(exec));
        let outcome = stream.reply();
        (stream, outcome)
    }

    /// Runs a command to its end.
    pub(crate) fn run(&self, exec: Exec) -> Finished {
        self.start(exec).finish()
    }

    /// Runs a shell script to its end.
    pub(crate) fn sh(&self, script: &str) -> Finished {
        self.run(sh(script))
    }

    /// Why a command is refused.
    pub(crate) fn refusal(&self, exec: Exec) -> (Reason, String) {
        match self.try_start(exec).1 {
            Outcome::Failed(Failed { reason, message }) => {
                (Reason::try_from(reason).expect("a reason"), message)
            }
            outcome => panic!("not refused: {outcome:?}"),
        }
    }

    /// Powers the agent off, and waits until it has.
    pub(crate) fn power_off(mut self, grace_ms: u64) -> Outcome {
        let outcome = self.call(Call::PowerOff(PowerOff { grace_ms }));
        self.join().expect("the agent ends in order");
        outcome
    }

    /// Waits until the agent has ended.
    pub(crate) fn join(&mut self) -> Result<(), Fault> {
        self.thread.take().expect("not joined before").join().expect("the agent does not panic")
    }
}

impl Drop for Guest {
    fn drop(&mut self) {
        if let Some(thread) = self.thread.take() {
            // It may have been powered off by the test itself.
            if let Ok(socket) = UnixStream::connect(&self.socket) {
                let mut stream = Stream { socket, granted: [0; 2] };
                let _ = stream.try_request(Call::PowerOff(PowerOff { grace_ms: 0 }));
            }
            // One that is parked hears nothing, and a test that has failed is to say so.
            if !std::thread::panicking() {
                thread.join().expect("the agent does not panic").expect("the agent ends in order");
            }
        }
    }
}

/// The host's end of a connection.
pub(crate) struct Stream {
    pub(crate) socket: UnixStream,
    granted: [u64; 2],
}

/// How a command ended, and what it wrote.
#[derive(Debug)]
pub(crate) struct Finished {
    pub(crate) stdout: Vec<u8>,
    pub(crate) stderr: Vec<u8>,
    pub(crate) exited: Exited,
}

impl Finished {
    /// What it wrote to stdout, once it is known to have succeeded.
    pub(crate) fn text(&self) -> &str {
        assert_eq!((self.exited.code, self.exited.signal), (0, 0), "{self:?}");
        std::str::from_utf8(&self.stdout).expect("text")
    }
}

impl Stream {
    pub(crate) fn send(&mut self, kind: Kind, payload: &[u8]) {
        self.try_send(kind, payload).expect("the agent takes a frame");
    }

    pub(crate) fn try_send(&mut self, kind: Kind, payload: &[u8]) -> std::io::Result<()> {
        let mut bytes = vec![];
        frame::append(&mut bytes, kind, payload);
        self.socket.write_all(&bytes)
    }

    pub(crate) fn request(&mut self, call: Call) {
        self.try_request(call).expect("the agent takes a request");
    }

    pub(crate) fn try_request(&mut self, call: Call) -> std::io::Result<()> {
        self.try_send(Kind::Request, &Request { call: Some(call) }.encode_to_vec())
    }

    pub(crate) fn stdin(&mut self, bytes: &[u8]) {
        bytes.chunks(MAX_DATA_BYTES).for_each(|piece| self.send(Kind::Stdin, piece));
    }

    pub(crate) fn signal(&mut self, number: u32) {
        self.send(Kind::Signal, &number.to_le_bytes());
    }

    pub(crate) fn grant_stdout(&mut self, bytes: u64) {
        self.granted[0] += bytes;
        self.send(Kind::StdoutCredit, &bytes.to_le_bytes());
    }

    /// The next frame, or `None` when the agent has closed the connection.
    pub(crate) fn frame(&mut self) -> Option<(Kind, Vec<u8>)> {
        let mut header = [0; HEADER_BYTES];
        self.socket.read_exact(&mut header).ok()?;
        let (kind, length) = frame::parse_header(header).expect("the agent sends frames");
        let mut payload = vec![0; length];
        self.socket.read_exact(&mut payload).ok()?;
        let output = match kind {
            Kind::Stdout => Some(0),
            Kind::Stderr => Some(1),
            _ => None,
        };
        if let Some(output) = output {
            let left = self.granted[output].checked_sub(length as u64);
            self.granted[output] = left.expect("the agent sends no more than it has credit for");
        }
        Some((kind, payload))
    }

    pub(crate) fn reply(&mut self) -> Outcome {
        let (kind, payload) = self.frame().expect("the agent answers");
        assert_eq!(kind, Kind::Reply);
        Reply::decode(payload.as_slice()).expect("a reply").outcome.expect("an outcome")
    }

    /// Reads stdout until `wanted` has come; everything up to then.
    pub(crate) fn read_until(&mut self, wanted: &str) -> String {
        let mut text = String::new();
        while !text.contains(wanted) {
            match self.frame() {
                Some((Kind::Stdout, payload)) => text.push_str(&String::from_utf8_lossy(&payload)),
                // A shell that remarks on a job's end.
                Some((Kind::Stderr, _)) => {}
                other => panic!("waiting for {wanted:?} after {text:?}: {other:?}"),
            }
        }
        text
    }

    /// Reads to the end, with credit for all that comes.
    pub(crate) fn finish(mut self) -> Finished {
        let (mut stdout, mut stderr) = (vec![], vec![]);
        loop {
            match self.frame().expect("the command is reported to have ended") {
                (Kind::Stdout, payload) => {
                    self.granted[0] += payload.len() as u64;
                    let _ = self.try_send(Kind::StdoutCredit, &(payload.len() as u64).to_le_bytes());
                    stdout.extend(payload);
                }
                (Kind::Stderr, payload) => {
                    self.granted[1] += payload.len() as u64;
                    let _ = self.try_send(Kind::StderrCredit, &(payload.len() as u64).to_le_bytes());
                    stderr.extend(payload);
                }
                (Kind::StdinCredit, _) => {}
                (Kind::Exited, payload) => {
                    assert!(self.frame().is_none(), "the last frame of a stream");
                    let exited = Exited::decode(payload.as_slice()).expect("an end");
                    return Finished { stdout, stderr, exited };
                }
                (kind, _) => panic!("{kind:?} in the middle of a command"),
            }
        }
    }
}

/// A command with these arguments and a usual environment.
pub(crate) fn exec<const N: usize>(argv: [&str; N]) -> Exec {
    Exec {
        argv: argv.iter().map(|argument| argument.as_bytes().to_vec()).collect(),
        env: vec![b"PATH=/usr/sbin:/usr/bin:/sbin:/bin".to_vec(), b"LC_ALL=C".to_vec()],
        ..Exec::default()
    }
}

/// A shell that runs `script`.
pub(crate) fn sh(script: &str) -> Exec {
    exec(["/bin/sh", "-c", script])
}

/// Gives this thread mounts and a host name of its own.
pub(crate) fn own_mounts() {
    own_namespaces(UnshareFlags::NEWNS | UnshareFlags::NEWUTS);
}

/// Gives this thread namespaces of its own, one for mounts among them.
pub(crate) fn own_namespaces(namespaces: UnshareFlags) {
    #[allow(deprecated, reason = "unsafe for what it can do to files, of which it is not asked")]
    rustix::thread::unshare(namespaces).expect("root may have namespaces");
    let private = MountPropagationFlags::PRIVATE | MountPropagationFlags::REC;
    rustix::mount::mount_change("/", private).expect("mounts of its own");
}

/// What stands in for the set-up of a guest: a root for commands, made of the host's programs.
#[allow(clippy::unnecessary_wraps, reason = "it stands in for what can fail")]
pub(crate) fn make_root(
    setup: &Setup,
    _life: Option<&Life>,
    _prepared: Option<Prepared>,
) -> Result<Place, Failed> {
    let at = |path: &str| format!("{ROOT}{path}");
    rustix::mount::mount("root", ROOT, "tmpfs", MountFlags::empty(), None).expect("a tmpfs");
    for directory in ["/usr", "/etc", "/dev", "/proc", "/tmp", "/root", "/host", "/cgroup"] {
        std::fs::create_dir(at(directory)).expect("a directory");
    }
    rustix::mount::mount_bind("/usr", at("/usr")).expect("a bind mount");
    SHARED.with_borrow(|shared| {
        rustix::mount::mount_bind(shared.as_path(), at("/host")).expect("a bind mount");
    });
    rustix::mount::mount("cgroup", at("/cgroup"), "cgroup2", MountFlags::empty(), None)
        .expect("control groups");
    for link in ["/bin", "/sbin", "/lib", "/lib64"] {
        std::os::unix::fs::symlink(format!("usr{link}"), at(link)).expect("a link");
    }
    std::fs::write(at("/etc/passwd"), PASSWD).expect("a file");
    std::fs::write(at("/etc/group"), GROUP).expect("a file");
    for (path, minor) in [("/dev/null", 3), ("/dev/zero", 5), ("/dev/urandom", 9)] {
        let mode = Mode::from_raw_mode(0o666);
        let number = rustix::fs::makedev(1, minor);
        rustix::fs::mknodat(CWD, at(path), FileType::CharacterDevice, mode, number).expect("a device node");
        rustix::fs::chmod(at(path), mode).expect("a device node");
    }
    std::fs::create_dir(at("/dev/pts")).expect("a directory");
    std::os::unix::fs::symlink("/proc/self/fd/1", at("/dev/stdout")).expect("a link");
    rustix::mount::mount(
        "devpts",
        at("/dev/pts"),
        "devpts",
        MountFlags::NOSUID,
        Some(c"ptmxmode=666,mode=620"),
    )
    .expect("a devpts");
    rustix::fs::chmod(at("/tmp"), Mode::from_raw_mode(0o1777)).expect("a directory");
    std::env::set_current_dir(ROOT).expect("the root");
    rustix::process::chroot(".").expect("root may change its root");
    let open = |path, flags| -> OwnedFd {
        rustix::fs::open(path, flags | OFlags::CLOEXEC, Mode::empty()).expect("what was just made")
    };
    Ok(Place {
        null: open("/dev/null", OFlags::RDWR),
        terminals: open("/dev/pts", OFlags::PATH),
        hostname: setup.hostname.clone(),
        identity: None,
        groups: Some(groups::own("/cgroup")),
        random: open("/dev/urandom", OFlags::RDWR),
        scratch: None,
        reaper: setup.reaper,
    })
}
