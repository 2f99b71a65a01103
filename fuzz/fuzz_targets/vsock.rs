//! Packets that a guest sends through its socket device, and what its connections then cost the host.

#![no_main]

libfuzzer_sys::fuzz_target!(|input: &[u8]| kiln_virtio::testing::fuzz_vsock(input));
