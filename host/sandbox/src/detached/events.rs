//! What happens to the machines of a folder: two files of lines, of which the older makes way.

use std::collections::BTreeMap;
use std::fs::{self, File, OpenOptions};
use std::io::{self, Write as _};
use std::os::unix::fs::{FileExt as _, MetadataExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};

use kiln_support::lock::Lock;
use serde::{Deserialize, Serialize};

use super::{DetachedError, Machines, VmRecord, Watch, now_unix_ms};

/// The most bytes of one of the two files.
pub const EVENT_FILE_BYTES_MAX: u64 = 4 << 20;
/// The most bytes of a value of an event; the rest is left out.
const VALUE_BYTES_MAX: usize = 512;
/// One read's worth, and the most of a line.
const READ_BYTES: usize = 64 << 10;

const NEW: &str = ".events";
const OLD: &str = ".events.old";
const LOCK: &str = ".events.lock";

/// Something that happened to a machine.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Event {
    /// When, in milliseconds since 1970.
    pub time_unix_ms: u64,
    /// What.
    pub event: Happening,
    /// The machine's id.
    pub id: String,
    /// Its name.
    pub name: String,
    /// The name of its image.
    pub image: String,
    /// What else is known: of `die` the `exit_code` and `why`, of `exec_start` the `command`, and so on.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub details: BTreeMap<String, String>,
}

/// What can happen to a machine.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Happening {
    /// Its record was made.
    Create,
    /// It runs.
    Start,
    /// It stands still.
    Pause,
    /// It goes on.
    Resume,
    /// A command was started in it.
    ExecStart,
    /// A command that was started in it has ended.
    ExecEnd,
    /// A signal was sent to its main command.
    Kill,
    /// It is asked to end.
    Stop,
    /// A port of it was published.
    Expose,
    /// One is published no more.
    Unexpose,
    /// It was saved to the store.
    Snapshot,
    /// Another was made from it.
    Fork,
    /// It has ended.
    Die,
    /// Its record was removed.
    Destroy,
    /// What a later version knows.
    #[serde(other)]
    Unknown,
}

impl Happening {
    /// The name used in lists.
    pub fn name(self) -> &'static str {
        match self {
            Self::Create => "create",
            Self::Start => "start",
            Self::Pause => "pause",
            Self::Resume => "resume",
            Self::ExecStart => "exec_start",
            Self::ExecEnd => "exec_end",
            Self::Kill => "kill",
            Self::Stop => "stop",
            Self::Expose => "expose",
            Self::Unexpose => "unexpose",
            Self::Snapshot => "snapshot",
            Self::Fork => "fork",
            Self::Die => "die",
            Self::Destroy => "destroy",
            Self::Unknown => "unknown",
        }
    }
}

impl Machines {
    /// Tells who listens that something happened to a machine. What cannot be told is not: a full disk must not hold up what
    /// this is about.
    pub fn tell(&self, record: &VmRecord, event: Happening, details: &[(&str, &str)]) {
        let details = details.iter().map(|(key, value)| ((*key).to_owned(), cut(value).to_owned()));
        let event = Event {
            time_unix_ms: now_unix_ms(),
            event,
            id: record.id.clone(),
            name: record.name.clone(),
            image: record.image.reference.clone(),
            details: details.collect(),
        };
        let _ = append(&self.folder, &event, EVENT_FILE_BYTES_MAX);
    }

    /// Reads what happened, from the oldest event that is kept.
    ///
    /// # Errors
    /// [`DetachedError::Io`]
    pub fn events(&self) -> Result<EventReader, DetachedError> {
        let watch = Watch::new(&self.folder)?;
        Ok(EventReader { folder: self.folder.clone(), watch, place: None, pending: Vec::new() })
    }
}

fn cut(value: &str) -> &str {
    if value.len() <= VALUE_BYTES_MAX {
        return value;
    }
    let end = (0..=VALUE_BYTES_MAX).rev().find(|&end| value.is_char_boundary(end));
    &value[..end.unwrap_or(0)]
}

fn append(folder: &Path, event: &Event, file_bytes_max: u64) -> io::Result<()> {
    let mut line = serde_json::to_vec(event)?;
    line.push(b'\n');
    let _lock = Lock::exclusive(&folder.join(LOCK))?;
    let path = folder.join(NEW);
    if fs::metadata(&path).is_ok_and(|file| file.len() + line.len() as u64 > file_bytes_max) {
        fs::rename(&path, folder.join(OLD))?;
    }
    let mut file = OpenOptions::new().append(true).create(true).mode(0o600).open(path)?;
    let length = file.metadata()?.len();
    // One write: who reads meanwhile sees all of a line, or a start of it that is not the last word.
    let written = file.write_all(&line);
    if written.is_err() {
        let _ = file.set_len(length);
    }
    written
}

/// Reads events, also while they happen.
#[derive(Debug)]
pub struct EventReader {
    folder: PathBuf,
    watch: Watch,
    place: Option<Place>,
    /// What was read of a line whose end is still to come, after the lines that were not taken yet.
    pending: Vec<u8>,
}

#[derive(Debug)]
struct Place {
    file: File,
    inode: u64,
    offset: u64,
}

