//! A monitor's process: started into its jail, waited for, killed.

use std::fmt;
use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::AsFd;
use std::process::ExitStatus;
use std::sync::Arc;

use kiln_jail::{Child, Launch, SpawnError};
use kiln_support::causes::with_causes;
use tokio::io::Interest;
use tokio::net::unix::pipe;
use tokio::runtime::Handle;

use super::group::{self, Group, GroupError, Groups};
use super::{MONITOR_NAME, MachineEnd, MonitorError, MonitorProgram};
use crate::Blame;
use crate::readiness::Readiness;

/// What machines are made by. A monitor cannot open it, so it is given it.
const DEVICE: &str = "/dev/kvm";
const NULL: &str = "/dev/null";

/// Why there is no process. The host is to blame.
#[derive(Debug)]
pub(super) enum StartError {
    /// This user may not use KVM, or there is none.
    Device(io::Error),
    /// This user may not make namespaces.
    Namespaces(io::Error),
    /// The program cannot be executed.
    Execute(MonitorProgram, io::Error),
    /// Control groups cannot be used although this user wants them.
    Groups(&'static GroupError),
    /// No control group can be made.
    Group(GroupError),
    /// No process can be started in a control group.
    Born(io::Error),
    /// The host is out of something.
    Setup(io::Error),
}

/// A process in its jail; dropping it kills it.
#[derive(Debug)]
pub(super) struct Process {
    /// `None` once it has been waited for.
    running: Option<Running>,
    was_out_of_memory: bool,
}

#[derive(Debug)]
struct Running {
    child: Child,
    /// When the process has ended.
    readiness: Readiness,
    /// Who waits for it should its handle be dropped.
    runtime: Handle,
    /// Where there are such.
    group: Option<Arc<Group>>,
}

impl Process {
    /// Starts `program` as a monitor with these arguments, `stdin` and `stdout`, and returns what reads its stderr.
    pub(super) fn start(
        program: &MonitorProgram,
        arguments: &[&str],
        stdin: &impl AsFd,
        stdout: &impl AsFd,
    ) -> Result<(Self, pipe::Receiver), StartError> {
        let device = OpenOptions::new().read(true).write(true).open(DEVICE).map_err(StartError::Device)?;
        let (reading, stderr) = io::pipe().map_err(StartError::Setup)?;
        let reading = pipe::Receiver::from_owned_fd(reading.into()).map_err(StartError::Setup)?;
        let mut args = vec![MONITOR_NAME];
        args.extend(arguments);
        let fds = [stdin.as_fd(), stdout.as_fd(), stderr.as_fd(), device.as_fd()];
        let group = group::groups().map_err(StartError::Groups)?;
        let group = group.map(Groups::new_group).transpose().map_err(StartError::Group)?.map(Arc::new);
        let cgroup = group.as_ref().map(|group| group.as_fd());
        let launch = Launch { program: program.executable(), args: &args, fds: &fds, cgroup };
        let spawned = kiln_jail::spawn(&launch).inspect_err(|_| {
            group.as_ref().map(|group| group.remove());
        });
        let child = spawned.map_err(|error| match error {
            SpawnError::Namespaces(source) => StartError::Namespaces(source),
            SpawnError::Group(source) => StartError::Born(source),
            SpawnError::Execute(source) => StartError::Execute(program.clone(), source),
            SpawnError::Host(source) => StartError::Setup(source),
        })?;
        match readiness(&child) {
            Ok(readiness) => Ok((
                Self {
                    running: Some(Running { child, readiness, runtime: Handle::current(), group }),
                    was_out_of_memory: false,
                },
                reading,
            )),
            Err(error) => {
                let _ = child.kill().and_then(|()| child.wait());
                group.map(|group| group.remove());
                Err(StartError::Setup(error))
            }
        }
    }

    /// Waits for its end, and says how that was: once. Can be cancelled.
    pub(super) async fn wait(&mut self) -> io::Result<ExitStatus> {
        let Some(running) = &self.running else { return Err(io::ErrorKind::NotFound.into()) };
        let status = running.ended().await;
        let group = self.running.take().and_then(|running| running.group);
        if let Some(group) = group {
            // On a thread of its own: to remove a group the kernel waits for its locks.
            let removed = tokio::task::spawn_blocking(move || group.remove());
            self.was_out_of_memory = removed.await.unwrap_or(false);
        }
        status
    }

