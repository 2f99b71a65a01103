//! The table that tells the guest its processors and interrupt wiring.
//!
//! Intel `MultiProcessor` Specification 1.4, chapter 4 "MP Configuration Table". It is the smaller of the two ways: ACPI
//! needs an interpreter in the guest kernel.

use kiln_hypervisor::MAX_VCPUS;

use crate::layout;

const SPEC_REV: u8 = 4;
const LOCAL_APIC_VERSION: u8 = 0x14;
/// The version register of the monitor's I/O APIC.
const IOAPIC_VERSION: u8 = 0x11;
const CPU_ENABLED: u8 = 1;
const CPU_BOOT: u8 = 2;
/// Family 6, with an FPU and an APIC on chip: what every 64-bit processor says here. Linux reads neither field.
const CPU_SIGNATURE: u32 = 0x600;
const CPU_FEATURES: u32 = 0x201;
const IOAPIC_USABLE: u8 = 1;
const INTERRUPT: u8 = 0;
const NMI: u8 = 1;
const EXTINT: u8 = 3;
const ISA_BUS: u8 = 0;
const ALL_LOCAL_APICS: u8 = 0xff;

const POINTER_BYTES: usize = 16;
const HEADER_BYTES: usize = 44;
/// What there is room for between the table's place and the legacy video memory.
const MAX_BYTES: usize = (layout::LOW_RESERVED_END.0 - layout::MP_TABLE.0) as usize;
const _: () = assert!(
    POINTER_BYTES
        + HEADER_BYTES
        + MAX_VCPUS as usize * 20
        + 8
        + 8
        + kiln_hypervisor::IOAPIC_PINS as usize * 8
        + 16
        <= MAX_BYTES
);

/// The floating pointer and the configuration table behind it, for `vcpus` processors with APIC ids from 0 and the I/O
/// APIC inputs `pins`, all of them edge-triggered as on an ISA bus.
pub(super) fn build(vcpus: u8, pins: &[u8]) -> Vec<u8> {
    let mut entries: Vec<u8> = Vec::new();
    let mut count = 0u16;
    let mut add = |entry: &[u8]| {
        entries.extend(entry);
        count += 1;
    };
    for id in 0..vcpus {
        let flags = if id == 0 { CPU_ENABLED | CPU_BOOT } else { CPU_ENABLED };
        let mut cpu = vec![0, id, LOCAL_APIC_VERSION, flags];
        cpu.extend(CPU_SIGNATURE.to_le_bytes());
        cpu.extend(CPU_FEATURES.to_le_bytes());
        cpu.extend([0; 8]);
        add(&cpu);
    }
    add(&[1, ISA_BUS, b'I', b'S', b'A', b' ', b' ', b' ']);
    let ioapic_id = vcpus;
    let mut ioapic = vec![2, ioapic_id, IOAPIC_VERSION, IOAPIC_USABLE];
    ioapic.extend((layout::IOAPIC.0 as u32).to_le_bytes());
    add(&ioapic);
    for &pin in pins {
        add(&[3, INTERRUPT, 0, 0, ISA_BUS, pin, ioapic_id, pin]);
    }
    add(&[4, EXTINT, 0, 0, ISA_BUS, 0, 0, 0]);
    add(&[4, NMI, 0, 0, ISA_BUS, 0, ALL_LOCAL_APICS, 1]);

    let mut table = Vec::with_capacity(HEADER_BYTES + entries.len());
    table.extend(b"PCMP");
    table.extend(((HEADER_BYTES + entries.len()) as u16).to_le_bytes());
    table.extend([SPEC_REV, 0]);
    table.extend(b"KILN    ");
    table.extend(b"MICROVM     ");
    table.extend([0; 6]); // no OEM table
    table.extend(count.to_le_bytes());
    table.extend((layout::LOCAL_APIC.0 as u32).to_le_bytes());
    table.extend([0; 4]); // no extended table
    table.extend(entries);
    table[7] = checksum(&table);

    let mut bytes = Vec::with_capacity(POINTER_BYTES + table.len());
    bytes.extend(b"_MP_");
    bytes.extend((layout::MP_TABLE.0 as u32 + POINTER_BYTES as u32).to_le_bytes());
    bytes.extend([1, SPEC_REV, 0, 0, 0, 0, 0, 0]);
    bytes[10] = checksum(&bytes);
    bytes.extend(table);
    bytes
}

/// The byte that makes the sum of all bytes zero.
fn checksum(bytes: &[u8]) -> u8 {
    bytes.iter().fold(0u8, |sum, byte| sum.wrapping_sub(*byte))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn both_parts_sum_to_zero_and_the_largest_fits() {
        let pins: Vec<u8> = (0..kiln_hypervisor::IOAPIC_PINS).collect();
        let bytes = build(MAX_VCPUS, &pins);
        assert!(bytes.len() <= MAX_BYTES);
        let (pointer, table) = bytes.split_at(POINTER_BYTES);
        assert_eq!(checksum(pointer), 0);
        assert_eq!(checksum(table), 0);
        assert_eq!(u16::from_le_bytes([table[4], table[5]]) as usize, table.len());
    }

    #[test]
    fn only_the_first_processor_is_the_boot_processor() {
        let bytes = build(3, &[4]);
        let cpus: Vec<_> =
            bytes[POINTER_BYTES + HEADER_BYTES..].chunks(20).take(3).map(|cpu| (cpu[1], cpu[3])).collect();
        assert_eq!(cpus, [(0, CPU_ENABLED | CPU_BOOT), (1, CPU_ENABLED), (2, CPU_ENABLED)]);
    }
}
