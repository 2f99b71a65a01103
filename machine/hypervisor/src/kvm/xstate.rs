//! XSAVE and XRSTOR of a guest's kernel, where KVM has to emulate guest kernels and does not know these two.
//!
//! On such a host (a PVM host) guest programs run natively, with every vector register the processor has, so a guest kernel
//! must save them all when it switches between programs. KVM keeps the registers and hands them out in the very layout of
//! the instructions; what is left is to decode the instruction and to copy as it would.
//! Intel SDM volume 1 §13.7 "Operation of XSAVE" and §13.8 "Operation of XRSTOR". Only the standard form: the compacted
//! one belongs to instructions that such guests are told to leave alone.

use std::ops::Range;

use crate::{CpuidEntry, Registers};

/// The bytes of an image of the registers as KVM exchanges it.
pub(super) const IMAGE_BYTES: usize = 4096;

/// An image of the registers as KVM exchanges it.
pub(super) type Image = [u8; IMAGE_BYTES];

/// XSAVE areas are aligned to it.
pub(super) const ALIGNMENT: u64 = 64;

const LEAF_XSTATE: u32 = 0xd;

const X87: u64 = 1 << 0;
const SSE: u64 = 1 << 1;
const AVX: u64 = 1 << 2;
/// The first component outside the legacy region.
const FIRST_EXTENDED: u32 = 2;
/// Numbers of components end here; bit 63 is none.
const COMPONENTS: u32 = 63;

const X87_CONTROL: Range<usize> = 0..24;
const MXCSR: Range<usize> = 24..28;
const MXCSR_AND_MASK: Range<usize> = 24..32;
const X87_REGISTERS: Range<usize> = 32..160;
const XMM: Range<usize> = 160..416;
const HEADER: Range<usize> = 512..576;
const XSTATE_BV: Range<usize> = 512..520;
/// `XCOMP_BV` and what must be zero.
const REST_OF_HEADER: Range<usize> = 520..576;

/// The control word of x87 after a reset.
const INITIAL_FCW: [u8; 2] = 0x037f_u16.to_le_bytes();

/// Where each component lies, from leaf 0xd of CPUID.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Layout {
    extended: Vec<(u64, Range<usize>)>,
}

impl Layout {
    /// The layout that `entries` describe; components that an [`Image`] cannot hold are left out.
    pub(super) fn new(entries: &[CpuidEntry]) -> Self {
        let extended = entries
            .iter()
            .filter(|entry| entry.leaf == LEAF_XSTATE)
            .filter(|entry| (FIRST_EXTENDED..COMPONENTS).contains(&entry.subleaf))
            .filter_map(|entry| {
                let start = entry.ebx as usize;
                let end = start.checked_add(entry.eax as usize)?;
                let fits = start >= HEADER.end && end <= IMAGE_BYTES && start < end;
                fits.then_some((1 << entry.subleaf, start..end))
            })
            .collect();
        Self { extended }
    }

    /// The pieces of an area that hold the components in `mask`, MXCSR and the header aside.
    fn pieces(&self, mask: u64) -> impl Iterator<Item = (u64, Range<usize>)> + '_ {
        let legacy = [(X87, X87_CONTROL), (X87, X87_REGISTERS), (SSE, XMM)];
        let all = legacy.into_iter().chain(self.extended.iter().cloned());
        all.filter(move |(component, _)| mask & component != 0)
    }

    /// The components there are room for.
    fn known(&self) -> u64 {
        self.extended.iter().fold(X87 | SSE, |mask, (component, _)| mask | component)
    }

    /// How many bytes of an area an instruction with this mask touches.
    pub(super) fn extent(&self, mask: u64) -> usize {
        self.pieces(mask).map(|(_, piece)| piece.end).fold(HEADER.end, usize::max)
    }
}

/// One of the two instructions.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Direction {
    Save,
    Restore,
}

