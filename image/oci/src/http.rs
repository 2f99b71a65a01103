//! HTTP requests: TLS, proxies, redirects and their rules, and limits on waiting.
//!
//! The rules of redirects are here and nowhere else: `Authorization` goes to the origin it was meant for and to no
//! other; what began in TLS stays in TLS; plain HTTP reaches this machine only, unless the caller asks.

use std::net::{IpAddr, Ipv4Addr};
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::{Duration, Instant};

use bytes::Bytes;
use http::header::{AUTHORIZATION, HeaderMap, HeaderValue, LOCATION};
use http::uri::{Authority, Scheme};
use http::{Method, Request, Response, StatusCode, Uri};
use http_body_util::{BodyExt, Full};
use hyper::body::Incoming;
use hyper_rustls::{HttpsConnector, HttpsConnectorBuilder};
use hyper_util::client::legacy::Client;
use hyper_util::client::legacy::connect::HttpConnector;
use hyper_util::client::legacy::connect::proxy::Tunnel;
use hyper_util::client::proxy::matcher::Matcher;
use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
use kiln_support::causes::with_causes;
use tokio::net::TcpStream;
use tower_service::Service;

use crate::error::plain;

/// How long a connection may take to come about.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(10);
/// How long an answer may take to begin.
const ANSWER_TIMEOUT: Duration = Duration::from_mins(1);
/// How long a body may give nothing at all.
const STALL_TIMEOUT: Duration = Duration::from_secs(30);
/// A body that makes us wait this long in sum must have given [`SLOW_BYTES`] in that time.
const SLOW_WINDOW: Duration = Duration::from_mins(1);
/// See [`SLOW_WINDOW`]: about 1 KiB a second, less than any modem.
const SLOW_BYTES: u64 = 64 << 10;
/// The most redirects followed for one request.
const MAX_REDIRECTS: usize = 5;
/// The most idle connections kept for one host.
const MAX_IDLE_CONNECTIONS: usize = 8;

const USER_AGENT: &str = concat!("kiln/", env!("CARGO_PKG_VERSION"));

/// What makes HTTP requests. Cheap to clone; clones share their connections.
#[derive(Debug, Clone)]
pub(crate) struct Http {
    client: Client<HttpsConnector<Connector>, Full<Bytes>>,
    /// Plain HTTP may be spoken to any host.
    allow_http: bool,
}

/// Why a request has no answer.
#[derive(Debug)]
pub(crate) struct HttpError {
    /// The host that was asked.
    pub(crate) host: String,
    /// What happened.
    pub(crate) why: String,
    /// What kind of failure it is.
    pub(crate) kind: HttpErrorKind,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum HttpErrorKind {
    /// It may pass.
    Transient,
    /// It will not pass by trying again.
    Final,
    /// The server's certificate is not trusted. It will not pass either.
    Certificate,
    /// The server does not speak TLS.
    NotTls,
}

/// An answer, and where it came from after redirects.
#[derive(Debug)]
pub(crate) struct Answer {
    pub(crate) status: StatusCode,
    pub(crate) headers: HeaderMap,
    pub(crate) body: Body,
    /// True when it came from the origin that was asked, not from one it redirected to.
    pub(crate) from_origin: bool,
}

/// The body of an answer.
#[derive(Debug)]
pub(crate) struct Body {
    incoming: Incoming,
    host: String,
    waited: Duration,
    received_while_waiting: u64,
}

impl Http {
    /// Prepares to make requests.
    ///
    /// # Errors
    /// When this machine has no certificates to trust.
    pub(crate) fn new(allow_http: bool) -> Result<Self, String> {
        // SSL_CERT_FILE and SSL_CERT_DIR are honoured, else the places the system keeps its certificates in.
        let found = rustls_native_certs::load_native_certs();
        let mut roots = rustls::RootCertStore::empty();
        let (trusted, _) = roots.add_parsable_certificates(found.certs);
        if trusted == 0 && !allow_http {
            let why = found.errors.first().map(|error| format!(": {error}")).unwrap_or_default();
            return Err(format!("no certificates to trust were found on this machine{why}"));
        }
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let tls = rustls::ClientConfig::builder_with_provider(provider)
            .with_safe_default_protocol_versions()
            .map_err(|error| error.to_string())?
            .with_root_certificates(roots)
            .with_no_client_auth();
        let mut http = HttpConnector::new();
        http.enforce_http(false);
        http.set_nodelay(true);
        http.set_connect_timeout(Some(CONNECT_TIMEOUT));
        let connector = Connector { http, proxies: Arc::new(Matcher::from_env()) };
        let connector = HttpsConnectorBuilder::new()
            .with_tls_config(tls)
            .https_or_http()
            .enable_http1()
            .wrap_connector(connector);
        let client = Client::builder(TokioExecutor::new())
            .pool_timer(TokioTimer::new())
            .pool_max_idle_per_host(MAX_IDLE_CONNECTIONS)
            .build(connector);
        Ok(Self { client, allow_http })
    }

