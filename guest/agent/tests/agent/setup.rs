//! Set-up as in a guest: an EROFS image and an ext4 scratch on block devices, which here are loop devices.

use std::fs::File;
use std::os::unix::fs::{FileExt as _, MetadataExt as _, symlink};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::mpsc;

use kiln_agent::power::Power;
use kiln_agent::setup::Prepared;
use kiln_agent::{Life, Place};
use kiln_protocol::{Call, Exec, Failed, Outcome, Reason, Setup, WindowSize};
use rustix::fs::{CWD, FileType, Mode};
use rustix::mount::MountFlags;
use rustix::thread::UnshareFlags;

use crate::groups;
use crate::guest::{Guest, exec, own_namespaces, sh};

const SCRATCH_BYTES: u64 = 64 << 20;

/// A guest set up from an image of busybox and a few traps.
pub(crate) struct Booted {
    pub(crate) guest: Guest,
    /// What the superblock of the scratch file system says after power-off.
    superblock: mpsc::Receiver<[u8; 1024]>,
    disks: [Disk; 2],
    _directory: tempfile::TempDir,
}

/// A file as a block device.
struct Disk(PathBuf);

impl Disk {
    fn new(file: &Path) -> Self {
        let device = run(Command::new("losetup").args(["--find", "--show"]).arg(file));
        Self(device.trim().into())
    }
}

impl Drop for Disk {
    fn drop(&mut self) {
        // Takes effect when the last mount is gone.
        run(Command::new("losetup").arg("--detach").arg(&self.0));
    }
}

