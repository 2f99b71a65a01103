//! Vector registers that several processes use at once: each must find its own values whenever it looks.
#![expect(unsafe_code, reason = "registers are only held still by assembly")]

use std::arch::{global_asm, is_x86_feature_detected};
use std::io;
use std::process::{Command, Stdio};

/// Bytes of all registers of the largest set: 32 of 64 bytes.
const REGISTERS_BYTES: usize = 32 * 64;
/// How often the values are looked at and loaded anew.
const ROUNDS: u64 = 20;

/// One register as wide as they come, aligned for any of them.
#[repr(C, align(64))]
struct Registers([u8; REGISTERS_BYTES]);

// Each loads all registers of its set from RDI, gives way to other processes RDX times, and stores the registers to RSI.
// System V AMD64 ABI §3.2.1 "Registers": a function may change all of them. A system call changes RAX, RCX and R11.
global_asm!(
    r"
.macro yield_often
2:  mov eax, 24                     # sched_yield
    syscall
    dec rdx
    jnz 2b
.endm

.globl kiln_hold_sse
kiln_hold_sse:
    .irp n, 0,1,2,3,4,5,6,7,8,9,10,11,12,13,14,15
    movups xmm\n, [rdi + 16*\n]
    .endr
    yield_often
    .irp n, 0,1,2,3,4,5,6,7,8,9,10,11,12,13,14,15
    movups [rsi + 16*\n], xmm\n
    .endr
    ret

.globl kiln_hold_avx
kiln_hold_avx:
    .irp n, 0,1,2,3,4,5,6,7,8,9,10,11,12,13,14,15
    vmovups ymm\n, [rdi + 32*\n]
    .endr
    yield_often
    .irp n, 0,1,2,3,4,5,6,7,8,9,10,11,12,13,14,15
    vmovups [rsi + 32*\n], ymm\n
    .endr
    vzeroupper
    ret

.globl kiln_hold_avx512
kiln_hold_avx512:
    .irp n, 0,1,2,3,4,5,6,7,8,9,10,11,12,13,14,15,16,17,18,19,20,21,22,23,24,25,26,27,28,29,30,31
    vmovups zmm\n, [rdi + 64*\n]
    .endr
    yield_often
    .irp n, 0,1,2,3,4,5,6,7,8,9,10,11,12,13,14,15,16,17,18,19,20,21,22,23,24,25,26,27,28,29,30,31
    vmovups [rsi + 64*\n], zmm\n
    .endr
    vzeroupper
    ret
"
);

type Hold = unsafe extern "C" fn(values: *const Registers, found: *mut Registers, yields: u64);

unsafe extern "C" {
    fn kiln_hold_sse(values: *const Registers, found: *mut Registers, yields: u64);
    fn kiln_hold_avx(values: *const Registers, found: *mut Registers, yields: u64);
    fn kiln_hold_avx512(values: *const Registers, found: *mut Registers, yields: u64);
}

/// The largest set that a program may use here, as C libraries find out: its name, its size in bytes, and its function.
fn largest_set() -> (&'static str, usize, Hold) {
    if is_x86_feature_detected!("avx512f") {
        ("AVX-512", 32 * 64, kiln_hold_avx512)
    } else if is_x86_feature_detected!("avx") {
        ("AVX", 16 * 32, kiln_hold_avx)
    } else {
        ("SSE", 16 * 16, kiln_hold_sse)
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
    let (name, bytes, hold) = largest_set();
    for round in 0..ROUNDS {
        let mut values = Registers([0; REGISTERS_BYTES]);
        for (at, byte) in values.0.iter_mut().enumerate() {
            *byte = (id * 89 + round * 7 + at as u64) as u8;
        }
        let mut found = Registers([0; REGISTERS_BYTES]);
        // SAFETY: the processor has the set; both areas are as large as the largest; the function changes nothing but the
        // second one and registers that a function may change.
        unsafe { hold(&raw const values, &raw mut found, yields.max(1)) };
        let wrong = (0..bytes).filter(|at| found.0[*at] != values.0[*at]).count();
        if wrong > 0 {
            return Err(io::Error::other(format!(
                "process {id}: {wrong} of {bytes} bytes of {name} are another's"
            )));
        }
    }
    Ok(())
}
