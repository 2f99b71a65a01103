//! The guest's RAM and checked access to it.

use std::fmt;
use std::fs::File;
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use vm_memory::bitmap::BitmapSlice;
use vm_memory::{
    Address, AtomicAccess, Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion,
    VolatileSlice,
};

use crate::{Gpa, Slices, Span};

/// Where RAM below 4 GiB ends at the latest: devices live from here to 4 GiB.
pub const MMIO_HOLE_START: Gpa = Gpa(0xc000_0000);
/// Where RAM goes on after the MMIO hole.
pub const HIGH_RAM_START: Gpa = Gpa(1 << 32);
/// The page size memory is mapped in.
pub const PAGE_BYTES: u64 = 4096;

/// The RAM of one machine. Clones share it; it is unmapped with the last one.
///
/// Nothing is committed until it is touched (`MAP_NORESERVE`), so the size is a ceiling and not a cost.
#[derive(Clone)]
pub struct GuestMemory {
    ram: Arc<GuestMemoryMmap>,
    /// The file mapped in the place of RAM, in which the pages are that this process has not written.
    base: Arc<Mutex<Option<File>>>,
}

/// One contiguous piece of RAM, as a hypervisor maps it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Region {
    /// Where the guest sees it.
    pub at: Gpa,
    /// How long it is.
    pub bytes: u64,
    /// Where it is mapped in this process; it stays there as long as the memory lives.
    pub host_address: u64,
}

/// The memory cannot be made. The caller's fault when the size is impossible, the host's when the mapping fails.
#[derive(Debug, thiserror::Error)]
pub enum MapError {
    /// Not a whole number of pages, none, or past what fits the address space.
    #[error("guest memory of {bytes} bytes is not a positive multiple of {PAGE_BYTES}")]
    Size {
        /// What was asked for.
        bytes: u64,
    },
    /// The host would not map it.
    #[error("cannot map {bytes} bytes of guest memory")]
    Host {
        /// What was asked for.
        bytes: u64,
        /// What the host said.
        #[source]
        source: vm_memory::mmap::FromRangesError,
    },
}

/// An access touches something that is not RAM, or an atomic one is not aligned. The guest's fault when the address
/// came from the guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{bytes} bytes at {at} are not guest RAM")]
pub struct OutOfRange {
    /// The first byte of the access.
    pub at: Gpa,
    /// Its length.
    pub bytes: usize,
}

impl GuestMemory {
    /// Fresh RAM of `bytes` bytes, all zeros: up to [`MMIO_HOLE_START`] from 0, the rest from [`HIGH_RAM_START`].
    ///
    /// # Errors
    /// [`MapError`]
    pub fn new(bytes: u64) -> Result<Self, MapError> {
        let low = bytes.min(MMIO_HOLE_START.0);
        let high = bytes - low;
        if bytes == 0 || !bytes.is_multiple_of(PAGE_BYTES) || high > i64::MAX as u64 {
            return Err(MapError::Size { bytes });
        }
        let mut ranges = vec![(GuestAddress(0), low as usize)];
        if high > 0 {
            ranges.push((GuestAddress(HIGH_RAM_START.0), high as usize));
        }
        // Anonymous, private, not reserved: what `from_ranges` maps.
        let ram = GuestMemoryMmap::from_ranges(&ranges).map_err(|source| MapError::Host { bytes, source })?;
        Ok(Self { ram: Arc::new(ram), base: Arc::default() })
    }

    /// The pieces of RAM in ascending order: one, or two when there is RAM past the MMIO hole.
    pub fn regions(&self) -> impl Iterator<Item = Region> {
        self.ram.iter().map(|region| Region {
            at: Gpa(region.start_addr().raw_value()),
            bytes: region.len(),
            host_address: region.as_ptr() as u64,
        })
    }

    /// How much RAM there is, in bytes.
    pub fn bytes(&self) -> u64 {
        self.regions().map(|region| region.bytes).sum()
    }

    /// Says whether all of `span` is RAM.
    ///
    /// # Errors
    /// [`OutOfRange`] when not.
    pub fn check(&self, span: Span) -> Result<(), OutOfRange> {
        self.slice(span.at, span.bytes).map(drop)
    }

    /// Copies guest memory at `at` into `into`.
    ///
    /// # Errors
    /// [`OutOfRange`]; `into` is untouched then.
    pub fn read(&self, at: Gpa, into: &mut [u8]) -> Result<(), OutOfRange> {
        self.slice(at, into.len())?.copy_to(into);
        Ok(())
    }

