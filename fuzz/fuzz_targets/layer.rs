//! A layer's tar stream, which comes from whoever built the image: a whole EROFS image or an error, within the limits.
//! What became an image can be read back and merged.

#![no_main]

use std::io::Cursor;

use kiln_rootfs::{LayerReader, Limits, MergeError};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|tar: &[u8]| {
    let mut tar = tar.to_vec();
    // Right checksums, or few inputs would get past them.
    for header in tar.chunks_exact_mut(512).filter(|block| block.iter().any(|&byte| byte != 0)) {
        header[148..156].fill(b' ');
        let sum: u32 = header.iter().map(|&byte| u32::from(byte)).sum();
        header[148..156].copy_from_slice(format!("{sum:06o}\0 ").as_bytes());
    }
    let limits = Limits { entries: 10_000, metadata_bytes: 16 << 20, image_bytes: 64 << 20 };
    let mut image = Cursor::new(Vec::new());
    let Ok(summary) = kiln_rootfs::write_layer_within(&limits, &tar[..], &mut image) else { return };
    assert_eq!(summary.image_bytes, image.get_ref().len() as u64);
    let mut again = Cursor::new(Vec::new());
    let repeated =
        kiln_rootfs::write_layer_within(&limits, &tar[..], &mut again).expect("it was possible once");
    assert_eq!(summary, repeated);
    assert!(image == again, "the same archive gave two images");
    let open = || LayerReader::open(Cursor::new(image.get_ref())).expect("our own image is read back");
    match kiln_rootfs::merge(&[open(), open()], Vec::new()) {
        Ok(_) | Err(MergeError::LinkTarget { .. }) => {}
        Err(error) => panic!("our own images do not merge: {error}"),
    }
});
