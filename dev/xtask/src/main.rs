//! The project's own commands: `cargo xtask COMMAND`.
//!
//! Kept quick to compile, because everything starts with it: the dependencies are few, and what needs more (images,
//! benchmarks) is a crate of its own that a command here runs.

#![forbid(unsafe_code)]

mod check;
mod fuzz;
mod image;
mod initramfs;
mod kernel;
mod layers;
mod manual;
mod paths;
mod process;
#[cfg(test)]
mod regressions;
mod release;
mod rig;
mod setup;
mod test;

use std::process::ExitCode;

const USAGE: &str = "\
usage: cargo xtask COMMAND

build and run
  setup [GROUP...]        install the Debian packages that are missing (groups: build, test, rig)
  kernel                  build the guest kernel, print its path
  initramfs               build the guest agent and its initramfs, print the path
  build                   build the whole of Kiln: target/release/kiln, with kernel and agent inside
  demo-image [DIR]        make the demo image as an OCI layout, without any registry
  man [DIR]               write the man pages
  completions [DIR]       write the shell completions

check and test
  check                   every gate that needs no virtual machine
  layers                  only the folder rule: who may depend on whom, and where unsafe code may be
  test [FILTER...]        system tests on this host's /dev/kvm
  rig [OPTIONS] -- CMD    run CMD in a machine with a hardware-style /dev/kvm (see `cargo xtask rig --help`)
  fuzz [--seconds N] [TARGET...]
  bench boot|pull|rootfs|io [--json FILE]
";

fn main() -> ExitCode {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let (command, rest) = match args.split_first() {
        Some((command, rest)) => (command.as_str(), rest),
        None => ("help", &[][..]),
    };
    let outcome = match command {
        "setup" => setup::run(rest),
        "kernel" => kernel::run(rest),
        "initramfs" => initramfs::run(rest),
        "build" => release::run(rest),
        "demo-image" => image::demo(rest),
        "man" => manual::man(rest),
        "completions" => manual::completions(rest),
        "check" => check::run(rest),
        "layers" => layers::run(rest),
        "test" => test::run(rest),
        "rig" => return rig::run(rest),
        "fuzz" => fuzz::run(rest),
        "bench" => test::bench(rest),
        "help" | "--help" | "-h" => {
            print!("{USAGE}");
            return ExitCode::SUCCESS;
        }
        other => {
            eprint!("xtask: no command named {other}\n\n{USAGE}");
            return ExitCode::from(2);
        }
    };
    match outcome {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("xtask {command}: {error:#}");
            ExitCode::FAILURE
        }
    }
}
