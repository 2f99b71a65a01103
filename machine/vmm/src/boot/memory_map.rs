//! What the guest is told of its memory.

use kiln_memory::{Gpa, GuestMemory};

use crate::layout;

/// The kinds of memory, with the numbers both boot protocols share (ACPI 6.5 §15 "System Address Map Interfaces").
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub(super) enum Kind {
    Ram = 1,
    Reserved = 2,
}

/// One line of the map.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Range {
    pub(super) at: Gpa,
    pub(super) bytes: u64,
    pub(super) kind: Kind,
}

/// The guest's memory in ascending order: RAM, with a gap where a PC has its video memory and ROMs.
pub(super) fn build(memory: &GuestMemory) -> Vec<Range> {
    let between = |at: Gpa, end: Gpa, kind| Range { at, bytes: end.0 - at.0, kind };
    let mailbox_end = Gpa(layout::MAILBOX.0 + layout::MAILBOX_BYTES);
    let mut map = vec![
        between(Gpa(0), layout::MAILBOX, Kind::Ram),
        between(layout::MAILBOX, mailbox_end, Kind::Reserved),
        between(mailbox_end, layout::MP_TABLE, Kind::Ram),
        between(layout::MP_TABLE, layout::LOW_RESERVED_END, Kind::Reserved),
    ];
    for region in memory.regions() {
        let start = region.at.0.max(layout::KERNEL_START.0);
        let bytes = (region.at.0 + region.bytes).saturating_sub(start);
        map.push(Range { at: Gpa(start), bytes, kind: Kind::Ram });
    }
    map
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ram_past_the_hole_is_in_the_map_and_the_hole_is_not() {
        let memory = GuestMemory::new(8 << 30).expect("mapped");
        let ram: Vec<_> = build(&memory).into_iter().filter(|range| range.kind == Kind::Ram).collect();
        assert_eq!(ram[2], Range { at: Gpa(0x10_0000), bytes: 0xc000_0000 - 0x10_0000, kind: Kind::Ram });
        assert_eq!(ram[3], Range { at: Gpa(1 << 32), bytes: 5 << 30, kind: Kind::Ram });
    }

    #[test]
    fn the_mailbox_is_no_ram_of_the_kernels() {
        let memory = GuestMemory::new(64 << 20).expect("mapped");
        let overlaps = |range: &Range| {
            range.at.0 < layout::MAILBOX.0 + layout::MAILBOX_BYTES
                && layout::MAILBOX.0 < range.at.0 + range.bytes
        };
        let kinds: Vec<_> = build(&memory).into_iter().filter(overlaps).map(|range| range.kind).collect();
        assert_eq!(kinds, [Kind::Reserved]);
    }
}
