//! Reading a file whose offset others move.

use std::fs::File;
use std::io::{self, Read};
use std::os::unix::fs::FileExt;

/// Reads a file from its start. Whoever has the same open file, in this process or another, has its offset as well: this neither
/// follows that offset nor moves it.
#[derive(Debug)]
pub struct FromStart<'a> {
    file: &'a File,
    offset: u64,
}

impl<'a> FromStart<'a> {
    /// The file, of which nothing has been read.
    pub fn of(file: &'a File) -> Self {
        Self { file, offset: 0 }
    }
}

impl Read for FromStart<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let count = self.file.read_at(buffer, self.offset)?;
        self.offset += count as u64;
        Ok(count)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::{Seek, Write};

    #[test]
    fn the_offset_of_an_open_file_is_its_others() {
        let mut file = tempfile::tempfile().expect("a file");
        file.write_all(b"one two").expect("written");
        let (mut one, mut two) = (FromStart::of(&file), FromStart::of(&file));
        let mut word = [0; 3];
        one.read_exact(&mut word).expect("read");
        assert_eq!(&word, b"one");
        two.read_exact(&mut word).expect("read");
        assert_eq!(&word, b"one");
        let mut rest = Vec::new();
        one.read_to_end(&mut rest).expect("read");
        assert_eq!(rest, b" two");
        let mut file = &file;
        assert_eq!(file.stream_position().expect("it is a file"), 7);
    }
}
