//! Files and trees that come in and go out on a connection.
//!
//! They are written and read as root, in the guest's own root: links, however hostile, end inside it. What is not complete
//! when its connection is lost goes with it.

use alloc::format;
use alloc::string::String;
use alloc::vec::Vec;

use kiln_protocol::frame::{self, HEADER_BYTES, Kind, ToAgent};
use kiln_protocol::{
    Done, Entry, Failed, Get, MAX_DATA_BYTES, MAX_STAGED_FILES, Outcome, Put, PutNaming, Reason, StagedFile,
};
use kiln_tree::{Failure, Limits, Naming, Owner, Place, Step, Walker, Writer};
use rustix::fs::FileType;
use rustix::io::Errno;

use crate::failure::{failed, internal, invalid, text};
use crate::session::Violation;

/// What is made ready to be sent at a time: the other connections have their turn then.
const TURN_BYTES: usize = 16 << 10;
/// A tree that comes in is as large as the host wants and the guest's disk allows.
const LIMITS: Limits = Limits { entries: u64::MAX, bytes: u64::MAX, mode: 0o7777 };

/// A tree that is being written.
pub(crate) struct Receiving {
    /// `None` once that has failed: what is still under way is not looked at.
    writer: Option<Writer>,
}

/// A tree that is being read.
pub(crate) struct Sending {
    walker: Walker,
}

impl Receiving {
    pub(crate) fn begin(put: &Put) -> Result<Self, Failed> {
        check(&put.path)?;
        let naming = match PutNaming::try_from(put.naming) {
            Ok(PutNaming::Exact) => Naming::Exact,
            Ok(PutNaming::Into) => Naming::Into(&put.name),
            Ok(PutNaming::Contents) => Naming::Contents,
            Err(_) => return Err(invalid("a tree is to be named in no known way".into())),
        };
        let owner = if put.keep_owner { Owner::Kept } else { Owner::Of(0, 0) };
        let place = Place::find(&put.path, naming).map_err(|failure| refusal(&failure))?;
        Ok(Self { writer: Some(Writer::new(place, owner, LIMITS)) })
    }

    /// Takes a frame in; an outcome is the end.
    pub(crate) fn take(&mut self, frame: ToAgent<'_>) -> Result<Option<Outcome>, Violation> {
        let Some(writer) = &mut self.writer else { return Ok(None) };
        let taken = match frame {
            ToAgent::Entry(entry) => writer.entry(entry),
            ToAgent::Data(bytes) => writer.data(bytes),
            ToAgent::End => match self.writer.take().map(Writer::finish) {
                Some(Err(failure)) => Err(failure),
                _ => return Ok(Some(Outcome::Done(Done {}))),
            },
            _ => return Err(Violation),
        };
        Ok(taken.err().map(|failure| {
            self.writer = None;
            Outcome::Failed(refusal(&failure))
        }))
    }
}

impl Sending {
    pub(crate) fn begin(get: &Get) -> Result<Self, Failed> {
        check(&get.path)?;
        let walker = if get.file { Walker::file(&get.path) } else { Walker::tree(&get.path) };
        Ok(Self { walker: walker.map_err(|failure| refusal(&failure))? })
    }

    /// Appends what comes next to `out`; an outcome is the end.
    pub(crate) fn advance(&mut self, out: &mut Vec<u8>) -> Option<Outcome> {
        while out.len() < TURN_BYTES {
            let start = out.len();
            out.extend_from_slice(&[0; HEADER_BYTES]);
            let step = self.walker.next(out, MAX_DATA_BYTES);
            if let Ok(Step::Data(bytes)) = step {
                out[start..start + HEADER_BYTES].copy_from_slice(&frame::header(Kind::Data, bytes));
                continue;
            }
            out.truncate(start);
            match step {
                Ok(Step::Entry(entry)) => frame::append_message(out, Kind::Entry, &entry),
                Ok(_) => return Some(Outcome::Done(Done {})),
                Err(failure) => return Some(Outcome::Failed(refusal(&failure))),
            }
        }
        None
    }
}

/// Writes the files that a command is to find.
pub(crate) fn stage(files: &[StagedFile]) -> Result<(), Failed> {
    if files.len() > MAX_STAGED_FILES {
        return Err(invalid(format!("more than {MAX_STAGED_FILES} files for a command")));
    }
    for file in files {
        check(&file.path)?;
        let entry =
            Entry { mode: FileType::RegularFile.as_raw_mode() | (file.mode & 0o7777), ..Entry::default() };
        let written = Place::find(&file.path, Naming::Exact).and_then(|place| {
            let mut writer = Writer::new(place, Owner::Of(0, 0), LIMITS);
            writer.entry(entry)?;
            writer.data(&file.contents)?;
            writer.finish()
        });
        written.map_err(|failure| refusal(&failure))?;
    }
    Ok(())
}

fn check(path: &[u8]) -> Result<(), Failed> {
    if path.starts_with(b"/") {
        return Ok(());
    }
    Err(invalid(format!("'{}' is not an absolute path", String::from_utf8_lossy(path))))
}

/// A device that fails is the guest's fault, and all else that of the path.
fn refusal(failure: &Failure) -> Failed {
    let Failure { action, path, error } = failure;
    let path = String::from_utf8_lossy(path);
    let message = || format!("cannot {action} {path}: {}", text(*error));
    match *error {
        Errno::IO | Errno::NOMEM | Errno::MFILE | Errno::NFILE => {
            internal(&format!("{action} {path}"), *error)
        }
        Errno::NOENT => failed(Reason::NotFound, message()),
        _ => invalid(message()),
    }
}
