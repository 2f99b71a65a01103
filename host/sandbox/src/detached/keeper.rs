//! The process that a detached machine belongs to.
//!
//! ```text
//! Life (lock) ──▶ listens ──▶ main command ──▶ record: running ──▶ serves ──▶ machine ends ──▶ record: ended ──▶ lock released
//!                              └ its output, to the log            └ requests, each a task      └ who waits is answered
//! ```

use std::io;
use std::net::SocketAddr;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream as StdStream;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use kiln_protocol::{AGENT_PORT, Call, Exec, Started};
use kiln_store::Store;
use tokio::net::UnixStream;
use tokio::sync::{Semaphore, mpsc, watch};
use tokio::task::JoinSet;

use super::publish::{PUBLISHED_MAX, Published};
use super::wire::{
    Answered, Blame, Ended, Failed, Hold, Listener, Nothing, Outcome, Paused, Port, Reply, Request, Saved,
    Used, Wanted,
};
use super::workload::Workload;
use super::{DetachedError, Exit, Happening, Life, Machines, State};
use crate::agent::Streams;
use crate::monitor::MachineEnd;
use crate::monitor::channel::AsyncChannel;
use crate::vm::exec::drained;
use crate::{AskError, Child, ExitStatus, ExposedPort, HostStats, Standstill, Vm, VmError, with_causes};

/// The most requests at a time; who connects beyond waits.
const REQUESTS_MAX: usize = 64;
/// How long a connection may take to say what it wants.
const REQUEST_LIMIT: Duration = Duration::from_secs(10);
/// The most who wait for the machine's end at a time; others are refused.
const WAITERS_MAX: usize = 1024;
/// The most commands that run in the background; others are refused.
const HELD_MAX: usize = 256;
/// The signal that cannot be caught.
const SIGKILL: u8 = 9;
/// How long a main command that is killed has to end before its machine is ended.
const KILL_LIMIT: Duration = Duration::from_secs(10);
const DONE: Outcome = Outcome::Done(Nothing {});
/// How long answers may take to be sent once the machine has ended.
const FAREWELL_LIMIT: Duration = Duration::from_secs(5);

/// What the tasks of a keeper share.
struct Keeper {
    vm: Vm,
    store: Store,
    machines: Machines,
    name: String,
    /// `None` once the machine has ended and its record says so.
    life: Mutex<Option<Life>>,
    /// Held from a change of the machine until its record has it, so that they change in one order.
    change: tokio::sync::Mutex<()>,
    /// What the machine ended with, once nothing is left of it.
    ended: watch::Receiver<Option<Exit>>,
    /// Where its main command takes signals, and the one that asks it to stop.
    main: Option<(mpsc::Sender<u32>, u8)>,
    /// The listeners of the ports in its record, in their order. Locked before `life` is.
    ports: tokio::sync::Mutex<Vec<ExposedPort>>,
    waiters: Arc<Semaphore>,
    held: Arc<Semaphore>,
}

/// A machine that can be reached, and is yet to be served.
pub struct Keeping {
    keeper: Arc<Keeper>,
    listener: Listener,
    workload: Option<Workload>,
    ended: watch::Sender<Option<Exit>>,
}

impl Keeping {
    /// Makes a machine reachable, and starts the main command of its record. The record and the socket are this function's from
    /// here on; its snapshots go to `store`.
    ///
    /// # Errors
    /// [`DetachedError::Main`] when the main command cannot be started, and others when the machine cannot be made reachable, or
    /// its record not be written. It has ended when `vm` was dropped.
    pub async fn begin(vm: Vm, mut life: Life, store: Store) -> Result<Self, DetachedError> {
        let folder = life.folder();
        let listener = Listener::bind(&folder).map_err(DetachedError::io("listen in", &folder))?;
        let mut ports = Vec::new();
        for port in &mut life.record.ports {
            ports.push(port.listen(&vm).await?);
        }
        let workload = match &life.record().main {
            Some(command) => Some(Workload::start(&vm, command, life.log_writer()?).await?),
            None => None,
        };
        life.note(super::VmRecord::started)?;
        life.machines.tell(life.record(), Happening::Start, &[]);
        let (sender, ended) = watch::channel(None);
        let keeper = Keeper {
            vm,
            store,
            machines: life.machines.clone(),
            name: life.record().name.clone(),
            life: Mutex::new(Some(life)),
            change: tokio::sync::Mutex::default(),
            ended,
            main: workload.as_ref().map(|workload| (workload.signals(), workload.stop_signal)),
            ports: tokio::sync::Mutex::new(ports),
            waiters: Arc::new(Semaphore::new(WAITERS_MAX)),
            held: Arc::new(Semaphore::new(HELD_MAX)),
        };
        Ok(Self { keeper: Arc::new(keeper), listener, workload, ended: sender })
    }