/// An XSAVE or XRSTOR of a kernel in 64-bit mode.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Instruction {
    pub(super) direction: Direction,
    /// Its bytes.
    pub(super) length: u64,
    base: Base,
    index: Option<(u8, u8)>,
    displacement: i32,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Base {
    None,
    NextInstruction,
    Register(u8),
}

impl Instruction {
    /// Decodes `bytes`; `None` when they are something else, or prefixed by more than REX.
    ///
    /// Intel SDM volume 2 §2.1.5 "Addressing-Mode Encoding of `ModR/M` and SIB Bytes" and §2.2.1 "REX Prefixes".
    pub(super) fn decode(bytes: &[u8]) -> Option<Self> {
        let mut rest = bytes;
        let mut next = || {
            let (first, others) = rest.split_first()?;
            rest = others;
            Some(*first)
        };
        let mut byte = next()?;
        let mut rex = 0;
        if byte & 0xf0 == 0x40 {
            rex = byte;
            byte = next()?;
        }
        if (byte, next()?) != (0x0f, 0xae) {
            return None;
        }
        let modrm = next()?;
        let direction = match modrm >> 3 & 7 {
            4 => Direction::Save,
            5 => Direction::Restore,
            _ => return None,
        };
        let extended = |number: u8, bit: u8| number & 7 | (rex & bit) << (3 - bit.trailing_zeros());
        let (mode, rm) = (modrm >> 6, modrm & 7);
        let mut index = None;
        let mut base = Base::Register(extended(rm, 1));
        let mut wide = mode == 2;
        match (mode, rm) {
            (3, _) => return None,
            (_, 4) => {
                let sib = next()?;
                let number = extended(sib >> 3, 2);
                index = (number != 4).then_some((number, sib >> 6));
                base = Base::Register(extended(sib, 1));
                if mode == 0 && sib & 7 == 5 {
                    base = Base::None;
                    wide = true;
                }
            }
            (0, 5) => {
                base = Base::NextInstruction;
                wide = true;
            }
            _ => {}
        }
        let displacement = if wide {
            i32::from_le_bytes([next()?, next()?, next()?, next()?])
        } else if mode == 1 {
            i32::from(next()?.cast_signed())
        } else {
            0
        };
        let length = (bytes.len() - rest.len()) as u64;
        Some(Self { direction, length, base, index, displacement })
    }

    /// The address of its area.
    pub(super) fn address(&self, registers: &Registers) -> u64 {
        let base = match self.base {
            Base::None => 0,
            Base::NextInstruction => registers.rip.wrapping_add(self.length),
            Base::Register(number) => general(registers, number),
        };
        let index = self.index.map_or(0, |(number, scale)| general(registers, number) << scale);
        base.wrapping_add(index).wrapping_add_signed(self.displacement.into())
    }

    /// The components it asks for, of those that `xcr0` enables.
    pub(super) fn mask(registers: &Registers, xcr0: u64) -> u64 {
        (registers.rdx << 32 | registers.rax & 0xffff_ffff) & xcr0
    }
}

/// A general register by its number in instructions.
fn general(registers: &Registers, number: u8) -> u64 {
    let r = registers;
    let all = [
        r.rax, r.rcx, r.rdx, r.rbx, r.rsp, r.rbp, r.rsi, r.rdi, r.r8, r.r9, r.r10, r.r11, r.r12, r.r13,
        r.r14, r.r15,
    ];
    all[usize::from(number & 15)]
}

/// Where an instruction's area is.
pub(super) trait Area {
    /// Copies what is at `offset` into `into`.
    fn read(&self, offset: usize, into: &mut [u8]);
    /// Copies `from` to `offset`.
    fn write(&self, offset: usize, from: &[u8]);
}

/// The area holds what no registers can hold: a general protection fault. The guest is to blame.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Malformed;

