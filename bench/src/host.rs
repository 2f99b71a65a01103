//! The facts about a host without which its figures mean nothing.

use std::path::Path;
use std::process::Command;

/// Name and value of each fact.
pub(crate) fn facts() -> Vec<(&'static str, String)> {
    let read =
        |path: &str| std::fs::read_to_string(path).map(|text| text.trim().to_owned()).unwrap_or_default();
    let cpuinfo = read("/proc/cpuinfo");
    let model = cpuinfo.lines().find_map(|line| line.strip_prefix("model name")).unwrap_or_default();
    let module = ["kvm_pvm", "kvm_amd", "kvm_intel"];
    let module = module.iter().find(|name| Path::new("/sys/module").join(name).exists()).copied();
    let cgroup = if Path::new("/sys/fs/cgroup/cgroup.controllers").exists() { "v2" } else { "v1" };
    let memory = read("/proc/meminfo");
    let commit = Command::new("git").args(["rev-parse", "--short=12", "HEAD"]).output();
    let commit =
        commit.map(|output| String::from_utf8_lossy(&output.stdout).trim().to_owned()).unwrap_or_default();
    let uname = rustix::system::uname();
    vec![
        ("commit", commit),
        (
            "cpu",
            format!(
                "{} x {}",
                cpuinfo.matches("\nprocessor").count() + 1,
                model.trim_start_matches([' ', '\t', ':'])
            ),
        ),
        (
            "memory",
            memory.lines().next().unwrap_or_default().trim_start_matches("MemTotal:").trim().to_owned(),
        ),
        ("kernel", uname.release().to_string_lossy().into_owned()),
        ("kvm", module.unwrap_or("none").to_owned()),
        ("cgroup", cgroup.to_owned()),
        ("huge pages", read("/sys/kernel/mm/transparent_hugepage/enabled")),
        ("load before", read("/proc/loadavg")),
    ]
}
