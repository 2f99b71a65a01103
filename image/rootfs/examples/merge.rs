//! Merges layer images, the lowest first: `merge OUT LAYER...`.
//!
//! With `--whole` before OUT, the layers are appended to OUT: it is then a file system that can be mounted.

use std::fs::File;
use std::io::copy;
use std::time::Instant;

use kiln_rootfs::LayerReader;

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let mut paths: Vec<_> = std::env::args_os().skip(1).collect();
    let whole = paths.first().is_some_and(|first| first == "--whole");
    if whole {
        paths.remove(0);
    }
    let (out, layers) = paths.split_first().ok_or("usage: merge [--whole] OUT LAYER...")?;
    let mut out = File::create(out)?;
    let start = Instant::now();
    let readers = layers
        .iter()
        .map(|path| Ok(LayerReader::open(File::open(path)?)?))
        .collect::<Result<Vec<_>, Box<dyn std::error::Error>>>()?;
    let read = start.elapsed().as_secs_f64();
    let summary = kiln_rootfs::merge(&readers, &mut out)?;
    let seconds = start.elapsed().as_secs_f64();
    eprintln!("read {read:.3} s, whole {seconds:.3} s, {summary:?}");
    if whole {
        for path in layers {
            copy(&mut File::open(path)?, &mut out)?;
        }
    }
    Ok(())
}
