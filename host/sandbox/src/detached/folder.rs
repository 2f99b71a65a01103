//! The folder of detached machines.

use std::fs::{self, DirBuilder, File, OpenOptions};
use std::io::{self, Read};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::PathBuf;

use kiln_support::durable;
use kiln_support::lock::Lock;

use super::log::{LogReader, LogWriter};
use super::{DetachedError, Exit, Happening, VmRecord, Watch, is_vm_name, now_unix_ms};

/// The most machines one folder has.
const MACHINES_MAX: usize = 4096;
/// The most bytes of a record.
const RECORD_BYTES_MAX: u64 = 4 << 20;
/// The fewest digits that may stand for an id.
const ID_DIGITS_MIN: usize = 4;

/// The folder's lock.
const LOCK: &str = ".lock";
const RECORD: &str = "vm.json";
const LIFE: &str = "life";
/// Where the keeper answers.
pub(super) const SOCKET: &str = "socket";
const LOG: &str = "log";

/// The detached machines of a folder: its owner's alone, for whoever reaches a machine's socket owns the machine.
#[derive(Clone, Debug)]
pub struct Machines {
    pub(super) folder: PathBuf,
}

/// A name that is about to be a machine's; the machine is there with [`Creation::put`].
#[derive(Debug)]
pub struct Creation {
    machines: Machines,
    name: String,
    _lock: Lock,
}

/// The right to keep a machine, which one process at a time has, for as long as it lives.
#[derive(Debug)]
pub struct Life {
    pub(super) machines: Machines,
    pub(super) record: VmRecord,
    _lock: Lock,
}

/// What [`Machines::list`] finds.
#[derive(Debug, Default)]
pub(super) struct Found {
    pub(super) sound: Vec<VmRecord>,
    pub(super) damaged: Vec<String>,
}

impl Machines {
    /// The machines in `folder`, which is made when it is missing.
    ///
    /// # Errors
    /// [`DetachedError::Io`]
    pub fn open(folder: impl Into<PathBuf>) -> Result<Self, DetachedError> {
        let folder = folder.into();
        let above = folder.parent().map_or(Ok(()), fs::create_dir_all);
        let made = above.and_then(|()| match DirBuilder::new().mode(0o700).create(&folder) {
            Err(_) if folder.is_dir() => Ok(()),
            made => made,
        });
        made.map_err(DetachedError::io("make the folder", &folder))?;
        Ok(Self { folder })
    }

    /// Keeps a name for a machine that is to be made, until what is returned is dropped. Held for moments: nobody else makes
    /// or removes machines meanwhile.
    ///
    /// # Errors
    /// [`DetachedError::Name`], [`DetachedError::NameTaken`], [`DetachedError::TooMany`], [`DetachedError::Io`].
    pub fn create(&self, name: &str) -> Result<Creation, DetachedError> {
        if !is_vm_name(name) {
            return Err(DetachedError::Name(name.to_owned()));
        }
        let lock = self.lock()?;
        // A folder without a record is what a crash left of a creation or a removal.
        if self.path(name, RECORD).exists() {
            return Err(DetachedError::NameTaken(name.to_owned()));
        }
        let others = self.names()?;
        if others.len() >= MACHINES_MAX {
            return Err(DetachedError::TooMany(others.len()));
        }
        Ok(Creation { machines: self.clone(), name: name.to_owned(), _lock: lock })
    }

    /// All machines, the oldest first, and beside them the names of those whose records are damaged.
    ///
    /// # Errors
    /// [`DetachedError::Io`]
    pub fn list(&self) -> Result<(Vec<VmRecord>, Vec<String>), DetachedError> {
        let Found { mut sound, damaged } = self.look()?;
        sound.sort_by(|a, b| (a.created_unix_ms, &a.name).cmp(&(b.created_unix_ms, &b.name)));
        Ok((sound, damaged))
    }

