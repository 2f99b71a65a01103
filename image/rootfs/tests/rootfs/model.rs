//! Random stacks of layers against a model of the OCI image specification's layering that knows nothing of EROFS: a map
//! from paths to files, changed by each layer in turn.

use std::collections::{BTreeMap, BTreeSet};

use kiln_testkit::tar::{Entry, Tar};
use proptest::prelude::*;

use crate::facts::{self, Fact, Facts, Kind};
use crate::machine::{device, layer};

/// One thing a layer says, about a path of few possible names, so that layers meet.
#[derive(Debug, Clone)]
enum Change {
    Directory(u32),
    File(u8),
    Symlink,
    Fifo,
    /// To the path with this number among those there are.
    HardLink(prop::sample::Index),
    Whiteout,
    Opaque,
}

fn path() -> impl Strategy<Value = String> {
    let name = prop::sample::select(vec!["a", "b", "c", ".", "-x", "..a", "zz"]);
    // A lone dot would be no name.
    let name = name.prop_map(|name| if name == "." { ".d" } else { name });
    prop::collection::vec(name, 1..4).prop_map(|names| names.join("/"))
}

fn change() -> impl Strategy<Value = Change> {
    prop_oneof![
        4 => (0..0o1000_u32).prop_map(Change::Directory),
        6 => any::<u8>().prop_map(Change::File),
        1 => Just(Change::Symlink),
        1 => Just(Change::Fifo),
        2 => any::<prop::sample::Index>().prop_map(Change::HardLink),
        3 => Just(Change::Whiteout),
        1 => Just(Change::Opaque),
    ]
}

fn stack() -> impl Strategy<Value = Vec<Vec<(String, Change)>>> {
    prop::collection::vec(prop::collection::vec((path(), change()), 0..15), 1..6)
}

/// The model: what is at each path, with a number for each file that hard links share.
#[derive(Default)]
struct Model {
    files: BTreeMap<String, (u64, Fact)>,
    next: u64,
}

fn fact(kind: Kind, mode: u32, mtime: i64, xattr: Option<&str>) -> Fact {
    let xattrs = xattr.map(|value| (b"user.x".to_vec(), value.as_bytes().to_vec()));
    Fact {
        kind,
        mode,
        owner: (0, 0),
        mtime: (mtime, 0),
        xattrs: xattrs.into_iter().collect(),
        links: (0, Vec::new()),
    }
}

fn below(path: &str, directory: &str) -> bool {
    path.strip_prefix(directory).is_some_and(|rest| rest.starts_with('/'))
}

fn parents(path: &str) -> impl Iterator<Item = &str> {
    path.match_indices('/').map(|(at, _)| &path[..at])
}

impl Model {
    fn put(&mut self, path: &str, fact: Fact) {
        self.next += 1;
        self.files.insert(path.to_owned(), (self.next, fact));
    }

    fn remove(&mut self, path: &str) {
        self.files.retain(|other, _| other != path && !below(other, path));
    }

