//! What to run: an image's configuration and a caller's wishes put together, by Docker's rules.

use std::ffi::OsString;
use std::os::unix::ffi::OsStrExt;

use kiln_oci::Config;
use kiln_store::SnapshotCommands;

use crate::signal;

/// What a caller wants otherwise than the image says.
#[derive(Clone, Debug, Default)]
pub struct Overrides {
    /// Replaces the entrypoint, and with it the image's default arguments; empty for no entrypoint at all.
    pub entrypoint: Option<OsString>,
    /// Replaces the image's default arguments, when not empty.
    pub args: Vec<OsString>,
    /// `KEY=VALUE` words that add to or replace the image's.
    pub env: Vec<OsString>,
    /// Replaces the image's user.
    pub user: Option<String>,
    /// Replaces the image's working directory.
    pub workdir: Option<String>,
}

impl Overrides {
    /// With what whoever named or saved a snapshot wanted, where nothing else is wanted here.
    pub fn over(mut self, commands: Option<&SnapshotCommands>) -> Self {
        let Some(SnapshotCommands { env, user, working_directory }) = commands else { return self };
        self.env.splice(..0, env.iter().map(OsString::from));
        self.user.get_or_insert_with(|| user.clone());
        if !working_directory.is_empty() {
            self.workdir.get_or_insert_with(|| working_directory.clone());
        }
        self
    }
}

/// What to run and how.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Launch {
    /// The program and its arguments.
    pub argv: Vec<OsString>,
    /// `KEY=VALUE` words, each key once.
    pub env: Vec<OsString>,
    /// As [`ExecBuilder::user`](crate::ExecBuilder::user) takes it; empty for root.
    pub user: String,
    /// As [`ExecBuilder::cwd`](crate::ExecBuilder::cwd) takes it; empty for `/`.
    pub workdir: String,
    /// The signal that asks this image's command to stop.
    pub stop_signal: u8,
}

/// Why there is nothing to run.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum LaunchError {
    /// Neither the image nor the caller names a command.
    #[error("the image names no command to run, and none was given")]
    NoCommand,
    /// The image's stop signal is none that Linux has.
    #[error("the image's stop signal '{0}' is not a signal")]
    StopSignal(String),
    /// The working directory does not begin at the root.
    #[error("the working directory '{0}' is not an absolute path")]
    Workdir(String),
}

impl Launch {
    /// Puts an image's configuration and a caller's wishes together.
    ///
    /// An image's shell form is `["/bin/sh", "-c", ...]` by the time it is in a configuration, so both forms of
    /// ENTRYPOINT and CMD are lists here. Docker's reference, "Understand how CMD and ENTRYPOINT interact".
    ///
    /// # Errors
    /// [`LaunchError`], by what is missing or wrong.
    pub fn new(config: &Config, overrides: Overrides) -> Result<Self, LaunchError> {
        let argv = argv(config, overrides.entrypoint, overrides.args);
        if argv.is_empty() {
            return Err(LaunchError::NoCommand);
        }
        let stop_signal = match config.stop_signal.as_deref().filter(|name| !name.is_empty()) {
            Some(name) => signal::number(name).ok_or_else(|| LaunchError::StopSignal(name.to_owned()))?,
            None => signal::SIGTERM,
        };
        let workdir = match overrides.workdir {
            Some(given) if !given.starts_with('/') => return Err(LaunchError::Workdir(given)),
            Some(given) => given,
            // Docker takes an image's relative directory from the root.
            None if config.working_dir.starts_with('/') || config.working_dir.is_empty() => {
                config.working_dir.clone()
            }
            None => format!("/{}", config.working_dir),
        };
        let mut env = Vec::new();
        for word in config.env.iter().map(OsString::from).chain(overrides.env) {
            set(&mut env, word);
        }
        Ok(Self {
            argv,
            env,
            user: overrides.user.unwrap_or_else(|| config.user.clone()),
            workdir,
            stop_signal,
        })
    }
}

impl From<&Launch> for SnapshotCommands {
    fn from(launch: &Launch) -> Self {
        let Launch { env, user, workdir, .. } = launch.clone();
        Self { env: env.into_iter().map(Into::into).collect(), user, working_directory: workdir }
    }
}

fn argv(config: &Config, entrypoint: Option<OsString>, args: Vec<OsString>) -> Vec<OsString> {
    let own = |words: &[String]| words.iter().map(OsString::from).collect::<Vec<_>>();
    let (mut argv, default_args) = match entrypoint {
        Some(program) if program.is_empty() => (Vec::new(), Vec::new()),
        Some(program) => (vec![program], Vec::new()),
        None => (own(&config.entrypoint), own(&config.cmd)),
    };
    argv.extend(if args.is_empty() { default_args } else { args });
    argv
}

/// Adds a word, in the place of an earlier one with its key.
pub(crate) fn set<W: Word>(env: &mut Vec<W>, word: W) {
    match env.iter_mut().find(|earlier| earlier.key() == word.key()) {
        Some(earlier) => *earlier = word,
        None => env.push(word),
    }
}

