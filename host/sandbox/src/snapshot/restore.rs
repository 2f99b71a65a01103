//! A machine made from a snapshot.

use std::io::BufReader;
use std::os::fd::OwnedFd;

use kiln_control::Restore;
use kiln_protocol::mailbox::{Bounds, Generation, HOSTNAME_BYTES_MAX};
use kiln_snapshot::Header;
use kiln_store::{Snapshot, SnapshotRecord, Store, StoreError};
use kiln_support::from_start::FromStart;
use rustix::time::ClockId;
use tokio::try_join;

use super::{BakeError, Restored, SnapshotError, park};
use crate::agent::AgentError;
use crate::disk::{self, Descriptors, Disk, Scratch};
use crate::monitor::{Monitor, MonitorError, RestoreTimes};
use crate::vm::boot::{blocking, check_fit, clock_ns, random};
use crate::vm::{GUEST_CID, Phase, VmBuilder, VmError};

/// Makes the machine that the builder describes from the template it is to be made from.
pub(super) async fn machine(builder: &VmBuilder, template: &Snapshot) -> Result<Restored, VmError> {
    if template.scratch.is_some() != template.record.scratch.is_some()
        || template.scratch.is_some() != matches!(builder.scratch, Scratch::Disk { .. })
    {
        return Err(SnapshotError::Mixed.into());
    }
    let (monitor, scratch) = try_join!(builder.spawn_monitor(), scratch(&builder.scratch, template))?;
    let hostname = builder.hostname_for_guest();
    let disks = [&builder.root, &scratch];
    let (monitor, times) =
        restore(monitor, template, &disks, builder.console.as_ref(), hostname, |phase, at| {
            builder.tell(phase, at);
        })
        .await?;
    Ok(Restored { monitor, times, scratch, record: template.record.clone() })
}

/// The disk for the changes of a machine of a snapshot.
pub(crate) async fn scratch(scratch: &Scratch, snapshot: &Snapshot) -> Result<Disk, VmError> {
    let (Scratch::Disk { folder, .. }, Some(from)) = (scratch, &snapshot.scratch) else {
        return Ok(Disk::placeholder(false));
    };
    let folder = folder.clone();
    let from = from.try_clone().map_err(|source| BakeError::Host {
        action: "open",
        what: "the snapshot's disk".into(),
        source,
    })?;
    Ok(blocking(move || disk::scratch_copy(&folder, &from)).await?)
}

/// Has a monitor make the machine of a snapshot, with these disks, and waits until it is the one it is to be.
pub(super) async fn restore(
    monitor: Monitor,
    snapshot: &Snapshot,
    disks: &[&Disk],
    console: Option<&OwnedFd>,
    hostname: &str,
    tell: impl Fn(Phase, u64),
) -> Result<(Monitor, RestoreTimes), VmError> {
    let coming_up = async {
        let mut times = make(&monitor, snapshot, disks, console, hostname, Bounds::default()).await?;
        tell(Phase::MonitorSpawned, times.spawned_ns);
        tell(Phase::Entered, times.entered_ns);
        if monitor.waits_at_port() {
            tell(Phase::ResumedWithoutDoorbell, times.resumed_ns);
        } else {
            tell(Phase::Resumed, times.resumed_ns);
            times = monitor.adopted().await.map_err(refused)?;
        }
        tell(Phase::Adopted, times.adopted_ns);
        Ok(times)
    };
    match coming_up.await {
        Ok(times) => Ok((monitor, times)),
        Err(VmError::Monitor(MonitorError::NotAdopted)) => {
            Err(SnapshotError::Overdue(monitor.stop().await).into())
        }
        Err(error) => Err(error),
    }
}

/// The order to make the machine of a snapshot, and the files beside it.
fn order<'fd>(
    snapshot: &'fd Snapshot,
    disks: &[&'fd Disk],
    console: Option<&'fd OwnedFd>,
    generation: Option<&Generation>,
    descriptors: &mut Descriptors<'fd>,
) -> Result<Restore, VmError> {
    let order = Restore {
        state_fd: descriptors.add(&snapshot.state),
        memory_fd: descriptors.add(&snapshot.memory),
        disks: disk::describe(disks, descriptors),
        console_fd: console.map(|console| descriptors.add(console)),
        cid: GUEST_CID,
        generation: generation.map(|generation| generation.encode().to_vec()),
        stand: false,
    };
    check_fit(descriptors)?;
    Ok(order)
}

