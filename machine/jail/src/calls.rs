//! The system calls a monitor may make, and why.

use std::ffi::c_long;

/// A system call of the list.
#[derive(Clone, Copy, Debug)]
pub struct Call {
    /// Its name.
    pub name: &'static str,
    /// Its number.
    pub number: c_long,
    /// When it is let through.
    pub rule: Rule,
    /// What a monitor needs it for.
    pub why: &'static str,
}

/// When a system call is let through.
#[derive(Clone, Copy, Debug)]
pub enum Rule {
    /// Always.
    Any,
    /// When all of one of these lists is true.
    Only(&'static [&'static [Need]]),
    /// Never, but the program is told that the kernel has no such call, and goes another way.
    Missing,
}

/// Something that must be true of an argument: of its bits in `mask`, exactly those of `value` are set.
#[derive(Clone, Copy, Debug)]
pub struct Need {
    /// Which argument, from 0.
    pub argument: u8,
    /// The bits that are looked at.
    pub mask: u64,
    /// What they must be.
    pub value: u64,
}

const fn any(name: &'static str, number: c_long, why: &'static str) -> Call {
    Call { name, number, rule: Rule::Any, why }
}

const fn only(
    name: &'static str,
    number: c_long,
    rule: &'static [&'static [Need]],
    why: &'static str,
) -> Call {
    Call { name, number, rule: Rule::Only(rule), why }
}

const fn is(argument: u8, value: u64) -> Need {
    Need { argument, mask: u32::MAX as u64, value }
}

const fn has(argument: u8, mask: u64, value: u64) -> Need {
    Need { argument, mask, value }
}

const NOT_EXECUTABLE: Need = has(2, libc::PROT_EXEC as u64, 0);
/// Memory of this process alone, or a file; memory shared with nobody would escape the limits.
const MAPPINGS: &[&[Need]] = &[
    &[NOT_EXECUTABLE, has(3, libc::MAP_SHARED as u64, 0)],
    &[NOT_EXECUTABLE, has(3, (libc::MAP_SHARED | libc::MAP_ANONYMOUS) as u64, libc::MAP_SHARED as u64)],
];
/// What a thread is made with by the C library: everything shared. Linux man page clone(2).
const THREAD: u64 = (libc::CLONE_VM
    | libc::CLONE_FS
    | libc::CLONE_FILES
    | libc::CLONE_SIGHAND
    | libc::CLONE_THREAD
    | libc::CLONE_SYSVSEM
    | libc::CLONE_SETTLS
    | libc::CLONE_PARENT_SETTID
    | libc::CLONE_CHILD_CLEARTID) as u64;
/// The process id of every monitor, in its own namespace.
const SELF: u64 = 1;
/// The signals at the start of the real-time ones: what the C library keeps for itself (33), and what ends a vCPU's run.
const SIGNAL_OF_LIBC: u64 = 33;
const SIGNAL_OF_VCPUS: u64 = 34;
const UFFD_USER_MODE_ONLY: u64 = 1;
const WATCH: u64 = (libc::O_CLOEXEC | libc::O_NONBLOCK) as u64 | UFFD_USER_MODE_ONLY;
const PUNCH_HOLE: u64 = (libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE) as u64;

