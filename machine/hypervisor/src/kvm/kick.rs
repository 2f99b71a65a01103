//! How one thread ends another's `KVM_RUN`.
//!
//! Two things together lose no race: the `immediate_exit` byte of the run page ends a run that is about to start, and a
//! signal ends one that has started. Linux `Documentation/virt/kvm/api.rst` §5 "The `kvm_run` structure".

use std::cell::Cell;
use std::ffi::c_int;
use std::mem::offset_of;
use std::os::fd::AsFd;
use std::ptr::{self, NonNull};
use std::sync::atomic::{AtomicI32, AtomicU8, Ordering};
use std::sync::{Arc, Once};

use kvm_bindings::{
    KVM_INTERNAL_ERROR_EMULATION, KVM_INTERNAL_ERROR_EMULATION_FLAG_INSTRUCTION_BYTES, kvm_run,
};
use rustix::mm::{MapFlags, ProtFlags};

use crate::{Error, InternalError, Kick};

const RUN_PAGE_BYTES: usize = 4096;
const _: () = assert!(offset_of!(kvm_run, immediate_exit) < RUN_PAGE_BYTES);

/// Ends a vCPU's run from another thread.
#[derive(Clone, Debug)]
pub struct KvmKick {
    shared: Arc<Shared>,
}

/// What the vCPU and everybody who may kick it hold in common.
#[derive(Debug)]
struct Shared {
    /// A second mapping of the first page of the vCPU's run structure, so that a kick that outlives the vCPU is harmless.
    page: NonNull<u8>,
    /// The thread that runs the vCPU, 0 before its first run.
    thread: AtomicI32,
}

// SAFETY: the page is only touched through the atomic that `immediate_exit` returns, and unmapped when the last handle
// is gone.
unsafe impl Send for Shared {}
// SAFETY: as above.
unsafe impl Sync for Shared {}

impl KvmKick {
    /// The handle for the vCPU behind `fd`.
    pub(super) fn new(fd: impl AsFd) -> Result<Self, Error> {
        // SAFETY: a fresh mapping at an address the kernel chooses; nothing else refers to it.
        let page = unsafe {
            rustix::mm::mmap(
                ptr::null_mut(),
                RUN_PAGE_BYTES,
                ProtFlags::READ | ProtFlags::WRITE,
                MapFlags::SHARED,
                fd,
                0,
            )
        }
        .map_err(|errno| Error::Call { call: "mmap of a vCPU's run page", source: errno.into() })?;
        let page = NonNull::new(page.cast::<u8>()).expect("the kernel maps nothing at address 0 unasked");
        Ok(Self { shared: Arc::new(Shared { page, thread: AtomicI32::new(0) }) })
    }

    /// Notes that the calling thread is about to run the vCPU.
    pub(super) fn enter(&self) {
        thread_local! {
            static THREAD: Cell<i32> = const { Cell::new(0) };
        }
        let mut thread = THREAD.get();
        if thread == 0 {
            thread = rustix::thread::gettid().as_raw_nonzero().get();
            THREAD.set(thread);
        }
        if self.shared.thread.load(Ordering::Relaxed) != thread {
            // Sequentially consistent with the kick: either it sees this thread and signals it, or we see its byte.
            self.shared.thread.store(thread, Ordering::SeqCst);
        }
    }

    /// Notes that a kick was answered.
    pub(super) fn answered(&self) {
        self.shared.immediate_exit().store(0, Ordering::SeqCst);
    }

    /// The number of the exit the vCPU stopped with. Called by the thread that runs it, between runs.
    pub(super) fn exit_reason(&self) -> u32 {
        self.shared.read(offset_of!(kvm_run, exit_reason))
    }

