//! The agent's memory allocator: small, and frugal with pages.

use core::alloc::{GlobalAlloc, Layout};
use core::cell::UnsafeCell;
use core::ffi::c_void;
use core::ptr::{NonNull, null_mut};

use rustix::mm::{MapFlags, ProtFlags};

/// Sizes from 16 bytes to 64 KiB, each twice the one before; what is larger is a mapping of its own.
const CLASSES: usize = 13;
const SMALLEST_BYTES: usize = 16;
const LARGEST_BYTES: usize = SMALLEST_BYTES << (CLASSES - 1);
/// What is taken from the kernel at a time for the classes.
const CHUNK_BYTES: usize = 128 << 10;
const PAGE_BYTES: usize = 4096;

/// Memory in blocks of powers of two: a freed block waits for the next request of its size, and is the first to be
/// used again. What is larger than 64 KiB goes back to the kernel.
///
/// For one thread only, as the agent is.
pub struct Heap {
    state: UnsafeCell<State>,
}

struct State {
    /// The first free block of each class; each holds the address of the next.
    free: [Option<NonNull<Free>>; CLASSES],
    /// The part of the last chunk that was never given out.
    next: usize,
    end: usize,
}

struct Free {
    next: Option<NonNull<Free>>,
}

// SAFETY: the program has one thread (see `Heap`), so nothing is ever shared between two.
unsafe impl Sync for Heap {}

impl Heap {
    /// An empty heap.
    pub const fn new() -> Self {
        Self { state: UnsafeCell::new(State { free: [None; CLASSES], next: 0, end: 0 }) }
    }
}

impl Default for Heap {
    fn default() -> Self {
        Self::new()
    }
}

/// The class whose blocks hold `layout`, or `None` when it needs a mapping of its own.
fn class_of(layout: Layout) -> Option<usize> {
    let bytes = layout.size().max(layout.align()).max(SMALLEST_BYTES);
    (bytes <= LARGEST_BYTES)
        .then(|| (bytes.next_power_of_two().trailing_zeros() - SMALLEST_BYTES.trailing_zeros()) as usize)
}

// SAFETY: blocks are powers of two at least as large as size and alignment, cut from chunks that are aligned to a page
// and in which every block starts at a multiple of its size (up to a page; layouts aligned beyond are refused). No
// block is in use and free at once.
unsafe impl GlobalAlloc for Heap {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        if layout.align() > PAGE_BYTES {
            return null_mut();
        }
        let Some(class) = class_of(layout) else { return map(layout.size()) };
        // SAFETY: one thread, and nothing below calls back into the heap.
        let state = unsafe { &mut *self.state.get() };
        if let Some(block) = state.free[class] {
            // SAFETY: a block on the list was freed, and `dealloc` wrote a `Free` into it.
            state.free[class] = unsafe { block.as_ref() }.next;
            return block.as_ptr().cast();
        }
        state.cut(SMALLEST_BYTES << class)
    }

    unsafe fn dealloc(&self, block: *mut u8, layout: Layout) {
        let Some(class) = class_of(layout) else {
            // SAFETY: `alloc` mapped it with this very length, and its owner is done with it.
            let _ = unsafe { rustix::mm::munmap(block.cast(), layout.size()) };
            return;
        };
        // SAFETY: as in `alloc`.
        let state = unsafe { &mut *self.state.get() };
        let Some(block) = NonNull::new(block.cast::<c_void>()).map(NonNull::cast::<Free>) else { return };
        // SAFETY: the block is ours again, at least 16 bytes and aligned to as much.
        unsafe { block.write(Free { next: state.free[class] }) };
        state.free[class] = Some(block);
    }

    unsafe fn realloc(&self, block: *mut u8, layout: Layout, new_size: usize) -> *mut u8 {
        // SAFETY: the caller promises that `new_size`, rounded up to the alignment, does not overflow.
        let new_layout = unsafe { Layout::from_size_align_unchecked(new_size, layout.align()) };
        if class_of(layout).is_some() && class_of(layout) == class_of(new_layout) {
            return block;
        }
        // SAFETY: a layout of the caller's own making.
        let new_block = unsafe { self.alloc(new_layout) };
        if !new_block.is_null() {
            // SAFETY: two blocks, each at least as long as the shorter of the sizes.
            unsafe { new_block.copy_from_nonoverlapping(block, layout.size().min(new_size)) };
            // SAFETY: the caller gives `block` up.
            unsafe { self.dealloc(block, layout) };
        }
        new_block
    }
}