    /// Copies `from` to guest memory at `at`.
    ///
    /// # Errors
    /// [`OutOfRange`]; the memory is untouched then.
    pub fn write(&self, at: Gpa, from: &[u8]) -> Result<(), OutOfRange> {
        self.slice(at, from.len())?.copy_from(from);
        Ok(())
    }

    /// Reads `N` bytes at `at`: `u32::from_le_bytes(memory.read_array(at)?)`.
    ///
    /// # Errors
    /// [`OutOfRange`]
    pub fn read_array<const N: usize>(&self, at: Gpa) -> Result<[u8; N], OutOfRange> {
        let mut bytes = [0; N];
        self.read(at, &mut bytes)?;
        Ok(bytes)
    }

    /// Reads a little-endian `u16`; it may tear when the guest writes it at the same time.
    ///
    /// # Errors
    /// [`OutOfRange`]
    pub fn read_u16(&self, at: Gpa) -> Result<u16, OutOfRange> {
        self.read_array(at).map(u16::from_le_bytes)
    }

    /// Reads a little-endian `u32`; it may tear when the guest writes it at the same time.
    ///
    /// # Errors
    /// [`OutOfRange`]
    pub fn read_u32(&self, at: Gpa) -> Result<u32, OutOfRange> {
        self.read_array(at).map(u32::from_le_bytes)
    }

    /// Reads a little-endian `u64`; it may tear when the guest writes it at the same time.
    ///
    /// # Errors
    /// [`OutOfRange`]
    pub fn read_u64(&self, at: Gpa) -> Result<u64, OutOfRange> {
        self.read_array(at).map(u64::from_le_bytes)
    }

    /// Writes a little-endian `u16`.
    ///
    /// # Errors
    /// [`OutOfRange`]
    pub fn write_u16(&self, at: Gpa, value: u16) -> Result<(), OutOfRange> {
        self.write(at, &value.to_le_bytes())
    }

    /// Writes a little-endian `u32`.
    ///
    /// # Errors
    /// [`OutOfRange`]
    pub fn write_u32(&self, at: Gpa, value: u32) -> Result<(), OutOfRange> {
        self.write(at, &value.to_le_bytes())
    }

    /// Writes a little-endian `u64`.
    ///
    /// # Errors
    /// [`OutOfRange`]
    pub fn write_u64(&self, at: Gpa, value: u64) -> Result<(), OutOfRange> {
        self.write(at, &value.to_le_bytes())
    }

    /// Loads a little-endian `u16` atomically; `at` must be even.
    ///
    /// # Errors
    /// [`OutOfRange`]
    pub fn load_u16(&self, at: Gpa, ordering: Ordering) -> Result<u16, OutOfRange> {
        self.load(at, ordering).map(u16::from_le)
    }

    /// Stores a little-endian `u16` atomically; `at` must be even.
    ///
    /// # Errors
    /// [`OutOfRange`]
    pub fn store_u16(&self, at: Gpa, value: u16, ordering: Ordering) -> Result<(), OutOfRange> {
        self.store(at, value.to_le(), ordering)
    }

    /// Loads a little-endian `u32` atomically; `at` must be a multiple of 4.
    ///
    /// # Errors
    /// [`OutOfRange`]
    pub fn load_u32(&self, at: Gpa, ordering: Ordering) -> Result<u32, OutOfRange> {
        self.load(at, ordering).map(u32::from_le)
    }

    /// Stores a little-endian `u32` atomically; `at` must be a multiple of 4.
    ///
    /// # Errors
    /// [`OutOfRange`]
    pub fn store_u32(&self, at: Gpa, value: u32, ordering: Ordering) -> Result<(), OutOfRange> {
        self.store(at, value.to_le(), ordering)
    }

