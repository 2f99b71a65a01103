//! The folder rule: a folder is a permission, and this is where it is checked.
//!
//! Reads `cargo metadata`, so it sees what cargo sees. Four rules, each a table below: which folder may depend on
//! which, which outside crates a folder must never link, which crates may contain unsafe code, and that everything
//! else forbids it.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

use anyhow::{Context as _, Result, bail};
use serde_json::{Value, json};

use crate::{paths, process};

/// What a folder may depend on: prefixes of other crates' folders, or a crate's folder itself. Its own folder is
/// always allowed.
const MAY_DEPEND_ON: &[(&str, &[&str])] = &[
    ("support", &[]),
    ("machine", &["support"]),
    ("image", &["support"]),
    ("guest", &["support"]),
    (
        "host",
        &[
            "machine/control",
            "machine/jail",
            "machine/snapshot",
            "guest/protocol",
            "guest/tree",
            "image",
            "support",
        ],
    ),
    ("front", &["host"]),
    ("dev", &["support", "machine", "image", "guest", "host", "front"]),
    ("bench", &["support", "machine", "image", "guest", "host", "dev/testkit"]),
    ("tests", &["support", "machine", "image", "guest", "host", "dev/testkit"]),
];

/// Single edges beside the table, each with its reason.
const EXCEPTIONS: &[(&str, &str)] = &[
    // The binary can be a monitor itself: its `main` hands over to the machine before it is anything else.
    ("front/cli", "machine/vmm"),
];

/// What tests may depend on beside the table, in every folder.
const TESTS_MAY_DEPEND_ON: &[&str] = &["dev/testkit"];

/// Outside crates that a folder must not link, not even through another crate.
const MUST_NOT_LINK: &[(&str, &[&str])] = &[
    ("support", &["tokio", "serde_json", "kvm-ioctls", "vm-memory"]),
    ("machine", &["tokio", "serde_json", "hyper", "reqwest", "oci-client"]),
    ("guest", &["tokio", "serde_json", "hyper", "kvm-ioctls", "vm-memory"]),
    ("image", &["kvm-ioctls", "kvm-bindings", "vm-memory"]),
    ("host", &["kvm-ioctls", "kvm-bindings", "vm-memory"]),
];

/// Where unsafe code may be: a whole crate, or one file or folder of it. Every other crate forbids it.
const MAY_BE_UNSAFE: &[(&str, &str)] = &[
    ("machine/memory", "src"),
    ("machine/hypervisor", "src"),
    ("guest/agent", "src/sys"),
    // A process is started and gives things up by system calls that have no safe interface.
    ("machine/jail", "src"),
    // Attacks are system calls that are put into the mouth of a monitor.
    ("dev/testkit", "src/inject"),
    // Vector registers are reached by the processor's own instructions alone.
    ("dev/probe", "src/registers"),
];

/// The words that turn the workspace's denial of unsafe code off.
const ALLOWS_UNSAFE: [&str; 4] =
    ["#![allow(unsafe_code", "#[allow(unsafe_code", "#![expect(unsafe_code", "#[expect(unsafe_code"];

/// Checks the rules, and names every breach.
pub(crate) fn run(_args: &[String]) -> Result<()> {
    let metadata = process::output(&mut process::cargo(["metadata", "--format-version", "1", "--locked"]))?;
    let graph = Graph::parse(&serde_json::from_str(&metadata).context("cargo metadata")?)?;
    let mut breaches = graph.breaches();
    for (folder, roots) in &graph.roots {
        breaches.extend(unsafe_breaches(&paths::root().join(folder), folder, roots)?);
    }
    if breaches.is_empty() {
        eprintln!("layers: {} crates keep the rule", graph.roots.len());
        return Ok(());
    }
    bail!("the folder rule is broken (dev/xtask/src/layers.rs)\n  {}", breaches.join("\n  "));
}

/// The workspace as the rule sees it.
#[derive(Default)]
struct Graph {
    /// Folder of each member → the root source files of its targets.
    roots: BTreeMap<String, Vec<String>>,
    /// From folder, to folder, and whether only its tests need it.
    edges: BTreeSet<(String, String, bool)>,
    /// Folder of each member → every outside crate it links, directly or not, its tests left aside.
    links: BTreeMap<String, BTreeSet<String>>,
}

