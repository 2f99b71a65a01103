//! Machines of many shapes.

use std::path::PathBuf;

use kiln_tests::{busybox, is_hardware_style, run, script};

#[test]
fn sixteen_processors_are_all_used() {
    let script_text =
        "nproc; for cpu in $(seq 0 15); do taskset $((1 << cpu)) true || echo \"cpu $cpu\"; done";
    script(&["--cpus", "16", "--memory", "512m"], script_text).prints("16\n");
}

/// Three processes on one processor take turns 600 times each, with values of their own in every vector register.
#[test]
fn vector_registers_belong_to_one_process() {
    script(&[], "/probe registers 3 30").prints("3 processes kept their registers\n");
}

#[test]
fn a_hundred_kibibytes_of_arguments_arrive() {
    let words: Vec<String> = (0..1024).map(|number| format!("{number:0100}")).collect();
    let mut command = vec!["/probe", "argv"];
    command.extend(words.iter().map(String::as_str));
    let outcome = run(&[], &busybox(), &command);
    outcome.code(0);
    let local = std::process::Command::new(kiln_testkit::image::probe().expect("the probe"))
        .arg("argv")
        .args(&words)
        .output();
    assert_eq!(outcome.stdout, local.expect("the probe runs").stdout);
}

/// Memory below and above the hole for devices, which ends at 4 GiB. Where every page fault is emulated it takes
/// minutes to touch it all, so there a part is touched.
#[test]
#[ignore = "does not pass yet where guest kernels are emulated: docs/known-gaps.md; the rig runs it"]
fn memory_on_both_sides_of_the_hole_works() {
    let sizes: &[(&str, u64, &str)] = if is_hardware_style() {
        &[("4g", 3_900_000, "3700"), ("8g", 7_900_000, "7600")]
    } else {
        &[("4500m", 4_300_000, "256")]
    };
    for (memory, least_kib, touch_mib) in sizes {
        let outcome =
            script(&["--memory", memory], &format!("/probe touch {touch_mib}; grep MemTotal /proc/meminfo"));
        outcome.code(0);
        let out = outcome.out();
        assert!(out.contains(&format!("touched {touch_mib} MiB")), "{out}");
        let total = out.lines().find_map(|line| line.strip_prefix("MemTotal:")).expect("MemTotal");
        let total: u64 = total.trim().trim_end_matches(" kB").parse().expect("a number");
        assert!(total > *least_kib, "{total} KiB of {memory}");
    }
}

#[test]
fn the_smallest_machine_runs() {
    script(&["--memory", "64m"], "echo small").prints("small\n");
}

/// Debian's own kernel has no vsock and no EROFS built in, so a command cannot run; but it boots, unpatched, and the
/// agent in it says on the console what it lacks, and through the power page that it gives up.
#[test]
#[ignore = "stock kernels need hardware-style KVM: this runs in the rig"]
fn an_unpatched_kernel_reaches_the_agent() {
    assert!(
        is_hardware_style(),
        "this host's KVM cannot emulate what a stock kernel does in its first second"
    );
    let kernel =
        std::env::var_os("KILN_TEST_KERNEL").map(PathBuf::from).expect("KILN_TEST_KERNEL names a kernel");
    let options = ["--kernel", kernel.to_str().expect("a path")];
    run(&options, &busybox(), &["true"])
        .code(125)
        .complains("kiln-agent: cannot serve")
        .complains("the guest gave up, code 65");
}

/// The agent's port is taken before any command runs, and the host listens to nobody.
#[test]
fn guest_code_cannot_speak_as_the_agent() {
    let python = kiln_testkit::image::python().expect("the image");
    let program = "
import socket
def attempt(what, act):
    s = socket.socket(socket.AF_VSOCK, socket.SOCK_STREAM)
    s.settimeout(5)
    try:
        act(s)
        print(what, 'worked')
    except OSError:
        print(what, 'refused')
attempt('bind', lambda s: s.bind((socket.VMADDR_CID_ANY, 1024)))
for port in (1, 1024, 1025, 5000):
    attempt(f'host {port}', lambda s: s.connect((2, port)))
";
    let outcome = run(&[], &python, &["python3", "-c", program]);
    outcome.prints("bind refused\nhost 1 refused\nhost 1024 refused\nhost 1025 refused\nhost 5000 refused\n");
}
