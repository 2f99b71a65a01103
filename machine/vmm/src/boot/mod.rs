//! Puts a kernel into guest memory and says how to enter it.
//!
//! Two kinds of kernel are taken: an ELF file with a PVH note, entered in 32-bit mode with a start info structure
//! (Xen's `docs/misc/pvh.pandoc`, "x86/HVM direct boot ABI"), and a bzImage, entered in 64-bit mode with boot
//! parameters (Linux `Documentation/arch/x86/boot.rst`, "The Linux/x86 Boot Protocol"). A kernel file comes from
//! whoever runs Kiln and may be anything: every field is read once and checked before it is used.

mod bzimage;
mod command_line;
mod cpu;
mod elf;
mod initramfs;
mod memory_map;
mod mp_table;
mod pvh;
mod zero_page;

use std::fs::File;
use std::os::fd::AsFd;
use std::os::unix::fs::FileExt;

use kiln_memory::{Gpa, GuestMemory, MMIO_HOLE_START, OutOfRange, Span};

use crate::{Shape, host, layout};

pub use command_line::MAX_COMMAND_LINE_BYTES;
pub use cpu::EntryState;
pub(crate) use cpu::initial_msrs;

/// How a loaded kernel is entered, and what it took of guest memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Kernel {
    /// The protocol and the entry point.
    pub entry: Entry,
    /// Where the memory the kernel needs before it knows its memory map ends.
    pub end: Gpa,
    /// The last byte an initramfs may have.
    pub initramfs_max: Gpa,
}

/// The protocol a kernel is entered by.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Entry {
    /// 32-bit protected mode, the start info's address in EBX.
    Pvh {
        /// Where it begins.
        at: Gpa,
    },
    /// 64-bit mode, the boot parameters' address in RSI.
    Linux64 {
        /// Where it begins.
        at: Gpa,
        /// The set-up header of the bzImage, which the boot parameters repeat.
        header: bzimage::SetupHeader,
    },
}

