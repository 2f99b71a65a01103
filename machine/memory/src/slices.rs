//! Scatter/gather between guest memory and files or sockets, by the kernel.
#![expect(unsafe_code, reason = "the kernel is handed addresses of guest memory")]

use std::io;
use std::marker::PhantomData;
use std::os::fd::{AsFd, AsRawFd};

use vm_memory::VolatileSlice;
use vm_memory::bitmap::BitmapSlice;

/// The most pieces the kernel takes in one call (`IOV_MAX`).
const MAX_PIECES_PER_CALL: usize = libc::UIO_MAXIOV as usize;

/// A checked list of runs of guest memory, read or written as one.
///
/// The guest can change the bytes at any time: a transfer moves what is there at that moment, once. The borrow keeps
/// the memory mapped.
pub struct Slices<'m> {
    pieces: Vec<libc::iovec>,
    bytes: usize,
    memory: PhantomData<&'m ()>,
}

impl<'m> Slices<'m> {
    pub(crate) fn new<B: BitmapSlice>(slices: &[VolatileSlice<'m, B>]) -> Self {
        let mut pieces = Vec::with_capacity(slices.len());
        let mut bytes = 0_usize;
        for slice in slices.iter().filter(|slice| !slice.is_empty()) {
            pieces
                .push(libc::iovec { iov_base: slice.ptr_guard_mut().as_ptr().cast(), iov_len: slice.len() });
            // One run may be named often, so the sum has no natural bound; the last byte that counts is this.
            bytes = bytes.saturating_add(slice.len());
        }
        Self { pieces, bytes, memory: PhantomData }
    }

    /// How many bytes the runs hold together.
    pub fn len(&self) -> usize {
        self.bytes
    }

    /// Whether there are no bytes at all.
    pub fn is_empty(&self) -> bool {
        self.bytes == 0
    }

    /// Takes the first `bytes` bytes off the front as a list of their own; all there are when there are fewer.
    pub fn take(&mut self, bytes: usize) -> Self {
        let front = self.front(bytes);
        *self = self.without_front(front.bytes);
        front
    }

    /// The first `bytes` bytes; all there are when there are fewer.
    pub fn front(&self, bytes: usize) -> Self {
        let mut front = Self { pieces: Vec::new(), bytes: 0, memory: PhantomData };
        for piece in &self.pieces {
            let wanted = bytes - front.bytes;
            if wanted == 0 {
                break;
            }
            let length = piece.iov_len.min(wanted);
            front.pieces.push(libc::iovec { iov_base: piece.iov_base, iov_len: length });
            front.bytes += length;
        }
        front
    }

    /// What is left past the first `bytes` bytes.
    pub fn without_front(&self, bytes: usize) -> Self {
        let bytes = bytes.min(self.bytes);
        Self { pieces: without_front(&self.pieces, bytes), bytes: self.bytes - bytes, memory: PhantomData }
    }

    /// Copies the runs to the start of `into`, as far as both reach, and says how many bytes that were.
    pub fn copy_to(&self, into: &mut [u8]) -> usize {
        let mut done = 0;
        for piece in self.volatile() {
            if done == into.len() {
                break;
            }
            done += piece.copy_to(&mut into[done..]);
        }
        done
    }

    /// Copies `from` to the start of the runs, as far as both reach, and says how many bytes that were.
    pub fn copy_from(&self, from: &[u8]) -> usize {
        let mut done = 0;
        for piece in self.volatile() {
            if done == from.len() {
                break;
            }
            let length = piece.len().min(from.len() - done);
            piece.copy_from(&from[done..done + length]);
            done += length;
        }
        done
    }

    /// Writes zeros over all of the runs.
    pub fn fill_with_zeros(&self) {
        const ZEROS: [u8; 4096] = [0; 4096];
        for piece in self.volatile() {
            let mut rest = piece;
            while !rest.is_empty() {
                let length = rest.len().min(ZEROS.len());
                rest.copy_from(&ZEROS[..length]);
                let Ok(next) = rest.offset(length) else { break };
                rest = next;
            }
        }
    }

    /// Fills the runs from `file` at `offset`, and says how many bytes there were: fewer than [`len`](Self::len) only
    /// at the end of the file.
    ///
    /// # Errors
    /// What the host says of the file.
    pub fn read_at(&self, file: impl AsFd, offset: u64) -> io::Result<usize> {
        self.until_done(offset, |pieces, offset| {
            // SAFETY: each piece was a checked run of guest memory, mapped for 'm; the guest shares that memory, and
            // neither it nor we hold Rust references into it, so the kernel may write there.
            unsafe {
                libc::preadv(file.as_fd().as_raw_fd(), pieces.as_ptr(), pieces.len() as libc::c_int, offset)
            }
        })
    }

    /// Writes all of the runs to `file` at `offset`.
    ///
    /// # Errors
    /// What the host says of the file; a part may have been written.
    pub fn write_at(&self, file: impl AsFd, offset: u64) -> io::Result<()> {
        let written = self.until_done(offset, |pieces, offset| {
            // SAFETY: as in `read_at`; the kernel reads here.
            unsafe {
                libc::pwritev(file.as_fd().as_raw_fd(), pieces.as_ptr(), pieces.len() as libc::c_int, offset)
            }
        })?;
        if written == self.bytes { Ok(()) } else { Err(io::ErrorKind::WriteZero.into()) }
    }

    /// Receives what `socket` has, up to the runs' length, without waiting: 0 is the end of the stream.
    ///
    /// # Errors
    /// What the host says, [`io::ErrorKind::WouldBlock`] when there is nothing yet.
    pub fn receive(&self, socket: impl AsFd) -> io::Result<usize> {
        let mut message = self.message();
        retry(|| {
            // SAFETY: as in `read_at`; `message` names only the pieces and lives through the call.
            unsafe { libc::recvmsg(socket.as_fd().as_raw_fd(), &raw mut message, libc::MSG_DONTWAIT) }
        })
    }

    /// Sends as much of the runs as `socket` takes without waiting, and says how much. A closed peer is an error,
    /// never a signal.
    ///
    /// # Errors
    /// What the host says, [`io::ErrorKind::WouldBlock`] when it takes nothing now.
    pub fn send(&self, socket: impl AsFd) -> io::Result<usize> {
        let message = self.message();
        retry(|| {
            // SAFETY: as in `receive`; the kernel reads here.
            unsafe {
                libc::sendmsg(
                    socket.as_fd().as_raw_fd(),
                    &raw const message,
                    libc::MSG_DONTWAIT | libc::MSG_NOSIGNAL,
                )
            }
        })
    }

    fn message(&self) -> libc::msghdr {
        // SAFETY: msghdr is plain data for which all zeros is the empty message.
        let mut message: libc::msghdr = unsafe { std::mem::zeroed() };
        message.msg_iov = self.pieces.as_ptr().cast_mut();
        message.msg_iovlen = self.pieces.len().min(MAX_PIECES_PER_CALL);
        message
    }

    /// Repeats `call` on what is left until all is done or it makes no progress.
    fn until_done(
        &self,
        offset: u64,
        call: impl Fn(&[libc::iovec], libc::off_t) -> isize,
    ) -> io::Result<usize> {
        let mut rest: Option<Vec<libc::iovec>> = None;
        let mut done = 0;
        while done < self.bytes {
            let left = rest.as_deref().unwrap_or(&self.pieces);
            let position = offset.checked_add(done as u64).and_then(|at| libc::off_t::try_from(at).ok());
            let position = position.ok_or(io::ErrorKind::InvalidInput)?;
            let count = retry(|| call(&left[..left.len().min(MAX_PIECES_PER_CALL)], position))?;
            if count == 0 {
                break;
            }
            done += count;
            if done < self.bytes {
                rest = Some(without_front(left, count));
            }
        }
        Ok(done)
    }

    fn volatile(&self) -> impl Iterator<Item = VolatileSlice<'m>> {
        self.pieces.iter().map(|piece| {
            // SAFETY: each piece was a checked run of guest memory, mapped for 'm, to which nobody holds references.
            unsafe { VolatileSlice::new(piece.iov_base.cast(), piece.iov_len) }
        })
    }
}

