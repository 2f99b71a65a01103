//! Reading without touching more memory than there is to read.

use alloc::vec::Vec;

use rustix::fd::AsFd;
use rustix::io::Errno;

/// Appends at most `room` bytes of `file` to `buffer`, by one read(2); returns how many.
///
/// The room is not written to beforehand: a page nothing is read into stays untouched, which in a guest that was
/// restored from a snapshot is a page nobody has to copy.
///
/// # Errors
/// What read(2) reports.
pub fn read_onto(file: impl AsFd, buffer: &mut Vec<u8>, room: usize) -> Result<usize, Errno> {
    buffer.reserve(room);
    let space = &mut buffer.spare_capacity_mut()[..room];
    let (read, _) = rustix::io::read(file, space)?;
    let bytes = read.len();
    // SAFETY: `reserve` made room for `room` bytes and more, of which read(2) has initialized the first `bytes`.
    unsafe { buffer.set_len(buffer.len() + bytes) };
    Ok(bytes)
}

#[cfg(test)]
mod tests {
    extern crate std;
    use super::*;
    use std::io::Write as _;

    #[test]
    fn what_is_read_is_appended_and_no_more_than_asked_for() {
        let (read, mut write) = std::io::pipe().expect("a pipe");
        write.write_all(b"abcdef").expect("a pipe takes 6 bytes");
        let mut buffer = Vec::from(*b"> ");
        assert_eq!(read_onto(&read, &mut buffer, 4), Ok(4));
        assert_eq!(buffer, b"> abcd");
        assert_eq!(read_onto(&read, &mut buffer, 4), Ok(2));
        drop(write);
        assert_eq!(read_onto(&read, &mut buffer, 4), Ok(0));
        assert_eq!(buffer, b"> abcdef");
    }
}