/// All of them.
pub const CALLS: &[Call] = &[
    only("ioctl", libc::SYS_ioctl, IOCTLS, "KVM, and which pages were written"),
    any("futex", libc::SYS_futex, "locks, and waiting for threads"),
    any("read", libc::SYS_read, "event descriptors, streams of the host, snapshots"),
    any("write", libc::SYS_write, "the same, and warnings on stderr"),
    any("epoll_pwait", libc::SYS_epoll_pwait, "waiting for streams of the host"),
    any("ppoll", libc::SYS_ppoll, "waiting for the host's orders"),
    any("pread64", libc::SYS_pread64, "disks, kernels, page tables"),
    any("pwrite64", libc::SYS_pwrite64, "saved memory"),
    any("preadv", libc::SYS_preadv, "disks, straight into the guest"),
    any("pwritev", libc::SYS_pwritev, "disks, straight from the guest"),
    any("fdatasync", libc::SYS_fdatasync, "a guest's flush of its disk"),
    any("sendto", libc::SYS_sendto, "streams to the host"),
    any("sendmsg", libc::SYS_sendmsg, "events, and streams to the host"),
    any("recvmsg", libc::SYS_recvmsg, "orders with their files, and streams from the host"),
    any("shutdown", libc::SYS_shutdown, "the end of one direction of a stream"),
    any("epoll_ctl", libc::SYS_epoll_ctl, "which streams to wait for"),
    any("epoll_create1", libc::SYS_epoll_create1, "the same, once a machine"),
    any("eventfd2", libc::SYS_eventfd2, "waking threads"),
    any("close", libc::SYS_close, "files and streams that are done with"),
    only("fcntl", libc::SYS_fcntl, FCNTLS, "another descriptor for a file; a check of the standard library"),
    only(
        "getsockopt",
        libc::SYS_getsockopt,
        &[&[is(1, libc::SOL_SOCKET as u64), is(2, libc::SO_TYPE as u64)]],
        "whether standard input is a channel",
    ),
    only(
        "statx",
        libc::SYS_statx,
        &[&[has(2, libc::AT_EMPTY_PATH as u64, libc::AT_EMPTY_PATH as u64)]],
        "how long a file is that it has",
    ),
    any("lseek", libc::SYS_lseek, "holes in saved memory"),
    any("ftruncate", libc::SYS_ftruncate, "the length of a file of saved memory"),
    only("fallocate", libc::SYS_fallocate, &[&[is(1, PUNCH_HOLE)]], "what a guest discards of its disk"),
    any("fadvise64", libc::SYS_fadvise64, "pages of a file that are not needed again"),
    only("mmap", libc::SYS_mmap, MAPPINGS, "guest memory, stacks, heaps, a vCPU's page"),
    any("munmap", libc::SYS_munmap, "the same, given back"),
    any("mremap", libc::SYS_mremap, "a large buffer that grows"),
    any("brk", libc::SYS_brk, "the heap"),
    only("mprotect", libc::SYS_mprotect, &[&[NOT_EXECUTABLE]], "guard pages of stacks, and heaps that grow"),
    only(
        "madvise",
        libc::SYS_madvise,
        &[&[is(2, libc::MADV_DONTNEED as u64)]],
        "the stack of a thread that has ended",
    ),
    only(
        "userfaultfd",
        libc::SYS_userfaultfd,
        &[&[is(0, WATCH)]],
        "which pages a guest writes while it is saved",
    ),
    only("clone", libc::SYS_clone, &[&[is(0, THREAD)]], "threads for vCPUs and devices"),
    Call {
        name: "clone3",
        number: libc::SYS_clone3,
        rule: Rule::Missing,
        why: "the C library tries it first; its flags are in memory, where no filter sees them",
    },
    any("set_robust_list", libc::SYS_set_robust_list, "the start of a thread"),
    any("rseq", libc::SYS_rseq, "the start of a thread"),
    any("sigaltstack", libc::SYS_sigaltstack, "the start and end of a thread"),
    any("sched_getaffinity", libc::SYS_sched_getaffinity, "the start of a thread, by the C library"),
    any("sched_yield", libc::SYS_sched_yield, "a lock that is about to be free"),
    any("gettid", libc::SYS_gettid, "which thread runs a vCPU"),
    any("getpid", libc::SYS_getpid, "signals to itself"),
    only("prctl", libc::SYS_prctl, &[&[is(0, libc::PR_SET_NAME as u64)]], "the name of a thread"),
    any("rt_sigprocmask", libc::SYS_rt_sigprocmask, "the start and end of a thread"),
    only("rt_sigaction", libc::SYS_rt_sigaction, HANDLERS, "the first thread, by the C library; a crash"),
    only(
        "setitimer",
        libc::SYS_setitimer,
        &[&[is(0, libc::ITIMER_REAL as u64)]],
        "a limit to a guest's first answer",
    ),
    any("rt_sigreturn", libc::SYS_rt_sigreturn, "the end of a signal's handler"),
    only(
        "tgkill",
        libc::SYS_tgkill,
        &[&[is(0, SELF), is(2, SIGNAL_OF_VCPUS)], &[is(0, SELF), is(2, libc::SIGABRT as u64)]],
        "ending a vCPU's run; a crash",
    ),
    any("restart_syscall", libc::SYS_restart_syscall, "a wait with a limit, after the process was stopped"),
    any("clock_gettime", libc::SYS_clock_gettime, "time, where the kernel has no faster way"),
    any("getrandom", libc::SYS_getrandom, "the guest's random numbers, and keys of hash tables"),
    only(
        "prlimit64",
        libc::SYS_prlimit64,
        LIMITS,
        "the memory and the files of the machine, once its size is known",
    ),
    any("exit", libc::SYS_exit, "the end of a thread"),
    any("exit_group", libc::SYS_exit_group, "the end"),
];

