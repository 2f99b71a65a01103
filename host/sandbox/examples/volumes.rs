//! A root that nobody can change, with one place to write to: `volumes IMAGE`.

use std::error::Error;

use kiln::Image;

#[tokio::main]
async fn main() -> Result<(), Box<dyn Error>> {
    let reference = std::env::args().nth(1).unwrap_or_else(|| "busybox".to_owned());
    let image = Image::builder(reference).memory_mib(256).read_only(true).volume("/data").build().await?;
    let vm = image.start().await?;
    for command in ["echo kept > /data/file && cat /data/file", "echo lost > /etc/file"] {
        let output = vm.exec(["sh", "-c", command]).output().await?;
        print!("{command}: {}", String::from_utf8_lossy(&output.stdout));
        println!("{}", String::from_utf8_lossy(&output.stderr).trim());
    }
    vm.stop().await;
    Ok(())
}
