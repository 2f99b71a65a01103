//! A command that is left running for the snapshot: started, waited for until it is ready, and kept until the guest is
//! parked.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex, PoisonError};

use kiln_protocol::{Await, Awaited, Call};
use tokio::io::{AsyncRead, AsyncReadExt};
use tokio::sync::watch;
use tokio::task::JoinSet;

use super::BakeError;
use super::content::{LogPattern, Service, Trigger, ask, shown};
use crate::agent::{Child, ExitStatus};
use crate::monitor::Monitor;
use crate::vm::{ExecBuilder, ExecError, VmError};

/// How much of what it wrote is shown, in bytes.
const TAIL_BYTES: usize = 2000;
/// How much of a line is looked at.
const LINE_BYTES_MAX: usize = 16 << 10;
/// How much of its output is read at a time.
const READ_BYTES: usize = 32 << 10;

/// A service that runs and is ready. The guest kills it when this is dropped before the guest is parked.
pub(super) struct Running<'a> {
    service: &'a Service,
    child: Child,
    output: Arc<Mutex<VecDeque<u8>>>,
    /// Those who read what it writes; they end with this.
    readers: JoinSet<()>,
    written: watch::Receiver<bool>,
}

impl<'a> Running<'a> {
    /// Starts it and waits until it is ready.
    pub(super) async fn start(monitor: &Monitor, service: &'a Service) -> Result<Self, VmError> {
        let mut running = Self::spawn(monitor, service).await?;
        let Self { child, written, .. } = &mut running;
        let ready = async {
            let awaited = match &service.trigger {
                Trigger::Port(port) => Awaited::Port((*port).into()),
                Trigger::File(path) => Awaited::File(path.clone()),
                Trigger::Log(_) => {
                    if written.wait_for(|found| *found).await.is_err() {
                        // It has closed its streams, and will not write it any more; it may still end.
                        std::future::pending::<()>().await;
                    }
                    return Ok(());
                }
                Trigger::Started => return Ok(()),
            };
            ask(monitor, Call::Await(Await { awaited: Some(awaited) })).await
        };
        #[expect(clippy::disallowed_methods, reason = "the limit of the wait")]
        let outcome = tokio::select! {
            biased;
            ended = child.wait() => Err(Some(ended)),
            ready = ready => Ok(ready),
            () = tokio::time::sleep(service.limit) => Err(None),
        };
        match outcome {
            Ok(Ok(())) => Ok(running),
            Ok(Err(error)) => Err(running.failed(error.into()).into()),
            Err(Some(ended)) => Err(running.has_ended(ended).await.into()),
            Err(None) => Err(BakeError::NotReady {
                command: shown(&service.launch),
                seconds: service.limit.as_secs_f64(),
                missing: service.trigger.shown(),
                output: running.said(),
            }
            .into()),
        }
    }

    async fn spawn(monitor: &Monitor, service: &'a Service) -> Result<Self, BakeError> {
        let launch = &service.launch;
        let exec = ExecBuilder::new(monitor, launch.argv.clone())
            .env(launch.env.iter())
            .cwd(&launch.workdir)
            .user(&launch.user);
        let command = || shown(launch);
        let mut child = exec
            .spawn()
            .await
            .map_err(|source| BakeError::Service { command: command(), source: Box::new(source) })?;
        let output = Arc::new(Mutex::new(VecDeque::new()));
        let (found, written) = watch::channel(false);
        let mut readers = JoinSet::new();
        let search = || match &service.trigger {
            Trigger::Log(pattern) => Some(Search { pattern: pattern.clone(), line: Vec::new() }),
            Trigger::Port(_) | Trigger::File(_) | Trigger::Started => None,
        };
        if let Some(stdout) = child.stdout.take() {
            readers.spawn(read(stdout, Arc::clone(&output), search(), found.clone()));
        }
        if let Some(stderr) = child.stderr.take() {
            readers.spawn(read(stderr, Arc::clone(&output), search(), found));
        }
        Ok(Self { service, child, output, readers, written })
    }

