//! System calls of x86-64. System V ABI AMD64 supplement, appendix A.2 "AMD64 Linux Kernel Conventions".

use core::arch::asm;
use core::ffi::c_void;

use rustix::io::Errno;

pub(super) const RT_SIGACTION: usize = 13;
pub(super) const RT_SIGPROCMASK: usize = 14;
pub(super) const IOCTL: usize = 16;
pub(super) const CONNECT: usize = 42;
pub(super) const BIND: usize = 49;
pub(super) const EXECVE: usize = 59;
pub(super) const WAIT4: usize = 61;
pub(super) const KILL: usize = 62;
pub(crate) const RT_SIGTIMEDWAIT: usize = 128;
pub(super) const RT_SIGQUEUEINFO: usize = 129;
pub(super) const PRCTL: usize = 157;
pub(super) const CLOCK_GETTIME: usize = 228;
pub(super) const EXIT_GROUP: usize = 231;
pub(super) const ACCEPT4: usize = 288;
pub(super) const CLONE3: usize = 435;
pub(super) const UNSHARE: usize = 272;
pub(super) const CLOSE_RANGE: usize = 436;

/// Makes a system call.
///
/// # Safety
/// The arguments must be what the call asks for, and pointers among them good for what it does with them.
pub(super) unsafe fn syscall(number: usize, arguments: [usize; 5]) -> Result<usize, Errno> {
    let [first, second, third, fourth, fifth] = arguments;
    let result: isize;
    // SAFETY: by the kernel's conventions only rax, rcx and r11 change; what memory does is the caller's promise.
    unsafe {
        asm!(
            "syscall",
            inlateout("rax") number as isize => result,
            in("rdi") first, in("rsi") second, in("rdx") third, in("r10") fourth, in("r8") fifth,
            lateout("rcx") _, lateout("r11") _,
            options(nostack),
        );
    }
    outcome(result)
}

/// `struct clone_args`. Linux man page clone(2).
#[repr(C)]
#[derive(Default)]
pub(super) struct CloneArguments {
    pub(super) flags: u64,
    /// Where the descriptor of the child goes, an `int`.
    pub(super) pidfd: u64,
    pub(super) child_tid: u64,
    pub(super) parent_tid: u64,
    pub(super) exit_signal: u64,
    /// The lowest address of the child's stack.
    pub(super) stack: u64,
    pub(super) stack_size: u64,
    pub(super) tls: u64,
    pub(super) set_tid: u64,
    pub(super) set_tid_size: u64,
    /// The descriptor of a control group, with `CLONE_INTO_CGROUP`.
    pub(super) cgroup: u64,
}

/// Makes a child that runs `run(argument)` on the stack `arguments` name; returns its process id.
///
/// # Safety
/// `run` must never return. With `CLONE_VM` the child works in this memory: the caller must not run before the child
/// is done with it (`CLONE_VFORK`), the stack must be memory nobody else uses, with a 16-aligned end, and `pidfd` the
/// address of a place for a descriptor. Without `CLONE_VM` the same holds for the child's copy.
pub(super) unsafe fn clone(
    arguments: &CloneArguments,
    run: extern "C" fn(*mut c_void) -> !,
    argument: *mut c_void,
) -> Result<usize, Errno> {
    let result: isize;
    // SAFETY: the child leaves this block by `call` alone, on its own stack, so it never touches this frame; in the
    // parent only rax, rcx and r11 change. The rest is the caller's promise.
    unsafe {
        asm!(
            "syscall",
            "test rax, rax",
            "jnz 2f",
            "xor ebp, ebp",
            "mov rdi, r13",
            "call r12",
            "ud2",
            "2:",
            inlateout("rax") CLONE3 as isize => result,
            in("rdi") core::ptr::from_ref(arguments), in("rsi") size_of::<CloneArguments>(),
            in("r12") run, in("r13") argument,
            lateout("rcx") _, lateout("r11") _,
        );
    }
    outcome(result)
}

/// The processor's time stamp counter.
#[inline]
pub(super) fn ticks() -> u64 {
    // SAFETY: every x86-64 processor has the instruction, and Linux lets user mode use it.
    unsafe { core::arch::x86_64::_rdtsc() }
}

fn outcome(result: isize) -> Result<usize, Errno> {
    match result {
        -4095..=-1 => Err(Errno::from_raw_os_error(-result as i32)),
        value => Ok(value as usize),
    }
}
