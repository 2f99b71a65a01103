//! What the host's KVM is and offers.

use std::fs::OpenOptions;
use std::io;
use std::path::Path;

use kiln::MonitorProgram;
use kiln::monitor::{Missing, Probe};

use super::{Finding, text};

/// Can /dev/kvm be opened?
pub(super) fn device(root: &Path) -> Finding {
    let path = root.join("dev/kvm");
    judge_device(OpenOptions::new().read(true).write(true).open(path).map(drop), cpu_flags(root))
}

fn judge_device(opened: io::Result<()>, hardware: bool) -> Finding {
    const CHECK: &str = "kvm";
    const CONSEQUENCE: &str = "no virtual machine can be made";
    match opened.map_err(|error| error.kind()) {
        Ok(()) => Finding::ok(CHECK, "/dev/kvm can be opened"),
        Err(io::ErrorKind::PermissionDenied) => Finding::failure(
            CHECK,
            "/dev/kvm is there, but this user may not open it",
            CONSEQUENCE,
            "sudo usermod -aG kvm $USER, then log in anew",
        ),
        Err(io::ErrorKind::NotFound) if hardware => Finding::failure(
            CHECK,
            "there is no /dev/kvm, although the CPU could",
            CONSEQUENCE,
            "sudo modprobe kvm_intel (or kvm_amd); in a container, pass --device /dev/kvm",
        ),
        Err(io::ErrorKind::NotFound) => Finding::failure(
            CHECK,
            "there is no /dev/kvm, and the CPU shows no vmx or svm",
            CONSEQUENCE,
            "turn virtualization on in the firmware; for a virtual machine, turn nested virtualization on at its host",
        ),
        Err(kind) => Finding::failure(CHECK, format!("/dev/kvm cannot be opened: {kind}"), CONSEQUENCE, ""),
    }
}

/// Does the CPU show hardware virtualization?
fn cpu_flags(root: &Path) -> bool {
    let Some(info) = text(root, "proc/cpuinfo") else { return false };
    info.lines()
        .filter(|line| line.starts_with("flags"))
        .any(|line| line.split_whitespace().any(|flag| flag == "vmx" || flag == "svm"))
}

/// Which kind of KVM is it?
pub(super) fn kind(root: &Path) -> Finding {
    const CHECK: &str = "virtualization";
    if root.join("sys/module/kvm_pvm").exists() {
        return Finding::warning(
            CHECK,
            "kvm_pvm: KVM without hardware virtualization",
            "a guest kernel runs instruction by instruction in an emulator: booting takes seconds, system calls some \
             hundred microseconds; user programs run at full speed",
            "use a host with hardware virtualization (vmx or svm) where that matters",
        );
    }
    if cpu_flags(root) {
        return Finding::ok(CHECK, "the CPU has hardware virtualization");
    }
    Finding::warning(
        CHECK,
        "the CPU shows no vmx or svm",
        "KVM is either absent or of a kind Kiln has not been measured on",
        "turn virtualization on in the firmware",
    )
}

/// Can a machine's process be jailed, and does KVM offer what a machine needs? The monitor answers: only it speaks to KVM, and it
/// enters its jail for the answer as for a machine.
pub(super) async fn monitor(program: &MonitorProgram) -> Vec<Finding> {
    match kiln::monitor::probe(program).await {
        Ok(probe) => vec![judge_jail(&probe), judge_probe(&probe)],
        Err(error) => vec![Finding::failure(
            "machine",
            format!("the monitor cannot be asked: {error}"),
            "whether a virtual machine can be made is not known",
            "",
        )],
    }
}

fn judge_jail(probe: &Probe) -> Finding {
    const CHECK: &str = "jail";
    const CONSEQUENCE: &str = "no machine is started: a guest that broke out of it would be on the host";
    match (&probe.jail_error, &probe.open_error, probe.landlock) {
        (Some(error), _, _) => Finding::failure(CHECK, &error.why, CONSEQUENCE, &error.fix),
        (None, Some(_), _) => Finding::ok(CHECK, "not tried, without KVM"),
        (None, None, version) => Finding::ok(
            CHECK,
            format!(
                "a machine's process can be jailed: namespaces, Landlock {}, no capabilities, a list of system calls, limits",
                version.unwrap_or_default()
            ),
        ),
    }
}

fn judge_probe(probe: &Probe) -> Finding {
    const CHECK: &str = "machine";
    const CONSEQUENCE: &str = "no virtual machine can be made";
    if !probe.missing.is_empty() {
        let list = |of: fn(&Missing) -> String| probe.missing.iter().map(of).collect::<Vec<_>>();
        let lacks = list(|missing| format!("{} ({})", missing.name, missing.why)).join(", ");
        let mut fixes = list(|missing| missing.fix.clone());
        fixes.dedup();
        return Finding::failure(CHECK, format!("KVM lacks {lacks}"), CONSEQUENCE, fixes.join("; "));
    }
    if probe.jail_error.is_some() {
        return Finding::failure(CHECK, "not tried, without a jail", CONSEQUENCE, "see `jail` above");
    }
    match (&probe.open_error, &probe.create_error) {
        (Some(error), _) => Finding::failure(CHECK, error, CONSEQUENCE, "see `kvm` above"),
        (None, Some(error)) => Finding::failure(CHECK, error, CONSEQUENCE, ""),
        (None, None) => Finding::ok(
            CHECK,
            format!("a machine can be made, with up to {} vCPUs", probe.max_vcpus.unwrap_or(1)),
        ),
    }
}

