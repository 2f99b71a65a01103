//! The registers of a virtio device, read and written in any order and width.

#![no_main]

libfuzzer_sys::fuzz_target!(|input: &[u8]| kiln_virtio::testing::fuzz_registers(input));
