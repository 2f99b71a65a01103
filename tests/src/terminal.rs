//! A program on a terminal, as a person has it: a pseudoterminal that is its controlling one.

use std::fs::File;
use std::io::{Read as _, Write as _};
use std::os::fd::OwnedFd;
use std::process::{Child, Command, ExitStatus};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::process::{Pid, PidfdFlags, Signal, kill_process, pidfd_open};
use rustix::pty::{OpenptFlags, grantpt, openpt, ptsname, unlockpt};
use rustix::termios::{LocalModes, Termios, Winsize, tcgetattr, tcsetwinsize};

/// How long anything on a terminal may take before the test fails.
const LIMIT: Timespec = Timespec { tv_sec: 900, tv_nsec: 0 };

/// A program on a terminal.
#[derive(Debug)]
pub struct Terminal {
    child: Child,
    /// The side a person sits at.
    person: File,
    /// The side the program has, held open so that its modes can be looked at.
    program: File,
    /// Everything the program wrote.
    screen: Vec<u8>,
    /// Readable once the program has ended.
    exit: OwnedFd,
}

impl Terminal {
    /// Starts `command` on a new terminal of this size.
    pub fn start(command: &Command, rows: u16, columns: u16) -> Self {
        let person =
            openpt(OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC).expect("a pseudoterminal");
        grantpt(&person).and_then(|()| unlockpt(&person)).expect("the pseudoterminal is ours");
        let name = ptsname(&person, Vec::new()).expect("the pseudoterminal has a name");
        let name = name.to_str().expect("the name is ASCII");
        let program = File::options().read(true).write(true).open(name).expect("the pseudoterminal opens");
        let terminal = |file: &File| file.try_clone().expect("a descriptor");
        // setsid makes its stdin the controlling terminal and becomes the program.
        let mut setsid = Command::new("setsid");
        setsid.arg("--ctty").arg(command.get_program()).args(command.get_args());
        for (name, value) in command.get_envs() {
            match value {
                Some(value) => setsid.env(name, value),
                None => setsid.env_remove(name),
            };
        }
        setsid.stdin(terminal(&program)).stdout(terminal(&program)).stderr(terminal(&program));
        let child = setsid.spawn().expect("setsid starts");
        let exit = pidfd_open(Pid::from_child(&child), PidfdFlags::empty()).expect("our child has a pidfd");
        let mut terminal = Self { child, person: person.into(), program, screen: Vec::new(), exit };
        terminal.resize(rows, columns);
        terminal
    }

    /// The program's process id.
    pub fn pid(&self) -> Pid {
        Pid::from_child(&self.child)
    }

    /// Gives the terminal another size, as dragging a window does.
    pub fn resize(&mut self, rows: u16, columns: u16) {
        let size = Winsize { ws_row: rows, ws_col: columns, ws_xpixel: 0, ws_ypixel: 0 };
        tcsetwinsize(&self.person, size).expect("the size is set");
    }

    /// Types.
    pub fn type_in(&mut self, keys: &str) {
        self.person.write_all(keys.as_bytes()).expect("the terminal takes keys");
    }

    /// Reads the screen until it shows `text`; a failure shows the screen.
    #[track_caller]
    pub fn wait_for(&mut self, text: &str) {
        let mut buffer = [0; 4096];
        loop {
            if let Some(at) = self.screen.windows(text.len()).position(|window| window == text.as_bytes()) {
                self.screen.drain(..at + text.len());
                return;
            }
            // Our own handle of the program's side keeps the terminal from ending, so the program's end is seen here.
            let mut fds = [PollFd::new(&self.person, PollFlags::IN), PollFd::new(&self.exit, PollFlags::IN)];
            poll(&mut fds, Some(&LIMIT)).expect("a terminal can be waited for");
            let is_readable = fds[0].revents().contains(PollFlags::IN);
            assert!(is_readable, "{text:?} never came: {}", String::from_utf8_lossy(&self.screen));
            let count = self.person.read(&mut buffer).expect("the terminal is read");
            self.screen.extend_from_slice(&buffer[..count]);
        }
    }

    /// The terminal's modes.
    pub fn modes(&self) -> Termios {
        tcgetattr(&self.program).expect("a terminal has modes")
    }

    /// Whether what is typed is edited and echoed by the terminal, as it is for a shell.
    pub fn is_cooked(&self) -> bool {
        self.modes().local_modes.contains(LocalModes::ICANON | LocalModes::ECHO | LocalModes::ISIG)
    }

    /// Sends the program a signal.
    pub fn signal(&self, signal: Signal) {
        kill_process(self.pid(), signal).expect("the process is there");
    }

    /// Waits for the program's end.
    pub fn finish(&mut self) -> ExitStatus {
        poll(&mut [PollFd::new(&self.exit, PollFlags::IN)], Some(&LIMIT)).expect("a pidfd can be waited for");
        let status = self.child.try_wait().expect("the program is waited for");
        status.expect("the program ends within the limit")
    }
}

impl Drop for Terminal {
    fn drop(&mut self) {
        // It may have ended by itself.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
