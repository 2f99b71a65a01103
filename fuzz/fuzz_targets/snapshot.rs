//! A snapshot, which a user may have from anywhere: its file, and the machine that its sections say.

#![no_main]

use kiln_snapshot::Section;
use kiln_vmm::MachineState;
use libfuzzer_sys::fuzz_target;

fuzz_target!(|input: &[u8]| {
    let _ = kiln_snapshot::read_header(&mut &input[..]);
    if let Ok((header, sections)) = kiln_snapshot::read(&mut &input[..]) {
        let mut again = Vec::new();
        kiln_snapshot::write(&header, &sections, &mut again).expect("what is read can be written");
        assert_eq!(again, input);
    }
    // Behind the digests: the same names with other contents, two bytes of length before each.
    let mut rest = input;
    let names = ["machine", "vcpu.0", "serial", "ioapic", "virtio.0"];
    let sections: Vec<Section> = names
        .into_iter()
        .map(|name| {
            let length = rest
                .split_off(..rest.len().min(2))
                .map_or(0, |bytes| bytes.iter().fold(0, |all, byte| all << 8 | usize::from(*byte)));
            let content = rest.split_off(..rest.len().min(length)).unwrap_or_default();
            Section { name: name.into(), version: 1, content: content.into() }
        })
        .collect();
    if let Ok(machine) = MachineState::from_sections(&sections) {
        assert_eq!(machine.to_sections(), sections);
    }
});
