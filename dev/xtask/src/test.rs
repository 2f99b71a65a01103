//! System tests and benchmarks: whole machines, on this host's KVM or in the rig.

use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context as _, Result, bail};
use serde_json::Value;

use crate::{kernel, paths, process, release, rig};

/// How many tests run at once on this host, each with a machine or two.
const HOST_THREADS: &str = "2";
/// The same in the rig, where every instruction is emulated.
const RIG_THREADS: &str = "2";
/// Processors of the rig for tests: one, for the reason that `rig` gives.
const RIG_CPUS: &str = "1";
/// Memory of the rig for tests, in MiB: an 8 GiB guest that touches it all, and the files that tests write.
const RIG_MEMORY_MIB: &str = "13312";
/// The longest a run in the rig may take, in seconds: a soak of 10,000 takes two hours.
const RIG_LIMIT_SECONDS: &str = "14400";
/// Crates whose own tests use /dev/kvm, so that they run on both kinds of it.
const KVM_CRATES: [&str; 2] = ["kiln-hypervisor", "kiln-vmm"];

/// An ordinary user: no name, no groups.
const USER: &str = "12345";
/// Runs what follows `$1` and `$2` as that user: `$1` becomes its folder, and `$2` is this repository, which it may read, however private the
/// folder that it is in. It may open `/dev/kvm`. Nobody outside sees any of this.
const AS_USER: &str = r#"
set -e
user="setpriv --reuid $KILN_TEST_USER --regid $KILN_TEST_USER --clear-groups"
mkdir -p "$1"
mount -t tmpfs none "$1"
mknod -m 666 "$1/kvm" c 10 232
mount --bind "$1/kvm" /dev/kvm
umount -l "$1"
chown "$KILN_TEST_USER:$KILN_TEST_USER" "$1"
if ! $user test -r "$2/target"; then
    mount --bind "$2" /mnt
    mount -t tmpfs -o mode=755 none "/$(echo "$2" | cut -d / -f 2)"
    mkdir -p "$2"
    mount --move /mnt "$2"
fi
cd "$2"
shift 2
exec $user "$@"
"#;

/// Tests that look into a jail, mount, become somebody else or have umoci give files to others, which root alone can.
const ROOT_ONLY: [&str; 14] = [
    "jail::",
    "detached::a_disk_that_is_full",
    "disk::",
    "lifetime::an_idle",
    "nasty::a_debian_is_what_umoci",
    "nasty::as_many_layers",
    "nasty::deletions_and_opaque",
    "nasty::every_kind_of_metadata",
    "pools::cycles_leave_nothing_behind",
    "pools::nothing_of_a_guest_is_left",
    "templates::a_bake_killed_at_any_step",
    "templates::a_full_disk",
    "vms::another_user",
    "vms::of_many",
];

/// Runs the system tests: `[--user|--rig [--kvm]] [FILTER...]`, filters and options as libtest has them. `--user` runs them
/// as an ordinary user, which root alone can. `--rig --kvm` runs
/// only the tests of the crates that use KVM themselves.
pub(crate) fn run(args: &[String]) -> Result<()> {
    let in_rig = args.iter().any(|arg| arg == "--rig");
    if in_rig && args.iter().any(|arg| arg == "--kvm") {
        return kvm_crates_in_rig();
    }
    let as_user = args.iter().any(|arg| arg == "--user");
    let is_filter = |arg: &&str| !["--rig", "--user"].contains(arg);
    let filters: Vec<&str> = args.iter().map(String::as_str).filter(is_filter).collect();
    let guest = release::guest_dir()?;
    let kiln = release::build(&guest)?;
    let probe = probe()?;
    let store = paths::target().join(if as_user { "test-store-user" } else { "test-store" });
    let environment = [
        ("KILN", kiln),
        ("KILN_PROBE", probe),
        ("KILN_TEST_GUEST", guest),
        ("KILN_TEST_SYSTEM_MAP", kernel::system_map()?),
        ("KILN_TEST_STORE", store.clone()),
        ("KILN_MONITOR", release::monitor()?),
        ("KILN_EXAMPLES", examples()?),
    ];

    let mut images =
        process::cargo(["run", "--quiet", "--package", "kiln-testkit", "--bin", "make-test-images"]);
    process::run(images.envs(environment.clone()))?;
    if in_rig {
        return run_in_rig(&environment, &filters);
    }
    if store.exists() {
        std::fs::remove_dir_all(&store).context("the store of an earlier run")?;
    }
    let mut tests = if as_user {
        let images = paths::target().join("test-images");
        process::run(Command::new("chmod").args(["-R", "a+rX"]).arg(images))?;
        let mut unshare = Command::new("unshare");
        let repository = paths::root().canonicalize().context("this repository")?;
        unshare.args(["--mount", "sh", "-c", AS_USER, "sh"]).arg(&store).arg(repository);
        unshare.args(test_programs(&["--package", "kiln-tests", "--test", "system"])?);
        unshare.args(ROOT_ONLY.iter().flat_map(|name| ["--skip", name]));
        unshare.env("KILN_TEST_USER", USER).env("HOME", &store).env("TMPDIR", &store);
        unshare
    } else {
        process::cargo(["test", "--package", "kiln-tests", "--test", "system", "--"])
    };
    process::run(tests.args(["--test-threads", HOST_THREADS]).args(filters).envs(environment))
}