impl Graph {
    fn parse(metadata: &Value) -> Result<Self> {
        let text =
            |value: &Value, key: &str| value[key].as_str().map(str::to_owned).with_context(|| key.to_owned());
        let list = |value: &Value, key: &str| value[key].as_array().cloned().with_context(|| key.to_owned());
        let root = text(metadata, "workspace_root")?;
        let members: BTreeSet<String> = list(metadata, "workspace_members")?
            .iter()
            .filter_map(|id| id.as_str().map(str::to_owned))
            .collect();

        let mut graph = Self::default();
        let mut names = BTreeMap::new();
        let mut folders = BTreeMap::new();
        for package in list(metadata, "packages")? {
            let id = text(&package, "id")?;
            names.insert(id.clone(), text(&package, "name")?);
            if !members.contains(&id) {
                continue;
            }
            let manifest = text(&package, "manifest_path")?;
            let folder = manifest.strip_prefix(&root).and_then(|path| path.strip_suffix("/Cargo.toml"));
            let folder = folder.context("a member outside the workspace")?.trim_start_matches('/').to_owned();
            // Tests and examples are held by the workspace's lints and by what is searched for below.
            let shipped =
                |target: &&Value| target["kind"] == json!(["lib"]) || target["kind"] == json!(["bin"]);
            let targets = list(&package, "targets")?;
            let roots = targets
                .iter()
                .filter(shipped)
                .map(|target| text(target, "src_path"))
                .collect::<Result<_>>()?;
            graph.roots.insert(folder.clone(), roots);
            folders.insert(id, folder);
        }

        // Per package, what it needs outside of its tests.
        let mut needs: BTreeMap<String, Vec<String>> = BTreeMap::new();
        for node in list(&metadata["resolve"], "nodes")? {
            let id = text(&node, "id")?;
            for dependency in list(&node, "deps")? {
                let to = text(&dependency, "pkg")?;
                let only_tests = list(&dependency, "dep_kinds")?.iter().all(|kind| kind["kind"] == "dev");
                if let (Some(from), Some(to)) = (folders.get(&id), folders.get(&to)) {
                    graph.edges.insert((from.clone(), to.clone(), only_tests));
                }
                if !only_tests {
                    needs.entry(id.clone()).or_default().push(to);
                }
            }
        }
        for (id, folder) in &folders {
            let mut seen = BTreeSet::new();
            let mut next = vec![id.clone()];
            while let Some(id) = next.pop() {
                for to in needs.get(&id).into_iter().flatten() {
                    if seen.insert(to.clone()) {
                        next.push(to.clone());
                    }
                }
            }
            graph.links.insert(folder.clone(), seen.iter().filter_map(|id| names.get(id).cloned()).collect());
        }
        Ok(graph)
    }

    fn breaches(&self) -> Vec<String> {
        let mut breaches = Vec::new();
        for (from, to, only_tests) in &self.edges {
            if !may_depend(from, to, *only_tests) {
                let what = if *only_tests { "its tests must not depend on" } else { "must not depend on" };
                breaches.push(format!("{from}: {what} {to}"));
            }
        }
        for (folder, links) in &self.links {
            for (tier, forbidden) in MUST_NOT_LINK {
                for name in forbidden.iter().filter(|name| is_within(folder, tier) && links.contains(**name))
                {
                    breaches.push(format!("{folder}: must not link {name}"));
                }
            }
        }
        breaches
    }
}

fn may_depend(from: &str, to: &str, only_tests: bool) -> bool {
    let tier = from.split('/').next().unwrap_or(from);
    let allowed =
        MAY_DEPEND_ON.iter().find(|(folder, _)| *folder == tier).map_or(&[][..], |(_, allowed)| allowed);
    is_within(to, tier)
        || allowed.iter().any(|place| is_within(to, place))
        || EXCEPTIONS.contains(&(from, to))
        || only_tests && TESTS_MAY_DEPEND_ON.contains(&to)
}

fn is_within(folder: &str, place: &str) -> bool {
    folder.strip_prefix(place).is_some_and(|rest| rest.is_empty() || rest.starts_with('/'))
}

