//! Files and trees on a connection of their own.

use kiln_protocol::frame::Kind;
use kiln_protocol::{Call, Entry, Get, MAX_DATA_BYTES, Outcome, Put, PutNaming, Reason, Reply};
use prost::Message as _;

use crate::guest::{Guest, Stream, sh};

fn file(mode: u32) -> Entry {
    Entry { mode: 0o100_000 | mode, ..Entry::default() }
}

fn put(path: &str) -> Put {
    Put { path: path.into(), ..Put::default() }
}

/// Asks to write, which is granted.
fn begin(guest: &Guest, put: Put) -> Stream {
    let mut stream = guest.connect();
    stream.request(Call::Put(put));
    let outcome = stream.reply();
    assert!(matches!(outcome, Outcome::Done(_)), "{outcome:?}");
    stream
}

impl Stream {
    fn entry(&mut self, entry: &Entry) {
        self.send(Kind::Entry, &entry.encode_to_vec());
    }

    fn end(mut self) -> Outcome {
        self.send(Kind::End, &[]);
        self.reply()
    }
}

fn write(guest: &Guest, path: &str, mode: u32, contents: &[u8]) -> Outcome {
    let mut stream = begin(guest, put(path));
    stream.entry(&file(mode));
    contents.chunks(MAX_DATA_BYTES).for_each(|piece| stream.send(Kind::Data, piece));
    stream.end()
}

fn refusal(outcome: Outcome) -> (Reason, String) {
    match outcome {
        Outcome::Failed(failed) => (failed.reason(), failed.message),
        outcome => panic!("not refused: {outcome:?}"),
    }
}

fn done(outcome: &Outcome) {
    assert!(matches!(outcome, Outcome::Done(_)), "{outcome:?}");
}

/// What is read: entries, contents of all files, and the last word.
fn read(guest: &Guest, path: &str, file: bool) -> (Vec<Entry>, Vec<u8>, Outcome) {
    let mut stream = guest.connect();
    stream.request(Call::Get(Get { path: path.into(), file }));
    let (mut entries, mut contents) = (vec![], vec![]);
    let begun = stream.reply();
    if matches!(begun, Outcome::Failed(_)) {
        return (entries, contents, begun);
    }
    loop {
        match stream.frame().expect("the agent says when it is over") {
            (Kind::Entry, payload) => entries.push(Entry::decode(payload.as_slice()).expect("an entry")),
            (Kind::Data, payload) => contents.extend(payload),
            (Kind::Reply, payload) => {
                assert!(stream.frame().is_none(), "the last frame of a stream");
                let reply = Reply::decode(payload.as_slice()).expect("a reply");
                return (entries, contents, reply.outcome.expect("an outcome"));
            }
            (kind, _) => panic!("{kind:?} in the middle of a tree"),
        }
    }
}

#[test]
fn a_file_of_any_size_is_written_and_read_over_one_connection() {
    let guest = Guest::with_reaper();
    let contents: Vec<u8> = (0..6_000_000_u32).map(|at| (at % 251) as u8).collect();
    done(&write(&guest, "/srv/deep/file", 0o4_751, &contents));
    assert_eq!(
        guest.sh("stat -c '%a %u:%g %s' /srv/deep/file; ls -A /srv/deep").text(),
        "4751 0:0 6000000\nfile\n"
    );
    let (entries, found, outcome) = read(&guest, "/srv/deep/file", true);
    done(&outcome);
    assert!(found == contents);
    assert_eq!((entries.len(), entries[0].mode, entries[0].size), (1, 0o104_751, 6_000_000));
}

#[test]
fn a_file_is_there_when_it_is_complete_and_not_before() {
    let guest = Guest::with_reaper();
    done(&write(&guest, "/tmp/file", 0o644, b"old"));
    let mut stream = begin(&guest, put("/tmp/file"));
    stream.entry(&file(0o600));
    stream.send(Kind::Data, b"new");
    // The agent has taken both once another has been answered.
    assert_eq!(guest.sh("cat /tmp/file").text(), "old");
    drop(stream);
    let gone = guest.sh("until [ \"$(ls -A /tmp)\" = file ]; do :; done; cat /tmp/file");
    assert_eq!(gone.text(), "old");
    done(&write(&guest, "/tmp/file", 0o600, b"new"));
    assert_eq!(guest.sh("cat /tmp/file; stat -c ' %a' /tmp/file").text(), "new 600\n");
}

