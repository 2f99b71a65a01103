//! A layer's tar stream, which comes from whoever built the image: a whole EROFS image or an error, within the limits.

#![no_main]

use std::io::Cursor;

use kiln_rootfs::Limits;
use libfuzzer_sys::fuzz_target;

fuzz_target!(|tar: &[u8]| {
    let limits = Limits { entries: 10_000, metadata_bytes: 16 << 20, image_bytes: 64 << 20 };
    let mut image = Cursor::new(Vec::new());
    let Ok(summary) = kiln_rootfs::write_layer_within(&limits, tar, &mut image) else { return };
    assert_eq!(summary.image_bytes, image.get_ref().len() as u64);
    let mut again = Cursor::new(Vec::new());
    let repeated = kiln_rootfs::write_layer_within(&limits, tar, &mut again).expect("it was possible once");
    assert_eq!(summary, repeated);
    assert!(image == again, "the same archive gave two images");
});
