//! Where things are in the guest's physical address space.
//!
//! ```text
//! 0x0000_0500  GDT of the 64-bit boot protocol
//! 0x0000_6000  PVH start info, module list and memory map
//! 0x0000_7000  boot parameters ("zero page")
//! 0x0000_9000  page tables of the 64-bit boot protocol
//! 0x0001_0000  mailbox, reserved
//! 0x0002_0000  kernel command line
//! 0x0009_fc00  MP table, where the kernel looks for it (the extended BIOS data area)
//! 0x0010_0000  the kernel and, at the end of low RAM, the initramfs
//! 0xc000_0000  end of low RAM at the latest
//! 0xd000_0000  power page
//! 0xd000_1000  virtio transports, a page each
//! 0xfec0_0000  I/O APIC
//! 0xfee0_0000  local APICs (KVM's)
//! 4 GiB        the rest of RAM
//! ```

use kiln_memory::Gpa;

/// The GDT a kernel entered in 64-bit mode starts with.
pub(crate) const GDT: Gpa = Gpa(0x500);
/// `hvm_start_info`, followed by the module list and the memory map.
pub(crate) const START_INFO: Gpa = Gpa(0x6000);
/// `boot_params`.
pub(crate) const ZERO_PAGE: Gpa = Gpa(0x7000);
/// Page tables that map the first 4 GiB at their own addresses.
pub(crate) const PAGE_TABLES: Gpa = Gpa(0x9000);
/// Where a restored guest finds its generation; RAM that the guest kernel is told to leave alone. Part of the contract with the
/// guest: `kiln_protocol::mailbox::GPA` is the same address.
pub const MAILBOX: Gpa = Gpa(0x1_0000);
/// The bytes set aside for it.
pub const MAILBOX_BYTES: u64 = 0x1_0000;
/// The kernel's command line.
pub(crate) const COMMAND_LINE: Gpa = Gpa(0x2_0000);
/// The MP table; RAM the guest may use ends here.
pub(crate) const MP_TABLE: Gpa = Gpa(0x9_fc00);
/// Where conventional memory ends and the legacy video memory and ROMs begin.
pub(crate) const LOW_RESERVED_END: Gpa = Gpa(0xa_0000);
/// The lowest address a kernel is loaded at.
pub(crate) const KERNEL_START: Gpa = Gpa(0x10_0000);

/// The power and doorbell page. Part of the contract with the guest: `kiln_protocol::POWER_GPA` is the same address.
pub const POWER_PAGE: Gpa = Gpa(0xd000_0000);
/// The vsock port of the host's at which an agent without a doorbell knocks when it listens; `kiln_protocol::READY_PORT` is the
/// same.
pub const READY_PORT: u32 = 1024;
/// How many bytes a device's window has.
pub const WINDOW_BYTES: u64 = 0x1000;
/// The first virtio transport; the others follow, a window each.
pub const VIRTIO_START: Gpa = Gpa(0xd000_1000);
/// The I/O APIC's registers.
pub(crate) const IOAPIC: Gpa = Gpa(0xfec0_0000);
/// The local APICs' registers, served by KVM.
pub(crate) const LOCAL_APIC: Gpa = Gpa(0xfee0_0000);

/// The I/O APIC pin of the serial port, as on every PC.
pub(crate) const SERIAL_PIN: u8 = 4;
/// The I/O APIC pin of the first virtio device; the others follow.
pub(crate) const VIRTIO_PIN: u8 = 5;
/// The most virtio devices one machine has: one pin each.
pub const MAX_VIRTIO_DEVICES: usize = (kiln_hypervisor::IOAPIC_PINS - VIRTIO_PIN) as usize;
