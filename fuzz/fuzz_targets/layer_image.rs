//! A layer's image, as it is kept: read back it is a tree that can be merged, or an error.

#![no_main]

use std::io::Cursor;

use kiln_rootfs::LayerReader;
use libfuzzer_sys::fuzz_target;

fuzz_target!(|bytes: &[u8]| {
    // The input is the superblock and then the metadata; the length is made to fit.
    let Some((superblock, metadata)) = bytes.split_at_checked(128) else { return };
    let blocks = metadata.len().div_ceil(4096) as u32;
    let mut image = vec![0; 4096 * 5];
    image[1024..1152].copy_from_slice(superblock);
    image[1060..1064].copy_from_slice(&(5 + blocks).to_le_bytes());
    image[1064..1068].copy_from_slice(&5_u32.to_le_bytes());
    image.extend_from_slice(metadata);
    image.resize(4096 * (5 + blocks as usize), 0);
    let Ok(reader) = LayerReader::open(Cursor::new(&image)) else { return };
    // A link to what is not below is the one thing that is found out here.
    let _ = kiln_rootfs::merge(&[reader], Vec::new());
});
