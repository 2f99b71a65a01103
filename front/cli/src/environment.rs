//! `-e` and `--env-file`: what the command's environment gets from the caller.

use std::ffi::{OsStr, OsString};
use std::io;
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::{Path, PathBuf};

/// The most an environment file may have; Linux takes 128 KiB for one word.
const ENV_FILE_MAX_BYTES: u64 = 1 << 20;

/// Why the environment could not be put together.
#[derive(Debug, thiserror::Error)]
pub(crate) enum EnvironmentError {
    /// A file could not be read.
    #[error("cannot read the environment file {}", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// What the system said.
        #[source]
        source: io::Error,
    },
    /// A line has no variable's name.
    #[error("{}, line {line}: {what}", path.display())]
    Line {
        /// The file.
        path: PathBuf,
        /// The line, from 1.
        line: usize,
        /// What is wrong with it.
        what: &'static str,
    },
    /// A `-e` has no name.
    #[error("-e {0:?} has no variable name")]
    Name(OsString),
}

/// Puts together the words for the environment: files first, in order, then `-e` words; a later word wins.
///
/// `look_up` answers for a word that is a name alone; a name unknown there adds nothing, as with Docker.
///
/// # Errors
/// [`EnvironmentError`] naming the file and line, or the word.
pub(crate) fn words(
    files: &[PathBuf],
    words: &[OsString],
    look_up: impl Fn(&OsStr) -> Option<OsString>,
) -> Result<Vec<OsString>, EnvironmentError> {
    let mut all = Vec::new();
    for path in files {
        let content = read(path).map_err(|source| EnvironmentError::Read { path: path.clone(), source })?;
        for (index, line) in content.split(|&byte| byte == b'\n').enumerate() {
            let line = trimmed(line);
            if line.is_empty() || line[0] == b'#' {
                continue;
            }
            let wrong = |what| EnvironmentError::Line { path: path.clone(), line: index + 1, what };
            let name = line.split(|&byte| byte == b'=').next().unwrap_or_default();
            if name.is_empty() {
                return Err(wrong("no variable name before '='"));
            }
            if name.iter().any(u8::is_ascii_whitespace) {
                return Err(wrong("a variable name has no spaces"));
            }
            if line.contains(&0) {
                return Err(wrong("a zero byte"));
            }
            all.extend(resolved(OsStr::from_bytes(line), &look_up));
        }
    }
    for word in words {
        if word.is_empty() || word.as_bytes()[0] == b'=' {
            return Err(EnvironmentError::Name(word.clone()));
        }
        all.extend(resolved(word, &look_up));
    }
    Ok(all)
}

/// Docker trims what is before the name and takes the rest of the line as it is, but for a carriage return.
fn trimmed(line: &[u8]) -> &[u8] {
    let line = line.trim_ascii_start();
    line.strip_suffix(b"\r").unwrap_or(line)
}

fn resolved(word: &OsStr, look_up: &impl Fn(&OsStr) -> Option<OsString>) -> Option<OsString> {
    if word.as_bytes().contains(&b'=') {
        return Some(word.to_owned());
    }
    let mut bytes = word.as_bytes().to_vec();
    bytes.push(b'=');
    bytes.extend_from_slice(look_up(word)?.as_bytes());
    Some(OsString::from_vec(bytes))
}

fn read(path: &Path) -> io::Result<Vec<u8>> {
    use std::io::Read;
    let mut content = Vec::new();
    std::fs::File::open(path)?.take(ENV_FILE_MAX_BYTES + 1).read_to_end(&mut content)?;
    if content.len() as u64 > ENV_FILE_MAX_BYTES {
        return Err(io::Error::new(io::ErrorKind::FileTooLarge, "more than 1 MiB"));
    }
    Ok(content)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn known(name: &OsStr) -> Option<OsString> {
        (name == "HOME").then(|| "/home/me".into())
    }

    fn from_file(content: &str) -> Result<Vec<OsString>, EnvironmentError> {
        let folder = tempfile::tempdir().expect("a temporary folder");
        let path = folder.path().join("env");
        std::fs::write(&path, content).expect("written");
        words(&[path], &[], known)
    }

    #[test]
    fn a_name_alone_takes_the_callers_value() {
        assert_eq!(words(&[], &["HOME".into(), "NOT_SET".into()], known).expect("valid"), ["HOME=/home/me"]);
    }

    #[test]
    fn an_empty_value_stays_empty() {
        assert_eq!(words(&[], &["HOME=".into()], known).expect("valid"), ["HOME="]);
    }

    #[test]
    fn a_file_keeps_quotes_and_spaces_in_values_as_docker_does() {
        let got = from_file("# comment\n\n  A=1 2 \r\nB=\"x\"\nC=a=b#c\nHOME\n").expect("valid");
        assert_eq!(got, ["A=1 2 ", "B=\"x\"", "C=a=b#c", "HOME=/home/me"]);
    }

    #[test]
    fn a_bad_line_is_named() {
        let error = from_file("A=1\nB C=2\n").expect_err("a space in a name");
        assert!(error.to_string().ends_with("line 2: a variable name has no spaces"), "{error}");
        assert!(from_file("=x").is_err());
    }

    #[test]
    fn a_word_without_a_name_is_refused() {
        assert!(matches!(words(&[], &["=x".into()], known), Err(EnvironmentError::Name(_))));
    }
}
