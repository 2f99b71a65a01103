//! What an image is to be made of.

use std::error::Error;
use std::ffi::OsString;
use std::path::PathBuf;
use std::pin::Pin;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use kiln_oci::{Config, Image as Pulled, Platform, Progress, PullOptions, PullPolicy, Source};
use kiln_store::{Snapshot, SnapshotRecord, Store};

use super::{Image, ImageError, Inner, Member, disk};
use crate::GuestBundle;
use crate::disk::Scratch;
use crate::launch::{Launch, Overrides};
use crate::monitor::{LineListener, MonitorProgram};
use crate::snapshot::{self, Bake, BakeError, HostFile, Naming, SnapshotError, Trigger};
use crate::vm::boot::blocking;
use crate::vm::{Vm, VmBuilder, VmError};

/// How long a command may take until it listens, unless told otherwise.
const READY_LIMIT: Duration = Duration::from_mins(2);
/// What the guest sees as the size of its disk, unless told otherwise, in bytes.
const SCRATCH_BYTES: u64 = 10 << 30;

/// What a warm-up in Rust is: it is given the machine that is being baked.
pub(crate) type WarmUp = Arc<dyn for<'vm> Fn(&'vm Vm) -> WarmingUp<'vm> + Send + Sync>;
/// A warm-up under way.
pub type WarmingUp<'vm> =
    Pin<Box<dyn Future<Output = Result<(), Box<dyn Error + Send + Sync>>> + Send + 'vm>>;

