//! Guests of a few instructions, as kernel images.
//!
//! Every instruction here means the same in 32-bit and in 64-bit mode, so one program serves both boot protocols.

use std::fs::File;
use std::io::Write;

use kiln_hypervisor::Kvm;
use kiln_vmm::{Console, End, Machine, Notice, Observer, Shape, Shell, boot};

/// Where the image is loaded and begins to run.
pub(crate) const LOAD: u32 = 0x10_0000;
/// Where the power page is.
pub(crate) const POWER: u32 = 0xd000_0000;

const POWER_OFF: u32 = POWER;
const DOORBELL: u32 = POWER + 8;

/// A guest being written.
#[derive(Clone, Default)]
pub(crate) struct Guest {
    image: Vec<u8>,
}

impl Guest {
    /// Adds instructions.
    pub(crate) fn code(mut self, bytes: &[u8]) -> Self {
        self.image.extend_from_slice(bytes);
        self
    }

    /// Writes `text` to the serial port.
    pub(crate) fn say(mut self, text: &str) -> Self {
        self.image.extend([0x66, 0xba, 0xf8, 0x03]); // mov dx, 0x3f8
        for byte in text.bytes() {
            self.image.extend([0xb0, byte, 0xee]); // mov al, byte; out dx, al
        }
        self
    }

    /// Writes the zero-terminated text at ESI to the serial port.
    pub(crate) fn say_text_at_esi(self) -> Self {
        self.code(&[0x66, 0xba, 0xf8, 0x03]) // mov dx, 0x3f8
            .code(&[0xac]) // lodsb
            .code(&[0x84, 0xc0]) // test al, al
            .code(&[0x74, 0x03]) // jz past the loop
            .code(&[0xee]) // out dx, al
            .code(&[0xeb, 0xf8]) // jmp to lodsb
    }

    /// Stores a word.
    pub(crate) fn store(self, at: u32, value: u32) -> Self {
        self.code(&[0xbb]).code(&at.to_le_bytes()).code(&[0xc7, 0x03]).code(&value.to_le_bytes())
    }

    /// Writes a byte to a port.
    pub(crate) fn out(self, port: u16, value: u8) -> Self {
        let [low, high] = port.to_le_bytes();
        self.code(&[0x66, 0xba, low, high, 0xb0, value, 0xee])
    }

    /// Rings the doorbell.
    pub(crate) fn ring(self, phase: u32) -> Self {
        self.store(DOORBELL, phase)
    }

    /// Powers off.
    pub(crate) fn power_off(self, code: u32) -> Self {
        self.store(POWER_OFF, code).halt()
    }

    /// Halts for good.
    pub(crate) fn halt(self) -> Self {
        self.code(&[0xfa, 0xf4, 0xeb, 0xfd]) // cli; hlt; jmp back
    }

    /// The program itself.
    pub(crate) fn bytes(&self) -> &[u8] {
        &self.image
    }

    /// Places `bytes` at `offset` of the image, behind everything written so far.
    pub(crate) fn at(mut self, offset: usize, bytes: &[u8]) -> Self {
        assert!(self.image.len() <= offset, "the program grew into its data");
        self.image.resize(offset, 0);
        self.image.extend_from_slice(bytes);
        self
    }

    /// An ELF file with a PVH note.
    pub(crate) fn elf(&self) -> Vec<u8> {
        const HEADERS: usize = 64 + 2 * 56;
        let note_at = HEADERS;
        let mut note = Vec::new();
        for word in [4_u32, 4, 18] {
            note.extend(word.to_le_bytes());
        }
        note.extend(b"Xen\0");
        note.extend(LOAD.to_le_bytes());
        let code_at = note_at + note.len();

        let mut file = Vec::new();
        file.extend(b"\x7fELF\x02\x01\x01");
        file.resize(16, 0);
        file.extend(2_u16.to_le_bytes()); // an executable
        file.extend(62_u16.to_le_bytes()); // for x86-64
        file.extend(1_u32.to_le_bytes());
        file.extend(u64::from(LOAD).to_le_bytes());
        file.extend(64_u64.to_le_bytes()); // program headers
        file.extend(0_u64.to_le_bytes());
        file.extend(0_u32.to_le_bytes());
        for half in [64_u16, 56, 2, 0, 0, 0] {
            file.extend(half.to_le_bytes());
        }
        program_header(&mut file, 4, note_at, 0, note.len(), note.len());
        program_header(&mut file, 1, code_at, LOAD as usize, self.image.len(), self.image.len() + 0x1000);
        file.extend(note);
        file.extend(&self.image);
        file
    }

