//! What a snapshot is known by: the digest of everything that decides what it holds and who can use it.

use std::fs;
use std::io::{self, Read};
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

use kiln_snapshot::FORMAT_VERSION;
use kiln_support::digest::{Digest, Hasher};
use prost::Message;

use super::content::Trigger;
use super::{BakeError, Snapshots};
use crate::disk::{DISK_CAPACITY_BYTES, Scratch};
use crate::launch::Launch;
use crate::vm::{GUEST_CID, VmBuilder};

/// Counts changes of how Kiln bakes that nothing else in a key shows.
const RECIPE: u64 = 1;
const CPUINFO: &str = "/proc/cpuinfo";
/// How much of /proc/cpuinfo is read; one processor takes about 1.5 KiB of it.
const CPUINFO_BYTES_MAX: u64 = 16 << 10;
/// What /proc/cpuinfo says of a processor that decides what a guest finds: on x86-64, and on 64-bit ARM.
const CPU_FACTS: [&str; 12] = [
    "vendor_id",
    "cpu family",
    "model",
    "stepping",
    "microcode",
    "flags",
    "CPU implementer",
    "CPU architecture",
    "CPU variant",
    "CPU part",
    "CPU revision",
    "Features",
];

/// The keys of a machine's snapshots.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Keys {
    pub(super) base: Digest,
    pub(super) template: Digest,
}

impl Keys {
    pub(super) fn of(builder: &VmBuilder, snapshots: &Snapshots) -> Result<Self, BakeError> {
        let base = base(builder)?;
        Ok(Self { base, template: template(base, builder, snapshots) })
    }
}

fn base(builder: &VmBuilder) -> Result<Digest, BakeError> {
    let mut key = Key::new("base");
    key.number(RECIPE);
    key.number(FORMAT_VERSION.into());
    key.text(env!("CARGO_PKG_VERSION"));
    let guest = builder.guest.identity().map_err(|source| BakeError::Host {
        action: "look at",
        what: "the guest's kernel and initramfs".into(),
        source,
    })?;
    key.bytes(guest.as_bytes());
    let monitor = builder.monitor();
    let program = monitor.identity().map_err(|source| BakeError::Host {
        action: "look at",
        what: format!("the monitor {monitor}"),
        source,
    })?;
    key.bytes(program.as_bytes());
    host(&mut key)?;
    key.text(&builder.cmdline);
    for number in [u64::from(builder.memory_mib), u64::from(builder.vcpus), GUEST_CID, DISK_CAPACITY_BYTES] {
        key.number(number);
    }
    Ok(key.finish())
}

fn template(base: Digest, builder: &VmBuilder, snapshots: &Snapshots) -> Digest {
    let mut key = Key::new("template");
    key.bytes(base.as_bytes());
    key.bytes(snapshots.content.as_bytes());
    key.bytes(&builder.setup().encode_to_vec());
    match builder.scratch {
        Scratch::Disk { size_bytes, .. } => key.number(size_bytes),
        Scratch::Memory | Scratch::ReadOnly => key.text("none"),
    }
    let content = &builder.content;
    key.number(content.files.len() as u64);
    for (file, path) in &content.files {
        key.bytes(file.digest.as_bytes());
        key.number(file.mode.into());
        key.text(path);
    }
    key.number(content.warmups.len() as u64);
    for warmup in &content.warmups {
        launch(&mut key, &warmup.launch);
        key.bytes(warmup.script.as_ref().map_or(&[], |script| script.digest.as_bytes()));
    }
    if let Some(code) = &content.code {
        key.text("code");
        key.text(&code.tag);
        launch(&mut key, &code.launch);
    }
    if let Some(service) = &content.service {
        launch(&mut key, &service.launch);
        match &service.trigger {
            Trigger::Port(port) => {
                key.text("port");
                key.number((*port).into());
            }
            Trigger::File(path) => {
                key.text("file");
                key.text(path);
            }
            Trigger::Log(pattern) => {
                key.text("log");
                key.text(pattern.text());
            }
            Trigger::Started => key.text("started"),
        }
    }
    key.finish()
}

/// How a command runs.
fn launch(key: &mut Key, launch: &Launch) {
    for words in [&launch.argv, &launch.env] {
        key.number(words.len() as u64);
        for word in words {
            key.bytes(word.as_bytes());
        }
    }
    key.text(&launch.user);
    key.text(&launch.workdir);
}

/// What of this host decides: its processors and its kernel.
fn host(key: &mut Key) -> Result<(), BakeError> {
    let mut cpuinfo = String::new();
    fs::File::open(CPUINFO)
        .and_then(|file| read_first_processor(file, &mut cpuinfo))
        .map_err(|source| BakeError::Host { action: "read", what: CPUINFO.into(), source })?;
    for (name, value) in cpu_facts(&cpuinfo) {
        key.text(name);
        key.text(value);
    }
    key.text(&rustix::system::uname().release().to_string_lossy());
    key.number(Path::new("/sys/module/kvm_pvm").exists().into());
    Ok(())
}

/// Reads to the empty line that ends the first processor: a host can have hundreds.
fn read_first_processor(file: impl Read, text: &mut String) -> io::Result<()> {
    let mut file = io::BufReader::new(file.take(CPUINFO_BYTES_MAX));
    loop {
        let before = text.len();
        if io::BufRead::read_line(&mut file, text)? == 0 || text[before..].trim().is_empty() {
            return Ok(());
        }
    }
}

fn cpu_facts(cpuinfo: &str) -> impl Iterator<Item = (&str, &str)> {
    cpuinfo
        .lines()
        .filter_map(|line| line.split_once(':'))
        .map(|(name, value)| (name.trim(), value.trim()))
        .filter(|(name, _)| CPU_FACTS.contains(name))
}

