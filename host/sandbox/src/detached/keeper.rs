//! The process that a detached machine belongs to.
//!
//! ```text
//! Life (lock) ──▶ listens ──▶ record: running ──▶ serves ──▶ machine ends ──▶ record: ended ──▶ lock released
//!                                                   └ requests, each a task             └ who asked for the end is answered
//! ```

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use kiln_protocol::{AGENT_PORT, Call};
use kiln_store::Store;
use tokio::sync::{Semaphore, watch};
use tokio::task::JoinSet;

use super::wire::{
    Answered, Blame, Failed, Listener, Nothing, Outcome, Paused, Reply, Request, Saved, Used, Wanted,
};
use super::{DetachedError, Life, State};
use crate::monitor::MachineEnd;
use crate::monitor::channel::AsyncChannel;
use crate::{AskError, HostStats, Standstill, Vm, VmError, with_causes};

/// The most requests at a time; who connects beyond waits.
const REQUESTS_MAX: usize = 64;
/// How long a connection may take to say what it wants.
const REQUEST_LIMIT: Duration = Duration::from_secs(10);
/// How long answers may take to be sent once the machine has ended.
const FAREWELL_LIMIT: Duration = Duration::from_secs(5);

/// What the tasks of a keeper share.
struct Keeper {
    vm: Vm,
    store: Store,
    /// `None` once the machine has ended and its record says so.
    life: Mutex<Option<Life>>,
    /// Held from a change of the machine until its record has it, so that they change in one order.
    change: tokio::sync::Mutex<()>,
    ended: watch::Receiver<bool>,
}

/// Serves a machine until it ends or `told_to_end` is there, in which case it is ended. `ready` is called when it can be reached.
///
/// The machine's record and the socket are this function's; its snapshots go to `store`.
///
/// # Errors
/// When the machine cannot be made reachable, or its record cannot be written: it has ended then.
pub async fn keep(
    vm: Vm,
    life: Life,
    store: Store,
    ready: impl FnOnce(),
    told_to_end: impl Future<Output = ()>,
) -> Result<(), DetachedError> {
    let mut life = life;
    let folder = life.folder();
    let listener = Listener::bind(&folder).map_err(DetachedError::io("listen in", &folder))?;
    life.note(super::VmRecord::started)?;
    let (ended_sender, ended) = watch::channel(false);
    let keeper = Arc::new(Keeper {
        vm,
        store,
        life: Mutex::new(Some(life)),
        change: tokio::sync::Mutex::default(),
        ended,
    });
    ready();

    let mut requests = JoinSet::new();
    let end = tokio::select! {
        end = keeper.vm.ended() => end,
        error = serve(&keeper, &listener, &mut requests) => {
            // A machine that nobody can reach is of no use to anybody.
            keeper.vm.end().await;
            let _ = keeper.bury(&*keeper.vm.ended().await, folder.join(super::folder::SOCKET));
            return Err(DetachedError::io("listen in", &folder)(error));
        }
        () = told_to_end => {
            keeper.vm.end().await;
            keeper.vm.ended().await
        }
    };
    drop(listener);
    let written = keeper.bury(&end, folder.join(super::folder::SOCKET));
    // Those who asked for the end are told now that nothing is left.
    let _ = ended_sender.send(true);
    let farewell = async { while requests.join_next().await.is_some() {} };
    let _ = tokio::time::timeout(FAREWELL_LIMIT, farewell).await;
    written
}

async fn serve(keeper: &Arc<Keeper>, listener: &Listener, requests: &mut JoinSet<()>) -> io::Error {
    let places = Arc::new(Semaphore::new(REQUESTS_MAX));
    loop {
        let place = Arc::clone(&places).acquire_owned().await;
        while requests.try_join_next().is_some() {}
        let channel = match listener.accept().await {
            Ok(channel) => channel,
            // Without a descriptor to spare, the next request that ends gives one back.
            Err(error) => match requests.join_next().await {
                Some(_) => continue,
                None => return error,
            },
        };
        let keeper = Arc::clone(keeper);
        requests.spawn(async move {
            keeper.answer(&channel).await;
            drop(place);
        });
    }
}

