//! The `kiln` program: the command line, and the monitor of a machine when it is started as one.

#![forbid(unsafe_code)]

use std::process::ExitCode;

use kiln_cli::Build;

const BUILD: Build = Build { version: env!("CARGO_PKG_VERSION"), commit: env!("KILN_COMMIT"), guest: GUEST };

include!(concat!(env!("OUT_DIR"), "/guest.rs"));

fn main() -> ExitCode {
    if std::env::args_os().next().is_some_and(|name| name == kiln_cli::MONITOR_NAME) {
        return kiln_vmm::monitor::main();
    }
    kiln_cli::main(BUILD)
}
