//! Addresses as the guest sees them.

use std::fmt;

/// A guest physical address.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Gpa(pub u64);

impl Gpa {
    /// The address `bytes` further on, or `None` past the end of the address space.
    pub fn checked_add(self, bytes: u64) -> Option<Self> {
        self.0.checked_add(bytes).map(Self)
    }

    /// Whether the address is a multiple of `alignment`, a power of two.
    pub fn is_aligned_to(self, alignment: u64) -> bool {
        self.0 & (alignment - 1) == 0
    }
}

impl fmt::Display for Gpa {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:#x}", self.0)
    }
}

/// A run of guest memory: where it starts and how long it is. Not checked until it is used.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Span {
    /// The first byte.
    pub at: Gpa,
    /// The length in bytes.
    pub bytes: usize,
}

impl Span {
    /// The run of `bytes` bytes at `at`.
    pub fn new(at: Gpa, bytes: usize) -> Self {
        Self { at, bytes }
    }
}
