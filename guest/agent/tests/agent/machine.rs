//! The monitor's side of an agent's doorbell and mailbox.

use std::fs::File;
use std::io::{Read as _, Write as _};
use std::os::fd::OwnedFd;
use std::os::unix::fs::FileExt as _;
use std::os::unix::net::UnixStream;

use kiln_agent::power::Power;
use kiln_agent::sys::Mailbox;
use kiln_protocol::mailbox::{ACKNOWLEDGED_AT, Bounds, GENERATION_BYTES, Generation};
use kiln_protocol::{Become, Call, Outcome, Park, Parked, Reply, power};
use prost::Message as _;
use rustix::fs::MemfdFlags;

use crate::guest::{ANSWERED_WITHIN, Guest, Stream};

/// A machine around an agent.
pub(crate) struct Machine {
    device: UnixStream,
    mailbox: File,
}

impl Machine {
    /// A machine, and what its agent has of it.
    pub(crate) fn new() -> (Self, impl FnOnce() -> Power + Send + 'static) {
        let (device, agents) = UnixStream::pair().expect("a socket pair");
        let memory = rustix::fs::memfd_create("mailbox", MemfdFlags::CLOEXEC).expect("memory");
        let mailbox = File::from(memory);
        mailbox.set_len(4096).expect("memory");
        let theirs = mailbox.try_clone().expect("a descriptor");
        let power = move || {
            let agents: OwnedFd = agents.into();
            Power::on_socket(agents, Mailbox::in_file(&theirs).expect("a mapping"))
        };
        // An agent that cannot park answers instead, where nobody listens.
        device.set_read_timeout(Some(ANSWERED_WITHIN)).expect("a socket");
        (Self { device, mailbox }, power)
    }

    /// The phase the agent rings next; it waits until [`go_on`](Self::go_on).
    pub(crate) fn heard(&mut self) -> u32 {
        let mut store = [0; 8];
        self.device.read_exact(&mut store).expect("the agent rings");
        let (register, value) = store.split_at(4);
        assert_eq!(register, (power::DOORBELL as u32).to_le_bytes());
        u32::from_le_bytes(value.try_into().expect("4 bytes"))
    }

    pub(crate) fn go_on(&mut self) {
        self.device.write_all(&[1]).expect("the agent waits");
    }

    /// Asks the agent to park, and waits until it has; the connection, on which no answer comes.
    pub(crate) fn park(&mut self, guest: &Guest) -> Stream {
        let mut stream = guest.connect();
        stream.request(Call::Park(Park {}));
        assert_eq!(self.heard(), power::PHASE_PARKED);
        stream
    }

    /// Leaves mail for the parked agent.
    pub(crate) fn deliver(&self, generation: &Generation) {
        self.mailbox.write_all_at(&generation.encode(), 0).expect("memory");
    }

    /// Parks the agent and has it become the guest of `generation`.
    pub(crate) fn restore(&mut self, guest: &Guest, generation: &Generation) {
        self.park(guest);
        self.deliver(generation);
        for phase in [power::PHASE_RESUMED, power::PHASE_ADOPTED] {
            self.go_on();
            assert_eq!(self.heard(), phase);
        }
        self.go_on();
    }

    pub(crate) fn mail(&self) -> [u8; GENERATION_BYTES] {
        let mut mail = [0; GENERATION_BYTES];
        self.mailbox.read_exact_at(&mut mail, 0).expect("memory");
        mail
    }

    pub(crate) fn acknowledged(&self) -> [u8; 16] {
        self.mail()[ACKNOWLEDGED_AT..][..16].try_into().expect("16 bytes")
    }
}

/// Parks an agent that has no doorbell.
pub(crate) fn park_at_port(guest: &Guest) {
    assert_eq!(guest.call(Call::Park(Park {})), Outcome::Parked(Parked {}));
}

/// Calls at the port of an agent that is parked there; it has asked who it is.
pub(crate) fn call_at_port(guest: &Guest) -> Stream {
    let mut stream = guest.connect();
    assert_eq!(stream.reply(), Outcome::Parked(Parked {}));
    stream
}

/// Says who the guest is; what it answers, unless it hangs up.
pub(crate) fn tell_at_port(guest: &Guest, generation: Option<Vec<u8>>) -> Option<Outcome> {
    let mut stream = call_at_port(guest);
    stream.request(Call::Become(Become { generation }));
    let (_, payload) = stream.frame()?;
    Reply::decode(payload.as_slice()).expect("a reply").outcome
}

/// A generation that tells its number everywhere, and leaves the host's clock alone.
pub(crate) fn generation(number: u8) -> Generation {
    Generation {
        id: [number; 16],
        realtime_ns: 0,
        entropy: [number | 0x80; 64],
        machine_id: [number | 0x40; 16],
        boot_id: [number | 0x20; 16],
        hostname: format!("box-{number}"),
        bounds: Bounds::default(),
    }
}
