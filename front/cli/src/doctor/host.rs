//! The host around KVM: memory, disk, and what isolation it offers.

use std::path::{Path, PathBuf};

use kiln::monitor::{CGROUP_VARIABLE, GroupError, Groups};
use kiln::{GuestBundle, with_causes};

use super::{Finding, chosen, text};
use crate::failure::Failure;

/// Below this much available memory a default machine may not fit.
const MEMORY_LOW_KIB: u64 = 768 << 10;
/// Below this much free disk, pulling an ordinary image may fail.
const DISK_LOW_BYTES: u64 = 2 << 30;

/// Is there a guest to boot?
pub(super) fn guest(found: Result<GuestBundle, Failure>) -> Finding {
    match found {
        Ok(_) => Finding::ok("guest", "guest kernel and agent are there"),
        Err(failure) => {
            let report = failure.report();
            let (fact, fix) = report.split_once("hint: ").unwrap_or((&report, ""));
            let fact = fact.trim().trim_start_matches("error: ").replace('\n', ";");
            Finding::failure("guest", fact, "there is nothing to boot", fix.trim())
        }
    }
}

/// Can the store be written, and has it room?
pub(super) fn store(root: &Path) -> Finding {
    const CHECK: &str = "store";
    let existing = nearest_existing(root);
    if let Err(error) = tempfile_in(&existing) {
        return Finding::failure(
            CHECK,
            format!("{} cannot be written: {error}", existing.display()),
            "no image can be kept",
            "choose another folder with --root DIR or KILN_ROOT",
        );
    }
    let Ok(room) = rustix::fs::statvfs(&existing) else {
        return Finding::ok(CHECK, format!("{} can be written", root.display()));
    };
    let free = room.f_bavail.saturating_mul(room.f_frsize);
    let fact = format!("{} has {:.1} GiB free", root.display(), free as f64 / f64::from(1 << 30));
    if free < DISK_LOW_BYTES {
        return Finding::warning(
            CHECK,
            fact,
            "pulling an image or writing in a guest may run out of space",
            "free some space (kiln rmi), or choose another folder with --root DIR",
        );
    }
    Finding::ok(CHECK, fact)
}

fn nearest_existing(path: &Path) -> PathBuf {
    path.ancestors().find(|ancestor| ancestor.is_dir()).unwrap_or(Path::new("/")).to_owned()
}

/// A file without a name, as the scratch disks are: proves that the folder can be written and the file system can.
fn tempfile_in(folder: &Path) -> std::io::Result<()> {
    use rustix::fs::{Mode, OFlags};
    rustix::fs::open(folder, OFlags::TMPFILE | OFlags::WRONLY | OFlags::CLOEXEC, Mode::from_raw_mode(0o600))?;
    Ok(())
}

/// Is there memory for a guest?
pub(super) fn memory(root: &Path) -> Finding {
    const CHECK: &str = "memory";
    let available = text(root, "proc/meminfo").and_then(|info| {
        info.lines().find_map(|line| {
            line.strip_prefix("MemAvailable:")?.trim().strip_suffix(" kB")?.parse::<u64>().ok()
        })
    });
    let Some(available) = available else { return Finding::ok(CHECK, "available memory is not known") };
    let fact = format!("{} MiB are available", available >> 10);
    if available < MEMORY_LOW_KIB {
        return Finding::warning(
            CHECK,
            fact,
            "a guest that fills its memory may be killed with others by the host's OOM killer",
            "give the host more memory, or guests less (--memory)",
        );
    }
    Finding::ok(CHECK, fact)
}

/// Does the kernel count memory that is only reserved?
pub(super) fn overcommit(root: &Path) -> Finding {
    const CHECK: &str = "overcommit";
    match text(root, "proc/sys/vm/overcommit_memory").as_deref() {
        Some("2") => Finding::warning(
            CHECK,
            "vm.overcommit_memory is 2: reserved memory counts as used",
            "each guest's whole memory is charged when it starts, not when it is touched",
            "sudo sysctl vm.overcommit_memory=0",
        ),
        _ => Finding::ok(CHECK, "memory is charged when it is touched"),
    }
}

