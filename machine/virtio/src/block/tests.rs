//! The block device, driven through its registers and its queue.

use std::fs::File;
use std::io::{Read, Seek, SeekFrom, Write};
use std::os::unix::fs::{FileExt, MetadataExt};
use std::process::{Command, Stdio};
use std::sync::Mutex;

use kiln_memory::{Gpa, Span};
use proptest::prelude::*;
use sha2::{Digest, Sha256};

use super::*;
use crate::Transport;
use crate::testing::Driver;

const T_IN: u32 = 0;
const T_OUT: u32 = 1;
const T_FLUSH: u32 = 4;
const T_GET_ID: u32 = 8;
const T_DISCARD: u32 = 11;
const T_WRITE_ZEROES: u32 = 13;
const OK: u8 = 0;
const IOERR: u8 = 1;
const UNSUPP: u8 = 2;

const RAM_BYTES: u64 = 16 << 20;
/// Where the data buffer of a request is, and its header and status.
const DATA: Gpa = Gpa(0x40_0000);
const HEADER: Gpa = Gpa(0x20_0000);
const STATUS: Gpa = Gpa(0x20_1000);

/// A driver of one block device.
struct Guest {
    driver: Driver,
    faults: Arc<Mutex<Vec<String>>>,
}

impl Guest {
    fn start(disk: Disk) -> Self {
        Self::start_without(disk, 0)
    }

    /// With all features but `features`.
    fn start_without(disk: Disk, features: u64) -> Self {
        let faults = Arc::new(Mutex::new(Vec::new()));
        let sink = Arc::clone(&faults);
        let report = move |fault: &DiskFault| sink.lock().expect("not poisoned").push(fault.to_string());
        let device = Block::new(disk, "layers", Box::new(report)).expect("a short serial");
        let mut driver = Driver::attach(Box::new(device), RAM_BYTES);
        let offered = driver.offered();
        driver.bring_up(offered & !features);
        assert_eq!(driver.read(0x70), 15);
        Self { driver, faults }
    }

    fn submit(&mut self, kind: u32, sector: u64, out: &[Span], into: &[Span]) {
        let mut header = [0; 16];
        header[..4].copy_from_slice(&kind.to_le_bytes());
        header[8..].copy_from_slice(&sector.to_le_bytes());
        self.driver.memory.write(HEADER, &header).expect("RAM");
        self.driver.memory.write(STATUS, &[0xff]).expect("RAM");
        let readable: Vec<_> = std::iter::once(Span::new(HEADER, 16)).chain(out.iter().copied()).collect();
        let writable: Vec<_> = into.iter().copied().chain(std::iter::once(Span::new(STATUS, 1))).collect();
        self.driver.queues[0].submit(&readable, &writable).expect("free descriptors");
        self.driver.kick(0);
    }

    /// Submits one request, waits for it, and gives its status and the count of bytes written.
    fn request(&mut self, kind: u32, sector: u64, out: &[Span], into: &[Span]) -> (u8, u32) {
        self.submit(kind, sector, out, into);
        let (_, written) = self.driver.wait_used(0);
        let [status] = self.driver.memory.read_array(STATUS).expect("RAM");
        (status, written)
    }

    fn read(&mut self, sector: u64, bytes: usize) -> Result<Vec<u8>, u8> {
        self.driver.memory.write(DATA, &vec![0xa5; bytes]).expect("RAM");
        let (status, written) = self.request(T_IN, sector, &[], &[Span::new(DATA, bytes)]);
        if status != OK {
            return Err(status);
        }
        assert_eq!(written as usize, bytes + 1);
        let mut data = vec![0; bytes];
        self.driver.memory.read(DATA, &mut data).expect("RAM");
        Ok(data)
    }

    fn write(&mut self, sector: u64, data: &[u8]) -> u8 {
        self.driver.memory.write(DATA, data).expect("RAM");
        self.request(T_OUT, sector, &[Span::new(DATA, data.len())], &[]).0
    }

    fn zero(&mut self, kind: u32, ranges: &[(u64, u32, u32)]) -> u8 {
        let mut list = Vec::new();
        for (sector, sectors, flags) in ranges {
            list.extend(sector.to_le_bytes());
            list.extend(sectors.to_le_bytes());
            list.extend(flags.to_le_bytes());
        }
        self.driver.memory.write(DATA, &list).expect("RAM");
        self.request(kind, 0, &[Span::new(DATA, list.len())], &[]).0
    }

    fn faults(&self) -> Vec<String> {
        self.faults.lock().expect("not poisoned").clone()
    }
}

