//! Signals this process gets, for the command it stands for.

use std::io;

use tokio::signal::unix::{Signal, SignalKind, signal};

/// Of the signals that mean "end", the one at which asking is over.
const LAST_REQUEST: u32 = 3;

/// What a signal asks for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Wish {
    /// The command is to get this signal.
    Pass(u8),
    /// The command is to stop as its image wants it: SIGTERM.
    Stop,
    /// The terminal has another size.
    Resize,
    /// Everything ends now: asked for too often.
    End,
}

/// The signals this process catches instead of dying of them.
#[derive(Debug)]
pub(crate) struct Signals {
    interrupt: Signal,
    terminate: Signal,
    hangup: Signal,
    quit: Signal,
    user1: Signal,
    user2: Signal,
    window: Signal,
    requests: u32,
}

impl Signals {
    /// Catches signals from here on.
    ///
    /// # Errors
    /// When the process is out of descriptors.
    pub(crate) fn catch() -> io::Result<Self> {
        Ok(Self {
            interrupt: signal(SignalKind::interrupt())?,
            terminate: signal(SignalKind::terminate())?,
            hangup: signal(SignalKind::hangup())?,
            quit: signal(SignalKind::quit())?,
            user1: signal(SignalKind::user_defined1())?,
            user2: signal(SignalKind::user_defined2())?,
            window: signal(SignalKind::window_change())?,
            requests: 0,
        })
    }

    /// Waits for the next signal. Safe to cancel.
    pub(crate) async fn next(&mut self) -> Wish {
        let wish = tokio::select! {
            _ = self.interrupt.recv() => Wish::Pass(2),
            _ = self.terminate.recv() => Wish::Stop,
            _ = self.hangup.recv() => Wish::Pass(1),
            _ = self.quit.recv() => Wish::Pass(3),
            _ = self.user1.recv() => Wish::Pass(10),
            _ = self.user2.recv() => Wish::Pass(12),
            _ = self.window.recv() => Wish::Resize,
        };
        if matches!(wish, Wish::Pass(2) | Wish::Stop) {
            self.requests += 1;
            if self.requests >= LAST_REQUEST {
                return Wish::End;
            }
        }
        wish
    }

    /// Waits for a signal that ends a process which has no command yet, and returns its number.
    pub(crate) async fn fatal(&mut self) -> u8 {
        loop {
            match self.next().await {
                Wish::Pass(number) => return number,
                Wish::Stop | Wish::End => return 15,
                Wish::Resize => {}
            }
        }
    }
}
