//! Boots a kernel with its console on stdout: the shortest way to see a guest.
//!
//! ```text
//! cargo run -p kiln-vmm --example boot -- --kernel vmlinux --initramfs initramfs.cpio \
//!     [--cmdline "loglevel=7"] [--memory 256] [--cpus 1] [--stop-at-phase 2] [--disk FILE | --disk-ro FILE]...
//! ```
//!
//! What happened when goes to stderr, in milliseconds since the program started.

use std::collections::HashMap;
use std::error::Error;
use std::fs::{File, OpenOptions};
use std::io::Write as _;
use std::os::fd::AsFd;
use std::process::ExitCode;

use kiln_hypervisor::Kvm;
use kiln_virtio::{Block, DataFile, Device, Disk, Extent, Rng, Vsock};
use kiln_vmm::{Console, Machine, Nanoseconds, Notice, Shape, Shell, boot, monotonic};
use rustix::event::{PollFd, PollFlags, poll};

fn main() -> ExitCode {
    let start = monotonic();
    match run(start) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error}");
            let mut source = error.source();
            while let Some(cause) = source {
                eprintln!("  because: {cause}");
                source = cause.source();
            }
            ExitCode::FAILURE
        }
    }
}

fn run(start: Nanoseconds) -> Result<(), Box<dyn Error>> {
    let mut options = HashMap::new();
    let mut disks = Vec::new();
    let mut arguments = std::env::args().skip(1);
    while let Some(name) = arguments.next() {
        let value = arguments.next().ok_or(format!("{name} wants a value"))?;
        match name.as_str() {
            "--disk" => disks.push(disk(&value, false)?),
            "--disk-ro" => disks.push(disk(&value, true)?),
            _ => drop(options.insert(name, value)),
        }
    }
    let number = |name: &str, otherwise| options.get(name).map_or(Ok(otherwise), |text| text.parse());
    let file = |name: &str| options.get(name).map(File::open).transpose();

    let shape = Shape::new(number("--memory", 256)?, number("--cpus", 1)?)?;
    let shell = Shell::create(&Kvm::open()?, shape)?;
    report(start, "shell made");

    let kernel = boot::load_kernel(shell.memory(), &file("--kernel")?.ok_or("--kernel FILE is missing")?)?;
    let mut devices: Vec<Box<dyn Device>> = disks;
    let (vsock, _ports) = Vsock::new(3);
    devices.push(Box::new(vsock));
    devices.push(Box::new(Rng::new()));
    let extra = options.get("--cmdline").map_or("", String::as_str);
    let entry =
        boot::prepare(shell.memory(), &kernel, file("--initramfs")?.as_ref(), shape, devices.len(), extra)?;
    report(start, "kernel loaded");

    let console = Console::new(Some(std::io::stdout().as_fd().try_clone_to_owned()?))?;
    let stop_at = number("--stop-at-phase", u32::MAX)?;
    let (rung, bell) = std::io::pipe()?;
    let observer = Box::new(move |notice| match notice {
        Notice::Entered(_) => report(start, "guest entered"),
        Notice::Doorbell(phase, _) => {
            report(start, &format!("doorbell, phase {phase}"));
            if phase == stop_at {
                let _ = (&bell).write(&[1]);
            }
        }
    });
    let machine = Machine::start(shell, &entry, console, devices, observer)?;
    let mut fds =
        [PollFd::new(&rung, PollFlags::IN), PollFd::from_borrowed_fd(machine.ended_fd(), PollFlags::IN)];
    poll(&mut fds, None)?;
    if !fds[0].revents().is_empty() {
        machine.stop();
    }
    let (end, _) = machine.wait();
    report(start, &format!("ended: {:?} {}", end.reason, end.detail));
    Ok(())
}

fn disk(path: &str, read_only: bool) -> Result<Box<dyn Device>, Box<dyn Error>> {
    let file = OpenOptions::new().read(true).write(!read_only).open(path)?;
    let bytes = file.metadata()?.len() & !4095;
    let extent = Extent { file: DataFile::trusted(file).into(), offset: 0, bytes };
    let disk = if read_only { Disk::read_only(vec![extent])? } else { Disk::writable(extent)? };
    Ok(Box::new(Block::new(disk, "example", Box::new(|fault| eprintln!("disk: {fault}")))?))
}

fn report(start: Nanoseconds, what: &str) {
    let elapsed = monotonic().0 - start.0;
    eprintln!("[{:9.3} ms] {what}", elapsed as f64 / 1e6);
}
