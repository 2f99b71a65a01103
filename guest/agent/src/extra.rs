//! Files that the host puts into the guest's root, and takes out again.
//!
//! They are written before the guest's own programs run. The image is the agent's root, so its links, however hostile, end
//! inside it; what a path names at its end is replaced or refused, and never followed.

use alloc::format;

use kiln_protocol::{Failed, MAX_FILE_BYTES, MAX_FILE_PART_BYTES, RemoveFile, WriteFile};
use rustix::io::Errno;

use crate::failure::{internal, invalid, text};
use crate::files;

/// The longest path, without the NUL that ends it. Linux man page `path_resolution(7)`.
const MAX_PATH_BYTES: usize = 4095;

/// Writes a part of a file.
pub(crate) fn write(part: &WriteFile) -> Result<(), Failed> {
    let WriteFile { path, mode, offset, contents } = part;
    check_path(path)?;
    if contents.len() > MAX_FILE_PART_BYTES {
        return Err(invalid(format!("a part of a file has more than {MAX_FILE_PART_BYTES} bytes")));
    }
    if offset.checked_add(contents.len() as u64).is_none_or(|end| end > MAX_FILE_BYTES) {
        return Err(invalid(format!("{path} has more than {MAX_FILE_BYTES} bytes")));
    }
    let written = if *offset == 0 {
        files::replace_with_mode(path, *mode, contents)
    } else {
        files::continue_with_mode(path, *mode, *offset, contents)
    };
    written.map_err(|error| refusal("write", path, error))
}

/// Removes a file.
pub(crate) fn remove(file: &RemoveFile) -> Result<(), Failed> {
    check_path(&file.path)?;
    files::remove(&file.path).map_err(|error| refusal("remove", &file.path, error))
}

/// Refuses what names no file of the guest's root.
pub(crate) fn check_path(path: &str) -> Result<(), Failed> {
    let is_file = path.starts_with('/') && !path.ends_with('/');
    if !is_file || path.len() > MAX_PATH_BYTES || path.contains('\0') {
        return Err(invalid(format!("'{path}' is not the absolute path of a file")));
    }
    Ok(())
}

/// A device that fails is the guest's fault, and all else that of the path.
fn refusal(action: &str, path: &str, error: Errno) -> Failed {
    match error {
        Errno::IO | Errno::NOMEM | Errno::MFILE | Errno::NFILE => {
            internal(&format!("{action} {path}"), error)
        }
        _ => invalid(format!("cannot {action} {path}: {}", text(error))),
    }
}