/// Bytes that differ from place to place.
fn pattern(bytes: usize, seed: u64) -> Vec<u8> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let mut data = Vec::with_capacity(bytes + 8);
    while data.len() < bytes {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        data.extend(state.to_le_bytes());
    }
    data.truncate(bytes);
    data
}

fn file_with(content: &[u8]) -> File {
    let mut file = tempfile::tempfile().expect("a file");
    file.write_all(content).expect("written");
    file
}

fn digests_of(content: &[u8]) -> File {
    let digests: Vec<u8> = content.chunks(64 << 10).flat_map(Sha256::digest).collect();
    file_with(&digests)
}

fn verified(content: &[u8]) -> Arc<DataFile> {
    Arc::new(DataFile::verified(file_with(content), digests_of(content)).expect("digests that fit"))
}

fn trusted(file: &File) -> Arc<DataFile> {
    Arc::new(DataFile::trusted(file.try_clone().expect("a descriptor")))
}

fn scratch(bytes: u64) -> (File, Disk) {
    let file = tempfile::tempfile().expect("a file");
    file.set_len(bytes).expect("a sparse file");
    let disk = Disk::writable(Extent { file: trusted(&file), offset: 0, bytes }).expect("a disk");
    (file, disk)
}

#[test]
fn a_disk_of_pieces_reads_as_their_concatenation() {
    let (a, b) = (pattern(0x2_3000, 1), pattern(0x5_1000, 2));
    let (file_a, file_b) = (verified(&a), trusted(&file_with(&b)));
    let extents = vec![
        Extent { file: Arc::clone(&file_a), offset: 0x1000, bytes: 0x1_2000 },
        Extent { file: Arc::clone(&file_b), offset: 0x4_0000, bytes: 0x1_1000 },
        // Past the end of its file: zeros.
        Extent { file: file_a, offset: 0x2_2000, bytes: 0x3000 },
        Extent { file: file_b, offset: 0, bytes: 0x1000 },
    ];
    let mut expected = a[0x1000..0x1_3000].to_vec();
    expected.extend(&b[0x4_0000..0x5_1000]);
    expected.extend(&a[0x2_2000..]);
    expected.resize(expected.len() + 0x2000, 0);
    expected.extend(&b[..0x1000]);
    let mut guest = Guest::start(Disk::read_only(extents).expect("a disk"));
    assert_eq!(guest.driver.read(0x100), (expected.len() / 512) as u32, "the capacity");
    // Twice: by way of verification, and from verified blocks.
    for _ in 0..2 {
        assert_eq!(guest.read(0, expected.len()), Ok(expected.clone()));
        for sector in [0, 1, 127, 128, 143, 144, 145, 280, 285, 300] {
            let at = sector as usize * 512;
            assert_eq!(guest.read(sector, 1024), Ok(expected[at..at + 1024].to_vec()), "sector {sector}");
        }
    }
    assert_eq!(guest.faults(), [""; 0]);
}

#[test]
fn a_last_block_that_is_short_is_verified_as_long_as_it_is() {
    let content = pattern((64 << 10) + 777, 3);
    let extent = Extent { file: verified(&content), offset: 0, bytes: 0x1_1000 };
    let mut guest = Guest::start(Disk::read_only(vec![extent]).expect("a disk"));
    let mut expected = content;
    expected.resize(0x1_1000, 0);
    for _ in 0..2 {
        assert_eq!(guest.read(0, 0x1_1000), Ok(expected.clone()));
        assert_eq!(guest.read(129, 512), Ok(expected[129 * 512..130 * 512].to_vec()));
    }
}

#[test]
fn one_flipped_bit_fails_the_reads_of_its_block_and_no_other() {
    let content = pattern(4 * (64 << 10), 4);
    let file = file_with(&content);
    let place = 2 * (64 << 10) + 54_321;
    file.write_all_at(&[content[place] ^ 0x10], place as u64).expect("written");
    let data = DataFile::verified(file, digests_of(&content)).expect("digests that fit");
    let extent = Extent { file: Arc::new(data), offset: 0, bytes: content.len() as u64 };
    let mut guest = Guest::start(Disk::read_only(vec![extent]).expect("a disk"));
    assert_eq!(guest.read(0, 128 << 10), Ok(content[..128 << 10].to_vec()));
    assert_eq!(guest.read(384, 64 << 10), Ok(content[192 << 10..].to_vec()));
    // Anywhere in the block, also where its bytes are right, and again.
    assert_eq!(guest.read(256, 512), Err(IOERR));
    assert_eq!(guest.read(256, 512), Err(IOERR));
    assert_eq!(guest.read(0, content.len()), Err(IOERR));
    assert_eq!(guest.faults()[0], "extent 0 of the disk: block 2 of its file does not match its digest");
}