impl Keeper {
    /// Serves one connection.
    async fn answer(&self, channel: &AsyncChannel) {
        let Ok(Ok((request, _))) = tokio::time::timeout(REQUEST_LIMIT, channel.receive::<Request>()).await
        else {
            return;
        };
        let (outcome, files) = match request.wanted {
            Some(wanted) => {
                self.act(wanted).await.unwrap_or_else(|failed| (Outcome::Failed(failed), Vec::new()))
            }
            None => (
                Outcome::Failed(failed(Blame::Caller, "a request for nothing this version knows")),
                Vec::new(),
            ),
        };
        let fds: Vec<_> = files.iter().map(AsFd::as_fd).collect();
        // Who does not wait for the answer does not get it.
        let _ = channel.send(&Reply { outcome: Some(outcome) }, &fds).await;
    }

    async fn act(&self, wanted: Wanted) -> Result<(Outcome, Vec<OwnedFd>), Failed> {
        let outcome = match wanted {
            Wanted::Pause(_) => {
                let _change = self.change.lock().await;
                let took = self.vm.pause().await?;
                self.note(super::VmRecord::paused)?;
                Outcome::Paused(Paused { took_ns: nanoseconds(took) })
            }
            Wanted::Resume(_) => {
                let _change = self.change.lock().await;
                self.vm.resume().await?;
                self.note(super::VmRecord::resumed)?;
                Outcome::Done(Nothing {})
            }
            Wanted::PowerOff(wanted) => {
                self.vm.power_off(Duration::from_millis(wanted.grace_ms)).await?;
                return Ok((self.buried().await, Vec::new()));
            }
            Wanted::End(_) => {
                self.vm.end().await;
                return Ok((self.buried().await, Vec::new()));
            }
            Wanted::Agent(request) => {
                if !request.call.as_ref().is_some_and(is_a_clients) {
                    return Err(failed(Blame::Caller, "a call that is not a client's"));
                }
                self.check_running()?;
                let (reply, stream) = self.vm.pass_on(&request).await?;
                let stream = stream.into_std().map_err(|error| failed(Blame::Host, &error.to_string()))?;
                return Ok((Outcome::Answered(Answered { reply }), vec![stream.into()]));
            }
            Wanted::Connect(port) => {
                if port == AGENT_PORT {
                    return Err(failed(Blame::Caller, "the agent is not connected to but asked"));
                }
                let stream = self.vm.connect_to(port).await?;
                let stream = stream.into_std().map_err(|error| failed(Blame::Host, &error.to_string()))?;
                return Ok((Outcome::Done(Nothing {}), vec![stream.into()]));
            }
            Wanted::Use(_) => {
                let HostStats { resident_bytes, private_bytes, resident_peak_bytes, cpu_time } =
                    self.vm.host_stats();
                let cpu_us = u64::try_from(cpu_time.as_micros()).unwrap_or(u64::MAX);
                Outcome::Used(Used { resident_bytes, private_bytes, resident_peak_bytes, cpu_us })
            }
            Wanted::Snapshot(wanted) => {
                let name = Some(wanted.name).filter(|name| !name.is_empty());
                let (record, standstill) = self.vm.snapshot(&self.store, name).await?;
                saved(&record, standstill)?
            }
            Wanted::Copy(_) => {
                let (copy, standstill) = self.vm.copy(self.store.root()).await?;
                let (record, files) = copy.into_parts();
                return Ok((saved(&record, standstill)?, files));
            }
        };
        Ok((outcome, Vec::new()))
    }