/// A digest over parts that cannot be taken for one another.
struct Key(Hasher);

impl Key {
    fn new(what: &str) -> Self {
        let mut key = Self(Hasher::new());
        key.text("kiln snapshot key");
        key.text(what);
        key
    }

    fn bytes(&mut self, bytes: &[u8]) {
        self.number(bytes.len() as u64);
        self.0.update(bytes);
    }

    fn text(&mut self, text: &str) {
        self.bytes(text.as_bytes());
    }

    fn number(&mut self, number: u64) {
        self.0.update(&number.to_le_bytes());
    }

    fn finish(self) -> Digest {
        self.0.finish()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::disk::Disk;
    use crate::snapshot::HostFile;
    use crate::{BuiltIn, GuestBundle, Vm};
    use kiln_store::{SnapshotImage, Store};
    use std::time::Duration;

    fn snapshots(folder: &Path) -> Snapshots {
        Snapshots {
            store: Store::open(folder).expect("a store"),
            image: SnapshotImage { reference: "one".into(), manifest: Digest::EMPTY },
            content: Digest::of("content"),
        }
    }

    fn builder(kernel: &'static [u8]) -> VmBuilder {
        let part = |bytes| BuiltIn { bytes, sha256: Digest::of(bytes) };
        Vm::builder(GuestBundle::built_in(part(kernel), part(b"initramfs")), Disk::placeholder(true))
    }

    fn warm(command: &str) -> Launch {
        Launch {
            argv: vec![command.into()],
            env: Vec::new(),
            user: String::new(),
            workdir: String::new(),
            stop_signal: 15,
        }
    }

    #[test]
    fn what_decides_what_a_guest_is_decides_the_key() {
        let folder = tempfile::tempdir().expect("a folder");
        let snapshots = snapshots(folder.path());
        let keys = |builder: VmBuilder| Keys::of(&builder, &snapshots).expect("keys");
        let plain = || builder(b"kernel");
        let known = keys(plain());
        assert_eq!(known, keys(plain()));
        assert_eq!(known, keys(plain().hostname("another").working_directory("/srv")));
        for other in [
            builder(b"another"),
            plain().memory_mib(256),
            plain().vcpus(2),
            plain().kernel_cmdline("quiet"),
            plain().monitor_program(crate::MonitorProgram::at("/bin/sh")),
        ] {
            let other = keys(other);
            assert_ne!(known.base, other.base);
            assert_ne!(known.template, other.template);
        }
        let disk = |size_bytes| Scratch::Disk { folder: folder.path().into(), size_bytes };
        let file = |contents: &str| {
            let path = folder.path().join("file");
            fs::write(&path, contents).expect("written");
            HostFile::open(&path).expect("a file")
        };
        let other_mode = || {
            let mut file = file("a");
            file.mode = 0o4755;
            file
        };
        let second = Duration::from_secs(1);
        let service = |word, trigger| plain().service(warm(word), trigger, second);
        let others = vec![
            plain().extra_file(file("a"), "/a"),
            plain().extra_file(file("b"), "/a"),
            plain().extra_file(file("a"), "/b"),
            plain().extra_file(other_mode(), "/a"),
            plain().extra_file(file("a"), "/a").extra_file(file("a"), "/a"),
            plain().warm_up_by_script(file("a"), warm("one")),
            plain().warm_up_by_script(file("b"), warm("one")),
            plain().warm_up_by_script(file("#!a"), warm("one")),
            service("one", Trigger::Port(1)),
            service("two", Trigger::Port(1)),
            service("one", Trigger::Port(2)),
            service("one", Trigger::File("/a".into())),
            service("one", Trigger::Log("/a".parse().expect("a pattern"))),
            plain().scratch(disk(1 << 30)),
            plain().scratch(disk(2 << 30)),
            plain().scratch(Scratch::ReadOnly),
            plain().scratch(Scratch::ReadOnly).working_directory("/srv"),
            plain().volumes(["/data".to_owned()]),
            plain().command_is_process_1(true),
            plain().warm_up(warm("one")),
            plain().warm_up(warm("two")),
            plain().warm_up(warm("one")).warm_up(warm("two")),
        ];
        let mut seen = vec![known.template];
        for other in others {
            let other = keys(other);
            assert_eq!(known.base, other.base);
            assert!(!seen.contains(&other.template));
            seen.push(other.template);
        }
        let patient = plain().service(warm("one"), Trigger::Port(1), Duration::from_mins(1));
        assert_eq!(keys(service("one", Trigger::Port(1))), keys(patient), "what is waited does not matter");
        let another_image = Snapshots { content: Digest::of("other"), ..snapshots.clone() };
        assert!(!seen.contains(&Keys::of(&plain(), &another_image).expect("keys").template));
    }

    #[test]
    fn only_the_first_processor_counts_and_not_its_speed() {
        let one = "processor\t: 0\nvendor_id\t: GenuineIntel\ncpu MHz\t\t: 2900.1\nflags\t\t: fpu vme\n\n";
        let two = one.replace("2900.1", "800.0") + &one.replace("fpu", "none");
        let facts = |text: &str| {
            let mut first = String::new();
            read_first_processor(text.as_bytes(), &mut first).expect("text");
            cpu_facts(&first).map(|(name, value)| format!("{name}={value}")).collect::<Vec<_>>()
        };
        assert_eq!(facts(one), ["vendor_id=GenuineIntel", "flags=fpu vme"]);
        assert_eq!(facts(one), facts(&two));
    }

    #[test]
    fn this_hosts_processor_is_known_by_something() {
        let text = fs::read_to_string("/proc/cpuinfo").expect("Linux has it");
        assert!(cpu_facts(&text).any(|(name, _)| name == "flags" || name == "Features"));
    }
}
