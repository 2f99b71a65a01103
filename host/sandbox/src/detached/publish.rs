//! Ports of a machine that its keeper listens for.

use std::net::SocketAddr;

use serde::{Deserialize, Serialize};

use super::DetachedError;
use crate::{ExposedPort, Vm};

/// The most ports that are published of one machine.
pub(super) const PUBLISHED_MAX: usize = 64;

/// A port of a machine's guest that is reached at an address of the host's, while the machine runs.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Published {
    /// Where it is to be reached; port 0 for one that the host chooses at each start.
    pub wanted: SocketAddr,
    /// The guest's TCP port.
    pub guest: u16,
    /// Where it is reached, while the machine runs.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub bound: Option<SocketAddr>,
}

impl Published {
    /// A port that is yet to be published.
    pub fn new(wanted: SocketAddr, guest: u16) -> Self {
        Self { wanted, guest, bound: None }
    }

    /// Listens for it.
    ///
    /// # Errors
    /// [`DetachedError::Publish`] when the address cannot be had.
    pub(super) async fn listen(&mut self, vm: &Vm) -> Result<ExposedPort, DetachedError> {
        let port = vm.expose_tcp(self.wanted, self.guest).await?;
        self.bound = Some(port.local_addr());
        Ok(port)
    }

    /// Whether it is the one that somebody means by an address, where it was wanted or is, and a guest's port.
    pub(super) fn is(&self, address: SocketAddr, guest: u16) -> bool {
        self.guest == guest && (self.wanted == address || self.bound == Some(address))
    }
}
