//! A machine saved while it runs.
//!
//! Its memory is copied while the guest goes on writing, then what was written meanwhile, and again, until little is left.
//! Only for that little, and for the state of its vCPUs and devices, does the machine stand still.

use std::fs::File;
use std::io;
use std::time::{Duration, Instant};

use kiln_hypervisor::Hypervisor;
use kiln_memory::Watch;

use crate::machine::Machine;
use crate::paused::{MachineState, Parking, Paused, SaveError};

/// As much as may be left to copy when the machine stands still: a millisecond of copying.
const REST_BYTES: u64 = 1 << 20;
/// How often what was written meanwhile is copied. A guest that writes faster than it is copied stands still for longer.
const ROUNDS_MAX: usize = 8;

/// What a machine does after it was saved while it ran.
pub enum Saved<H: Hypervisor> {
    /// It goes on.
    Running(Machine<H>),
    /// It stands still: its agent has parked it meanwhile.
    Parked(Paused<H>),
    /// The host has no thread left for it.
    Lost,
}

/// What was saved beside the memory, and what it cost.
#[derive(Debug)]
pub struct LiveState {
    /// Everything but the memory.
    pub state: MachineState,
    /// How long the machine stood still.
    pub pause: Duration,
}

/// A running machine cannot be saved.
#[derive(Debug, thiserror::Error)]
pub enum LiveError {
    /// The memory cannot be watched, read or written to the file. The host is to blame.
    #[error("cannot save the memory of a running machine")]
    Memory(#[from] io::Error),
    /// Its state cannot be taken.
    #[error(transparent)]
    State(#[from] SaveError),
    /// It has ended meanwhile.
    #[error("the machine has ended")]
    Ended,
}

impl<H: Hypervisor> Machine<H> {
    /// Writes the machine's memory to `file`, which must be empty, and takes its state at the same instant. The machine goes on, whatever
    /// comes of it.
    ///
    /// # Errors
    /// [`LiveError`]; the file is of no use then.
    pub fn save_running(self, file: &File) -> (Saved<H>, Result<LiveState, LiveError>) {
        let watch = match self.save_ahead(file) {
            Ok(watch) => watch,
            Err(error) => return (Saved::Running(self), Err(error.into())),
        };
        let start = Instant::now();
        let mut paused = match self.pause() {
            Ok(paused) => paused,
            Err(machine) => return (Saved::Running(machine), Err(LiveError::Ended)),
        };
        let rest = paused.save_rest(file, watch);
        let state = rest.map_err(LiveError::from).and_then(|()| Ok(paused.save()?));
        let live = |state: Result<_, _>| state.map(|state| LiveState { state, pause: start.elapsed() });
        if paused.parking() != Parking::None {
            return (Saved::Parked(paused), live(state));
        }
        match paused.resume() {
            Ok(machine) => (Saved::Running(machine), live(state)),
            Err(error) => (Saved::Lost, Err(error.into())),
        }
    }

    /// Writes the machine's memory to `file`, which must be empty, while it runs. What it writes meanwhile and is not copied, the
    /// watch still tells. `None`, and nothing written, where the host cannot watch.
    ///
    /// # Errors
    /// The host's; the file is of no use then.
    pub fn save_ahead(&self, file: &File) -> io::Result<Option<Watch>> {
        let Ok(watch) = self.memory.watch() else { return Ok(None) };
        self.memory.save(file)?;
        for _ in 0..ROUNDS_MAX {
            let written = watch.take()?;
            self.memory.save_pages(file, &written)?;
            if written.iter().map(|range| range.end - range.start).sum::<u64>() <= REST_BYTES {
                break;
            }
        }
        Ok(Some(watch))
    }
}
