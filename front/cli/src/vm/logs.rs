//! `kiln logs`.

use std::io::{self, Write};

use indicatif::HumanBytes;
use kiln::detached::{LogEntry, LogReader, LogStream, Machines};

use super::args::Logs;
use crate::Context;
use crate::failure::Failure;
use crate::quantity::Lines;
use crate::terminal::note;
use crate::when::UnixNs;

/// Prints what the command of a VM wrote, and with `--follow` what it writes until the VM ends.
///
/// # Errors
/// When there is no such VM, it has no command, or its log cannot be read or printed.
pub(crate) async fn logs(context: &Context, machines: &Machines, args: &Logs) -> Result<(), Failure> {
    let record = machines.find(&args.vm)?;
    if record.main.is_none() {
        return Err(Failure::caller(format!("the VM {} runs no command of its own", record.name))
            .hint("only what `kiln run -d` started has a log"));
    }
    let (mut reader, mut watch) = machines.log(&record.name)?;
    let since = args.since.unwrap_or(UnixNs(0));
    let skipped = match args.tail {
        Lines::All => 0,
        Lines::Last(lines) => {
            let all = count(machines.log(&record.name)?.0, since)?;
            all.saturating_sub(lines)
        }
    };
    let (stdout, stderr) = (io::stdout().lock(), io::stderr());
    let mut printer = Printer::new(stdout, stderr, args.timestamps, since, skipped);
    let mut over = !args.follow;
    let ended = machines.ended(&record.name);
    tokio::pin!(ended);
    loop {
        while let Some(entry) = reader.read_next()? {
            match printer.print(&entry) {
                Err(error) if error.kind() == io::ErrorKind::BrokenPipe => return Ok(()),
                Err(error) => return Err(Failure::host(format!("cannot print the log: {error}"))),
                Ok(missing) if missing > 0 && !context.global.quiet => {
                    note(&format!("note: {} of the log are missing here", HumanBytes(missing)));
                }
                Ok(_) => {}
            }
        }
        match printer.stdout.flush() {
            Err(error) if error.kind() == io::ErrorKind::BrokenPipe => return Ok(()),
            flushed => flushed.map_err(Failure::host)?,
        }
        if over {
            return Ok(());
        }
        tokio::select! {
            () = watch.changed() => {}
            // However it ended: all it wrote is there now.
            _ = &mut ended => over = true,
        }
    }
}

/// The number of lines in a log that arrived at `since` or later.
fn count(mut reader: LogReader, since: UnixNs) -> Result<u64, Failure> {
    let mut printer = Printer::new(io::sink(), io::sink(), false, since, 0);
    while let Some(entry) = reader.read_next()? {
        printer.print(&entry).map_err(Failure::host)?;
    }
    Ok(printer.lines)
}

/// Prints lines: those that began at some time or later, without the first of them.
struct Printer<O, E> {
    stdout: O,
    stderr: E,
    timestamps: bool,
    since: UnixNs,
    /// Lines that are not printed.
    skipped: u64,
    /// Lines that began so far.
    lines: u64,
    streams: [Stream; 2],
}

/// Where a stream is.
#[derive(Clone, Copy)]
struct Stream {
    at_start: bool,
    /// Its line is one that is printed.
    shown: bool,
}

impl<O: Write, E: Write> Printer<O, E> {
    fn new(stdout: O, stderr: E, timestamps: bool, since: UnixNs, skipped: u64) -> Self {
        let streams = [Stream { at_start: true, shown: false }; 2];
        Self { stdout, stderr, timestamps, since, skipped, lines: 0, streams }
    }

    /// Prints what is to be printed of an entry. Returns how many bytes are missing in its place.
    fn print(&mut self, entry: &LogEntry) -> io::Result<u64> {
        let (stream, unix_ns, bytes) = match entry {
            LogEntry::Lost { bytes } if self.lines >= self.skipped => return Ok(*bytes),
            LogEntry::Lost { .. } => return Ok(0),
            LogEntry::Output { stream, unix_ns, bytes } => (*stream, *unix_ns, bytes),
        };
        for piece in bytes.split_inclusive(|&byte| byte == b'\n') {
            let state = &mut self.streams[usize::from(stream == LogStream::Stderr)];
            let begins = state.at_start;
            if begins {
                let wanted = UnixNs(unix_ns) >= self.since;
                self.lines += u64::from(wanted);
                state.shown = wanted && self.lines > self.skipped;
            }
            state.at_start = piece.ends_with(b"\n");
            if !state.shown {
                continue;
            }
            let to: &mut dyn Write = match stream {
                LogStream::Stdout => &mut self.stdout,
                LogStream::Stderr => &mut self.stderr,
            };
            if begins && self.timestamps {
                write!(to, "{} ", UnixNs(unix_ns).shown(9))?;
            }
            to.write_all(piece)?;
        }
        Ok(0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn out(unix_ns: u64, text: &str) -> LogEntry {
        LogEntry::Output { stream: LogStream::Stdout, unix_ns, bytes: text.into() }
    }

    fn err(unix_ns: u64, text: &str) -> LogEntry {
        LogEntry::Output { stream: LogStream::Stderr, unix_ns, bytes: text.into() }
    }

    fn printed(entries: &[LogEntry], timestamps: bool, since: u64, skipped: u64) -> (String, String, u64) {
        let mut printer = Printer::new(Vec::new(), Vec::new(), timestamps, UnixNs(since), skipped);
        for entry in entries {
            printer.print(entry).expect("memory takes it");
        }
        let text = |bytes| String::from_utf8(bytes).expect("text");
        (text(printer.stdout), text(printer.stderr), printer.lines)
    }

    #[test]
    fn lines_are_counted_over_both_streams_however_they_are_cut() {
        let entries = [out(1, "on"), err(2, "x\ny"), out(3, "e\ntwo\n"), err(4, "\n"), out(5, "rest")];
        assert_eq!(printed(&entries, false, 0, 0), ("one\ntwo\nrest".into(), "x\ny\n".into(), 5));
        assert_eq!(printed(&entries, false, 0, 2), ("two\nrest".into(), "y\n".into(), 5));
        assert_eq!(printed(&entries, false, 0, 4), ("rest".into(), String::new(), 5));
        // A line belongs to the moment at which it began.
        assert_eq!(printed(&entries, false, 3, 0), ("two\nrest".into(), String::new(), 2));
    }

    #[test]
    fn each_line_has_the_time_at_which_it_began() {
        let (stdout, ..) = printed(&[out(1, "a"), out(2, "b\nc\n")], true, 0, 0);
        let start = "1970-01-01T00:00:00.00000000";
        assert_eq!(stdout, format!("{start}1Z ab\n{start}2Z c\n"));
    }

    #[test]
    fn what_is_missing_before_the_last_lines_is_not_told() {
        let lost = LogEntry::Lost { bytes: 7 };
        let mut printer = Printer::new(Vec::new(), Vec::new(), false, UnixNs(0), 1);
        assert_eq!(printer.print(&lost).expect("printed"), 0);
        printer.print(&out(1, "x\n")).expect("printed");
        assert_eq!(printer.print(&lost).expect("printed"), 7);
    }
}
