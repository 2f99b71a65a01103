//! A command made ready: everything the host said about it, looked up and checked.

use alloc::ffi::CString;
use alloc::format;
use alloc::string::String;
use alloc::vec;
use alloc::vec::Vec;

use kiln_protocol::{Exec, Failed, Reason};
use rustix::io::Errno;

use crate::failure::{failed, internal, invalid, text};
use crate::files;
use crate::sys::{Failure, Stage};
use crate::user::{self, Identity};

/// What a command without PATH is searched for in, as in Docker.
const DEFAULT_PATH: &[u8] = b"/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";
/// The terminal a command without TERM is told it has, as in Docker.
const DEFAULT_TERMINAL: &[u8] = b"xterm";

/// A command with nothing left to look up.
#[derive(Debug)]
pub(crate) struct Command {
    pub(crate) arguments: Vec<CString>,
    pub(crate) environment: Vec<CString>,
    /// The files it may be, in the order in which they are tried.
    pub(crate) programs: Vec<CString>,
    pub(crate) directory: CString,
    pub(crate) identity: Identity,
}

impl Command {
    /// Looks up everything `exec` names, in files of the guest's root.
    pub(crate) fn prepare(exec: Exec, hostname: &str) -> Result<Self, Failed> {
        let identity = find_user(&exec.user)?;
        Self::build(exec, hostname, identity)
    }

    fn build(exec: Exec, hostname: &str, identity: Identity) -> Result<Self, Failed> {
        let mut environment = exec.env;
        for (name, value) in [
            (&b"PATH"[..], DEFAULT_PATH),
            (b"HOSTNAME", hostname.as_bytes()),
            (b"HOME", &identity.home),
            (b"TERM", DEFAULT_TERMINAL),
        ] {
            let wanted = name != b"TERM" || exec.tty.is_some();
            if wanted && variable(&environment, name).is_none() {
                environment.push([name, b"=", value].concat());
            }
        }
        let name = exec.argv.first().ok_or_else(|| invalid("a command needs at least a name".into()))?;
        let programs = candidates(name, variable(&environment, b"PATH").unwrap_or_default());
        let directory = if exec.cwd.is_empty() { "/".into() } else { exec.cwd };
        if !directory.starts_with('/') {
            return Err(invalid(format!("the working directory {directory:?} is not an absolute path")));
        }
        Ok(Self {
            programs: strings(programs, "the command's name")?,
            arguments: strings(exec.argv, "an argument")?,
            environment: strings(environment, "an environment variable")?,
            directory: CString::new(directory).map_err(|_| nul("the working directory"))?,
            identity,
        })
    }

    /// Why the command did not start, in the terms of the host.
    pub(crate) fn explain(&self, (stage, error): Failure) -> Failed {
        let name = self.arguments.first().map(|name| name.to_string_lossy()).unwrap_or_default();
        match stage {
            Stage::Clone => internal("make a process", error),
            Stage::Prepare => internal("mount /proc", error),
            Stage::Streams => internal("give the command its streams", error),
            Stage::Identity => internal("become the command's user", error),
            Stage::Directory => {
                let directory = self.directory.to_string_lossy();
                let message = format!("cannot use the working directory {directory}: {}", text(error));
                failed(Reason::NotExecutable, message)
            }
            Stage::Exec => self.explain_exec(&name, error),
        }
    }

    fn explain_exec(&self, name: &str, error: Errno) -> Failed {
        match error {
            Errno::NOENT | Errno::NOTDIR => {
                // exec(2) says the same of a file that is there and whose interpreter is not.
                let there = self.programs.iter().find(|program| rustix::fs::stat(program.as_c_str()).is_ok());
                let message = match there {
                    Some(program) => {
                        let program = program.to_string_lossy();
                        format!("{program}: it is there, but its interpreter (#! line or ELF loader) is not")
                    }
                    None if name.contains('/') => format!("{name}: {}", text(error)),
                    None => format!("{name}: not found in PATH"),
                };
                failed(Reason::NotFound, message)
            }
            Errno::NOMEM | Errno::AGAIN | Errno::MFILE | Errno::NFILE | Errno::IO => {
                internal(&format!("execute {name}"), error)
            }
            _ => failed(Reason::NotExecutable, format!("{name}: {}", text(error))),
        }
    }
}

fn find_user(wanted: &str) -> Result<Identity, Failed> {
    let read = |path| {
        files::read(path).map_err(|error| invalid(format!("cannot use the image's {path}: {}", text(error))))
    };
    let (passwd, group) = (read("/etc/passwd")?, read("/etc/group")?);
    user::resolve(wanted, &passwd, &group).map_err(|error| invalid(format!("user {wanted:?}: {error}")))
}

