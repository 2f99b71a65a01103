//! A small HTTP server that does exactly what a test says, good or bad, over real sockets.

use std::io::{BufRead as _, BufReader, Read as _, Write as _};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use anyhow::{Context as _, Result};

/// The most bytes of a request's body.
const MAX_BODY_BYTES: usize = 1 << 20;
/// How long a client may leave a request unfinished.
const CLIENT_TIMEOUT: Duration = Duration::from_secs(10);

/// A server on loopback that answers each request as a function says. Stops when dropped.
#[derive(Debug)]
pub struct Server {
    address: SocketAddr,
    requests: Arc<Mutex<Vec<Request>>>,
    stopped: Arc<AtomicBool>,
}

/// What a client asked.
#[derive(Clone, Debug)]
pub struct Request {
    /// `GET`, `HEAD`, `POST` ...
    pub method: String,
    /// Path and query.
    pub path: String,
    /// Names in lower case, and values.
    pub headers: Vec<(String, String)>,
    /// What came after the headers.
    pub body: Vec<u8>,
}

impl Request {
    /// The value of a header, by its name in lower case.
    pub fn header(&self, name: &str) -> Option<&str> {
        self.headers.iter().find(|(found, _)| found == name).map(|(_, value)| value.as_str())
    }

    /// Where the range starts that the client asks for: `bytes=<start>-`.
    pub fn range_start(&self) -> Option<usize> {
        self.header("range")?.strip_prefix("bytes=")?.strip_suffix('-')?.parse().ok()
    }
}

/// What to answer.
#[derive(Clone, Debug)]
pub struct Response {
    /// The status code.
    pub status: u16,
    /// Names and values; the length is added.
    pub headers: Vec<(String, String)>,
    /// The body.
    pub body: Vec<u8>,
    /// Closes the connection after this many bytes of the body, whatever length was announced.
    pub cut_after: Option<usize>,
}

impl Response {
    /// An answer with a body and nothing special.
    pub fn new(status: u16, body: impl Into<Vec<u8>>) -> Self {
        Self { status, headers: Vec::new(), body: body.into(), cut_after: None }
    }

    /// The same with a header.
    #[must_use]
    pub fn header(mut self, name: &str, value: impl Into<String>) -> Self {
        self.headers.push((name.to_owned(), value.into()));
        self
    }

    /// The same, broken off after so many bytes of the body.
    #[must_use]
    pub fn cut_after(self, bytes: usize) -> Self {
        Self { cut_after: Some(bytes), ..self }
    }
}

impl Server {
    /// Starts a server at `host`, an address of this machine such as `127.0.0.1`, on a port of the kernel's choice.
    ///
    /// # Errors
    /// When there is no such address.
    pub fn start(host: &str, answer: impl Fn(&Request) -> Response + Send + Sync + 'static) -> Result<Self> {
        let listener = TcpListener::bind((host, 0)).with_context(|| format!("cannot listen at {host}"))?;
        let address = listener.local_addr().context("the listener's address")?;
        let requests = Arc::new(Mutex::new(Vec::new()));
        let stopped = Arc::new(AtomicBool::new(false));
        let (log, stop, answer) = (Arc::clone(&requests), Arc::clone(&stopped), Arc::new(answer));
        std::thread::spawn(move || {
            for client in listener.incoming() {
                if stop.load(Ordering::SeqCst) {
                    break;
                }
                let (Ok(client), log, answer) = (client, Arc::clone(&log), Arc::clone(&answer)) else {
                    continue;
                };
                // A client that goes away in the middle is part of many tests.
                std::thread::spawn(move || serve(&client, &log, &*answer).ok());
            }
        });
        Ok(Self { address, requests, stopped })
    }

    /// Host and port.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// The address of a path.
    pub fn url(&self, path: &str) -> String {
        format!("http://{}{path}", self.address)
    }

    /// All requests so far, in the order they came.
    pub fn requests(&self) -> Vec<Request> {
        self.requests.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.stopped.store(true, Ordering::SeqCst);
        // Wakes the thread that waits for clients; when nobody can connect it has ended already.
        let _ = TcpStream::connect(self.address);
    }
}

fn serve(client: &TcpStream, log: &Mutex<Vec<Request>>, answer: &dyn Fn(&Request) -> Response) -> Result<()> {
    client.set_read_timeout(Some(CLIENT_TIMEOUT))?;
    let request = read(client)?;
    log.lock().unwrap_or_else(PoisonError::into_inner).push(request.clone());
    let response = answer(&request);
    let mut head = format!("HTTP/1.1 {} Test\r\nConnection: close\r\n", response.status);
    for (name, value) in &response.headers {
        head.extend([name, ": ", value, "\r\n"]);
    }
    if !response.headers.iter().any(|(name, _)| name.eq_ignore_ascii_case("content-length")) {
        head.extend(["Content-Length: ", &response.body.len().to_string(), "\r\n"]);
    }
    let mut client = client;
    client.write_all((head + "\r\n").as_bytes())?;
    if request.method != "HEAD" {
        let end = response.cut_after.unwrap_or(usize::MAX).min(response.body.len());
        client.write_all(&response.body[..end])?;
    }
    client.flush()?;
    Ok(())
}

fn read(client: &TcpStream) -> Result<Request> {
    let mut reader = BufReader::new(client);
    let mut line = String::new();
    reader.read_line(&mut line)?;
    let mut words = line.split_whitespace().map(ToOwned::to_owned);
    let method = words.next().context("no method")?;
    let path = words.next().context("no path")?;
    let mut headers = Vec::new();
    loop {
        line.clear();
        reader.read_line(&mut line)?;
        let Some((name, value)) = line.trim_end().split_once(':') else { break };
        headers.push((name.to_ascii_lowercase(), value.trim().to_owned()));
    }
    let length = headers.iter().find(|(name, _)| name == "content-length");
    let length: usize = length.map_or(Ok(0), |(_, value)| value.parse())?;
    let mut body = vec![0; length.min(MAX_BODY_BYTES)];
    reader.read_exact(&mut body)?;
    Ok(Request { method, path, headers, body })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ask(server: &Server, request: &str) -> Vec<u8> {
        let mut client = TcpStream::connect(server.address()).expect("connects");
        client.write_all(request.as_bytes()).expect("written");
        let mut answer = Vec::new();
        client.read_to_end(&mut answer).expect("read");
        answer
    }

    #[test]
    fn the_server_answers_as_told_and_remembers() {
        let server = Server::start("127.0.0.1", |request| {
            Response::new(206, request.body.clone()).header("X-Path", request.path.clone()).cut_after(2)
        })
        .expect("a server");
        let answer = ask(&server, "POST /a?b=c HTTP/1.1\r\nRange: bytes=7-\r\nContent-Length: 4\r\n\r\nbody");
        let answer = String::from_utf8(answer).expect("text");
        assert!(answer.starts_with("HTTP/1.1 206 "), "{answer}");
        assert!(
            answer.contains("X-Path: /a?b=c\r\n") && answer.contains("Content-Length: 4\r\n"),
            "{answer}"
        );
        assert!(answer.ends_with("\r\n\r\nbo"), "{answer}");
        let requests = server.requests();
        assert_eq!(requests.len(), 1);
        assert_eq!((requests[0].range_start(), requests[0].body.as_slice()), (Some(7), &b"body"[..]));
    }
}
