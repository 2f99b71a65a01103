//! A second kind of KVM host, on any machine: `cargo xtask rig -- CMD`.
//!
//! QEMU emulates a whole PC whose processor has AMD's virtualization extensions; Debian's own kernel runs on it with
//! kvm-amd, so there is a /dev/kvm as hardware would give it. The machine sees this host's file tree read-only under
//! an overlay in memory: the same programs, the same build, and whatever the command writes is gone afterwards.
//!
//! ```text
//! host                                   machine
//! ----                                   -------
//! job (environment, directory, command)  read once from fw_cfg
//! / read-only, --write DIR               9p
//! stdout, stderr                         two virtio-serial ports
//! exit status                            a third port, written last
//! ```
//!
//! Timing in it proves nothing: every instruction is emulated.
//!
//! It has one processor unless told otherwise. With two, QEMU 10.0 now and then loses a guest's page tables as it
//! enters the guest: the fetch of the next instruction and then every read of the IDT find nothing present, which is a
//! triple fault behind an instruction that KVM had just emulated. So ended 5 of 21 starts of Debian's kernel on 16
//! vCPUs, with Kiln and with QEMU's own KVM accelerator alike.

mod disk;
mod packages;

use std::io::{self, Read, Write};
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode, Stdio};
use std::sync::mpsc;
use std::thread;
use std::time::Duration;

use anyhow::{Context as _, Result, bail};

use crate::paths;

const USAGE: &str = "\
usage: cargo xtask rig [--cpus N] [--mem MIB] [--timeout S] [--write DIR] [--console FILE] -- CMD [ARG...]
       cargo xtask rig --prepare        fetch what is needed and run nothing

Runs CMD on a machine with a hardware-style /dev/kvm, emulated by QEMU. Its files are this host's, and what it writes
vanishes, but for --write DIR. Its stdin is empty. It has one processor: with more, the emulator is not reliable.
exit status: CMD's; 124 when --timeout is over; 125 when the machine failed
";

/// Exit status when the time is up, as timeout(1) has it.
const TIMED_OUT: u8 = 124;
/// Exit status when it is the rig that failed.
const BROKEN: u8 = 125;
/// How much of the machine's console is shown when it failed, in lines.
const CONSOLE_TAIL_LINES: usize = 30;

struct Options {
    cpus: u32,
    memory_mib: u32,
    timeout: Option<Duration>,
    write: Option<PathBuf>,
    console: Option<PathBuf>,
    prepare: bool,
    command: Vec<String>,
}

/// Runs a command in the rig and returns its exit status as our own.
pub(crate) fn run(args: &[String]) -> ExitCode {
    if args.iter().take_while(|arg| *arg != "--").any(|arg| arg == "--help" || arg == "-h") {
        print!("{USAGE}");
        return ExitCode::SUCCESS;
    }
    match parse(args).and_then(|options| start(&options)) {
        Ok(status) => ExitCode::from(status),
        Err(error) => {
            eprintln!("rig: {error:#}");
            ExitCode::from(BROKEN)
        }
    }
}

/// Debian's kernel as a file, for machines inside the rig.
pub(crate) fn kernel() -> Result<PathBuf> {
    Ok(files()?.kernel)
}

fn parse(args: &[String]) -> Result<Options> {
    let mut options = Options {
        cpus: 1,
        memory_mib: 6144,
        timeout: None,
        write: None,
        console: None,
        prepare: false,
        command: Vec::new(),
    };
    let mut args = args.iter();
    while let Some(arg) = args.next() {
        let mut value = || args.next().with_context(|| format!("{arg} needs a value\n{USAGE}"));
        match arg.as_str() {
            "--cpus" => options.cpus = value()?.parse().context("--cpus")?,
            "--mem" => options.memory_mib = value()?.parse().context("--mem")?,
            "--timeout" => {
                options.timeout = Some(Duration::from_secs(value()?.parse().context("--timeout")?));
            }
            "--write" => options.write = Some(value()?.into()),
            "--console" => options.console = Some(value()?.into()),
            "--prepare" => options.prepare = true,
            "--" => {
                options.command = args.cloned().collect();
                break;
            }
            other => bail!("unknown option {other}\n{USAGE}"),
        }
    }
    if options.command.is_empty() && !options.prepare {
        bail!("no command\n{USAGE}");
    }
    Ok(options)
}

/// What a run needs of the cache.
struct Files {
    kernel: PathBuf,
    initramfs: PathBuf,
    qemu: packages::Qemu,
}

