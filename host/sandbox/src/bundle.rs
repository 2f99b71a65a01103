//! The guest bundle: the kernel every machine boots and the initramfs that holds the agent.

use std::fs::File;
use std::io::{self, Seek, Write};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use kiln_support::digest::{Digest, Hasher};
use rustix::fs::{MemfdFlags, SealFlags};

/// The kernel's file name in a bundle's folder.
pub const KERNEL_FILE: &str = "vmlinux";
/// The initramfs's file name in a bundle's folder.
pub const INITRAMFS_FILE: &str = "initramfs.cpio";
/// The environment variable that names a bundle's folder.
pub const GUEST_DIR_VARIABLE: &str = "KILN_GUEST_DIR";
/// The folder looked for beside the executable.
pub const GUEST_DIR_NAME: &str = "kiln-guest";

/// A guest kernel and an initramfs with the agent, as open files.
#[derive(Debug)]
pub struct GuestBundle {
    kernel: File,
    initramfs: File,
}

/// Why there is no guest to boot.
#[derive(Debug, thiserror::Error)]
pub enum BundleError {
    /// No bundle was found in any of the places.
    #[error("no guest kernel and agent found (looked in {})", places(looked_in))]
    Missing {
        /// Where it was looked for.
        looked_in: Vec<PathBuf>,
    },
    /// A file of the bundle cannot be opened or read.
    #[error("cannot read {}", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// What the system said.
        #[source]
        source: io::Error,
    },
    /// The bytes built into the program could not be put into a file in memory.
    #[error("cannot put the guest into a file in memory")]
    Memory(#[source] io::Error),
}

impl BundleError {
    /// What would help.
    pub fn hint(&self) -> Option<String> {
        match self {
            Self::Missing { .. } => Some(format!(
                "build with `cargo xtask build`, which puts the guest into the binary, or set {GUEST_DIR_VARIABLE} to a \
                 folder with {KERNEL_FILE} and {INITRAMFS_FILE}"
            )),
            _ => None,
        }
    }
}

fn places(paths: &[PathBuf]) -> String {
    paths.iter().map(|path| path.display().to_string()).collect::<Vec<_>>().join(", ")
}

impl GuestBundle {
    /// Opens the two files of a bundle's folder.
    ///
    /// # Errors
    /// [`BundleError::Read`] naming the file.
    pub fn from_dir(folder: &Path) -> Result<Self, BundleError> {
        Ok(Self { kernel: open(&folder.join(KERNEL_FILE))?, initramfs: open(&folder.join(INITRAMFS_FILE))? })
    }

    /// Puts a bundle that is part of a program into sealed files in memory, which a monitor can be handed.
    ///
    /// # Errors
    /// [`BundleError::Memory`] when the host has no memory or descriptors left.
    pub fn from_bytes(kernel: &[u8], initramfs: &[u8]) -> Result<Self, BundleError> {
        let sealed = |name: &str, bytes: &[u8]| sealed(name, bytes).map_err(BundleError::Memory);
        Ok(Self { kernel: sealed("kiln-kernel", kernel)?, initramfs: sealed("kiln-initramfs", initramfs)? })
    }

    /// Finds a bundle: in the folder [`GUEST_DIR_VARIABLE`] names, else in `kiln-guest/` beside the executable.
    ///
    /// # Errors
    /// [`BundleError::Missing`] with the places, or [`BundleError::Read`] when the folder named by the environment
    /// is not whole.
    pub fn find() -> Result<Self, BundleError> {
        if let Some(folder) = std::env::var_os(GUEST_DIR_VARIABLE).filter(|folder| !folder.is_empty()) {
            return Self::from_dir(Path::new(&folder));
        }
        let beside = std::env::current_exe()
            .ok()
            .and_then(|executable| Some(executable.parent()?.join(GUEST_DIR_NAME)))
            .unwrap_or_else(|| GUEST_DIR_NAME.into());
        if beside.join(KERNEL_FILE).exists() {
            return Self::from_dir(&beside);
        }
        Err(BundleError::Missing { looked_in: vec![beside] })
    }

    /// The same agent on another kernel: ELF with a PVH note, or bzImage.
    ///
    /// # Errors
    /// [`BundleError::Read`] when it cannot be opened. Whether it is a kernel is seen when it boots.
    pub fn with_kernel(self, path: &Path) -> Result<Self, BundleError> {
        Ok(Self { kernel: open(path)?, ..self })
    }

    /// The kernel.
    pub fn kernel(&self) -> &File {
        &self.kernel
    }

    /// The initramfs with the agent.
    pub fn initramfs(&self) -> &File {
        &self.initramfs
    }

    /// The SHA-256 of the kernel and of the initramfs: what the guest side of a build is known by.
    ///
    /// # Errors
    /// What reading the files gave.
    pub fn digests(&self) -> io::Result<(Digest, Digest)> {
        Ok((digest(&self.kernel)?, digest(&self.initramfs)?))
    }
}

fn open(path: &Path) -> Result<File, BundleError> {
    let read_error = |source| BundleError::Read { path: path.into(), source };
    let file = File::open(path).map_err(read_error)?;
    if !file.metadata().map_err(read_error)?.is_file() {
        return Err(read_error(io::Error::new(io::ErrorKind::InvalidInput, "not a regular file")));
    }
    Ok(file)
}

fn sealed(name: &str, bytes: &[u8]) -> io::Result<File> {
    let mut file =
        File::from(rustix::fs::memfd_create(name, MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING)?);
    file.write_all(bytes)?;
    file.rewind()?;
    rustix::fs::fcntl_add_seals(
        &file,
        SealFlags::SEAL | SealFlags::SHRINK | SealFlags::GROW | SealFlags::WRITE,
    )?;
    Ok(file)
}

fn digest(file: &File) -> io::Result<Digest> {
    let mut hasher = Hasher::new();
    let mut buffer = vec![0; 64 << 10];
    let mut offset = 0;
    loop {
        let count = file.read_at(&mut buffer, offset)?;
        if count == 0 {
            return Ok(hasher.finish());
        }
        hasher.update(&buffer[..count]);
        offset += count as u64;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Read;

    #[test]
    fn a_bundle_from_bytes_cannot_be_changed() {
        let bundle = GuestBundle::from_bytes(b"kernel", b"initramfs").expect("memory for a few bytes");
        let mut text = String::new();
        bundle.kernel().read_to_string(&mut text).expect("a file in memory reads");
        assert_eq!(text, "kernel");
        assert!(bundle.kernel().write_all(b"x").is_err());
        assert!(bundle.initramfs().set_len(0).is_err());
    }

    #[test]
    fn digests_are_of_the_whole_files() {
        let bundle = GuestBundle::from_bytes(b"kernel", b"").expect("memory for a few bytes");
        assert_eq!(bundle.digests().expect("files in memory read").0, Digest::of(b"kernel"));
        assert_eq!(bundle.digests().expect("files in memory read").0, Digest::of(b"kernel"));
    }

    #[test]
    fn an_incomplete_folder_names_the_file() {
        let folder = tempfile::tempdir().expect("a temporary folder");
        std::fs::write(folder.path().join(KERNEL_FILE), b"x").expect("written");
        let error = GuestBundle::from_dir(folder.path()).expect_err("no initramfs");
        assert!(error.to_string().ends_with("initramfs.cpio"), "{error}");
    }
}
