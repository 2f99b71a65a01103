//! A kernel file, which a user may have from anywhere: loaded inside the guest's memory, or refused.

#![no_main]

use std::fs::File;
use std::os::unix::fs::FileExt as _;

use kiln_memory::GuestMemory;
use libfuzzer_sys::fuzz_target;
use rustix::fs::{MemfdFlags, memfd_create};

fuzz_target!(|image: &[u8]| {
    let file = File::from(memfd_create("kernel", MemfdFlags::CLOEXEC).expect("a memfd"));
    file.write_all_at(image, 0).expect("a memfd takes bytes");
    let memory = GuestMemory::new(64 << 20).expect("guest memory");
    // What it loads is written by checked accesses alone, so that it returns is all there is to see.
    let _ = kiln_vmm::boot::load_kernel(&memory, &file);
});