impl EventReader {
    /// The next event; `None` when none has happened yet.
    ///
    /// # Errors
    /// [`DetachedError::Io`]
    pub fn read_next(&mut self) -> Result<Option<Event>, DetachedError> {
        self.read().map_err(DetachedError::io("read the events in", &self.folder))
    }

    /// Waits for the next event. Safe to cancel.
    ///
    /// # Errors
    /// [`DetachedError::Io`]
    pub async fn wait(&mut self) -> Result<Event, DetachedError> {
        loop {
            if let Some(event) = self.read_next()? {
                return Ok(event);
            }
            self.watch.changed().await;
        }
    }

    fn read(&mut self) -> io::Result<Option<Event>> {
        loop {
            if let Some(end) = self.pending.iter().position(|&byte| byte == b'\n') {
                let line: Vec<u8> = self.pending.drain(..=end).collect();
                // A line that is none was cut short by a full disk or a crash.
                match serde_json::from_slice(&line) {
                    Ok(event) => return Ok(Some(event)),
                    Err(_) => continue,
                }
            }
            if self.fill()? || self.turn()? {
                continue;
            }
            return Ok(None);
        }
    }

    /// Reads on in the file; whether there was more.
    fn fill(&mut self) -> io::Result<bool> {
        let Some(place) = &mut self.place else { return Ok(false) };
        if self.pending.len() >= READ_BYTES {
            // No event has so long a line.
            self.pending.clear();
        }
        let mut buffer = vec![0; READ_BYTES];
        let count = place.file.read_at(&mut buffer, place.offset)?;
        place.offset += count as u64;
        self.pending.extend_from_slice(&buffer[..count]);
        Ok(count > 0)
    }

    /// Goes on to the file after this one; whether there is something to read that was not there before.
    fn turn(&mut self) -> io::Result<bool> {
        let here = self.place.as_ref().map(|place| place.inode);
        let mut next = None;
        for name in [NEW, OLD] {
            match File::open(self.folder.join(name)) {
                Err(error) if error.kind() == io::ErrorKind::NotFound => {}
                opened => {
                    let file = opened?;
                    let inode = file.metadata()?.ino();
                    if Some(inode) == here {
                        break;
                    }
                    next = Some(Place { file, inode, offset: 0 });
                }
            }
        }
        let Some(next) = next else { return Ok(false) };
        // Something may have been written since it was read; nothing will be any more.
        if self.fill()? {
            return Ok(true);
        }
        self.pending.clear();
        self.place = Some(next);
        Ok(true)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn event(index: u64) -> Event {
        Event {
            time_unix_ms: index,
            event: Happening::Start,
            id: "0123456789ab".into(),
            name: "web".into(),
            image: "demo".into(),
            details: BTreeMap::new(),
        }
    }

    fn machines() -> (tempfile::TempDir, Machines) {
        let root = tempfile::tempdir().expect("a folder");
        let machines = Machines::open(root.path().join("vms")).expect("a folder in it");
        (root, machines)
    }

    fn times(reader: &mut EventReader) -> Vec<u64> {
        std::iter::from_fn(|| reader.read_next().expect("readable")).map(|event| event.time_unix_ms).collect()
    }

    #[tokio::test]
    async fn one_who_follows_misses_nothing_and_one_who_comes_late_the_oldest() {
        let (_root, machines) = machines();
        let mut reader = machines.events().expect("readable");
        assert!(times(&mut reader).is_empty());
        let mut followed = Vec::new();
        for index in 0..100 {
            append(&machines.folder, &event(index), 1000).expect("written");
            followed.extend(times(&mut reader));
        }
        assert_eq!(followed, (0..100).collect::<Vec<_>>());
        let size: u64 = [NEW, OLD]
            .map(|name| fs::metadata(machines.folder.join(name)).expect("there").len())
            .iter()
            .sum();
        assert!(size <= 2000, "{size}");
        let late = times(&mut machines.events().expect("readable"));
        assert!(late.len() < 100);
        assert_eq!(late, (100 - late.len() as u64..100).collect::<Vec<_>>());
    }

    #[tokio::test]
    async fn a_line_that_is_none_is_passed_over() {
        let (_root, machines) = machines();
        append(&machines.folder, &event(1), 1000).expect("written");
        let mut file = OpenOptions::new().append(true).open(machines.folder.join(NEW)).expect("there");
        file.write_all(b"{\"time_un\n\xff\n").expect("written");
        append(&machines.folder, &event(2), 1000).expect("written");
        let mut reader = machines.events().expect("readable");
        assert_eq!(times(&mut reader), [1, 2]);
        file.write_all(b"{\"event\":").expect("written");
        assert!(times(&mut reader).is_empty());
        file.write_all(b"7}\n").expect("written");
        append(&machines.folder, &event(3), 1000).expect("written");
        assert_eq!(reader.wait().await.expect("readable").time_unix_ms, 3);
    }

    #[test]
    fn a_long_value_is_cut_between_characters() {
        assert_eq!(cut("short"), "short");
        let long = "ä".repeat(VALUE_BYTES_MAX);
        assert_eq!(cut(&format!("x{long}")).len(), VALUE_BYTES_MAX - 1);
    }
}