/// What a crate says about unsafe code that it must not, or fails to say.
fn unsafe_breaches(path: &Path, folder: &str, roots: &[String]) -> Result<Vec<String>> {
    let place = MAY_BE_UNSAFE.iter().find(|(member, _)| *member == folder).map(|(_, place)| path.join(place));
    let mut breaches = Vec::new();
    for root in roots.iter().filter(|_| place.is_none()) {
        let text = std::fs::read_to_string(root).with_context(|| root.clone())?;
        if !text.contains("#![forbid(unsafe_code)]") {
            breaches.push(format!("{folder}: {root} lacks #![forbid(unsafe_code)]"));
        }
    }
    for file in rust_files(path)? {
        // `src/sys` is `src/sys.rs` and all under `src/sys/`.
        let inside =
            place.as_ref().is_some_and(|place| file.starts_with(place) || file.with_extension("") == *place);
        let text = std::fs::read_to_string(&file).with_context(|| file.display().to_string())?;
        if !inside
            && text.lines().any(|line| ALLOWS_UNSAFE.iter().any(|words| line.trim_start().starts_with(words)))
        {
            breaches.push(format!("{folder}: {} allows unsafe code where it may not be", file.display()));
        }
    }
    Ok(breaches)
}

fn rust_files(dir: &Path) -> Result<Vec<std::path::PathBuf>> {
    let mut files = Vec::new();
    for entry in std::fs::read_dir(dir).with_context(|| dir.display().to_string())? {
        let path = entry?.path();
        if path.is_dir() {
            files.extend(rust_files(&path)?);
        } else if path.extension().is_some_and(|extension| extension == "rs") {
            files.push(path);
        }
    }
    Ok(files)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn breaches(edges: &[(&str, &str, bool)], links: &[(&str, &[&str])]) -> Vec<String> {
        let edges =
            edges.iter().map(|(from, to, tests)| ((*from).to_owned(), (*to).to_owned(), *tests)).collect();
        let names = |names: &[&str]| names.iter().map(|name| (*name).to_owned()).collect();
        let links = links.iter().map(|(folder, linked)| ((*folder).to_owned(), names(linked))).collect();
        Graph { roots: BTreeMap::new(), edges, links }.breaches()
    }

    #[test]
    fn a_machine_that_knows_images_is_refused() {
        assert_eq!(breaches(&[("machine/vmm", "image/store", false)], &[]).len(), 1);
        assert_eq!(breaches(&[("machine/vmm", "machine/memory", false)], &[]), Vec::<String>::new());
    }

    #[test]
    fn the_host_reaches_machines_by_their_control_words_only() {
        assert_eq!(breaches(&[("host/sandbox", "machine/control", false)], &[]), Vec::<String>::new());
        assert_eq!(breaches(&[("host/sandbox", "machine/vmm", false)], &[]).len(), 1);
    }

    #[test]
    fn only_tests_may_use_the_testkit() {
        assert_eq!(breaches(&[("image/oci", "dev/testkit", true)], &[]), Vec::<String>::new());
        assert_eq!(breaches(&[("image/oci", "dev/testkit", false)], &[]).len(), 1);
    }

    #[test]
    fn a_machine_with_an_executor_is_refused() {
        assert_eq!(breaches(&[], &[("machine/virtio", &["tokio"])]), ["machine/virtio: must not link tokio"]);
    }

    #[test]
    fn a_crate_that_does_not_forbid_unsafe_code_is_named() {
        let dir = std::env::temp_dir().join(format!("kiln-layers-{}", std::process::id()));
        std::fs::create_dir_all(&dir).expect("a directory");
        let root = dir.join("lib.rs");
        std::fs::write(&root, "//! Nothing.\n").expect("a file");
        let root = root.display().to_string();
        let found = unsafe_breaches(&dir, "image/new", std::slice::from_ref(&root)).expect("read");
        std::fs::write(&root, "#![forbid(unsafe_code)]\n").expect("a file");
        let clean = unsafe_breaches(&dir, "image/new", std::slice::from_ref(&root)).expect("read");
        std::fs::remove_dir_all(&dir).expect("removed");
        assert_eq!((found.len(), clean.len()), (1, 0));
    }
}
