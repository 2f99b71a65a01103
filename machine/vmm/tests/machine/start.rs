//! How guests start: both boot protocols, processors, memory, interrupts.

use kiln_control::EndReason;
use kiln_vmm::{Notice, Shape};

use crate::guest::{Guest, LOAD, phases, run};

fn shape(memory_mib: u32, vcpus: u32) -> Shape {
    Shape::new(memory_mib, vcpus).expect("a shape")
}

#[test]
fn a_pvh_kernel_gets_its_command_line() {
    // mov esi, [ebx + 24]: the start info's command line.
    let guest = Guest::default().code(&[0x8b, 0x73, 0x18]).say_text_at_esi().power_off(0);
    let outcome = run(&guest.elf(), shape(64, 1), "answer=42", None, Box::new(|_| {}));
    assert_eq!(outcome.end.reason, EndReason::PowerOff, "{outcome:?}");
    assert!(outcome.console.starts_with("console=ttyS0 "), "{outcome:?}");
    assert!(outcome.console.ends_with(" answer=42"), "{outcome:?}");
}

#[test]
fn a_bzimage_gets_its_command_line() {
    // mov esi, [rsi + 0x228]: the boot parameters' command line.
    let guest = Guest::default().code(&[0x8b, 0xb6, 0x28, 0x02, 0x00, 0x00]).say_text_at_esi().power_off(0);
    let outcome = run(&guest.bzimage(), shape(64, 1), "answer=42", None, Box::new(|_| {}));
    assert_eq!(outcome.end.reason, EndReason::PowerOff, "{outcome:?}");
    assert!(outcome.console.ends_with(" answer=42"), "{outcome:?}");
}

#[test]
fn a_pvh_kernel_finds_its_initramfs() {
    // mov esi, [ebx + 16]: the module list; mov esi, [esi]: the first module.
    let guest = Guest::default().code(&[0x8b, 0x73, 0x10, 0x8b, 0x36]).say_text_at_esi().power_off(0);
    let outcome = run(&guest.elf(), shape(64, 1), "", Some(b"an archive\0"), Box::new(|_| {}));
    assert_eq!(outcome.console, "an archive");
}

#[test]
fn a_bzimage_finds_its_initramfs() {
    // mov esi, [rsi + 0x218]
    let guest = Guest::default().code(&[0x8b, 0xb6, 0x18, 0x02, 0x00, 0x00]).say_text_at_esi().power_off(0);
    let outcome = run(&guest.bzimage(), shape(64, 1), "", Some(b"an archive\0"), Box::new(|_| {}));
    assert_eq!(outcome.console, "an archive");
}

#[test]
fn a_machine_reports_its_start_and_each_ring_in_order() {
    let (observer, rung) = phases();
    let guest = Guest::default().ring(1).ring(2).ring(77).power_off(0);
    run(&guest.elf(), shape(64, 1), "", None, observer);
    assert_eq!(rung.iter().collect::<Vec<_>>(), [1, 2, 77]);

    let (sender, entered) = std::sync::mpsc::channel();
    let observer = Box::new(move |notice| {
        if let Notice::Entered(at) = notice {
            sender.send(at).expect("the test listens");
        }
    });
    let guest = Guest::default().power_off(0);
    run(&guest.elf(), shape(64, 4), "", None, observer);
    assert_eq!(entered.iter().count(), 1, "whatever the number of vCPUs");
}

/// Starts all other processors, each of which adds one to a counter, and powers off when the counter is full.
fn start_all(others: u16) -> Guest {
    let [low, high] = others.to_le_bytes();
    // In real mode at 0x8000: lock inc word [0x7000]; cli; hlt; jmp back
    let trampoline = [0xf0, 0xff, 0x06, 0x00, 0x70, 0xfa, 0xf4, 0xeb, 0xfc];
    let from = (LOAD + 0x800).to_le_bytes();
    Guest::default()
        .code(&[0xbe])
        .code(&from) // mov esi, the trampoline
        .code(&[0xbf, 0x00, 0x80, 0x00, 0x00]) // mov edi, 0x8000
        .code(&[0xb9, trampoline.len() as u8, 0, 0, 0, 0xf3, 0xa4]) // mov ecx, its length; rep movsb
        .store(0xfee0_00f0, 0x1ff) // local APIC on
        .store(0xfee0_0300, 0x000c_4500) // INIT to all others
        .store(0xfee0_0300, 0x000c_4608) // start them at 0x8000
        .code(&[0xbb, 0x00, 0x70, 0x00, 0x00]) // mov ebx, 0x7000
        .code(&[0xf3, 0x90, 0x66, 0x81, 0x3b, low, high, 0x75, 0xf7]) // pause; cmp word [ebx], others; jne back
        .say("all here")
        .power_off(0)
        .at(0x800, &trampoline)
}

