//! What takes long is done once: `warm_up IMAGE`.
//!
//! Commands and code warm the machine that is baked; what they leave in memory and on disk is there in every machine from its start. The tag says
//! what the code does: another tag, another snapshot.

use std::error::Error;

use kiln::Image;

#[tokio::main]
async fn main() -> Result<(), Box<dyn Error>> {
    let reference = std::env::args().nth(1).unwrap_or_else(|| "busybox".to_owned());
    let image = Image::builder(reference)
        .memory_mib(256)
        .warm_up(["sh", "-c", "seq 1 1000 > /var/table"])
        .warm_up_with("checksum-1", |vm| {
            Box::pin(async move {
                let sum = vm.exec(["sha256sum", "/var/table"]).output().await?;
                vm.write_file("/var/table.sum", 0o644, sum.stdout.as_slice()).await?;
                Ok(())
            })
        })
        .build()
        .await?;
    let vm = image.start().await?;
    let checked = vm.exec(["sha256sum", "-c", "/var/table.sum"]).output().await?;
    print!("{}", String::from_utf8_lossy(&checked.stdout));
    vm.stop().await;
    Ok(())
}