    /// Waits for what is done to its guest, which is to outlast nothing: when the service ends first, that is the outcome.
    pub(super) async fn until<T>(
        &mut self,
        done: impl Future<Output = Result<T, VmError>>,
    ) -> Result<T, VmError> {
        let ended = tokio::select! {
            biased;
            ended = self.child.wait() => ended,
            done = done => return done,
        };
        Err(self.has_ended(ended).await.into())
    }

    async fn has_ended(&mut self, ended: Result<ExitStatus, crate::AgentError>) -> BakeError {
        match ended {
            Ok(status) => {
                // All it wrote has arrived, and the readers end with it.
                while self.readers.join_next().await.is_some() {}
                BakeError::ServiceEnded {
                    command: shown(&self.service.launch),
                    status,
                    missing: self.service.trigger.shown(),
                    output: self.said(),
                }
            }
            Err(error) => self.failed(error.into()),
        }
    }

    fn failed(&self, source: ExecError) -> BakeError {
        BakeError::Service { command: shown(&self.service.launch), source: Box::new(source) }
    }

    /// The last of what it wrote, as it is shown behind an error.
    fn said(&self) -> String {
        let output = self.output.lock().unwrap_or_else(PoisonError::into_inner);
        let bytes: Vec<u8> = output.iter().copied().collect();
        match String::from_utf8_lossy(&bytes).trim_end() {
            "" => "it wrote nothing".to_owned(),
            text => format!("it wrote: {text}"),
        }
    }
}

async fn read(
    mut stream: impl AsyncRead + Unpin,
    output: Arc<Mutex<VecDeque<u8>>>,
    mut search: Option<Search>,
    found: watch::Sender<bool>,
) {
    let mut buffer = vec![0; READ_BYTES];
    while let Ok(count @ 1..) = stream.read(&mut buffer).await {
        let bytes = &buffer[..count];
        {
            let mut output = output.lock().unwrap_or_else(PoisonError::into_inner);
            output.extend(bytes);
            let surplus = output.len().saturating_sub(TAIL_BYTES);
            output.drain(..surplus);
        }
        if search.as_mut().is_some_and(|search| search.finds(bytes)) {
            found.send_replace(true);
            search = None;
        }
    }
}

/// Looks for a line in a stream that comes in pieces.
struct Search {
    pattern: LogPattern,
    /// The line that has not ended, as far as it is looked at.
    line: Vec<u8>,
}

impl Search {
    fn finds(&mut self, piece: &[u8]) -> bool {
        for part in piece.split_inclusive(|byte| *byte == b'\n') {
            let text = part.strip_suffix(b"\n").unwrap_or(part);
            let room = LINE_BYTES_MAX - self.line.len();
            self.line.extend_from_slice(&text[..text.len().min(room)]);
            if self.pattern.matches(&String::from_utf8_lossy(&self.line)) {
                return true;
            }
            if text.len() < part.len() {
                self.line.clear();
            }
        }
        false
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn search(pattern: &str) -> Search {
        Search { pattern: pattern.parse().expect("a pattern"), line: Vec::new() }
    }

    #[test]
    fn a_line_is_found_however_a_stream_is_cut() {
        let stream = b"abcabd ready\nlistening on [::]:8080";
        for size in 1..=stream.len() {
            for (pattern, is_there) in [
                ("abd", true),
                ("^listening on .*:[0-9]+", true),
                ("ready.listening", false),
                ("^ready", false),
            ] {
                let mut search = search(pattern);
                let found = stream.chunks(size).any(|piece| search.finds(piece));
                assert_eq!(found, is_there, "{pattern} in pieces of {size}");
            }
        }
    }

    #[test]
    fn of_a_line_without_an_end_only_the_start_is_kept() {
        let mut search = search("never");
        for _ in 0..1000 {
            assert!(!search.finds(&[b'x'; 1000]));
            assert!(search.line.len() <= LINE_BYTES_MAX);
        }
        assert!(search.finds(b"\nnever"));
    }
}
