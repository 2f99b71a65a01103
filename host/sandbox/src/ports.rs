//! Streams to ports of a running guest: its own TCP ports, by way of its agent, and its vsock ports.
//!
//! No network device is on the way: the agent connects inside the guest, to a port on its loopback addresses. So a guest that
//! has no network at all can serve.

use std::io;
use std::net::{Ipv4Addr, SocketAddr};
use std::pin::Pin;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Weak};
use std::task::{Context, Poll};

use kiln_protocol::{AGENT_PORT, Call, Dial, Outcome, Reason};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf, copy_bidirectional_with_sizes};
use tokio::net::{TcpListener, TcpStream, UnixStream};
use tokio::sync::{Notify, Semaphore};
use tokio::task::JoinHandle;

use crate::Blame;
use crate::agent::AgentError;
use crate::detached::Kept;
use crate::monitor::EndWatch;
use crate::vm::{AskError, Asking, Machine, Target};

/// The most connections through one exposed port at a time; who comes beyond waits to be accepted. A guest's agent carries 64 in
/// all.
pub const EXPOSED_CONNECTIONS_MAX: usize = 32;
/// What waits in this process of one connection, each way.
const BUFFER_BYTES: usize = 32 << 10;

/// A stream to something in a guest. Each way ends by itself, as TCP's do; dropped, both end.
#[derive(Debug)]
pub struct GuestStream(UnixStream);

impl AsyncRead for GuestStream {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        into: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        Pin::new(&mut self.0).poll_read(context, into)
    }
}

impl AsyncWrite for GuestStream {
    fn poll_write(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.0).poll_write(context, bytes)
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.0).poll_flush(context)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.0).poll_shutdown(context)
    }
}

/// A port of the host's behind which a port of a guest is. Dropped, it is closed; connections there are go on until they end,
/// or their machine does.
#[derive(Debug)]
pub struct ExposedPort {
    address: SocketAddr,
    accepting: JoinHandle<()>,
}

impl ExposedPort {
    /// Where it listens.
    pub fn local_addr(&self) -> SocketAddr {
        self.address
    }

    /// Waits until it listens no more: its machine has ended, or the host is out of descriptors.
    pub async fn closed(&mut self) {
        // It does not panic; and were it to, it would listen no more.
        let _ = (&mut self.accepting).await;
    }
}

impl Drop for ExposedPort {
    fn drop(&mut self) {
        self.accepting.abort();
    }
}

/// Why a port is not exposed.
#[derive(Debug, thiserror::Error)]
#[error("cannot listen on {address}")]
pub struct ExposeError {
    /// Where.
    pub address: SocketAddr,
    /// What the system said.
    #[source]
    pub source: io::Error,
}

impl ExposeError {
    /// Whose fault this is.
    pub fn blame(&self) -> Blame {
        match self.source.kind() {
            io::ErrorKind::AddrInUse | io::ErrorKind::AddrNotAvailable | io::ErrorKind::PermissionDenied => {
                Blame::Caller
            }
            _ => Blame::Host,
        }
    }
}

/// The machine behind an exposed port, which does not live by it.
#[derive(Clone, Debug)]
pub(crate) enum Behind {
    Own(Weak<Machine>),
    Kept(Kept),
}

/// Connects to a TCP port of the guest's.
pub(crate) async fn connect_tcp(machine: Target<'_>, port: u16) -> Result<GuestStream, AskError> {
    carried(machine.ask(dial(port)).await?)
}

/// Connects to a vsock port of the guest's.
pub(crate) async fn connect(machine: Target<'_>, port: u32) -> Result<GuestStream, AskError> {
    if port == AGENT_PORT {
        let message = format!("port {AGENT_PORT} is the agent's own");
        return Err(AgentError::Refused { reason: Reason::Invalid, message }.into());
    }
    Ok(GuestStream(machine.connect(port).await?))
}

/// Listens on the host for connections to a TCP port of the guest's. Without an address of its own it is one of the loopback
/// interface that the system picks.
pub(crate) async fn expose(
    behind: Behind,
    end: Option<EndWatch>,
    address: Option<SocketAddr>,
    port: u16,
) -> Result<ExposedPort, ExposeError> {
    let address = address.unwrap_or_else(|| (Ipv4Addr::LOCALHOST, 0).into());
    let failed = |source| ExposeError { address, source };
    let listener = TcpListener::bind(address).await.map_err(failed)?;
    let address = listener.local_addr().map_err(failed)?;
    let accepting = tokio::spawn(async move {
        let ended = async {
            match end {
                Some(mut end) => drop(end.ended().await),
                None => std::future::pending().await,
            }
        };
        tokio::select! {
            () = accept(&listener, behind, port) => {}
            () = ended => {}
        }
    });
    Ok(ExposedPort { address, accepting })
}

/// Accepts connections until the machine is gone, or none can be accepted and none is there whose end would help.
async fn accept(listener: &TcpListener, behind: Behind, port: u16) {
    let places = Arc::new(Semaphore::new(EXPOSED_CONNECTIONS_MAX));
    let (open, ended) = (Arc::new(AtomicUsize::new(0)), Arc::new(Notify::new()));
    loop {
        // The semaphore is never closed.
        let Ok(place) = Arc::clone(&places).acquire_owned().await else { return };
        let client = match listener.accept().await {
            Ok((client, _)) => client,
            Err(error) if error.kind() == io::ErrorKind::ConnectionAborted => continue,
            // Without a descriptor to spare, the next connection that ends gives some back.
            Err(_) if open.load(Ordering::Relaxed) > 0 => {
                ended.notified().await;
                continue;
            }
            Err(_) => return,
        };
        if matches!(&behind, Behind::Own(machine) if machine.strong_count() == 0) {
            return;
        }
        let (behind, open, ended) = (behind.clone(), Arc::clone(&open), Arc::clone(&ended));
        open.fetch_add(1, Ordering::Relaxed);
        // It goes on without the port, and what becomes of it is its own affair.
        tokio::spawn(async move {
            let _ = carry(client, behind, port).await;
            open.fetch_sub(1, Ordering::Relaxed);
            ended.notify_one();
            drop(place);
        });
    }
}

/// Carries one connection. One that the guest does not take ends at once, with nothing said.
async fn carry(mut client: TcpStream, behind: Behind, port: u16) -> Result<(), AskError> {
    let answered = match &behind {
        Behind::Own(machine) => {
            let Some(machine) = machine.upgrade() else { return Ok(()) };
            // The machine is not held while the guest thinks about it: it may be paused, and its owner may want it gone.
            let asking = Asking::begin(&machine.monitor).await?;
            drop(machine);
            asking.ask(dial(port)).await?
        }
        Behind::Kept(machine) => Target::Kept(machine).ask(dial(port)).await?,
    };
    let mut guest = carried(answered)?;
    let _ = client.set_nodelay(true);
    // A connection that breaks is closed on both sides, as it is when it has ended.
    let _ = copy_bidirectional_with_sizes(&mut client, &mut guest, BUFFER_BYTES, BUFFER_BYTES).await;
    Ok(())
}

fn dial(port: u16) -> Call {
    Call::Dial(Dial { port: port.into() })
}

fn carried((outcome, stream): (Outcome, UnixStream)) -> Result<GuestStream, AskError> {
    match outcome {
        Outcome::Done(_) => Ok(GuestStream(stream)),
        _ => Err(AgentError::Broken("a reply that does not answer what was asked").into()),
    }
}
