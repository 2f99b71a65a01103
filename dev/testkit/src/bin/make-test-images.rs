//! Makes every test image that is not there yet. `cargo xtask test` runs it before the tests, which then find them.

#![forbid(unsafe_code)]

use std::time::Instant;

use anyhow::Result;
use kiln_testkit::image::{self, Image};
use kiln_testkit::nasty;

type Maker = fn() -> Result<Image>;

const IMAGES: &[(&str, Maker)] = &[
    ("busybox", image::busybox),
    ("scratch", image::scratch),
    ("debian", image::debian),
    ("debian with probe", image::debian_with_probe),
    ("python", image::python),
    ("node", image::node),
    ("deletions", nasty::deletions),
    ("deep", nasty::deep),
    ("metadata", nasty::metadata),
    ("configs", || nasty::config("plain")),
    ("broken", || nasty::broken("truncated-tar")),
    ("escapes", || nasty::escape("dot-dot")),
];

fn main() -> Result<()> {
    for (name, make) in IMAGES {
        let start = Instant::now();
        let image = make()?;
        eprintln!("test image {name}: {} ({:.1} s)", image.layout.display(), start.elapsed().as_secs_f64());
    }
    Ok(())
}
