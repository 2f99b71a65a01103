//! VMs that stay, of a test's own.

use std::path::{Path, PathBuf};
use std::process::Command;

use rustix::process::Pid;
use serde_json::Value;

use crate::{Outcome, busybox, descendants, kiln, store};

/// A VM of a test's own; removed with the test.
#[derive(Debug)]
pub struct Vm {
    root: PathBuf,
    /// Its name.
    pub name: &'static str,
}

impl Vm {
    /// One in the store that the tests share, created and started.
    pub fn start(name: &'static str) -> Self {
        Self::start_in(&store(), name)
    }

    /// One in a store of the test's own, created and started.
    pub fn start_in(root: &Path, name: &'static str) -> Self {
        let vm = Self::named(root, name);
        vm.vm(&["create", "--name", name, &busybox().reference()]).code(0);
        vm.vm(&["start", name]).code(0);
        vm
    }

    /// One that the test makes otherwise.
    pub fn named(root: &Path, name: &'static str) -> Self {
        let vm = Self { root: root.to_owned(), name };
        // What an earlier run of the test left.
        vm.vm(&["rm", "--force", name]);
        vm
    }

    /// One whose command a shell runs: `kiln run -d OPTIONS --name NAME busybox -- sh -c SCRIPT`.
    pub fn run(root: &Path, name: &'static str, options: &[&str], script: &str) -> Self {
        let vm = Self::named(root, name);
        let image = busybox().reference();
        let started = Outcome::of(
            vm.kiln(&["--quiet", "run", "-d", "--name", name])
                .args(options)
                .args([&image, "--", "sh", "-c", script]),
        );
        let id = started.code(0).out();
        assert!(id.trim().len() == 12 && id.trim().bytes().all(|byte| byte.is_ascii_hexdigit()), "{id}");
        vm
    }

    /// `kiln ARGS` in its store.
    pub fn kiln(&self, args: &[&str]) -> Command {
        let mut kiln = kiln(args);
        kiln.env("KILN_ROOT", &self.root);
        kiln
    }

    /// Runs `kiln VERB [OPTIONS] NAME`.
    pub fn does(&self, verb: &[&str]) -> Outcome {
        Outcome::of(self.kiln(verb).arg(self.name))
    }

    /// Its folder.
    pub fn folder(&self) -> PathBuf {
        self.root.join("vms").join(self.name)
    }

    /// Runs `kiln vm ARGS`.
    pub fn vm(&self, args: &[&str]) -> Outcome {
        Outcome::of(kiln(["--quiet", "vm"]).args(args).env("KILN_ROOT", &self.root))
    }

    /// Runs a shell script in it.
    pub fn script(&self, script: &str) -> Outcome {
        self.vm(&["exec", self.name, "--", "sh", "-c", script])
    }

    /// Sets a shell script off and leaves it: one that has the VM's own command end may be killed with the VM before it has ended itself.
    #[track_caller]
    pub fn set_off(&self, script: &str) {
        self.vm(&["exec", "--detach", self.name, "--", "sh", "-c", script]).code(0);
    }

    /// What a shell script prints that succeeds.
    #[track_caller]
    pub fn told(&self, script: &str) -> String {
        let outcome = self.script(script);
        outcome.code(0);
        outcome.out().trim().to_owned()
    }

    /// What `inspect --json` says of it.
    #[track_caller]
    pub fn inspect(&self) -> Value {
        let outcome = self.vm(&["inspect", "--json", self.name]);
        serde_json::from_slice(&outcome.code(0).stdout).expect("JSON")
    }

    /// The process that it belongs to.
    #[track_caller]
    pub fn keeper(&self) -> Pid {
        let pid = self.inspect()["keeper_pid"].as_i64().expect("a process id");
        Pid::from_raw(pid.try_into().expect("a process id")).expect("a process id")
    }

    /// The process that is the machine.
    #[track_caller]
    pub fn monitor(&self) -> Pid {
        let [monitor] = descendants(self.keeper())[..] else { panic!("a keeper has one child") };
        monitor
    }
}

impl Drop for Vm {
    fn drop(&mut self) {
        self.vm(&["rm", "--force", self.name]);
    }
}
