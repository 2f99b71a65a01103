//! Instructions of guest kernels that KVM's emulator does not know, finished by us.
//!
//! Where KVM has no hardware virtualization (a PVM host) it emulates guest kernels, and gives up on an instruction it
//! does not know: [`KVM_RUN`](kvm_ioctls::VcpuFd::run) ends with an internal error and the instruction's bytes. A few of
//! them no kernel can do without there:
//!
//! * `int3`, which a kernel on several vCPUs puts into its own code for a moment whenever it patches itself;
//! * XSAVE and XRSTOR, because guest programs run natively with every vector register there is.
//!
//! Everything here is the guest's to choose: the instruction, the registers, the page tables, the area.

use kiln_memory::{Gpa, GuestMemory};
use kvm_bindings::KVM_VCPUEVENT_VALID_SHADOW;
use kvm_ioctls::VcpuFd;

use super::call;
use super::convert::{image_of, xsave_of};
use super::page_walk::{Access, Fault, translate};
use super::xstate::{self, Area, Direction, Instruction, Layout};
use crate::{CpuidEntry, Error, InternalError, Registers, SystemRegisters};

/// `int3`.
const BREAKPOINT_INSTRUCTION: u8 = 0xcc;

const BREAKPOINT_VECTOR: u8 = 3;
const GENERAL_PROTECTION_VECTOR: u8 = 13;
const PAGE_FAULT_VECTOR: u8 = 14;

/// Bits of a page fault's error code. Intel SDM volume 3 §4.7 "Page-Fault Exceptions".
const FAULT_PRESENT: u32 = 1 << 0;
const FAULT_WRITE: u32 = 1 << 1;

const CR4_OSXSAVE: u64 = 1 << 18;
const LEAF_FEATURES: u32 = 1;
const ECX1_XSAVE: u32 = 1 << 26;
const LEAF_XSTATE: u32 = 0xd;
/// x87 and SSE, which every processor with XSAVE has.
const LEAST_XCR0: u32 = 0b11;

const PAGE_BYTES: u64 = 4096;
/// What a guest runs with before it says otherwise: x87 only.
const INITIAL_XCR0: u64 = 1;

/// Offers XSAVE where KVM offers only what it is for.
///
/// KVM hides the instruction's bit where its emulator would have to know it. Programs see the bit all the same there,
/// natively; the guest's kernel must too, or it will not save what programs use.
pub(super) fn complete_cpuid(entries: &mut [CpuidEntry]) {
    let has_state = entries
        .iter()
        .any(|entry| entry.leaf == LEAF_XSTATE && entry.subleaf == 0 && entry.eax & LEAST_XCR0 == LEAST_XCR0);
    if has_state {
        for entry in entries.iter_mut().filter(|entry| entry.leaf == LEAF_FEATURES) {
            entry.ecx |= ECX1_XSAVE;
        }
    }
}

/// What is left to do of an instruction.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Completion {
    Breakpoint,
    Xstate(Instruction),
}

/// An exception that an instruction ends with.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Exception {
    Breakpoint,
    GeneralProtection,
    PageFault { code: u32, at: u64 },
}

impl Completion {
    /// What would finish the instruction that KVM gave up on; `None` when nothing here does.
    pub(super) fn of(error: &InternalError) -> Option<Self> {
        let bytes = error.instruction();
        if bytes.first() == Some(&BREAKPOINT_INSTRUCTION) {
            return Some(Self::Breakpoint);
        }
        Instruction::decode(bytes).map(Self::Xstate)
    }

    /// Finishes the instruction. Says false when it turns out that it cannot, and has changed nothing then.
    pub(super) fn finish(self, fd: &VcpuFd, memory: &GuestMemory, layout: &Layout) -> Result<bool, Error> {
        let mut regs = fd.get_regs().map_err(call("KVM_GET_REGS"))?;
        let (length, exception) = match self {
            // A trap: it is reported behind the instruction. Intel SDM volume 3 §6.15 "Exception and Interrupt
            // Reference", "Interrupt 3".
            Self::Breakpoint => (1, Some(Exception::Breakpoint)),
            Self::Xstate(instruction) => {
                let sregs = fd.get_sregs().map_err(call("KVM_GET_SREGS"))?;
                let system = SystemRegisters::from(&sregs);
                let in_64_bit_kernel = system.cs.long && system.cs.dpl == 0;
                if !in_64_bit_kernel || system.cr4 & CR4_OSXSAVE == 0 {
                    return Ok(false);
                }
                let registers = Registers::from(&regs);
                match transfer(instruction, fd, memory, layout, &registers, &system)? {
                    None => return Ok(false),
                    Some(Ok(())) => (instruction.length, None),
                    // A fault: it is reported at the instruction.
                    Some(Err(exception)) => (0, Some(exception)),
                }
            }
        };
        if length > 0 {
            regs.rip = regs.rip.wrapping_add(length);
            fd.set_regs(&regs).map_err(call("KVM_SET_REGS"))?;
        }
        deliver(exception, fd)?;
        Ok(true)
    }
}

