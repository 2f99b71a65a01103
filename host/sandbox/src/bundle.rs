//! The guest bundle: the kernel every machine boots and the initramfs that holds the agent.

use std::fs::{File, Permissions};
use std::io;
use std::os::unix::fs::{FileExt, MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};

use kiln_support::digest::{Digest, Hasher};

use crate::sealed::{Use, sealed};

/// The kernel's file name in a bundle's folder.
pub const KERNEL_FILE: &str = "vmlinux";
/// The initramfs's file name in a bundle's folder.
pub const INITRAMFS_FILE: &str = "initramfs.cpio";
/// The environment variable that names a bundle's folder.
pub const GUEST_DIR_VARIABLE: &str = "KILN_GUEST_DIR";
/// The folder looked for beside the executable.
pub const GUEST_DIR_NAME: &str = "kiln-guest";

/// A guest kernel and an initramfs with the agent.
///
/// Nothing is read of either before a machine boots: one that is restored needs neither.
#[derive(Debug)]
pub struct GuestBundle {
    kernel: Part,
    initramfs: Part,
}

/// A part of a bundle that is built into a program.
#[derive(Clone, Copy, Debug)]
pub struct BuiltIn {
    /// Its content.
    pub bytes: &'static [u8],
    /// The SHA-256 of the content.
    pub sha256: Digest,
}

impl BuiltIn {
    /// Writes the part to a file, which is whole or not there, and replaced if it is. `executable` for a program.
    ///
    /// # Errors
    /// What the file system says.
    pub fn write(&self, path: &Path, executable: bool) -> io::Result<()> {
        kiln_support::durable::write(path, self.bytes)?;
        if executable {
            std::fs::set_permissions(path, Permissions::from_mode(0o755))?;
        }
        Ok(())
    }
}

/// One of the two.
#[derive(Debug)]
enum Part {
    File(File),
    BuiltIn(BuiltIn),
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

pub(crate) fn places(paths: &[PathBuf]) -> String {
    paths.iter().map(|path| path.display().to_string()).collect::<Vec<_>>().join(", ")
}

impl GuestBundle {
    /// Another handle on the same bundle.
    ///
    /// # Errors
    /// [`BundleError::Memory`] when the host has no descriptor left.
    pub fn try_clone(&self) -> Result<Self, BundleError> {
        let part = |part: &Part| match part {
            Part::File(file) => file.try_clone().map(Part::File).map_err(BundleError::Memory),
            Part::BuiltIn(built_in) => Ok(Part::BuiltIn(*built_in)),
        };
        Ok(Self { kernel: part(&self.kernel)?, initramfs: part(&self.initramfs)? })
    }

    /// Opens the two files of a bundle's folder.
    ///
    /// # Errors
    /// [`BundleError::Read`] naming the file.
    pub fn from_dir(folder: &Path) -> Result<Self, BundleError> {
        let open = |name: &str| open(&folder.join(name)).map(Part::File);
        Ok(Self { kernel: open(KERNEL_FILE)?, initramfs: open(INITRAMFS_FILE)? })
    }

    /// A bundle that is part of a program.
    pub fn built_in(kernel: BuiltIn, initramfs: BuiltIn) -> Self {
        Self { kernel: Part::BuiltIn(kernel), initramfs: Part::BuiltIn(initramfs) }
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
        Ok(Self { kernel: Part::File(open(path)?), ..self })
    }

    /// The kernel, as a file that a monitor can be handed: one in memory, made anew each time, when it is built in.
    ///
    /// # Errors
    /// [`BundleError::Memory`] when the host has no memory or descriptors left.
    pub fn kernel(&self) -> Result<File, BundleError> {
        self.kernel.file("kiln-kernel")
    }

    /// The initramfs with the agent, likewise.
    ///
    /// # Errors
    /// [`BundleError::Memory`] when the host has no memory or descriptors left.
    pub fn initramfs(&self) -> Result<File, BundleError> {
        self.initramfs.file("kiln-initramfs")
    }

