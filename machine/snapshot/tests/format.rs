//! The format: what is written is read, what is changed is refused.

use kiln_snapshot::{
    FORMAT_VERSION, HEADER_BYTES, Header, HeaderError, LoadError, SECTION_BYTES_MAX, SECTIONS_MAX, Section,
    WriteError, read, read_header, write,
};
use kiln_support::digest::Digest;
use proptest::prelude::*;

/// A snapshot as version 1 wrote it, in hexadecimal. It is never made anew.
const GOLDEN: &str = include_str!("golden/version-1.hex");

fn header() -> Header {
    Header {
        memory_bytes: 256 << 20,
        vcpus: 2,
        vmm: "0.1.0".into(),
        cpu: Digest::of("cpu"),
        kernel: Digest::of("kernel"),
        initramfs: Digest::of("initramfs"),
        memory: Digest::of("memory"),
    }
}

fn section(name: &str, content: &[u8]) -> Section {
    Section { name: name.into(), version: 3, content: content.into() }
}

fn sections() -> Vec<Section> {
    vec![section("clock", b"tick"), section("nothing", b""), section("vcpu.0", &[0xa5; 300])]
}

fn file(sections: &[Section]) -> Vec<u8> {
    let mut bytes = Vec::new();
    write(&header(), sections, &mut bytes).expect("written");
    bytes
}

#[test]
fn what_is_written_is_read() {
    let bytes = file(&sections());
    assert_eq!(read(&mut &bytes[..]).expect("read"), (header(), sections()));
    assert_eq!(read_header(&mut &bytes[..HEADER_BYTES]).expect("read"), header());
}

#[test]
fn version_1_is_what_it_was() {
    assert_eq!(FORMAT_VERSION, 1);
    let hex = |line: &[u8]| line.iter().map(|byte| format!("{byte:02x}")).collect::<Vec<_>>().concat();
    let lines: Vec<_> = file(&sections()).chunks(48).map(hex).collect();
    assert_eq!(lines, GOLDEN.lines().collect::<Vec<_>>());
}

#[test]
fn any_flipped_bit_is_refused_and_its_place_named() {
    let bytes = file(&sections());
    for place in 0..bytes.len() {
        let mut damaged = bytes.clone();
        damaged[place] ^= 1 << (place % 8);
        let error = read(&mut &damaged[..]).expect_err("refused");
        match place {
            0..8 => {
                assert!(matches!(error, LoadError::Header(HeaderError::Magic)), "{place}: {error}");
            }
            8..12 => assert!(matches!(error, LoadError::Header(HeaderError::Version(_))), "{place}: {error}"),
            12..HEADER_BYTES => {
                assert!(matches!(error, LoadError::Header(_)), "{place}: {error}");
            }
            _ if place < HEADER_BYTES + 3 * 96 => {
                assert!(matches!(error, LoadError::Table(_)), "{place}: {error}");
            }
            _ if place < HEADER_BYTES + 3 * 96 + 4 => {
                assert!(error.to_string().contains("section clock"), "{error}");
            }
            _ => {
                assert!(error.to_string().contains("section vcpu.0"), "{place}: {error}");
            }
        }
    }
}

#[test]
fn a_file_cut_off_anywhere_is_refused() {
    let bytes = file(&sections());
    for length in 0..bytes.len() {
        let error = read(&mut &bytes[..length]).expect_err("refused");
        assert!(matches!(error, LoadError::CutOff(_)), "{length}: {error}");
    }
}

#[test]
fn a_file_that_goes_on_is_refused() {
    let mut bytes = file(&sections());
    bytes.push(0);
    assert!(matches!(read(&mut &bytes[..]), Err(LoadError::Longer)));
}

#[test]
fn what_could_not_be_read_again_is_not_written() {
    let refused = |header: &Header, sections: &[Section]| {
        assert!(matches!(write(header, sections, &mut Vec::new()), Err(WriteError::Content(_))));
    };
    for name in ["", "Upper", "a b", "ü", &"x".repeat(33)] {
        refused(&header(), &[section(name, b"")]);
    }
    refused(&header(), &[]);
    refused(&header(), &[section("a", b""), section("a", b"")]);
    refused(&header(), &[section("a", &vec![0; SECTION_BYTES_MAX as usize + 1])]);
    let many: Vec<_> = (0..=SECTIONS_MAX).map(|n| section(&n.to_string(), b"")).collect();
    refused(&header(), &many);
    for vmm in [String::new(), "a\n".into(), "x".repeat(33)] {
        refused(&Header { vmm, ..header() }, &sections());
    }
}

/// Rewrites every digest, so that what is behind them is looked at.
fn with_digests(mut bytes: Vec<u8>) -> Vec<u8> {
    let table = HEADER_BYTES..(HEADER_BYTES + 3 * 96).min(bytes.len());
    let digest = Digest::of(&bytes[table]);
    bytes[192..224].copy_from_slice(digest.as_bytes());
    let digest = Digest::of(&bytes[..HEADER_BYTES - 32]);
    bytes[HEADER_BYTES - 32..HEADER_BYTES].copy_from_slice(digest.as_bytes());
    bytes
}

#[test]
fn a_table_that_claims_more_than_a_section_may_have_is_refused_before_it_is_read() {
    let mut bytes = file(&sections());
    let length = HEADER_BYTES + 56;
    bytes[length..length + 8].copy_from_slice(&u64::MAX.to_le_bytes());
    let error = read(&mut &with_digests(bytes)[..]).expect_err("refused");
    assert!(matches!(error, LoadError::Table("a section that is too long")), "{error}");
}

#[test]
fn the_same_name_twice_is_refused() {
    let mut bytes = file(&sections());
    bytes.copy_within(HEADER_BYTES..HEADER_BYTES + 32, HEADER_BYTES + 96);
    let error = read(&mut &with_digests(bytes)[..]).expect_err("refused");
    assert!(matches!(error, LoadError::Table("a section twice")), "{error}");
}

proptest! {
    /// What gets past the digests is still checked: a snapshot that is accepted is one that could have been written.
    #[test]
    fn what_is_accepted_could_have_been_written(
        changes in prop::collection::vec((0_usize..HEADER_BYTES + 3 * 96, any::<u8>()), 1..4),
    ) {
        let mut bytes = file(&sections());
        for (place, value) in changes {
            bytes[place] = value;
        }
        let bytes = with_digests(bytes);
        if let Ok((header, sections)) = read(&mut &bytes[..]) {
            let mut again = Vec::new();
            write(&header, &sections, &mut again).expect("it could have been written");
            prop_assert_eq!(again, bytes);
        }
    }
}
