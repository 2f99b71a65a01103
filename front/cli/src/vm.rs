//! `kiln vm`: machines that outlive the command that started them.

pub(crate) mod args;
mod create;
mod exec;
mod keep;
mod list;
mod start;

use kiln::detached::{DetachedError, Machines};
use serde_json::json;

use crate::failure::Failure;
use crate::terminal::note;
use crate::{Context, print};
use args::VmCommand;

/// Does what is asked for, and returns the exit code.
///
/// # Errors
/// What is to be reported.
pub(crate) async fn vm(context: &Context, command: VmCommand) -> Result<u8, Failure> {
    let machines = machines(context)?;
    if let VmCommand::Keep { vm } = command {
        return keep::keep(context, &machines, &vm).await.map(|()| 0);
    }
    tidy(context, &machines)?;
    match command {
        VmCommand::Create(args) => create::create(context, &machines, *args).await?,
        VmCommand::Start { vms } => {
            return each(&vms, async |vm| start::start(context, &machines, vm).await).await;
        }
        VmCommand::Ls { all, json } => list::list(&machines, all, json)?,
        VmCommand::Inspect { json, vm } => list::inspect(&machines, &vm, json)?,
        VmCommand::Exec(args) => return exec::exec(&machines, *args).await,
        VmCommand::Pause { vms } => {
            return each(&vms, async |vm| {
                let took = machines.reach(vm)?.pause().await?;
                if context.global.verbose > 0 {
                    note(&format!("{vm} stood still after {:.3} ms", took.as_secs_f64() * 1e3));
                }
                Ok(())
            })
            .await;
        }
        VmCommand::Resume { vms } => {
            return each(&vms, async |vm| Ok(machines.reach(vm)?.resume().await?)).await;
        }
        VmCommand::Snapshot { name, json, vm } => snapshot(context, &machines, &vm, name, json).await?,
        VmCommand::Restore { name, snapshot } => {
            create::restore(context, &machines, name, &snapshot).await?;
        }
        VmCommand::Fork { name, vm } => create::fork(context, &machines, name, &vm).await?,
        VmCommand::Stop { time, vms } => {
            return each(&vms, async |vm| Ok(machines.reach(vm)?.power_off(time).await?)).await;
        }
        VmCommand::Rm { force, vms } => {
            return each(&vms, async |vm| remove(&machines, vm, force).await).await;
        }
        // Done above.
        VmCommand::Keep { .. } => {}
    }
    Ok(0)
}

/// The machines beside the store the user chose.
fn machines(context: &Context) -> Result<Machines, Failure> {
    let root = std::path::absolute(context.root()?).map_err(Failure::host)?;
    Ok(Machines::open(root.join("vms"))?)
}

/// Puts right what crashes have left, and says so.
fn tidy(context: &Context, machines: &Machines) -> Result<(), Failure> {
    for name in machines.reconcile()? {
        if !context.global.quiet {
            note(&format!("note: the VM {name} has ended: the process it belonged to died"));
        }
    }
    Ok(())
}

/// Goes on to the next when one fails. Returns the exit code.
async fn each(names: &[String], act: impl AsyncFn(&str) -> Result<(), Failure>) -> Result<u8, Failure> {
    let mut code = 0;
    for name in names {
        if let Err(failure) = act(name).await {
            eprint!("{}", failure.report());
            code = failure.exit_code().max(code);
        }
    }
    Ok(code)
}

async fn snapshot(
    context: &Context,
    machines: &Machines,
    vm: &str,
    name: Option<String>,
    as_json: bool,
) -> Result<(), Failure> {
    let (record, standstill) = machines.reach(vm)?.snapshot(name).await?;
    if as_json {
        let object = json!({
            "key": record.key.to_string(),
            "name": record.name,
            "frozen_ns": standstill.frozen.as_nanos() as u64,
            "still_ns": standstill.still.as_nanos() as u64,
        });
        return print(&format!("{object:#}\n"));
    }
    if !context.global.quiet {
        note(&stood_still(vm, standstill));
    }
    print(&format!("{}\n", record.key))
}

/// For how long a machine did nothing.
fn stood_still(vm: &str, standstill: kiln::Standstill) -> String {
    let [frozen, still] = [standstill.frozen, standstill.still].map(|time| time.as_secs_f64() * 1e3);
    format!("{vm} was frozen for {frozen:.1} ms, of which it stood still for {still:.1} ms")
}

async fn remove(machines: &Machines, vm: &str, force: bool) -> Result<(), Failure> {
    if force {
        match machines.reach(vm) {
            Ok(kept) => kept.end().await?,
            Err(DetachedError::NotRunning(_) | DetachedError::Damaged { .. }) => {}
            Err(error) => return Err(error.into()),
        }
    }
    let removed = machines.remove(vm)?;
    print(&format!("{removed}\n"))
}