/// XSAVE: writes the components in `mask` from `image` to `area`, and nothing else.
pub(super) fn save(layout: &Layout, mask: u64, image: &Image, area: &impl Area) {
    for (_, piece) in layout.pieces(mask) {
        area.write(piece.start, &image[piece]);
    }
    if mask & (SSE | AVX) != 0 {
        area.write(MXCSR_AND_MASK.start, &image[MXCSR_AND_MASK]);
    }
    let mut in_area = [0; 8];
    area.read(XSTATE_BV.start, &mut in_area);
    let in_use = word(&image[XSTATE_BV]);
    let merged = u64::from_le_bytes(in_area) & !mask | in_use & mask;
    area.write(XSTATE_BV.start, &merged.to_le_bytes());
}

/// XRSTOR: brings the components in `mask` from `area` to `image`, those that the area says are in their initial state as
/// such.
///
/// KVM still has to accept the image: a reserved bit in MXCSR is refused there.
///
/// # Errors
/// [`Malformed`]; the image is of no use then.
pub(super) fn restore(
    layout: &Layout,
    mask: u64,
    xcr0: u64,
    area: &impl Area,
    image: &mut Image,
) -> Result<(), Malformed> {
    let mut header = [0; HEADER.end - HEADER.start];
    area.read(HEADER.start, &mut header);
    let in_area = word(&header[..8]);
    if in_area & !xcr0 != 0 || header[8..].iter().any(|byte| *byte != 0) {
        return Err(Malformed);
    }
    for (component, piece) in layout.pieces(mask) {
        if in_area & component == 0 {
            image[piece].fill(0);
        } else {
            area.read(piece.start, &mut image[piece]);
        }
    }
    if mask & X87 != 0 && in_area & X87 == 0 {
        image[..INITIAL_FCW.len()].copy_from_slice(&INITIAL_FCW);
    }
    if mask & (SSE | AVX) != 0 {
        area.read(MXCSR.start, &mut image[MXCSR]);
    }
    // The legacy region is always said to be in use: so KVM takes MXCSR from it whatever it is.
    let known = layout.known();
    let merged = word(&image[XSTATE_BV]) & !mask | in_area & mask & known | X87 | SSE;
    image[XSTATE_BV].copy_from_slice(&merged.to_le_bytes());
    image[REST_OF_HEADER].fill(0);
    Ok(())
}

fn word(bytes: &[u8]) -> u64 {
    u64::from_le_bytes(bytes.try_into().expect("callers pass eight bytes"))
}

#[cfg(test)]
mod tests {
    use std::cell::RefCell;

    use super::*;

    const AVX_PIECE: Range<usize> = 576..832;
    const ALL: u64 = X87 | SSE | AVX;

    fn layout() -> Layout {
        let leaf = |subleaf, eax, ebx| CpuidEntry { leaf: 0xd, subleaf, eax, ebx, ..CpuidEntry::default() };
        Layout::new(&[leaf(0, 7, 832), leaf(1, 0, 0), leaf(2, 256, 576), leaf(5, 64, 4090), leaf(6, 64, 0)])
    }

    struct Bytes(RefCell<Vec<u8>>);

    impl Bytes {
        fn filled(byte: u8) -> Self {
            Self(RefCell::new(vec![byte; IMAGE_BYTES]))
        }

        fn with_header(self, in_use: u64) -> Self {
            self.0.borrow_mut()[HEADER].fill(0);
            self.write(XSTATE_BV.start, &in_use.to_le_bytes());
            self
        }

        fn range(&self, range: Range<usize>) -> Vec<u8> {
            self.0.borrow()[range].to_vec()
        }
    }

    impl Area for Bytes {
        fn read(&self, offset: usize, into: &mut [u8]) {
            into.copy_from_slice(&self.0.borrow()[offset..offset + into.len()]);
        }

        fn write(&self, offset: usize, from: &[u8]) {
            self.0.borrow_mut()[offset..offset + from.len()].copy_from_slice(from);
        }
    }

