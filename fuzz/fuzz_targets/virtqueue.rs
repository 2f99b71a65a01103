//! A virtqueue whose driver writes anything anywhere, also while the device works on it.

#![no_main]

libfuzzer_sys::fuzz_target!(|input: &[u8]| kiln_virtio::testing::fuzz_queue(input));