    /// True when plain HTTP may be spoken to the host.
    pub(crate) fn allows_http(&self, authority: &Authority) -> bool {
        self.allow_http || is_loopback(authority.host())
    }

    /// Makes a request and follows redirects by the rules of this module.
    pub(crate) async fn send(
        &self,
        method: Method,
        url: &Uri,
        headers: &HeaderMap,
        authorization: Option<&HeaderValue>,
        body: Bytes,
    ) -> Result<Answer, HttpError> {
        let mut url = url.clone();
        self.check_target(&url).map_err(|why| failed(&url, HttpErrorKind::Final, why))?;
        let mut authorization = authorization;
        let mut from_origin = true;
        for _ in 0..=MAX_REDIRECTS {
            let answer = self.send_once(&method, &url, headers, authorization, &body).await?;
            let Some(location) = redirect(&answer) else {
                let (parts, incoming) = answer.into_parts();
                let body =
                    Body { incoming, host: host_of(&url), waited: Duration::ZERO, received_while_waiting: 0 };
                return Ok(Answer { status: parts.status, headers: parts.headers, body, from_origin });
            };
            let target = location
                .and_then(|location| resolve(&url, location))
                .and_then(|target| self.check_redirect(&url, &target).map(|()| target))
                .map_err(|why| failed(&url, HttpErrorKind::Final, format!("bad redirect: {why}")))?;
            if !body.is_empty() {
                // A body is a credential here: what is posted is posted to whom it is for, or not at all.
                let why = format!("it sends what was posted on to {}", host_of(&target));
                return Err(failed(&url, HttpErrorKind::Final, why));
            }
            if !same_origin(&url, &target) {
                // Once dropped it stays dropped, also when a later redirect leads back.
                authorization = None;
                from_origin = false;
            }
            url = target;
        }
        Err(failed(&url, HttpErrorKind::Final, format!("more than {MAX_REDIRECTS} redirects")))
    }

    async fn send_once(
        &self,
        method: &Method,
        url: &Uri,
        headers: &HeaderMap,
        authorization: Option<&HeaderValue>,
        body: &Bytes,
    ) -> Result<Response<Incoming>, HttpError> {
        let mut request = Request::new(Full::new(body.clone()));
        *request.method_mut() = method.clone();
        *request.uri_mut() = url.clone();
        *request.headers_mut() = headers.clone();
        request.headers_mut().insert(http::header::USER_AGENT, HeaderValue::from_static(USER_AGENT));
        if let Some(value) = authorization {
            request.headers_mut().insert(AUTHORIZATION, value.clone());
        }
        match tokio::time::timeout(ANSWER_TIMEOUT, self.client.request(request)).await {
            Ok(Ok(answer)) => Ok(answer),
            Ok(Err(error)) => Err(failed(url, kind_of(&error), with_causes(&error))),
            Err(_) => {
                let why = format!("no answer within {} s", ANSWER_TIMEOUT.as_secs());
                Err(failed(url, HttpErrorKind::Transient, why))
            }
        }
    }

    fn check_target(&self, url: &Uri) -> Result<(), String> {
        match (url.scheme_str(), url.authority()) {
            (Some("https"), Some(_)) => Ok(()),
            (Some("http"), Some(authority)) if self.allows_http(authority) => Ok(()),
            (Some("http"), Some(_)) => Err(format!("{} would go without TLS", plain(url))),
            _ => Err(format!("{} is not an http or https address", plain(url))),
        }
    }

