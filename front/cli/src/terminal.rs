//! The caller's terminal: its size, and raw mode that ends whatever happens.

use std::io::{self, Write};
use std::os::fd::BorrowedFd;
use std::sync::{Mutex, Once, PoisonError};

use kiln::WindowSize;
use rustix::termios::{OptionalActions, Termios, tcgetattr, tcgetwinsize, tcsetattr};

/// The settings to go back to, while the terminal is raw.
static BEFORE: Mutex<Option<Termios>> = Mutex::new(None);

/// Raw mode of the terminal at stdin; ends when dropped, and before a panic is reported.
#[derive(Debug)]
pub(crate) struct RawMode(());

impl RawMode {
    /// Has each byte typed pass as it is: no echo, no lines, no signals by key.
    ///
    /// # Errors
    /// When stdin is no terminal.
    pub(crate) fn enter() -> io::Result<Self> {
        static HOOK: Once = Once::new();
        // A release build ends at once on a panic, so that no destructor would run.
        HOOK.call_once(|| {
            let report = std::panic::take_hook();
            std::panic::set_hook(Box::new(move |panic| {
                restore();
                report(panic);
            }));
        });
        let stdin = rustix::stdio::stdin();
        let before = tcgetattr(stdin)?;
        let mut raw = before.clone();
        raw.make_raw();
        *saved() = Some(before);
        tcsetattr(stdin, OptionalActions::Drain, &raw).inspect_err(|_| *saved() = None)?;
        Ok(Self(()))
    }
}

impl Drop for RawMode {
    fn drop(&mut self) {
        restore();
    }
}

fn restore() {
    if let Some(before) = saved().take() {
        // A terminal that is gone needs no restoring.
        let _ = tcsetattr(rustix::stdio::stdin(), OptionalActions::Drain, &before);
    }
}

fn saved() -> std::sync::MutexGuard<'static, Option<Termios>> {
    BEFORE.lock().unwrap_or_else(PoisonError::into_inner)
}

/// The size of the caller's terminal, or of an ordinary one when it has none.
pub(crate) fn size() -> WindowSize {
    let known =
        |stream: BorrowedFd<'_>| tcgetwinsize(stream).ok().filter(|size| size.ws_row > 0 && size.ws_col > 0);
    match known(rustix::stdio::stdout()).or_else(|| known(rustix::stdio::stdin())) {
        Some(size) => WindowSize { rows: size.ws_row.into(), columns: size.ws_col.into() },
        None => WindowSize { rows: 24, columns: 80 },
    }
}

/// Shows a warning.
pub(crate) fn warn(line: &str) {
    note(&format!("warning: {}", printable(line)));
}

/// `text` as one line that only shows: what an image, a registry or a guest put into a message must not move the cursor,
/// set a title or forge a line of ours.
pub(crate) fn printable(text: &str) -> String {
    let mut line = String::with_capacity(text.len());
    for character in text.chars() {
        if character.is_control() {
            line.extend(character.escape_default());
        } else {
            line.push(character);
        }
    }
    line
}

/// Shows a line on stderr, also while the terminal is raw.
pub(crate) fn note(line: &str) {
    let end = if saved().is_some() { "\r\n" } else { "\n" };
    // A line nobody can see is no reason to stop.
    let _ = write!(io::stderr(), "{line}{end}");
}
