//! What a program needs that has no libc: where it begins, where it ends, and how it moves memory.

#![allow(unsafe_code)]

use core::arch::{asm, global_asm, naked_asm};

// The kernel starts a program with the stack pointer at its arguments, 16-aligned, of which this one wants none.
// System V ABI AMD64 supplement §3.4.1 "Initial Stack and Register State".
global_asm!(".globl _start", "_start:", "xor ebp, ebp", "call {begin}", "ud2", begin = sym begin);

extern "C" fn begin() -> ! {
    crate::run();
    exit(0)
}

/// Ends the program.
pub(crate) fn exit(code: i32) -> ! {
    const EXIT_GROUP: usize = 231;
    // SAFETY: exit_group takes a number and does not return.
    unsafe { asm!("syscall", in("rax") EXIT_GROUP, in("rdi") code, options(noreturn, nostack)) }
}

/// The length of a C string.
///
/// # Safety
/// As strlen(3).
#[unsafe(no_mangle)]
unsafe extern "C" fn strlen(string: *const u8) -> usize {
    let mut bytes = 0;
    // SAFETY: the caller promises a string that ends in a NUL, which has not been passed.
    while unsafe { string.wrapping_add(bytes).read_volatile() } != 0 {
        bytes += 1;
    }
    bytes
}

// `alloc` comes compiled for programs that unwind and so names these two; this one aborts, and never calls them.

#[unsafe(no_mangle)]
extern "C" fn rust_eh_personality() {}

#[unsafe(no_mangle)]
extern "C" fn _Unwind_Resume() -> ! {
    exit(1)
}

// The functions that compiled code takes for granted, in their shortest form: the agent moves little, and a processor
// that runs `rep movsb` well copies as fast as anything.

/// # Safety
/// As memcpy(3).
#[unsafe(no_mangle)]
#[unsafe(naked)]
unsafe extern "C" fn memcpy(to: *mut u8, from: *const u8, bytes: usize) -> *mut u8 {
    naked_asm!("mov rax, rdi", "mov rcx, rdx", "rep movsb", "ret")
}

/// # Safety
/// As memmove(3).
#[unsafe(no_mangle)]
#[unsafe(naked)]
unsafe extern "C" fn memmove(to: *mut u8, from: *const u8, bytes: usize) -> *mut u8 {
    naked_asm!(
        "mov rax, rdi",
        "mov rcx, rdx",
        // Backwards only when the end of `from` would be overwritten before it is read.
        "mov r8, rdi",
        "sub r8, rsi",
        "cmp r8, rdx",
        "jb 2f",
        "rep movsb",
        "ret",
        "2:",
        "lea rdi, [rdi + rdx - 1]",
        "lea rsi, [rsi + rdx - 1]",
        "std",
        "rep movsb",
        "cld",
        "ret",
    )
}

/// # Safety
/// As memset(3).
#[unsafe(no_mangle)]
#[unsafe(naked)]
unsafe extern "C" fn memset(to: *mut u8, byte: i32, bytes: usize) -> *mut u8 {
    naked_asm!("mov r8, rdi", "mov eax, esi", "mov rcx, rdx", "rep stosb", "mov rax, r8", "ret")
}

/// # Safety
/// As memcmp(3).
#[unsafe(no_mangle)]
#[unsafe(naked)]
unsafe extern "C" fn memcmp(one: *const u8, other: *const u8, bytes: usize) -> i32 {
    naked_asm!(
        "xor eax, eax",
        "mov rcx, rdx",
        // Equal when there is nothing to compare: the flags are set by hand, for `repe cmpsb` would leave them.
        "cmp rax, rax",
        "repe cmpsb",
        "je 2f",
        "movzx eax, byte ptr [rdi - 1]",
        "movzx ecx, byte ptr [rsi - 1]",
        "sub ecx, eax",
        "mov eax, ecx",
        "2:",
        "ret",
    )
}

/// # Safety
/// As bcmp(3).
#[unsafe(no_mangle)]
unsafe extern "C" fn bcmp(one: *const u8, other: *const u8, bytes: usize) -> i32 {
    // SAFETY: the caller promises the same.
    unsafe { memcmp(one, other, bytes) }
}
