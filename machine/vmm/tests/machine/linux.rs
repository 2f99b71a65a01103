//! A stock Linux: Debian's packaged kernel, a bzImage nobody prepared for Kiln.
//!
//! It needs KVM with hardware virtualization, so these tests are left out elsewhere: the rig runs them, and names the
//! kernel in `KILN_TEST_KERNEL`.

use std::fs;

use kiln_control::EndReason;
use kiln_vmm::Shape;

use crate::guest::{Outcome, run};

const INIT_TEXT: &str = "user space speaks\n";

/// A static program that writes [`INIT_TEXT`] to its standard output and restarts the machine.
fn init() -> Vec<u8> {
    const AT: u64 = 0x40_0000;
    const CODE: usize = 64 + 56;
    let mut code = vec![
        0xb8,
        1,
        0,
        0,
        0, // mov eax, write
        0xbf,
        1,
        0,
        0,
        0, // mov edi, standard output
        0x48,
        0x8d,
        0x35,
        0x1d,
        0,
        0,
        0, // lea rsi, the text
        0xba,
        INIT_TEXT.len() as u8,
        0,
        0,
        0, // mov edx, its length
        0x0f,
        0x05, // syscall
        0xb8,
        0xa9,
        0,
        0,
        0, // mov eax, reboot
        0xbf,
        0xad,
        0xde,
        0xe1,
        0xfe, // mov edi, LINUX_REBOOT_MAGIC1
        0xbe,
        0x69,
        0x19,
        0x12,
        0x28, // mov esi, LINUX_REBOOT_MAGIC2
        0xba,
        0x67,
        0x45,
        0x23,
        0x01, // mov edx, LINUX_REBOOT_CMD_RESTART
        0x0f,
        0x05, // syscall
    ];
    assert_eq!(code.len(), 17 + 0x1d, "the text follows the code");
    code.extend(INIT_TEXT.bytes());

    let mut file = Vec::new();
    file.extend(b"\x7fELF\x02\x01\x01");
    file.resize(16, 0);
    file.extend(2_u16.to_le_bytes());
    file.extend(62_u16.to_le_bytes());
    file.extend(1_u32.to_le_bytes());
    file.extend((AT + CODE as u64).to_le_bytes());
    file.extend(64_u64.to_le_bytes());
    file.extend(0_u64.to_le_bytes());
    file.extend(0_u32.to_le_bytes());
    for half in [64_u16, 56, 1, 0, 0, 0] {
        file.extend(half.to_le_bytes());
    }
    let bytes = (CODE + code.len()) as u64;
    file.extend(1_u32.to_le_bytes());
    file.extend(5_u32.to_le_bytes());
    for word in [0, AT, AT, bytes, bytes, 0x1000] {
        file.extend(word.to_le_bytes());
    }
    file.extend(code);
    file
}

/// A cpio archive as the kernel unpacks it. Linux `Documentation/driver-api/early-userspace/buffer-format.rst`,
/// "initramfs buffer format".
fn initramfs() -> Vec<u8> {
    let mut archive = Vec::new();
    let mut add = |name: &str, mode: u32, device: (u32, u32), data: &[u8]| {
        let fields =
            [0, mode, 0, 0, 1, 0, data.len() as u32, 0, 0, device.0, device.1, name.len() as u32 + 1, 0];
        archive.extend(b"070701");
        for field in fields {
            archive.extend(format!("{field:08x}").bytes());
        }
        archive.extend(name.bytes());
        archive.push(0);
        archive.resize(archive.len().next_multiple_of(4), 0);
        archive.extend(data);
        archive.resize(archive.len().next_multiple_of(4), 0);
    };
    add("dev", 0o040_755, (0, 0), &[]);
    add("dev/console", 0o020_600, (5, 1), &[]);
    add("init", 0o100_755, (0, 0), &init());
    add("TRAILER!!!", 0, (0, 0), &[]);
    archive
}

fn boot(memory_mib: u32, vcpus: u32) -> Outcome {
    let path = std::env::var_os("KILN_TEST_KERNEL")
        .expect("KILN_TEST_KERNEL names a bzImage; `cargo xtask test --rig` sets it");
    let kernel = fs::read(path).expect("the kernel of KILN_TEST_KERNEL");
    let shape = Shape::new(memory_mib, vcpus).expect("a shape");
    let outcome = run(&kernel, shape, "loglevel=7", Some(&initramfs()), Box::new(|_| {}));
    assert_eq!(outcome.end.reason, EndReason::Reset, "{:?}\n{}", outcome.end, outcome.console);
    // The driver of the port writes it with carriage returns.
    assert!(outcome.console.contains(INIT_TEXT.trim_end()), "{}", outcome.console);
    outcome
}

#[test]
#[ignore = "needs hardware-style KVM and KILN_TEST_KERNEL: cargo xtask test --rig"]
fn debians_kernel_reaches_user_space_on_kvm_clock() {
    let outcome = boot(512, 1);
    assert!(
        outcome.console.contains("clocksource: Switched to clocksource kvm-clock"),
        "{}",
        outcome.console
    );
}

#[test]
#[ignore = "needs hardware-style KVM and KILN_TEST_KERNEL: cargo xtask test --rig"]
fn debians_kernel_brings_up_all_processors_and_all_memory() {
    let outcome = boot(8192, 16);
    assert!(outcome.console.contains("Brought up 1 node, 16 CPUs"), "{}", outcome.console);
    // 8 GiB are 2097152 pages, less what lies below 1 MiB and is not RAM.
    let line =
        outcome.console.lines().find(|line| line.contains("Memory: ")).expect("the kernel counts its memory");
    let total: u64 = line
        .split_once('/')
        .and_then(|(_, rest)| rest.split_once('K'))
        .and_then(|(total, _)| total.parse().ok())
        .expect("a total in KiB");
    assert!(total > 8_380_000, "{line}");
}
