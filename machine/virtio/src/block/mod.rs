//! The block device. VIRTIO 1.2 §5.2 "Block Device".

mod disk;
mod request;
#[cfg(test)]
mod tests;

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

pub use disk::{DataFile, Disk, DiskError, DiskFault, Extent};

use self::request::{MAX_ZERO_RANGES, MAX_ZERO_SECTORS, Request, SECTOR_BYTES, SERIAL_BYTES, Target};
use crate::bell::Bell;
use crate::worker::Worker;
use crate::{Broken, Chain, Device, Session};

const DEVICE_TYPE: u32 = 2;
const QUEUE_ENTRIES: &[u16] = &[256];
/// The most data buffers of a request: two full ones fit the queue beside their headers and status bytes.
const MAX_SEGMENTS: u32 = 126;

const F_SEG_MAX: u64 = 1 << 2;
const F_RO: u64 = 1 << 5;
const F_FLUSH: u64 = 1 << 9;
const F_DISCARD: u64 = 1 << 13;
const F_WRITE_ZEROES: u64 = 1 << 14;

/// The most requests taken at once.
const MAX_BATCH: usize = 32;
/// How long an answer waits for the rest of its batch before the driver is interrupted.
const MAX_INTERRUPT_DELAY: Duration = Duration::from_micros(200);
/// The most faults reported of one disk: a guest that reads a broken block again and again must not flood anybody.
const MAX_REPORTS: u32 = 8;

/// A disk.
///
/// Its thread takes what the driver has published as a batch, asks the host to fetch all that will be read, then
/// serves one request after the other with plain vectored calls between the files and guest memory. Several reads are
/// thus in flight on the host's medium, while a hit in the page cache costs one system call and one copy; `io_uring`
/// would do that same copy in that same call, and its kernel threads would do work outside the sandbox the monitor is
/// in. An answer is visible to the driver at once; the interrupt comes once for the batch, or every 200 us in a slow one.
///
/// A flush waits for `fdatasync`, and what comes after it on this disk waits too.
pub struct Block {
    backend: Arc<Backend>,
    worker: Option<Worker>,
}

/// What the thread and the registers share.
struct Backend {
    disk: Disk,
    serial: [u8; SERIAL_BYTES],
    report: Box<dyn Fn(&DiskFault) + Send + Sync>,
    reports: AtomicU32,
}

impl Block {
    /// A device for `disk`, stopped.
    ///
    /// `serial` is what the driver reads as the disk's name, at most 20 bytes. `report` hears, on the disk's thread,
    /// of the first 8 requests that failed by no fault of the guest; it should return soon.
    ///
    /// # Errors
    /// [`DiskError::Shape`] when the serial is too long.
    pub fn new(
        disk: Disk,
        serial: &str,
        report: Box<dyn Fn(&DiskFault) + Send + Sync>,
    ) -> Result<Self, DiskError> {
        let mut padded = [0; SERIAL_BYTES];
        let Some(start) = padded.get_mut(..serial.len()) else {
            return Err(DiskError::Shape("a disk's serial has at most 20 bytes"));
        };
        start.copy_from_slice(serial.as_bytes());
        let backend = Backend { disk, serial: padded, report, reports: AtomicU32::new(0) };
        Ok(Self { backend: Arc::new(backend), worker: None })
    }

    /// Serves one request without a thread, for fuzzing.
    #[cfg(any(test, feature = "testing"))]
    pub(crate) fn serve_one(
        disk: &Disk,
        memory: &kiln_memory::GuestMemory,
        chain: &Chain,
    ) -> Result<u32, Broken> {
        let target = Target { disk, serial: &[0; SERIAL_BYTES], write_through: false };
        Ok(Request::parse(memory, chain)?.serve(&target, &mut Vec::new()).0)
    }

    /// The configuration space. VIRTIO 1.2 §5.2.4 "Device configuration layout".
    fn config(&self) -> [u8; 60] {
        let mut config = [0; 60];
        let mut put = |at: usize, bytes: &[u8]| config[at..at + bytes.len()].copy_from_slice(bytes);
        put(0, &(self.backend.disk.bytes() / SECTOR_BYTES).to_le_bytes());
        put(12, &MAX_SEGMENTS.to_le_bytes());
        if !self.backend.disk.is_read_only() {
            // Holes have the granularity of the host's blocks: 8 sectors.
            const DISCARD_ALIGNMENT_SECTORS: u32 = 8;
            put(36, &MAX_ZERO_SECTORS.to_le_bytes());
            put(40, &MAX_ZERO_RANGES.to_le_bytes());
            put(44, &DISCARD_ALIGNMENT_SECTORS.to_le_bytes());
            put(48, &MAX_ZERO_SECTORS.to_le_bytes());
            put(52, &MAX_ZERO_RANGES.to_le_bytes());
            // Zeroed ranges may give up their space.
            put(56, &[1]);
        }
        config
    }
}

