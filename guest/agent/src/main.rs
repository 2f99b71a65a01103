//! Process 1 of a Kiln guest.

#![deny(unsafe_code)]

use kiln_agent::power::Power;
use kiln_agent::sys;
use kiln_protocol::{AGENT_PORT, power};
use std::os::fd::AsFd;

fn main() {
    let page = Power::find();
    page.ring(power::PHASE_STARTED);
    println!("kiln-agent: started");
    match sys::listen_on_vsock(AGENT_PORT) {
        Ok(listener) => {
            page.ring(power::PHASE_LISTENING);
            println!("kiln-agent: listening");
            let mut fds = [rustix::event::PollFd::new(&listener, rustix::event::PollFlags::IN)];
            while rustix::event::poll(&mut fds, None).is_ok() {
                println!("kiln-agent: connection: {:?}", sys::accept_from_host(listener.as_fd()));
            }
        }
        Err(error) => {
            eprintln!("kiln-agent: no vsock: {error}");
            page.notice(1);
            page.off(1);
        }
    }
}
