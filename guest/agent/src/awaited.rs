//! Waiting for what a program of the guest's does when it is ready: it listens, or a file appears.

use alloc::format;
use alloc::string::String;
use core::mem::MaybeUninit;

use kiln_protocol::{Await, Awaited, Failed};
use rustix::fd::{AsFd, BorrowedFd, OwnedFd};
use rustix::fs::inotify::{self, CreateFlags, WatchFlags};
use rustix::fs::{AtFlags, CWD};
use rustix::io::Errno;

use crate::extra::check_path;
use crate::failure::{internal, invalid};
use crate::files;
use crate::session::one_shot;

/// The first wait for a port, and the longest, in milliseconds.
const FIRST_LOOK_MS: u64 = 1;
const LOOKS_APART_MAX_MS: u64 = 50;
/// How often the directory to be watched may have become another while it was being watched.
const MAX_DIRECTORY_CHANGES: usize = 64;
/// The most events taken before the path is looked at: more than Linux keeps (`fs.inotify.max_queued_events`).
const MAX_EVENTS_AT_ONCE: usize = 32 << 10;
/// The tables of sockets, which those who do not see the commands' processes find at their process 1.
const SOCKET_TABLES: [&str; 2] = ["/proc/1/net/tcp", "/proc/1/net/tcp6"];
/// The state of a socket that listens, as the tables have it. Linux `TCP_LISTEN`.
const LISTENS: &[u8] = b"0A";

/// Something that is waited for.
pub(crate) enum Wait {
    /// A TCP port that somebody listens on.
    ///
    /// Linux tells nobody that a socket begins to listen, short of a program in the kernel or a tracer of every process. So
    /// the table of sockets is looked at again and again, with growing pauses; the caller ends the wait. Unlike a
    /// connection that is tried, a look at the table is nothing that the program sees.
    Port { port: u16, timer: OwnedFd, pause_ms: u64 },
    /// A path, told by the directory that it is to be in, or the nearest one above that is there.
    File { path: String, events: OwnedFd, watch: Option<i32> },
}

impl Wait {
    /// Begins to wait.
    pub(crate) fn new(request: Await) -> Result<Self, Failed> {
        match request.awaited.ok_or_else(|| invalid("nothing is waited for".into()))? {
            Awaited::Port(port) => {
                let port = u16::try_from(port).ok().filter(|port| *port != 0);
                let port = port.ok_or_else(|| invalid("a port is a number from 1 to 65535".into()))?;
                let timer = one_shot(FIRST_LOOK_MS).map_err(|error| internal("make a timer", error))?;
                Ok(Self::Port { port, timer, pause_ms: FIRST_LOOK_MS })
            }
            Awaited::File(path) => {
                check_path(&path)?;
                let events = inotify::init(CreateFlags::CLOEXEC | CreateFlags::NONBLOCK)
                    .map_err(|error| internal("watch directories", error))?;
                Ok(Self::File { path, events, watch: None })
            }
        }
    }

    /// What becomes readable when there is a reason to [`look`](Self::look).
    pub(crate) fn file(&self) -> BorrowedFd<'_> {
        match self {
            Self::Port { timer, .. } => timer.as_fd(),
            Self::File { events, .. } => events.as_fd(),
        }
    }

    /// Whether it has come about; otherwise [`file`](Self::file) becomes readable again.
    pub(crate) fn look(&mut self) -> Result<bool, Failed> {
        match self {
            Self::Port { port, timer, pause_ms } => {
                let mut listens = false;
                for table in SOCKET_TABLES {
                    let table = files::read(table).map_err(|error| internal("read the sockets", error))?;
                    listens |= is_listened_on(&table, *port);
                }
                if !listens {
                    *pause_ms = (*pause_ms * 2).min(LOOKS_APART_MAX_MS);
                    rearm(timer, *pause_ms).map_err(|error| internal("set a timer", error))?;
                }
                Ok(listens)
            }
            Self::File { path, events, watch } => {
                drain(events);
                look_for(path, events, watch).map_err(|error| internal(&format!("watch for {path}"), error))
            }
        }
    }
}

fn rearm(timer: &OwnedFd, ms: u64) -> Result<(), Errno> {
    // What it has counted is of no interest.
    let _ = rustix::io::read(timer, &mut [0; 8]);
    crate::session::set(timer, ms)
}

/// Whether a table as of /proc/net/tcp has a socket that listens on `port`. Linux man page `proc_pid_net(5)`.
fn is_listened_on(table: &[u8], port: u16) -> bool {
    table.split(|byte| *byte == b'\n').any(|line| {
        let mut words = line.split(u8::is_ascii_whitespace).filter(|word| !word.is_empty());
        let local = words.nth(1).and_then(|address| address.rsplit(|byte| *byte == b':').next());
        let state = words.nth(1);
        let local = local.and_then(|digits| core::str::from_utf8(digits).ok());
        state == Some(LISTENS) && local.and_then(|digits| u16::from_str_radix(digits, 16).ok()) == Some(port)
    })
}

