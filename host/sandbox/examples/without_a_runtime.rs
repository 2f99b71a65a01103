//! The same from a program that is not asynchronous: `without_a_runtime IMAGE`.

use std::error::Error;
use std::io::Write as _;

use kiln::Image;
use kiln::blocking::{stream, wait};

fn main() -> Result<(), Box<dyn Error>> {
    let reference = std::env::args().nth(1).unwrap_or_else(|| "busybox".to_owned());
    let image = wait(Image::builder(reference).memory_mib(256).build())?;
    let vm = wait(image.start())?;
    let mut child = wait(vm.exec(["tr", "a-z", "A-Z"]).stdin().spawn())?;
    if let Some(stdin) = child.stdin.take() {
        stream(stdin).write_all(b"hello from a thread\n")?;
    }
    if let Some(stdout) = child.stdout.take() {
        print!("{}", std::io::read_to_string(stream(stdout))?);
    }
    let status = wait(child.wait())?;
    println!("ended with {}, {} KiB at its peak", status.shell_code(), status.peak_rss_bytes() >> 10);
    wait(vm.stop());
    Ok(())
}
