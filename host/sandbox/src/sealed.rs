//! Files in memory that nobody can change any more.

use std::fs::File;
use std::io::{self, Seek as _, Write as _};

use rustix::fs::{MemfdFlags, SealFlags, fcntl_add_seals, memfd_create};
use rustix::io::Errno;

/// What may be done with a sealed file besides reading it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Use {
    Reading,
    /// Executing it by its descriptor. A host may forbid that of all files in memory (`vm.memfd_noexec`): Linux
    /// `Documentation/userspace-api/mfd_noexec.rst` "Introduction of non-executable mfd".
    Executing,
}

/// A file in memory that holds `bytes` for good, at its start.
pub(crate) fn sealed(name: &str, bytes: &[u8], purpose: Use) -> io::Result<File> {
    let flags = MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING;
    let wanted = match purpose {
        Use::Reading => MemfdFlags::NOEXEC_SEAL,
        Use::Executing => MemfdFlags::EXEC,
    };
    let made = match memfd_create(name, flags | wanted) {
        // A kernel before 6.3 knows neither, and has all such files executable.
        Err(Errno::INVAL) => memfd_create(name, flags),
        made => made,
    };
    let mut file = File::from(made?);
    file.write_all(bytes)?;
    file.rewind()?;
    fcntl_add_seals(&file, SealFlags::SEAL | SealFlags::SHRINK | SealFlags::GROW | SealFlags::WRITE)?;
    Ok(file)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Read as _;
    use std::os::unix::fs::PermissionsExt as _;

    #[test]
    fn a_sealed_file_cannot_be_changed() {
        for purpose in [Use::Reading, Use::Executing] {
            let mut file = sealed("test", b"kernel", purpose).expect("memory for a few bytes");
            let mut text = String::new();
            file.read_to_string(&mut text).expect("a file in memory reads");
            assert_eq!(text, "kernel");
            file.rewind().expect("a file seeks");
            assert!(file.write_all(b"x").is_err());
            assert!(file.set_len(0).is_err());
            assert!(file.set_len(7).is_err());
            assert!(fcntl_add_seals(&file, SealFlags::FUTURE_WRITE).is_err(), "its seals are final");
        }
    }

    #[test]
    fn only_what_is_to_be_executed_can_be() {
        let mode = |purpose| {
            let file = sealed("test", b"", purpose).expect("an empty file");
            file.metadata().expect("a file").permissions().mode() & 0o111
        };
        assert_eq!(mode(Use::Reading), 0);
        assert_ne!(mode(Use::Executing), 0);
    }
}
