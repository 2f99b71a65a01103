//! Ports of a guest that has no network, and what else is asked of a guest as a whole.

use kiln::{Disk, GuestBundle, MonitorProgram, Reason, Scratch, Vm};
use kiln_tests::library::{self, block_on, kept, sh, start, told};
use kiln_tests::{busybox, from_environment, program};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;

/// A server that sends back what it hears, each connection for itself, on port 7.
const ECHO: &str =
    "nc -ll -p 7 -e cat & until grep -q ':0007 ' /proc/net/tcp /proc/net/tcp6; do usleep 1000; done";
const USR1: u32 = 10;

/// What a stream sends back of this, once its end has been said.
async fn echoed(
    mut stream: impl tokio::io::AsyncRead + tokio::io::AsyncWrite + Unpin,
    sent: &[u8],
) -> Vec<u8> {
    let mut heard = Vec::new();
    let (mut reading, mut writing) = tokio::io::split(&mut stream);
    let writing = async {
        writing.write_all(sent).await.expect("a server that reads");
        writing.shutdown().await.expect("an end");
    };
    let (read, ()) = tokio::join!(reading.read_to_end(&mut heard), writing);
    read.expect("a server that ends");
    heard
}

#[test]
fn a_guest_without_a_network_serves() {
    block_on(async {
        let vm = start().await;
        sh(&vm, &format!("({ECHO}) >/dev/null 2>&1 </dev/null")).await;
        let sent: Vec<u8> = (0..300_000_u32).map(|at| (at % 251) as u8).collect();
        let stream = vm.connect_tcp(7).await.expect("somebody listens");
        assert!(echoed(stream, &sent).await == sent);
        let refused = vm.connect_tcp(8).await.expect_err("nobody listens");
        assert_eq!(refused.refusal(), Some(Reason::NotListening));

        let exposed = vm.expose_tcp(None, 7).await.expect("a port of the host's");
        assert!(exposed.local_addr().ip().is_loopback());
        let (first, second) = tokio::join!(
            async {
                echoed(TcpStream::connect(exposed.local_addr()).await.expect("it listens"), b"one").await
            },
            async {
                echoed(TcpStream::connect(exposed.local_addr()).await.expect("it listens"), b"two").await
            },
        );
        assert_eq!((first.as_slice(), second.as_slice()), (&b"one"[..], &b"two"[..]));
        // One that nobody listens for is closed, and alone.
        let nobody = vm.expose_tcp(None, 8).await.expect("a port of the host's");
        let mut closed = TcpStream::connect(nobody.local_addr()).await.expect("it listens");
        assert!(matches!(closed.read(&mut [0]).await, Ok(0) | Err(_)));
        // A connection goes on without its port, and ends with its machine.
        let mut open = TcpStream::connect(exposed.local_addr()).await.expect("it listens");
        open.write_all(b"on").await.expect("a server that reads");
        let mut heard = [0; 2];
        open.read_exact(&mut heard).await.expect("a server that answers");
        let address = exposed.local_addr();
        drop(exposed);
        open.write_all(b"ly").await.expect("a server that reads");
        open.read_exact(&mut heard).await.expect("a server that answers");
        assert_eq!(&heard, b"ly");
        assert!(TcpStream::connect(address).await.is_err());
        let mut again = vm.expose_tcp(None, 7).await.expect("a port of the host's");
        vm.stop().await;
        assert!(matches!(open.read(&mut heard).await, Ok(0) | Err(_)));
        again.closed().await;
    });
}

#[test]
fn a_guest_as_a_whole_is_signalled_and_measured() {
    block_on(async {
        let vm = start().await;
        let before = vm.stats().await.expect("what it uses");
        let script = "trap 'exit 3' USR1; echo ready; while :; do usleep 10000; done";
        let mut command = vm.exec(["sh", "-c", script]).spawn().await.expect("a shell");
        let mut ready = [0; 6];
        command.stdout.as_mut().expect("its stdout").read_exact(&mut ready).await.expect("it is");
        let stats = vm.stats().await.expect("what it uses");
        assert!(stats.guest.processes > before.guest.processes, "{before:?} {stats:?}");
        assert!(stats.guest.memory_used_bytes < stats.guest.memory_bytes, "{stats:?}");
        assert!(stats.guest.cpu_time > before.guest.cpu_time, "{before:?} {stats:?}");
        assert!(
            stats.host.private_bytes > 0 && stats.host.private_bytes <= stats.host.resident_bytes,
            "{stats:?}"
        );
        assert!(stats.host.cpu_time >= before.host.cpu_time, "{before:?} {stats:?}");
        vm.workload_signal(USR1).await.expect("sent");
        assert_eq!(command.wait().await.expect("its end").code(), Some(3));
        // A stream of one's own to a port on which nothing listens ends; the agent's is not to be had.
        let mut nothing = vm.connect(4000).await.expect("a stream");
        assert_eq!(nothing.read(&mut [0]).await.unwrap_or(0), 0);
        assert!(vm.connect(1024).await.is_err());
        vm.stop().await;
    });
}

#[test]
fn the_last_of_the_console_is_told_of_a_machine_that_runs_and_of_one_that_is_paused() {
    block_on(async {
        let image = library::image(&busybox()).build().await.expect("an image");
        let pulled = kiln::image::open(&library::store(), image.name(), image.digest()).expect("the image");
        let guest = GuestBundle::from_dir(&from_environment("KILN_TEST_GUEST")).expect("the guest");
        // A guest's users cannot write there, and its kernel has little to say once it is up.
        let booting = Vm::builder(guest, Disk::from_image(&pulled).expect("its disk"))
            .monitor_program(MonitorProgram::at(program()))
            .memory_mib(128)
            .scratch(Scratch::Memory)
            .kernel_cmdline("loglevel=7");
        let vm = booting.start().await.expect("a machine");
        let running = vm.console().await.expect("a console");
        assert!(
            String::from_utf8_lossy(&running).contains("Run /init"),
            "{}",
            String::from_utf8_lossy(&running)
        );
        vm.pause().await.expect("paused");
        assert_eq!(vm.console().await.expect("a console"), running);
        vm.stop().await;
    });
}

#[test]
fn a_kept_machine_has_ports_too() {
    let machine = kiln_tests::Vm::start("ports-kept");
    block_on(async {
        let vm = kept(machine.name);
        let server = format!("({ECHO}) >/dev/null 2>&1 </dev/null");
        told(vm.exec(["sh", "-c", &server]).output().await.expect("a shell"));
        assert_eq!(echoed(vm.connect_tcp(7).await.expect("somebody listens"), b"kept").await, b"kept");
        let exposed = vm.expose_tcp(None, 7).await.expect("a port of the host's");
        let stream = TcpStream::connect(exposed.local_addr()).await.expect("it listens");
        assert_eq!(echoed(stream, b"kept").await, b"kept");
        let stats = vm.stats().await.expect("what it uses");
        assert!(stats.host.private_bytes > 0 && stats.guest.processes > 1, "{stats:?}");
        assert!(vm.connect(1024).await.is_err());
        let mut nothing = vm.connect(4000).await.expect("a stream");
        assert_eq!(nothing.read(&mut [0]).await.unwrap_or(0), 0);
        vm.workload_signal(9).await.expect("sent");
        // It is on its way.
        let refused = loop {
            if let Err(refused) = vm.connect_tcp(7).await {
                break refused;
            }
        };
        assert_eq!(refused.refusal(), Some(Reason::NotListening));
    });
}
