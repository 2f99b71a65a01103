//! Snapshots: listed, looked into, checked, removed.

use std::time::{Duration, SystemTime};

use comfy_table::CellAlignment;
use comfy_table::presets::NOTHING;
use indicatif::HumanBytes;
use kiln::Digest;
use kiln::store::{SnapshotRecord, Store};
use serde_json::{Value, json};

use crate::failure::Failure;
use crate::images::{self, ago, short};
use crate::{Context, print};

/// `kiln snapshot ls`.
///
/// # Errors
/// When the store cannot be read.
pub(crate) fn list(context: &Context, as_json: bool) -> Result<(), Failure> {
    let store = images::store(context)?;
    let (snapshots, damaged) = store.snapshots()?;
    if as_json {
        let sound = snapshots.iter().map(|snapshot| describe(&store, snapshot));
        let damaged = damaged.iter().map(|key| json!({"key": key.to_string(), "damaged": true}));
        return print(&format!("{:#}\n", Value::Array(sound.chain(damaged).collect())));
    }
    print(&table(&store, &snapshots, &damaged, SystemTime::now()))
}

fn table(store: &Store, snapshots: &[SnapshotRecord], damaged: &[Digest], now: SystemTime) -> String {
    let mut table = comfy_table::Table::new();
    table.load_preset(NOTHING).set_header(["KEY", "KIND", "NAME", "IMAGE", "MEMORY", "CPUS", "SIZE", "MADE"]);
    for snapshot in snapshots {
        let made = SystemTime::UNIX_EPOCH + Duration::from_secs(snapshot.created_unix_s.min(u32::MAX.into()));
        let image = snapshot.image.as_ref().map_or("-", |image| &image.reference);
        table.add_row([
            short(&snapshot.key),
            snapshot.kind.name().to_owned(),
            snapshot.name.clone().unwrap_or_else(|| "-".to_owned()),
            image.to_owned(),
            format!("{} MiB", snapshot.memory_mib),
            snapshot.vcpus.to_string(),
            disk_bytes(store, snapshot).map_or("damaged".to_owned(), |bytes| HumanBytes(bytes).to_string()),
            ago(now.duration_since(made).unwrap_or_default()),
        ]);
    }
    for key in damaged {
        table.add_row([short(key), "damaged".to_owned()]);
    }
    for index in [4, 5, 6] {
        if let Some(column) = table.column_mut(index) {
            column.set_cell_alignment(CellAlignment::Right);
        }
    }
    images::lines(&table)
}

/// What the memory and the disk of a snapshot take on the host's disk; `None` when something is missing or damaged.
fn disk_bytes(store: &Store, snapshot: &SnapshotRecord) -> Option<u64> {
    snapshot.objects().map(|id| store.object(id).ok()?.disk_bytes().ok()).sum()
}

/// A snapshot as JSON.
pub(crate) fn describe(store: &Store, snapshot: &SnapshotRecord) -> Value {
    json!({
        "key": snapshot.key.to_string(),
        "kind": snapshot.kind.name(),
        "name": snapshot.name,
        "image": snapshot.image.as_ref().map(|image| {
            json!({"name": image.reference, "digest": image.manifest.to_string()})
        }),
        "service": snapshot.service,
        "commands": snapshot.commands,
        "memory": snapshot.memory.to_string(),
        "state": snapshot.state.to_string(),
        "scratch": snapshot.scratch.map(|id| id.to_string()),
        "memory_mib": snapshot.memory_mib,
        "vcpus": snapshot.vcpus,
        "kernel": snapshot.kernel.to_string(),
        "initramfs": snapshot.initramfs.to_string(),
        "created_unix_s": snapshot.created_unix_s,
        "disk_bytes": disk_bytes(store, snapshot),
    })
}

/// `kiln snapshot inspect`.
///
/// # Errors
/// When there is no such snapshot.
pub(crate) fn inspect(context: &Context, name: &str) -> Result<(), Failure> {
    let store = images::store(context)?;
    print(&format!("{:#}\n", describe(&store, &find(&store, name)?)))
}

/// The snapshot of this name or key.
///
/// # Errors
/// When there is none.
pub(crate) fn find(store: &Store, name: &str) -> Result<SnapshotRecord, Failure> {
    store.find_snapshot(name)?.ok_or_else(|| unknown(name))
}

/// `kiln snapshot rm`: goes on to the next when one cannot be removed. Returns the exit code.
///
/// # Errors
/// When the store cannot be opened or collected.
pub(crate) fn remove(context: &Context, names: &[String]) -> Result<u8, Failure> {
    let store = images::store(context)?;
    let code = each(names, |name| {
        let key = key(&store, name)?;
        if store.remove_snapshot(&key)? { print(&format!("removed {key}\n")) } else { Err(unknown(name)) }
    });
    let freed = store.collect()?.bytes;
    if !context.global.quiet {
        eprintln!("freed {}", HumanBytes(freed));
    }
    Ok(code)
}

/// `kiln snapshot verify`: every snapshot when none is named. Returns the exit code.
///
/// # Errors
/// When the store cannot be read.
pub(crate) fn verify(context: &Context, names: &[String]) -> Result<u8, Failure> {
    let store = images::store(context)?;
    let mut names = names.to_vec();
    if names.is_empty() {
        let (sound, damaged) = store.snapshots()?;
        names = sound.iter().map(|snapshot| snapshot.key).chain(damaged).map(|key| key.hex()).collect();
    }
    Ok(each(&names, |name| {
        let snapshot = store.snapshot(&key(&store, name)?)?.ok_or_else(|| unknown(name))?;
        kiln::verify(&store, &snapshot).map_err(|error| damaged(error, name))?;
        print(&format!("{} is sound\n", snapshot.key))
    }))
}

/// The key of a snapshot by any of its names; by its whole key also when its record is damaged.
fn key(store: &Store, name: &str) -> Result<Digest, Failure> {
    if let Some(snapshot) = store.find_snapshot(name)? {
        return Ok(snapshot.key);
    }
    let digits = name.strip_prefix("sha256:").unwrap_or(name);
    let (_, damaged) = store.snapshots()?;
    let mut found = damaged.into_iter().filter(|key| !digits.is_empty() && key.hex().starts_with(digits));
    found.next().ok_or_else(|| unknown(name))
}

fn each(names: &[String], act: impl Fn(&str) -> Result<(), Failure>) -> u8 {
    let mut code = 0;
    for name in names {
        if let Err(failure) = act(name) {
            eprint!("{}", failure.report());
            code = failure.exit_code().max(code);
        }
    }
    code
}

fn damaged(error: kiln::VmError, name: &str) -> Failure {
    Failure::from(error)
        .hint(format!("remove it (kiln snapshot rm {name}); a base or template is made again when needed"))
}

fn unknown(name: &str) -> Failure {
    Failure::caller(format!("no snapshot is called {name}, and no single key starts so"))
        .hint("kiln snapshot ls shows what there is")
}