    /// The machine with this name, or the one whose id starts so.
    ///
    /// # Errors
    /// [`DetachedError::Unknown`], [`DetachedError::Damaged`], [`DetachedError::Io`].
    pub fn find(&self, name: &str) -> Result<VmRecord, DetachedError> {
        let unknown = || DetachedError::Unknown(name.to_owned());
        if !is_vm_name(name) {
            return Err(unknown());
        }
        if let Some(record) = self.read(name)? {
            return Ok(record);
        }
        if name.len() < ID_DIGITS_MIN {
            return Err(unknown());
        }
        let mut found = self.look()?.sound.into_iter().filter(|record| record.id.starts_with(name));
        found.next().filter(|_| found.next().is_none()).ok_or_else(unknown)
    }

    /// Takes the right to keep a machine.
    ///
    /// # Errors
    /// [`DetachedError::Running`] when somebody else has it; otherwise as [`find`](Self::find).
    pub fn keep(&self, name: &str) -> Result<Life, DetachedError> {
        let _lock = self.lock()?;
        let record = self.find(name)?;
        let life = self.try_life(&record.name)?;
        let life = life.ok_or_else(|| DetachedError::Running(record.name.clone()))?;
        Ok(Life { machines: self.clone(), record, _lock: life })
    }

    /// Removes a machine that has no keeper: its record, and all that is beside it. A damaged one goes by its whole name.
    ///
    /// # Errors
    /// [`DetachedError::Running`] when it has one; otherwise as [`find`](Self::find).
    pub fn remove(&self, name: &str) -> Result<String, DetachedError> {
        let _lock = self.lock()?;
        let (name, record) = match self.find(name) {
            Ok(record) => (record.name.clone(), Some(record)),
            Err(DetachedError::Damaged { name, .. }) => (name, None),
            Err(error) => return Err(error),
        };
        let Some(_life) = self.try_life(&name)? else { return Err(DetachedError::Running(name)) };
        self.erase(&name)?;
        if let Some(record) = record {
            self.tell(&record, Happening::Destroy, &[]);
        }
        Ok(name)
    }

    /// Removes all that is known of a machine, with the folder's lock and the right to keep it held.
    fn erase(&self, name: &str) -> Result<(), DetachedError> {
        // The record first: what is left without one is nothing.
        let record = self.path(name, RECORD);
        fs::remove_file(&record).map_err(DetachedError::io("remove", &record))?;
        self.clear(name)
    }

    /// Puts right what crashes have left: a machine whose keeper is gone has ended, and is removed when it was to be. Returns
    /// the names of those.
    ///
    /// # Errors
    /// [`DetachedError::Io`]
    pub fn reconcile(&self) -> Result<Vec<String>, DetachedError> {
        let is_left =
            |record: &VmRecord| Ok::<_, DetachedError>(record.state.is_up() && !self.is_kept(&record.name)?);
        let mut suspects = Vec::new();
        {
            let _lock = self.lock()?;
            for name in self.names()? {
                match self.read(&name) {
                    Ok(Some(record)) if is_left(&record)? => suspects.push(record),
                    Ok(None) => self.clear(&name)?,
                    Ok(Some(_)) | Err(DetachedError::Damaged { .. }) => {}
                    Err(error) => return Err(error),
                }
            }
            for record in &mut suspects {
                let why = "its keeper died, and the machine with it";
                record.ended(why.to_owned(), Exit::KILLED, now_unix_ms());
                if record.remove_when_ended {
                    self.erase(&record.name)?;
                    self.tell_end(record);
                    continue;
                }
                self.write(record)?;
                self.tell_end(record);
                let socket = self.path(&record.name, SOCKET);
                fs::remove_file(&socket)
                    .or_else(ignore_missing)
                    .map_err(DetachedError::io("remove", &socket))?;
            }
        }
        Ok(suspects.into_iter().map(|record| record.name).collect())
    }

