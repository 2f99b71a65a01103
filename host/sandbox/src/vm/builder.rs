//! What a machine is to be.

use std::os::fd::OwnedFd;
use std::sync::Arc;

use kiln_oci::Image;
use kiln_protocol::Setup;
use kiln_store::{SnapshotImage, SnapshotRecord, Store};
use kiln_support::digest::Digest;
use rustix::time::ClockId;

use super::boot::{self, clock_ns};
use super::copying::{Guest, MachineCopy, Origin};
use super::{MEMORY_MIN_MIB, Phase, Times, VCPUS_MAX, Vm, VmError};
use crate::GuestBundle;
use crate::disk::{Disk, Scratch};
use crate::monitor::{LineListener, Monitor, MonitorProgram};
use crate::snapshot::{self, Bake, Content, Naming, Restored, SnapshotError, Snapshots};

type PhaseObserver = Arc<dyn Fn(Phase, u64) + Send + Sync>;
type BakeObserver = Arc<dyn Fn(Bake<'_>) + Send + Sync>;

/// What a machine is made from that its caller chose.
enum Source {
    Store(Store, SnapshotRecord),
    Copy(MachineCopy),
}

/// What a machine is to be. Made by [`Vm::builder`].
pub struct VmBuilder {
    program: MonitorProgram,
    pub(crate) guest: GuestBundle,
    pub(crate) root: Disk,
    pub(crate) memory_mib: u32,
    pub(crate) vcpus: u32,
    hostname: String,
    pub(crate) scratch: Scratch,
    volumes: Vec<String>,
    working_directory: String,
    command_is_process_1: bool,
    pub(crate) cmdline: String,
    pub(crate) console: Option<OwnedFd>,
    observer: Option<PhaseObserver>,
    warnings: Option<LineListener>,
    bakes: Option<BakeObserver>,
    pub(crate) snapshots: Option<Snapshots>,
    source: Option<Source>,
    image: Option<SnapshotImage>,
    root_objects: Option<Digest>,
    pub(crate) content: Content,
}

impl VmBuilder {
    pub(super) fn new(guest: GuestBundle, root: Disk) -> Self {
        Self {
            program: MonitorProgram::this(),
            guest,
            root,
            memory_mib: 512,
            vcpus: 1,
            hostname: "kiln".into(),
            scratch: Scratch::Memory,
            volumes: Vec::new(),
            working_directory: String::new(),
            command_is_process_1: false,
            cmdline: String::new(),
            console: None,
            observer: None,
            warnings: None,
            bakes: None,
            snapshots: None,
            source: None,
            image: None,
            root_objects: None,
            content: Content::default(),
        }
    }

    /// The executable monitors are made from; the running program by default.
    pub fn monitor_program(mut self, program: MonitorProgram) -> Self {
        self.program = program;
        self
    }

    /// Guest memory in MiB, 512 by default. It is a ceiling: memory is committed as the guest touches it.
    pub fn memory_mib(mut self, mib: u32) -> Self {
        self.memory_mib = mib;
        self
    }

    /// The number of vCPUs, 1 by default.
    pub fn vcpus(mut self, vcpus: u32) -> Self {
        self.vcpus = vcpus;
        self
    }

    /// The host name commands see; `kiln` by default.
    pub fn hostname(mut self, hostname: impl Into<String>) -> Self {
        self.hostname = hostname.into();
        self
    }

    /// Where the guest's changes to its root go; guest memory by default.
    pub fn scratch(mut self, scratch: Scratch) -> Self {
        self.scratch = scratch;
        self
    }

    /// Paths in the image that become writable places of their own (`VOLUME`).
    pub fn volumes(mut self, volumes: impl IntoIterator<Item = String>) -> Self {
        self.volumes = volumes.into_iter().collect();
        self
    }

    /// A directory that commands will start in and the image may lack. Elsewhere than under a read-only root, commands
    /// find theirs made when they start.
    pub fn working_directory(mut self, folder: impl Into<String>) -> Self {
        self.working_directory = folder.into();
        self
    }

    /// Makes the first command process 1 of the guest, as `docker run` does: when it ends, so does every other process,
    /// and there is no second command. Otherwise a reaper is, commands come and go, and orphans are collected.
    pub fn command_is_process_1(mut self, yes: bool) -> Self {
        self.command_is_process_1 = yes;
        self
    }

    /// Words added at the end of the guest kernel's command line.
    pub fn kernel_cmdline(mut self, words: impl Into<String>) -> Self {
        self.cmdline = words.into();
        self
    }

    /// Where the guest's console output goes as well.
    pub fn console(mut self, output: impl Into<OwnedFd>) -> Self {
        self.console = Some(output.into());
        self
    }

    /// Is told each phase on the way up as it happens, with its time on the host's `CLOCK_MONOTONIC` in nanoseconds.
    pub fn on_phase(mut self, observer: impl Fn(Phase, u64) + Send + Sync + 'static) -> Self {
        self.observer = Some(Arc::new(observer));
        self
    }

    /// Is told what the monitor warns of, a line at a time: a block of the image that is not what it was, for one,
    /// which the guest sees as an I/O error.
    pub fn on_warning(mut self, listener: impl Fn(&str) + Send + Sync + 'static) -> Self {
        self.warnings = Some(Arc::new(listener));
        self
    }

    /// Has the machine made from a snapshot of its image in the store, which is made first where there is none, and told
    /// which steps that takes. `image` is what the root disk is of.
    ///
    /// The snapshot is made for this host and all that is asked for here but the host name, the console and who listens.
    /// Where none can be made, the machine boots.
    pub fn snapshots(mut self, store: &Store, image: &Image) -> Self {
        self.snapshots = Some(Snapshots::new(store, image));
        self.image(image)
    }

    /// Has the machine made from this snapshot and no other; `image` is what the root disk is of, which must be what the snapshot
    /// was made of, to the last object. Its memory, vCPUs and
    /// set-up are the snapshot's, whatever is asked for here; a scratch disk is asked for when the snapshot has one.
    pub fn from_snapshot(mut self, store: &Store, record: SnapshotRecord, image: &Image) -> Self {
        self.source = Some(Source::Store(store.clone(), record));
        self.image(image)
    }

    /// Has the machine made from a copy of another of the same `image`: it becomes one of its own, with
    /// a copy of the other's disk. The same holds as for [`from_snapshot`](Self::from_snapshot).
    pub fn from_copy(mut self, copy: MachineCopy, image: &Image) -> Self {
        self.source = Some(Source::Copy(copy));
        self.image(image)
    }

    /// What image the root disk is of, for snapshots that are made of the machine. [`snapshots`](Self::snapshots) and the sources
    /// above say it too.
    pub fn image(mut self, image: &Image) -> Self {
        self.image = Some(SnapshotImage { reference: image.name.clone(), manifest: image.digest });
        self.root_objects = Some(snapshot::root_of(image));
        self
    }

    /// Is told what a start does before the machine can be made from a snapshot.
    pub fn on_bake(mut self, observer: impl Fn(Bake<'_>) + Send + Sync + 'static) -> Self {
        self.bakes = Some(Arc::new(observer));
        self
    }

    /// Makes the machine and makes it ready for commands: from a snapshot when it may, else by booting it.
    ///
    /// A dropped future ends whatever has been started.
    ///
    /// # Errors
    /// [`VmError`], by what went wrong; [`VmError::machine_end`] has the guest's last words where there are any.
    pub async fn start(self) -> Result<Vm, VmError> {
        self.check_shape()?;
        match &self.source {
            Some(Source::Store(store, record)) => {
                self.check_root(record)?;
                let restored = snapshot::start_from(&self, store, record).await?;
                return Ok(self.restored(restored));
            }
            Some(Source::Copy(copy)) => {
                self.check_root(copy.record())?;
                let restored = snapshot::start_from_copy(&self, &copy.0).await?;
                return Ok(self.restored(restored));
            }
            None => {}
        }
        if let Some(snapshots) = &self.snapshots {
            match snapshot::start(&self, snapshots).await {
                Ok(mut restored) => {
                    // Whoever has named the template wanted that of machines that are asked for by the name.
                    restored.record.commands = None;
                    return Ok(self.restored(restored));
                }
                // A machine that boots would lack what was to be put into the snapshot.
                Err(error @ (VmError::Bake(_) | VmError::Snapshot(_))) if self.content.is_empty() => {
                    self.tell_bake(Bake::Impossible(&error));
                }
                Err(error) => return Err(error),
            }
        }
        let scratch = self.scratch_disk().await?;
        let (monitor, times) =
            boot::boot(&self, &[&self.root, &scratch], |phase, at| self.tell(phase, at)).await?;
        let monitor = boot::set_up(monitor, self.setup(), &self.hostname).await?;
        self.tell(Phase::SetupDone, clock_ns(ClockId::Monotonic));
        let guest = Guest::Booted { bundle: self.guest, memory_mib: self.memory_mib, vcpus: self.vcpus };
        let origin = Origin { guest, image: self.image, root: self.root_objects, scratch, commands: None };
        Ok(Vm::new(monitor, origin, Times::Boot(times)))
    }

    fn restored(self, restored: Restored) -> Vm {
        let Restored { monitor, times, scratch, record } = restored;
        let guest = Guest::Restored(Box::new(record));
        let origin = Origin { guest, image: self.image, root: self.root_objects, scratch, commands: None };
        Vm::new(monitor, origin, Times::Restore(times))
    }

    /// Makes the snapshot that [`start`](Self::start) would make a machine from, unless the store has it, and says what it
    /// is. It is called `name` from then on, if one is given.
    ///
    /// # Errors
    /// [`VmError::Bake`] when none can be made; otherwise as [`start`](Self::start).
    ///
    /// # Panics
    /// When [`snapshots`](Self::snapshots) was not called.
    pub async fn bake(self, name: Option<String>) -> Result<SnapshotRecord, VmError> {
        self.check_shape()?;
        let snapshots = self.snapshots.as_ref().expect("the caller says which store takes the snapshot");
        snapshot::bake(&self, snapshots, name.map(|name| Naming { name, commands: None })).await
    }

    /// What the guest is asked to make ready, without what differs from one machine of its kind to the next.
    pub(crate) fn setup(&self) -> Setup {
        let read_only = self.scratch == Scratch::ReadOnly;
        Setup {
            root_device: "/dev/vda".into(),
            scratch_device: match self.scratch {
                Scratch::Disk { .. } => "/dev/vdb".into(),
                Scratch::Memory | Scratch::ReadOnly => String::new(),
            },
            read_only,
            volumes: self.volumes.clone(),
            // Elsewhere it is made when the command starts, and one kind of machine serves all.
            working_directory: if read_only { self.working_directory.clone() } else { String::new() },
            reaper: !self.command_is_process_1,
            ..Setup::default()
        }
    }

    /// The disk for the guest's changes; one that nothing is behind when they go elsewhere, for all machines have the same
    /// devices.
    async fn scratch_disk(&self) -> Result<Disk, VmError> {
        match &self.scratch {
            Scratch::Disk { folder, size_bytes } => boot::make_scratch(folder.clone(), *size_bytes).await,
            Scratch::Memory | Scratch::ReadOnly => Ok(Disk::placeholder(false)),
        }
    }

    pub(crate) async fn spawn_monitor(&self) -> Result<Monitor, VmError> {
        boot::spawn(&self.program, self.warnings.as_ref()).await
    }

    pub(crate) fn monitor(&self) -> &MonitorProgram {
        &self.program
    }

    pub(crate) fn hostname_for_guest(&self) -> &str {
        &self.hostname
    }

    pub(crate) fn tell(&self, phase: Phase, nanoseconds: u64) {
        if let Some(observer) = &self.observer {
            observer(phase, nanoseconds);
        }
    }

    pub(crate) fn tell_bake(&self, step: Bake<'_>) {
        if let Some(observer) = &self.bakes {
            observer(step);
        }
    }

    /// Refuses a snapshot of a guest that knows another root disk.
    fn check_root(&self, record: &SnapshotRecord) -> Result<(), SnapshotError> {
        if record.root == self.root_objects { Ok(()) } else { Err(SnapshotError::OtherRoot) }
    }

    fn check_shape(&self) -> Result<(), VmError> {
        if self.memory_mib < MEMORY_MIN_MIB {
            return Err(VmError::Shape(format!(
                "{} MiB of memory where {MEMORY_MIN_MIB} MiB is the least",
                self.memory_mib
            )));
        }
        if !(1..=VCPUS_MAX).contains(&self.vcpus) {
            return Err(VmError::Shape(format!("{} vCPUs where 1 to {VCPUS_MAX} are possible", self.vcpus)));
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::BuiltIn;
    use kiln_store::{ObjectId, SnapshotKind};

    #[test]
    fn a_snapshot_of_another_conversion_of_the_image_is_refused() {
        let [name, other] = ["one", "other"].map(Digest::of);
        let part = || BuiltIn { bytes: b"", sha256: name };
        let builder = |root_objects| VmBuilder {
            root_objects,
            ..Vm::builder(GuestBundle::built_in(part(), part()), Disk::placeholder(true))
        };
        let record = |root| SnapshotRecord {
            key: name,
            kind: SnapshotKind::Saved,
            name: None,
            image: None,
            root,
            service: None,
            commands: None,
            memory: ObjectId(name),
            state: name,
            scratch: None,
            memory_mib: 64,
            vcpus: 1,
            kernel: name,
            initramfs: name,
            created_unix_s: 0,
        };
        for (of, recorded) in [(Some(name), Some(other)), (Some(name), None), (None, Some(name))] {
            let refused = builder(of).check_root(&record(recorded));
            assert!(matches!(refused, Err(SnapshotError::OtherRoot)), "{of:?} {recorded:?}");
        }
        assert!(builder(Some(name)).check_root(&record(Some(name))).is_ok());
    }
}
