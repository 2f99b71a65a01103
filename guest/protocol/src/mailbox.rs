//! The mailbox: a piece of guest memory at a fixed address in which the host leaves a restored guest its new identity.
//!
//! The guest kernel is told that the memory is reserved and never touches it; the agent maps it once. A parked agent
//! finds its mail there at the very next instruction it executes, and acknowledges it there, in user mode: neither
//! interrupt nor guest kernel is on that way.
//!
//! ```text
//! 0    id            16 bytes; all zeros: no mail
//! 16   acknowledged  16 bytes; the id, once the agent has taken the mail
//! 32   realtime      u64, nanoseconds since 1970-01-01 UTC when the guest was entered
//! 40   entropy       64 bytes
//! 104  machine id    16 bytes
//! 120  boot id       16 bytes
//! 136  host name     length u32, then 64 bytes padded with zeros
//! 204  rehearsal     u32; not zero: the agent is to acknowledge the id and park again, and that is all
//! 208  memory        u32, MiB that the guest's processes may have together; 0: as it was
//! 212  vCPUs         u32, the number of them that these processes run on; 0: as it was
//! ```
//!
//! Numbers are little-endian. A rehearsal walks the way that a generation goes from the mailbox to its acknowledgement, so that
//! the pages on it are there when it matters; nothing else of the mail is looked at.

use alloc::string::String;

/// The guest physical address of the mailbox.
pub const GPA: u64 = 0x1_0000;
/// The memory set aside for it, in bytes.
pub const BYTES: usize = 0x1_0000;

/// Where the acknowledgement is.
pub const ACKNOWLEDGED_AT: usize = 16;
/// Where the wall clock is.
pub const REALTIME_AT: usize = 32;
/// Where the entropy is: the agent wipes it out once it has taken the mail.
pub const ENTROPY_AT: usize = 40;
/// Where it says that it is a rehearsal.
pub const REHEARSAL_AT: usize = 204;
/// Where the bounds of the guest's processes are: [`Bounds`].
pub const BOUNDS_AT: usize = 208;
/// The bytes of a [`Generation`] in the mailbox, from its start; the acknowledgement lies in them, zero.
pub const GENERATION_BYTES: usize = 216;
/// The bytes of a generation's id.
pub const ID_BYTES: usize = 16;
/// The bytes of entropy a generation brings.
pub const ENTROPY_BYTES: usize = 64;
/// The longest host name. Linux man page hostname(7).
pub const HOSTNAME_BYTES_MAX: usize = 64;

/// What makes a restored guest another than all that come from the same snapshot.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Generation {
    /// Names this life of the guest: random, never all zeros.
    pub id: [u8; ID_BYTES],
    /// The wall clock when the guest is entered, in nanoseconds since 1970-01-01 UTC.
    pub realtime_ns: u64,
    /// Random bytes for the guest kernel's generator.
    pub entropy: [u8; ENTROPY_BYTES],
    /// `/etc/machine-id`. machine-id(5).
    pub machine_id: [u8; 16],
    /// `/proc/sys/kernel/random/boot_id`.
    pub boot_id: [u8; 16],
    /// The host name, 1 to [`HOSTNAME_BYTES_MAX`] bytes.
    pub hostname: String,
    /// What the guest's processes may have of its machine.
    pub bounds: Bounds,
}

/// What the processes of a guest may have of its machine, together; those of its kernel and the agent aside. A zero leaves it as it was when
/// the guest was saved, which is no bound in a guest that was never given one.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Bounds {
    /// Memory in MiB.
    pub memory_mib: u32,
    /// The number of vCPUs they run on.
    pub vcpus: u32,
}

impl Bounds {
    /// Whether all is left as it was.
    pub fn is_none(&self) -> bool {
        *self == Self::default()
    }
}