    fn check_redirect(&self, from: &Uri, to: &Uri) -> Result<(), String> {
        self.check_target(to)?;
        if from.scheme() == Some(&Scheme::HTTPS) && to.scheme() == Some(&Scheme::HTTP) && !self.allow_http {
            return Err(format!("from TLS to {} without it", plain(to)));
        }
        Ok(())
    }
}

impl Body {
    /// The next piece of the body, or `None` at its end.
    pub(crate) async fn next(&mut self) -> Result<Option<Bytes>, HttpError> {
        let error = |host: &str, why: String| HttpError {
            host: host.to_owned(),
            why,
            kind: HttpErrorKind::Transient,
        };
        loop {
            let began = Instant::now();
            let frame = match tokio::time::timeout(STALL_TIMEOUT, self.incoming.frame()).await {
                Err(_) => {
                    return Err(error(
                        &self.host,
                        format!("nothing arrived for {} s", STALL_TIMEOUT.as_secs()),
                    ));
                }
                Ok(None) => return Ok(None),
                Ok(Some(Err(cause))) => return Err(error(&self.host, with_causes(&cause))),
                Ok(Some(Ok(frame))) => frame,
            };
            // Trailers are of no interest.
            let Ok(data) = frame.into_data() else { continue };
            self.waited += began.elapsed();
            self.received_while_waiting += data.len() as u64;
            if self.waited >= SLOW_WINDOW {
                if self.received_while_waiting < SLOW_BYTES {
                    let why = format!("{} bytes in {} s", self.received_while_waiting, self.waited.as_secs());
                    return Err(error(&self.host, format!("too slow: {why}")));
                }
                self.waited = Duration::ZERO;
                self.received_while_waiting = 0;
            }
            return Ok(Some(data));
        }
    }

