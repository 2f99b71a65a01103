//! The registry client: manifests and blobs of one repository.
//!
//! OCI Distribution Specification 1.1, "Pull". What can pass is tried again a bounded number of times; a blob whose
//! transfer breaks goes on where it broke.

use std::sync::Arc;
use std::time::{Duration, SystemTime};

use bytes::Bytes;
use http::header::{
    ACCEPT, CONTENT_RANGE, CONTENT_TYPE, HeaderMap, HeaderName, HeaderValue, RANGE, RETRY_AFTER,
};
use http::{Method, StatusCode, Uri};
use kiln_support::digest::Digest;
use serde::Deserialize;
use tokio::sync::{Mutex, mpsc};

use crate::auth::{Challenge, TokenError, TokenService, challenges, token};
use crate::credentials::{self, Credential};
use crate::error::plain;
use crate::http::{Answer, Http, HttpError, HttpErrorKind, is_loopback};
use crate::manifest::{ACCEPTED, Descriptor, MAX_MANIFEST_BYTES};
use crate::{Event, Progress, PullError, Reference};

/// The most times one request is made when it fails in ways that may pass.
const MAX_ATTEMPTS: u32 = 5;
/// The wait before the second attempt, less than half of it random; doubled for each that follows.
const FIRST_BACKOFF: Duration = Duration::from_millis(250);
/// The longest wait a registry may ask for.
const MAX_RETRY_AFTER: Duration = Duration::from_mins(2);
/// A transfer that broke may be tried again this many more times for each so many bytes.
const BYTES_PER_RESUME: u64 = 64 << 20;
/// The most bytes of an error's body that are read.
const MAX_ERROR_BYTES: u64 = 64 << 10;

const CONTENT_DIGEST: HeaderName = HeaderName::from_static("docker-content-digest");

/// A repository in a registry.
pub(crate) struct Registry {
    http: Http,
    /// Where the registry answers: scheme and authority.
    origin: String,
    reference: Reference,
    authorization: Mutex<Authorization>,
    progress: Arc<dyn Progress>,
}

/// What is shown to the registry.
#[derive(Default)]
struct Authorization {
    header: Option<HeaderValue>,
    with_credentials: bool,
}

/// A manifest or index as the registry gave it, checked against its digest if that was known.
pub(crate) struct Fetched {
    pub(crate) bytes: Vec<u8>,
    pub(crate) digest: Digest,
    pub(crate) media_type: Option<String>,
}

/// A piece of a blob on its way to whoever reads it.
pub(crate) enum Piece {
    /// The next bytes.
    Data(Bytes),
    /// All bytes were sent.
    End,
    /// No more will come.
    Failed(PullError),
}

impl Registry {
    /// Finds out how the registry wants to be spoken to.
    pub(crate) async fn connect(
        reference: &Reference,
        allow_http: bool,
        progress: Arc<dyn Progress>,
    ) -> Result<Self, PullError> {
        let host = match reference.registry() {
            "docker.io" => "registry-1.docker.io",
            other => other,
        };
        let tls_only = !allow_http
            && !is_loopback(host.rsplit_once(':').map_or(host, |(name, port)| {
                if port.bytes().all(|byte| byte.is_ascii_digit()) { name } else { host }
            }));
        let http = Http::new(allow_http).map_err(|why| PullError::Unreachable {
            host: host.to_owned(),
            why,
            hint: Some("install ca-certificates, or name a file of certificates in SSL_CERT_FILE"),
        })?;
        let mut registry = Self {
            http,
            origin: format!("https://{host}"),
            reference: reference.clone(),
            authorization: Mutex::new(Authorization::default()),
            progress,
        };
        if !tls_only && !registry.speaks_tls().await? {
            registry.origin = format!("http://{host}");
        }
        Ok(registry)
    }

    /// True when the registry answers over TLS; asked only where plain HTTP is allowed.
    async fn speaks_tls(&self) -> Result<bool, PullError> {
        let url = self.url("/v2/")?;
        match self.http.send(Method::GET, &url, &HeaderMap::new(), None, Bytes::new()).await {
            Ok(_) => Ok(true),
            Err(error) if error.kind == HttpErrorKind::NotTls => Ok(false),
            // Nothing has been said about TLS; the real request will meet the same trouble and report it.
            Err(error) if error.kind == HttpErrorKind::Transient => Ok(false),
            Err(error) => Err(unreachable(error)),
        }
    }