/// Moves registers between the vCPU and the guest's memory as `instruction` says. `None` when it cannot be done here.
fn transfer(
    instruction: Instruction,
    fd: &VcpuFd,
    memory: &GuestMemory,
    layout: &Layout,
    registers: &Registers,
    system: &SystemRegisters,
) -> Result<Option<Result<(), Exception>>, Error> {
    let xcrs = fd.get_xcrs().map_err(call("KVM_GET_XCRS"))?;
    let xcr0 = xcrs.xcrs.first().map_or(INITIAL_XCR0, |first| first.value);
    let mask = Instruction::mask(registers, xcr0);
    let address = instruction.address(registers);
    if !address.is_multiple_of(xstate::ALIGNMENT) {
        return Ok(Some(Err(Exception::GeneralProtection)));
    }
    let access = match instruction.direction {
        Direction::Save => Access::Write,
        Direction::Restore => Access::Read,
    };
    let area = match Mapped::new(memory, system, address, layout.extent(mask), access) {
        None => return Ok(None),
        Some(Err(exception)) => return Ok(Some(Err(exception))),
        Some(Ok(area)) => area,
    };
    let mut image = image_of(&fd.get_xsave().map_err(call("KVM_GET_XSAVE"))?);
    match instruction.direction {
        Direction::Save => xstate::save(layout, mask, &image, &area),
        Direction::Restore => {
            if xstate::restore(layout, mask, xcr0, &area, &mut image).is_err() {
                return Ok(Some(Err(Exception::GeneralProtection)));
            }
            // SAFETY: the call reads more than a `kvm_xsave` only for components enabled by `arch_prctl`, which nothing
            // in this process does.
            match unsafe { fd.set_xsave(&xsave_of(&image)) } {
                Ok(()) => {}
                Err(errno) if errno.errno() == libc::EINVAL => {
                    return Ok(Some(Err(Exception::GeneralProtection)));
                }
                Err(errno) => return Err(call("KVM_SET_XSAVE")(errno)),
            }
        }
    }
    Ok(Some(Ok(())))
}

/// Ends the instruction: forgets the #UD that KVM has queued for it, and delivers `exception` instead.
fn deliver(exception: Option<Exception>, fd: &VcpuFd) -> Result<(), Error> {
    if let Some(Exception::PageFault { at, .. }) = exception {
        let mut sregs = fd.get_sregs().map_err(call("KVM_GET_SREGS"))?;
        sregs.cr2 = at;
        fd.set_sregs(&sregs).map_err(call("KVM_SET_SREGS"))?;
    }
    let (vector, code) = match exception {
        None => (0, None),
        Some(Exception::Breakpoint) => (BREAKPOINT_VECTOR, None),
        Some(Exception::GeneralProtection) => (GENERAL_PROTECTION_VECTOR, Some(0)),
        Some(Exception::PageFault { code, .. }) => (PAGE_FAULT_VECTOR, Some(code)),
    };
    let mut events = fd.get_vcpu_events().map_err(call("KVM_GET_VCPU_EVENTS"))?;
    events.exception.injected = exception.is_some().into();
    events.exception.pending = 0;
    events.exception.nr = vector;
    events.exception.has_error_code = code.is_some().into();
    events.exception.error_code = code.unwrap_or(0);
    // An instruction is over, and with it the shadow of the one before.
    events.interrupt.shadow = 0;
    events.flags |= KVM_VCPUEVENT_VALID_SHADOW;
    fd.set_vcpu_events(&events).map_err(call("KVM_SET_VCPU_EVENTS"))
}

/// An XSAVE area in guest memory: one run of RAM, or two where it crosses a page.
struct Mapped<'a> {
    memory: &'a GuestMemory,
    first: Gpa,
    /// Bytes in the first page.
    split: usize,
    second: Gpa,
}

