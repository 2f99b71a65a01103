//! Machines of a real image, made as `kiln run` makes them: from a template in a store of their own.

use std::path::PathBuf;
use std::process::{Command, Stdio};

use anyhow::{Context as _, Result, bail};
use kiln::image::Image;
use kiln::store::Store;
use kiln::{Disk, GuestBundle, MonitorProgram, Scratch, Vm, VmBuilder};
use kiln_testkit::image;
use tempfile::TempDir;

use crate::kiln;

const DISK_BYTES: u64 = 10 << 30;

/// What machines are made from, in a folder that goes with it.
pub(crate) struct Machines {
    place: TempDir,
    guest: PathBuf,
    program: MonitorProgram,
    memory_mib: u32,
    pub(crate) store: Store,
    pub(crate) image: Image,
}

impl Machines {
    /// Has `kiln` pull the image of busybox into a new store, for machines with so much memory.
    pub(crate) fn prepare(memory_mib: u32) -> Result<Self> {
        let place = tempfile::tempdir().context("a directory")?;
        let root = place.path().join("store");
        let name = image::busybox()?.reference();
        let mut pull = Command::new(kiln()?);
        pull.args(["pull", "--quiet", &name]).env("KILN_ROOT", &root).stdout(Stdio::null());
        let pulled = pull.status();
        if !pulled.context("cannot start kiln")?.success() {
            bail!("kiln pull failed");
        }
        let store = Store::open(&root)?;
        let image = kiln::image::find(&store, &name, None)?;
        Ok(Self { place, guest: crate::guest()?, program: crate::monitor()?, memory_mib, store, image })
    }

    /// The folder of the store.
    pub(crate) fn root(&self) -> PathBuf {
        self.place.path().join("store")
    }

    /// A machine, to be made of whatever its caller says.
    pub(crate) fn builder(&self) -> Result<VmBuilder> {
        Ok(Vm::builder(GuestBundle::from_dir(&self.guest)?, Disk::from_image(&self.image)?)
            .monitor_program(self.program.clone())
            .memory_mib(self.memory_mib)
            .scratch(Scratch::Disk { folder: self.root(), size_bytes: DISK_BYTES })
            .command_is_process_1(false))
    }

    /// The image, ready for pools.
    pub(crate) async fn baked(&self) -> Result<kiln::Image> {
        let builder = kiln::Image::builder(&self.image.name).store(&self.store).memory_mib(self.memory_mib);
        let builder = builder.guest(GuestBundle::from_dir(&self.guest)?);
        Ok(builder.monitor_program(self.program.clone()).build().await?)
    }

    /// A machine made from the template, which is baked the first time.
    pub(crate) async fn start(&self) -> Result<Vm> {
        Ok(self.builder()?.snapshots(&self.store, &self.image).start().await?)
    }
}

/// Runs a command to its end; anything but success is a failure.
pub(crate) async fn succeed(vm: &Vm, argv: &[&str]) -> Result<()> {
    let output = vm.exec(argv.iter().copied()).output().await?;
    if !output.status.success() {
        bail!("{argv:?}: {}", String::from_utf8_lossy(&output.stderr));
    }
    Ok(())
}
