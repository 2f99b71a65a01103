//! Firecracker, for comparison: the same kernel, the same shape, its own snapshot.
//!
//! Its guest is a program that writes to the serial port from user mode, over and over: the first byte after a restore is the first
//! sign of life, as early as any guest can give one.

use std::io::{Read as _, Write as _};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdout, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail};
use kiln_testkit::initramfs;

/// What the guest needs to boot as Kiln's does; Firecracker adds its devices. Where guest kernels are emulated, only Kiln's monitor
/// completes what saves vector registers.
const COMMAND_LINE: &str = "console=ttyS0 quiet noxsave panic=-1 reboot=k pci=off acpi=off i8042.noaux i8042.nokbd 8250.nr_uarts=1 \
                            random.trust_cpu=on noreplace-smp dummy.numdummies=0";
const BEAT: u8 = b'!';
/// How long a guest may take to its first beat.
const PATIENCE: Duration = Duration::from_mins(2);

/// A snapshot of Firecracker's.
pub(crate) struct Firecracker {
    program: PathBuf,
    place: PathBuf,
    /// How long its full snapshot took.
    pub(crate) snapshot_took: Duration,
}

/// Where the time of a restore went.
pub(crate) struct Restored {
    /// From before the process was started to the first beat.
    pub(crate) ready: Duration,
    /// The call that loads and resumes alone.
    pub(crate) load: Duration,
}

/// A running process, and its end when dropped.
pub(crate) struct Process {
    child: Child,
    stdout: ChildStdout,
    socket: PathBuf,
}

impl Firecracker {
    /// Boots a guest in Firecracker and takes its snapshot, in the folder `place`.
    pub(crate) fn prepare(
        program: &Path,
        kernel: &Path,
        probe: &Path,
        place: &Path,
        memory_mib: u32,
    ) -> Result<Self> {
        let (mut process, mut firecracker) = Self::boot(program, kernel, probe, place, memory_mib)?;
        firecracker.snapshot_took = firecracker.save(&mut process)?;
        Ok(firecracker)
    }

    /// Boots a guest in Firecracker, and pauses it.
    pub(crate) fn boot(
        program: &Path,
        kernel: &Path,
        probe: &Path,
        place: &Path,
        memory_mib: u32,
    ) -> Result<(Process, Self)> {
        let initramfs = place.join("initramfs.cpio");
        let mut archive = std::fs::File::create(&initramfs).context("an archive")?;
        std::io::copy(&mut initramfs::with_init(probe)?, &mut archive).context("an archive")?;
        let mut process = Process::start(program, place)?;
        let more = if kiln_vmm::is_pvm() { kiln_vmm::PVM_COMMAND_LINE } else { "" };
        let boot = serde_json::json!({
            "kernel_image_path": kernel, "initrd_path": initramfs, "boot_args": format!("{COMMAND_LINE} {more} -- beat"),
        });
        process.call("PUT", "/boot-source", &boot)?;
        let shape = serde_json::json!({ "vcpu_count": 1, "mem_size_mib": memory_mib });
        process.call("PUT", "/machine-config", &shape)?;
        process.call("PUT", "/actions", &serde_json::json!({ "action_type": "InstanceStart" }))?;
        process.wait_for_beat().context("Firecracker's guest does not boot")?;
        process.call("PATCH", "/vm", &serde_json::json!({ "state": "Paused" }))?;
        let firecracker =
            Self { program: program.into(), place: place.into(), snapshot_took: Duration::ZERO };
        Ok((process, firecracker))
    }

    /// Takes the full snapshot of a paused guest, and says how long that took.
    pub(crate) fn save(&self, process: &mut Process) -> Result<Duration> {
        let start = Instant::now();
        let [state, memory] = self.files();
        let files = serde_json::json!({
            "snapshot_type": "Full", "snapshot_path": state, "mem_file_path": memory,
        });
        process.call("PUT", "/snapshot/create", &files)?;
        Ok(start.elapsed())
    }

    /// Starts a process and has it restore the snapshot.
    pub(crate) fn restore(&self) -> Result<Restored> {
        self.restored().map(|(_, restored)| restored)
    }

    /// The same, and stops the guest after its first beat.
    pub(crate) fn restore_and_pause(&self) -> Result<Process> {
        let (process, _) = self.restored()?;
        process.call("PATCH", "/vm", &serde_json::json!({ "state": "Paused" }))?;
        Ok(process)
    }

    fn restored(&self) -> Result<(Process, Restored)> {
        let start = Instant::now();
        let (mut process, load) = self.load()?;
        process.wait_for_beat()?;
        Ok((process, Restored { ready: start.elapsed(), load }))
    }

    /// Starts a process and has it load the snapshot and let the guest go on: how long that call took.
    pub(crate) fn load(&self) -> Result<(Process, Duration)> {
        let process = Process::start(&self.program, &self.place)?;
        let load = Instant::now();
        let order = serde_json::json!({
            "snapshot_path": self.place.join("state"), "resume_vm": true,
            "mem_backend": { "backend_type": "File", "backend_path": self.place.join("memory") },
        });
        process.call("PUT", "/snapshot/load", &order)?;
        Ok((process, load.elapsed()))
    }

    /// The files of the snapshot.
    pub(crate) fn files(&self) -> [PathBuf; 2] {
        ["state", "memory"].map(|name| self.place.join(name))
    }
}

impl Process {
    /// Its process id.
    pub(crate) fn id(&self) -> u32 {
        self.child.id()
    }

    fn start(program: &Path, place: &Path) -> Result<Self> {
        let socket = place.join("socket");
        let _ = std::fs::remove_file(&socket);
        let mut child = Command::new(program)
            .arg("--api-sock")
            .arg(&socket)
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()
            .context("cannot start Firecracker")?;
        let stdout = child.stdout.take().context("a pipe")?;
        Ok(Self { child, stdout, socket })
    }

    /// Makes one call of the API. The socket is there when the process has come so far, which nothing tells but the attempt.
    fn call(&self, method: &str, path: &str, body: &serde_json::Value) -> Result<()> {
        let end = Instant::now() + PATIENCE;
        let mut stream = loop {
            match UnixStream::connect(&self.socket) {
                Ok(stream) => break stream,
                Err(error) if Instant::now() > end => return Err(error).context("Firecracker's socket"),
                Err(_) => std::thread::yield_now(),
            }
        };
        let body = body.to_string();
        let length = body.len();
        write!(
            stream,
            "{method} {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: {length}\r\n\r\n{body}"
        )
        .context("Firecracker's socket")?;
        let mut answer = [0; 4096];
        let count = stream.read(&mut answer).context("Firecracker's answer")?;
        let answer = String::from_utf8_lossy(&answer[..count]);
        if !answer.starts_with("HTTP/1.1 20") {
            bail!("{method} {path}: {answer}");
        }
        Ok(())
    }

    fn wait_for_beat(&mut self) -> Result<()> {
        // Firecracker's own log comes the same way, and has none.
        let mut bytes = [0; 4096];
        loop {
            match self.stdout.read(&mut bytes).context("Firecracker's output")? {
                0 => bail!("Firecracker ended"),
                count if bytes[..count].contains(&BEAT) => return Ok(()),
                _ => {}
            }
        }
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