    /// What the registry says the digest of the manifest is, without fetching it; `None` when it does not say.
    pub(crate) async fn manifest_digest(&self) -> Result<Option<Digest>, PullError> {
        let path = self.manifest_path(None);
        match self.request(Method::HEAD, &path, &accept_manifests(), &self.reference.to_string()).await {
            Ok(answer) => Ok(content_digest(&answer.headers)),
            // Not every registry answers HEAD; all of them answer GET, which comes next.
            Err(PullError::Registry { .. }) => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// Fetches the manifest or index the reference means, or that with `digest`.
    pub(crate) async fn manifest(&self, digest: Option<&Digest>) -> Result<Fetched, PullError> {
        let pinned = digest.or(self.reference.digest());
        let what = match digest {
            Some(digest) => format!("manifest {digest}"),
            None => self.reference.to_string(),
        };
        let path = self.manifest_path(digest);
        let (bytes, headers) = self.small(&path, &accept_manifests(), MAX_MANIFEST_BYTES, &what).await?;
        let actual = Digest::of(&bytes);
        let claimed = pinned.copied().or_else(|| content_digest(&headers));
        if claimed.is_some_and(|claimed| claimed != actual) {
            return Err(PullError::Corrupt { what, why: format!("its digest is {actual}") });
        }
        let media_type =
            headers.get(CONTENT_TYPE).and_then(|value| value.to_str().ok()).map(ToOwned::to_owned);
        Ok(Fetched { bytes, digest: actual, media_type })
    }

    /// Fetches a small blob whole.
    pub(crate) async fn blob(&self, blob: &Descriptor, limit: u64) -> Result<Vec<u8>, PullError> {
        let what = format!("blob {}", blob.digest);
        if blob.size > limit {
            return Err(PullError::Unsupported { what, why: format!("it has more than {limit} bytes") });
        }
        let (bytes, _) = self.small(&self.blob_path(&blob.digest), &HeaderMap::new(), limit, &what).await?;
        if Digest::of(&bytes) != blob.digest {
            return Err(PullError::Corrupt { what, why: format!("its digest is {}", Digest::of(&bytes)) });
        }
        Ok(bytes)
    }

    /// Sends a blob's bytes to `pieces`, going on where a transfer broke. Ends early when nobody reads any more.
    ///
    /// The bytes are not checked here: whoever reads them hashes them, and that goes on across breaks too.
    pub(crate) async fn stream(&self, blob: &Descriptor, pieces: &mpsc::Sender<Piece>) {
        let last = match self.stream_all(blob, pieces).await {
            Ok(true) => Piece::End,
            Ok(false) => return,
            Err(error) => Piece::Failed(error),
        };
        // Nobody reads any more: nobody is interested in how it ended either.
        let _ = pieces.send(last).await;
    }

    /// False when nobody reads any more.
    async fn stream_all(&self, blob: &Descriptor, pieces: &mpsc::Sender<Piece>) -> Result<bool, PullError> {
        let what = format!("blob {}", blob.digest);
        let path = self.blob_path(&blob.digest);
        let mut attempts = Attempts::new(self, &what, blob.size / BYTES_PER_RESUME);
        let mut sent = 0;
        loop {
            let mut answer = self.open_blob(blob, &path, sent, &what).await?;
            let Some(start) = start_of(&answer, sent) else {
                let why = "it sends another part than was asked for".to_owned();
                return Err(PullError::Registry { host: self.host(), what, why });
            };
            let mut skip = sent - start;
            let broke = loop {
                match answer.body.next().await {
                    Ok(Some(data)) => {
                        let fresh = data.slice(data.len().min(usize::try_from(skip).unwrap_or(usize::MAX))..);
                        skip -= (data.len() - fresh.len()) as u64;
                        if fresh.is_empty() {
                            continue;
                        }
                        sent += fresh.len() as u64;
                        if sent > blob.size {
                            let why = format!("it has more than the {} bytes its manifest says", blob.size);
                            return Err(PullError::Corrupt { what, why });
                        }
                        if pieces.send(Piece::Data(fresh)).await.is_err() {
                            return Ok(false);
                        }
                    }
                    Ok(None) if sent >= blob.size => return Ok(true),
                    Ok(None) => {
                        break HttpError {
                            host: self.host(),
                            why: format!("it ended after {sent} of {} bytes", blob.size),
                            kind: HttpErrorKind::Transient,
                        };
                    }
                    Err(error) => break error,
                }
            };
            let why = broke.why.clone();
            attempts
                .again(&why, None, || PullError::Corrupt {
                    what: what.clone(),
                    why: format!("it is truncated: {why}"),
                })
                .await?;
        }
    }

    /// Asks for a blob from `start` on, from the registry, or from the addresses in its manifest if it has none.
    async fn open_blob(
        &self,
        blob: &Descriptor,
        path: &str,
        start: u64,
        what: &str,
    ) -> Result<Answer, PullError> {
        let mut headers = HeaderMap::new();
        if start > 0
            && let Ok(range) = HeaderValue::try_from(format!("bytes={start}-"))
        {
            headers.insert(RANGE, range);
        }
        let missing = match self.request(Method::GET, path, &headers, what).await {
            Err(error @ PullError::NotFound { .. }) if !blob.urls.is_empty() => error,
            answer => return answer,
        };
        for url in &blob.urls {
            let Ok(url) = url.parse::<Uri>() else { continue };
            let answer = self.http.send(Method::GET, &url, &headers, None, Bytes::new()).await;
            if let Ok(answer) = answer
                && answer.status.is_success()
            {
                return Ok(answer);
            }
        }
        Err(missing)
    }

    /// Fetches something small whole.
    async fn small(
        &self,
        path: &str,
        headers: &HeaderMap,
        limit: u64,
        what: &str,
    ) -> Result<(Vec<u8>, HeaderMap), PullError> {
        let mut attempts = Attempts::new(self, what, 0);
        loop {
            let answer = self.request(Method::GET, path, headers, what).await?;
            match answer.body.read(limit).await {
                Ok(bytes) => return Ok((bytes, answer.headers)),
                Err(error) if error.kind == HttpErrorKind::Transient => {
                    let why = error.why.clone();
                    attempts.again(&why, None, || self.failed(what, why.clone())).await?;
                }
                Err(error) => return Err(self.failed(what, error.why)),
            }
        }
    }

    /// Makes a request, shows what the registry wants to be shown, and tries again what may pass.
    async fn request(
        &self,
        method: Method,
        path: &str,
        headers: &HeaderMap,
        what: &str,
    ) -> Result<Answer, PullError> {
        let url = self.url(path)?;
        let mut attempts = Attempts::new(self, what, 0);
        let mut challenged = false;
        loop {
            let shown = self.authorization.lock().await.header.clone();
            let answer =
                match self.http.send(method.clone(), &url, headers, shown.as_ref(), Bytes::new()).await {
                    Ok(answer) => answer,
                    Err(error) if error.kind == HttpErrorKind::Transient => {
                        let why = error.why.clone();
                        attempts.again(&why, None, || unreachable(error)).await?;
                        continue;
                    }
                    Err(error) => return Err(unreachable(error)),
                };
            let status = answer.status;
            if status.is_success() {
                return Ok(answer);
            }
            if status == StatusCode::UNAUTHORIZED && answer.from_origin && !challenged {
                challenged = true;
                let wanted = challenges(&answer.headers);
                if self.authorize(&wanted, shown.as_ref(), what).await? {
                    continue;
                }
            }
            let wait = retry_after(&answer.headers, SystemTime::now());
            let why = said(answer).await;
            match status.as_u16() {
                401 | 403 => {
                    let with_credentials = self.authorization.lock().await.with_credentials;
                    return Err(PullError::Denied { what: what.to_owned(), why, with_credentials });
                }
                404 | 410 => return Err(PullError::NotFound { what: what.to_owned(), why }),
                408 | 429 | 500 | 502 | 503 | 504 => {
                    attempts.again(&why, wait, || self.failed(what, why.clone())).await?;
                }
                _ => return Err(self.failed(what, why)),
            }
        }
    }

    /// Gets what the registry wants to be shown. False when there is nothing that was not shown already.
    async fn authorize(
        &self,
        wanted: &[Challenge],
        shown: Option<&HeaderValue>,
        what: &str,
    ) -> Result<bool, PullError> {
        // Held while asking: of many requests that are challenged at once, one asks and the others use its answer.
        let mut authorization = self.authorization.lock().await;
        if authorization.header.as_ref() != shown {
            return Ok(true);
        }
        let credential = credentials::find(self.reference.registry()).await?;
        let service = wanted.iter().find_map(|challenge| match challenge {
            Challenge::Bearer(service) => Some(service),
            Challenge::Basic => None,
        });
        let header = match (&credential, service) {
            (Some(Credential::RegistryToken(token)), _) => Credential::bearer(token),
            (_, Some(service)) => Some(self.token(service, credential.as_ref(), what).await?),
            (Some(Credential::Password { user, password }), None) if wanted.contains(&Challenge::Basic) => {
                Credential::basic(user, password)
            }
            _ => None,
        };
        let again = header.is_some() && header.as_ref() != shown;
        *authorization = Authorization { header, with_credentials: credential.is_some() };
        Ok(again)
    }

    async fn token(
        &self,
        service: &TokenService,
        credential: Option<&Credential>,
        what: &str,
    ) -> Result<HeaderValue, PullError> {
        let scope = format!("repository:{}:pull", self.reference.repository());
        let mut attempts = Attempts::new(self, what, 0);
        loop {
            let (why, transient) = match token(&self.http, service, &scope, credential).await {
                Ok(header) => return Ok(header),
                Err(TokenError::Denied(why)) => {
                    let with_credentials = credential.is_some();
                    return Err(PullError::Denied { what: what.to_owned(), why, with_credentials });
                }
                Err(TokenError::Http(error)) => {
                    let why = format!("token service at {}: {}", error.host, error.why);
                    (why, error.kind == HttpErrorKind::Transient)
                }
                Err(TokenError::Failed { why, transient }) => (why, transient),
            };
            if !transient {
                return Err(self.failed(what, why));
            }
            attempts.again(&why, None, || self.failed(what, why.clone())).await?;
        }
    }

    fn manifest_path(&self, digest: Option<&Digest>) -> String {
        let repository = self.reference.repository();
        match (digest.or(self.reference.digest()), self.reference.tag()) {
            (Some(digest), _) => format!("/v2/{repository}/manifests/{digest}"),
            (None, tag) => format!("/v2/{repository}/manifests/{}", tag.unwrap_or("latest")),
        }
    }

    fn blob_path(&self, digest: &Digest) -> String {
        format!("/v2/{}/blobs/{digest}", self.reference.repository())
    }

    fn url(&self, path: &str) -> Result<Uri, PullError> {
        format!("{}{path}", self.origin).parse().map_err(|_| PullError::Unreachable {
            host: self.host(),
            why: "its name makes no address".to_owned(),
            hint: None,
        })
    }

    fn host(&self) -> String {
        self.origin.split_once("://").map_or("", |(_, host)| host).to_owned()
    }

    fn failed(&self, what: &str, why: String) -> PullError {
        PullError::Registry { host: self.host(), what: what.to_owned(), why }
    }
}

/// Counts the attempts at one thing and waits between them.
struct Attempts<'a> {
    registry: &'a Registry,
    what: &'a str,
    made: u32,
    left: u64,
}

impl<'a> Attempts<'a> {
    fn new(registry: &'a Registry, what: &'a str, more: u64) -> Self {
        Self { registry, what, made: 1, left: u64::from(MAX_ATTEMPTS - 1) + more }
    }