fn drain(events: &OwnedFd) {
    let mut buffer = [MaybeUninit::uninit(); 1024];
    let mut reader = inotify::Reader::new(events, &mut buffer);
    // What happened is not asked: the path is looked at again whatever it was.
    for _ in 0..MAX_EVENTS_AT_ONCE {
        if reader.next().is_err() {
            return;
        }
    }
}

/// Whether `path` is there; if not, its directory is watched, or the nearest one above.
fn look_for(path: &str, events: &OwnedFd, watch: &mut Option<i32>) -> Result<bool, Errno> {
    for _ in 0..MAX_DIRECTORY_CHANGES {
        let nearest = watch_nearest(path, events)?;
        if rustix::fs::statat(CWD, path, AtFlags::SYMLINK_NOFOLLOW).is_ok() {
            return Ok(true);
        }
        // It was watched before it was found to be the nearest: what comes now is told.
        if *watch == Some(nearest) {
            return Ok(false);
        }
        if let Some(old) = watch.replace(nearest) {
            // It is gone when its directory is.
            let _ = inotify::remove_watch(events, old);
        }
    }
    Err(Errno::BUSY)
}

fn watch_nearest(path: &str, events: &OwnedFd) -> Result<i32, Errno> {
    let flags = WatchFlags::CREATE
        | WatchFlags::MOVED_TO
        | WatchFlags::DELETE_SELF
        | WatchFlags::MOVE_SELF
        | WatchFlags::ONLYDIR;
    let mut directory = path;
    while let Some((parent, _)) = directory.rsplit_once('/') {
        directory = parent;
        match inotify::add_watch(events, if directory.is_empty() { "/" } else { directory }, flags) {
            Err(Errno::NOENT | Errno::NOTDIR) if !directory.is_empty() => {}
            watched => return watched,
        }
    }
    Err(Errno::NOENT)
}

#[cfg(test)]
mod tests {
    extern crate std;
    use super::*;
    use alloc::string::ToString as _;
    use rustix::event::{PollFd, PollFlags, Timespec, poll};

    #[test]
    fn only_a_socket_that_listens_counts() {
        let table = b"  sl  local_address rem_address   st tx_queue rx_queue tr tm->when\n\
            \x20  0: 00000000:1F90 00000000:0000 0A 00000000:00000000 00:00000000\n\
            \x20  1: 0100007F:0050 0100007F:9C40 01 00000000:00000000 00:00000000\n";
        assert!(is_listened_on(table, 8080));
        assert!(!is_listened_on(table, 80));
        assert!(!is_listened_on(table, 0));
        let six = b"   0: 00000000000000000000000000000000:01BB 00000000000000000000000000000000:0000 0A 0\n";
        assert!(is_listened_on(six, 443));
        assert!(!is_listened_on(b"a b:zz c 0A\n0A\n\xff \xff:\xff \xff 0A", 0));
    }

    #[test]
    fn what_is_no_port_and_no_path_is_refused() {
        for awaited in [
            None,
            Some(Awaited::Port(0)),
            Some(Awaited::Port(1 << 16)),
            Some(Awaited::File("relative".into())),
            Some(Awaited::File("/a/".into())),
        ] {
            assert!(Wait::new(Await { awaited: awaited.clone() }).is_err(), "{awaited:?}");
        }
    }

    /// The test's thread waits for the event itself: without one it would hang, and fails.
    fn wait_for_event(wait: &Wait) {
        let limit = Timespec { tv_sec: 60, tv_nsec: 0 };
        let file = wait.file();
        let mut files = [PollFd::new(&file, PollFlags::IN)];
        assert_eq!(poll(&mut files, Some(&limit)), Ok(1), "nothing was told");
    }

    #[test]
    fn a_file_is_seen_through_directories_that_come_and_go() {
        let dir = tempfile::tempdir().expect("a temporary directory");
        let (a, b) = (dir.path().join("a"), dir.path().join("a/b"));
        let path = b.join("ready");
        let request = Await { awaited: Some(Awaited::File(path.to_str().expect("ASCII").to_string())) };
        let mut wait = Wait::new(request).expect("a wait");
        assert_eq!(wait.look(), Ok(false));
        let steps: [&dyn Fn() -> std::io::Result<()>; 6] = [
            &|| std::fs::create_dir(&a),
            &|| std::fs::create_dir(&b),
            &|| std::fs::remove_dir(&b),
            &|| std::fs::create_dir(&b),
            &|| std::fs::write(b.join("another"), ""),
            &|| std::fs::rename(b.join("another"), &path),
        ];
        for (index, step) in steps.iter().enumerate() {
            step().expect("a step");
            wait_for_event(&wait);
            assert_eq!(wait.look(), Ok(index == steps.len() - 1), "step {index}");
        }
    }
}
