//! `--json-events`: the phases of a run with their times, one JSON object a line.

use std::fs::File;
use std::io::Write;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use rustix::time::{ClockId, clock_gettime};
use serde_json::{Map, Value, json};

use crate::failure::Failure;

/// Where phases are written, if anywhere. Clones write to the same file.
#[derive(Clone, Debug, Default)]
pub(crate) struct EventLog {
    file: Option<Arc<Mutex<File>>>,
    output_seen: Arc<AtomicBool>,
    /// When the log was opened, if phases are shown to the user as well.
    shown_since_ns: Option<u64>,
}

impl EventLog {
    /// Opens the file, emptied; `None` writes nowhere. Phases are also shown on stderr when the user wants to see them.
    ///
    /// # Errors
    /// When the file cannot be written.
    pub(crate) fn open(path: Option<&Path>, shown: bool) -> Result<Self, Failure> {
        let log = Self { shown_since_ns: shown.then(monotonic_ns), ..Self::default() };
        let Some(path) = path else { return Ok(log) };
        let file = File::create(path)
            .map_err(|error| Failure::caller(format!("cannot write {}: {error}", path.display())))?;
        Ok(Self { file: Some(Arc::new(Mutex::new(file))), ..log })
    }

    /// Writes a phase that is reached now.
    pub(crate) fn now(&self, event: &str) {
        self.with(event, monotonic_ns(), Map::new());
    }

    /// Writes, once, that the command has written something.
    pub(crate) fn output(&self) {
        if !self.output_seen.swap(true, Ordering::Relaxed) {
            self.now("first_output");
        }
    }

    /// Writes a phase that was reached at a time of the host's `CLOCK_MONOTONIC`.
    pub(crate) fn at(&self, event: &str, monotonic_ns: u64) {
        self.with(event, monotonic_ns, Map::new());
    }

    /// Writes a phase with particulars.
    pub(crate) fn with(&self, event: &str, monotonic_ns: u64, particulars: Map<String, Value>) {
        if let Some(since) = self.shown_since_ns {
            let milliseconds = monotonic_ns.saturating_sub(since) as f64 / 1e6;
            crate::terminal::note(&format!("{milliseconds:10.3} ms  {event}"));
        }
        let Some(file) = &self.file else { return };
        let mut object = Map::new();
        object.insert("event".into(), json!(event));
        object.insert("monotonic_ns".into(), json!(monotonic_ns));
        object.extend(particulars);
        let line = format!("{}\n", Value::Object(object));
        // A measurement that cannot be written must not end the run it measures.
        let _ = file.lock().unwrap_or_else(PoisonError::into_inner).write_all(line.as_bytes());
    }
}

/// The host's `CLOCK_MONOTONIC` in nanoseconds.
pub(crate) fn monotonic_ns() -> u64 {
    let now = clock_gettime(ClockId::Monotonic);
    // The clock counts from boot, so neither part is negative.
    now.tv_sec as u64 * 1_000_000_000 + now.tv_nsec as u64
}