    /// Waits for the next attempt: as long as the registry asked, else longer each time. When there is none left, or
    /// the registry asks for too long a wait, gives the `error`.
    async fn again(
        &mut self,
        why: &str,
        asked: Option<Duration>,
        error: impl FnOnce() -> PullError,
    ) -> Result<(), PullError> {
        if self.left == 0 || asked.is_some_and(|wait| wait > MAX_RETRY_AFTER) {
            return Err(error());
        }
        self.left -= 1;
        let after = asked.unwrap_or_else(|| backoff(self.made));
        self.made += 1;
        self.registry.progress.event(Event::Retrying { what: self.what, why, after });
        #[expect(
            clippy::disallowed_methods,
            reason = "the server asked for this time, or a retry must keep off it"
        )]
        tokio::time::sleep(after).await;
        Ok(())
    }
}

/// The wait after the attempt with this number, counted from 1; part of it random, so that clients do not come back
/// all at once.
fn backoff(made: u32) -> Duration {
    let base = FIRST_BACKOFF * 2u32.pow(made.min(6) - 1);
    let mut random = [0];
    // Without random bytes the wait is just less spread.
    let _ = rustix::rand::getrandom(&mut random[..], rustix::rand::GetRandomFlags::NONBLOCK);
    base / 2 + base * u32::from(random[0]) / 512
}

