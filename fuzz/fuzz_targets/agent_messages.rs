//! What the agent and the host read from each other: frames in pieces of any size, and the messages in them.

#![no_main]

use kiln_protocol::frame::{Kind, ToAgent};
use kiln_protocol::{Exited, Reader, Reply};
use libfuzzer_sys::fuzz_target;
use prost::Message as _;

fuzz_target!(|input: (u8, &[u8])| {
    let (piece, mut stream) = input;
    let mut reader = Reader::default();
    while !stream.is_empty() {
        let space = reader.space();
        let count = stream.len().min(space.len()).min(usize::from(piece) + 1);
        space[..count].copy_from_slice(&stream[..count]);
        stream = &stream[count..];
        reader.filled(count);
        loop {
            match reader.next_frame() {
                Ok(Some((kind, payload))) => {
                    assert!(payload.len() <= kind.max_payload_bytes());
                    let _ = ToAgent::decode(kind, payload);
                    match kind {
                        Kind::Reply => drop(Reply::decode(payload)),
                        Kind::Exited => drop(Exited::decode(payload)),
                        _ => {}
                    }
                }
                Ok(None) => break,
                Err(_) => return,
            }
        }
    }
});
