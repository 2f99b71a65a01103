//! How machines end, and what guests find where nothing is.

use kiln_control::EndReason;

use crate::guest::{Guest, POWER};

#[test]
fn a_guest_powers_off() {
    let outcome = Guest::default().say("bye").power_off(0).run();
    assert_eq!((outcome.end.reason, outcome.console.as_str()), (EndReason::PowerOff, "bye"));
    assert_eq!(outcome.end.detail, "");
}

#[test]
fn a_power_off_code_is_reported() {
    let outcome = Guest::default().power_off(7).run();
    assert_eq!((outcome.end.reason, outcome.end.detail.as_str()), (EndReason::PowerOff, "code 7"));
}

#[test]
fn a_reset_through_the_keyboard_controller_ends_the_machine() {
    // in al, 0x64; test al, 2; jnz back: as Linux waits for the controller; then the pulse.
    let outcome = Guest::default().code(&[0xe4, 0x64, 0xa8, 0x02, 0x75, 0xfa]).out(0x64, 0xfe).halt().run();
    assert_eq!(outcome.end.reason, EndReason::Reset);
}

#[test]
fn a_reset_through_the_chipset_ends_the_machine() {
    assert_eq!(Guest::default().out(0xcf9, 0x06).halt().run().end.reason, EndReason::Reset);
}

#[test]
fn a_reset_after_a_panic_is_a_panic() {
    let outcome =
        Guest::default().say("[ 1.0] Kernel panic - not syncing: No init").out(0x64, 0xfe).halt().run();
    assert_eq!(outcome.end.reason, EndReason::Panic);
    assert!(outcome.console.ends_with("No init"));
}

#[test]
fn a_guest_that_gives_up_is_a_panic() {
    let outcome = Guest::default().store(POWER + 4, 3).halt().run();
    assert_eq!(outcome.end.reason, EndReason::Panic);
    assert!(outcome.end.detail.contains("code 3"), "{outcome:?}");
}

#[test]
fn a_triple_fault_is_a_crash() {
    // ud2, without an interrupt table.
    let outcome = Guest::default().code(&[0x0f, 0x0b]).run();
    assert_eq!(outcome.end.reason, EndReason::Crash);
    assert!(outcome.end.detail.starts_with("vCPU 0: triple fault"), "{outcome:?}");
}

#[test]
fn a_jump_out_of_memory_is_a_crash_that_says_where() {
    // mov eax, 0xc1234560; jmp eax
    let outcome = Guest::default().code(&[0xb8, 0x60, 0x45, 0x23, 0xc1, 0xff, 0xe0]).run();
    assert_eq!(outcome.end.reason, EndReason::Crash);
    assert!(outcome.end.detail.contains("KVM cannot emulate an instruction"), "{outcome:?}");
    assert!(outcome.end.detail.ends_with("RIP 0xc1234560"), "{outcome:?}");
}

#[test]
fn ports_and_addresses_where_nothing_is_read_as_all_ones() {
    // inc eax; jz over the next store
    const UNLESS_ONES: [u8; 4] = [0xff, 0xc0, 0x74, 0x0b];
    let outcome = Guest::default()
        .code(&[0x66, 0xba, 0x34, 0x12, 0xed]) // mov dx, 0x1234; in eax, dx
        .code(&UNLESS_ONES)
        .store(POWER, 1)
        .code(&[0xbb, 0x00, 0x00, 0xff, 0xcf, 0x8b, 0x03]) // mov ebx, 0xcfff0000; mov eax, [ebx]
        .code(&UNLESS_ONES)
        .store(POWER, 2)
        .say("ones")
        .power_off(0)
        .run();
    assert_eq!(outcome.console, "ones");
}

#[test]
fn the_power_page_says_what_it_is() {
    // mov ebx, the page + 12; mov esi, [ebx]; then its bytes, lowest first
    let mut guest = Guest::default().code(&[0xbb]).code(&(POWER + 12).to_le_bytes()).code(&[0x8b, 0x33]);
    for _ in 0..4 {
        // mov dx, 0x3f8; mov eax, esi; out dx, al; shr esi, 8
        guest = guest.code(&[0x66, 0xba, 0xf8, 0x03, 0x89, 0xf0, 0xee, 0xc1, 0xee, 0x08]);
    }
    assert_eq!(guest.power_off(0).run().console, "KILN");
}