/// How long the registry asks to wait. RFC 9110 §10.2.3 "Retry-After": seconds, or a date.
fn retry_after(headers: &HeaderMap, now: SystemTime) -> Option<Duration> {
    let text = headers.get(RETRY_AFTER)?.to_str().ok()?.trim();
    if let Ok(seconds) = text.parse::<u64>() {
        return Some(Duration::from_secs(seconds));
    }
    let until = httpdate::parse_http_date(text).ok()?;
    Some(until.duration_since(now).unwrap_or(Duration::ZERO))
}

/// Where in the blob the answer starts, given that `asked` was asked for; `None` when it starts after that.
fn start_of(answer: &Answer, asked: u64) -> Option<u64> {
    if answer.status != StatusCode::PARTIAL_CONTENT {
        return Some(0);
    }
    let range = answer.headers.get(CONTENT_RANGE)?.to_str().ok()?;
    let start: u64 = range.strip_prefix("bytes ")?.split('-').next()?.parse().ok()?;
    (start <= asked).then_some(start)
}

fn accept_manifests() -> HeaderMap {
    let mut headers = HeaderMap::new();
    for kind in ACCEPTED {
        headers.append(ACCEPT, HeaderValue::from_static(kind));
    }
    headers
}

fn content_digest(headers: &HeaderMap) -> Option<Digest> {
    headers.get(CONTENT_DIGEST)?.to_str().ok()?.parse().ok()
}