#[test]
fn every_vcpu_starts() {
    for vcpus in [2_u16, 16] {
        let outcome = run(&start_all(vcpus - 1).elf(), shape(64, vcpus.into()), "", None, Box::new(|_| {}));
        assert_eq!(outcome.console, "all here", "{vcpus} vCPUs: {outcome:?}");
    }
}

#[test]
fn the_memory_map_shows_all_memory_of_an_8_gib_machine() {
    // The last entry of the map in the boot parameters: 4 of low memory, 1 up to the hole, 1 past it. Its address and
    // length in GiB as digits: mov eax, [rsi + at + 4]; shr eax, 2 for pieces of 4 GiB is not needed, words are.
    let entry = 0x2d0 + 5 * 20;
    let digit = |offset: u32, shift: u8| {
        let at = offset.to_le_bytes();
        // mov eax, [rsi + offset]; shr eax, shift; add al, '0'; out dx, al
        [&[0x66, 0xba, 0xf8, 0x03, 0x8b, 0x86], &at[..], &[0xc1, 0xe8, shift, 0x04, b'0', 0xee]].concat()
    };
    let guest = Guest::default()
        .code(&digit(0x1e8, 0)) // the number of entries, in the low byte
        .code(&digit(entry + 4, 0)) // the upper word of its address
        .code(&digit(entry + 8 + 4, 0)) // the upper word of its length
        .code(&digit(entry + 8, 30)) // the lower word of its length, in GiB
        .power_off(0);
    let outcome = run(&guest.bzimage(), shape(8192, 1), "", None, Box::new(|_| {}));
    // 6 entries; from 4 GiB; 4 GiB and 1 GiB long.
    assert_eq!(outcome.console, "6111");
}

#[test]
fn a_device_interrupt_reaches_the_guest_through_the_ioapic() {
    const GDT: u32 = LOAD + 0x400;
    const HANDLER: u32 = LOAD + 0x500;
    const POINTERS: u32 = LOAD + 0x600;
    const IDT: u32 = LOAD + 0x800;
    const VECTOR: u32 = 0x31;
    let handler = Guest::default().say("interrupted").power_off(0);
    let gate = u64::from(HANDLER & 0xffff) | 0x10 << 16 | 0x8e00 << 32 | u64::from(HANDLER >> 16) << 48;
    let mut pointers = Vec::new();
    for (limit, base) in [(31_u16, GDT), ((VECTOR as u16 + 1) * 8 - 1, IDT)] {
        pointers.extend(limit.to_le_bytes());
        pointers.extend(base.to_le_bytes());
    }
    let gdt = [0, 0, 0x00cf_9b00_0000_ffff_u64, 0x00cf_9300_0000_ffff].map(u64::to_le_bytes).concat();
    let mut code = Guest::default();
    for (load, pointer) in [(0x10 | 3, POINTERS), (0x18 | 3, POINTERS + 6)] {
        // mov ebx, pointer; lgdt or lidt [ebx]
        code = code.code(&[0xbb]).code(&pointer.to_le_bytes()).code(&[0x0f, 0x01, load]);
    }
    let guest = code
        .store(0xfee0_00f0, 0x1ff) // local APIC on
        .store(0xfec0_0000, 0x10 + 2 * 4 + 1) // pin 4: to APIC 0
        .store(0xfec0_0010, 0)
        .store(0xfec0_0000, 0x10 + 2 * 4)
        .store(0xfec0_0010, VECTOR)
        .code(&[0xbc, 0x00, 0x80, 0x00, 0x00, 0xfb]) // mov esp, 0x8000; sti
        .out(0x3f9, 0x02) // the serial port's transmitter interrupt on
        .code(&[0xf4, 0xeb, 0xfd]) // hlt; jmp back
        .at(0x400, &gdt)
        .at(0x500, handler.bytes())
        .at(0x600, &pointers)
        .at(0x800 + VECTOR as usize * 8, &gate.to_le_bytes());
    let outcome = guest.run();
    assert_eq!(outcome.console, "interrupted", "{outcome:?}");
}