    /// Whether it was killed since it had more memory than its control group may have. Known once it has been waited for.
    pub(super) fn was_out_of_memory(&self) -> bool {
        self.was_out_of_memory
    }

    /// Its control group, if it has one.
    pub(super) fn group(&self) -> Option<Arc<Group>> {
        self.running.as_ref()?.group.clone()
    }

    /// Its process id; 0 once it has been waited for.
    pub(super) fn id(&self) -> u32 {
        self.running.as_ref().map_or(0, |running| running.child.id())
    }

    /// Kills it.
    pub(super) fn kill(&self) -> io::Result<()> {
        self.running.as_ref().map_or(Ok(()), |running| running.child.kill())
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        let Some(running) = self.running.take() else { return };
        // One that cannot be killed has ended.
        let _ = running.child.kill();
        // So that nothing is left of it. Where the runtime does not run any more, this process goes as well.
        let runtime = running.runtime.clone();
        runtime.spawn(async move {
            let _ = running.ended().await;
            if let Some(group) = running.group {
                tokio::task::spawn_blocking(move || group.remove());
            }
        });
    }
}

impl Running {
    async fn ended(&self) -> io::Result<ExitStatus> {
        let wait = || self.child.try_wait()?.ok_or_else(|| io::ErrorKind::WouldBlock.into());
        self.readiness.when(Interest::READABLE, wait).await
    }
}

fn readiness(child: &Child) -> io::Result<Readiness> {
    let descriptor = child.as_fd().try_clone_to_owned()?;
    rustix::io::ioctl_fionbio(&descriptor, true)?;
    Readiness::of(descriptor)
}

/// A stream that is nothing.
pub(super) fn null() -> Result<File, StartError> {
    OpenOptions::new().read(true).write(true).open(NULL).map_err(StartError::Setup)
}

impl fmt::Display for StartError {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Device(error) => write!(formatter, "cannot open {DEVICE}: {error}"),
            Self::Namespaces(error) => {
                write!(formatter, "cannot make the namespaces of a machine's process: {error}")
            }
            Self::Execute(program, error) => write!(formatter, "cannot execute {program}: {error}"),
            Self::Groups(error) => formatter.write_str(&with_causes(error)),
            Self::Group(error) => formatter.write_str(&with_causes(error)),
            Self::Born(error) => write!(formatter, "cannot start a process in a control group: {error}"),
            Self::Setup(error) => write!(formatter, "cannot start a process: {error}"),
        }
    }
}

impl StartError {
    /// What would help, or empty.
    pub(super) fn hint(&self) -> &'static str {
        let error = match self {
            Self::Device(error) => error,
            Self::Groups(error) => return error.hint(),
            Self::Group(error) => return error.hint(),
            Self::Born(_) => {
                return "the host's own group must be one below the folder that KILN_CGROUP names, or below its parent; unset it to go without";
            }
            _ => return "kiln doctor says whether this user may make namespaces, and what would help",
        };
        match error.kind() {
            io::ErrorKind::PermissionDenied => {
                "add yourself to the group that owns /dev/kvm, usually kvm: sudo usermod -aG kvm $USER, then log in again"
            }
            io::ErrorKind::NotFound => {
                "enable virtualization in the firmware and load kvm_intel or kvm_amd; in a VM, enable nested virtualization"
            }
            _ => "",
        }
    }
}

impl From<StartError> for MonitorError {
    fn from(error: StartError) -> Self {
        match error {
            StartError::Execute(program, source) => Self::Spawn { program, source },
            StartError::Setup(source) => Self::Setup(source),
            // What the host lacks for any machine is a machine's end that never began.
            _ => {
                let (message, hint) = (error.to_string(), error.hint().to_owned());
                Arc::new(MachineEnd::Failed { blame: Blame::Host, message, hint }).into()
            }
        }
    }
}
