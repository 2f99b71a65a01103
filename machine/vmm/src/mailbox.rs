//! The mailbox: where a restored guest finds who it is, and says that it knows.
//!
//! What is put there is the host's (`kiln_protocol::mailbox`); here only the fields count that the monitor itself fills or
//! looks at.

use kiln_memory::{Gpa, GuestMemory, OutOfRange};

use crate::clock::realtime;
use crate::layout::MAILBOX;

/// The bytes of a generation.
pub const GENERATION_BYTES: usize = 216;
/// Names one life of a guest; all zeros is none.
pub type Id = [u8; 16];

/// Where the acknowledgement is in it.
pub const ACKNOWLEDGED_AT: usize = 16;
/// Where the wall clock is in it.
pub const REALTIME_AT: usize = 32;
/// Where it says that it is a rehearsal.
pub const REHEARSAL_AT: usize = 204;

/// A generation cannot be left there. Kiln is to blame, or the hypervisor.
#[derive(Debug, thiserror::Error)]
pub enum MailError {
    /// Its length is not a generation's.
    #[error("a generation of {0} bytes where {GENERATION_BYTES} make one")]
    Length(usize),
    /// Nobody would look for it.
    #[error("the machine was not parked at its doorbell, so nobody looks for mail")]
    NotParked,
    /// It has no id.
    #[error("a generation without an id")]
    NoId,
    /// The guest has no memory where the mailbox is.
    #[error(transparent)]
    Memory(#[from] OutOfRange),
    /// The vCPUs cannot be made ready for it.
    #[error(transparent)]
    Hypervisor(#[from] kiln_hypervisor::Error),
}

/// Puts `generation` into the mailbox of a guest that stands still, with the time it is now.
pub(crate) fn put(memory: &GuestMemory, generation: &[u8]) -> Result<Id, MailError> {
    let mut mail: [u8; GENERATION_BYTES] =
        generation.try_into().map_err(|_| MailError::Length(generation.len()))?;
    let (id, _) = mail.split_first_chunk::<16>().expect("it is longer");
    let id = *id;
    if id == [0; 16] {
        return Err(MailError::NoId);
    }
    mail[ACKNOWLEDGED_AT..ACKNOWLEDGED_AT + 16].fill(0);
    memory.write(MAILBOX, &mail)?;
    tell_time(memory)?;
    Ok(id)
}

/// Puts the time it is now into the mailbox: as late as can be, for a host may let a thread wait.
pub(crate) fn tell_time(memory: &GuestMemory) -> Result<(), OutOfRange> {
    memory.write(Gpa(MAILBOX.0 + REALTIME_AT as u64), &realtime().0.to_le_bytes())
}

/// Puts a rehearsal into the mailbox of a guest that stands still.
pub(crate) fn put_rehearsal(memory: &GuestMemory) -> Result<Id, MailError> {
    let mut mail = [0; GENERATION_BYTES];
    // Not all zeros, and not the one that was acknowledged last.
    let mut id = memory.read_array::<16>(Gpa(MAILBOX.0 + ACKNOWLEDGED_AT as u64))?;
    id[0] = id[0].wrapping_add(1).max(1);
    mail[..16].copy_from_slice(&id);
    mail[REHEARSAL_AT] = 1;
    memory.write(MAILBOX, &mail)?;
    Ok(id)
}

/// Whether the guest has acknowledged the generation `id`.
pub(crate) fn is_acknowledged(memory: &GuestMemory, id: Id) -> bool {
    memory.read_array(Gpa(MAILBOX.0 + ACKNOWLEDGED_AT as u64)) == Ok(id)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn memory() -> GuestMemory {
        GuestMemory::new(1 << 20).expect("mapped")
    }

    #[test]
    fn mail_is_acknowledged_by_its_id_alone() {
        let memory = memory();
        let mut generation = [7; GENERATION_BYTES];
        generation[..16].fill(9);
        let id = put(&memory, &generation).expect("put");
        assert_eq!(id, [9; 16]);
        assert!(!is_acknowledged(&memory, id), "what the host left there does not count");
        memory.write(Gpa(MAILBOX.0 + 16), &[8; 16]).expect("RAM");
        assert!(!is_acknowledged(&memory, id));
        memory.write(Gpa(MAILBOX.0 + 16), &[9; 16]).expect("RAM");
        assert!(is_acknowledged(&memory, id));
    }

    #[test]
    fn the_clock_is_filled_in_and_the_rest_is_the_hosts() {
        let memory = memory();
        put(&memory, &[7; GENERATION_BYTES]).expect("put");
        let before = memory.read_u64(Gpa(MAILBOX.0 + 32)).expect("RAM");
        assert!(before > 1_700_000_000 * 1_000_000_000, "{before} is long ago");
        assert_eq!(memory.read_array::<4>(Gpa(MAILBOX.0 + 200)), Ok([7; 4]));
    }

    #[test]
    fn each_rehearsal_is_another() {
        let memory = memory();
        let first = put_rehearsal(&memory).expect("put");
        assert!(!is_acknowledged(&memory, first));
        memory.write(Gpa(MAILBOX.0 + 16), &[0xff; 16]).expect("RAM");
        assert_eq!(put_rehearsal(&memory).expect("put")[0], 1, "never all zeros at its start");
        assert_eq!(memory.read_array::<4>(Gpa(MAILBOX.0 + REHEARSAL_AT as u64)), Ok([1, 0, 0, 0]));
    }

    #[test]
    fn what_is_no_generation_is_refused() {
        assert!(matches!(put(&memory(), &[7; 204]), Err(MailError::Length(204))));
        assert!(matches!(put(&memory(), &[0; GENERATION_BYTES]), Err(MailError::NoId)));
    }
}