#[test]
fn a_verified_block_vouches_for_no_other() {
    const BLOCK_BYTES: usize = 64 << 10;
    const BLOCKS: usize = 140;
    let sound = [0, 7, 63, 100];
    let content = pattern(BLOCKS * BLOCK_BYTES, 7);
    let file = file_with(&content);
    for block in (0..BLOCKS).filter(|block| !sound.contains(block)) {
        let place = block * BLOCK_BYTES + 999;
        file.write_all_at(&[content[place] ^ 1], place as u64).expect("written");
    }
    let data = DataFile::verified(file, digests_of(&content)).expect("digests that fit");
    let extent = Extent { file: Arc::new(data), offset: 0, bytes: content.len() as u64 };
    let mut guest = Guest::start(Disk::read_only(vec![extent]).expect("a disk"));
    let sector = |block: usize| (block * BLOCK_BYTES / 512) as u64;
    for block in sound.into_iter().chain(0..BLOCKS) {
        let at = block * BLOCK_BYTES;
        let expected = if sound.contains(&block) { Ok(content[at..at + 4096].to_vec()) } else { Err(IOERR) };
        assert_eq!(guest.read(sector(block), 4096), expected, "block {block}");
    }
}

#[test]
fn a_restored_disk_goes_on_behind_the_last_request() {
    let content = pattern(1 << 20, 8);
    let disk = || {
        let extent = Extent { file: verified(&content), offset: 0, bytes: content.len() as u64 };
        Disk::read_only(vec![extent]).expect("a disk")
    };
    let mut guest = Guest::start(disk());
    for sector in 0..5 {
        guest.read(sector, 512).expect("read");
    }
    guest.driver.transport.pause();
    let saved = guest.driver.transport.save().expect("nothing is in flight");
    let device = Block::new(disk(), "layers", Box::new(|_| {})).expect("a short serial");
    let (memory, line) = (guest.driver.memory.clone(), guest.driver.raised.clone());
    guest.driver.transport = Transport::restore(Box::new(device), memory, line, &saved).expect("restored");
    assert_eq!(guest.driver.transport.save(), Some(saved));
    guest.driver.transport.resume();
    for sector in 100..400 {
        let at = sector as usize * 512;
        assert_eq!(guest.read(sector, 512), Ok(content[at..at + 512].to_vec()), "sector {sector}");
    }
}

#[test]
fn a_request_of_a_paused_device_is_served_when_it_goes_on() {
    let content = pattern(64 << 10, 5);
    let extent = Extent { file: verified(&content), offset: 0, bytes: 64 << 10 };
    let mut guest = Guest::start(Disk::read_only(vec![extent]).expect("a disk"));
    guest.driver.transport.pause();
    guest.submit(T_IN, 1, &[], &[Span::new(DATA, 512)]);
    guest.driver.transport.resume();
    guest.driver.wait_used(0);
    assert_eq!(guest.driver.memory.read_array::<512>(DATA).expect("RAM"), content[512..1024]);
}

#[test]
fn a_guest_that_reads_a_broken_block_forever_is_reported_eight_times() {
    let content = pattern(64 << 10, 5);
    let data =
        DataFile::verified(file_with(&content), digests_of(&pattern(64 << 10, 6))).expect("lengths fit");
    let extent = Extent { file: Arc::new(data), offset: 0, bytes: 64 << 10 };
    let mut guest = Guest::start(Disk::read_only(vec![extent]).expect("a disk"));
    for _ in 0..20 {
        assert_eq!(guest.read(0, 512), Err(IOERR));
    }
    assert_eq!(guest.faults().len(), 8);
}

#[test]
fn a_verified_file_cut_short_is_corrupt() {
    let content = pattern(128 << 10, 7);
    let file = file_with(&content);
    let data =
        DataFile::verified(file.try_clone().expect("a descriptor"), digests_of(&content)).expect("fits");
    let extent = Extent { file: Arc::new(data), offset: 0, bytes: 128 << 10 };
    let mut guest = Guest::start(Disk::read_only(vec![extent]).expect("a disk"));
    assert!(guest.read(0, 64 << 10).is_ok());
    file.set_len(1 << 10).expect("cut");
    assert_eq!(guest.read(8, 4096), Err(IOERR), "verified before");
    assert_eq!(guest.read(128, 4096), Err(IOERR), "not verified before");
    assert_eq!(guest.faults().len(), 2);
}

