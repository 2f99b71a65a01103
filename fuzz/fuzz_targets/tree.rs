//! A tree that comes from a guest: whatever its entries say, nothing is made outside of the place it has.

#![no_main]

use std::os::unix::ffi::OsStrExt as _;

use kiln_protocol::frame::Kind;
use kiln_protocol::{Entry, Reader};
use kiln_tree::{Limits, Naming, Owner, Place, Writer};
use libfuzzer_sys::fuzz_target;
use prost::Message as _;

fuzz_target!(|input: (bool, &[u8])| {
    let (into, mut stream) = input;
    let root = tempfile::tempdir().expect("a directory");
    let to = root.path().join("to");
    std::fs::create_dir(&to).expect("a directory");
    let naming = if into { Naming::Into(b"in") } else { Naming::Contents };
    let place = Place::find(to.as_os_str().as_bytes(), naming).expect("a place");
    let limits = Limits { entries: 64, bytes: 1 << 16, mode: 0o777 };
    let mut writer = Writer::new(place, Owner::Maker, limits);
    let mut reader = Reader::default();
    'all: while !stream.is_empty() {
        let space = reader.space();
        let count = stream.len().min(space.len());
        space[..count].copy_from_slice(&stream[..count]);
        stream = &stream[count..];
        reader.filled(count);
        while let Ok(Some((kind, payload))) = reader.next_frame() {
            let went_on = match kind {
                Kind::Entry => {
                    let Ok(entry) = Entry::decode(payload) else { break 'all };
                    writer.entry(entry).is_ok()
                }
                Kind::Data => writer.data(payload).is_ok(),
                _ => false,
            };
            if !went_on {
                break 'all;
            }
        }
    }
    let _ = writer.finish();
    let made = std::fs::read_dir(root.path()).expect("the directory").count();
    assert_eq!(made, 1);
});