/// May guest memory use huge pages?
pub(super) fn huge_pages(root: &Path) -> Finding {
    const CHECK: &str = "huge_pages";
    match text(root, "sys/kernel/mm/transparent_hugepage/enabled").as_deref().map(chosen) {
        Some(choice @ ("always" | "madvise")) => {
            Finding::ok(CHECK, format!("transparent huge pages can be had ({choice})"))
        }
        _ => Finding::warning(
            CHECK,
            "transparent huge pages are off",
            "guests of some gigabytes run slower, since each small page is mapped by itself",
            "echo madvise | sudo tee /sys/kernel/mm/transparent_hugepage/enabled",
        ),
    }
}

/// Which cgroup version is it, and has a machine's process a group of its own?
pub(super) fn cgroups(root: &Path, groups: Result<Option<&Groups>, &GroupError>) -> Finding {
    const CHECK: &str = "cgroups";
    const ALONE: &str = "machines are bounded by resource limits of their process alone";
    match groups {
        Ok(Some(groups)) => {
            let folder = groups.folder().display();
            return Finding::ok(CHECK, format!("cgroup v2; a machine's process has a group in {folder}"));
        }
        Err(error) => {
            return Finding::failure(CHECK, with_causes(error), "no machine can be started", error.hint());
        }
        Ok(None) => {}
    }
    if root.join("sys/fs/cgroup/cgroup.controllers").exists() {
        return Finding::ok(
            CHECK,
            format!("cgroup v2, and no group for machines ({CGROUP_VARIABLE} is not set)"),
        );
    }
    if root.join("sys/fs/cgroup").is_dir() {
        return Finding::warning(
            CHECK,
            "cgroup v1 (or v1 beside v2)",
            "an ordinary user cannot bound a machine by cgroup; resource limits of the process apply alone",
            "boot the host with systemd.unified_cgroup_hierarchy=1",
        );
    }
    Finding::warning(CHECK, "no cgroups are mounted", ALONE, "mount -t cgroup2 none /sys/fs/cgroup")
}

/// May an ordinary user make user namespaces?
pub(super) fn user_namespaces(root: &Path) -> Finding {
    const CHECK: &str = "user_namespaces";
    const CONSEQUENCE: &str = "a machine's process cannot be given namespaces of its own, so none is started";
    let is = |path: &str, value: &str| text(root, path).as_deref() == Some(value);
    if !root.join("proc/self/ns/user").exists() {
        return Finding::failure(
            CHECK,
            "the kernel has no user namespaces",
            CONSEQUENCE,
            "use a kernel with CONFIG_USER_NS",
        );
    }
    for (path, value, fix) in [
        ("proc/sys/user/max_user_namespaces", "0", "sudo sysctl user.max_user_namespaces=15000"),
        ("proc/sys/kernel/unprivileged_userns_clone", "0", "sudo sysctl kernel.unprivileged_userns_clone=1"),
        (
            "proc/sys/kernel/apparmor_restrict_unprivileged_userns",
            "1",
            "sudo sysctl kernel.apparmor_restrict_unprivileged_userns=0",
        ),
    ] {
        if is(path, value) {
            let setting = path.trim_start_matches("proc/sys/").replace('/', ".");
            return Finding::failure(CHECK, format!("forbidden by {setting}={value}"), CONSEQUENCE, fix);
        }
    }
    Finding::ok(CHECK, "ordinary users may make them")
}

/// May an ordinary user handle page faults of a guest?
pub(super) fn userfaultfd(root: &Path) -> Finding {
    const CHECK: &str = "userfaultfd";
    if text(root, "proc/sys/vm/unprivileged_userfaultfd").as_deref() == Some("1") {
        return Finding::ok(CHECK, "open to all users");
    }
    let device = std::fs::OpenOptions::new().read(true).write(true).open(root.join("dev/userfaultfd"));
    if device.is_ok() {
        return Finding::ok(CHECK, "/dev/userfaultfd can be opened");
    }
    Finding::warning(
        CHECK,
        "not for this user (vm.unprivileged_userfaultfd=0, no access to /dev/userfaultfd)",
        "guest memory cannot be fetched on demand in user space; `kiln run` does not need it",
        "sudo sysctl vm.unprivileged_userfaultfd=1, or give access to /dev/userfaultfd",
    )
}