/// Builds the library's examples and returns their folder.
fn examples() -> Result<PathBuf> {
    process::run(&mut process::cargo(["build", "--quiet", "--package", "kiln", "--examples"]))?;
    Ok(paths::target().join("debug/examples"))
}

/// Runs the same tests, and those that need hardware-style KVM, in the rig.
fn run_in_rig(environment: &[(&str, PathBuf)], filters: &[&str]) -> Result<()> {
    let mut programs = test_programs(&["--package", "kiln-tests", "--test", "system"])?;
    if filters.is_empty() {
        programs.extend(kvm_programs()?);
    }
    programs_in_rig(programs, environment, filters)
}

/// Runs the tests of the crates that use KVM themselves in the rig.
fn kvm_crates_in_rig() -> Result<()> {
    programs_in_rig(kvm_programs()?, &[], &[])
}

fn kvm_programs() -> Result<Vec<PathBuf>> {
    let mut programs = Vec::new();
    for name in KVM_CRATES {
        programs.extend(test_programs(&["--package", name])?);
    }
    Ok(programs)
}

fn programs_in_rig(programs: Vec<PathBuf>, environment: &[(&str, PathBuf)], filters: &[&str]) -> Result<()> {
    let kernel = rig::kernel()?;
    let xtask = std::env::current_exe().context("our own path")?;
    for program in programs {
        eprintln!("in the rig: {}", program.display());
        let mut command = Command::new(&xtask);
        command.args([
            "rig",
            "--cpus",
            RIG_CPUS,
            "--mem",
            RIG_MEMORY_MIB,
            "--timeout",
            RIG_LIMIT_SECONDS,
            "--",
        ]);
        command.arg(program).args(["--include-ignored", "--test-threads", RIG_THREADS]).args(filters);
        command.envs(environment.iter().cloned()).env("KILN_TEST_KERNEL", &kernel);
        process::run(&mut command)?;
    }
    Ok(())
}

/// Builds tests and returns their programs.
fn test_programs(selection: &[&str]) -> Result<Vec<PathBuf>> {
    let mut build = process::cargo(["test", "--no-run", "--quiet", "--message-format", "json"]);
    let messages = process::output(build.args(selection))?;
    let mut programs = Vec::new();
    for line in messages.lines() {
        let message: Value = serde_json::from_str(line).context("cargo's messages")?;
        if let Some(program) = message["executable"].as_str().filter(|_| message["profile"]["test"] == true) {
            programs.push(program.into());
        }
    }
    if programs.is_empty() {
        bail!("no test program in {selection:?}");
    }
    Ok(programs)
}

/// Builds the static program that looks at guests from inside.
pub(crate) fn probe() -> Result<PathBuf> {
    release::static_program("kiln-probe", "kiln-probe", "release")
}

/// Runs a benchmark: `boot|pull|rootfs|io [--json FILE]`.
pub(crate) fn bench(args: &[String]) -> Result<()> {
    let guest = release::guest_dir()?;
    let kiln = release::build(&guest)?;
    let environment: [(&str, &Path); 4] = [
        ("KILN", &kiln),
        ("KILN_MONITOR", &release::monitor()?),
        ("KILN_PROBE", &probe()?),
        ("KILN_TEST_GUEST", &guest),
    ];
    let mut bench = process::cargo(["run", "--quiet", "--release", "--package", "kiln-bench", "--"]);
    process::run(bench.args(args).envs(environment))
}