/// The value of an environment variable; the last of several, as a shell has it.
fn variable<'a>(environment: &'a [Vec<u8>], name: &[u8]) -> Option<&'a [u8]> {
    environment.iter().rev().find_map(|entry| entry.strip_prefix(name)?.strip_prefix(b"="))
}

/// The files that `name` may mean: itself when it says where, otherwise one in each directory of `path`, of which an
/// empty one is the working directory. POSIX.1-2017 §8.3 "Other Environment Variables", PATH.
fn candidates(name: &[u8], path: &[u8]) -> Vec<Vec<u8>> {
    if name.is_empty() {
        return vec![];
    }
    if name.contains(&b'/') {
        return vec![name.to_vec()];
    }
    path.split(|byte| *byte == b':')
        .map(|directory| if directory.is_empty() { &b"."[..] } else { directory })
        .map(|directory| [directory, b"/", name].concat())
        .collect()
}

fn strings(strings: Vec<Vec<u8>>, what: &str) -> Result<Vec<CString>, Failed> {
    strings.into_iter().map(|string| CString::new(string).map_err(|_| nul(what))).collect()
}

fn nul(what: &str) -> Failed {
    let what: String = what.into();
    invalid(format!("{what} holds a NUL byte"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use kiln_protocol::WindowSize;

    fn build(exec: Exec) -> Result<Command, Failed> {
        let identity = Identity { uid: 0, gid: 0, groups: vec![0], home: b"/root".to_vec() };
        Command::build(exec, "box", identity)
    }

    fn exec(argv: &[&str], env: &[&str]) -> Exec {
        let bytes = |strings: &[&str]| strings.iter().map(|string| string.as_bytes().to_vec()).collect();
        Exec { argv: bytes(argv), env: bytes(env), ..Exec::default() }
    }

    fn shown(strings: &[CString]) -> Vec<&str> {
        strings.iter().map(|string| string.to_str().expect("ASCII")).collect()
    }

    #[test]
    fn what_docker_adds_is_added_when_missing() {
        let command = build(exec(&["true"], &["A=1"])).expect("a command");
        let path = format!("PATH={}", core::str::from_utf8(DEFAULT_PATH).expect("ASCII"));
        assert_eq!(shown(&command.environment), ["A=1", &path, "HOSTNAME=box", "HOME=/root"]);
        let with_terminal = Exec { tty: Some(WindowSize::default()), ..exec(&["true"], &[]) };
        let command = build(with_terminal).expect("a command");
        assert_eq!(shown(&command.environment).last(), Some(&"TERM=xterm"));
    }

    #[test]
    fn what_is_given_stays_as_it_is() {
        let env = ["PATH=/x", "HOME=", "HOSTNAME=other", "no equals sign", "HOMER=simpson"];
        let command = build(exec(&["true"], &env)).expect("a command");
        assert_eq!(shown(&command.environment), env);
    }

    #[test]
    fn a_bare_name_is_searched_for_in_the_commands_own_path() {
        let command = build(exec(&["tool", "x"], &["PATH=/no", "PATH=/a::/b"])).expect("a command");
        assert_eq!(shown(&command.programs), ["/a/tool", "./tool", "/b/tool"]);
        assert_eq!(shown(&command.arguments), ["tool", "x"]);
    }

    #[test]
    fn a_name_with_a_slash_is_not_searched_for() {
        let command = build(exec(&["./tool"], &["PATH=/a"])).expect("a command");
        assert_eq!(shown(&command.programs), ["./tool"]);
    }

    #[test]
    fn an_empty_name_is_never_found() {
        let command = build(exec(&[""], &["PATH=/bin"])).expect("a command");
        assert!(command.programs.is_empty());
        let failed = command.explain((Stage::Exec, Errno::NOENT));
        assert_eq!(failed.reason(), Reason::NotFound);
    }

    #[test]
    fn no_argv_a_nul_byte_or_a_relative_directory_is_invalid() {
        let relative = Exec { cwd: "tmp".into(), ..exec(&["true"], &[]) };
        for bad in [exec(&[], &[]), exec(&["a\0b"], &[]), exec(&["a"], &["A=\0"]), relative] {
            assert_eq!(build(bad).expect_err("invalid").reason(), Reason::Invalid);
        }
    }

    #[test]
    fn an_error_of_exec_decides_the_exit_code() {
        let command = build(exec(&["/no/such/file"], &[])).expect("a command");
        let reason = |error| command.explain((Stage::Exec, error)).reason();
        assert_eq!(reason(Errno::NOENT), Reason::NotFound);
        assert_eq!(reason(Errno::ACCESS), Reason::NotExecutable);
        assert_eq!(reason(Errno::NOEXEC), Reason::NotExecutable);
        assert_eq!(reason(Errno::TOOBIG), Reason::NotExecutable);
        assert_eq!(reason(Errno::NOMEM), Reason::Internal);
    }
}
