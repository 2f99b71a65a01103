//! The monitor as a program of its own: what `kiln` is when it calls itself `kiln-monitor`.

#![forbid(unsafe_code)]

use std::process::ExitCode;

fn main() -> ExitCode {
    kiln_vmm::monitor::main()
}