#[test]
fn digests_that_do_not_cover_the_file_are_refused() {
    let content = pattern(100 << 10, 8);
    for bytes in [0, 32, 63, 65, 96] {
        let digests = file_with(&vec![0; bytes]);
        let result = DataFile::verified(file_with(&content), digests);
        assert!(matches!(result, Err(DiskError::Digests { expected: 64, .. })), "{bytes}");
    }
}

#[test]
fn impossible_disks_are_refused() {
    let file = trusted(&file_with(&[]));
    let extent = |offset, bytes| Extent { file: Arc::clone(&file), offset, bytes };
    for bad in [
        vec![],
        vec![extent(0, 0)],
        vec![extent(512, 4096)],
        vec![extent(0, 4097)],
        vec![extent(u64::MAX - 4095, 4096)],
        vec![extent(1 << 62, 1 << 62)],
        vec![extent(0, 1 << 62), extent(0, 1 << 62)],
        vec![extent(0, 4096); 1025],
    ] {
        assert!(matches!(Disk::read_only(bad), Err(DiskError::Shape(_))));
    }
    let with_digests = Extent { file: verified(&[0; 4096]), offset: 0, bytes: 4096 };
    assert!(matches!(Disk::writable(with_digests), Err(DiskError::Shape(_))));
    let (_, disk) = scratch(4096);
    assert!(Block::new(disk, "123456789012345678901", Box::new(|_| {})).is_err(), "21 bytes of serial");
}

#[test]
fn what_is_written_is_read_and_is_in_the_file() {
    let (file, disk) = scratch(1 << 20);
    let mut guest = Guest::start(disk);
    let data = pattern(12 << 10, 9);
    assert_eq!(guest.write(100, &data), OK);
    assert_eq!(guest.read(100, data.len()), Ok(data.clone()));
    let mut found = vec![0; data.len()];
    file.read_exact_at(&mut found, 51_200).expect("read");
    assert_eq!(found, data);
    assert_eq!(guest.request(T_FLUSH, 0, &[], &[]), (OK, 1));
}

#[test]
fn a_read_only_disk_refuses_writes() {
    let file = file_with(&[7; 8192]);
    let disk =
        Disk::read_only(vec![Extent { file: trusted(&file), offset: 0, bytes: 8192 }]).expect("a disk");
    let mut guest = Guest::start(disk);
    assert_eq!(
        guest.driver.offered() & (1 << 5 | 1 << 9 | 1 << 13 | 1 << 14),
        1 << 5,
        "read-only, nothing to flush"
    );
    assert_eq!(guest.write(0, &[1; 512]), IOERR);
    assert_eq!(guest.zero(T_DISCARD, &[(0, 8, 0)]), IOERR);
    assert_eq!(guest.zero(T_WRITE_ZEROES, &[(0, 8, 0)]), IOERR);
    let mut content = Vec::new();
    (&file).seek(SeekFrom::Start(0)).expect("rewound");
    (&file).read_to_end(&mut content).expect("read");
    assert_eq!(content, [7; 8192]);
}

#[test]
fn requests_past_the_end_or_of_parts_of_sectors_fail() {
    let (_file, disk) = scratch(1 << 20);
    let mut guest = Guest::start(disk);
    assert!(guest.read(2047, 512).is_ok());
    for (sector, bytes) in [(2048, 512), (2047, 1024), (u64::MAX, 512), (1 << 55, 512), (0, 511), (0, 513)] {
        assert_eq!(guest.read(sector, bytes), Err(IOERR), "{bytes} bytes at sector {sector}");
        assert_eq!(guest.write(sector, &vec![1; bytes]), IOERR);
    }
    assert_eq!(guest.read(0, 0), Ok(vec![]));
    assert_eq!(guest.faults(), [""; 0], "the guest's own fault is not reported");
}

#[test]
fn a_request_of_too_much_data_fails() {
    let (_file, disk) = scratch(1 << 30);
    let mut guest = Guest::start(disk);
    // The same memory, again and again: 100 times 1 MiB.
    let spans = vec![Span::new(DATA, 1 << 20); 100];
    assert_eq!(guest.request(T_OUT, 0, &spans, &[]).0, IOERR);
    assert_eq!(guest.request(T_OUT, 0, &spans[..64], &[]).0, OK);
}

#[test]
fn unknown_requests_are_unsupported() {
    let (_file, disk) = scratch(1 << 20);
    let mut guest = Guest::start(disk);
    for kind in [2, 3, 5, 14, u32::MAX] {
        assert_eq!(guest.request(kind, 0, &[], &[]), (UNSUPP, 1));
    }
    assert_eq!(guest.zero(T_DISCARD, &[(0, 8, 1)]), UNSUPP);
    assert_eq!(guest.zero(T_WRITE_ZEROES, &[(0, 8, 2)]), UNSUPP);
}