/// Does KVM split huge pages against the iTLB multihit defect?
pub(super) fn nx_huge_pages(root: &Path) -> Finding {
    const CHECK: &str = "nx_huge_pages";
    match text(root, "sys/module/kvm/parameters/nx_huge_pages").as_deref() {
        Some("Y" | "y" | "1" | "force") => Finding::warning(
            CHECK,
            "KVM splits huge pages (nx_huge_pages=Y)",
            "each new machine waits some 20 ms for a recovery thread of its own, and guests run on small pages",
            "on a CPU without the iTLB multihit defect: echo never | sudo tee \
             /sys/module/kvm/parameters/nx_huge_pages",
        ),
        Some(value) => Finding::ok(CHECK, format!("KVM keeps huge pages whole (nx_huge_pages={value})")),
        None => Finding::ok(CHECK, "KVM has no such setting"),
    }
}

#[cfg(test)]
mod tests {
    use super::super::Status;
    use super::super::tests::root;
    use kiln::monitor::Obstacle;

    use super::*;

    #[test]
    fn a_device_this_user_may_not_open_names_the_group() {
        let finding = judge_device(Err(io::ErrorKind::PermissionDenied.into()), true);
        assert_eq!(finding.status, Status::Failure);
        assert!(finding.fix.contains("usermod -aG kvm"));
    }

    #[test]
    fn no_device_is_a_missing_module_or_missing_hardware() {
        let with = root(&[("proc/cpuinfo", "flags\t\t: fpu vmx sse\n")]);
        assert!(device(with.path()).fix.contains("modprobe"));
        let without = root(&[("proc/cpuinfo", "flags\t\t: fpu vmxoff sse\n")]);
        assert!(device(without.path()).fix.contains("firmware"));
        let there = root(&[("dev/kvm", "")]);
        assert_eq!(device(there.path()).status, Status::Ok);
    }

    #[test]
    fn a_missing_capability_is_named_with_its_fix() {
        let missing = Missing { name: "KVM_CAP_X".into(), why: "for y".into(), fix: "do z".into() };
        let finding = judge_probe(&Probe { missing: vec![missing.clone(), missing], ..Probe::default() });
        assert_eq!(finding.status, Status::Failure);
        assert_eq!(finding.fact, "KVM lacks KVM_CAP_X (for y), KVM_CAP_X (for y)");
        assert_eq!(finding.fix, "do z");
    }

    #[test]
    fn a_process_that_cannot_be_jailed_is_a_failure() {
        let error = Obstacle { why: "cannot mount".into(), fix: "mend it".into() };
        let finding = judge_jail(&Probe { jail_error: Some(error), ..Probe::default() });
        assert_eq!((finding.status, finding.fact.as_str()), (Status::Failure, "cannot mount"));
        assert_eq!(finding.fix, "mend it");
        let finding = judge_jail(&Probe { landlock: Some(7), ..Probe::default() });
        assert_eq!(finding.status, Status::Ok);
        assert!(finding.fact.contains("Landlock 7"), "{finding:?}");
    }

    #[test]
    fn a_machine_that_cannot_be_made_says_why() {
        let finding = judge_probe(&Probe { create_error: Some("out of memory".into()), ..Probe::default() });
        assert_eq!((finding.status, finding.fact.as_str()), (Status::Failure, "out of memory"));
        assert_eq!(judge_probe(&Probe::default()).status, Status::Ok);
    }

    #[test]
    fn pvm_is_slow_but_works() {
        let pvm = root(&[("sys/module/kvm_pvm/parameters/x", ""), ("proc/cpuinfo", "flags : fpu\n")]);
        assert_eq!(kind(pvm.path()).status, Status::Warning);
        assert!(kind(pvm.path()).fact.contains("kvm_pvm"));
        let hardware = root(&[("proc/cpuinfo", "flags : svm\n")]);
        assert_eq!(kind(hardware.path()).status, Status::Ok);
        assert_eq!(kind(root(&[]).path()).status, Status::Warning);
    }

    #[test]
    fn split_huge_pages_are_a_warning() {
        for (value, status) in [("Y\n", Status::Warning), ("N\n", Status::Ok), ("never\n", Status::Ok)] {
            let host = root(&[("sys/module/kvm/parameters/nx_huge_pages", value)]);
            assert_eq!(nx_huge_pages(host.path()).status, status, "{value}");
        }
        assert_eq!(nx_huge_pages(root(&[]).path()).status, Status::Ok);
    }
}