    /// What KVM says of the internal error the vCPU stopped with. Called by the thread that runs it, between runs.
    pub(super) fn internal_error(&self) -> InternalError {
        const DATA: usize = offset_of!(kvm_run, __bindgen_anon_1);
        let suberror = self.shared.read::<u32>(DATA);
        let words = self.shared.read::<u32>(DATA + 4);
        let flags = self.shared.read::<u64>(DATA + 8);
        let mut error = InternalError { suberror, ..InternalError::default() };
        // Linux `Documentation/virt/kvm/api.rst` §5, "KVM_EXIT_INTERNAL_ERROR": one word of flags, then a length and
        // up to 15 bytes.
        let has_bytes = flags & u64::from(KVM_INTERNAL_ERROR_EMULATION_FLAG_INSTRUCTION_BYTES) != 0;
        if suberror == KVM_INTERNAL_ERROR_EMULATION && words >= 3 && has_bytes {
            error.instruction_len = self.shared.read::<u8>(DATA + 16).min(15);
            error.instruction = self.shared.read(DATA + 17);
        }
        error
    }
}

impl Shared {
    /// Copies a plain value out of the run structure's first page.
    fn read<T: Plain>(&self, offset: usize) -> T {
        assert!(offset + size_of::<T>() <= RUN_PAGE_BYTES, "offsets are constants of this module");
        // SAFETY: the value lies inside the mapped page (checked above).
        let at = unsafe { self.page.add(offset) };
        // SAFETY: readable, of any alignment, and every bit pattern is a `T`; only the kernel writes it, and only
        // while the vCPU runs.
        unsafe { at.cast::<T>().read_unaligned() }
    }

    fn immediate_exit(&self) -> &AtomicU8 {
        // SAFETY: the offset lies inside the mapped page (asserted above).
        let byte = unsafe { self.page.add(offset_of!(kvm_run, immediate_exit)) };
        // SAFETY: the byte is mapped as long as `self` lives, and everybody but the kernel touches it through this
        // atomic only; the kernel reads it once per run (`READ_ONCE`).
        unsafe { AtomicU8::from_ptr(byte.as_ptr()) }
    }
}

impl Kick for KvmKick {
    fn kick(&self) {
        self.shared.immediate_exit().store(1, Ordering::SeqCst);
        let thread = self.shared.thread.load(Ordering::SeqCst);
        if thread != 0 {
            // SAFETY: a plain system call without pointers. The worst a stale thread id does is send our own signal,
            // which does nothing, to another thread of this process; an id that is gone is an error to ignore.
            unsafe { libc::syscall(libc::SYS_tgkill, std::process::id(), thread, signal()) };
        }
    }
}

impl Drop for Shared {
    fn drop(&mut self) {
        // SAFETY: the mapping is ours and nothing refers to it any more. A failure leaks a page.
        let _ = unsafe { rustix::mm::munmap(self.page.as_ptr().cast(), RUN_PAGE_BYTES) };
    }
}

/// Types of which every bit pattern is a value.
trait Plain: Copy {}
impl Plain for u8 {}
impl Plain for u32 {}
impl Plain for u64 {}
impl Plain for [u8; 15] {}

/// The signal that ends a run. Its only effect is that a blocking system call returns `EINTR`.
fn signal() -> c_int {
    libc::SIGRTMIN()
}

/// Makes [`signal`] interrupt and do nothing else. Once per process.
pub(super) fn install_handler() {
    static INSTALLED: Once = Once::new();
    extern "C" fn nothing(_: c_int) {}
    INSTALLED.call_once(|| {
        // SAFETY: all zeros is a valid `sigaction`: no flags (so no `SA_RESTART`), an empty mask.
        let mut action: libc::sigaction = unsafe { std::mem::zeroed() };
        action.sa_sigaction = nothing as *const () as usize;
        // SAFETY: the action is valid and its handler does nothing, which is safe in any context.
        let result = unsafe { libc::sigaction(signal(), &raw const action, ptr::null_mut()) };
        assert_eq!(result, 0, "sigaction fails only for an invalid signal or pointer");
    });
}