#[test]
fn the_serial_is_padded_with_zeros() {
    let (_file, disk) = scratch(4096);
    let mut guest = Guest::start(disk);
    guest.driver.memory.write(DATA, &[0xff; 20]).expect("RAM");
    assert_eq!(guest.request(T_GET_ID, 0, &[], &[Span::new(DATA, 20)]), (OK, 21));
    assert_eq!(
        &guest.driver.memory.read_array::<20>(DATA).expect("RAM"),
        b"layers\0\0\0\0\0\0\0\0\0\0\0\0\0\0"
    );
}

#[test]
fn discarded_and_zeroed_ranges_read_as_zeros_and_give_their_space_back() {
    let (file, disk) = scratch(1 << 20);
    let mut guest = Guest::start(disk);
    let data = pattern(1 << 20, 10);
    assert_eq!(guest.write(0, &data), OK);
    assert_eq!(guest.request(T_FLUSH, 0, &[], &[]).0, OK);
    let full = file.metadata().expect("metadata").blocks();
    assert_eq!(guest.zero(T_DISCARD, &[(0, 256, 0), (1024, 256, 0)]), OK);
    assert_eq!(guest.zero(T_WRITE_ZEROES, &[(512, 256, 1)]), OK);
    let mut expected = data;
    for start in [0, 256 << 10, 512 << 10] {
        expected[start..start + (128 << 10)].fill(0);
    }
    assert_eq!(guest.read(0, 1 << 20), Ok(expected.clone()));
    let holes = full - file.metadata().expect("metadata").blocks();
    assert_eq!(holes, 3 * 256, "space in units of 512 bytes");
    // Not unmapped, where the file system knows how: zero all the same.
    let kept = guest.zero(T_WRITE_ZEROES, &[(1536, 16, 0)]);
    assert!(kept == OK || kept == UNSUPP);
    if kept == OK {
        expected[768 << 10..776 << 10].fill(0);
    }
    assert_eq!(guest.read(0, 1 << 20), Ok(expected));
    assert_eq!(file.metadata().expect("metadata").len(), 1 << 20);
}

#[test]
fn bad_ranges_change_nothing_not_even_by_the_good_ones_before_them() {
    let (_file, disk) = scratch(1 << 20);
    let mut guest = Guest::start(disk);
    let data = pattern(4096, 11);
    assert_eq!(guest.write(0, &data), OK);
    for bad in [(2048, 1, 0), (2040, 9, 0), (u64::MAX, 1, 0), (0, u32::MAX, 0), (0, (1 << 22) + 1, 0)] {
        assert_eq!(guest.zero(T_DISCARD, &[(0, 8, 0), bad]), IOERR, "{bad:?}");
    }
    assert_eq!(guest.zero(T_DISCARD, &[(0, 8, 0), (8, 8, 4)]), UNSUPP);
    assert_eq!(guest.zero(T_DISCARD, &[(0, 8, 0); 17]), IOERR, "more ranges than allowed");
    assert_eq!(guest.zero(T_DISCARD, &[]), IOERR);
    let half_a_range = Span::new(DATA, 24);
    assert_eq!(guest.request(T_DISCARD, 0, &[half_a_range], &[]).0, IOERR);
    assert_eq!(guest.read(0, 4096), Ok(data));
}

#[test]
fn a_request_in_many_pieces_is_one_request() {
    let (_file, disk) = scratch(1 << 20);
    let mut guest = Guest::start(disk);
    let data = pattern(4096, 12);
    guest.driver.memory.write(DATA, &data).expect("RAM");
    // The header in three pieces, the data in uneven ones, the status at the end of a data buffer.
    let mut header = [0; 16];
    header[..4].copy_from_slice(&T_OUT.to_le_bytes());
    header[8] = 9;
    guest.driver.memory.write(HEADER, &header).expect("RAM");
    let at = |base: Gpa, from: u64, bytes| Span::new(Gpa(base.0 + from), bytes);
    let readable = [
        at(HEADER, 0, 1),
        at(HEADER, 1, 10),
        at(HEADER, 11, 5),
        at(DATA, 0, 1),
        at(DATA, 1, 3000),
        at(DATA, 3001, 1095),
    ];
    guest.driver.queues[0].submit(&readable, &[Span::new(STATUS, 1)]).expect("free");
    guest.driver.kick(0);
    assert_eq!(guest.driver.wait_used(0).1, 1);
    header[..4].copy_from_slice(&T_IN.to_le_bytes());
    guest.driver.memory.write(HEADER, &header).expect("RAM");
    let back = Gpa(DATA.0 + 0x10_0000);
    let writable = [at(back, 0, 100), at(back, 100, 3997)];
    guest.driver.queues[0].submit(&[at(HEADER, 0, 16)], &writable).expect("free");
    guest.driver.kick(0);
    assert_eq!(guest.driver.wait_used(0).1, 4097);
    let mut found = vec![0; 4097];
    guest.driver.memory.read(back, &mut found).expect("RAM");
    assert_eq!((&found[..4096], found[4096]), (&data[..], OK));
}