    /// A bzImage that prefers to be loaded where its 64-bit entry point falls on [`LOAD`] + 0x200.
    pub(crate) fn bzimage(&self) -> Vec<u8> {
        let mut file = vec![0; 1024];
        file[0x1f1] = 1; // one sector of set-up code
        file[0x1fe..0x200].copy_from_slice(&0xaa55_u16.to_le_bytes());
        file[0x200..0x202].copy_from_slice(&[0xeb, 0x66]);
        file[0x202..0x206].copy_from_slice(b"HdrS");
        file[0x206..0x208].copy_from_slice(&0x020f_u16.to_le_bytes());
        file[0x211] = 1; // loaded high
        file[0x22c..0x230].copy_from_slice(&0x7fff_ffff_u32.to_le_bytes());
        file[0x234] = 1; // relocatable
        file[0x236..0x238].copy_from_slice(&1_u16.to_le_bytes()); // has a 64-bit entry point
        file[0x258..0x260].copy_from_slice(&u64::from(LOAD).to_le_bytes());
        file[0x260..0x264].copy_from_slice(&0x10_0000_u32.to_le_bytes());
        file.resize(1024 + 0x200, 0);
        file.extend(&self.image);
        file
    }

    /// Runs the guest in the smallest machine until it ends.
    pub(crate) fn run(&self) -> Outcome {
        run(&self.elf(), Shape::new(64, 1).expect("a shape"), "", None, Box::new(|_| {}))
    }
}

fn program_header(
    file: &mut Vec<u8>,
    kind: u32,
    offset: usize,
    at: usize,
    bytes: usize,
    memory_bytes: usize,
) {
    file.extend(kind.to_le_bytes());
    file.extend(7_u32.to_le_bytes());
    for word in [offset, at, at, bytes, memory_bytes, 0x1000] {
        file.extend((word as u64).to_le_bytes());
    }
}

/// How a guest ended, and what it said.
#[derive(Debug)]
pub(crate) struct Outcome {
    pub(crate) end: End,
    pub(crate) console: String,
}

/// Runs a kernel image until it ends.
pub(crate) fn run(
    kernel: &[u8],
    shape: Shape,
    extra: &str,
    initramfs: Option<&[u8]>,
    observer: Observer,
) -> Outcome {
    let kvm = Kvm::open().expect("these tests need KVM: a readable and writable /dev/kvm");
    let shell = Shell::create(&kvm, shape).expect("a machine");
    let loaded = boot::load_kernel(shell.memory(), &file(kernel)).expect("a good kernel");
    let initramfs = initramfs.map(file);
    let entry =
        boot::prepare(shell.memory(), &loaded, initramfs.as_ref(), shape, 0, extra).expect("everything fits");
    let console = Console::new(None).expect("a console");
    let machine = Machine::start(shell, &entry, console, Vec::new(), observer).expect("it starts");
    let (end, console) = machine.wait();
    Outcome { end, console: String::from_utf8_lossy(&console.tail(usize::MAX)).into_owned() }
}

/// A file that holds `bytes` and has no name.
pub(crate) fn file(bytes: &[u8]) -> File {
    let mut file = tempfile::tempfile().expect("a file");
    file.write_all(bytes).expect("space");
    file
}

/// The phases a guest rang, as an observer to give to [`run`].
pub(crate) fn phases() -> (Observer, std::sync::mpsc::Receiver<u32>) {
    let (sender, receiver) = std::sync::mpsc::channel();
    let observer = Box::new(move |notice| {
        if let Notice::Doorbell(phase, _) = notice {
            sender.send(phase).expect("the test listens");
        }
    });
    (observer, receiver)
}