    /// Serves the machine until it ends, or its main command does, or `told_to_end` is there: it is ended then.
    ///
    /// # Errors
    /// When nobody can reach it any more, or its end cannot be recorded.
    pub async fn serve(self, told_to_end: impl Future<Output = ()>) -> Result<(), DetachedError> {
        let Self { keeper, listener, mut workload, ended } = self;
        let mut requests = JoinSet::new();
        let mut failure = None;
        let mut status = None;
        tokio::select! {
            _ = keeper.vm.ended() => {}
            ended = main_ended(&mut workload) => {
                status = ended;
                workload = None;
            }
            error = serve(&keeper, &listener, &mut requests) => {
                // A machine that nobody can reach is of no use to anybody.
                let folder = keeper.machines.folder_of(&keeper.name);
                failure = Some(DetachedError::io("listen in", &folder)(error));
            }
            () = told_to_end => {}
        }
        keeper.vm.end().await;
        let end = keeper.vm.ended().await;
        if workload.is_some() {
            // It ends with its machine. What it wrote last is in the log then.
            status =
                tokio::time::timeout(FAREWELL_LIMIT, main_ended(&mut workload)).await.unwrap_or_default();
        }
        let (written, exit) = keeper.bury(&end, status);
        // Who connects from here on finds no keeper; who has connected and was not answered looks at the record.
        drop(listener);
        // Those who asked for the end are told now that nothing is left.
        let _ = ended.send(Some(exit));
        let farewell = async { while requests.join_next().await.is_some() {} };
        let _ = tokio::time::timeout(FAREWELL_LIMIT, farewell).await;
        failure.map_or(written, Err)
    }
}

/// Waits for the end of the main command, for ever if there is none. Not to be called again once it has ended.
async fn main_ended(workload: &mut Option<Workload>) -> Option<ExitStatus> {
    match workload {
        Some(workload) => workload.ended().await,
        None => std::future::pending().await,
    }
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
        requests.spawn(async move { keeper.answer(&channel, place).await });
    }
}