const FCNTLS: &[&[Need]] = &[&[is(1, libc::F_DUPFD_CLOEXEC as u64)], &[is(1, libc::F_GETFD as u64)]];
const HANDLERS: &[&[Need]] = &[
    &[is(0, SIGNAL_OF_LIBC)],
    &[is(0, libc::SIGABRT as u64)],
    &[is(0, libc::SIGSEGV as u64)],
    &[is(0, libc::SIGBUS as u64)],
];
const LIMITS: &[&[Need]] = &[
    &[is(0, 0), is(1, libc::RLIMIT_AS as u64)],
    &[is(0, 0), is(1, libc::RLIMIT_DATA as u64)],
    &[is(0, 0), is(1, libc::RLIMIT_FSIZE as u64)],
];

const NONE: u64 = 0;
const WRITE: u64 = 1;
const READ: u64 = 2;
const KVM: u64 = 0xae;

/// The number of an `ioctl` request. Linux `include/uapi/asm-generic/ioctl.h`.
const fn request(direction: u64, kind: u64, number: u64, bytes: u64) -> Need {
    is(1, direction << 30 | bytes << 16 | kind << 8 | number)
}

const fn kvm(direction: u64, number: u64, bytes: u64) -> Need {
    request(direction, KVM, number, bytes)
}

/// The requests, the most frequent first. Linux `include/uapi/linux/kvm.h`, `userfaultfd.h`, `fs.h`.
const IOCTLS: &[&[Need]] = &[
    &[kvm(NONE, 0x80, 0)],                    // KVM_RUN
    &[kvm(WRITE, 0xa5, 32)],                  // KVM_SIGNAL_MSI
    &[kvm(READ, 0x81, 144)],                  // KVM_GET_REGS
    &[kvm(WRITE, 0x82, 144)],                 // KVM_SET_REGS
    &[kvm(READ, 0x83, 312)],                  // KVM_GET_SREGS
    &[kvm(WRITE, 0x84, 312)],                 // KVM_SET_SREGS
    &[kvm(READ, 0x9f, 64)],                   // KVM_GET_VCPU_EVENTS
    &[kvm(WRITE, 0xa0, 64)],                  // KVM_SET_VCPU_EVENTS
    &[kvm(READ, 0xa4, 4096)],                 // KVM_GET_XSAVE
    &[kvm(WRITE, 0xa5, 4096)],                // KVM_SET_XSAVE
    &[kvm(READ, 0xa6, 392)],                  // KVM_GET_XCRS
    &[kvm(WRITE, 0xa7, 392)],                 // KVM_SET_XCRS
    &[kvm(READ | WRITE, 0x88, 8)],            // KVM_GET_MSRS
    &[kvm(WRITE, 0x89, 8)],                   // KVM_SET_MSRS
    &[kvm(READ, 0x8e, 1024)],                 // KVM_GET_LAPIC
    &[kvm(WRITE, 0x8f, 1024)],                // KVM_SET_LAPIC
    &[kvm(READ, 0xa1, 128)],                  // KVM_GET_DEBUGREGS
    &[kvm(WRITE, 0xa2, 128)],                 // KVM_SET_DEBUGREGS
    &[kvm(READ, 0x98, 4)],                    // KVM_GET_MP_STATE
    &[kvm(WRITE, 0x99, 4)],                   // KVM_SET_MP_STATE
    &[kvm(NONE, 0xa3, 0)],                    // KVM_GET_TSC_KHZ
    &[kvm(NONE, 0xad, 0)],                    // KVM_KVMCLOCK_CTRL
    &[kvm(WRITE, 0x90, 8)],                   // KVM_SET_CPUID2
    &[kvm(READ, 0x7c, 48)],                   // KVM_GET_CLOCK
    &[kvm(WRITE, 0x7b, 48)],                  // KVM_SET_CLOCK
    &[kvm(READ | WRITE, 0x05, 8)],            // KVM_GET_SUPPORTED_CPUID
    &[kvm(NONE, 0x01, 0)],                    // KVM_CREATE_VM
    &[kvm(NONE, 0x04, 0)],                    // KVM_GET_VCPU_MMAP_SIZE
    &[kvm(WRITE, 0x46, 32)],                  // KVM_SET_USER_MEMORY_REGION
    &[kvm(NONE, 0x47, 0)],                    // KVM_SET_TSS_ADDR
    &[kvm(WRITE, 0xa3, 104)],                 // KVM_ENABLE_CAP
    &[kvm(NONE, 0x41, 0)],                    // KVM_CREATE_VCPU
    &[request(READ | WRITE, 0x66, 16, 96)],   // PAGEMAP_SCAN
    &[request(READ | WRITE, 0xaa, 0x3f, 24)], // UFFDIO_API
    &[request(READ | WRITE, 0xaa, 0x00, 32)], // UFFDIO_REGISTER
    &[request(WRITE, 0x94, 9, 4)],            // FICLONE
];
