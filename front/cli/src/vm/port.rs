//! `kiln port` and `kiln expose`.

use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::str::FromStr;

use kiln::detached::{Machines, Published};
use serde_json::{Value, json};

use super::args::{Expose, Port};
use crate::failure::Failure;
use crate::print;

/// A port of a guest and where it is to be reached: `[[ADDRESS:]HOST:]GUEST`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Publish {
    pub(crate) address: SocketAddr,
    pub(crate) guest: u16,
}

impl FromStr for Publish {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        const FORM: &str = "expected [ADDRESS:]HOST:GUEST, such as 8080:80 or 0.0.0.0:8080:80";
        let text = text.strip_suffix("/tcp").unwrap_or(text);
        let port = |text: &str| text.parse::<u16>().map_err(|_| format!("{FORM}; '{text}' is no port"));
        let (host, guest) = text.rsplit_once(':').unwrap_or(("", text));
        let guest = match port(guest)? {
            0 => return Err("the guest's port is not 0".to_owned()),
            guest => guest,
        };
        let (address, host) = match host.rsplit_once(':') {
            Some((address, host)) => {
                let bare = address.strip_prefix('[').and_then(|address| address.strip_suffix(']'));
                let address: IpAddr = bare
                    .unwrap_or(address)
                    .parse()
                    .map_err(|_| format!("{FORM}; '{address}' is no address"))?;
                (address, host)
            }
            None => (Ipv4Addr::LOCALHOST.into(), host),
        };
        let host = if host.is_empty() { 0 } else { port(host)? };
        Ok(Self { address: SocketAddr::new(address, host), guest })
    }
}

impl From<Publish> for Published {
    fn from(publish: Publish) -> Self {
        Self::new(publish.address, publish.guest)
    }
}

/// `kiln port`.
///
/// # Errors
/// When there is no such VM.
pub(crate) fn list(machines: &Machines, args: &Port) -> Result<(), Failure> {
    let record = machines.find(&args.vm)?;
    if args.json {
        return print(&format!("{:#}\n", Value::Array(record.ports.iter().map(describe).collect())));
    }
    let lines = record.ports.iter().map(|port| match port.bound {
        Some(bound) => format!("{}/tcp -> {bound}\n", port.guest),
        None => format!("{}/tcp -> {} when it runs\n", port.guest, port.wanted),
    });
    print(&lines.collect::<String>())
}

/// A published port as JSON.
pub(crate) fn describe(port: &Published) -> Value {
    json!({
        "guest": port.guest,
        "wanted": port.wanted.to_string(),
        "bound": port.bound.map(|bound| bound.to_string()),
    })
}

/// `kiln expose`.
///
/// # Errors
/// When the VM does not run, or the address cannot be had.
pub(crate) async fn expose(machines: &Machines, args: &Expose) -> Result<(), Failure> {
    let kept = machines.reach(&args.vm)?;
    for publish in &args.ports {
        if args.remove {
            kept.unexpose(publish.address, publish.guest).await?;
        } else {
            let bound = kept.expose(publish.address, publish.guest).await?;
            print(&format!("{bound}\n"))?;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_port_is_published_on_this_host_alone_unless_told_otherwise() {
        for (text, address, guest) in [
            ("8080:80", "127.0.0.1:8080", 80),
            ("80", "127.0.0.1:0", 80),
            ("80/tcp", "127.0.0.1:0", 80),
            (":80", "127.0.0.1:0", 80),
            ("0.0.0.0:8080:80", "0.0.0.0:8080", 80),
            ("[::1]:8080:80", "[::1]:8080", 80),
            ("::1:8080:80", "[::1]:8080", 80),
        ] {
            let address = address.parse().expect("an address");
            assert_eq!(text.parse(), Ok(Publish { address, guest }), "{text}");
        }
        for wrong in ["", "x", "8080:", "8080:0", "65536:80", "example.org:1:2", "80/udp", "1:2:3"] {
            assert!(wrong.parse::<Publish>().is_err(), "{wrong}");
        }
    }
}