#[test]
fn many_requests_at_once_are_all_answered() {
    let (_file, disk) = scratch(1 << 20);
    let mut guest = Guest::start(disk);
    for round in 0..50_u64 {
        for n in 0..64 {
            let place = Gpa(DATA.0 + n * 512);
            guest.driver.memory.write(place, &[(round + n) as u8; 512]).expect("RAM");
            let header = Gpa(HEADER.0 + 0x1_0000 + n * 16);
            let mut bytes = [0; 16];
            bytes[0] = T_OUT as u8;
            bytes[8..].copy_from_slice(&(n * 7).to_le_bytes());
            guest.driver.memory.write(header, &bytes).expect("RAM");
            let readable = [Span::new(header, 16), Span::new(place, 512)];
            guest.driver.queues[0].submit(&readable, &[Span::new(STATUS, 1)]).expect("free");
            if n % 5 == 0 {
                guest.driver.kick(0);
            }
        }
        guest.driver.kick(0);
        for _ in 0..64 {
            guest.driver.wait_used(0);
        }
        for n in 0..64 {
            assert_eq!(guest.read(n * 7, 512), Ok(vec![(round + n) as u8; 512]));
        }
    }
}

#[test]
fn a_request_without_room_for_a_status_breaks_the_device() {
    for (readable, writable) in [(16, 0), (15, 1)] {
        let (_file, disk) = scratch(4096);
        let mut guest = Guest::start(disk);
        let room = [Span::new(STATUS, writable)];
        let room = if writable == 0 { &room[..0] } else { &room[..] };
        guest.driver.queues[0].submit(&[Span::new(HEADER, readable)], room).expect("free");
        guest.driver.kick(0);
        guest.driver.wait_broken();
        assert_eq!(guest.driver.transport.fault(), Some(Broken::RequestTooShort));
        // And a reset heals it.
        guest.driver.write(0x70, 0);
        let features = guest.driver.offered();
        guest.driver.bring_up(features);
        assert!(guest.read(0, 512).is_ok());
    }
}

#[test]
fn a_hostile_queue_stops_the_disk_and_nothing_else() {
    let (_file, disk) = scratch(4096);
    let mut guest = Guest::start(disk);
    guest.driver.queues[0].write_available_index(300);
    guest.driver.kick(0);
    guest.driver.wait_broken();
    assert!(matches!(guest.driver.transport.fault(), Some(Broken::AvailableIndex { claimed: 300, .. })));
    guest.driver.kick(0);
    guest.driver.write(0x70, 0);
    assert_eq!(guest.driver.read(0x70), 0);
}

#[test]
fn requests_published_before_the_driver_was_ready_are_served() {
    let (_file, disk) = scratch(4096);
    let mut guest = Guest::start(disk);
    // Everything but the last step again, with a request in the queue already.
    let entries = guest.driver.queues[0].layout().entries as u16;
    for status in [0, 1, 3] {
        guest.driver.write(0x70, status);
    }
    guest.driver.write(0x24, 1);
    guest.driver.write(0x20, 1);
    guest.driver.write(0x70, 11);
    let queue = crate::testing::GuestQueue::new(&guest.driver.memory, Gpa(0x1000), entries);
    guest.driver.place(&queue);
    guest.driver.queues = vec![queue];
    guest.submit(T_FLUSH, 0, &[], &[]);
    guest.driver.write(0x70, 15);
    assert_eq!(guest.driver.wait_used(0).1, 1);
}

