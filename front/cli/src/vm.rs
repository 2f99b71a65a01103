//! Machines that outlive the command that started them: `kiln run -d`, `kiln ps` and so on, and `kiln vm`.

pub(crate) mod args;
mod copy;
mod create;
mod detach;
mod events;
mod exec;
mod keep;
mod list;
mod logs;
mod names;
pub(crate) mod port;
mod start;
mod stats;
mod top;

use std::time::Duration;

use kiln::detached::{DetachedError, Machines};
use serde_json::json;

use crate::args::Run;
use crate::failure::Failure;
use crate::terminal::note;
use crate::{Context, print};
use args::{Names, Verb, VmCommand};

/// Does what is asked for, and returns the exit code.
///
/// # Errors
/// What is to be reported.
pub(crate) async fn vm(context: &Context, command: VmCommand) -> Result<u8, Failure> {
    let machines = match command {
        VmCommand::Keep { vm } => {
            return keep::keep(context, &machines(context)?, &vm).await.map(|()| 0);
        }
        VmCommand::Verb(wanted) => return verb(context, wanted).await,
        _ => tidied(context)?,
    };
    match command {
        VmCommand::Create(args) => create::create(context, &machines, *args).await?,
        VmCommand::Start(Names { vms }) => {
            return each(&vms, async |vm| start::start(context, &machines, vm).await).await;
        }
        VmCommand::Snapshot { name, json, vm } => snapshot(context, &machines, &vm, name, json).await?,
        VmCommand::Restore { name, snapshot } => {
            create::restore(context, &machines, name, &snapshot).await?;
        }
        VmCommand::Fork { name, vm } => create::fork(context, &machines, name, &vm).await?,
        // Done above.
        VmCommand::Verb(_) | VmCommand::Keep { .. } => {}
    }
    Ok(0)
}

/// Does what is asked for with VMs that are there, and returns the exit code.
///
/// # Errors
/// What is to be reported.
pub(crate) async fn verb(context: &Context, wanted: Verb) -> Result<u8, Failure> {
    let machines = tidied(context)?;
    match wanted {
        Verb::Ps(args) => list::list(context, &machines, &args)?,
        Verb::Exec(args) => return exec::exec(&machines, *args).await,
        Verb::Logs(args) => logs::logs(context, &machines, &args).await?,
        Verb::Wait(Names { vms }) => return wait(&machines, &vms).await,
        Verb::Stop(args) => {
            return each(&args.vms, async |vm| Ok(machines.reach(vm)?.power_off(args.time).await?)).await;
        }
        Verb::Restart(args) => {
            return each(&args.vms, async |vm| restart(context, &machines, vm, args.time).await).await;
        }
        Verb::Kill(args) => {
            return each(&args.vms, async |vm| Ok(machines.reach(vm)?.signal(args.signal).await?)).await;
        }
        Verb::Pause(Names { vms }) => {
            return each(&vms, async |vm| {
                let took = machines.reach(vm)?.pause().await?;
                if context.global.verbose > 0 {
                    note(&format!("{vm} stood still after {:.3} ms", took.as_secs_f64() * 1e3));
                }
                Ok(())
            })
            .await;
        }
        Verb::Resume(Names { vms }) => {
            return each(&vms, async |vm| Ok(machines.reach(vm)?.resume().await?)).await;
        }
        Verb::Rm(args) => {
            return each(&args.vms, async |vm| remove(&machines, vm, args.force).await).await;
        }
        Verb::Inspect(args) => list::inspect(&machines, &args.vm, args.json)?,
        Verb::Cp(args) => copy::copy(context, &machines, args).await?,
        Verb::Stats(args) => stats::stats(&machines, &args).await?,
        Verb::Top => return top::top(&machines).await,
        Verb::Expose(args) => port::expose(&machines, &args).await?,
        Verb::Port(args) => port::list(&machines, &args)?,
        Verb::Events(args) => events::events(&machines, &args).await?,
    }
    Ok(0)
}

/// `kiln run -d`.
///
/// # Errors
/// What is to be reported.
pub(crate) async fn run(context: &Context, args: Run) -> Result<u8, Failure> {
    detach::run(context, &tidied(context)?, args).await
}

/// The machines beside the store the user chose.
fn machines(context: &Context) -> Result<Machines, Failure> {
    let root = std::path::absolute(context.root()?).map_err(Failure::host)?;
    Ok(Machines::open(root.join("vms"))?)
}

/// The same, once what crashes have left has been put right, which is said.
fn tidied(context: &Context) -> Result<Machines, Failure> {
    let machines = machines(context)?;
    context.tidy_groups();
    for name in machines.reconcile()? {
        context.note(&format!("the VM {name} has ended: the process it belonged to died"));
    }
    Ok(machines)
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

/// `kiln wait`: prints what each ended with, and returns the last that is not 0.
async fn wait(machines: &Machines, names: &[String]) -> Result<u8, Failure> {
    let mut code = 0;
    for name in names {
        let exit = machines.ended(name).await?;
        print(&format!("{}\n", exit.code))?;
        code = if exit.code == 0 { code } else { exit.code };
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
    let mut ended = None;
    if force {
        match machines.reach(vm) {
            Ok(kept) => {
                kept.end().await?;
                ended = Some(kept.name().to_owned());
            }
            Err(DetachedError::NotRunning(_) | DetachedError::Damaged { .. }) => {}
            Err(error) => return Err(error.into()),
        }
    }
    let removed = match (machines.remove(vm), ended) {
        // One that was to be removed when it ended.
        (Err(DetachedError::Unknown(_)), Some(name)) => name,
        (removed, _) => removed?,
    };
    print(&format!("{removed}\n"))
}

/// `kiln restart` for one VM.
async fn restart(context: &Context, machines: &Machines, vm: &str, time: Duration) -> Result<(), Failure> {
    let name = machines.find(vm)?.name;
    match machines.reach(&name) {
        Ok(kept) => kept.power_off(time).await?,
        Err(DetachedError::NotRunning(_)) => {}
        Err(error) => return Err(error.into()),
    }
    start::start(context, machines, &name).await
}
