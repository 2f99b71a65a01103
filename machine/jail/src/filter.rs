//! The list of system calls as a program for the kernel, and what becomes of a process that makes another.
//!
//! Such a process gets a signal that nothing in it can catch but the handler below, which says which call it was; then it is
//! killed. That is no weaker than to be killed without a word: the call is not made, and nobody can put another handler in
//! the place of this one, which runs once. Linux `Documentation/userspace-api/seccomp_filter.rst`.
#![expect(unsafe_code, reason = "the kernel is handed a program, and a handler of signals is plain code")]

use std::ffi::{c_int, c_void};
use std::io;
use std::ptr;

use crate::calls::{CALLS, Call, Need, Rule};

/// Instructions of classic BPF: load a word, compare, jump, mask, return.
const LOAD: u16 = 0x20;
const IF_EQUAL: u16 = 0x15;
const IF_AT_LEAST: u16 = 0x35;
const JUMP: u16 = 0x05;
const AND: u16 = 0x54;
const RETURN: u16 = 0x06;

const ALLOW: u32 = 0x7fff_0000;
const TRAP: u32 = 0x0003_0000;
const ERRNO: u32 = 0x0005_0000;

/// Where the number, the architecture and the arguments are in `struct seccomp_data`.
const NUMBER: u32 = 0;
const ARCHITECTURE: u32 = 4;
const ARGUMENTS: u32 = 16;
/// `AUDIT_ARCH_X86_64`. Calls of the 32-bit interfaces have another one, or a number past all of the list.
const X86_64: u32 = 0xc000_003e;
/// The most instructions of a program. Linux `include/uapi/linux/bpf_common.h`.
const INSTRUCTIONS_MAX: usize = 4096;

/// A number that is no system call, so that it is on no list.
const NO_CALL: libc::c_long = 0x7fff;
/// Where the kernel puts the number of the call in what a handler of `SIGSYS` is given. Linux `include/uapi/asm-generic/siginfo.h`.
const SIGINFO_CALL: usize = 24;

