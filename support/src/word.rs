//! Words of commands in records.

use std::ffi::OsString;
use std::os::unix::ffi::OsStringExt as _;

/// A word of a command: text, or bytes where it is none.
#[derive(Clone, Debug, PartialEq, Eq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize), serde(untagged))]
pub enum Word {
    /// UTF-8.
    Text(String),
    /// Anything else.
    Bytes(Vec<u8>),
}

impl From<OsString> for Word {
    fn from(word: OsString) -> Self {
        match word.into_string() {
            Ok(text) => Self::Text(text),
            Err(word) => Self::Bytes(word.into_vec()),
        }
    }
}

impl From<&Word> for OsString {
    fn from(word: &Word) -> Self {
        match word {
            Word::Text(text) => text.into(),
            Word::Bytes(bytes) => Self::from_vec(bytes.clone()),
        }
    }
}

#[cfg(all(test, feature = "serde"))]
mod tests {
    use super::*;

    #[test]
    fn words_that_are_no_text_survive_a_record() {
        let words = [OsString::from("plain"), OsString::from_vec(vec![b'a', 0xff, b'b'])];
        let argv: Vec<Word> = words.iter().cloned().map(Word::from).collect();
        let text = serde_json::to_string(&argv).expect("JSON");
        assert_eq!(text, "[\"plain\",[97,255,98]]");
        let read: Vec<Word> = serde_json::from_str(&text).expect("words");
        assert_eq!(read.iter().map(OsString::from).collect::<Vec<_>>(), words);
    }
}