/// Has a monitor make the machine of a snapshot, with these disks, in which its guest waits to be claimed. What the monitor
/// had for a machine before is the guest's.
pub(crate) async fn stand(monitor: &Monitor, snapshot: &Snapshot, disks: &[&Disk]) -> Result<(), VmError> {
    check_header(snapshot)?;
    let mut descriptors = Descriptors::default();
    let order = order(snapshot, disks, None, None, &mut descriptors)?;
    monitor.stand(order, descriptors.as_slice()).await.map(drop).map_err(refused)
}

/// What it means that a monitor did not make the machine of a snapshot: one whose machine ended had something against it.
fn refused(error: MonitorError) -> VmError {
    match error {
        MonitorError::Ended(end) => SnapshotError::Refused(end).into(),
        error => error.into(),
    }
}

/// Lets a guest that waits become one of its own, and says when it acknowledged that. Nothing reaches it before it is that one, with these
/// bounds to its processes.
pub(crate) async fn claim(
    monitor: &Monitor,
    hostname: &str,
    bounds: Bounds,
) -> Result<RestoreTimes, VmError> {
    let generation = generation(hostname, bounds)?;
    let times = monitor.claim(generation.encode().to_vec()).await?;
    told(monitor, generation, times).await
}

/// Has a monitor make the machine of a snapshot, with these disks and this console, as one of its own; otherwise as [`claim`].
pub(crate) async fn make(
    monitor: &Monitor,
    snapshot: &Snapshot,
    disks: &[&Disk],
    console: Option<&OwnedFd>,
    hostname: &str,
    bounds: Bounds,
) -> Result<RestoreTimes, VmError> {
    check_header(snapshot)?;
    let generation = generation(hostname, bounds)?;
    let mut descriptors = Descriptors::default();
    let order = order(snapshot, disks, console, Some(&generation), &mut descriptors)?;
    let times = monitor.restore(order, descriptors.as_slice()).await.map_err(refused)?;
    told(monitor, generation, times).await
}

/// Tells a guest that waits at its port who it is.
async fn told(
    monitor: &Monitor,
    generation: Generation,
    mut times: RestoreTimes,
) -> Result<RestoreTimes, VmError> {
    if monitor.waits_at_port() {
        let asked = || times.resumed_ns = clock_ns(ClockId::Monotonic);
        let told = async { Ok(park::tell(monitor, Some(generation), asked).await) };
        match monitor.in_time(told).await? {
            Ok(()) => times.adopted_ns = clock_ns(ClockId::Monotonic),
            Err(AgentError::MachineEnded(end)) => return Err(SnapshotError::Refused(end).into()),
            Err(error) => return Err(SnapshotError::NotAdopted(error).into()),
        }
    }
    Ok(times)
}

/// Refuses a state that is not that of the record it is found by; the rest of it is the monitor's to check.
fn check_header(snapshot: &Snapshot) -> Result<(), VmError> {
    let header = kiln_snapshot::read_header(&mut FromStart::of(&snapshot.state));
    let header = header.map_err(SnapshotError::Damaged)?;
    if is_of(&header, &snapshot.record) { Ok(()) } else { Err(SnapshotError::Mixed.into()) }
}

fn is_of(header: &Header, record: &SnapshotRecord) -> bool {
    header.memory == record.memory.0
        && header.memory_bytes == u64::from(record.memory_mib) << 20
        && header.vcpus == record.vcpus
        && header.kernel == record.kernel
        && header.initramfs == record.initramfs
}

/// Who a restored guest becomes. The monitor fills in the clock when it enters the guest.
fn generation(hostname: &str, bounds: Bounds) -> Result<Generation, VmError> {
    if !is_hostname(hostname) {
        return Err(BakeError::Hostname(hostname.to_owned()).into());
    }
    Ok(Generation {
        // All zeros, one in 2^128, would be no mail.
        id: random()?,
        realtime_ns: clock_ns(ClockId::Realtime),
        entropy: random()?,
        machine_id: random_uuid()?,
        boot_id: random_uuid()?,
        hostname: hostname.to_owned(),
        bounds,
    })
}

