//! The `kiln` program: the command line, and the monitor of a machine when it is started as one, which it is where it has none
//! built in, or one that this host does not let it execute.

#![forbid(unsafe_code)]

use std::process::ExitCode;

use kiln_cli::Build;

const BUILD: Build =
    Build { version: env!("CARGO_PKG_VERSION"), commit: env!("KILN_COMMIT"), guest: GUEST, monitor: MONITOR };

include!(concat!(env!("OUT_DIR"), "/built_in.rs"));

fn main() -> ExitCode {
    if std::env::args_os().next().is_some_and(|name| name == kiln_cli::MONITOR_NAME) {
        return kiln_vmm::monitor::main();
    }
    kiln_cli::main(BUILD)
}