/// Has the kernel Landlock?
pub(super) fn landlock() -> Finding {
    use landlock::{ABI, Access, AccessFs, CompatLevel, Compatible, Ruleset, RulesetAttr};
    // A rule set that is made and never put in force changes nothing.
    let made = Ruleset::default()
        .set_compatibility(CompatLevel::HardRequirement)
        .handle_access(AccessFs::from_all(ABI::V1))
        .and_then(Ruleset::create);
    match made {
        Ok(_) => Finding::ok("landlock", "the kernel has it"),
        Err(_) => Finding::failure(
            "landlock",
            "the kernel has it not, or it is turned off",
            "a machine's process cannot be denied all files, so none is started",
            "use a kernel with CONFIG_SECURITY_LANDLOCK and landlock in lsm=",
        ),
    }
}

#[cfg(test)]
mod tests {
    use super::super::Status;
    use super::super::tests::root;
    use super::*;

    #[test]
    fn a_store_that_cannot_be_written_is_a_failure() {
        let folder = tempfile::tempdir().expect("a temporary folder");
        assert_eq!(store(&folder.path().join("not/there/yet")).status, Status::Ok);
        assert_eq!(store(Path::new("/proc/kiln")).status, Status::Failure);
    }

    #[test]
    fn little_memory_is_a_warning() {
        let low = root(&[("proc/meminfo", "MemTotal: 9 kB\nMemAvailable:  524288 kB\n")]);
        assert_eq!(memory(low.path()).status, Status::Warning);
        let enough = root(&[("proc/meminfo", "MemAvailable:  8388608 kB\n")]);
        assert_eq!(memory(enough.path()), Finding::ok("memory", "8192 MiB are available"));
    }

    #[test]
    fn strict_overcommit_is_a_warning() {
        let strict = root(&[("proc/sys/vm/overcommit_memory", "2\n")]);
        assert_eq!(overcommit(strict.path()).status, Status::Warning);
        assert_eq!(overcommit(root(&[("proc/sys/vm/overcommit_memory", "0\n")]).path()).status, Status::Ok);
    }

    #[test]
    fn huge_pages_that_are_off_are_a_warning() {
        const PATH: &str = "sys/kernel/mm/transparent_hugepage/enabled";
        assert_eq!(huge_pages(root(&[(PATH, "always madvise [never]\n")]).path()).status, Status::Warning);
        assert_eq!(huge_pages(root(&[(PATH, "always [madvise] never\n")]).path()).status, Status::Ok);
    }

    #[test]
    fn the_first_cgroup_version_is_a_warning() {
        assert_eq!(
            cgroups(root(&[("sys/fs/cgroup/memory/tasks", "")]).path(), Ok(None)).status,
            Status::Warning
        );
        assert_eq!(
            cgroups(root(&[("sys/fs/cgroup/cgroup.controllers", "memory")]).path(), Ok(None)).status,
            Status::Ok
        );
        assert_eq!(cgroups(root(&[]).path(), Ok(None)).status, Status::Warning);
    }

    #[test]
    fn each_lock_on_user_namespaces_is_named() {
        let has = ("proc/self/ns/user", "");
        for (path, value, name) in [
            ("proc/sys/user/max_user_namespaces", "0\n", "user.max_user_namespaces=0"),
            ("proc/sys/kernel/unprivileged_userns_clone", "0\n", "kernel.unprivileged_userns_clone=0"),
            ("proc/sys/kernel/apparmor_restrict_unprivileged_userns", "1\n", "apparmor_restrict"),
        ] {
            let finding = user_namespaces(root(&[has, (path, value)]).path());
            assert_eq!(finding.status, Status::Failure);
            assert!(finding.fact.contains(name), "{finding:?}");
        }
        assert_eq!(user_namespaces(root(&[has]).path()).status, Status::Ok);
        assert_eq!(user_namespaces(root(&[]).path()).status, Status::Failure);
    }

    #[test]
    fn userfaultfd_is_open_by_sysctl_or_by_device() {
        assert_eq!(userfaultfd(root(&[]).path()).status, Status::Warning);
        assert_eq!(userfaultfd(root(&[("dev/userfaultfd", "")]).path()).status, Status::Ok);
        let sysctl = root(&[("proc/sys/vm/unprivileged_userfaultfd", "1\n")]);
        assert_eq!(userfaultfd(sysctl.path()).status, Status::Ok);
    }
}