    /// A checked scatter/gather list over `spans`, in order, for bulk transfers without a copy of ours.
    ///
    /// # Errors
    /// [`OutOfRange`] for the first span that is not RAM.
    pub fn slices(&self, spans: &[Span]) -> Result<Slices<'_>, OutOfRange> {
        let mut pieces = Vec::with_capacity(spans.len());
        for span in spans {
            pieces.push(self.slice(span.at, span.bytes)?);
        }
        Ok(Slices::new(&pieces))
    }

    /// The file in the place of RAM, if there is one.
    pub(crate) fn base(&self) -> MutexGuard<'_, Option<File>> {
        self.base.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The checked run itself. RAM regions never touch each other, so a run that is all RAM lies in one of them.
    fn slice(
        &self,
        at: Gpa,
        bytes: usize,
    ) -> Result<VolatileSlice<'_, impl BitmapSlice + use<'_>>, OutOfRange> {
        self.ram.get_slice(GuestAddress(at.0), bytes).map_err(|_| OutOfRange { at, bytes })
    }

    fn load<T: AtomicAccess>(&self, at: Gpa, ordering: Ordering) -> Result<T, OutOfRange> {
        let bytes = size_of::<T>();
        self.slice(at, bytes)?.load(0, ordering).map_err(|_| OutOfRange { at, bytes })
    }

    fn store<T: AtomicAccess>(&self, at: Gpa, value: T, ordering: Ordering) -> Result<(), OutOfRange> {
        let bytes = size_of::<T>();
        self.slice(at, bytes)?.store(value, 0, ordering).map_err(|_| OutOfRange { at, bytes })
    }
}

impl fmt::Debug for GuestMemory {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_list().entries(self.regions()).finish()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const GIB: u64 = 1 << 30;

    #[test]
    fn ram_past_the_hole_starts_at_4_gib() {
        let memory = GuestMemory::new(8 * GIB).expect("mapped");
        let regions: Vec<_> = memory.regions().map(|region| (region.at, region.bytes)).collect();
        assert_eq!(regions, [(Gpa(0), 3 * GIB), (HIGH_RAM_START, 5 * GIB)]);
        assert_eq!(memory.bytes(), 8 * GIB);
        memory.write_u64(Gpa(9 * GIB - 8), 7).expect("the last word is RAM");
        assert_eq!(memory.read_u64(Gpa(9 * GIB - 8)), Ok(7));
    }

    #[test]
    fn small_ram_is_one_region() {
        let memory = GuestMemory::new(64 << 20).expect("mapped");
        assert_eq!(memory.regions().count(), 1);
    }

    #[test]
    fn impossible_sizes_are_refused() {
        for bytes in [0, 1, 4095, u64::MAX, u64::MAX - 4095] {
            assert!(matches!(GuestMemory::new(bytes), Err(MapError::Size { .. })), "{bytes}");
        }
    }

    #[test]
    fn accesses_outside_ram_are_refused() {
        let memory = GuestMemory::new(4 * GIB).expect("mapped");
        let hole = MMIO_HOLE_START;
        assert_eq!(memory.read_u32(hole), Err(OutOfRange { at: hole, bytes: 4 }));
        assert!(memory.read_u32(Gpa(hole.0 - 2)).is_err(), "across the edge of the hole");
        assert!(memory.write_u16(Gpa(HIGH_RAM_START.0 - 1), 1).is_err(), "into high RAM from the hole");
        assert!(memory.read_u64(Gpa(5 * GIB - 4)).is_err(), "across the end");
        assert!(memory.read_u64(Gpa(u64::MAX - 3)).is_err(), "across the end of the address space");
        assert!(memory.check(Span::new(Gpa(0), usize::MAX)).is_err());
        assert!(memory.check(Span::new(Gpa(1), usize::MAX)).is_err());
    }

    #[test]
    fn a_refused_write_changes_nothing() {
        let memory = GuestMemory::new(PAGE_BYTES).expect("mapped");
        assert!(memory.write(Gpa(PAGE_BYTES - 4), &[1; 8]).is_err());
        assert_eq!(memory.read_u32(Gpa(PAGE_BYTES - 4)), Ok(0));
    }

    #[test]
    fn unaligned_atomics_are_refused() {
        let memory = GuestMemory::new(PAGE_BYTES).expect("mapped");
        assert!(memory.load_u16(Gpa(1), Ordering::Acquire).is_err());
        assert!(memory.store_u32(Gpa(2), 1, Ordering::Release).is_err());
        memory.store_u32(Gpa(4), 0x0403_0201, Ordering::Release).expect("aligned");
        assert_eq!(memory.read_array(Gpa(4)), Ok([1, 2, 3, 4]));
        assert_eq!(memory.load_u16(Gpa(6), Ordering::Acquire), Ok(0x0403));
    }

    #[test]
    fn nothing_is_committed_before_it_is_touched() {
        // Far more than any test machine has; the mapping must not reserve it.
        let memory = GuestMemory::new(512 * GIB).expect("mapped");
        memory.write_u16(Gpa(500 * GIB), 1).expect("RAM");
    }
}