    /// What tells this bundle from any other without reading it: the digests of what is built in, and of files which they
    /// are and when they were last changed. The same bytes in another file are another bundle.
    ///
    /// # Errors
    /// What looking at the files gave.
    pub(crate) fn identity(&self) -> io::Result<Digest> {
        let mut hasher = Hasher::new();
        for part in [&self.kernel, &self.initramfs] {
            part.identify(&mut hasher)?;
        }
        Ok(hasher.finish())
    }

    /// The SHA-256 of the kernel and of the initramfs: what the guest side of a build is known by.
    ///
    /// # Errors
    /// What reading the files gave.
    pub fn digests(&self) -> io::Result<(Digest, Digest)> {
        Ok((self.kernel.digest()?, self.initramfs.digest()?))
    }
}

impl Part {
    fn file(&self, name: &str) -> Result<File, BundleError> {
        match self {
            Self::File(file) => file.try_clone(),
            Self::BuiltIn(part) => sealed(name, part.bytes, Use::Reading),
        }
        .map_err(BundleError::Memory)
    }

    fn digest(&self) -> io::Result<Digest> {
        match self {
            Self::File(file) => digest(file),
            Self::BuiltIn(part) => Ok(part.sha256),
        }
    }

    fn identify(&self, hasher: &mut Hasher) -> io::Result<()> {
        match self {
            Self::BuiltIn(part) => {
                hasher.update(b"built in");
                hasher.update(part.sha256.as_bytes());
            }
            Self::File(file) => {
                let metadata = file.metadata()?;
                hasher.update(b"file");
                for number in [metadata.dev(), metadata.ino(), metadata.len()] {
                    hasher.update(&number.to_le_bytes());
                }
                // When its content was last changed, and when anything about it was: the latter cannot be set back.
                for number in
                    [metadata.mtime(), metadata.mtime_nsec(), metadata.ctime(), metadata.ctime_nsec()]
                {
                    hasher.update(&number.to_le_bytes());
                }
            }
        }
        Ok(())
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
    use std::io::{Read, Write};

    #[test]
    fn a_bundle_from_bytes_cannot_be_changed() {
        let bundle = built_in(b"kernel", b"initramfs");
        let mut kernel = bundle.kernel().expect("memory for a few bytes");
        let mut text = String::new();
        kernel.read_to_string(&mut text).expect("a file in memory reads");
        assert_eq!(text, "kernel");
        assert!(kernel.write_all(b"x").is_err());
        assert!(bundle.initramfs().expect("memory for a few bytes").set_len(0).is_err());
    }

    fn built_in(kernel: &'static [u8], initramfs: &'static [u8]) -> GuestBundle {
        let part = |bytes| BuiltIn { bytes, sha256: Digest::of(bytes) };
        GuestBundle::built_in(part(kernel), part(initramfs))
    }

    fn folder_with(kernel: &[u8]) -> (tempfile::TempDir, GuestBundle) {
        let folder = tempfile::tempdir().expect("a temporary folder");
        std::fs::write(folder.path().join(KERNEL_FILE), kernel).expect("written");
        std::fs::write(folder.path().join(INITRAMFS_FILE), b"").expect("written");
        let bundle = GuestBundle::from_dir(folder.path()).expect("a bundle");
        (folder, bundle)
    }

    #[test]
    fn another_kernel_is_another_bundle() {
        let identity = |bundle: &GuestBundle| bundle.identity().expect("looked at");
        assert_eq!(identity(&built_in(b"kernel", b"")), identity(&built_in(b"kernel", b"")));
        assert_ne!(identity(&built_in(b"kernel", b"")), identity(&built_in(b"kerneL", b"")));
        assert_ne!(identity(&built_in(b"k", b"i")), identity(&built_in(b"i", b"k")));
        let (folder, bundle) = folder_with(b"kernel");
        let before = identity(&bundle);
        assert_eq!(before, identity(&GuestBundle::from_dir(folder.path()).expect("a bundle")));
        std::fs::write(folder.path().join(KERNEL_FILE), b"Kernel").expect("written");
        assert_ne!(before, identity(&GuestBundle::from_dir(folder.path()).expect("a bundle")));
    }

    #[test]
    fn digests_are_of_the_whole_files() {
        let (_folder, bundle) = folder_with(b"kernel");
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