fn run(command: &mut Command) -> String {
    let output = command.output().unwrap_or_else(|error| panic!("{command:?} (cargo xtask setup): {error}"));
    assert!(output.status.success(), "{command:?}: {}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).expect("text")
}

fn make_image(root: &Path) {
    for directory in ["bin", "etc", "data/deep", "opt/app", "home"] {
        std::fs::create_dir_all(root.join(directory)).expect("a directory");
    }
    let busybox = std::fs::copy("/bin/busybox", root.join("bin/busybox"));
    busybox.expect("/bin/busybox is there; install it with: cargo xtask setup");
    let applets = run(Command::new("/bin/busybox").arg("--list"));
    for applet in applets.lines().filter(|applet| *applet != "busybox") {
        symlink("busybox", root.join("bin").join(applet)).expect("a link");
    }
    std::fs::write(root.join("etc/passwd"), "root:x:0:0:root:/root:/bin/sh\n").expect("a file");
    std::fs::write(root.join("etc/secret"), "unchanged").expect("a file");
    symlink("secret", root.join("etc/hosts")).expect("a link");
    symlink("../run/systemd/resolve/stub-resolv.conf", root.join("etc/resolv.conf")).expect("a link");
    std::fs::write(root.join("data/deep/file"), "from the image").expect("a file");
    std::fs::write(root.join("opt/app/file"), "moved").expect("a file");
    let mode = Mode::from_raw_mode(0o666);
    let node = root.join("null");
    rustix::fs::mknodat(CWD, &node, FileType::CharacterDevice, mode, rustix::fs::makedev(1, 3))
        .expect("a node");
}

impl Booted {
    fn new(setup: Setup) -> Self {
        Self::from_image(setup, |_| {})
    }

    /// A guest from an image to which `add` has added something.
    pub(crate) fn from_image(setup: Setup, add: impl FnOnce(&Path)) -> Self {
        Self::begin(Power::none, add).set_up(Setup { reaper: true, ..setup })
    }

    /// A guest on a machine that has not been set up yet.
    pub(crate) fn begin(power: impl FnOnce() -> Power + Send + 'static, add: impl FnOnce(&Path)) -> Self {
        let directory = tempfile::tempdir().expect("a temporary directory");
        let at = |name| directory.path().join(name);
        make_image(&at("tree"));
        add(&at("tree"));
        run(Command::new("mkfs.erofs").arg("--quiet").arg(at("image")).arg(at("tree")));
        let scratch = File::create(at("scratch")).expect("a file");
        scratch.set_len(SCRATCH_BYTES).expect("a sparse file");
        run(Command::new("mkfs.ext4").arg("-q").arg(at("scratch")));
        let disks = [Disk::new(&at("image")), Disk::new(&at("scratch"))];

        let (found, superblock) = mpsc::channel();
        let scratch = File::open(at("scratch")).expect("the file");
        let guest = Guest::begin_on(power, initial_root, set_up, move || {
            let mut bytes = [0; 1024];
            scratch.read_exact_at(&mut bytes, 1024).expect("a superblock");
            let _ = found.send(bytes);
        });
        Self { guest, superblock, disks, _directory: directory }
    }

    /// Has been set up.
    pub(crate) fn set_up(self, setup: Setup) -> Self {
        let [image_device, scratch_device] =
            self.disks.each_ref().map(|disk| disk.0.to_string_lossy().into_owned());
        let setup = Setup {
            root_device: image_device,
            scratch_device: if setup.scratch_device == "none" { String::new() } else { scratch_device },
            hostname: "box".into(),
            entropy: vec![7; 32],
            ..setup
        };
        let outcome = self.guest.call(Call::Setup(setup));
        assert!(matches!(outcome, Outcome::Done(_)), "{outcome:?}");
        self
    }

    pub(crate) fn sh(&self, script: &str) -> String {
        let finished = self.guest.run(Exec { env: vec![b"PATH=/bin".to_vec()], ..sh(script) });
        let stderr = String::from_utf8_lossy(&finished.stderr);
        format!("{}{stderr}", String::from_utf8_lossy(&finished.stdout))
    }
}

/// The set-up of a guest, but for control groups, of which this host has one hierarchy for all.
pub(crate) fn set_up(
    setup: &Setup,
    life: Option<&Life>,
    prepared: Option<Prepared>,
) -> Result<Place, Failed> {
    let place = kiln_agent::setup::set_up(setup, life, prepared)?;
    Ok(Place { groups: Some(groups::own("/sys/fs/cgroup")), ..place })
}

/// An empty root in namespaces of its own, as the guest kernel's initramfs is.
pub(crate) fn initial_root() {
    own_namespaces(UnshareFlags::NEWNS | UnshareFlags::NEWUTS | UnshareFlags::NEWNET);
    rustix::mount::mount("root", "/mnt", "tmpfs", MountFlags::empty(), None).expect("a tmpfs");
    std::env::set_current_dir("/mnt").expect("the root");
    rustix::mount::mount_move(".", "/").expect("a root");
    rustix::process::chroot(".").expect("root may change its root");
}

#[test]
fn the_image_is_the_root_and_can_be_written() {
    let booted = Booted::new(Setup::default());
    assert_eq!(
        booted.sh("cat /data/deep/file; echo new > /data/deep/file; cat /data/deep/file"),
        "from the imagenew\n"
    );
    assert_eq!(booted.sh("rm -r /data && ls -d /data"), "ls: /data: No such file or directory\n");
    assert_eq!(
        booted.sh("mkdir /data && ls -A /data; mv /opt/app /opt/other && cat /opt/other/file"),
        "moved"
    );
    assert_eq!(booted.sh("ls -A /home; ls -d /lower /scratch /root/bin 2>/dev/null"), "");
}

#[test]
fn names_are_the_hosts_to_give_and_links_in_the_image_lead_nowhere() {
    let booted = Booted::new(Setup { resolv_conf: "nameserver 10.0.0.1\n".into(), ..Setup::default() });
    assert_eq!(booted.sh("hostname; cat /etc/hostname /etc/resolv.conf"), "box\nbox\nnameserver 10.0.0.1\n");
    assert_eq!(booted.sh("grep -c box /etc/hosts; cat /etc/secret"), "1\nunchanged");
    assert_eq!(booted.sh("ping -c 1 -q 127.0.0.1 | grep -o '1 packets received'"), "1 packets received\n");
}

#[test]
fn a_command_finds_the_file_systems_it_expects() {
    let booted = Booted::new(Setup::default());
    let mounts = booted.sh("cut -d' ' -f2-4 /proc/mounts");
    for wanted in [
        "/ overlay rw,nodev,",
        "/sys sysfs ro,nosuid,nodev,noexec",
        "/sys/fs/cgroup cgroup2 rw,nosuid,nodev,noexec",
        "/dev tmpfs rw,nosuid,noexec",
        "/dev/pts devpts rw,nosuid,noexec",
        "/dev/shm tmpfs rw,nosuid,nodev,noexec",
        "/dev/mqueue mqueue rw,nosuid,nodev,noexec",
        "/proc proc rw,nosuid,nodev,noexec",
        "/proc/sys proc ro,nosuid,nodev,noexec",
    ] {
        assert!(mounts.contains(wanted), "{wanted} is missing in\n{mounts}");
    }
    let devices =
        "console core fd full mqueue null ptmx pts random shm stderr stdin stdout tty urandom zero ";
    assert_eq!(booted.sh("ls /dev | tr '\\n' ' '"), devices);
    assert_eq!(
        booted.sh("stat -c '%a %t:%T' /dev/null /dev/tty; stat -c %a /dev/shm /dev/pts/ptmx"),
        "666 1:3\n666 5:0\n1777\n666\n"
    );
    assert_eq!(
        booted.sh("echo x > /dev/null; head -c 3 /dev/zero | wc -c; head -c 9 /dev/urandom | wc -c; umask"),
        "3\n9\n0022\n"
    );
}

#[test]
fn the_first_terminal_is_the_console() {
    let booted = Booted::new(Setup::default());
    let tty = Some(WindowSize { rows: 24, columns: 80 });
    let finished = booted.guest.run(Exec { tty, ..exec(["/bin/sh", "-c", "echo seen > /dev/console"]) });
    assert_eq!(finished.text(), "seen\r\n");
}

#[test]
fn root_in_the_guest_is_root_of_little() {
    let booted = Booted::new(Setup::default());
    assert_eq!(
        booted.sh("grep -E 'CapBnd|CapEff|NoNewPrivs' /proc/self/status"),
        "CapEff:\t00000000a00425fb\nCapBnd:\t00000000a00425fb\nNoNewPrivs:\t0\n"
    );
    assert_eq!(
        booted.sh("mknod /tmp-node c 1 1 || mknod /dev/node b 7 0 || echo no nodes"),
        "no nodes\nmknod: /tmp-node: Operation not permitted\nmknod: /dev/node: Operation not permitted\n"
    );
    assert_eq!(booted.sh("echo x > /null"), "/bin/sh: can't create /null: Permission denied\n");
    for forbidden in
        ["mount -t tmpfs x /home", "umount /dev/shm", "hostname other", "date -s 2001-01-01", "dmesg"]
    {
        let said = booted.sh(&format!("{forbidden} > /dev/null && echo done"));
        assert!(
            said.contains("ermission denied")
                || said.contains("not permitted")
                || said.contains("are you root"),
            "{forbidden}: {said}"
        );
    }
}

/// What a root command can do with `CAP_SYS_CHROOT`: leave its root by a directory held open outside of it.
const ESCAPE: &str = r#"
#include <dirent.h>
#include <fcntl.h>
#include <stdio.h>
#include <sys/stat.h>
#include <unistd.h>
int main(void) {
    int outside = open("/", O_RDONLY);
    mkdir("/jail", 0700);
    if (chroot("/jail") || fchdir(outside)) return 1;
    for (int i = 0; i < 64; i++) chdir("..");
    if (chroot(".")) return 2;
    DIR *root = opendir("/");
    struct dirent *entry;
    while ((entry = readdir(root))) puts(entry->d_name);
    return 0;
}
"#;

#[test]
fn leaving_a_root_leads_to_the_images_and_not_to_the_agents() {
    let booted = Booted::from_image(Setup::default(), |tree| {
        std::fs::write(tree.join("escape.c"), ESCAPE).expect("a file");
        run(Command::new("cc").args(["-static", "-o"]).arg(tree.join("escape")).arg(tree.join("escape.c")));
    });
    let found = booted.sh("/escape");
    assert!(found.lines().any(|name| name == "escape"), "{found}");
    assert!(!found.lines().any(|name| ["lower", "scratch", "mem"].contains(&name)), "{found}");
}

#[test]
fn an_image_whose_system_directories_are_links_is_mounted_inside_it() {
    let booted = Booted::from_image(Setup::default(), |tree| {
        for (target, link) in
            [("/../../../proc-here", "proc"), ("../../../sys-here", "sys"), ("//dev-here", "dev")]
        {
            symlink(target, tree.join(link)).expect("a link");
            std::fs::create_dir(tree.join(target.rsplit('/').next().expect("a name"))).expect("a directory");
        }
    });
    let mounts = booted.sh("cut -d' ' -f2,3 /proc/mounts");
    for wanted in [
        "/proc-here proc",
        "/proc-here/sys proc",
        "/sys-here sysfs",
        "/dev-here tmpfs",
        "/dev-here/pts devpts",
    ] {
        assert!(mounts.lines().any(|line| line == wanted), "{wanted} is missing in\n{mounts}");
    }
}

#[test]
fn an_image_with_a_directory_in_the_place_of_a_file_is_refused_with_its_name() {
    let directory = tempfile::tempdir().expect("a temporary directory");
    let (tree, image) = (directory.path().join("tree"), directory.path().join("image"));
    std::fs::create_dir_all(tree.join("etc/hostname")).expect("a directory");
    run(Command::new("mkfs.erofs").arg("--quiet").arg(&image).arg(&tree));
    let disk = Disk::new(&image);
    let guest = Guest::begin(initial_root, set_up, || {});
    let setup = Setup {
        root_device: disk.0.to_string_lossy().into_owned(),
        hostname: "box".into(),
        entropy: vec![7; 32],
        ..Setup::default()
    };
    match guest.call(Call::Setup(setup)) {
        Outcome::Failed(failed) => {
            assert_eq!(failed.reason(), Reason::Invalid);
            assert_eq!(failed.message, "cannot write /etc/hostname in the image: is a directory");
        }
        outcome => panic!("{outcome:?}"),
    }
}

#[test]
fn a_volume_is_a_mount_with_the_images_content() {
    let volumes = vec!["/data".to_owned(), "/var/lib/new".to_owned()];
    let booted = Booted::new(Setup { volumes, ..Setup::default() });
    assert_eq!(
        booted.sh("cut -d' ' -f2 /proc/mounts | grep -E '^/(data|var)'; cat /data/deep/file; echo x > /var/lib/new/f"),
        "/data\n/var/lib/new\nfrom the image"
    );
}

#[test]
fn a_read_only_root_leaves_volumes_and_temporary_places_writable() {
    let volumes = vec!["/data".to_owned()];
    let booted = Booted::new(Setup { read_only: true, volumes, ..Setup::default() });
    let script = "for d in / /etc /home /opt/app /data /data/deep /tmp /run /dev/shm; do touch $d/x 2>/dev/null && echo $d; done; cat /data/deep/file";
    assert_eq!(booted.sh(script), "/data\n/data/deep\n/tmp\n/run\n/dev/shm\nfrom the image");
}

#[test]
fn a_working_directory_is_made_before_the_root_is_read_only() {
    let booted = Booted::new(Setup {
        read_only: true,
        working_directory: "/made/for/this".into(),
        ..Setup::default()
    });
    assert_eq!(
        booted.sh("ls -d /made/for/this; mkdir /made/more 2>/dev/null || echo sealed"),
        "/made/for/this\nsealed\n"
    );
}

#[test]
fn without_a_scratch_disk_memory_is_written() {
    let booted = Booted::new(Setup { scratch_device: "none".into(), ..Setup::default() });
    assert_eq!(booted.sh("echo x > /home/file && cat /home/file"), "x\n");
}

#[test]
fn a_disk_that_is_no_image_is_named() {
    let guest = Guest::begin(initial_root, set_up, || {});
    let setup = Setup {
        root_device: "/dev/zero".into(),
        hostname: "box".into(),
        entropy: vec![7; 32],
        ..Setup::default()
    };
    match guest.call(Call::Setup(setup)) {
        Outcome::Failed(failed) => {
            assert_eq!(failed.reason(), Reason::Internal);
            assert!(failed.message.starts_with("cannot mount /dev/zero (erofs)"), "{failed:?}");
        }
        outcome => panic!("{outcome:?}"),
    }
}

#[test]
fn after_power_off_the_scratch_file_system_is_clean() {
    /// Where `s_state` and `s_feature_incompat` are in an ext4 superblock. Linux
    /// Documentation/filesystems/ext4/super.rst.
    const STATE: usize = 0x3a;
    const INCOMPATIBLE: usize = 0x60;
    const NEEDS_RECOVERY: u8 = 4;
    let booted = Booted::new(Setup::default());
    booted.sh("dd if=/dev/zero of=/home/file bs=1M count=4 2>/dev/null; (sleep 1000 &)");
    let Booted { guest, superblock, .. } = booted;
    assert!(matches!(guest.power_off(0), Outcome::Done(_)));
    let superblock = superblock.recv().expect("the agent ended in order");
    assert_eq!((superblock[STATE], superblock[INCOMPATIBLE] & NEEDS_RECOVERY), (1, 0));
}

#[test]
fn the_hosts_own_devices_are_left_alone() {
    let before = std::fs::metadata("/dev/null").expect("a device");
    drop(Booted::new(Setup::default()));
    let after = std::fs::metadata("/dev/null").expect("a device");
    assert_eq!((before.dev(), before.ino(), before.mode()), (after.dev(), after.ino(), after.mode()));
}