/// Puts the list in force for this thread and all that it makes, for good.
pub(crate) fn install() -> io::Result<()> {
    report_violations()?;
    let program = assemble(CALLS);
    let program = libc::sock_fprog { len: program.len() as u16, filter: program.as_ptr().cast_mut() };
    // SAFETY: a program of so many instructions, which the kernel checks and copies.
    let installed =
        unsafe { libc::syscall(libc::SYS_seccomp, libc::SECCOMP_SET_MODE_FILTER, 0, &raw const program) };
    if installed < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

fn assemble(calls: &[Call]) -> Vec<libc::sock_filter> {
    let mut calls = calls.to_vec();
    calls.sort_by_key(|call| call.number);
    let mut program = vec![load(ARCHITECTURE), compare(X86_64, 1, 0), ret(TRAP), load(NUMBER)];
    program.extend(search(&calls));
    assert!(program.len() <= INSTRUCTIONS_MAX, "the list is a constant, and a test assembles it");
    program
}

/// Finds the call among these by halves, and does what is to be done about it. The kernel runs a new program for every call there is, to
/// know those that it need not run it for, so a search from one end to the other would be felt at each start.
fn search(calls: &[Call]) -> Vec<libc::sock_filter> {
    let middle = calls.len() / 2;
    match calls {
        [] => vec![ret(TRAP)],
        [call] => {
            let mut one = vec![compare(call.number as u32, 1, 0), ret(TRAP)];
            one.extend(body(call.rule));
            one
        }
        _ => {
            let [below, above] = [&calls[..middle], &calls[middle..]].map(search);
            let mut both = vec![
                instruction(IF_AT_LEAST, 0, 1, calls[middle].number as u32),
                instruction(JUMP, 0, 0, below.len() as u32),
            ];
            both.extend(below);
            both.extend(above);
            both
        }
    }
}

/// What is done about a call of the list; it always returns.
fn body(rule: Rule) -> Vec<libc::sock_filter> {
    let alternatives = match rule {
        Rule::Any => return vec![ret(ALLOW)],
        Rule::Missing => return vec![ret(ERRNO | libc::ENOSYS as u32)],
        Rule::Only(alternatives) => alternatives,
    };
    let mut body = Vec::new();
    for needs in alternatives {
        let mut checks: Vec<libc::sock_filter> = needs.iter().flat_map(check).collect();
        checks.push(ret(ALLOW));
        // A comparison that fails goes on behind these checks.
        let end = checks.len();
        for (at, check) in checks.iter_mut().enumerate() {
            if check.code == IF_EQUAL {
                check.jf = u8::try_from(end - at - 1).expect("a few checks each");
            }
        }
        body.extend(checks);
    }
    body.push(ret(TRAP));
    body
}

/// Compares those halves of an argument that are looked at.
fn check(need: &Need) -> Vec<libc::sock_filter> {
    let mut checks = Vec::new();
    for half in 0..2 {
        let [mask, value] = [need.mask, need.value].map(|bits| (bits >> (32 * half)) as u32);
        if mask == 0 {
            continue;
        }
        checks.push(load(ARGUMENTS + 8 * u32::from(need.argument) + 4 * half));
        if mask != u32::MAX {
            checks.push(instruction(AND, 0, 0, mask));
        }
        checks.push(compare(value, 0, 0));
    }
    checks
}

fn load(offset: u32) -> libc::sock_filter {
    instruction(LOAD, 0, 0, offset)
}

fn compare(value: u32, if_equal: u8, if_not: u8) -> libc::sock_filter {
    instruction(IF_EQUAL, if_equal, if_not, value)
}

fn ret(action: u32) -> libc::sock_filter {
    instruction(RETURN, 0, 0, action)
}

fn instruction(code: u16, jt: u8, jf: u8, k: u32) -> libc::sock_filter {
    libc::sock_filter { code, jt, jf, k }
}

/// Has the one forbidden call that a process ever makes reported on its stderr.
fn report_violations() -> io::Result<()> {
    // SAFETY: all zeros is a valid action, with an empty mask.
    let mut action: libc::sigaction = unsafe { std::mem::zeroed() };
    action.sa_sigaction = violated as *const () as usize;
    // Once; and the second call, which the handler makes, must not wait for its end.
    action.sa_flags = libc::SA_SIGINFO | libc::SA_RESETHAND | libc::SA_NODEFER;
    // SAFETY: the action is valid, and its handler calls nothing but system calls.
    let set = unsafe { libc::sigaction(libc::SIGSYS, &raw const action, ptr::null_mut()) };
    if set < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

extern "C" fn violated(_: c_int, info: *const libc::siginfo_t, _: *const c_void) {
    const BEFORE: &[u8] = b"killed by its own filter: system call ";
    // SAFETY: inside of what the kernel hands to a handler with `SA_SIGINFO`.
    let at = unsafe { info.cast::<u8>().add(SIGINFO_CALL) };
    // SAFETY: a word that the kernel has filled in for this signal.
    let mut number = unsafe { at.cast::<u32>().read_unaligned() };
    let mut text = [0u8; 64];
    text[..BEFORE.len()].copy_from_slice(BEFORE);
    let mut digits = [0u8; 11];
    let mut first = digits.len() - 1;
    digits[first] = b'\n';
    loop {
        first -= 1;
        digits[first] = b'0' + (number % 10) as u8;
        number /= 10;
        if number == 0 {
            break;
        }
    }
    let end = BEFORE.len() + digits.len() - first;
    text[BEFORE.len()..end].copy_from_slice(&digits[first..]);
    // SAFETY: so many bytes of an array. Whether anybody reads them does not matter any more.
    unsafe { libc::write(2, text.as_ptr().cast(), end) };
    // The signal has its default effect by now, whatever else the process has been made to do.
    // SAFETY: there is no such system call.
    unsafe { libc::syscall(NO_CALL) };
}

#[cfg(test)]
mod tests {
    use super::*;

    const CALLS_MAX: usize = 78;

    /// What the program says about a call: an interpreter of the few instructions it is made of.
    fn verdict(program: &[libc::sock_filter], architecture: u32, number: i64, arguments: &[u64]) -> u32 {
        let mut data = vec![number as u32, architecture, 0, 0];
        data.extend(arguments.iter().flat_map(|argument| [*argument as u32, (argument >> 32) as u32]));
        data.resize(16, 0);
        let (mut at, mut accumulator) = (0, 0);
        loop {
            let libc::sock_filter { code, jt, jf, k } = program[at];
            at += 1;
            match code {
                LOAD => accumulator = data[k as usize / 4],
                AND => accumulator &= k,
                IF_EQUAL => at += usize::from(if accumulator == k { jt } else { jf }),
                IF_AT_LEAST => at += usize::from(if accumulator >= k { jt } else { jf }),
                JUMP => at += k as usize,
                _ => return k,
            }
        }
    }

    fn says(number: i64, arguments: &[u64]) -> u32 {
        verdict(&assemble(CALLS), X86_64, number, arguments)
    }

    #[test]
    fn the_list_is_short_and_names_each_call_once_with_its_reason() {
        assert!(CALLS.len() <= CALLS_MAX, "{} system calls", CALLS.len());
        for (index, call) in CALLS.iter().enumerate() {
            assert!(!call.why.is_empty(), "{}", call.name);
            assert!(CALLS[..index].iter().all(|other| other.number != call.number), "{}", call.name);
        }
    }

    #[test]
    fn every_call_of_the_list_is_let_through_and_no_other() {
        for number in 0..1024 {
            let call = CALLS.iter().find(|call| call.number == number);
            let expected = match call.map(|call| call.rule) {
                Some(Rule::Any) => ALLOW,
                Some(Rule::Missing) => ERRNO | libc::ENOSYS as u32,
                // With arguments that nobody asked for.
                Some(Rule::Only(_)) => continue,
                None => TRAP,
            };
            assert_eq!(says(number, &[]), expected, "{number}");
        }
    }

    #[test]
    fn calls_of_other_architectures_are_refused() {
        let program = assemble(CALLS);
        assert_eq!(verdict(&program, 0x4000_0003, libc::SYS_read, &[]), TRAP, "i386");
        assert_eq!(verdict(&program, X86_64, 0x4000_0000 | libc::SYS_read, &[]), TRAP, "x32");
    }

    #[test]
    fn memory_is_never_made_executable() {
        let [exec, write] = [libc::PROT_EXEC, libc::PROT_WRITE].map(|protection| protection as u64);
        let private = libc::MAP_PRIVATE as u64;
        for call in [libc::SYS_mmap, libc::SYS_mprotect] {
            assert_eq!(says(call, &[0, 4096, write, private]), ALLOW);
            assert_eq!(says(call, &[0, 4096, write | exec, private]), TRAP);
            assert_eq!(says(call, &[0, 4096, exec, private]), TRAP);
        }
    }

    #[test]
    fn shared_memory_is_of_files_alone() {
        let write = libc::PROT_WRITE as u64;
        let [shared, anonymous, private] =
            [libc::MAP_SHARED, libc::MAP_ANONYMOUS, libc::MAP_PRIVATE].map(|flag| flag as u64);
        assert_eq!(says(libc::SYS_mmap, &[0, 4096, write, shared]), ALLOW);
        assert_eq!(says(libc::SYS_mmap, &[0, 4096, write, private | anonymous]), ALLOW);
        assert_eq!(says(libc::SYS_mmap, &[0, 4096, write, shared | anonymous]), TRAP);
    }

    #[test]
    fn every_half_of_an_argument_counts() {
        // A process id of 1 and something above it.
        let signal = libc::SIGABRT as u64;
        assert_eq!(says(libc::SYS_tgkill, &[1, 7, signal]), ALLOW);
        assert_eq!(says(libc::SYS_tgkill, &[2, 7, signal]), TRAP);
    }
}
