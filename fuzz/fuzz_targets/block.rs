//! Requests to a block device.

#![no_main]

libfuzzer_sys::fuzz_target!(|input: &[u8]| kiln_virtio::testing::fuzz_block(input));