impl Keeper {
    /// Serves one connection.
    async fn answer<P>(&self, channel: &AsyncChannel, place: P) {
        let Ok(Ok((request, files))) =
            tokio::time::timeout(REQUEST_LIMIT, channel.receive::<Request>()).await
        else {
            return;
        };
        let acted = match request.wanted {
            Some(Wanted::Wait(_)) => {
                // Who waits takes no place from those who want something done.
                drop(place);
                match self.waiters.try_acquire() {
                    Ok(_one) => tokio::select! {
                        outcome = self.buried() => Ok((outcome, Vec::new())),
                        // Nothing more is expected: it has gone away.
                        _ = channel.receive::<Request>() => return,
                    },
                    Err(_) => Err(failed(Blame::Caller, "too many wait for the VM already")),
                }
            }
            Some(Wanted::Hold(hold)) => self.hold(&hold, files).map(|()| (DONE, Vec::new())),
            Some(wanted) => self.act(wanted).await,
            None => Err(failed(Blame::Caller, "a request for nothing this version knows")),
        };
        let (outcome, files) = acted.unwrap_or_else(|failed| (Outcome::Failed(failed), Vec::new()));
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
                self.tell(Happening::Pause, &[]);
                Outcome::Paused(Paused { took_ns: nanoseconds(took) })
            }
            Wanted::Resume(_) => {
                let _change = self.change.lock().await;
                self.vm.resume().await?;
                self.note(super::VmRecord::resumed)?;
                self.tell(Happening::Resume, &[]);
                DONE
            }
            Wanted::PowerOff(wanted) => {
                self.tell(Happening::Stop, &[]);
                self.power_off(Duration::from_millis(wanted.grace_ms)).await?;
                self.buried().await;
                DONE
            }
            Wanted::End(_) => {
                self.vm.end().await;
                self.buried().await;
                DONE
            }
            Wanted::Signal(wanted) => {
                self.signal(wanted.number).await?;
                DONE
            }
            Wanted::Expose(port) => self.expose(&port).await?,
            Wanted::Unexpose(port) => self.unexpose(&port).await?,
            // Done where the connection is at hand.
            Wanted::Wait(_) | Wanted::Hold(_) => return Err(failed(Blame::Kiln, "a request out of place")),
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
                let name = record.name.as_deref().unwrap_or_default();
                self.tell(Happening::Snapshot, &[("key", &record.key.to_string()), ("snapshot", name)]);
                saved(&record, standstill)?
            }
            Wanted::Copy(_) => {
                let (copy, standstill) = self.vm.copy(self.store.root()).await?;
                self.tell(Happening::Fork, &[]);
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
        Ok(life.note(change)?)
    }

    /// Has the machine end by itself: by its main command, if it has one, else by its agent.
    async fn power_off(&self, grace: Duration) -> Result<(), VmError> {
        let Some((signals, stop)) = &self.main else {
            self.vm.power_off(grace).await?;
            return Ok(());
        };
        self.resume().await?;
        for (signal, limit) in [(*stop, grace), (SIGKILL, KILL_LIMIT)] {
            // One whose signals all wait still is killed by the next.
            let _ = signals.try_send(signal.into());
            if tokio::time::timeout(limit, self.buried()).await.is_ok() {
                return Ok(());
            }
        }
        self.vm.end().await;
        Ok(())
    }

    async fn resume(&self) -> Result<(), VmError> {
        let _change = self.change.lock().await;
        self.vm.resume().await
    }

    /// Passes a signal to the main command. The one that cannot be caught ends the machine.
    async fn signal(&self, number: u32) -> Result<(), Failed> {
        let tell = |number: u32| {
            let name = u8::try_from(number).map_or_else(|_| number.to_string(), crate::signal::name);
            self.tell(Happening::Kill, &[("signal", &name)]);
        };
        if number == u32::from(SIGKILL) {
            tell(number);
            self.vm.end().await;
            self.buried().await;
            return Ok(());
        }
        let Some((signals, _)) = &self.main else {
            let error = DetachedError::NoMain(self.name.clone());
            let hint = error.hint().unwrap_or_default();
            return Err(failed(Blame::Caller, &format!("{error}: {hint}")));
        };
        if signals.try_send(number).is_err() {
            return Err(failed(Blame::Guest, "the main command takes no signals"));
        }
        tell(number);
        Ok(())
    }

    /// Publishes a port, now and at the next starts.
    async fn expose(&self, port: &Port) -> Result<Outcome, Failed> {
        let (wanted, guest) = address(port)?;
        let mut ports = self.ports.lock().await;
        if ports.len() >= PUBLISHED_MAX {
            return Err(failed(Blame::Caller, "the VM has as many published ports as it may"));
        }
        let mut published = Published::new(wanted, guest);
        let listener = published.listen(&self.vm).await?;
        let bound = listener.local_addr().to_string();
        self.note(|record, _| record.ports.push(published))?;
        ports.push(listener);
        self.tell(Happening::Expose, &[("address", &bound), ("port", &guest.to_string())]);
        Ok(Outcome::Exposed(Port { address: bound, guest: port.guest }))
    }

    async fn unexpose(&self, port: &Port) -> Result<Outcome, Failed> {
        let (address, guest) = address(port)?;
        let mut ports = self.ports.lock().await;
        let record = self.record();
        let at = record.and_then(|record| record.ports.iter().position(|one| one.is(address, guest)));
        let Some(at) = at.filter(|at| *at < ports.len()) else {
            let what = format!("port {guest} of the VM {} is not published at {address}", self.name);
            return Err(failed(Blame::Caller, &what));
        };
        self.note(|record, _| {
            record.ports.remove(at);
        })?;
        // Its connections go on.
        drop(ports.remove(at));
        self.tell(Happening::Unexpose, &[("address", &port.address), ("port", &guest.to_string())]);
        Ok(DONE)
    }

    /// Carries the streams of a command that its client left behind: what it writes goes nowhere.
    fn hold(&self, hold: &Hold, files: Vec<OwnedFd>) -> Result<(), Failed> {
        let host = |error: io::Error| failed(Blame::Host, &error.to_string());
        let place = Arc::clone(&self.held).try_acquire_owned();
        let place = place
            .map_err(|_| failed(Blame::Caller, "the VM has as many commands in the background as it may"))?;
        let Ok([stream]) = <[OwnedFd; 1]>::try_from(files) else {
            return Err(failed(Blame::Caller, "no connection came with the command"));
        };
        let stream = StdStream::from(stream);
        stream.set_nonblocking(true).map_err(host)?;
        let stream = UnixStream::from_std(stream).map_err(host)?;
        let streams = Streams::of(&Exec { timeout_ms: hold.timeout_ms, ..Exec::default() });
        let started = kiln_protocol::Outcome::Started(Started { pid: hold.pid });
        let child = Child::carried(stream, streams, &started)
            .map_err(|error| failed(Blame::Kiln, &error.to_string()))?;
        let (machines, record, command) = (self.machines.clone(), self.record(), hold.command.clone());
        tokio::spawn(async move {
            let status = drained(child).await;
            drop(place);
            if let (Some(record), Some(status)) = (record, status) {
                let code = status.shell_code().to_string();
                machines.tell(&record, Happening::ExecEnd, &[("command", &command), ("exit_code", &code)]);
            }
        });
        Ok(())
    }

    fn record(&self) -> Option<super::VmRecord> {
        let life = self.life.lock().unwrap_or_else(PoisonError::into_inner);
        life.as_ref().map(|life| life.record().clone())
    }

    fn tell(&self, event: Happening, details: &[(&str, &str)]) {
        if let Some(record) = self.record() {
            self.machines.tell(&record, event, details);
        }
    }

    /// Waits until the machine's end is on record and nobody keeps it any more.
    async fn buried(&self) -> Outcome {
        let mut ended = self.ended.clone();
        // The sender goes after it has sent.
        let exit = ended.wait_for(Option::is_some).await.ok().and_then(|exit| *exit).unwrap_or(Exit::KILLED);
        Outcome::Ended(Ended { code: exit.code.into(), signal: exit.signal.unwrap_or_default().into() })
    }

    /// Writes how the machine ended, and gives up the right to keep it.
    fn bury(&self, end: &MachineEnd, status: Option<ExitStatus>) -> (Result<(), DetachedError>, Exit) {
        let exit = match (status, end) {
            (Some(status), _) => status.into(),
            (None, MachineEnd::PowerOff) => Exit { code: 0, signal: None },
            (None, _) => Exit::KILLED,
        };
        let how = match (status, end) {
            (Some(status), MachineEnd::Stopped { .. }) => how_it_ended(status),
            (_, MachineEnd::Crashed { .. }) => match end.console_tail(1).pop() {
                Some(line) => format!("{end}; its console's last line: {line}"),
                None => end.to_string(),
            },
            _ => end.to_string(),
        };
        let life = self.life.lock().unwrap_or_else(PoisonError::into_inner).take();
        (life.map_or(Ok(()), |mut life| life.bury(how, exit)), exit)
    }
}

/// A port as it comes from a client.
fn address(port: &Port) -> Result<(SocketAddr, u16), Failed> {
    let guest = u16::try_from(port.guest).ok().filter(|guest| *guest != 0);
    match (port.address.parse(), guest) {
        (Ok(address), Some(guest)) => Ok((address, guest)),
        _ => Err(failed(Blame::Caller, "an address that is none")),
    }
}

/// In words, how a main command ended.
fn how_it_ended(status: ExitStatus) -> String {
    match status.signal() {
        _ if status.timed_out() => "the time of its main command was up".to_owned(),
        Some(signal) => format!("its main command was ended by {}", crate::signal::name(signal)),
        None => format!("its main command exited with {}", status.shell_code()),
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

impl From<DetachedError> for Failed {
    fn from(error: DetachedError) -> Self {
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
