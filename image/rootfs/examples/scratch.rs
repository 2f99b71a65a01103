//! Makes an empty scratch disk: `scratch OUT BYTES`.

use std::time::Instant;

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let mut args = std::env::args().skip(1);
    let (Some(path), Some(bytes)) = (args.next(), args.next()) else {
        return Err("usage: scratch OUT BYTES".into());
    };
    let file = std::fs::File::create(path)?;
    let start = Instant::now();
    kiln_rootfs::scratch(&file, bytes.parse()?)?;
    eprintln!("{:.3} ms", start.elapsed().as_secs_f64() * 1e3);
    Ok(())
}
