//! What the monitor finds on this host: the host tier does not link KVM, so it asks.

use std::io;
use std::time::Duration;

use tokio::io::AsyncReadExt as _;
use tokio::net::unix::pipe;

use super::process::{self, Process, StartError};
use super::{MonitorError, MonitorProgram};

/// The argument that has a monitor print what it finds, and end.
const PROBE_ARGUMENT: &str = "--probe";
/// How long that may take.
const PROBE_LIMIT: Duration = Duration::from_secs(30);

/// What a monitor program finds on this host.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Probe {
    /// Why a machine's process cannot be jailed; `None` when it can.
    pub jail_error: Option<Obstacle>,
    /// The kernel's version of Landlock.
    pub landlock: Option<u32>,
    /// Why `/dev/kvm` cannot be opened; `None` when it can.
    pub open_error: Option<String>,
    /// KVM capabilities a machine needs and this host lacks.
    pub missing: Vec<Missing>,
    /// Why the smallest machine cannot be made; `None` when it can.
    pub create_error: Option<String>,
    /// The most vCPUs KVM gives one machine.
    pub max_vcpus: Option<u32>,
    /// Guest kernels are emulated: KVM without hardware virtualization.
    pub pvm: bool,
}

/// Why something cannot be done here.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Obstacle {
    /// What went wrong.
    pub why: String,
    /// What would help.
    pub fix: String,
}

/// A capability that KVM lacks here.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Missing {
    /// Its name in KVM's interface.
    pub name: String,
    /// What it is needed for.
    pub why: String,
    /// What would help.
    pub fix: String,
}

impl Probe {
    /// A machine can be made.
    pub fn works(&self) -> bool {
        self.jail_error.is_none()
            && self.open_error.is_none()
            && self.create_error.is_none()
            && self.missing.is_empty()
    }

    /// Reads what a monitor printed: a `name=value` a line. Names this version does not know are skipped.
    fn parse(text: &str) -> Self {
        let mut probe = Self::default();
        for (name, value) in text.lines().filter_map(|line| line.split_once('=')) {
            let error = || (value != "ok").then(|| value.to_owned());
            match name {
                "jail" if value != "ok" => {
                    let (why, fix) = value.split_once('\t').unwrap_or((value, ""));
                    probe.jail_error = Some(Obstacle { why: why.to_owned(), fix: fix.to_owned() });
                }
                "jail.landlock" => probe.landlock = value.parse().ok(),
                "kvm.open" => probe.open_error = error(),
                "kvm.create_vm" => probe.create_error = error(),
                "kvm.max_vcpus" => probe.max_vcpus = value.parse().ok(),
                "host.pvm" => probe.pvm = value == "yes",
                "kvm.missing" => {
                    let mut parts = value.split('\t').map(ToOwned::to_owned);
                    let mut part = || parts.next().unwrap_or_default();
                    probe.missing.push(Missing { name: part(), why: part(), fix: part() });
                }
                _ => {}
            }
        }
        probe
    }
}

/// Asks a monitor program what this host can do. Makes the smallest machine for a moment.
///
/// # Errors
/// [`MonitorError::Spawn`] when the program cannot be run, or is no monitor.
pub async fn probe(program: &MonitorProgram) -> Result<Probe, MonitorError> {
    let failed = |source| MonitorError::Spawn { program: program.clone(), source };
    let (reading, stdout) = io::pipe().map_err(MonitorError::Setup)?;
    let mut reading = pipe::Receiver::from_owned_fd(reading.into()).map_err(MonitorError::Setup)?;
    // It ends when it is let go of.
    let _process = match Process::start(program, &[PROBE_ARGUMENT], &process::null()?, &stdout) {
        Ok((process, _stderr)) => process,
        Err(error @ StartError::Device(_)) => {
            return Ok(Probe { open_error: Some(error.to_string()), ..Probe::default() });
        }
        Err(error @ (StartError::Groups(_) | StartError::Group(_) | StartError::Born(_))) => {
            let obstacle = Obstacle { why: error.to_string(), fix: error.hint().to_owned() };
            return Ok(Probe { jail_error: Some(obstacle), ..Probe::default() });
        }
        Err(error @ StartError::Namespaces(_)) => {
            let obstacle = Obstacle { why: error.to_string(), fix: "see `user_namespaces` below".to_owned() };
            return Ok(Probe { jail_error: Some(obstacle), ..Probe::default() });
        }
        Err(error) => return Err(error.into()),
    };
    drop(stdout);
    let mut output = Vec::new();
    tokio::time::timeout(PROBE_LIMIT, reading.read_to_end(&mut output))
        .await
        .unwrap_or_else(|_| Err(io::ErrorKind::TimedOut.into()))
        .map_err(failed)?;
    let text = String::from_utf8_lossy(&output);
    if !text.lines().any(|line| line.starts_with("jail=")) {
        return Err(failed(io::Error::other("it is no monitor: it did not answer a probe")));
    }
    Ok(Probe::parse(&text))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_host_that_works_has_no_errors() {
        let probe =
            Probe::parse("host.pvm=yes\nkvm.open=ok\nkvm.max_vcpus=1024\nkvm.create_vm=ok\nnew.fact=x\n");
        assert!(probe.works());
        assert_eq!(probe, Probe { pvm: true, max_vcpus: Some(1024), ..Probe::default() });
    }

    #[test]
    fn why_nothing_can_be_jailed_comes_with_what_would_help() {
        let probe = Probe::parse("jail=cannot change to the empty root: no\task somebody\n");
        let obstacle =
            Obstacle { why: "cannot change to the empty root: no".into(), fix: "ask somebody".into() };
        assert_eq!(probe.jail_error, Some(obstacle));
        assert!(!probe.works());
        assert_eq!(Probe::parse("jail=ok\njail.landlock=7\n").landlock, Some(7));
    }

    #[test]
    fn what_is_missing_is_named_with_its_reason() {
        let probe = Probe::parse("kvm.open=ok\nkvm.missing=KVM_CAP_X\tfor y\tdo z\nkvm.create_vm=ok\n");
        let missing = Missing { name: "KVM_CAP_X".into(), why: "for y".into(), fix: "do z".into() };
        assert_eq!(probe.missing, [missing]);
        assert!(!probe.works());
    }

    #[tokio::test]
    async fn a_program_that_is_no_monitor_is_refused() {
        let outcome = probe(&MonitorProgram::at("/bin/true")).await;
        assert!(matches!(outcome, Err(MonitorError::Spawn { .. })), "{outcome:?}");
    }
}
