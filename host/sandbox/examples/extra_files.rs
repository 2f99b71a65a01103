//! Files of the host's in every machine: `extra_files IMAGE FILE`.
//!
//! A file's content is part of what the snapshot is known by: edit it, and the next build bakes anew. What a machine makes is copied out.

use std::error::Error;

use kiln::{CopyOptions, Image};

#[tokio::main]
async fn main() -> Result<(), Box<dyn Error>> {
    let mut words = std::env::args().skip(1);
    let reference = words.next().unwrap_or_else(|| "busybox".to_owned());
    let file = words.next().unwrap_or_else(|| "/etc/hosts".to_owned());
    let image = Image::builder(reference).memory_mib(256).extra_file(&file, "/input/file").build().await?;
    let vm = image.start().await?;
    vm.exec([
        "sh",
        "-c",
        "mkdir /output; wc -l < /input/file > /output/lines; sort /input/file > /output/sorted",
    ])
    .output()
    .await?;
    let place = std::env::temp_dir().join(format!("kiln-example-{}", std::process::id()));
    let copied = vm.copy_out("/output", &place, CopyOptions::default()).await?;
    println!("{} files: {} lines", copied.files, std::fs::read_to_string(place.join("lines"))?.trim());
    std::fs::remove_dir_all(&place)?;
    vm.stop().await;
    Ok(())
}