#[test]
fn a_stopped_disk_goes_on_where_it_was() {
    let (_file, disk) = scratch(1 << 20);
    let mut device = Block::new(disk, "", Box::new(|_| {})).expect("a disk");
    let memory = kiln_memory::GuestMemory::new(RAM_BYTES).expect("mapped");
    let mut queue = crate::testing::GuestQueue::new(&memory, Gpa(0x1000), 256);
    let raised = Arc::new(crate::testing::Raised::default());
    let mut session = Some(Session {
        features: F_FLUSH,
        memory: memory.clone(),
        queues: vec![crate::Queue::new(&memory, queue.layout(), 256, false).expect("a queue")],
        signal: Arc::new(crate::Signal::new(Arc::clone(&raised) as Arc<dyn crate::Interrupt>)),
        kept: None,
        restored: false,
        lost: false,
    });
    memory.write(HEADER, &[4, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0]).expect("RAM");
    let mut answered = 0;
    for round in 0..20 {
        for _ in 0..50 {
            queue.submit(&[Span::new(HEADER, 16)], &[Span::new(STATUS, 1)]).expect("free");
        }
        device.start(session.take().expect("a session")).expect("started");
        device.kick(0);
        // Stopped at any point of its work: what it did is done, the rest waits.
        session = device.stop();
        assert!(device.stop().is_none());
        answered += std::iter::from_fn(|| queue.take_used()).count();
        let waiting = session.as_ref().expect("given back").queues[0].waiting(&memory).expect("sane");
        assert_eq!(answered + usize::from(waiting), (round + 1) * 50);
        if waiting > 60 {
            device.start(session.take().expect("a session")).expect("started");
            while answered < (round + 1) * 50 {
                let seen = raised.count();
                let now = std::iter::from_fn(|| queue.take_used()).count();
                answered += now;
                if now == 0 {
                    raised.wait_past(seen);
                }
            }
            session = device.stop();
        }
    }
}

/// `fdatasync` fails on /dev/zero, and so must the flush that stands for it.
#[test]
fn a_flush_is_what_the_host_says_it_is() {
    let file = File::options().read(true).write(true).open("/dev/zero").expect("/dev/zero");
    let extent = Extent { file: Arc::new(DataFile::trusted(file)), offset: 0, bytes: 4096 };
    let disk = || Disk::writable(extent.clone()).expect("a disk");
    let mut guest = Guest::start(disk());
    assert_eq!(guest.write(0, &[1; 512]), OK);
    assert_eq!(guest.request(T_FLUSH, 0, &[], &[]).0, IOERR);
    assert_eq!(guest.faults().len(), 1);
    // A driver that cannot flush relies on every write being flushed.
    let mut guest = Guest::start_without(disk(), F_FLUSH);
    assert_eq!(guest.write(0, &[1; 512]), IOERR);
}

const CHILD_FILE: &str = "KILN_TEST_BLOCK_CHILD_FILE";

/// The other half of the next test: writes and flushes block after block, and tells each one that was acknowledged.
#[test]
#[ignore = "the child process of an_acknowledged_flush_survives_kill_9"]
fn child_that_writes_until_it_is_killed() {
    let path = std::env::var_os(CHILD_FILE).expect("set by the parent");
    let file = File::options().read(true).write(true).open(path).expect("the parent's file");
    let extent = Extent { file: Arc::new(DataFile::trusted(file)), offset: 0, bytes: 4 << 20 };
    let mut guest = Guest::start(Disk::writable(extent).expect("a disk"));
    for n in 0..1024_u64 {
        assert_eq!(guest.write(n * 8, &pattern(4096, n)), OK);
        assert_eq!(guest.request(T_FLUSH, 0, &[], &[]).0, OK);
        println!("acknowledged {n}");
    }
}