impl Generation {
    /// The generation as it lies in the mailbox, not yet acknowledged. A host name that is too long is cut off.
    pub fn encode(&self) -> [u8; GENERATION_BYTES] {
        let mut bytes = [0; GENERATION_BYTES];
        let mut hostname = [0; HOSTNAME_BYTES_MAX];
        let length = self.hostname.len().min(HOSTNAME_BYTES_MAX);
        hostname[..length].copy_from_slice(&self.hostname.as_bytes()[..length]);
        let parts: [&[u8]; 11] = [
            &self.id,
            &[0; ID_BYTES],
            &self.realtime_ns.to_le_bytes(),
            &self.entropy,
            &self.machine_id,
            &self.boot_id,
            &(length as u32).to_le_bytes(),
            &hostname,
            &[0; 4],
            &self.bounds.memory_mib.to_le_bytes(),
            &self.bounds.vcpus.to_le_bytes(),
        ];
        let mut at = 0;
        for part in parts {
            bytes[at..at + part.len()].copy_from_slice(part);
            at += part.len();
        }
        bytes
    }

    /// The generation in a mailbox; `None` when there is none, or its host name is none.
    pub fn decode(bytes: &[u8; GENERATION_BYTES]) -> Option<Self> {
        let id = field(bytes, 0);
        if id == [0; ID_BYTES] {
            return None;
        }
        let length = u32::from_le_bytes(field(bytes, 136)) as usize;
        let hostname = bytes.get(140..140 + HOSTNAME_BYTES_MAX)?.get(..length)?;
        let is_good = |byte: &u8| byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'.' | b'_');
        if hostname.is_empty() || !hostname.iter().all(is_good) {
            return None;
        }
        Some(Self {
            id,
            realtime_ns: u64::from_le_bytes(field(bytes, REALTIME_AT)),
            entropy: field(bytes, ENTROPY_AT),
            machine_id: field(bytes, 104),
            boot_id: field(bytes, 120),
            hostname: hostname.iter().copied().map(char::from).collect(),
            bounds: Bounds {
                memory_mib: u32::from_le_bytes(field(bytes, BOUNDS_AT)),
                vcpus: u32::from_le_bytes(field(bytes, BOUNDS_AT + 4)),
            },
        })
    }
}

fn field<const N: usize>(bytes: &[u8; GENERATION_BYTES], at: usize) -> [u8; N] {
    let mut field = [0; N];
    field.copy_from_slice(&bytes[at..at + N]);
    field
}

#[cfg(test)]
mod tests {
    use super::*;

    fn generation() -> Generation {
        Generation {
            id: [1; 16],
            realtime_ns: 2 << 40,
            entropy: [3; 64],
            machine_id: [4; 16],
            boot_id: [5; 16],
            hostname: "box-1".into(),
            bounds: Bounds { memory_mib: 6 << 20, vcpus: 7 },
        }
    }

    #[test]
    fn what_is_put_in_comes_out() {
        let long = "a".repeat(HOSTNAME_BYTES_MAX);
        for hostname in ["b", "box-1", long.as_str()] {
            let generation = Generation { hostname: hostname.into(), ..generation() };
            assert_eq!(Generation::decode(&generation.encode()), Some(generation));
        }
    }

    #[test]
    fn an_empty_mailbox_has_no_generation() {
        assert_eq!(Generation::decode(&[0; GENERATION_BYTES]), None);
    }

    #[test]
    fn a_host_name_that_is_none_is_refused() {
        for bad in ["", "a b", "a\nb"] {
            assert_eq!(
                Generation::decode(&Generation { hostname: bad.into(), ..generation() }.encode()),
                None
            );
        }
        let mut bytes = generation().encode();
        bytes[136..140].copy_from_slice(&65_u32.to_le_bytes());
        assert_eq!(Generation::decode(&bytes), None);
    }

    #[test]
    fn the_acknowledgement_starts_empty() {
        assert_eq!(generation().encode()[ACKNOWLEDGED_AT..][..ID_BYTES], [0; ID_BYTES]);
    }
}