    /// Applies a layer and returns its archive. Changes that a layer cannot say together are left out.
    fn apply(&mut self, changes: &[(String, Change)], number: i64) -> Vec<u8> {
        let lower: Vec<(String, Kind)> =
            self.files.iter().map(|(path, (_, fact))| (path.clone(), fact.kind.clone())).collect();
        let mut tar = Tar::new();
        // What this layer has at each path so far; a path that is a file cannot be a parent too.
        let mut own: BTreeMap<String, bool> = BTreeMap::new();
        let mut entries = Vec::new();
        let (mut whiteouts, mut opaque) = (BTreeSet::new(), BTreeSet::new());
        for (path, change) in changes {
            let is_parent = matches!(change, Change::Directory(_) | Change::Opaque);
            let is_entry = !matches!(change, Change::Whiteout);
            let below_file = |path: &str| parents(path).any(|parent| own.get(parent) == Some(&false));
            let clashes = own.get(path).is_some_and(|&directory| directory != is_parent)
                || (!is_parent && own.keys().any(|other| below(other, path)));
            if below_file(path) || is_entry && clashes {
                continue;
            }
            let targets: Vec<&str> = lower
                .iter()
                .filter(|(target, kind)| {
                    *kind != Kind::Directory && !own.contains_key(target) && target != path
                })
                .map(|(target, _)| target.as_str())
                // A symlink of this layer on the way would be followed.
                .filter(|target| !below_file(target) && !below(target, path) && !below(path, target))
                .collect();
            if matches!(change, Change::HardLink(_)) && targets.is_empty() {
                continue;
            }
            own.extend(parents(path).map(|parent| (parent.to_owned(), true)));
            match change {
                Change::Whiteout => {
                    let (parent, name) = path.rsplit_once('/').map_or(("", path.as_str()), |split| split);
                    let parent = if parent.is_empty() { String::new() } else { format!("{parent}/") };
                    tar = tar.with(&Entry::marker(format!("{parent}.wh.{name}")));
                    whiteouts.insert(path.clone());
                }
                Change::Opaque => {
                    own.insert(path.clone(), true);
                    tar = tar.with(&Entry::marker(format!("{path}/.wh..wh..opq")));
                    opaque.insert(path.clone());
                }
                other => {
                    own.insert(path.clone(), is_parent);
                    let (entry, what) = match other {
                        Change::Directory(mode) => {
                            let entry = Entry::dir(format!("{path}/")).mode(*mode).xattr("user.x", path);
                            (entry, Some(fact(Kind::Directory, *mode, number, Some(path))))
                        }
                        Change::File(byte) => {
                            let data = vec![*byte; usize::from(*byte) * 40];
                            let fact = fact(facts::content(&data[..]), 0o644, number, None);
                            (Entry::file(path, &data), Some(fact))
                        }
                        Change::Symlink => (Entry::symlink(path, "a/b"), {
                            Some(fact(Kind::Symlink(b"a/b".to_vec()), 0o777, number, None))
                        }),
                        Change::Fifo => (Entry::fifo(path), Some(fact(Kind::Fifo, 0o644, number, None))),
                        Change::HardLink(index) => (Entry::hard_link(path, index.get(&targets)), None),
                        Change::Whiteout | Change::Opaque => unreachable!("handled above"),
                    };
                    let target = String::from_utf8(entry.link.clone()).unwrap();
                    tar = tar.with(&entry.mtime(number as u64));
                    entries.push((path.clone(), what, target));
                }
            }
        }
        // Links first: they mean what is below before any of this.
        let targets: Vec<_> = entries
            .iter()
            .map(|(_, what, target)| what.is_none().then(|| self.files[target].clone()))
            .collect();
        // Then what goes away, wherever in the archive it is said.
        for path in &whiteouts {
            self.remove(path);
        }
        for path in &opaque {
            self.files.retain(|other, _| !below(other, path));
        }
        // Then what comes. Parents that nobody describes are made plain, or stay as they are.
        for path in own.iter().filter(|(_, directory)| **directory).map(|(path, _)| path) {
            if self.files.get(path).is_none_or(|(_, fact)| fact.kind != Kind::Directory) {
                self.remove(path);
                self.put(path, fact(Kind::Directory, 0o755, 0, None));
            }
        }
        for ((path, what, _), target) in entries.into_iter().zip(targets) {
            match (what, target) {
                (Some(what), _) if what.kind == Kind::Directory => {
                    self.files.get_mut(&path).unwrap().1 = what;
                }
                (Some(what), _) => {
                    self.remove(&path);
                    self.put(&path, what);
                }
                (None, target) => {
                    self.remove(&path);
                    self.files.insert(path, target.unwrap());
                }
            }
        }
        tar.finish()
    }

    fn facts(&self) -> Facts {
        let mut facts = Facts::new();
        facts.insert(Vec::new(), fact(Kind::Directory, 0o755, 0, None));
        for (path, (number, fact)) in &self.files {
            let mut fact = fact.clone();
            if fact.kind != Kind::Directory {
                let mut names =
                    self.files.iter().filter(|(_, (other, _))| other == number).map(|(name, _)| name);
                let first = names.next().unwrap().clone().into_bytes();
                fact.links = (1 + names.count() as u64, first);
            }
            facts.insert(path.clone().into_bytes(), fact);
        }
        facts
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 1500, ..ProptestConfig::default() })]

    #[test]
    fn a_merged_stack_is_what_the_model_says(stack in stack()) {
        let mut model = Model::default();
        let tars: Vec<_> =
            stack.iter().enumerate().map(|(number, changes)| model.apply(changes, number as i64 + 1)).collect();
        facts::assert_same(&facts::of_image(&device(&tars)), &model.facts());
    }

    #[test]
    fn layers_are_the_same_each_time(stack in stack()) {
        let mut model = Model::default();
        for (number, changes) in stack.iter().enumerate() {
            let tar = model.apply(changes, number as i64 + 1);
            prop_assert!(layer(&tar) == layer(&tar));
        }
    }
}
