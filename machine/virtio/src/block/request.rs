//! One request to a block device: what it asks, and its answer. VIRTIO 1.2 §5.2.6 "Device Operation".

use kiln_memory::{GuestMemory, Slices};
use rustix::io::Errno;

use super::disk::{Disk, DiskFault};
use crate::{Broken, Chain};

pub(super) const SECTOR_BYTES: u64 = 512;
/// The most data of one request: longer than what a driver sends within `seg_max`, and short enough that stopping the
/// device never waits long.
const MAX_DATA_BYTES: usize = 64 << 20;
/// The most ranges in one discard or write-zeroes request.
pub(super) const MAX_ZERO_RANGES: u32 = 16;
/// The longest of those ranges, in sectors: 2 GiB.
pub(super) const MAX_ZERO_SECTORS: u32 = 1 << 22;
/// The length of a serial.
pub(super) const SERIAL_BYTES: usize = 20;

const HEADER_BYTES: usize = 16;
const ZERO_RANGE_BYTES: usize = 16;

const T_IN: u32 = 0;
const T_OUT: u32 = 1;
const T_FLUSH: u32 = 4;
const T_GET_ID: u32 = 8;
const T_DISCARD: u32 = 11;
const T_WRITE_ZEROES: u32 = 13;

const S_OK: u8 = 0;
const S_IOERR: u8 = 1;
const S_UNSUPP: u8 = 2;

/// A request taken apart: header read, data and status byte set aside.
pub(super) struct Request<'m> {
    kind: u32,
    sector: u64,
    /// What the driver sends, after the header.
    sent: Slices<'m>,
    /// Room for what the device sends, before the status byte.
    room: Slices<'m>,
    status: Slices<'m>,
}

/// What a request is carried out with.
pub(super) struct Target<'d> {
    pub(super) disk: &'d Disk,
    pub(super) serial: &'d [u8; SERIAL_BYTES],
    /// The driver knows no flush: a write is on the medium before it is answered.
    pub(super) write_through: bool,
}

/// Why a request was not carried out.
enum Failure {
    /// A kind or a flag this device does not have.
    Unsupported,
    /// The driver asks for what cannot be: past the end, not whole sectors, a write to a read-only disk.
    Refused,
    /// The host's side failed.
    Fault(DiskFault),
}

impl<'m> Request<'m> {
    /// Reads the header of `chain`.
    ///
    /// # Errors
    /// [`Broken::RequestTooShort`] when there is no whole header or no room for the status.
    pub(super) fn parse(memory: &'m GuestMemory, chain: &Chain) -> Result<Self, Broken> {
        let mut sent = memory.slices(chain.readable())?;
        let mut room = memory.slices(chain.writable())?;
        if sent.len() < HEADER_BYTES || room.is_empty() {
            return Err(Broken::RequestTooShort);
        }
        let mut header = [0; HEADER_BYTES];
        sent.take(HEADER_BYTES).copy_to(&mut header);
        let header = u128::from_le_bytes(header);
        let data = room.take(room.len() - 1);
        Ok(Self { kind: header as u32, sector: (header >> 64) as u64, sent, room: data, status: room })
    }

    /// The range of the disk this will read, when it is a read.
    pub(super) fn reads(&self, disk: &Disk) -> Option<(u64, u64)> {
        let bytes = self.room.len();
        (self.kind == T_IN)
            .then(|| range(disk.bytes(), self.sector, bytes).ok())
            .flatten()
            .map(|at| (at, bytes as u64))
    }

    /// Carries the request out and writes its status; how many bytes the driver got, and what failed on our side.
    pub(super) fn serve(self, target: &Target<'_>, scratch: &mut Vec<u8>) -> (u32, Option<DiskFault>) {
        let data_bytes = self.room.len() as u32;
        let status = self.status;
        let outcome = match self.kind {
            T_IN => read(target, self.sector, self.room, scratch),
            T_OUT => write(target, self.sector, self.sent),
            T_FLUSH => target.disk.flush().map_err(Failure::Fault),
            T_GET_ID => {
                let sent = self.room.copy_from(target.serial);
                self.room.without_front(sent).fill_with_zeros();
                Ok(())
            }
            T_DISCARD | T_WRITE_ZEROES => zero(target, self.kind, &self.sent),
            _ => Err(Failure::Unsupported),
        };
        let (code, fault) = match outcome {
            Ok(()) => (S_OK, None),
            Err(Failure::Unsupported) => (S_UNSUPP, None),
            Err(Failure::Refused) => (S_IOERR, None),
            Err(Failure::Fault(fault)) => (S_IOERR, Some(fault)),
        };
        status.copy_from(&[code]);
        // The count is from the first writable byte on; after a failure only an answer that is all status counts.
        let written = if code == S_OK || data_bytes == 0 { data_bytes + 1 } else { 0 };
        (written, fault)
    }
}