    fn image(byte: u8, in_use: u64) -> Image {
        let mut image = [byte; IMAGE_BYTES];
        image[XSTATE_BV].copy_from_slice(&in_use.to_le_bytes());
        image
    }

    fn decoded(bytes: &[u8]) -> (Direction, u64, u64) {
        let registers = Registers {
            rip: 0x1_0000,
            rdi: 0x2000,
            rbx: 0x30,
            rcx: 0x1000,
            r12: 0x500,
            r13: 0x7,
            ..Registers::default()
        };
        let instruction = Instruction::decode(bytes).expect("one of the two");
        (instruction.direction, instruction.length, instruction.address(&registers))
    }

    #[test]
    fn every_addressing_mode_is_decoded() {
        use Direction::{Restore, Save};
        // xsave64 (%rdi), xrstor64 (%rdi), xsave (%rdi)
        assert_eq!(decoded(&[0x48, 0x0f, 0xae, 0x27, 0xcc]), (Save, 4, 0x2000));
        assert_eq!(decoded(&[0x48, 0x0f, 0xae, 0x2f]), (Restore, 4, 0x2000));
        assert_eq!(decoded(&[0x0f, 0xae, 0x27]), (Save, 3, 0x2000));
        // xsave64 -0x40(%rdi), xsave64 0x1234(%rdi), xsave64 0x10(%rip), xsave64 0x40 (absolute)
        assert_eq!(decoded(&[0x48, 0x0f, 0xae, 0x67, 0xc0]), (Save, 5, 0x1fc0));
        assert_eq!(decoded(&[0x48, 0x0f, 0xae, 0xa7, 0x34, 0x12, 0, 0]), (Save, 8, 0x3234));
        assert_eq!(decoded(&[0x48, 0x0f, 0xae, 0x25, 0x10, 0, 0, 0]), (Save, 8, 0x1_0018));
        assert_eq!(decoded(&[0x48, 0x0f, 0xae, 0x24, 0x25, 0x40, 0, 0, 0]), (Save, 9, 0x40));
        // xrstor64 0x40(%rbx,%rcx,8), xrstor64 (%r12), xrstor64 0(%r13), xrstor64 (%rdi,%r12,2)
        assert_eq!(decoded(&[0x48, 0x0f, 0xae, 0x6c, 0xcb, 0x40]), (Restore, 6, 0x8070));
        assert_eq!(decoded(&[0x49, 0x0f, 0xae, 0x2c, 0x24]), (Restore, 5, 0x500));
        assert_eq!(decoded(&[0x49, 0x0f, 0xae, 0x6d, 0]), (Restore, 5, 0x7));
        assert_eq!(decoded(&[0x4a, 0x0f, 0xae, 0x2c, 0x67]), (Restore, 5, 0x2a00));
    }

    #[test]
    fn other_instructions_are_left_alone() {
        let others: [&[u8]; 8] = [
            &[],
            &[0x48],
            &[0x48, 0x0f, 0xae],
            &[0x48, 0x0f, 0xae, 0x24],             // cut off
            &[0x48, 0x0f, 0xae, 0x25, 0, 0, 0],    // cut off
            &[0x0f, 0xae, 0xe8],                   // lfence
            &[0x0f, 0xae, 0x37],                   // xsaveopt
            &[0x65, 0x48, 0x0f, 0xae, 0x27, 0, 0], // with a segment
        ];
        for bytes in others {
            assert_eq!(Instruction::decode(bytes), None, "{bytes:02x?}");
        }
    }

    #[test]
    fn the_mask_is_what_is_asked_for_and_enabled() {
        let registers = Registers { rax: u64::MAX, rdx: u64::MAX << 32 | 1, ..Registers::default() };
        assert_eq!(Instruction::mask(&registers, 1 << 32 | 7), 1 << 32 | 7);
        assert_eq!(Instruction::mask(&registers, 1 << 33 | 3), 3);
    }

