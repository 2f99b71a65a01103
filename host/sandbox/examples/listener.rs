//! A server that listens already when its machine is made: `listener IMAGE`.
//!
//! The snapshot is taken when the port is open, so every machine answers at once. The guest needs no network: the agent carries
//! connections from the host's port.

use std::error::Error;

use kiln::Image;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;

const PORT: u16 = 8080;

#[tokio::main]
async fn main() -> Result<(), Box<dyn Error>> {
    let reference = std::env::args().nth(1).unwrap_or_else(|| "busybox".to_owned());
    let image = Image::builder(reference)
        .memory_mib(256)
        .cmd(["sh", "-c", "while true; do echo hello from $HOSTNAME | nc -l -p 8080; done"])
        .guest_port(PORT)
        .build()
        .await?;
    let vm = image.start().await?;
    let exposed = vm.expose_tcp(None, PORT).await?;
    println!("{} leads to port {PORT} of the guest", exposed.local_addr());
    let mut connection = TcpStream::connect(exposed.local_addr()).await?;
    connection.shutdown().await?;
    let mut answer = String::new();
    connection.read_to_string(&mut answer).await?;
    print!("{answer}");
    vm.stop().await;
    Ok(())
}