impl Device for Block {
    fn device_type(&self) -> u32 {
        DEVICE_TYPE
    }

    fn features(&self) -> u64 {
        let kind = if self.backend.disk.is_read_only() { F_RO } else { F_FLUSH | F_DISCARD | F_WRITE_ZEROES };
        F_SEG_MAX | kind
    }

    fn queue_entries(&self) -> &'static [u16] {
        QUEUE_ENTRIES
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        let config = self.config();
        let start = usize::try_from(offset).unwrap_or(usize::MAX).min(config.len());
        let length = data.len().min(config.len() - start);
        data[..length].copy_from_slice(&config[start..start + length]);
    }

    fn write_config(&mut self, _offset: u64, _data: &[u8]) {}

    fn start(&mut self, session: Session) -> io::Result<()> {
        let bell = Arc::new(Bell::new()?);
        let (backend, ring) = (Arc::clone(&self.backend), Arc::clone(&bell));
        self.worker = Some(Worker::start("virtio-blk", bell, move || backend.run(session, &ring))?);
        Ok(())
    }

    fn kick(&self, queue: u16) {
        if let Some(worker) = &self.worker {
            worker.kick(queue);
        }
    }

    fn begin_stop(&self) {
        if let Some(worker) = &self.worker {
            worker.begin_stop();
        }
    }

    fn stop(&mut self) -> Option<Session> {
        self.worker.take()?.stop()
    }
}

impl Drop for Block {
    fn drop(&mut self) {
        self.stop();
    }
}

impl Backend {
    fn run(&self, mut session: Session, bell: &Bell) -> Session {
        if let Err(broken) = self.serve(&mut session, bell) {
            session.signal.broken(broken);
        }
        session
    }

    /// Serves the queue until it is told to stop.
    fn serve(&self, session: &mut Session, bell: &Bell) -> Result<(), Broken> {
        let memory = session.memory.clone();
        let target =
            Target { disk: &self.disk, serial: &self.serial, write_through: session.features & F_FLUSH == 0 };
        let mut batch = Vec::with_capacity(MAX_BATCH);
        let mut scratch = Vec::new();
        loop {
            let queue = &mut session.queues[0];
            while batch.len() < MAX_BATCH {
                let Some(chain) = queue.pop(&memory)? else { break };
                let request = Request::parse(&memory, &chain)?;
                batch.push((chain, request));
            }
            if batch.is_empty() {
                if queue.enable_kicks(&memory)? {
                    continue;
                }
                // Room for a block is kept only while there is work: an idle disk holds no memory.
                scratch = Vec::new();
                if bell.wait() & Bell::STOP != 0 {
                    return Ok(());
                }
                queue.disable_kicks(&memory)?;
            } else if self.serve_batch(session, &target, &mut batch, &mut scratch, bell)? {
                return Ok(());
            }
        }
    }

    /// Serves all of `batch`, or puts back what is left when told to stop, which is then true.
    fn serve_batch(
        &self,
        session: &mut Session,
        target: &Target<'_>,
        batch: &mut Vec<(Chain, Request<'_>)>,
        scratch: &mut Vec<u8>,
        bell: &Bell,
    ) -> Result<bool, Broken> {
        for (_, request) in batch.iter().skip(1) {
            if let Some((offset, bytes)) = request.reads(target.disk) {
                target.disk.prefetch(offset, bytes);
            }
        }
        let mut interrupted = Instant::now();
        let mut rest = batch.drain(..);
        while let Some((chain, request)) = rest.next() {
            let (written, fault) = request.serve(target, scratch);
            session.queues[0].push(&session.memory, chain, written)?;
            if let Some(fault) = fault {
                self.report(&fault);
            }
            if interrupted.elapsed() >= MAX_INTERRUPT_DELAY {
                session.interrupt_if_wanted()?;
                interrupted = Instant::now();
            }
            if bell.is_rung_for(Bell::STOP) {
                // The latest first, as `put_back` wants it.
                for (chain, _) in rest.rev() {
                    session.queues[0].put_back(chain);
                }
                session.interrupt_if_wanted()?;
                return Ok(true);
            }
        }
        session.interrupt_if_wanted()?;
        Ok(false)
    }

    fn report(&self, fault: &DiskFault) {
        if self.reports.fetch_add(1, Ordering::Relaxed) < MAX_REPORTS {
            (self.report)(fault);
        }
    }
}