/// A `KEY=VALUE` word.
pub(crate) trait Word {
    /// What is before the `=`.
    fn key(&self) -> &[u8];
}

impl Word for Vec<u8> {
    fn key(&self) -> &[u8] {
        self.split(|&byte| byte == b'=').next().unwrap_or_default()
    }
}

impl Word for OsString {
    fn key(&self) -> &[u8] {
        self.as_bytes().split(|&byte| byte == b'=').next().unwrap_or_default()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn config() -> Config {
        let list = |words: &[&str]| words.iter().map(ToString::to_string).collect();
        Config {
            entrypoint: list(&["/entry", "-x"]),
            cmd: list(&["default"]),
            env: list(&["PATH=/bin", "A=1"]),
            user: "1000".into(),
            working_dir: "/srv".into(),
            ..Config::default()
        }
    }

    fn run(entrypoint: Option<&str>, args: &[&str]) -> Result<Vec<OsString>, LaunchError> {
        let overrides = Overrides {
            entrypoint: entrypoint.map(OsString::from),
            args: args.iter().map(OsString::from).collect(),
            ..Overrides::default()
        };
        Launch::new(&config(), overrides).map(|launch| launch.argv)
    }

    #[test]
    fn cmd_is_the_entrypoints_default_arguments() {
        assert_eq!(run(None, &[]).expect("a command"), ["/entry", "-x", "default"]);
        assert_eq!(run(None, &["a", "b"]).expect("a command"), ["/entry", "-x", "a", "b"]);
    }

    #[test]
    fn another_entrypoint_drops_cmd() {
        assert_eq!(run(Some("/other"), &[]).expect("a command"), ["/other"]);
        assert_eq!(run(Some("/other"), &["a"]).expect("a command"), ["/other", "a"]);
    }

    #[test]
    fn an_empty_entrypoint_leaves_the_arguments_alone() {
        assert_eq!(run(Some(""), &["ls"]).expect("a command"), ["ls"]);
        assert_eq!(run(Some(""), &[]), Err(LaunchError::NoCommand));
    }

    #[test]
    fn cmd_alone_is_the_command() {
        let shell_form =
            Config { cmd: ["/bin/sh", "-c", "echo hi"].map(String::from).to_vec(), ..Config::default() };
        let launch = Launch::new(&shell_form, Overrides::default()).expect("a command");
        assert_eq!(launch.argv, ["/bin/sh", "-c", "echo hi"]);
        assert_eq!(launch.stop_signal, 15);
    }

    #[test]
    fn a_later_variable_takes_the_place_of_an_earlier_one() {
        let overrides =
            Overrides { env: vec!["A=2".into(), "B=3".into(), "A=4".into()], ..Overrides::default() };
        let launch = Launch::new(&config(), overrides).expect("a command");
        assert_eq!(launch.env, ["PATH=/bin", "A=4", "B=3"]);
    }

    #[test]
    fn what_a_snapshot_says_is_over_the_images_and_under_what_is_given() {
        let (user, workdir) = (Some("7".into()), Some("/opt".into()));
        let first = Overrides { user, workdir, env: vec!["A=2".into()], ..Overrides::default() };
        let commands = SnapshotCommands::from(&Launch::new(&config(), first).expect("a command"));
        let second = || Overrides { env: vec!["B=3".into()], ..Overrides::default() };
        let launch = Launch::new(&config(), second().over(Some(&commands))).expect("a command");
        assert_eq!(launch.env, ["PATH=/bin", "A=2", "B=3"]);
        assert_eq!((launch.user.as_str(), launch.workdir.as_str()), ("7", "/opt"));
        let given = Overrides { env: vec!["A=5".into()], user: Some("8".into()), ..second() };
        let launch = Launch::new(&config(), given.over(Some(&commands))).expect("a command");
        assert_eq!((launch.env[1].to_str(), launch.user.as_str()), (Some("A=5"), "8"));
    }

    #[test]
    fn user_and_workdir_are_the_images_unless_given() {
        let launch = Launch::new(&config(), Overrides::default()).expect("a command");
        assert_eq!((launch.user.as_str(), launch.workdir.as_str()), ("1000", "/srv"));
        let overrides =
            Overrides { user: Some("0".into()), workdir: Some("rel".into()), ..Overrides::default() };
        assert_eq!(Launch::new(&config(), overrides), Err(LaunchError::Workdir("rel".into())));
    }

    #[test]
    fn a_stop_signal_is_a_name_or_a_number() {
        let with = |name: &str| {
            Launch::new(&Config { stop_signal: Some(name.into()), ..config() }, Overrides::default())
                .map(|launch| launch.stop_signal)
        };
        assert_eq!(with("SIGQUIT"), Ok(3));
        assert_eq!(with("9"), Ok(9));
        assert_eq!(with("SIGRTMIN+3"), Ok(37));
        assert_eq!(with("SIGNOT"), Err(LaunchError::StopSignal("SIGNOT".into())));
    }
}