impl State {
    /// A block of `bytes`, a power of two, that was never given out before; null when the kernel has no more.
    fn cut(&mut self, bytes: usize) -> *mut u8 {
        let align = bytes.min(PAGE_BYTES);
        let mut start = self.next.next_multiple_of(align);
        if self.end.saturating_sub(start) < bytes || self.next == 0 {
            let chunk = map(CHUNK_BYTES);
            if chunk.is_null() {
                return chunk;
            }
            start = chunk.expose_provenance();
            self.end = start + CHUNK_BYTES;
        }
        self.next = start + bytes;
        core::ptr::with_exposed_provenance_mut(start)
    }
}

/// Fresh zeroed memory from the kernel, or null.
fn map(bytes: usize) -> *mut u8 {
    // SAFETY: a new mapping at an address of the kernel's choosing aliases nothing of ours.
    let mapped = unsafe {
        rustix::mm::mmap_anonymous(null_mut(), bytes, ProtFlags::READ | ProtFlags::WRITE, MapFlags::PRIVATE)
    };
    mapped.map_or(null_mut(), <*mut _>::cast)
}

#[cfg(test)]
mod tests {
    use super::*;
    use alloc::vec::Vec;
    use proptest::prelude::*;

    /// A block of `heap` in use, and the byte it is filled with.
    struct Block {
        at: *mut u8,
        layout: Layout,
        mark: u8,
    }

    impl Block {
        fn new(heap: &Heap, size: usize, align: usize, mark: u8) -> Self {
            let layout = Layout::from_size_align(size, align).expect("a small layout");
            // SAFETY: the layout is not empty.
            let at = unsafe { heap.alloc(layout) };
            assert!(!at.is_null() && at.addr().is_multiple_of(align));
            // SAFETY: the block is at least as long as its layout.
            unsafe { at.write_bytes(mark, size) }
            Self { at, layout, mark }
        }

        fn bytes(&self, size: usize) -> &[u8] {
            // SAFETY: the block is at least as long as its layout, initialized by `new`, and nobody else's.
            unsafe { core::slice::from_raw_parts(self.at, size) }
        }

        fn is_intact(&self) -> bool {
            self.bytes(self.layout.size()).iter().all(|byte| *byte == self.mark)
        }

        fn grow(&mut self, heap: &Heap, size: usize) {
            // SAFETY: a block of this heap with this layout.
            self.at = unsafe { heap.realloc(self.at, self.layout, size) };
            self.layout = Layout::from_size_align(size, self.layout.align()).expect("a small layout");
        }

        fn free(self, heap: &Heap) {
            // SAFETY: a block of this heap with this layout, given up here.
            unsafe { heap.dealloc(self.at, self.layout) }
        }
    }

    proptest! {
        #[test]
        fn blocks_in_use_never_overlap(
            steps in prop::collection::vec((any::<bool>(), 1..200_000_usize, 0..13_u32), 1..120),
        ) {
            let heap = Heap::new();
            let mut used: Vec<Block> = Vec::new();
            for (number, (free, size, align)) in steps.into_iter().enumerate() {
                if free && !used.is_empty() {
                    let block = used.swap_remove(size % used.len());
                    prop_assert!(block.is_intact());
                    block.free(&heap);
                } else {
                    used.push(Block::new(&heap, size, 1 << align, number as u8));
                }
            }
            prop_assert!(used.iter().all(Block::is_intact));
        }
    }

    #[test]
    fn a_freed_block_is_the_next_to_be_used() {
        let heap = Heap::new();
        let first = Block::new(&heap, 100, 8, 1);
        let at = first.at;
        first.free(&heap);
        assert_eq!(Block::new(&heap, 120, 8, 2).at, at);
    }

    #[test]
    fn growing_keeps_what_was_there() {
        let heap = Heap::new();
        let mut block = Block::new(&heap, 10, 1, 7);
        for size in [12, 17, 4096, 70_000, 300_000, 20] {
            block.grow(&heap, size);
            assert_eq!(block.bytes(10), [7; 10]);
        }
        block.free(&heap);
    }
}