/// Where on the disk `bytes` from `sector` on are, when that is before `limit`.
fn range(limit: u64, sector: u64, bytes: usize) -> Result<u64, Failure> {
    let offset = sector.checked_mul(SECTOR_BYTES).ok_or(Failure::Refused)?;
    let end = offset.checked_add(bytes as u64).ok_or(Failure::Refused)?;
    let whole = (bytes as u64).is_multiple_of(SECTOR_BYTES);
    if whole && bytes <= MAX_DATA_BYTES && end <= limit { Ok(offset) } else { Err(Failure::Refused) }
}

fn read(target: &Target<'_>, sector: u64, room: Slices<'_>, scratch: &mut Vec<u8>) -> Result<(), Failure> {
    let offset = range(target.disk.bytes(), sector, room.len())?;
    target.disk.read(offset, room, scratch).map_err(Failure::Fault)
}

fn write(target: &Target<'_>, sector: u64, data: Slices<'_>) -> Result<(), Failure> {
    if target.disk.is_read_only() {
        return Err(Failure::Refused);
    }
    let offset = range(target.disk.backed_bytes(), sector, data.len())?;
    target.disk.write(offset, data).map_err(Failure::Fault)?;
    if target.write_through { target.disk.flush().map_err(Failure::Fault) } else { Ok(()) }
}

/// Discard and write zeroes: a list of ranges. VIRTIO 1.2 §5.2.6.2 "Device Requirements: Device Operation".
fn zero(target: &Target<'_>, kind: u32, list: &Slices<'_>) -> Result<(), Failure> {
    const UNMAP: u32 = 1;
    if target.disk.is_read_only() {
        return Err(Failure::Refused);
    }
    let mut bytes = [0; MAX_ZERO_RANGES as usize * ZERO_RANGE_BYTES];
    let length = list.copy_to(&mut bytes);
    if length != list.len() || length == 0 || !length.is_multiple_of(ZERO_RANGE_BYTES) {
        return Err(Failure::Refused);
    }
    // All ranges are checked before the first is touched.
    let mut ranges = [(0, 0, false); MAX_ZERO_RANGES as usize];
    let count = length / ZERO_RANGE_BYTES;
    for (range, raw) in ranges.iter_mut().zip(bytes[..length].as_chunks::<ZERO_RANGE_BYTES>().0) {
        let raw = u128::from_le_bytes(*raw);
        let (sector, sectors, flags) = (raw as u64, (raw >> 64) as u32, (raw >> 96) as u32);
        let allowed = if kind == T_WRITE_ZEROES { UNMAP } else { 0 };
        if flags & !allowed != 0 {
            return Err(Failure::Unsupported);
        }
        let end = sector.checked_add(u64::from(sectors)).ok_or(Failure::Refused)?;
        if sectors > MAX_ZERO_SECTORS || end > target.disk.backed_bytes() / SECTOR_BYTES {
            return Err(Failure::Refused);
        }
        let keep_space = kind == T_WRITE_ZEROES && flags & UNMAP == 0;
        *range = (sector * SECTOR_BYTES, u64::from(sectors) * SECTOR_BYTES, keep_space);
    }
    for &(offset, bytes, keep_space) in ranges[..count].iter().filter(|(_, bytes, _)| *bytes > 0) {
        target.disk.zero(offset, bytes, keep_space).map_err(|fault| match fault {
            // The driver then writes zeros itself.
            DiskFault::Host { source, .. }
                if source.raw_os_error() == Some(Errno::OPNOTSUPP.raw_os_error()) =>
            {
                Failure::Unsupported
            }
            fault => Failure::Fault(fault),
        })?;
    }
    if target.write_through { target.disk.flush().map_err(Failure::Fault) } else { Ok(()) }
}
