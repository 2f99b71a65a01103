//! The agent's words to whoever reads the console.

use alloc::format;

/// Writes a line to the console, which the kernel opened as descriptor 2. When it fails there is nobody else to tell.
pub fn say(words: core::fmt::Arguments<'_>) {
    #[allow(unused_unsafe, reason = "safe where rustix was built with the standard library, as in tests")]
    // SAFETY: nothing closes the agent's descriptors 0 to 2.
    let console = unsafe { rustix::stdio::stderr() };
    let _ = rustix::io::write(console, format!("kiln-agent: {words}\n").as_bytes());
}
