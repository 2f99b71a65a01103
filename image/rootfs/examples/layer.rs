//! Reads a layer's tar on standard input and writes its EROFS image: `layer OUT < layer.tar`.
//!
//! Prints what became of it and how long it took, so that it can be put beside other tools.

use std::time::Instant;

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let path = std::env::args_os().nth(1).ok_or("usage: layer OUT < layer.tar")?;
    let mut out = std::fs::File::create(path)?;
    let start = Instant::now();
    let summary = kiln_rootfs::write_layer(std::io::stdin().lock(), &mut out)?;
    let seconds = start.elapsed().as_secs_f64();
    eprintln!(
        "{seconds:.3} s, {:.0} MB/s, {:.0} entries/s, {summary:?}",
        summary.image_bytes as f64 / 1e6 / seconds,
        summary.entries as f64 / seconds,
    );
    Ok(())
}
