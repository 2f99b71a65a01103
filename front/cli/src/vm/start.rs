//! Starting VMs: each belongs to a process of its own, which is this program again.

use std::io::Read as _;
use std::process::{Command, Stdio};

use kiln::detached::{DetachedError, Machines, Origin, State, VmRecord};
use kiln::{Blame, VmError};
use serde::{Deserialize, Serialize};

use super::{keep, stood_still};
use crate::failure::Failure;
use crate::terminal::{note, printable};
use crate::{Context, images, machine, print, progress};

/// The most that is read of what a keeper says before it goes into the background.
const WORD_BYTES_MAX: u64 = 64 << 10;

/// What a keeper says once: its VM runs, or why it does not.
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(super) enum Word {
    /// The VM runs and can be reached.
    Ready {
        /// For how long the VM that it was forked from was frozen and stood still, in nanoseconds.
        forked_ns: Option<(u64, u64)>,
    },
    /// There is none.
    Failed {
        /// The report, as users see it.
        report: String,
        /// Whose fault: the exit code.
        code: u8,
        /// The exit code of a command that could not be started.
        refused: Option<u8>,
    },
}

/// `kiln vm start` for one VM.
///
/// # Errors
/// When it runs already or cannot be started.
pub(crate) async fn start(context: &Context, machines: &Machines, name: &str) -> Result<(), Failure> {
    let record = machines.find(name)?;
    if record.state.is_up() {
        return Err(DetachedError::Running(record.name).into());
    }
    if let (Origin::Fork { of }, State::Ended) = (&record.origin, record.state) {
        let what = format!("the VM {} was a fork of {of}, and nothing is left to start it from", record.name);
        return Err(Failure::caller(what).hint("save a VM to start from it later: kiln vm snapshot"));
    }
    bake(context, &record).await?;
    keeper(context, machines, &record).await?;
    print(&format!("{}\n", record.name))
}

/// Bakes what the VM is to be made from while its user can see it. Where that cannot be done, the keeper says so and boots.
///
/// # Errors
/// When the VM could not be described, or a machine not be made.
pub(super) async fn bake(context: &Context, record: &VmRecord) -> Result<(), Failure> {
    if record.origin != Origin::Image || record.boots {
        return Ok(());
    }
    let store = images::store(context)?;
    let spinner = progress::spinner(context, format!("starting {}", record.name));
    let (builder, image) = keep::builder(context, &store, record)?;
    let builder = machine::with_snapshots(context, builder, &store, &image, spinner.clone());
    match builder.bake(None).await {
        Ok(_) | Err(VmError::Bake(_) | VmError::Snapshot(_)) => Ok(()),
        Err(error) => Err(error.into()),
    }
}

/// Starts the process that a VM belongs to, and waits until the VM runs.
///
/// # Errors
/// What the process reports, or how it ended.
pub(super) async fn keeper(context: &Context, machines: &Machines, record: &VmRecord) -> Result<(), Failure> {
    let mut command = Command::new("/proc/self/exe");
    command.arg("--root").arg(std::path::absolute(context.root()?).map_err(Failure::host)?);
    command.args(["vm", "keep", &record.name]);
    command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(machines.new_log(&record.name)?);
    let mut child = command.spawn().map_err(Failure::host)?;
    let mut stdout = child.stdout.take();
    let word = tokio::task::spawn_blocking(move || {
        let mut word = Vec::new();
        let read = stdout.as_mut().map(|stdout| stdout.take(WORD_BYTES_MAX).read_to_end(&mut word));
        read.transpose().map(|_| word)
    });
    let word = word.await.map_err(|error| Failure::new(Blame::Kiln, error))?.map_err(Failure::host)?;
    match serde_json::from_slice(&word) {
        Ok(Word::Ready { forked_ns }) => {
            if let (Some((frozen, still)), Origin::Fork { of }, false) =
                (forked_ns, &record.origin, context.global.quiet)
            {
                let [frozen, still] = [frozen, still].map(std::time::Duration::from_nanos);
                note(&stood_still(of, kiln::Standstill { frozen, still }));
            }
            Ok(())
        }
        Ok(Word::Failed { report, code, refused }) => Err(Failure::reported(report, code, refused)),
        Err(_) => {
            let status = child.wait().map_err(Failure::host)?;
            let log = machines.folder_of(&record.name).join("log");
            let said = std::fs::read_to_string(&log).unwrap_or_default();
            let last = said.lines().last().map(|line| format!(": {}", printable(line))).unwrap_or_default();
            Err(Failure::new(
                Blame::Kiln,
                format!("the keeper of the VM {} died ({status}){last}", record.name),
            ))
        }
    }
}