#[test]
fn an_acknowledged_flush_survives_kill_9() {
    let file = tempfile::NamedTempFile::new().expect("a file");
    file.as_file().set_len(4 << 20).expect("a sparse file");
    let mut child = Command::new(std::env::current_exe().expect("this test"))
        .args(["--exact", "block::tests::child_that_writes_until_it_is_killed", "--nocapture", "--ignored"])
        .env(CHILD_FILE, file.path())
        .stdout(Stdio::piped())
        .spawn()
        .expect("this test again");
    let output = io::BufReader::new(child.stdout.take().expect("piped"));
    let mut acknowledged = io::BufRead::lines(output)
        .map_while(Result::ok)
        .filter_map(|line| line.rsplit_once("acknowledged ").and_then(|(_, n)| n.parse::<u64>().ok()));
    let last = acknowledged.by_ref().find(|&n| n >= 20).expect("twenty flushes were acknowledged");
    child.kill().expect("killed");
    child.wait().expect("reaped");
    let last = acknowledged.last().unwrap_or(last);
    for n in 0..=last {
        let mut found = vec![0; 4096];
        file.as_file().read_exact_at(&mut found, n * 4096).expect("read");
        assert_eq!(found, pattern(4096, n), "block {n} of {last}");
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 64, ..ProptestConfig::default() })]

    /// Against a model of the disk as one byte vector: reads in any order, size and place, over any extents.
    #[test]
    fn any_read_gives_what_the_extents_hold(
        shape in prop::collection::vec((0..40_u64, 1..40_u64, any::<bool>()), 1..6),
        reads in prop::collection::vec((0..2000_u64, 1..200_usize), 1..20),
        file_pages in 1..40_usize,
        cut in 0..4096_usize,
    ) {
        let content = pattern(file_pages * 4096 - cut, 13);
        let (checked, plain) = (verified(&content), trusted(&file_with(&content)));
        let mut model = Vec::new();
        let mut extents = Vec::new();
        for (page, pages, is_checked) in shape {
            let (offset, bytes) = (page * 4096, pages * 4096);
            let file = Arc::clone(if is_checked { &checked } else { &plain });
            extents.push(Extent { file, offset, bytes });
            for at in offset..offset + bytes {
                model.push(content.get(at as usize).copied().unwrap_or(0));
            }
        }
        let mut guest = Guest::start(Disk::read_only(extents).expect("a disk"));
        for (sector, sectors) in reads {
            let (start, bytes) = (sector as usize * 512, sectors * 512);
            let expected = model.get(start..start + bytes).map(<[u8]>::to_vec).ok_or(IOERR);
            prop_assert_eq!(guest.read(sector, bytes), expected);
        }
        prop_assert!(guest.faults().is_empty());
    }

    /// Any request at all: an answer or a broken device, never less.
    #[test]
    fn any_request_is_answered_or_breaks_the_device(
        header in prop::collection::vec(any::<u8>(), 0..40),
        kind in prop_oneof![0..16_u32, any::<u32>()],
        sector in prop_oneof![0..20_u64, any::<u64>()],
        writable in prop::collection::vec(0..2000_usize, 0..4),
    ) {
        let (_file, disk) = scratch(8192);
        let mut guest = Guest::start(disk);
        let mut bytes = header;
        if bytes.len() >= 16 {
            bytes[..4].copy_from_slice(&kind.to_le_bytes());
            bytes[8..16].copy_from_slice(&sector.to_le_bytes());
        }
        guest.driver.memory.write(HEADER, &bytes).expect("RAM");
        let room: Vec<_> = writable.iter().map(|&bytes| Span::new(DATA, bytes)).collect();
        let total: usize = writable.iter().sum();
        let short = bytes.len() < 16 || total == 0;
        guest.driver.queues[0].submit(&[Span::new(HEADER, bytes.len())], &room).expect("free");
        guest.driver.kick(0);
        if short {
            guest.driver.wait_broken();
        } else {
            let (_, written) = guest.driver.wait_used(0);
            prop_assert!(written as usize <= total);
        }
    }
}

#[test]
fn a_disk_may_seem_larger_than_it_is() {
    let file = tempfile::tempfile().expect("a file");
    file.set_len(8192).expect("space");
    let extent = Extent {
        file: Arc::new(DataFile::trusted(file.try_clone().expect("a descriptor"))),
        offset: 0,
        bytes: 8192,
    };
    let disk = Disk::writable(extent).and_then(|disk| disk.with_capacity(1 << 40)).expect("a disk");
    let mut guest = Guest::start(disk);
    assert_eq!(guest.driver.read(0x100), 1 << 31, "its size in sectors");
    assert_eq!(guest.write(14, &[7; 1024]), OK);
    // Across the end of what there is, behind it, and at the end of what there seems to be.
    assert_eq!(
        guest.read(14, 2048).map(|data| (data[..1024] == [7; 1024], data[1024..] == [0; 1024])),
        Ok((true, true))
    );
    assert_eq!(guest.read(1 << 30, 512), Ok(vec![0; 512]));
    assert_eq!(guest.read((1 << 31) - 1, 512), Ok(vec![0; 512]));
    assert_eq!(guest.read(1 << 31, 512), Err(IOERR));
    for sector in [15, 16, 1 << 30] {
        assert_eq!(guest.write(sector, &[1; 1024]), IOERR, "{sector}");
        assert_eq!(guest.zero(T_WRITE_ZEROES, &[(sector, 2, 0)]), IOERR, "{sector}");
    }
    assert_eq!(file.metadata().expect("metadata").len(), 8192);
}

#[test]
fn a_disk_with_nothing_behind_it_is_zeros() {
    for read_only in [true, false] {
        let mut guest = Guest::start(Disk::empty(1 << 30, read_only).expect("a disk"));
        assert_eq!(guest.read(0, 4096), Ok(vec![0; 4096]));
        assert_eq!(guest.write(0, &[1; 512]), IOERR);
        assert_eq!(guest.request(T_FLUSH, 0, &[], &[]).0, OK);
        assert!(guest.faults().is_empty());
    }
    assert!(Disk::empty(4097, true).is_err());
}