    /// Tells of an end, and of the removal that comes with it.
    pub(super) fn tell_end(&self, record: &VmRecord) {
        let code = record.exit.map_or(0, |exit| exit.code).to_string();
        let why = record.end.as_deref().unwrap_or_default();
        self.tell(record, Happening::Die, &[("exit_code", &code), ("why", why)]);
        if record.remove_when_ended {
            self.tell(record, Happening::Destroy, &[]);
        }
    }

    /// What the main command of a machine wrote, and a watch that tells of more.
    ///
    /// # Errors
    /// [`DetachedError::Io`]
    pub fn log(&self, name: &str) -> Result<(LogReader, Watch), DetachedError> {
        let folder = self.folder_of(name);
        let watch = Watch::new(&folder)?;
        Ok((LogReader::new(folder), watch))
    }

    /// The folder of a machine.
    pub fn folder_of(&self, name: &str) -> PathBuf {
        self.folder.join(name)
    }

    /// The file that a machine's keeper writes to, made empty.
    ///
    /// # Errors
    /// [`DetachedError::Io`]
    pub fn new_log(&self, name: &str) -> Result<File, DetachedError> {
        let path = self.path(name, LOG);
        OpenOptions::new()
            .append(true)
            .create(true)
            .mode(0o600)
            .open(&path)
            .and_then(|file| file.set_len(0).map(|()| file))
            .map_err(DetachedError::io("write", &path))
    }

    pub(super) fn write(&self, record: &VmRecord) -> Result<(), DetachedError> {
        let path = self.path(&record.name, RECORD);
        let failed = DetachedError::io("write", &path);
        let mut text = match serde_json::to_vec_pretty(record) {
            Ok(text) => text,
            Err(error) => return Err(failed(error.into())),
        };
        text.push(b'\n');
        durable::write(&path, &text).map_err(failed)
    }

    fn read(&self, name: &str) -> Result<Option<VmRecord>, DetachedError> {
        let path = self.path(name, RECORD);
        let mut text = Vec::new();
        match File::open(&path).and_then(|file| file.take(RECORD_BYTES_MAX).read_to_end(&mut text)) {
            Ok(_) => {}
            Err(error) if is_missing(&error) => return Ok(None),
            Err(error) => return Err(DetachedError::io("read", &path)(error)),
        }
        let damaged = |why: String| DetachedError::Damaged { name: name.to_owned(), why };
        let record: VmRecord = serde_json::from_slice(&text).map_err(|error| damaged(error.to_string()))?;
        if record.name == name {
            Ok(Some(record))
        } else {
            Err(damaged(format!("it is that of {}", record.name)))
        }
    }

    fn look(&self) -> Result<Found, DetachedError> {
        let mut found = Found::default();
        for name in self.names()? {
            match self.read(&name) {
                Ok(Some(record)) => found.sound.push(record),
                // About to be created, or being removed.
                Ok(None) => {}
                Err(DetachedError::Damaged { name, .. }) => found.damaged.push(name),
                Err(error) => return Err(error),
            }
        }
        Ok(found)
    }

    fn names(&self) -> Result<Vec<String>, DetachedError> {
        let mut names = Vec::new();
        for entry in fs::read_dir(&self.folder).map_err(DetachedError::io("list", &self.folder))? {
            let entry = entry.map_err(DetachedError::io("list", &self.folder))?;
            // A stranger's file is none of our business.
            if let Ok(name) = entry.file_name().into_string()
                && is_vm_name(&name)
                && entry.file_type().is_ok_and(|kind| kind.is_dir())
            {
                names.push(name);
            }
        }
        Ok(names)
    }

    fn clear(&self, name: &str) -> Result<(), DetachedError> {
        let folder = self.folder_of(name);
        fs::remove_dir_all(&folder)
            .or_else(ignore_missing)
            .and_then(|()| durable::sync_directory(&self.folder))
            .map_err(DetachedError::io("remove", &folder))
    }

    fn lock(&self) -> Result<Lock, DetachedError> {
        let path = self.folder.join(LOCK);
        Lock::exclusive(&path).map_err(DetachedError::io("lock", &path))
    }

