//! Process 1 of a Kiln guest, as the kernel starts it.

#![no_std]
#![no_main]
#![deny(unsafe_code)]

use core::panic::PanicInfo;

use kiln_agent::listen::Listener;
use kiln_agent::power::Power;
use kiln_agent::server::{Agent, Fault};
use kiln_agent::setup::set_up;
use kiln_agent::sys::{self, Heap, say};
use kiln_protocol::{AGENT_PORT, power};
use rustix::process::DumpableBehavior;

#[path = "sys/program.rs"]
mod program;

#[global_allocator]
static HEAP: Heap = Heap::new();

/// What process 1 does, from its first instruction to the end of the machine.
fn run() {
    let (power, missing) = Power::find();
    power.ring(power::PHASE_STARTED);
    if let Some(error) = missing {
        say(format_args!("no power device, so the host hears no doorbell: {error:?}"));
    }
    // Children share the agent's memory until they execute: nothing may look into them meanwhile.
    if let Err(error) = rustix::process::set_dumpable_behavior(DumpableBehavior::NotDumpable) {
        say(format_args!("cannot close its memory to others: {error:?}"));
    }
    if let Err(fault) = serve(&power) {
        say(format_args!("{fault}"));
        sys::notice(fault.notice());
    }
    power.off();
}

fn serve(power: &Power) -> Result<(), Fault> {
    let socket = sys::listen_on_vsock(AGENT_PORT).map_err(Fault::Serving)?;
    let agent = Agent::new(Listener::Vsock(socket), set_up, power).map_err(Fault::Serving)?;
    power.announce();
    agent.run()
}

#[panic_handler]
fn panicked(info: &PanicInfo<'_>) -> ! {
    sys::notice(power::NOTICE_AGENT_PANIC);
    say(format_args!("{info}"));
    // The kernel panics when process 1 ends, and its console has this line before.
    program::exit(1)
}
