//! Vector registers that several processes use at once: each must find its own values whenever it looks.
#![expect(unsafe_code, reason = "registers are only held still by assembly")]

mod beat;

use std::arch::{global_asm, is_x86_feature_detected};
use std::io;
use std::process::{Command, Stdio};
use std::ptr::null_mut;

pub(crate) use beat::beat;

/// Bytes of all registers of the largest set: 32 of 64 bytes.
const REGISTERS_BYTES: usize = 32 * 64;
/// How often the values are looked at and loaded anew.
const ROUNDS: u64 = 20;

/// One register as wide as they come, aligned for any of them.
#[repr(C, align(64))]
struct Registers([u8; REGISTERS_BYTES]);

// Each loads all registers of its set from RDI, does something else RDX times, and stores the registers to RSI. What else: gives way to
// other processes, or stays in user mode for some 100 us and then stores to the doorbell, whose address is in RCX.
// System V AMD64 ABI §3.2.1 "Registers": a function may change all of them. A system call changes RAX, RCX and R11.
global_asm!(
    r"
.macro yield_often
2:  mov eax, 24                     # sched_yield
    syscall
    dec rdx
    jnz 2b
.endm

.macro beat_often
    mov r8d, {beat}
2:  mov eax, 200000
3:  dec eax
    jnz 3b
    mov [rcx], r8d
    dec rdx
    jnz 2b
.endm

.macro holder name, instruction, register, width, between, numbers:vararg
.globl \name
\name:
    .irp n, \numbers
    \instruction \register\n, [rdi + \width*\n]
    .endr
    \between
    .irp n, \numbers
    \instruction [rsi + \width*\n], \register\n
    .endr
    ret
.endm

holder kiln_hold_sse, movups, xmm, 16, yield_often, 0,1,2,3,4,5,6,7,8,9,10,11,12,13,14,15
holder kiln_beat_sse, movups, xmm, 16, beat_often, 0,1,2,3,4,5,6,7,8,9,10,11,12,13,14,15
holder kiln_hold_avx, vmovups, ymm, 32, yield_often, 0,1,2,3,4,5,6,7,8,9,10,11,12,13,14,15
holder kiln_beat_avx, vmovups, ymm, 32, beat_often, 0,1,2,3,4,5,6,7,8,9,10,11,12,13,14,15
holder kiln_hold_avx512, vmovups, zmm, 64, yield_often, 0,1,2,3,4,5,6,7,8,9,10,11,12,13,14,15,16,17,18,19,20,21,22,23,24,25,26,27,28,29,30,31
holder kiln_beat_avx512, vmovups, zmm, 64, beat_often, 0,1,2,3,4,5,6,7,8,9,10,11,12,13,14,15,16,17,18,19,20,21,22,23,24,25,26,27,28,29,30,31
",
    beat = const beat::BEAT
);

type Hold =
    unsafe extern "C" fn(values: *const Registers, found: *mut Registers, times: u64, doorbell: *mut u32);

unsafe extern "C" {
    fn kiln_hold_sse(values: *const Registers, found: *mut Registers, times: u64, doorbell: *mut u32);
    fn kiln_beat_sse(values: *const Registers, found: *mut Registers, times: u64, doorbell: *mut u32);
    fn kiln_hold_avx(values: *const Registers, found: *mut Registers, times: u64, doorbell: *mut u32);
    fn kiln_beat_avx(values: *const Registers, found: *mut Registers, times: u64, doorbell: *mut u32);
    fn kiln_hold_avx512(values: *const Registers, found: *mut Registers, times: u64, doorbell: *mut u32);
    fn kiln_beat_avx512(values: *const Registers, found: *mut Registers, times: u64, doorbell: *mut u32);
}

/// A set of registers: its name, its size in bytes, and its functions.
struct Set {
    name: &'static str,
    bytes: usize,
    hold: Hold,
    beat: Hold,
}

impl Set {
    /// The largest that a program may use here, as C libraries find out.
    fn largest() -> Self {
        if is_x86_feature_detected!("avx512f") {
            Self { name: "AVX-512", bytes: 32 * 64, hold: kiln_hold_avx512, beat: kiln_beat_avx512 }
        } else if is_x86_feature_detected!("avx") {
            Self { name: "AVX", bytes: 16 * 32, hold: kiln_hold_avx, beat: kiln_beat_avx }
        } else {
            Self { name: "SSE", bytes: 16 * 16, hold: kiln_hold_sse, beat: kiln_beat_sse }
        }
    }

    /// Puts values that follow from `seed` into all registers, has `function` do what it does so many times, and says how many bytes
    /// have changed in the end.
    fn wrong(&self, function: Hold, seed: u64, times: u64, doorbell: *mut u32) -> usize {
        let mut values = Registers([0; REGISTERS_BYTES]);
        for (at, byte) in values.0.iter_mut().enumerate() {
            *byte = (seed + at as u64) as u8;
        }
        let mut found = Registers([0; REGISTERS_BYTES]);
        // SAFETY: the processor has the set; both areas are as large as the largest; the function changes nothing but the
        // second one, the doorbell if it is one that rings, which is mapped then, and registers that a function may change.
        unsafe { function(&raw const values, &raw mut found, times.max(1), doorbell) };
        (0..self.bytes).filter(|at| found.0[*at] != values.0[*at]).count()
    }
}

/// Runs `processes` copies of [`hold`] at once.
///
/// # Errors
/// One of them found what it had not put there, or could not be started.
pub(crate) fn share(processes: u64, yields: u64) -> io::Result<()> {
    let mut children = Vec::new();
    for id in 0..processes {
        let mut child = Command::new("/proc/self/exe");
        child.args(["hold-registers", &id.to_string(), &yields.to_string()]).stdin(Stdio::null());
        children.push(child.spawn()?);
    }
    let mut failed = 0;
    for mut child in children {
        failed += u64::from(!child.wait()?.success());
    }
    if failed > 0 {
        return Err(io::Error::other(format!("{failed} of {processes} processes lost registers")));
    }
    println!("{processes} processes kept their registers");
    Ok(())
}

/// Keeps values of process `id` in all vector registers for `yields` turns, several times.
///
/// # Errors
/// A register held something else in the end.
pub(crate) fn hold(id: u64, yields: u64) -> io::Result<()> {
    let set = Set::largest();
    for round in 0..ROUNDS {
        let wrong = set.wrong(set.hold, id * 89 + round * 7, yields, null_mut());
        if wrong > 0 {
            let (name, bytes) = (set.name, set.bytes);
            return Err(io::Error::other(format!(
                "process {id}: {wrong} of {bytes} bytes of {name} are another's"
            )));
        }
    }
    Ok(())
}

/// Keeps values in all vector registers, rings the doorbell of its machine every 100 us, and in another way when a register has lost
/// its value. It leaves user mode only to begin: whoever saves and restores its machine finds the values in the registers and nowhere
/// else. Not by the serial port: QEMU's emulation of AMD's extensions forgets a restored guest's right to it (it takes a task
/// register that is marked busy, as KVM rightly loads it, for none).
///
/// # Errors
/// Without access to the doorbell.
pub(crate) fn carry() -> io::Result<()> {
    /// So that a machine is seldom saved between two rounds, where the values are in memory.
    const BEATS: u64 = 200;
    let doorbell = beat::Doorbell::map()?;
    let set = Set::largest();
    for round in 0.. {
        if set.wrong(set.beat, round * 7, BEATS, doorbell.register()) > 0 {
            doorbell.ring(beat::LOST);
        }
    }
    Ok(())
}
