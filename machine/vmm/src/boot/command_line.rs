//! The kernel's command line, built from parts.

use super::BootError;
use crate::{host, layout};

/// What every kernel is told.
///
/// The serial port is the console. A panic ends in a reset at once, and a reset goes through the keyboard controller's
/// port, which is one exit. The kernel does not patch itself for the number of its processors.
///
/// Each word costs a guest some 10,000 instructions, because it is compared with every parameter there is. So what Kiln's
/// own kernel needs not be told is not here.
const BASE: &str = "console=ttyS0 quiet panic=-1 reboot=k noreplace-smp";

/// What a bzImage is told in addition: it is a distribution's kernel, made for machines that have a PCI bus, ACPI and a
/// keyboard, and would look for them. A kernel with a PVH entry is made for virtual machines; one that looks all the same
/// finds nothing.
const FOR_A_PC: &str = "pci=off acpi=off i8042.noaux i8042.nokbd";

/// The most bytes a command line may have; Linux on x86 keeps 2048 with the NUL (`COMMAND_LINE_SIZE`).
pub const MAX_COMMAND_LINE_BYTES: usize = 2047;

/// The whole line: what a kernel of its kind is told, where its devices are, what this host needs, and at last `extra`.
pub(super) fn build(
    virtio_devices: usize,
    is_bzimage: bool,
    on_pvm: bool,
    extra: &str,
) -> Result<CommandLine, BootError> {
    let mut line = CommandLine::default();
    line.push(BASE)?;
    if is_bzimage {
        line.push(FOR_A_PC)?;
    }
    for (index, pin) in (0..).zip(layout::VIRTIO_PIN..).take(virtio_devices) {
        let at = layout::VIRTIO_START.0 + index * layout::WINDOW_BYTES;
        // Linux Documentation/admin-guide/kernel-parameters.txt, "virtio_mmio.device=".
        line.push(&format!("virtio_mmio.device=4K@{at:#x}:{pin}"))?;
    }
    if on_pvm {
        line.push(host::PVM_COMMAND_LINE)?;
    }
    line.push(extra)?;
    Ok(line)
}

/// A kernel command line within its limit.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct CommandLine {
    text: String,
}

impl CommandLine {
    /// Adds `part` after a space. An empty part adds nothing.
    ///
    /// # Errors
    /// [`BootError::CommandLine`] when it would grow past [`MAX_COMMAND_LINE_BYTES`] or `part` holds a control character.
    pub(super) fn push(&mut self, part: &str) -> Result<(), BootError> {
        let part = part.trim_matches(' ');
        if part.is_empty() {
            return Ok(());
        }
        if part.chars().any(char::is_control) {
            return Err(BootError::CommandLine("holds a control character"));
        }
        let space = usize::from(!self.text.is_empty());
        if self.text.len() + space + part.len() > MAX_COMMAND_LINE_BYTES {
            return Err(BootError::CommandLine("is longer than 2047 bytes"));
        }
        if space == 1 {
            self.text.push(' ');
        }
        self.text.push_str(part);
        Ok(())
    }

    /// Its length in bytes, without the NUL.
    pub(super) fn len(&self) -> usize {
        self.text.len()
    }

    /// The line as the kernel reads it.
    pub(super) fn to_bytes(&self) -> Vec<u8> {
        let mut bytes = self.text.clone().into_bytes();
        bytes.push(0);
        bytes
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parts_are_joined_by_one_space() {
        let mut line = CommandLine::default();
        for part in ["a=1", "", "  b ", "c d"] {
            line.push(part).expect("short");
        }
        assert_eq!(line.text, "a=1 b c d");
    }

    #[test]
    fn a_line_at_the_limit_is_taken_and_one_byte_more_refused() {
        let mut line = CommandLine::default();
        line.push(&"x".repeat(MAX_COMMAND_LINE_BYTES - 2)).expect("two bytes left");
        line.clone().push("y").expect("fits exactly");
        assert!(matches!(line.push("yz"), Err(BootError::CommandLine(_))));
    }

    #[test]
    fn each_device_has_its_window_and_pin() {
        let line = build(2, false, false, "x=1").expect("short");
        let end = "virtio_mmio.device=4K@0xd0001000:5 virtio_mmio.device=4K@0xd0002000:6 x=1";
        assert!(line.text.ends_with(end), "{}", line.text);
    }

    #[test]
    fn only_a_pvm_host_interprets() {
        assert!(!build(0, false, false, "").expect("short").text.contains("interpreted"));
        assert!(build(0, false, true, "").expect("short").text.contains("interpreted"));
    }

    #[test]
    fn only_a_bzimage_is_told_that_this_is_no_pc() {
        assert!(!build(0, false, false, "").expect("short").text.contains("pci=off"));
        assert!(build(0, true, false, "").expect("short").text.contains("pci=off"));
    }

    #[test]
    fn the_most_devices_leave_room_for_the_caller() {
        build(layout::MAX_VIRTIO_DEVICES, true, true, &"x".repeat(512)).expect("fits");
    }

    #[test]
    fn control_characters_are_refused() {
        for part in ["a\0b", "a\nb"] {
            assert!(matches!(CommandLine::default().push(part), Err(BootError::CommandLine(_))), "{part:?}");
        }
    }
}
