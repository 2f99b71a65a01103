//! A command in a machine of its own: `exec IMAGE [COMMAND...]`.
//!
//! The first run of an image bakes it; from then on a machine is there in milliseconds.

use std::error::Error;

use kiln::Image;

#[tokio::main]
async fn main() -> Result<(), Box<dyn Error>> {
    let mut words = std::env::args().skip(1);
    let reference = words.next().unwrap_or_else(|| "debian:12".to_owned());
    let command: Vec<String> = words.collect();
    let command = if command.is_empty() { vec!["uname".to_owned(), "-a".to_owned()] } else { command };

    let image = Image::builder(reference).memory_mib(256).build().await?;
    let vm = image.start().await?;
    let output = vm.exec(command).output().await?;
    print!("{}", String::from_utf8_lossy(&output.stdout));
    eprint!("{}", String::from_utf8_lossy(&output.stderr));
    vm.stop().await;
    std::process::exit(output.status.shell_code().into());
}