    /// Whether a machine has a keeper. Asked with the folder's lock held, so that nobody is refused because of the question.
    fn is_kept(&self, name: &str) -> Result<bool, DetachedError> {
        Ok(self.try_life(name)?.is_none())
    }

    fn try_life(&self, name: &str) -> Result<Option<Lock>, DetachedError> {
        let path = self.path(name, LIFE);
        Lock::try_exclusive(&path).map_err(DetachedError::io("lock", &path))
    }

    fn path(&self, name: &str, file: &str) -> PathBuf {
        self.folder.join(name).join(file)
    }
}

impl Creation {
    /// Makes the machine known, on disk when this returns.
    ///
    /// # Errors
    /// [`DetachedError::Io`]; there is no machine then.
    pub fn put(self, record: &VmRecord) -> Result<(), DetachedError> {
        if record.name != self.name {
            return Err(DetachedError::Name(record.name.clone()));
        }
        let machines = &self.machines;
        machines.clear(&self.name)?;
        let folder = machines.folder_of(&self.name);
        let made = DirBuilder::new().mode(0o700).create(&folder);
        made.map_err(DetachedError::io("make the folder", &folder))?;
        let put = machines.write(record).and_then(|()| {
            durable::sync_directory(&machines.folder).map_err(DetachedError::io("write", &machines.folder))
        });
        if put.is_err() {
            // The first failure is the one to report; what is left without a record is nothing.
            let _ = machines.clear(&self.name);
        } else {
            machines.tell(record, Happening::Create, &[]);
        }
        put
    }
}

impl Life {
    /// What is known of the machine.
    pub fn record(&self) -> &VmRecord {
        &self.record
    }

    /// The folder of the machine.
    pub(super) fn folder(&self) -> PathBuf {
        self.machines.folder_of(&self.record.name)
    }

    /// The log of the machine's main command, for this process to write.
    pub(super) fn log_writer(&self) -> Result<LogWriter, DetachedError> {
        let folder = self.folder();
        LogWriter::open(&folder).map_err(DetachedError::io("write the log in", &folder))
    }

    /// Takes note of the machine's end, and removes it if it was to be. Who asks from here on finds no keeper, and nobody else
    /// can keep it before this is dropped.
    pub(super) fn bury(&mut self, how: String, exit: Exit) -> Result<(), DetachedError> {
        self.record.ended(how, exit, now_unix_ms());
        let machines = &self.machines;
        let written = if self.record.remove_when_ended {
            machines.lock().and_then(|_lock| machines.erase(&self.record.name))
        } else {
            machines.write(&self.record)
        };
        // What cannot be removed leads nowhere, and is replaced by the next keeper.
        let _ = fs::remove_file(machines.path(&self.record.name, SOCKET));
        machines.tell_end(&self.record);
        written
    }

    /// Takes note of something and writes it.
    pub(super) fn note(&mut self, change: impl FnOnce(&mut VmRecord, u64)) -> Result<(), DetachedError> {
        change(&mut self.record, now_unix_ms());
        self.machines.write(&self.record)
    }
}

fn ignore_missing(error: io::Error) -> io::Result<()> {
    if error.kind() == io::ErrorKind::NotFound { Ok(()) } else { Err(error) }
}

/// There is no such file, perhaps because what should be its folder is none.
fn is_missing(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::NotFound | io::ErrorKind::NotADirectory)
}

#[cfg(test)]
mod tests {
    use super::super::State;
    use super::super::record::tests::record;
    use super::*;

    fn machines() -> (tempfile::TempDir, Machines) {
        let root = tempfile::tempdir().expect("a folder");
        let machines = Machines::open(root.path().join("vms")).expect("a folder in it");
        (root, machines)
    }

    fn create(machines: &Machines, name: &str) -> Result<(), DetachedError> {
        machines.create(name)?.put(&record(name))
    }

    #[test]
    fn a_name_is_given_once() {
        let (_root, machines) = machines();
        create(&machines, "web").expect("created");
        assert!(matches!(create(&machines, "web"), Err(DetachedError::NameTaken(_))));
        machines.remove("web").expect("removed");
        create(&machines, "web").expect("created again");
    }

