//! System calls put into the mouth of another process: what a monitor could do that its guest has taken over.
//!
//! The process is the real one, unchanged; a debugger's interface stops one of its threads, has it make a call of the
//! attacker's choice, and reads what came of it. For the kernel it is the process that calls. Needs root, or whatever may trace the
//! process. Linux man page ptrace(2).
#![expect(unsafe_code, reason = "the kernel's interface for debuggers takes pointers")]

use std::fs::OpenOptions;
use std::io;
use std::os::unix::fs::FileExt as _;
use std::ptr;

use libc::{c_int, c_long, c_void, pid_t, user_regs_struct};

/// The instruction `syscall`.
const SYSCALL: [u8; 2] = [0x0f, 0x05];
/// What the x86-64 ABI keeps for a function below its stack pointer: data goes below that.
const RED_ZONE_BYTES: u64 = 128;
/// How often a thread is stopped until it is found in a system call.
const STOPS_MAX: usize = 10_000;
/// Room for all that the calls of one attacker point to.
const ROOM_BYTES: u64 = 8192;
/// `PTRACE_O_SUSPEND_SECCOMP`: the filter of system calls is out of force while we look. Linux `include/uapi/linux/ptrace.h`.
const SUSPEND_SECCOMP: c_int = 1 << 21;

/// A thread that does what it is told. It goes on where it was when this is dropped.
#[derive(Debug)]
pub struct Hostage {
    thread: pid_t,
    before: user_regs_struct,
    /// Where its `syscall` instruction is.
    instruction: u64,
    room: u64,
}

impl Hostage {
    /// Stops a thread that waits in a system call, or is about to.
    ///
    /// # Errors
    /// When it may not be traced, or does not wait in a system call.
    pub fn take(thread: i32) -> io::Result<Self> {
        Self::take_with(thread, 0)
    }

    /// The same, with its filter of system calls out of force: what other layers are there shows only so.
    ///
    /// # Errors
    /// As [`take`](Self::take), and when this process may not.
    pub fn take_without_filter(thread: i32) -> io::Result<Self> {
        Self::take_with(thread, SUSPEND_SECCOMP)
    }

    fn take_with(thread: pid_t, options: c_int) -> io::Result<Self> {
        request(libc::PTRACE_SEIZE, thread, options as usize as *mut c_void)?;
        for _ in 0..STOPS_MAX {
            request(libc::PTRACE_INTERRUPT, thread, ptr::null_mut())?;
            wait(thread)?;
            let before = registers(thread)?;
            let instruction = before.rip - SYSCALL.len() as u64;
            let room = (before.rsp - RED_ZONE_BYTES - ROOM_BYTES) & !15;
            let hostage = Self { thread, before, instruction, room };
            let mut code = [0; 2];
            hostage.memory()?.read_exact_at(&mut code, instruction)?;
            if code == SYSCALL {
                return Ok(hostage);
            }
            // On its way to where it waits.
            std::mem::forget(hostage);
            request(libc::PTRACE_CONT, thread, ptr::null_mut())?;
            std::thread::yield_now();
        }
        Err(io::Error::other("the thread does not wait in a system call"))
    }

    /// Puts data where the calls can point to it, and returns its address. What was put before is overwritten.
    ///
    /// # Errors
    /// When it does not fit.
    pub fn put(&self, data: &[u8]) -> io::Result<u64> {
        self.put_at(0, data)
    }

    /// The same, at an offset, beside other data.
    ///
    /// # Errors
    /// When it does not fit.
    pub fn put_at(&self, offset: u64, data: &[u8]) -> io::Result<u64> {
        if offset + data.len() as u64 > ROOM_BYTES {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        self.memory()?.write_all_at(data, self.room + offset)?;
        Ok(self.room + offset)
    }

    /// What is at that place.
    ///
    /// # Errors
    /// When it cannot be read.
    pub fn get(&self, offset: u64, data: &mut [u8]) -> io::Result<()> {
        self.memory()?.read_exact_at(data, self.room + offset)
    }

    /// Has the thread make a system call, and returns what came of it: a result, or the negative of an error number.
    ///
    /// # Errors
    /// When it got a signal instead, or is gone.
    pub fn call(&self, number: c_long, arguments: &[u64]) -> io::Result<i64> {
        set_registers(self.thread, &self.about_to(number, arguments))?;
        request(libc::PTRACE_SINGLESTEP, self.thread, ptr::null_mut())?;
        match wait(self.thread)? {
            libc::SIGTRAP => Ok(registers(self.thread)?.rax.cast_signed()),
            signal => Err(io::Error::other(format!("signal {signal}"))),
        }
    }

    /// Lets the thread go into a system call, with nobody who watches any more. What it does after that call is as good as random.
    ///
    /// # Errors
    /// When it is gone.
    pub fn leave_with(mut self, number: c_long, arguments: &[u64]) -> io::Result<()> {
        self.before = self.about_to(number, arguments);
        set_registers(self.thread, &self.before)
    }

    /// The system call it was stopped in, by its number and its arguments.
    pub fn waits_in(&self) -> (c_long, [u64; 6]) {
        let user_regs_struct { orig_rax, rdi, rsi, rdx, r10, r8, r9, .. } = self.before;
        (orig_rax.cast_signed(), [rdi, rsi, rdx, r10, r8, r9])
    }

    fn about_to(&self, number: c_long, arguments: &[u64]) -> user_regs_struct {
        let mut arguments = arguments.to_vec();
        arguments.resize(6, 0);
        user_regs_struct {
            rip: self.instruction,
            rax: number.cast_unsigned(),
            // So that the call it waits in is not taken up again in the middle.
            orig_rax: u64::MAX,
            rdi: arguments[0],
            rsi: arguments[1],
            rdx: arguments[2],
            r10: arguments[3],
            r8: arguments[4],
            r9: arguments[5],
            ..self.before
        }
    }

    fn memory(&self) -> io::Result<std::fs::File> {
        OpenOptions::new().read(true).write(true).open(format!("/proc/{}/mem", self.thread))
    }
}

impl Drop for Hostage {
    fn drop(&mut self) {
        // It may be gone.
        let _ = set_registers(self.thread, &self.before);
        let _ = request(libc::PTRACE_DETACH, self.thread, ptr::null_mut());
    }
}

fn request(what: libc::c_uint, thread: pid_t, data: *mut c_void) -> io::Result<()> {
    // SAFETY: of the requests of this module those with pointers point to structures that live through the call.
    let result = unsafe { libc::ptrace(what, thread, ptr::null_mut::<c_void>(), data) };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

/// Waits until the thread has stopped, and says by which signal.
fn wait(thread: pid_t) -> io::Result<c_int> {
    let mut status = 0;
    // SAFETY: a place for the status is given.
    let waited = unsafe { libc::waitpid(thread, &raw mut status, libc::__WALL) };
    if waited < 0 {
        return Err(io::Error::last_os_error());
    }
    if libc::WIFSTOPPED(status) {
        Ok(libc::WSTOPSIG(status))
    } else {
        Err(io::Error::other("the thread is gone"))
    }
}

fn registers(thread: pid_t) -> io::Result<user_regs_struct> {
    // SAFETY: a structure of numbers.
    let mut registers: user_regs_struct = unsafe { std::mem::zeroed() };
    request(libc::PTRACE_GETREGS, thread, (&raw mut registers).cast())?;
    Ok(registers)
}

fn set_registers(thread: pid_t, registers: &user_regs_struct) -> io::Result<()> {
    request(libc::PTRACE_SETREGS, thread, ptr::from_ref(registers).cast_mut().cast())
}