fn files() -> Result<Files> {
    let cache = paths::target().join("rig");
    std::fs::create_dir_all(&cache).with_context(|| format!("cannot make {}", cache.display()))?;
    // One process fills the cache at a time; the lock goes with the file handle.
    let lock = std::fs::File::create(cache.join("lock")).context("the rig's lock file")?;
    lock.lock().context("the rig's lock")?;
    let kernel = packages::kernel(&cache)?;
    let qemu = packages::qemu(&cache)?;
    let initramfs = disk::initramfs(&cache, &kernel)?;
    Ok(Files { kernel: kernel.image, initramfs, qemu })
}

fn start(options: &Options) -> Result<u8> {
    let files = files()?;
    if options.prepare {
        return Ok(0);
    }
    let run = tempfile_dir()?;
    let status = run_machine(options, &files, &run.0);
    if let Some(console) = &options.console {
        std::fs::copy(run.0.join("console"), console)
            .with_context(|| format!("cannot write {}", console.display()))?;
    }
    status
}

fn run_machine(options: &Options, files: &Files, run: &Path) -> Result<u8> {
    let job = run.join("job");
    std::fs::write(&job, job_script(options)?).context("cannot write the job")?;
    let listen = |name: &str| {
        UnixListener::bind(run.join(name)).with_context(|| format!("cannot listen for the {name} stream"))
    };
    let (out, err, status) = (listen("out")?, listen("err")?, listen("status")?);

    let mut machine = qemu_command(options, files, run, &job)?;
    let mut child = machine
        .stdin(Stdio::null())
        .stdout(std::fs::File::create(run.join("qemu")).context("QEMU's log")?)
        .stderr(std::fs::File::options().append(true).open(run.join("qemu")).context("QEMU's log")?)
        .spawn()
        .context("cannot start QEMU")?;

    let copies =
        [thread::spawn(move || copy(&out, io::stdout())), thread::spawn(move || copy(&err, io::stderr()))];
    let (told, answer) = mpsc::channel();
    thread::spawn(move || {
        let mut text = String::new();
        let read = status.accept().and_then(|(mut stream, _)| stream.read_to_string(&mut text));
        // Nobody listens after a timeout.
        let _ = told.send(read.map(|_| text));
    });

    // QEMU that cannot start never connects; then the accepts would wait for good. Its exit is seen by the thread
    // that waits for it, which connects in its place.
    let places: Vec<PathBuf> = ["out", "err", "status"].iter().map(|name| run.join(name)).collect();
    let id = child.id();
    let reaper = thread::spawn(move || {
        let ended = child.wait();
        for place in places {
            let _ = std::os::unix::net::UnixStream::connect(place);
        }
        ended
    });
    let answer = match options.timeout {
        Some(timeout) => answer.recv_timeout(timeout).ok(),
        None => answer.recv().ok(),
    };
    if answer.is_none() {
        // By its id, which is still ours: the reaper has not returned.
        let _ = Command::new("kill").args(["-9", &id.to_string()]).status();
    }
    let ended = reaper.join().expect("the thread only waits").context("waiting for QEMU")?;
    for thread in copies {
        thread.join().expect("the thread only copies").context("cannot pass the command's output on")?;
    }
    let Some(answer) = answer else {
        eprintln!("rig: timed out");
        return Ok(TIMED_OUT);
    };
    if let Some(code) = answer.context("the status stream")?.trim().strip_prefix("exit ") {
        return code.parse().with_context(|| format!("the machine said the command ended with {code}"));
    }
    bail!(
        "the machine ended before the command did ({ended})\n{}{}",
        std::fs::read_to_string(run.join("qemu")).unwrap_or_default(),
        console_tail(&run.join("console"))
    );
}