    #[test]
    fn components_without_room_are_left_out() {
        assert_eq!(layout().extended, [(AVX, AVX_PIECE)]);
        assert_eq!((layout().extent(ALL), layout().extent(X87), layout().extent(1 << 5)), (832, 576, 576));
    }

    #[test]
    fn a_save_writes_what_was_asked_for_and_nothing_else() {
        let area = Bytes::filled(0xee);
        save(&layout(), X87 | SSE, &image(0x11, X87 | AVX), &area);
        assert_eq!(area.range(0..416), vec![0x11; 416]);
        assert_eq!(area.range(416..512), vec![0xee; 96], "software's own bytes");
        assert_eq!(area.range(XSTATE_BV), (0xeeee_eeee_eeee_eeec_u64 | X87).to_le_bytes());
        assert_eq!(area.range(REST_OF_HEADER), vec![0xee; 56]);
        assert_eq!(area.range(AVX_PIECE), vec![0xee; 256]);
        save(&layout(), AVX, &image(0x22, AVX), &area);
        assert_eq!(area.range(AVX_PIECE), vec![0x22; 256]);
        assert_eq!(area.range(MXCSR_AND_MASK), [0x22; 8], "MXCSR belongs to AVX too");
        assert_eq!(area.range(XMM), vec![0x11; 256]);
        assert_eq!(area.range(832..IMAGE_BYTES), vec![0xee; IMAGE_BYTES - 832]);
    }

    #[test]
    fn a_restore_takes_what_was_asked_for_and_leaves_the_rest() {
        let area = Bytes::filled(0x33).with_header(X87 | AVX);
        let mut registers = image(0x11, X87 | SSE | 1 << 9);
        restore(&layout(), X87 | SSE, ALL, &area, &mut registers).expect("well formed");
        assert_eq!(registers[X87_CONTROL], [0x33; 24]);
        assert_eq!(registers[XMM], [0; 256], "not in use in the area");
        assert_eq!(registers[MXCSR], [0x33; 4], "whether in use or not");
        assert_eq!(registers[AVX_PIECE], [0x11; 256], "not asked for");
        assert_eq!(word(&registers[XSTATE_BV]), X87 | SSE | 1 << 9);
        assert_eq!(registers[REST_OF_HEADER], [0; 56]);
    }

    #[test]
    fn x87_begins_with_its_control_word() {
        let mut registers = image(0x11, X87);
        restore(&layout(), ALL, ALL, &Bytes::filled(0).with_header(0), &mut registers).expect("well formed");
        assert_eq!(registers[..2], INITIAL_FCW);
        assert!(registers[2..24].iter().chain(&registers[X87_REGISTERS]).all(|byte| *byte == 0));
        assert_eq!(word(&registers[XSTATE_BV]), X87 | SSE);
    }

    #[test]
    fn what_was_saved_is_restored() {
        let area = Bytes::filled(0).with_header(0);
        let before = image(0x5a, ALL);
        save(&layout(), ALL, &before, &area);
        let mut after = image(0, 0);
        restore(&layout(), ALL, ALL, &area, &mut after).expect("well formed");
        for piece in [X87_CONTROL, MXCSR, X87_REGISTERS, XMM] {
            assert_eq!(after[piece.clone()], before[piece]);
        }
        assert_eq!(after[AVX_PIECE], before[AVX_PIECE]);
        assert_eq!(after[XSTATE_BV], before[XSTATE_BV]);
    }

    #[test]
    fn malformed_areas_are_refused() {
        let disabled = Bytes::filled(0).with_header(AVX);
        assert_eq!(restore(&layout(), X87, X87 | SSE, &disabled, &mut image(0, 0)), Err(Malformed));
        for offset in REST_OF_HEADER {
            let area = Bytes::filled(0).with_header(0);
            area.write(offset, &[1]);
            assert_eq!(restore(&layout(), X87, ALL, &area, &mut image(0, 0)), Err(Malformed), "{offset}");
        }
    }
}