fn unreachable(error: HttpError) -> PullError {
    let hint = match error.kind {
        HttpErrorKind::Certificate => {
            Some("if the registry has a certificate of your own, name the authority's file in SSL_CERT_FILE")
        }
        HttpErrorKind::NotTls => Some("it speaks plain HTTP, which must be asked for: --allow-http"),
        HttpErrorKind::Transient | HttpErrorKind::Final => None,
    };
    PullError::Unreachable { host: error.host, why: error.why, hint }
}

/// What the registry says of its failure. OCI Distribution Specification 1.1, "Error Codes".
async fn said(answer: Answer) -> String {
    #[derive(Deserialize)]
    struct Errors {
        #[serde(default)]
        errors: Vec<OneError>,
    }
    #[derive(Deserialize)]
    struct OneError {
        #[serde(default)]
        message: String,
    }
    let status = answer.status;
    let body = answer.body.read(MAX_ERROR_BYTES).await.unwrap_or_default();
    let errors: Option<Errors> = serde_json::from_slice(&body).ok();
    match errors.and_then(|errors| errors.errors.into_iter().next()).filter(|error| !error.message.is_empty())
    {
        Some(error) => format!("{} ({status})", plain(error.message)),
        None => format!("it says {status}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn retry_after_is_seconds_or_a_date() {
        let now = SystemTime::UNIX_EPOCH + Duration::from_secs(784_111_777);
        let after = |text: &str| {
            let mut headers = HeaderMap::new();
            headers.insert(RETRY_AFTER, HeaderValue::from_str(text).expect("a header"));
            retry_after(&headers, now)
        };
        assert_eq!(after("7"), Some(Duration::from_secs(7)));
        assert_eq!(after("Sun, 06 Nov 1994 08:49:47 GMT"), Some(Duration::from_secs(10)));
        assert_eq!(after("Sun, 06 Nov 1994 08:00:00 GMT"), Some(Duration::ZERO));
        assert_eq!(after("soon"), None);
        assert_eq!(after("-1"), None);
        assert_eq!(retry_after(&HeaderMap::new(), now), None);
    }

    #[test]
    fn waits_grow_and_differ_within_their_bounds() {
        for made in 1..40 {
            let base = FIRST_BACKOFF * 2u32.pow(made.min(6) - 1);
            let wait = backoff(made);
            assert!(wait >= base / 2 && wait <= base, "{made}: {wait:?}");
        }
    }
}