fn qemu_command(options: &Options, files: &Files, run: &Path, job: &Path) -> Result<Command> {
    // The machine must not outlive us, however we end.
    let mut qemu = Command::new("setpriv");
    qemu.args(["--pdeathsig", "KILL", "--"]).arg(&files.qemu.program).args(&files.qemu.arguments);
    if let Some(modules) = &files.qemu.modules {
        qemu.env("QEMU_MODULE_DIR", modules);
    }
    let path = |path: &Path| path.display().to_string().replace(',', ",,");
    qemu.args(["-nodefaults", "-no-user-config", "-display", "none", "-no-reboot", "-M", "q35"]);
    // Five-level page tables and nested paging do not go together in the emulator.
    qemu.args(["-accel", "tcg,thread=multi", "-cpu", "max,+svm,-la57"]);
    qemu.args(["-smp", &options.cpus.to_string(), "-m", &options.memory_mib.to_string()]);
    qemu.arg("-kernel").arg(&files.kernel).arg("-initrd").arg(&files.initramfs);
    let write =
        options.write.as_ref().map(|dir| dir.canonicalize().with_context(|| dir.display().to_string()));
    let write = write.transpose()?;
    // No self-tests and no waiting for entropy: what is tested here is Kiln. On a busy host the timer's ticks come late,
    // which the kernel takes for a broken I/O APIC unless it does not look.
    qemu.args([
        "-append",
        "console=ttyS0 loglevel=4 panic=-1 reboot=t mitigations=off tsc=reliable no_timer_check cryptomgr.notests \
         random.trust_cpu=on apparmor=0",
    ]);
    qemu.arg("-serial").arg(format!("file:{}", path(&run.join("console"))));
    qemu.arg("-fw_cfg").arg(format!("name=opt/kiln/job,file={}", path(job)));
    qemu.args(["-device", "virtio-rng-pci", "-device", "virtio-serial-pci"]);
    for name in ["out", "err", "status"] {
        qemu.arg("-chardev").arg(format!("socket,id={name},path={}", path(&run.join(name))));
        qemu.arg("-device").arg(format!("virtserialport,chardev={name},name=kiln.{name}"));
    }
    qemu.args(["-fsdev", "local,id=root,path=/,security_model=none,multidevs=remap,readonly=on"]);
    qemu.args(["-device", "virtio-9p-pci,fsdev=root,mount_tag=root"]);
    if let Some(dir) = write {
        qemu.arg("-fsdev")
            .arg(format!("local,id=write,path={},security_model=none,multidevs=remap", path(&dir)));
        qemu.args(["-device", "virtio-9p-pci,fsdev=write,mount_tag=write"]);
        qemu.arg("-fw_cfg").arg(format!("name=opt/kiln/write,string={}", path(&dir)));
    }
    Ok(qemu)
}

/// The job as a script for bash: our environment and directory, then the command.
fn job_script(options: &Options) -> Result<String> {
    let mut script = String::new();
    for (name, value) in std::env::vars_os() {
        let (Some(name), Some(value)) = (name.to_str(), value.to_str()) else { continue };
        if !name.is_empty() && name.chars().all(|c| c.is_ascii_alphanumeric() || c == '_') {
            script.extend(["export ", name, "=", &quote(value), "\n"]);
        }
    }
    let here = std::env::current_dir().context("the current directory")?;
    script.extend(["cd ", &quote(&here.to_string_lossy()), " || exit 125\nexec"]);
    for arg in &options.command {
        script.extend([" ", &quote(arg)]);
    }
    script.push('\n');
    Ok(script)
}

/// `text` as one word of a POSIX shell.
fn quote(text: &str) -> String {
    format!("'{}'", text.replace('\'', r"'\''"))
}

/// Takes one connection and copies it to `to`, at once as it comes, until its end.
fn copy(from: &UnixListener, mut to: impl Write) -> io::Result<()> {
    let (mut stream, _) = from.accept()?;
    let mut buffer = vec![0; 64 << 10];
    loop {
        let count = stream.read(&mut buffer)?;
        if count == 0 {
            return Ok(());
        }
        to.write_all(&buffer[..count])?;
        to.flush()?;
    }
}

fn console_tail(console: &Path) -> String {
    let text = std::fs::read(console).unwrap_or_default();
    let text = String::from_utf8_lossy(&text);
    let lines: Vec<&str> = text.lines().collect();
    lines[lines.len().saturating_sub(CONSOLE_TAIL_LINES)..].join("\n")
}

/// A directory that goes when this value goes.
struct RunDir(PathBuf);

fn tempfile_dir() -> Result<RunDir> {
    let made = crate::process::output(Command::new("mktemp").args(["-d", "-t", "kiln-rig.XXXXXX"]))?;
    Ok(RunDir(made.trim_end().into()))
}

impl Drop for RunDir {
    fn drop(&mut self) {
        // A directory left in /tmp is no reason to fail a run that is over.
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_quoted_word_reads_back_in_a_shell() {
        let word = "it's $HOME \"and\" `more` \\ \n end";
        let said =
            Command::new("sh").arg("-c").arg(format!("printf %s {}", quote(word))).output().expect("sh runs");
        assert_eq!(String::from_utf8_lossy(&said.stdout), word);
    }
}