    /// The whole body, if it has no more than `limit` bytes.
    pub(crate) async fn read(mut self, limit: u64) -> Result<Vec<u8>, HttpError> {
        let mut content = Vec::new();
        while let Some(data) = self.next().await? {
            if (content.len() + data.len()) as u64 > limit {
                return Err(HttpError {
                    host: self.host,
                    why: format!("the answer has more than {limit} bytes"),
                    kind: HttpErrorKind::Final,
                });
            }
            content.extend_from_slice(&data);
        }
        Ok(content)
    }
}

/// The target of a redirect; `None` when the answer is none.
fn redirect<B>(answer: &Response<B>) -> Option<Result<&str, String>> {
    matches!(answer.status().as_u16(), 301 | 302 | 303 | 307 | 308).then(|| {
        let location = answer.headers().get(LOCATION).ok_or("it says no target")?;
        location.to_str().map_err(|_| "its target is not text".to_owned())
    })
}

/// What `location` means to somebody who asked for `base`. RFC 3986 §5.2 "Relative Resolution", without dot segments,
/// which servers resolve themselves.
fn resolve(base: &Uri, location: &str) -> Result<Uri, String> {
    let location = location.split('#').next().unwrap_or_default();
    let scheme = base.scheme_str().unwrap_or_default();
    let authority = base.authority().map(Authority::as_str).unwrap_or_default();
    let has_scheme = location.split(['/', '?']).next().is_some_and(|first| first.contains(':'));
    let absolute = if has_scheme {
        location.to_owned()
    } else if location.starts_with("//") {
        format!("{scheme}:{location}")
    } else if location.starts_with('/') {
        format!("{scheme}://{authority}{location}")
    } else if location.starts_with('?') {
        format!("{scheme}://{authority}{}{location}", base.path())
    } else {
        let folder = base.path().rsplit_once('/').map_or("", |(folder, _)| folder);
        format!("{scheme}://{authority}{folder}/{location}")
    };
    absolute.parse().map_err(|_| format!("{} is not an address", plain(&absolute)))
}

fn same_origin(a: &Uri, b: &Uri) -> bool {
    let origin = |url: &Uri| {
        let default = if url.scheme() == Some(&Scheme::HTTPS) { 443 } else { 80 };
        (url.scheme().cloned(), url.host().map(str::to_ascii_lowercase), url.port_u16().unwrap_or(default))
    };
    origin(a) == origin(b)
}

/// True for this machine by any name: what is sent there meets no network.
pub(crate) fn is_loopback(host: &str) -> bool {
    let host = host.trim_start_matches('[').trim_end_matches(']');
    match host.parse::<IpAddr>() {
        Ok(IpAddr::V4(address)) => address.is_loopback(),
        Ok(IpAddr::V6(address)) => {
            address.is_loopback()
                || address.to_ipv4_mapped().is_some_and(|address: Ipv4Addr| address.is_loopback())
        }
        Err(_) => host.eq_ignore_ascii_case("localhost"),
    }
}

fn host_of(url: &Uri) -> String {
    // Not the whole authority: what stands before an @ is nothing to print.
    let host = url.host().unwrap_or_default();
    url.port_u16().map_or_else(|| host.to_owned(), |port| format!("{host}:{port}"))
}

fn failed(url: &Uri, kind: HttpErrorKind, why: String) -> HttpError {
    HttpError { host: host_of(url), why: plain(why), kind }
}

/// Looks for an error of TLS among the causes. An I/O error is asked for what it wraps: its `source` skips that.
fn kind_of(error: &(dyn std::error::Error + 'static)) -> HttpErrorKind {
    let mut cause = Some(error);
    while let Some(error) = cause {
        match error.downcast_ref::<rustls::Error>() {
            Some(rustls::Error::InvalidCertificate(_)) => return HttpErrorKind::Certificate,
            Some(rustls::Error::InvalidMessage(_)) => return HttpErrorKind::NotTls,
            Some(_) => return HttpErrorKind::Final,
            None => {}
        }
        cause = match error.downcast_ref::<std::io::Error>().and_then(std::io::Error::get_ref) {
            Some(wrapped) => Some(wrapped),
            None => error.source(),
        };
    }
    HttpErrorKind::Transient
}

/// Connects to a host directly, or through the proxy the environment names for it.
#[derive(Debug, Clone)]
struct Connector {
    http: HttpConnector,
    proxies: Arc<Matcher>,
}

impl Service<Uri> for Connector {
    type Response = TokioIo<TcpStream>;
    type Error = Box<dyn std::error::Error + Send + Sync>;
    type Future = std::pin::Pin<Box<dyn Future<Output = Result<Self::Response, Self::Error>> + Send>>;

    fn poll_ready(&mut self, context: &mut Context<'_>) -> Poll<Result<(), Self::Error>> {
        self.http.poll_ready(context).map_err(Into::into)
    }

    fn call(&mut self, url: Uri) -> Self::Future {
        let proxy = if url.host().is_some_and(is_loopback) { None } else { self.proxies.intercept(&url) };
        match proxy {
            None => {
                let connecting = self.http.call(url);
                Box::pin(async move { Ok(connecting.await?) })
            }
            Some(proxy) => {
                let mut tunnel = Tunnel::new(proxy.uri().clone(), self.http.clone());
                if let Some(credentials) = proxy.basic_auth() {
                    tunnel = tunnel.with_auth(credentials.clone());
                }
                Box::pin(async move { Ok(tunnel.call(url).await?) })
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn uri(text: &str) -> Uri {
        text.parse().expect(text)
    }

    #[test]
    fn a_redirect_means_what_the_standard_says() {
        let base = uri("https://r.example:8443/v2/a/blobs/x?y=1");
        for (location, meant) in [
            ("https://cdn.example/z", "https://cdn.example/z"),
            ("https://cdn.example/z?q=a:b#frag", "https://cdn.example/z?q=a:b"),
            ("//cdn.example/z", "https://cdn.example/z"),
            ("/z", "https://r.example:8443/z"),
            ("/z:1", "https://r.example:8443/z:1"),
            ("z?a=http://b", "https://r.example:8443/v2/a/blobs/z?a=http://b"),
            ("?b", "https://r.example:8443/v2/a/blobs/x?b"),
        ] {
            assert_eq!(
                resolve(&base, location).map(|url| url.to_string()),
                Ok(meant.to_owned()),
                "{location}"
            );
        }
        assert!(resolve(&base, "https://exa mple/").is_err());
        assert!(resolve(&base, "https:///x").is_err());
    }

    #[test]
    fn an_origin_is_scheme_host_and_port() {
        let base = uri("https://r.example/a");
        assert!(same_origin(&base, &uri("https://R.example:443/b")));
        for other in
            ["http://r.example/a", "https://r.example:444/a", "https://x.r.example/a", "https://example/a"]
        {
            assert!(!same_origin(&base, &uri(other)), "{other}");
        }
    }

    #[test]
    fn loopback_is_this_machine_and_nothing_that_looks_like_it() {
        for host in ["localhost", "LocalHost", "127.0.0.1", "127.9.9.9", "[::1]", "::1", "[::ffff:127.0.0.1]"]
        {
            assert!(is_loopback(host), "{host}");
        }
        for host in
            ["localhost.example", "127.0.0.1.example", "128.0.0.1", "10.0.0.1", "[::2]", "0.0.0.0", ""]
        {
            assert!(!is_loopback(host), "{host}");
        }
    }

    #[test]
    fn plain_http_is_for_loopback_or_when_asked() {
        let http = |allow| Http { client: Http::new(true).expect("a client").client, allow_http: allow };
        let (strict, loose) = (http(false), http(true));
        let remote = uri("http://r.example/");
        assert!(strict.check_target(&remote).is_err());
        assert!(loose.check_target(&remote).is_ok());
        assert!(strict.check_target(&uri("http://127.0.0.1:5000/")).is_ok());
        assert!(strict.check_target(&uri("ftp://r.example/")).is_err());
        let tls = uri("https://r.example/");
        assert!(
            strict.check_redirect(&tls, &uri("http://localhost/")).is_err(),
            "nobody points us at ourselves"
        );
        assert!(strict.check_redirect(&tls, &uri("https://cdn.example/")).is_ok());
        assert!(strict.check_redirect(&uri("http://localhost/"), &uri("http://localhost:1/")).is_ok());
    }
}