type BakeObserver = Arc<dyn Fn(Bake<'_>) + Send + Sync>;

/// What an image is to be made of. Made by [`Image::builder`].
#[must_use]
pub struct ImageBuilder {
    reference: String,
    store: Option<Store>,
    folder: Option<PathBuf>,
    name: Option<String>,
    pull: PullOptions,
    progress: Arc<dyn Progress>,
    program: Option<MonitorProgram>,
    guest: Option<GuestBundle>,
    warnings: Option<LineListener>,
    bakes: Option<BakeObserver>,
    memory_mib: u32,
    vcpus: u32,
    scratch_bytes: Option<u64>,
    read_only: bool,
    hostname: Option<String>,
    volumes: Vec<String>,
    cmd: Option<Vec<OsString>>,
    env: Vec<OsString>,
    user: Option<String>,
    workdir: Option<String>,
    guest_port: Option<u16>,
    listener_required: bool,
    ready: Option<Trigger>,
    ready_limit: Duration,
    files: Vec<(PathBuf, String)>,
    warm_ups: Vec<Vec<OsString>>,
    warm_up: Option<(String, WarmUp)>,
}

impl ImageBuilder {
    pub(super) fn new(reference: String) -> Self {
        Self {
            reference,
            store: None,
            folder: None,
            name: None,
            pull: PullOptions::default(),
            progress: Arc::new(()),
            program: None,
            guest: None,
            warnings: None,
            bakes: None,
            memory_mib: 512,
            vcpus: 1,
            scratch_bytes: Some(SCRATCH_BYTES),
            read_only: false,
            hostname: None,
            volumes: Vec::new(),
            cmd: None,
            env: Vec::new(),
            user: None,
            workdir: None,
            guest_port: None,
            listener_required: true,
            ready: None,
            ready_limit: READY_LIMIT,
            files: Vec::new(),
            warm_ups: Vec::new(),
            warm_up: None,
        }
    }

    /// Where images and snapshots are kept; the user's own store by default ([`Store::default_root`]).
    pub fn store(mut self, store: &Store) -> Self {
        self.store = Some(store.clone());
        self
    }

    /// The folder of the store, made when it is missing.
    pub fn snapshot_dir(mut self, folder: impl Into<PathBuf>) -> Self {
        self.folder = Some(folder.into());
        self
    }

    /// What the snapshot is called in the store, where [`Image::from_snapshot`] finds it, with how commands run in its machines.
    pub fn name(mut self, name: impl Into<String>) -> Self {
        self.name = Some(name.into());
        self
    }

    /// When the image's source is asked; when the store does not have it, by default.
    pub fn pull_policy(mut self, policy: PullPolicy) -> Self {
        self.pull.policy = policy;
        self
    }

    /// What it is to run on; this host's platform by default.
    pub fn platform(mut self, platform: Platform) -> Self {
        self.pull.platform = Some(platform);
        self
    }

    /// Is told how the pull goes.
    pub fn on_pull(mut self, progress: Arc<dyn Progress>) -> Self {
        self.progress = progress;
        self
    }

    /// Is told which steps the bake takes.
    pub fn on_bake(mut self, observer: impl Fn(Bake<'_>) + Send + Sync + 'static) -> Self {
        self.bakes = Some(Arc::new(observer));
        self
    }

    /// Is told what the monitors of its machines warn of, as [`VmBuilder::on_warning`], and what crashes had left in the store that
    /// [`build`](Self::build) opens, which it has removed.
    pub fn on_warning(mut self, listener: impl Fn(&str) + Send + Sync + 'static) -> Self {
        self.warnings = Some(Arc::new(listener));
        self
    }

    /// The executable monitors are made from; by default the one that [`MonitorProgram::find`] finds.
    pub fn monitor_program(mut self, program: MonitorProgram) -> Self {
        self.program = Some(program);
        self
    }

    /// The guest to boot; by default the one that [`GuestBundle::find`] finds.
    pub fn guest(mut self, guest: GuestBundle) -> Self {
        self.guest = Some(guest);
        self
    }

    /// The ceiling of a guest's memory in MiB, 512 by default: memory is committed as guests write to it.
    pub fn memory_mib(mut self, mib: u32) -> Self {
        self.memory_mib = mib;
        self
    }

    /// The number of vCPUs, 1 by default.
    pub fn vcpus(mut self, vcpus: u32) -> Self {
        self.vcpus = vcpus;
        self
    }

    /// The size of the disk that a guest's changes go to, in bytes; 10 GiB by default. It takes room as it is written. `None` for
    /// guest memory in its place.
    pub fn scratch_bytes(mut self, bytes: impl Into<Option<u64>>) -> Self {
        self.scratch_bytes = bytes.into();
        self
    }

    /// Makes the root read-only, with file systems in memory at /tmp, /run and the volumes.
    pub fn read_only(mut self, yes: bool) -> Self {
        self.read_only = yes;
        self
    }

    /// What every machine is called; each has a random name of its own by default.
    pub fn hostname(mut self, hostname: impl Into<String>) -> Self {
        self.hostname = Some(hostname.into());
        self
    }

    /// Adds a path that becomes a writable place of its own, beside the image's own volumes.
    pub fn volume(mut self, path: impl Into<String>) -> Self {
        self.volumes.push(path.into());
        self
    }

    /// What the snapshot has running instead of the image's command, when it is to have one running
    /// ([`guest_port`](Self::guest_port), [`ready`](Self::ready), [`listener_required`](Self::listener_required)).
    pub fn cmd(mut self, argv: impl IntoIterator<Item = impl Into<OsString>>) -> Self {
        self.cmd = Some(argv.into_iter().map(Into::into).collect());
        self
    }

    /// Adds `KEY=VALUE` to the image's environment, for that command, the warm-ups, and every command in its machines.
    pub fn env(mut self, word: impl Into<OsString>) -> Self {
        self.env.push(word.into());
        self
    }

    /// As whom those run; as the image says by default.
    pub fn user(mut self, user: impl Into<String>) -> Self {
        self.user = Some(user.into());
        self
    }

    /// Where those run; where the image says by default.
    pub fn working_directory(mut self, folder: impl Into<String>) -> Self {
        self.workdir = Some(folder.into());
        self
    }

    /// Has the image's command run in every machine, and the snapshot made when something in the guest listens on this TCP port.
    pub fn guest_port(mut self, port: u16) -> Self {
        self.guest_port = Some(port);
        self
    }

    /// Whether the command has to listen before the snapshot is made, which is so by default. Otherwise it is made as soon as the command
    /// has started, and machines may be acquired that do not listen yet.
    pub fn listener_required(mut self, yes: bool) -> Self {
        self.listener_required = yes;
        self
    }

    /// Has the image's command run in every machine, and the snapshot made when this has come about.
    pub fn ready(mut self, trigger: Trigger) -> Self {
        self.ready = Some(trigger);
        self
    }

    /// How long that may take; 2 minutes by default.
    pub fn ready_timeout(mut self, limit: Duration) -> Self {
        self.ready_limit = limit;
        self
    }

    /// Puts a copy of a file of the host's into the snapshot, at this absolute path. What is in it is part of what the snapshot is known
    /// by: another content, another snapshot.
    pub fn extra_file(mut self, host: impl Into<PathBuf>, guest: impl Into<String>) -> Self {
        self.files.push((host.into(), guest.into()));
        self
    }

    /// Adds a command that runs to its end before the snapshot is made, so that machines start with what it leaves: files, memory, caches.
    pub fn warm_up(mut self, argv: impl IntoIterator<Item = impl Into<OsString>>) -> Self {
        self.warm_ups.push(argv.into_iter().map(Into::into).collect());
        self
    }

    /// Has the machine that is baked warmed up by code, after the commands and before what is left running. Code cannot be compared, so `tag` says
    /// what it does: another tag, another snapshot.
    ///
    /// ```no_run
    /// # async fn example() -> Result<(), kiln::ImageError> {
    /// let image = kiln::Image::builder("python:3.12")
    ///     .warm_up_with("numpy-1", |vm| {
    ///         Box::pin(async move {
    ///             vm.exec(["python3", "-c", "import json"]).output().await?;
    ///             Ok(())
    ///         })
    ///     })
    ///     .build()
    ///     .await?;
    /// # Ok(())
    /// # }
    /// ```
    pub fn warm_up_with(
        mut self,
        tag: impl Into<String>,
        warm_up: impl for<'vm> Fn(&'vm Vm) -> WarmingUp<'vm> + Send + Sync + 'static,
    ) -> Self {
        self.warm_up = Some((tag.into(), Arc::new(warm_up)));
        self
    }

    /// Fetches the image and bakes it, as far as the store does not have that.
    ///
    /// A dropped future ends whatever has been started.
    ///
    /// # Errors
    /// [`ImageError`], by what went wrong.
    pub async fn build(self) -> Result<Image, ImageError> {
        if let Some(hostname) = self.hostname.as_ref().filter(|name| !snapshot::is_hostname(name)) {
            return Err(VmError::from(BakeError::Hostname(hostname.clone())).into());
        }
        let store = self.open_store().await?;
        let source: Source = self.reference.parse()?;
        let pulled = kiln_oci::pull(&store, &source, &self.pull, Arc::clone(&self.progress)).await?;
        let mut builder = self.machine(&store, &pulled).await?;
        if let Some(observer) = &self.bakes {
            let observer = Arc::clone(observer);
            builder = builder.on_bake(move |step| observer(step));
        }
        let builder = builder.snapshots(&store, &pulled);
        let naming = self.naming(&pulled.config)?;
        let (snapshot, first) = snapshot::obtain(&builder, naming).await?;
        self.image(builder, pulled, snapshot, Some(first))
    }
}

impl ImageBuilder {
    async fn open_store(&self) -> Result<Store, ImageError> {
        if let Some(store) = &self.store {
            return Ok(store.clone());
        }
        let folder = self.folder.clone().map_or_else(Store::default_root, Ok)?;
        let store = blocking(move || Store::open(folder)).await?;
        if let Some(warnings) = self.warnings.as_ref().filter(|_| !store.swept().is_nothing()) {
            warnings(&format!("removed {}", store.swept()));
        }
        Ok(store)
    }

    /// What its machines are to be.
    async fn machine(&self, store: &Store, pulled: &Pulled) -> Result<VmBuilder, ImageError> {
        let guest = match &self.guest {
            Some(guest) => guest.try_clone()?,
            None => GuestBundle::find()?,
        };
        let mut builder = Vm::builder(guest, disk(pulled).await?)
            .monitor_program(self.program()?)
            .memory_mib(self.memory_mib)
            .vcpus(self.vcpus)
            .scratch(match (self.read_only, self.scratch_bytes) {
                (true, _) => Scratch::ReadOnly,
                (false, Some(size_bytes)) => Scratch::Disk { folder: store.root().to_owned(), size_bytes },
                (false, None) => Scratch::Memory,
            })
            .volumes(pulled.config.volumes.iter().chain(&self.volumes).cloned())
            .working_directory(self.workdir.as_ref().unwrap_or(&pulled.config.working_dir));
        if let Some(warnings) = &self.warnings {
            let warnings = Arc::clone(warnings);
            builder = builder.on_warning(move |line| warnings(line));
        }
        for (path, guest_path) in &self.files {
            let path = path.clone();
            let file = blocking(move || HostFile::open(&path)).await?;
            builder = builder.extra_file(file, guest_path);
        }
        for argv in &self.warm_ups {
            builder = builder.warm_up(self.launch(&pulled.config, Some(argv))?);
        }
        if let Some((tag, warm_up)) = &self.warm_up {
            builder =
                builder.warm_up_by_code(tag.clone(), Arc::clone(warm_up), self.commands(&pulled.config)?);
        }
        if let Some(trigger) = self.trigger() {
            builder = builder.service(self.launch(&pulled.config, None)?, trigger, self.ready_limit);
        }
        Ok(builder)
    }

    fn program(&self) -> Result<MonitorProgram, ImageError> {
        match &self.program {
            Some(program) => Ok(program.clone()),
            None => Ok(MonitorProgram::find().map_err(VmError::from)?),
        }
    }

    /// A command in the image: `argv`, or what the image runs.
    fn launch(&self, config: &Config, argv: Option<&Vec<OsString>>) -> Result<Launch, ImageError> {
        let (entrypoint, args) = match argv {
            Some(argv) => (argv.first().cloned(), argv.get(1..).unwrap_or_default().to_vec()),
            None => (None, self.cmd.clone().unwrap_or_default()),
        };
        let (env, user, workdir) = (self.env.clone(), self.user.clone(), self.workdir.clone());
        Ok(Launch::new(config, Overrides { entrypoint, args, env, user, workdir })?)
    }

    /// How commands run unless told otherwise.
    fn commands(&self, config: &Config) -> Result<Arc<Launch>, ImageError> {
        // Which command does not matter here, and an image need not name one.
        let any = vec![OsString::from("/bin/true")];
        Ok(Arc::new(self.launch(config, Some(&any))?))
    }

    /// What its snapshot is to be called.
    fn naming(&self, config: &Config) -> Result<Option<Naming>, ImageError> {
        let Some(name) = self.name.clone() else { return Ok(None) };
        let is_as_the_image_says = self.env.is_empty() && self.user.is_none() && self.workdir.is_none();
        let commands = if is_as_the_image_says { None } else { Some((&*self.commands(config)?).into()) };
        Ok(Some(Naming { name, commands }))
    }

    /// What says that the command which the snapshot has running is ready; `None` when it has none.
    fn trigger(&self) -> Option<Trigger> {
        let listens = self.guest_port.filter(|_| self.listener_required).map(Trigger::Port);
        self.ready.clone().or(listens).or_else(|| (!self.listener_required).then_some(Trigger::Started))
    }

    /// The image of a snapshot.
    fn image(
        self,
        builder: VmBuilder,
        pulled: Pulled,
        snapshot: Snapshot,
        first: Option<Member>,
    ) -> Result<Image, ImageError> {
        let VmBuilder { root, scratch, .. } = builder;
        let root_objects = Some(snapshot::root_of(&pulled));
        let (first, commands) = (Mutex::new(first), self.commands(&pulled.config)?);
        let program = self.program()?;
        let Self { warnings, hostname, .. } = self;
        Ok(Image(Arc::new(Inner {
            program,
            warnings,
            pulled,
            commands,
            root,
            root_objects,
            snapshot,
            scratch,
            hostname,
            first,
            spare: Mutex::default(),
        })))
    }
}

/// The image of a snapshot that is in a store.
pub(super) async fn from_snapshot(store: &Store, name: &str) -> Result<Image, ImageError> {
    let record = find(store, name).await?;
    let Some(of) = &record.image else { return Err(ImageError::NoImage(name.to_owned())) };
    let (opened, reference, manifest) = (store.clone(), of.reference.clone(), of.manifest);
    let pulled = blocking(move || kiln_oci::open(&opened, &reference, &manifest)).await?;
    if record.root != Some(snapshot::root_of(&pulled)) {
        return Err(SnapshotError::OtherRoot.into());
    }
    let scratch_bytes = record.scratch.map(|_| SCRATCH_BYTES);
    let Overrides { env, user, workdir, .. } = Overrides::default().over(record.commands.as_ref());
    let image = ImageBuilder { scratch_bytes, env, user, workdir, ..ImageBuilder::new(pulled.name.clone()) };
    let builder = image.machine(store, &pulled).await?;
    let snapshot = snapshot::open(store, &record.key).await?.ok_or(SnapshotError::Gone)?;
    image.image(builder, pulled, snapshot, None)
}

/// The record of a snapshot with this name, or this key.
async fn find(store: &Store, name: &str) -> Result<SnapshotRecord, ImageError> {
    let (store, wanted) = (store.clone(), name.to_owned());
    let found = blocking(move || match wanted.parse() {
        Ok(key) => store.snapshot(&key),
        Err(_) => store.find_snapshot(&wanted),
    });
    found.await?.ok_or_else(|| ImageError::UnknownSnapshot(name.to_owned()))
}
