//! This process's own page table, as the kernel shows it.
//!
//! One 64-bit entry for each page. Linux `Documentation/admin-guide/mm/pagemap.rst`.

use std::fs::File;
use std::io;
use std::sync::OnceLock;

const PATH: &str = "/proc/self/pagemap";

static OPEN: OnceLock<File> = OnceLock::new();

/// Opens what [`GuestMemory::changed`](crate::GuestMemory::changed) and [`GuestMemory::watch`](crate::GuestMemory::watch) look at,
/// for a process that will not be able to. Others need not call this.
///
/// # Errors
/// What the host says.
pub fn open_page_map() -> io::Result<()> {
    page_map().map(drop)
}

/// The page table, opened when it was not yet.
pub(crate) fn page_map() -> io::Result<&'static File> {
    if let Some(file) = OPEN.get() {
        return Ok(file);
    }
    let file = File::open(PATH)?;
    Ok(OPEN.get_or_init(|| file))
}