/// A kernel or its companions cannot be loaded. Whoever chose the files or the memory size is to blame.
#[derive(Debug, thiserror::Error)]
pub enum BootError {
    /// The file is neither of the two kinds.
    #[error("the kernel is neither an ELF file nor a bzImage")]
    UnknownKernel,
    /// The file is an ELF file for another machine or of another kind.
    #[error("the kernel is an ELF file, but not a 64-bit x86 executable")]
    WrongMachine,
    /// The ELF file has no PVH note.
    #[error("the kernel has no PVH entry point")]
    NoPvhNote,
    /// The bzImage is too old or not for 64 bits.
    #[error("the bzImage cannot be entered in 64-bit mode: {0}")]
    Not64Bit(&'static str),
    /// The file contradicts itself.
    #[error("the kernel file is malformed: {0}")]
    Malformed(&'static str),
    /// The kernel or the initramfs needs memory the guest does not have.
    #[error("the {what} does not fit into {memory_mib} MiB of guest memory")]
    TooLarge {
        /// What does not fit.
        what: &'static str,
        /// How much there is.
        memory_mib: u64,
    },
    /// The command line is too long or holds a NUL.
    #[error("the kernel command line {0}")]
    CommandLine(&'static str),
    /// A file cannot be read.
    #[error("cannot read the {what}")]
    Read {
        /// The file.
        what: &'static str,
        /// Why.
        source: std::io::Error,
    },
}

impl BootError {
    /// What would help, when something does.
    pub fn hint(&self) -> Option<&'static str> {
        match self {
            Self::UnknownKernel | Self::WrongMachine => {
                Some("give an uncompressed vmlinux or a bzImage of a 64-bit x86 Linux")
            }
            Self::NoPvhNote => Some("build the kernel with CONFIG_PVH=y, or give its bzImage"),
            Self::Not64Bit(_) => Some("give a 64-bit kernel of Linux 3.13 or later"),
            Self::TooLarge { .. } => Some("give the machine more memory"),
            Self::CommandLine(_) | Self::Malformed(_) | Self::Read { .. } => None,
        }
    }
}

/// Loads the kernel in `file` into `memory`.
///
/// Memory must be fresh: what the file leaves as zeros is not written. On an error some of it may have been.
///
/// # Errors
/// [`BootError`]
pub fn load_kernel(memory: &GuestMemory, file: &File) -> Result<Kernel, BootError> {
    let image = Image::open(file, "kernel")?;
    let mut magic = [0; 4];
    image.read(0, &mut magic).map_err(unknown_if_short)?;
    if magic == elf::MAGIC { elf::load(memory, &image) } else { bzimage::load(memory, &image) }
}

/// Everything a kernel needs besides itself: initramfs, command line, tables. Says how the first vCPU starts.
///
/// An empty `initramfs` is as good as none. `virtio_devices` is how many the machine will have; `extra` goes to the end of the command line, where it overrides
/// what comes before.
///
/// # Errors
/// [`BootError`]
pub fn prepare(
    memory: &GuestMemory,
    kernel: &Kernel,
    initramfs: Option<&File>,
    shape: Shape,
    virtio_devices: usize,
    extra: &str,
) -> Result<EntryState, BootError> {
    let is_bzimage = matches!(kernel.entry, Entry::Linux64 { .. });
    let command_line = command_line::build(virtio_devices, is_bzimage, host::is_pvm(), extra)?;
    let virtio_pins = (layout::VIRTIO_PIN..).take(virtio_devices);
    let pins: Vec<u8> = std::iter::once(layout::SERIAL_PIN).chain(virtio_pins).collect();
    let initramfs = match initramfs {
        Some(file) => initramfs::load(memory, kernel, file)?,
        None => None,
    };
    let low = too_large("boot structures", memory);
    memory.write(layout::COMMAND_LINE, &command_line.to_bytes()).map_err(&low)?;
    memory.write(layout::MP_TABLE, &mp_table::build(shape.vcpus(), &pins)).map_err(&low)?;
    match kernel.entry {
        Entry::Pvh { at } => {
            pvh::write(memory, initramfs).map_err(&low)?;
            Ok(EntryState::protected_mode(at))
        }
        Entry::Linux64 { at, header } => {
            zero_page::write(memory, &header, initramfs, &command_line).map_err(&low)?;
            cpu::write_long_mode_tables(memory).map_err(&low)?;
            Ok(EntryState::long_mode(at))
        }
    }
}

/// A file too short to tell what it is, is not a kernel.
fn unknown_if_short(error: BootError) -> BootError {
    if matches!(error, BootError::Malformed(_)) { BootError::UnknownKernel } else { error }
}

/// Turns an access outside RAM into an error that says what does not fit.
fn too_large(what: &'static str, memory: &GuestMemory) -> impl Fn(OutOfRange) -> BootError {
    let memory_mib = memory.bytes() >> 20;
    move |_| BootError::TooLarge { what, memory_mib }
}

/// Where RAM below the MMIO hole ends.
fn low_ram_end(memory: &GuestMemory) -> Gpa {
    Gpa(memory.bytes().min(MMIO_HOLE_START.0))
}

/// A file of known length, read at offsets.
struct Image<'a> {
    file: &'a File,
    what: &'static str,
    bytes: u64,
}

impl<'a> Image<'a> {
    fn open(file: &'a File, what: &'static str) -> Result<Self, BootError> {
        let bytes = file.metadata().map_err(|source| BootError::Read { what, source })?.len();
        Ok(Self { file, what, bytes })
    }

    /// Fills `into` from `offset`.
    fn read(&self, offset: u64, into: &mut [u8]) -> Result<(), BootError> {
        if offset.checked_add(into.len() as u64).is_none_or(|end| end > self.bytes) {
            return Err(BootError::Malformed("it ends too early"));
        }
        self.file.read_exact_at(into, offset).map_err(|source| {
            if source.kind() == std::io::ErrorKind::UnexpectedEof {
                BootError::Malformed("it ends too early")
            } else {
                BootError::Read { what: self.what, source }
            }
        })
    }

    /// Copies `bytes` from `offset` to guest memory at `to`, without a copy of ours.
    fn load(&self, memory: &GuestMemory, offset: u64, bytes: u64, to: Gpa) -> Result<(), BootError> {
        if offset.checked_add(bytes).is_none_or(|end| end > self.bytes) {
            return Err(BootError::Malformed("it ends too early"));
        }
        let span =
            Span::new(to, usize::try_from(bytes).map_err(|_| BootError::Malformed("it is too large"))?);
        let slices = memory.slices(&[span]).map_err(too_large(self.what, memory))?;
        let read = slices
            .read_at(self.file.as_fd(), offset)
            .map_err(|source| BootError::Read { what: self.what, source })?;
        if read as u64 == bytes { Ok(()) } else { Err(BootError::Malformed("it ends too early")) }
    }
}