#[test]
fn a_tree_goes_in_as_root_unless_owners_are_kept() {
    let guest = Guest::with_reaper();
    assert_eq!(guest.sh("mkdir /srv").text(), "");
    let owned = |entry| Entry { uid: 1000, gid: 1001, mtime_s: 1_000_000_000, ..entry };
    for (keep_owner, owner) in [(false, "0:0"), (true, "1000:1001")] {
        let name = format!("tree{keep_owner}").into_bytes();
        let mut stream =
            begin(&guest, Put { naming: PutNaming::Into.into(), name, keep_owner, ..put("/srv") });
        stream.entry(&owned(Entry { mode: 0o040_700, ..Entry::default() }));
        stream.entry(&owned(Entry { depth: 1, name: b"file".into(), ..file(0o640) }));
        stream.send(Kind::Data, b"x");
        let link = Entry {
            depth: 1,
            name: b"link".into(),
            mode: 0o120_777,
            target: b"file".into(),
            ..Entry::default()
        };
        stream.entry(&owned(link));
        done(&stream.end());
        let found =
            guest.sh(&format!("cd /srv/tree{keep_owner}; stat -c '%n %a %u:%g %Y' . file link; cat link"));
        let expected =
            format!(". 700 {owner} 1000000000\nfile 640 {owner} 1000000000\nlink 777 {owner} 1000000000\nx");
        assert_eq!(found.text(), expected);
    }
    let (entries, contents, outcome) = read(&guest, "/srv/treetrue", false);
    done(&outcome);
    let mut found: Vec<_> =
        entries.iter().map(|entry| (entry.depth, entry.name.as_slice(), entry.uid)).collect();
    found.sort_unstable();
    assert_eq!(found, [(0, &b""[..], 1000), (1, b"file", 1000), (1, b"link", 1000)]);
    assert_eq!(contents, b"x");
}

#[test]
fn what_is_no_place_or_no_file_is_refused() {
    let bare = Guest::bare();
    assert!(refusal(bare.call(Call::Put(put("/early")))).1.contains("not been set up"));
    assert!(refusal(read(&bare, "/early", true).2).1.contains("not been set up"));
    let guest = Guest::with_reaper();
    for path in ["", "relative"] {
        assert!(refusal(guest.call(Call::Put(put(path)))).1.contains("absolute path"), "{path}");
        assert!(refusal(read(&guest, path, false).2).1.contains("absolute path"), "{path}");
    }
    for path in ["/tmp/", "/nul\0", "/..", &format!("/{}", "a".repeat(5000))] {
        assert!(refusal(guest.call(Call::Put(put(path)))).1.contains("invalid argument"), "{path}");
    }
    assert!(refusal(guest.call(Call::Put(put("/etc/passwd/x")))).1.contains("not a directory"));
    assert!(refusal(write(&guest, "/tmp", 0o644, b"")).1.contains("is a directory"));
    let missing = refusal(read(&guest, "/no/such", true).2);
    assert_eq!((missing.0, missing.1.contains("no such file")), (Reason::NotFound, true), "{}", missing.1);
    assert!(refusal(read(&guest, "/tmp", true).2).1.contains("is a directory"));
    assert!(refusal(read(&guest, "/dev/zero", true).2).1.contains("invalid argument"));
    assert_eq!(guest.sh("ls -A /tmp").text(), "");
}

#[test]
fn a_refusal_in_the_middle_is_heard_by_who_still_sends() {
    let guest = Guest::with_reaper();
    let mut stream = begin(&guest, put("/tmp/tree"));
    stream.entry(&Entry { mode: 0o040_755, ..Entry::default() });
    stream.entry(&Entry { depth: 1, name: b"../x".into(), ..file(0o644) });
    for _ in 0..64 {
        stream.send(Kind::Data, &vec![0; MAX_DATA_BYTES]);
    }
    assert!(refusal(stream.reply()).1.contains("invalid argument"));
    assert_eq!(guest.sh("ls -A / /tmp/tree | grep x || echo none").text(), "none\n");
}

#[test]
fn a_frame_out_of_place_ends_a_transfer() {
    let guest = Guest::with_reaper();
    let mut stream = begin(&guest, put("/tmp/file"));
    stream.entry(&file(0o644));
    stream.send(Kind::Stdin, b"x");
    assert!(stream.frame().is_none());
    let mut stream = guest.start(sh("sleep 1000"));
    stream.send(Kind::Data, b"x");
    assert!(stream.frame().is_none());
    assert_eq!(guest.sh("ls -A /tmp").text(), "");
}

#[test]
fn who_reads_slowly_holds_up_nobody_else() {
    let guest = Guest::with_reaper();
    assert_eq!(guest.sh("head -c 20000000 /dev/zero >/tmp/large").text(), "");
    let mut slow = guest.connect();
    slow.request(Call::Get(Get { path: b"/tmp/large".into(), file: true }));
    assert!(matches!(slow.reply(), Outcome::Done(_)));
    assert_eq!(guest.sh("echo served").text(), "served\n");
    drop(slow);
    assert_eq!(guest.sh("echo served").text(), "served\n");
}

#[test]
fn links_of_the_image_end_inside_it() {
    let guest = Guest::with_reaper();
    assert_eq!(
        guest.sh("mkdir /srv; ln -s ../../../../../../srv /tmp/up; ln -s /etc/passwd /tmp/link").text(),
        ""
    );
    done(&write(&guest, "/tmp/up/file", 0o644, b"inside"));
    assert_eq!(guest.sh("cat /srv/file").text(), "inside");
    assert!(!std::path::Path::new("/srv/file").exists());
    let (_, contents, outcome) = read(&guest, "/tmp/link", true);
    done(&outcome);
    assert!(contents.starts_with(b"root:x:0"));
    let (entries, contents, outcome) = read(&guest, "/tmp/link", false);
    done(&outcome);
    assert_eq!((entries[0].target.as_slice(), contents.len()), (&b"/etc/passwd"[..], 0));
}
