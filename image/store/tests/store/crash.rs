//! A writer is killed at random points; nothing it had acknowledged is lost, nothing half-written is seen.

use std::collections::BTreeMap;
use std::io::{BufRead, BufReader, Write};
use std::process::{Command, Stdio};

use kiln_store::{ImageRecord, Store};

use crate::snapshots::{put_snapshot, snapshot_of};
use crate::{check_all_files, check_image, empty_store, put_image};

const ROUNDS: u64 = 25;
const NAMES: u64 = 5;
const ROOT: &str = "KILN_STORE_TEST_ROOT";
const SEED: &str = "KILN_STORE_TEST_SEED";

/// Puts, untags and collects until killed, and says on its output what it has done.
#[test]
#[ignore = "the part other tests play in a child process"]
fn writer_child() {
    let root = std::env::var_os(ROOT).expect("set by the test that starts this one");
    let mut seed: u64 = std::env::var(SEED).ok().and_then(|seed| seed.parse().ok()).expect("set as well");
    let store = Store::open(root).expect("a store");
    let mut output = std::io::stdout();
    loop {
        seed += 1;
        let name = format!("name-{}", seed % NAMES);
        // What is about to happen is said too: it may be done and not yet acknowledged when the kill comes.
        writeln!(output, "\n#about {name} {seed}").expect("written");
        if seed.is_multiple_of(7) {
            store.untag(&name, "linux/amd64").expect("untagged");
            store.collect().expect("collected");
            writeln!(output, "#done {name} 0").expect("written");
        } else {
            let image = put_image(&store, &name, seed).expect("put");
            // Of an image that the next round may untag, made and dropped with it.
            put_snapshot(&store, &snapshot_of(&image, seed)).expect("put");
            writeln!(output, "#done {name} {seed}").expect("written");
        }
    }
}

#[test]
fn kill_9_loses_nothing_acknowledged_and_leaves_nothing_half_written() {
    let (_folder, store) = empty_store();
    // For each name, the seeds it may stand for: the one acknowledged last, and the one under way at the kill.
    let mut possible: BTreeMap<String, Vec<u64>> = BTreeMap::new();
    let mut litter_seen = 0;
    for round in 0..ROUNDS {
        let mut child = Command::new(std::env::current_exe().expect("this test"))
            .args(["--ignored", "--exact", "crash::writer_child", "--nocapture"])
            .env(ROOT, store.root())
            .env(SEED, (round * 1000).to_string())
            .stdout(Stdio::piped())
            .stderr(Stdio::inherit())
            .spawn()
            .expect("a child");
        let mut lines = BufReader::new(child.stdout.take().expect("piped")).lines();
        let mut wanted = 1 + round * 5 % 13;
        let mut note = |line: &str| -> bool {
            let words: Vec<&str> = line.split(' ').collect();
            let [what, name, seed] = words[..] else { return false };
            if !what.starts_with('#') {
                return false;
            }
            let seed: u64 = seed.parse().expect("a number");
            let seeds = possible.entry(name.to_owned()).or_insert_with(|| vec![0]);
            match what {
                "#about" if seed.is_multiple_of(7) => seeds.push(0),
                "#about" => seeds.push(seed),
                "#done" => *seeds = vec![seed],
                _ => return false,
            }
            what == "#done"
        };
        while wanted > 0 {
            let line = lines.next().expect("the child goes on").expect("text");
            wanted -= u64::from(note(&line));
        }
        // Lets the child get a different way into its next step each time.
        for spin in 0..round * 40_000 {
            std::hint::black_box(spin);
        }
        child.kill().expect("killed");
        child.wait().expect("reaped");
        for line in lines.map_while(Result::ok) {
            note(&line);
        }

        let left = std::fs::read_dir(store.root().join("tmp")).expect("a folder").count();
        litter_seen += left;
        let store = Store::open(store.root()).expect("opens after a kill");
        assert_eq!(store.swept().sessions, left as u64, "what is removed is told");
        let litter = std::fs::read_dir(store.root().join("tmp")).expect("a folder").count();
        assert_eq!(litter, 0, "the dead writer's folder is swept");
        check_all_files(&store);
        let tags = store.tags().expect("sound");
        for (name, seeds) in &mut possible {
            let tag = tags.iter().find(|tag| tag.name == *name);
            let seed = tag.map_or(0, |tag| tag.pulled_unix_s);
            assert!(
                seeds.contains(&seed),
                "round {round}: {name} stands for {seed}, it can only for {seeds:?}"
            );
            if let Some(tag) = tag {
                let image: ImageRecord = check_image(&store, tag);
                let manifest = store.blob(&image.manifest).expect("sound").expect("there");
                assert_eq!(manifest, format!("manifest {seed}").as_bytes());
            }
            *seeds = vec![seed];
        }
    }
    assert!(litter_seen > 0, "no kill ever hit a writer at work");
}

#[test]
fn the_folder_of_a_live_writer_is_not_swept() {
    let (_folder, store) = empty_store();
    let mut child = Command::new(std::env::current_exe().expect("this test"))
        .args(["--ignored", "--exact", "crash::writer_child", "--nocapture"])
        .env(ROOT, store.root())
        .env(SEED, "0")
        .stdout(Stdio::piped())
        .stderr(Stdio::inherit())
        .spawn()
        .expect("a child");
    let mut lines = BufReader::new(child.stdout.take().expect("piped")).lines();
    // The child would stop with an error if its folder were taken from under it.
    let mut done = 0;
    while done < 30 {
        Store::open(store.root())
            .expect("opens beside a writer")
            .collect()
            .expect("collects beside a writer");
        let line = lines.next().expect("the child goes on").expect("text");
        done += u64::from(line.starts_with("#done"));
    }
    child.kill().expect("killed");
    child.wait().expect("reaped");
}