    #[test]
    fn of_many_that_want_a_name_one_gets_it() {
        let (_root, machines) = machines();
        let got: usize = std::thread::scope(|scope| {
            let threads: Vec<_> = (0..8).map(|_| scope.spawn(|| create(&machines, "web").is_ok())).collect();
            threads.into_iter().map(|thread| usize::from(thread.join().expect("no panic"))).sum()
        });
        assert_eq!(got, 1);
    }

    #[test]
    fn a_machine_is_found_by_name_or_by_the_start_of_its_id() {
        let (_root, machines) = machines();
        create(&machines, "web").expect("created");
        assert_eq!(machines.find("web").expect("by name").name, "web");
        assert_eq!(machines.find("0123").expect("by id").name, "web");
        for unknown in ["012", "0124", "we", "../vms/web", ""] {
            assert!(matches!(machines.find(unknown), Err(DetachedError::Unknown(_))), "{unknown}");
        }
        create(&machines, "db").expect("created");
        assert!(matches!(machines.find("0123"), Err(DetachedError::Unknown(_))), "two have this id");
    }

    #[test]
    fn a_machine_has_one_keeper_and_stays_while_it_lives() {
        let (_root, machines) = machines();
        create(&machines, "web").expect("created");
        let mut life = machines.keep("web").expect("nobody keeps it");
        assert!(matches!(machines.keep("web"), Err(DetachedError::Running(_))));
        assert!(matches!(machines.remove("web"), Err(DetachedError::Running(_))));
        life.note(VmRecord::started_for_test).expect("written");
        assert!(machines.reconcile().expect("reconciled").is_empty());
        drop(life);
        assert_eq!(machines.reconcile().expect("reconciled"), ["web"]);
        assert!(machines.reconcile().expect("reconciled").is_empty(), "it is told once");
        let record = machines.find("web").expect("its record stays");
        assert_eq!(record.state, State::Ended);
        assert!(record.end.expect("a reason").contains("keeper died"));
    }

    #[test]
    fn what_a_crash_left_of_a_creation_is_nothing() {
        let (_root, machines) = machines();
        fs::create_dir(machines.folder_of("web")).expect("made");
        File::create(machines.path("web", LIFE)).expect("made");
        assert!(matches!(machines.find("web"), Err(DetachedError::Unknown(_))));
        create(&machines, "web").expect("created");
        fs::remove_file(machines.path("web", RECORD)).expect("removed");
        machines.reconcile().expect("reconciled");
        assert!(!machines.folder_of("web").exists());
    }

    #[test]
    fn a_strangers_file_is_left_alone() {
        let (_root, machines) = machines();
        fs::write(machines.folder.join("file"), "").expect("written");
        create(&machines, "web").expect("created");
        assert!(machines.reconcile().expect("reconciled").is_empty());
        assert!(matches!(machines.find("file"), Err(DetachedError::Unknown(_))));
        assert_eq!(machines.list().expect("listed").0.len(), 1);
        assert!(machines.folder.join("file").exists());
    }

    #[test]
    fn a_damaged_record_is_listed_and_can_go() {
        let (_root, machines) = machines();
        create(&machines, "web").expect("created");
        for damaged in ["", "{", &serde_json::to_string(&record("other")).expect("JSON")] {
            fs::write(machines.path("web", RECORD), damaged).expect("written");
            assert!(matches!(machines.find("web"), Err(DetachedError::Damaged { .. })), "{damaged}");
            assert_eq!(machines.list().expect("listed").1, ["web"]);
            assert!(machines.reconcile().expect("reconciled").is_empty());
        }
        machines.remove("web").expect("removed");
        assert!(!machines.folder_of("web").exists());
    }

    impl VmRecord {
        fn started_for_test(&mut self, now_unix_ms: u64) {
            self.started(now_unix_ms);
        }
    }
}
