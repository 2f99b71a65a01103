//! `docs/regressions.md` names tests, and this is how it stays true.

use std::collections::BTreeSet;
use std::fs;

use crate::paths;

/// The tests that the page names, as `path/to/file.rs::name` in backticks.
fn named(page: &str) -> BTreeSet<(&str, &str)> {
    page.split('`').filter_map(|word| word.split_once(".rs::")).collect()
}

#[test]
fn every_test_named_in_the_page_of_regressions_is_there() {
    let page = fs::read_to_string(paths::root().join("docs/regressions.md")).expect("the page");
    let tests = named(&page);
    assert!(tests.len() > 50, "only {} tests are named", tests.len());
    for (file, name) in tests {
        let file = format!("{file}.rs");
        let source =
            fs::read_to_string(paths::root().join(&file)).unwrap_or_else(|error| panic!("{file}: {error}"));
        assert!(source.contains(&format!("fn {name}(")), "{file} has no test {name}");
    }
}