    /// A paused machine would keep its caller waiting, perhaps for ever.
    fn check_running(&self) -> Result<(), Failed> {
        let life = self.life.lock().unwrap_or_else(PoisonError::into_inner);
        match life.as_ref().map(|life| life.record().state) {
            Some(State::Paused) => Err(failed(Blame::Caller, &VmError::Paused.to_string())),
            _ => Ok(()),
        }
    }

    fn note(&self, change: impl FnOnce(&mut super::VmRecord, u64)) -> Result<(), Failed> {
        let mut life = self.life.lock().unwrap_or_else(PoisonError::into_inner);
        // A machine that has ended has its last word.
        let Some(life) = life.as_mut() else { return Ok(()) };
        life.note(change).map_err(|error| failed(error.blame().into(), &with_causes(&error)))
    }

    /// Waits until the machine's end is on record and nobody keeps it any more.
    async fn buried(&self) -> Outcome {
        let mut ended = self.ended.clone();
        // The sender goes after it has sent.
        let _ = ended.wait_for(|ended| *ended).await;
        Outcome::Done(Nothing {})
    }

    /// Writes how the machine ended, and gives up the right to keep it.
    fn bury(&self, end: &MachineEnd, socket: PathBuf) -> Result<(), DetachedError> {
        let life = self.life.lock().unwrap_or_else(PoisonError::into_inner).take();
        let Some(mut life) = life else { return Ok(()) };
        // What cannot be removed leads nowhere, and is replaced by the next keeper.
        let _ = std::fs::remove_file(socket);
        let mut how = end.to_string();
        if let Some(line) = end.console_tail(1).pop().filter(|_| matches!(end, MachineEnd::Crashed { .. })) {
            how = format!("{how}; its console's last line: {line}");
        }
        life.note(|record, now| record.ended(how, now))
    }
}

/// Whether a call asks for something in the guest. The others are what a keeper makes of its own requests.
fn is_a_clients(call: &Call) -> bool {
    match call {
        Call::Exec(_)
        | Call::Hello(_)
        | Call::Put(_)
        | Call::Get(_)
        | Call::Dial(_)
        | Call::Signal(_)
        | Call::Measure(_) => true,
        Call::Setup(_)
        | Call::PowerOff(_)
        | Call::Park(_)
        | Call::WriteFile(_)
        | Call::RemoveFile(_)
        | Call::Await(_)
        | Call::Become(_) => false,
    }
}

fn saved(record: &kiln_store::SnapshotRecord, standstill: Standstill) -> Result<Outcome, Failed> {
    let record = serde_json::to_vec(record).map_err(|error| failed(Blame::Kiln, &error.to_string()))?;
    let Standstill { frozen, still } = standstill;
    Ok(Outcome::Saved(Saved { record, frozen_ns: nanoseconds(frozen), still_ns: nanoseconds(still) }))
}

fn nanoseconds(duration: Duration) -> u64 {
    u64::try_from(duration.as_nanos()).unwrap_or(u64::MAX)
}

fn failed(blame: Blame, message: &str) -> Failed {
    Failed { blame: blame.into(), message: message.to_owned() }
}

impl From<VmError> for Failed {
    fn from(error: VmError) -> Self {
        failed(error.blame().into(), &with_causes(&error))
    }
}

impl From<AskError> for Failed {
    fn from(error: AskError) -> Self {
        failed(error.blame().into(), &with_causes(&error))
    }
}

#[cfg(test)]
mod tests {
    use kiln_protocol::{Become, Exec, Hello, Park, PowerOff, Setup};

    use super::*;

    #[test]
    fn what_would_change_the_guest_behind_its_keepers_back_is_not_passed_on() {
        assert!(is_a_clients(&Call::Exec(Exec::default())));
        assert!(is_a_clients(&Call::Hello(Hello {})));
        for call in [
            Call::Setup(Setup::default()),
            Call::PowerOff(PowerOff { grace_ms: 0 }),
            Call::Park(Park {}),
            Call::Become(Become { generation: None }),
        ] {
            assert!(!is_a_clients(&call), "{call:?}");
        }
    }
}
