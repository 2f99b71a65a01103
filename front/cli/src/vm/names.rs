//! Names for VMs that nobody named: two words that can be said aloud.

use kiln::detached::Machines;

use crate::failure::Failure;

/// How often two words are drawn that nobody has; more follow then.
const DRAWS: usize = 8;

const ADJECTIVES: [&str; 64] = [
    "able", "amber", "ample", "azure", "bold", "brave", "bright", "brisk", "calm", "candid", "clear",
    "clever", "coral", "cosy", "crisp", "daring", "eager", "early", "easy", "exact", "fair", "fancy", "fast",
    "fine", "firm", "fond", "free", "fresh", "gentle", "glad", "golden", "grand", "happy", "hardy", "honest",
    "jolly", "keen", "kind", "lively", "lucid", "lucky", "mellow", "merry", "mild", "neat", "nimble",
    "noble", "patient", "plain", "proud", "quick", "quiet", "rapid", "ready", "rosy", "sharp", "silent",
    "sleek", "smooth", "solid", "steady", "sunny", "tidy", "warm",
];

const NOUNS: [&str; 64] = [
    "amphora",
    "anvil",
    "arch",
    "basin",
    "beaker",
    "bellows",
    "bisque",
    "bowl",
    "brick",
    "bucket",
    "burner",
    "chimney",
    "china",
    "clay",
    "coal",
    "crock",
    "crucible",
    "cup",
    "damper",
    "ember",
    "enamel",
    "firebox",
    "flame",
    "flask",
    "flint",
    "flue",
    "forge",
    "furnace",
    "glaze",
    "goblet",
    "grate",
    "hearth",
    "jar",
    "jug",
    "kettle",
    "ladle",
    "lamp",
    "lantern",
    "loam",
    "mortar",
    "mould",
    "mug",
    "oven",
    "pestle",
    "pitcher",
    "plate",
    "porcelain",
    "potter",
    "quartz",
    "saucer",
    "shard",
    "shelf",
    "slate",
    "slip",
    "spark",
    "spout",
    "stove",
    "teapot",
    "tile",
    "tongs",
    "trivet",
    "urn",
    "vase",
    "wheel",
];

/// A name that no VM has now.
///
/// # Errors
/// When the VMs cannot be listed, or the host has no random numbers.
pub(super) fn fresh(machines: &Machines) -> Result<String, Failure> {
    let (records, damaged) = machines.list()?;
    let is_taken =
        |name: &str| damaged.iter().any(|one| one == name) || records.iter().any(|one| one.name == name);
    for _ in 0..DRAWS {
        let name = drawn()?;
        if !is_taken(&name) {
            return Ok(name);
        }
    }
    let digits = kiln::random_name().map_err(Failure::host)?;
    Ok(format!("{}_{}", drawn()?, &digits[..6]))
}

fn drawn() -> Result<String, Failure> {
    let mut bytes = [0; 2];
    getrandom::fill(&mut bytes).map_err(Failure::host)?;
    let [adjective, noun] = bytes.map(usize::from);
    Ok(format!("{}_{}", ADJECTIVES[adjective % ADJECTIVES.len()], NOUNS[noun % NOUNS.len()]))
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    #[test]
    fn every_name_is_one_and_there_are_many() {
        let names: BTreeSet<String> =
            ADJECTIVES.iter().flat_map(|one| NOUNS.iter().map(move |two| format!("{one}_{two}"))).collect();
        assert_eq!(names.len(), ADJECTIVES.len() * NOUNS.len());
        assert!(names.iter().all(|name| kiln::detached::is_vm_name(name)));
        assert!(names.contains(&drawn().expect("random")));
    }
}
