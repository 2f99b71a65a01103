//! Why the agent refuses something, in words.

use alloc::format;
use alloc::string::String;

use kiln_protocol::{Failed, Reason};
use rustix::io::Errno;

/// The longest message; a path in one may be 4096 bytes.
const MAX_MESSAGE_BYTES: usize = 6 << 10;

/// A refusal of the given kind.
pub(crate) fn failed(reason: Reason, mut message: String) -> Failed {
    let mut end = message.len().min(MAX_MESSAGE_BYTES);
    while !message.is_char_boundary(end) {
        end -= 1;
    }
    message.truncate(end);
    Failed { reason: reason.into(), message }
}

/// The request is wrong.
pub(crate) fn invalid(message: String) -> Failed {
    failed(Reason::Invalid, message)
}

/// Something in the guest failed that should not: what was tried, and what the kernel said.
pub(crate) fn internal(tried: &str, error: Errno) -> Failed {
    failed(Reason::Internal, format!("cannot {tried}: {}", text(error)))
}

/// A command cannot start in `directory`, which was missing.
pub(crate) fn unusable_directory(directory: &str, error: Errno) -> Failed {
    invalid(format!("cannot make the working directory {directory}: {}", text(error)))
}

/// An error of the kernel's in words, as strerror(3) has them for the usual ones.
pub(crate) fn text(error: Errno) -> String {
    let known = match error {
        Errno::PERM => "operation not permitted",
        Errno::NOENT => "no such file or directory",
        Errno::IO => "input/output error",
        Errno::NXIO => "no such device or address",
        Errno::TOOBIG => "argument list too long",
        Errno::TIMEDOUT => "not in time",
        Errno::NOEXEC => "exec format error",
        Errno::AGAIN => "resource temporarily unavailable",
        Errno::NOMEM => "cannot allocate memory",
        Errno::ACCESS => "permission denied",
        Errno::BUSY => "device or resource busy",
        Errno::EXIST => "file exists",
        Errno::NODEV => "no such device",
        Errno::NOTDIR => "not a directory",
        Errno::ISDIR => "is a directory",
        Errno::INVAL => "invalid argument",
        Errno::MFILE | Errno::NFILE => "too many open files",
        Errno::TXTBSY => "text file busy",
        Errno::FBIG => "too large",
        Errno::NOSPC => "no space left on device",
        Errno::ROFS => "read-only file system",
        Errno::NAMETOOLONG => "file name too long",
        Errno::LOOP => "too many levels of symbolic links",
        other => return format!("error {}", other.raw_os_error()),
    };
    known.into()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_long_message_is_cut_between_characters() {
        let message = failed(Reason::Invalid, "é".repeat(MAX_MESSAGE_BYTES)).message;
        assert!(message.len() <= MAX_MESSAGE_BYTES && message.ends_with('é'));
    }
}