/// Whether a restored guest can be called so.
pub(crate) fn is_hostname(name: &str) -> bool {
    let is_good = |byte: u8| byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'.' | b'_');
    !name.is_empty() && name.len() <= HOSTNAME_BYTES_MAX && name.bytes().all(is_good)
}

/// A random UUID. RFC 9562 §5.4 "UUID Version 4"; machine-id(5) asks for one too.
fn random_uuid() -> Result<[u8; 16], VmError> {
    let mut bytes: [u8; 16] = random()?;
    bytes[6] = bytes[6] & 0x0f | 0x40;
    bytes[8] = bytes[8] & 0x3f | 0x80;
    Ok(bytes)
}

/// Checks every byte of a snapshot: its memory, its disk, its state. Cost: reading and hashing all of it. Blocks.
///
/// # Errors
/// What is damaged or missing.
pub fn verify(store: &Store, record: &SnapshotRecord) -> Result<(), VmError> {
    for id in record.objects() {
        store.object(id).and_then(|object| object.verify()).map_err(BakeError::Store)?;
    }
    let state = store.blob(&record.state).map_err(BakeError::Store)?;
    let missing = || StoreError::Missing { what: format!("the state of snapshot {}", record.key) };
    let state = state.ok_or_else(missing).map_err(BakeError::Store)?;
    let (header, _) =
        kiln_snapshot::read(&mut BufReader::new(state.as_slice())).map_err(SnapshotError::Damaged)?;
    if is_of(&header, record) { Ok(()) } else { Err(SnapshotError::Mixed.into()) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{BuiltIn, GuestBundle, MonitorProgram, Vm};
    use kiln_store::{ObjectId, SnapshotKind};
    use kiln_support::digest::Digest;

    #[tokio::test]
    async fn a_scratch_disk_that_is_not_the_snapshots_is_mixed() {
        let folder = tempfile::tempdir().expect("a folder");
        let file = || tempfile::tempfile().expect("a file");
        let disk = Scratch::Disk { folder: folder.path().into(), size_bytes: 0 };
        let name = Digest::EMPTY;
        for (asked, recorded, there) in [
            (Scratch::Memory, true, true),
            (Scratch::ReadOnly, true, true),
            (disk.clone(), false, false),
            (disk.clone(), true, false),
            (disk, false, true),
        ] {
            let record = SnapshotRecord {
                key: name,
                kind: SnapshotKind::Saved,
                name: None,
                image: None,
                root: None,
                service: None,
                commands: None,
                memory: ObjectId(name),
                state: name,
                scratch: recorded.then_some(ObjectId(name)),
                memory_mib: 64,
                vcpus: 1,
                kernel: name,
                initramfs: name,
                created_unix_s: 0,
            };
            let scratch = there.then(file);
            let template = Snapshot { record, memory: file(), state: file(), scratch };
            let part = || BuiltIn { bytes: b"", sha256: name };
            let guest = GuestBundle::built_in(part(), part());
            // No monitor is started for it.
            let nothing = MonitorProgram::at("/nonexistent");
            let builder = Vm::builder(guest, Disk::placeholder(true)).scratch(asked).monitor_program(nothing);
            let refused = machine(&builder, &template).await;
            assert!(matches!(refused, Err(VmError::Snapshot(SnapshotError::Mixed))));
        }
    }

    #[test]
    fn every_generation_is_another() {
        let [one, two] = [(); 2].map(|()| generation("box-1", Bounds::default()).expect("random bytes"));
        assert_ne!(one.id, two.id);
        assert_ne!(one.entropy, two.entropy);
        assert_ne!(one.machine_id, two.machine_id);
        assert_ne!(one.boot_id, two.boot_id);
        assert_eq!(Generation::decode(&one.encode()), Some(one));
    }

    #[test]
    fn a_name_that_a_mailbox_cannot_carry_is_refused() {
        for bad in ["", "a b", "ä", &"a".repeat(HOSTNAME_BYTES_MAX + 1)] {
            assert!(
                matches!(generation(bad, Bounds::default()), Err(VmError::Bake(BakeError::Hostname(_)))),
                "{bad}"
            );
        }
    }
}
