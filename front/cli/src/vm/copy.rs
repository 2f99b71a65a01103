//! `kiln cp`.

use std::path::PathBuf;
use std::str::FromStr;

use indicatif::HumanBytes;
use kiln::detached::{Kept, Machines};
use kiln::{Copied, CopyOptions, FileError};
use rustix::stdio;
use tokio::io::AsyncWriteExt as _;

use super::args::Copy;
use crate::Context;
use crate::failure::Failure;
use crate::terminal::note;

/// The permissions of a file that comes from stdin.
const MODE: u32 = 0o644;

/// One end of a copy.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Place {
    /// stdin or stdout.
    Stream,
    /// A path of this host's.
    Here(PathBuf),
    /// A path in a VM.
    In {
        /// Its name or id.
        vm: String,
        /// From its root on.
        path: PathBuf,
    },
}

impl FromStr for Place {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        if text == "-" {
            return Ok(Self::Stream);
        }
        if text.is_empty() {
            return Err("a path has a letter at least".to_owned());
        }
        // A path of this host's with a ':' in it is told by how it begins, as with Docker.
        match text.split_once(':').filter(|_| !text.starts_with(['/', '.'])) {
            Some((_, "")) => Err("expected NAME:PATH, such as web:/etc/hosts".to_owned()),
            Some((vm, path)) => Ok(Self::In { vm: vm.to_owned(), path: PathBuf::from("/").join(path) }),
            None => Ok(Self::Here(text.into())),
        }
    }
}

/// Copies files into a VM that runs or out of it.
///
/// # Errors
/// When the places are not one here and one in a VM, or something cannot be read or written.
pub(crate) async fn copy(context: &Context, machines: &Machines, args: Copy) -> Result<(), Failure> {
    let Copy { keep_owner, from, to } = args;
    let options = CopyOptions { keep_owner, ..CopyOptions::default() };
    let copied = match (from, to) {
        (Place::Here(from), Place::In { vm, path }) => {
            machines.reach(&vm)?.copy_in(from, path, options).await?
        }
        (Place::In { vm, path }, Place::Here(to)) => machines.reach(&vm)?.copy_out(path, to, options).await?,
        (Place::Stream, Place::In { vm, path }) => {
            let stdin = tokio::io::stdin();
            let bytes = machines.reach(&vm)?.write_file(path, MODE, stdin).await?;
            Copied { files: 1, bytes, ..Copied::default() }
        }
        (Place::In { vm, path }, Place::Stream) => return print_file(&machines.reach(&vm)?, path).await,
        _ => {
            return Err(Failure::caller("one of the two is in a VM and the other is not")
                .hint("kiln cp ./app.conf web:/etc/app.conf, or the other way round"));
        }
    };
    if !context.global.quiet {
        note(&told(&copied));
    }
    Ok(())
}

/// What was copied, in one line.
fn told(copied: &Copied) -> String {
    let count = |count: u64, one: &str, many: &str| match count {
        0 => None,
        1 => Some(format!("1 {one}")),
        _ => Some(format!("{count} {many}")),
    };
    let kinds = [
        count(copied.files, "file", "files"),
        count(copied.directories, "directory", "directories"),
        count(copied.links, "link", "links"),
    ];
    let kinds: Vec<String> = kinds.into_iter().flatten().collect();
    let line = match &kinds[..] {
        [] => "copied nothing".to_owned(),
        kinds => format!("copied {}, {}", kinds.join(", "), HumanBytes(copied.bytes)),
    };
    match copied.skipped {
        0 => line,
        skipped => format!("{line}; left out {skipped} that are no files (devices, fifos, sockets)"),
    }
}

async fn print_file(vm: &Kept, path: PathBuf) -> Result<(), Failure> {
    let mut file = vm.read_file(path).await?;
    let stdout = rustix::io::fcntl_dupfd_cloexec(stdio::stdout(), 3);
    let stdout = std::fs::File::from(stdout.map_err(|errno| Failure::host(std::io::Error::from(errno)))?);
    let mut stdout = tokio::fs::File::from_std(stdout);
    let copied = async {
        tokio::io::copy(&mut file, &mut stdout).await?;
        stdout.flush().await
    };
    match copied.await {
        Err(error) if error.kind() == std::io::ErrorKind::BrokenPipe => Ok(()),
        copied => copied.map_err(|error| Failure::host(format!("cannot copy the file: {error}"))),
    }
}

impl From<FileError> for Failure {
    fn from(error: FileError) -> Self {
        let hint = match (&error, error.refusal()) {
            (_, Some(kiln::Reason::NotFound)) => {
                Some("kiln exec VM ls -l PATH shows what is there".to_owned())
            }
            (FileError::Ask(kiln::AskError::Kept(error)), _) => error.hint(),
            _ => None,
        };
        let failure = Self::new(error.blame(), error);
        match hint {
            Some(hint) => failure.hint(hint),
            None => failure,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_place_in_a_vm_has_its_name_before_it() {
        let inside = |vm: &str, path: &str| Ok(Place::In { vm: vm.into(), path: path.into() });
        assert_eq!("web:/etc/hosts".parse(), inside("web", "/etc/hosts"));
        assert_eq!("web:etc/a:b".parse(), inside("web", "/etc/a:b"));
        for here in ["./a:b", "/a:b", "../a:b", "a", "a/b"] {
            assert_eq!(here.parse(), Ok(Place::Here(here.into())));
        }
        assert_eq!("-".parse(), Ok(Place::Stream));
        assert!("".parse::<Place>().is_err());
        assert!("web:".parse::<Place>().is_err());
    }

    #[test]
    fn a_path_in_a_vm_keeps_its_last_dot() {
        let Ok(Place::In { path, .. }) = "web:/srv/.".parse() else { panic!("it is in a VM") };
        assert_eq!(path.as_os_str(), "/srv/.", "it means what is in it");
    }

    #[test]
    fn what_was_copied_is_told_in_one_line() {
        let copied = Copied { files: 1, directories: 2, bytes: 2048, skipped: 3, ..Copied::default() };
        assert_eq!(
            told(&copied),
            "copied 1 file, 2 directories, 2.00 KiB; left out 3 that are no files (devices, fifos, sockets)"
        );
        assert_eq!(told(&Copied::default()), "copied nothing");
    }
}