/// What is left of `pieces` past the first `bytes`.
fn without_front(pieces: &[libc::iovec], mut bytes: usize) -> Vec<libc::iovec> {
    let mut rest = Vec::with_capacity(pieces.len());
    for &piece in pieces {
        if bytes >= piece.iov_len {
            bytes -= piece.iov_len;
        } else {
            rest.push(after(piece, bytes));
            bytes = 0;
        }
    }
    rest
}

/// `piece` without its first `bytes` bytes, at most its length.
fn after(piece: libc::iovec, bytes: usize) -> libc::iovec {
    libc::iovec {
        iov_base: piece.iov_base.cast::<u8>().wrapping_add(bytes).cast(),
        iov_len: piece.iov_len - bytes,
    }
}

/// Calls again when a signal got in between.
fn retry(mut call: impl FnMut() -> isize) -> io::Result<usize> {
    loop {
        if let Ok(count) = usize::try_from(call()) {
            return Ok(count);
        }
        let error = io::Error::last_os_error();
        if error.kind() != io::ErrorKind::Interrupted {
            return Err(error);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{Gpa, GuestMemory, Span};
    use rustix::net::{AddressFamily, SocketFlags, SocketType, socketpair};
    use std::io::Write;

    fn memory() -> GuestMemory {
        GuestMemory::new(1 << 20).expect("mapped")
    }

    fn spans(list: &[(u64, usize)]) -> Vec<Span> {
        list.iter().map(|&(at, bytes)| Span::new(Gpa(at), bytes)).collect()
    }

    #[test]
    fn a_file_is_scattered_and_gathered_in_order() {
        let memory = memory();
        let content: Vec<u8> = (0..10_000_u32).map(|n| (n % 251) as u8).collect();
        let mut file = tempfile::tempfile().expect("a file");
        file.write_all(&content).expect("written");
        let list = spans(&[(0x3000, 100), (0x100, 1), (0x8000, 0), (0x9001, 4899)]);
        let slices = memory.slices(&list).expect("RAM");
        assert_eq!(slices.read_at(&file, 7).expect("read"), 5000);
        let mut got = vec![0; 5000];
        assert_eq!(slices.copy_to(&mut got), 5000);
        assert_eq!(got, content[7..5007]);

        let out = tempfile::tempfile().expect("a file");
        slices.write_at(&out, 3).expect("written");
        let back = memory.slices(&spans(&[(0x20000, 5003)])).expect("RAM");
        assert_eq!(back.read_at(&out, 0).expect("read"), 5003);
        let mut got = vec![0; 5003];
        memory.read(Gpa(0x20000), &mut got).expect("RAM");
        assert_eq!(got[3..], content[7..5007]);
    }

    #[test]
    fn the_end_of_a_file_ends_the_read() {
        let memory = memory();
        let mut file = tempfile::tempfile().expect("a file");
        file.write_all(&[9; 10]).expect("written");
        let slices = memory.slices(&spans(&[(0, 6), (100, 6)])).expect("RAM");
        assert_eq!(slices.read_at(&file, 0).expect("read"), 10);
        assert_eq!(slices.read_at(&file, 10).expect("read"), 0);
        assert!(slices.read_at(&file, u64::MAX - 1).is_err(), "an offset no file has");
    }

    #[test]
    fn more_pieces_than_the_kernel_takes_at_once_still_all_move() {
        let memory = memory();
        let list: Vec<_> = (0..3000).map(|n| Span::new(Gpa(n * 16), 3)).collect();
        let slices = memory.slices(&list).expect("RAM");
        let content: Vec<u8> = (0..9000_u32).map(|n| (n % 241) as u8).collect();
        assert_eq!(slices.copy_from(&content), 9000);
        let file = tempfile::tempfile().expect("a file");
        slices.write_at(&file, 0).expect("written");
        slices.fill_with_zeros();
        assert_eq!(slices.read_at(&file, 0).expect("read"), 9000);
        let mut got = vec![0; 9000];
        slices.copy_to(&mut got);
        assert_eq!(got, content);
    }

    #[test]
    fn taking_from_the_front_splits_a_run() {
        let memory = memory();
        memory.write(Gpa(0), b"abcdefgh").expect("RAM");
        let mut rest = memory.slices(&spans(&[(0, 3), (3, 5)])).expect("RAM");
        let front = rest.take(4);
        let mut got = [0; 8];
        assert_eq!((front.len(), rest.len()), (4, 4));
        assert_eq!(front.copy_to(&mut got), 4);
        assert_eq!(&got[..4], b"abcd");
        assert_eq!(rest.copy_to(&mut got), 4);
        assert_eq!(&got[..4], b"efgh");
        assert_eq!(rest.take(100).len(), 4);
        assert!(rest.is_empty());
    }

    #[test]
    fn zeros_cover_every_run_and_nothing_else() {
        let memory = memory();
        memory.write(Gpa(0), &[1; 12_000]).expect("RAM");
        memory.slices(&spans(&[(1, 9000), (9002, 1)])).expect("RAM").fill_with_zeros();
        let bytes: [u8; 9005] = memory.read_array(Gpa(0)).expect("RAM");
        assert_eq!((bytes[0], bytes[9001], bytes[9003]), (1, 1, 1));
        assert!(bytes[1..9001].iter().all(|&byte| byte == 0) && bytes[9002] == 0);
    }

    #[test]
    fn sockets_neither_block_nor_raise_signals() {
        let memory = memory();
        let (a, b) = socketpair(AddressFamily::UNIX, SocketType::STREAM, SocketFlags::CLOEXEC, None)
            .expect("a socket pair");
        let slices = memory.slices(&spans(&[(0, 3), (0x1000, 3)])).expect("RAM");
        assert_eq!(slices.receive(&a).expect_err("nothing there").kind(), io::ErrorKind::WouldBlock);
        rustix::io::write(&b, b"hello").expect("written");
        assert_eq!(slices.receive(&a).expect("received"), 5);
        assert_eq!(slices.send(&a).expect("sent"), 6);
        drop(b);
        assert_eq!(slices.send(&a).expect_err("no peer").kind(), io::ErrorKind::BrokenPipe);
    }

    #[test]
    fn a_span_outside_ram_refuses_the_list() {
        assert!(memory().slices(&spans(&[(0, 4), (1 << 20, 1)])).is_err());
    }
}