impl<'a> Mapped<'a> {
    /// The `bytes` at `linear`; `None` when they are not all in RAM.
    fn new(
        memory: &'a GuestMemory,
        system: &SystemRegisters,
        linear: u64,
        bytes: usize,
        access: Access,
    ) -> Option<Result<Self, Exception>> {
        let page = |at: u64, bytes: usize| {
            Some(match translate(memory, system, at, access)? {
                Ok(gpa) => {
                    memory.check(kiln_memory::Span::new(gpa, bytes)).ok()?;
                    Ok(gpa)
                }
                Err(Fault::NotCanonical) => Err(Exception::GeneralProtection),
                Err(Fault::Page { present }) => {
                    let write = if access == Access::Write { FAULT_WRITE } else { 0 };
                    let present = if present { FAULT_PRESENT } else { 0 };
                    Err(Exception::PageFault { code: write | present, at })
                }
            })
        };
        let split = bytes.min((PAGE_BYTES - linear % PAGE_BYTES) as usize);
        let first = match page(linear, split)? {
            Ok(first) => first,
            Err(exception) => return Some(Err(exception)),
        };
        // An area is smaller than a page.
        let second = match bytes - split {
            0 => first,
            rest => match page(linear.wrapping_add(split as u64), rest)? {
                Ok(second) => second,
                Err(exception) => return Some(Err(exception)),
            },
        };
        Some(Ok(Self { memory, first, split, second }))
    }

    /// Splits `length` bytes at `offset` into the run on each side: address and bytes.
    fn runs(&self, offset: usize, length: usize) -> [(Gpa, std::ops::Range<usize>); 2] {
        let in_first = self.split.saturating_sub(offset).min(length);
        let first = Gpa(self.first.0.wrapping_add(offset as u64));
        let second = Gpa(self.second.0.wrapping_add((offset + in_first).saturating_sub(self.split) as u64));
        [(first, 0..in_first), (second, in_first..length)]
    }
}

impl Area for Mapped<'_> {
    fn read(&self, offset: usize, into: &mut [u8]) {
        for (at, range) in self.runs(offset, into.len()) {
            if !range.is_empty() {
                self.memory.read(at, &mut into[range]).expect("checked to be RAM, which stays");
            }
        }
    }

    fn write(&self, offset: usize, from: &[u8]) {
        for (at, range) in self.runs(offset, from.len()) {
            if !range.is_empty() {
                self.memory.write(at, &from[range]).expect("checked to be RAM, which stays");
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn error(bytes: &[u8]) -> InternalError {
        let mut error = InternalError { suberror: 1, ..InternalError::default() };
        error.instruction[..bytes.len()].copy_from_slice(bytes);
        error.instruction_len = bytes.len() as u8;
        error
    }

    #[test]
    fn only_what_can_be_finished_is_taken() {
        assert_eq!(Completion::of(&error(&[0xcc])), Some(Completion::Breakpoint));
        assert!(matches!(Completion::of(&error(&[0x48, 0x0f, 0xae, 0x27])), Some(Completion::Xstate(_))));
        assert_eq!(Completion::of(&error(&[0xf3, 0x0f, 0xb8, 0xc0])), None);
        assert_eq!(Completion::of(&error(&[])), None);
    }

    #[test]
    fn xsave_is_offered_where_there_is_something_to_save() {
        let features = CpuidEntry { leaf: 1, ..CpuidEntry::default() };
        let state = CpuidEntry { leaf: 0xd, eax: 0xe7, ..CpuidEntry::default() };
        for (state, ecx) in [(state, ECX1_XSAVE), (CpuidEntry { eax: 0, ..state }, 0)] {
            let mut entries = [features, state];
            complete_cpuid(&mut entries);
            assert_eq!(entries[0].ecx, ecx);
        }
    }

    #[test]
    fn an_area_across_two_pages_is_read_and_written_in_order() {
        let memory = GuestMemory::new(1 << 20).expect("mapped");
        let area = Mapped { memory: &memory, first: Gpa(0x1fc0), split: 64, second: Gpa(0x8000) };
        let bytes: Vec<u8> = (0..200).collect();
        for (offset, length) in [(0, 64), (0, 65), (10, 100), (63, 2), (64, 10), (100, 20)] {
            area.write(offset, &bytes[..length]);
            let mut back = vec![0; length];
            area.read(offset, &mut back);
            assert_eq!(back, bytes[..length], "{length} at {offset}");
        }
        area.write(60, &[1, 2, 3, 4, 5, 6]);
        assert_eq!(memory.read_array(Gpa(0x1ffc)), Ok([1, 2, 3, 4]));
        assert_eq!(memory.read_array(Gpa(0x8000)), Ok([5, 6]));
    }
}
