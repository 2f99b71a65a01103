//! Snapshots by their names: `by_name IMAGE`.
//!
//! One program bakes, another starts from what it has baked, and asks no registry. Commands run as the first one said: its environment, its
//! user, its directory. A machine that was saved is started from in the same way, with all that was done in it.

use std::error::Error;

use kiln::store::Store;
use kiln::{Image, Vm};

#[tokio::main]
async fn main() -> Result<(), Box<dyn Error>> {
    let reference = std::env::args().nth(1).unwrap_or_else(|| "busybox".to_owned());
    let baked = Image::builder(reference).memory_mib(256).name("toolbox");
    baked.env("COLOR=blue").user("1000").working_directory("/srv").build().await?;

    let store = Store::open(Store::default_root()?)?;
    let vm = Image::from_snapshot(&store, "toolbox").await?.start().await?;
    println!("baked: {}", tell(&vm).await?);
    vm.exec(["sh", "-c", "echo hello > note"]).user("root").output().await?;
    vm.snapshot(&store, Some("with-note".to_owned())).await?;

    let vm = Image::from_snapshot(&store, "with-note").await?.start().await?;
    println!("saved: {}", tell(&vm).await?);
    Ok(())
}

/// How commands run in a machine, and what is in its note.
async fn tell(vm: &Vm) -> Result<String, Box<dyn Error>> {
    let script = "echo $COLOR, user $(id -u), in $PWD, $(cat note || echo no note)";
    let output = vm.exec(["sh", "-c", script]).output().await?;
    Ok(String::from_utf8(output.stdout)?.trim().to_owned())
}
