//! Real registries on loopback: Debian's `docker-registry`, open, with passwords, with tokens, over TLS.

use std::fs;
use std::io::{BufRead as _, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{SystemTime, UNIX_EPOCH};

use anyhow::{Context as _, Result, bail};
use base64::Engine as _;
use base64::engine::general_purpose::{STANDARD, URL_SAFE_NO_PAD};
use serde_json::json;

use crate::http::{Response, Server};
use crate::tool::{capture, run};

/// The user every registry with passwords or tokens knows.
pub const USER: &str = "ada";
/// Her password.
pub const PASSWORD: &str = "pass:word";
/// A token the token server takes in place of her password.
pub const IDENTITY_TOKEN: &str = "identity-of-ada";

/// Whom a registry lets in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Access {
    /// Everybody.
    Open,
    /// [`USER`] with her [`PASSWORD`], by HTTP Basic.
    Password,
    /// Whoever has a token. The token server, which is on another host, gives one to pull to everybody for
    /// repositories whose name starts with `public/`, and to [`USER`] for all.
    Token,
}

/// A registry on loopback. Ends, with all that was pushed, when dropped.
#[derive(Debug)]
pub struct Registry {
    child: Child,
    port: u16,
    folder: PathBuf,
    access: Access,
    tls: bool,
    tokens: Option<Server>,
}

impl Registry {
    /// Starts a registry that speaks plain HTTP.
    ///
    /// # Errors
    /// When `docker-registry`, `htpasswd` or `openssl` is missing or fails.
    pub fn start(access: Access) -> Result<Self> {
        Self::start_at("127.0.0.1", access, false)
    }

    /// Starts a registry that speaks TLS, with a certificate that [`Registry::authority`] vouches for.
    ///
    /// # Errors
    /// See [`Registry::start`].
    pub fn start_with_tls(access: Access) -> Result<Self> {
        Self::start_at("127.0.0.1", access, true)
    }

    /// Starts a registry at an address of this machine, or of this network namespace.
    ///
    /// # Errors
    /// See [`Registry::start`].
    pub fn start_at(host: &str, access: Access, tls: bool) -> Result<Self> {
        let folder = temporary_folder()?;
        let mut config = json!({
            "version": "0.1",
            "log": {"level": "info"},
            "storage": {"filesystem": {"rootdirectory": folder.join("data")}, "delete": {"enabled": true}},
            "http": {"addr": format!("{host}:0"), "secret": "of no use to anybody"},
        });
        if tls {
            make_certificates(&folder, host)?;
            config["http"]["tls"] =
                json!({"certificate": folder.join("tls.pem"), "key": folder.join("tls.key")});
        }
        let tokens = match access {
            Access::Open => None,
            Access::Password => {
                let line = capture(Command::new("htpasswd").args(["-nbB", USER, PASSWORD]))
                    .context("hint: htpasswd is in Debian's apache2-utils")?;
                fs::write(folder.join("htpasswd"), line).context("the passwords")?;
                config["auth"] = json!({"htpasswd": {"realm": "test", "path": folder.join("htpasswd")}});
                None
            }
            Access::Token => {
                make_token_key(&folder)?;
                let server = token_server(&folder)?;
                config["auth"] = json!({"token": {
                    "realm": server.url("/token?account=x"),
                    "service": "kiln-test",
                    "issuer": "kiln-test",
                    "rootcertbundle": folder.join("token.pem"),
                }});
                Some(server)
            }
        };
        let config_path = folder.join("config.yml");
        // JSON is YAML.
        fs::write(&config_path, config.to_string()).context("the registry's config")?;
        let mut child = Command::new("docker-registry")
            .arg("serve")
            .arg(&config_path)
            .stdout(Stdio::null())
            .stderr(Stdio::piped())
            .spawn()
            .context("cannot start docker-registry\nhint: `cargo xtask setup` installs what tests need")?;
        let log = child.stderr.take().context("the registry's log")?;
        match wait_for_port(log) {
            Ok(port) => Ok(Self { child, port, folder, access, tls, tokens }),
            Err(error) => {
                // Not started means nothing to lose.
                let _ = child.kill();
                let _ = child.wait();
                Err(error)
            }
        }
    }

    /// The name of an image in it: `127.0.0.1:1234/<name>`.
    pub fn image(&self, name: &str) -> String {
        format!("{}/{name}", self.host())
    }

    /// Host and port.
    pub fn host(&self) -> String {
        format!("127.0.0.1:{}", self.port)
    }

    /// The port.
    pub fn port(&self) -> u16 {
        self.port
    }

    /// The token server, if there is one.
    pub fn tokens(&self) -> Option<&Server> {
        self.tokens.as_ref()
    }

    /// The file of the certificate authority that vouches for a registry with TLS.
    pub fn authority(&self) -> PathBuf {
        self.folder.join("authority.pem")
    }

    /// Where the registry keeps the content of a blob, for tests that damage it.
    pub fn blob_path(&self, digest: &str) -> PathBuf {
        let hex = digest.trim_start_matches("sha256:");
        let blobs = self.folder.join("data/docker/registry/v2/blobs/sha256");
        blobs.join(hex.get(..2).unwrap_or_default()).join(hex).join("data")
    }

    /// Pushes an image, named as skopeo names it, under `name`, and returns the digest of its manifest or index.
    ///
    /// # Errors
    /// When skopeo fails.
    pub fn push(&self, from: &str, name: &str) -> Result<String> {
        self.push_with(from, name, &[])
    }

    /// The same with options of `skopeo copy`.
    ///
    /// # Errors
    /// When skopeo fails.
    pub fn push_with(&self, from: &str, name: &str, options: &[&str]) -> Result<String> {
        let digest_file = self.folder.join("digest");
        let mut skopeo = Command::new("skopeo");
        skopeo.args(["--insecure-policy", "copy", "-q", "--digestfile"]).arg(&digest_file).args(options);
        if self.tls {
            let certificates = self.folder.join("certificates");
            fs::create_dir_all(&certificates).context("a folder for skopeo")?;
            fs::copy(self.authority(), certificates.join("ca.crt")).context("the authority for skopeo")?;
            skopeo.arg("--dest-cert-dir").arg(certificates);
        } else {
            skopeo.arg("--dest-tls-verify=false");
        }
        if self.access != Access::Open {
            skopeo.args(["--dest-creds", &format!("{USER}:{PASSWORD}")]);
        }
        run(skopeo.arg(from).arg(format!("docker://{}", self.image(name))))?;
        Ok(fs::read_to_string(&digest_file).context("the digest")?.trim().to_owned())
    }
}

impl Drop for Registry {
    fn drop(&mut self) {
        // Ended already, or never to be waited for: either way there is nothing else to do.
        let _ = self.child.kill();
        let _ = self.child.wait();
        let _ = fs::remove_dir_all(&self.folder);
    }
}

/// What a Docker config holds for a user with this password.
pub fn basic_auth(user: &str, password: &str) -> String {
    STANDARD.encode(format!("{user}:{password}"))
}

fn temporary_folder() -> Result<PathBuf> {
    let output = capture(Command::new("mktemp").args(["-d", "-t", "kiln-registry-XXXXXXXX"]))?;
    Ok(PathBuf::from(String::from_utf8(output).context("mktemp's answer")?.trim()))
}

/// Reads the log until it says the port, and goes on reading so that the registry never waits for us.
fn wait_for_port(log: impl std::io::Read + Send + 'static) -> Result<u16> {
    let mut lines = BufReader::new(log).lines();
    let mut said = String::new();
    while let Some(Ok(line)) = lines.next() {
        if let Some((_, rest)) = line.split_once("listening on ") {
            let address = rest.split(['"', ',']).next().unwrap_or_default();
            let port = address.rsplit_once(':').and_then(|(_, port)| port.parse().ok());
            std::thread::spawn(move || lines.count());
            return port.with_context(|| format!("no port in {line}"));
        }
        said += &line;
        said.push('\n');
    }
    bail!("docker-registry did not start:\n{said}")
}

fn make_certificates(folder: &Path, host: &str) -> Result<()> {
    let openssl = |args: &[&str]| {
        run(Command::new("openssl").current_dir(folder).args(args)).context("hint: install Debian's openssl")
    };
    let key = ["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes"];
    let authority = ["req", "-x509", "-days", "30", "-subj", "/CN=kiln test authority"];
    openssl(&[&authority[..], &key, &["-keyout", "authority.key", "-out", "authority.pem"]].concat())?;
    let request = ["req", "-new", "-subj", "/CN=kiln test registry", "-keyout", "tls.key", "-out", "tls.csr"];
    openssl(&[&request[..], &key].concat())?;
    let names = format!("subjectAltName=IP:{host},DNS:localhost\nbasicConstraints=CA:FALSE\n");
    fs::write(folder.join("names"), names).context("the certificate's names")?;
    let sign = ["x509", "-req", "-in", "tls.csr", "-CA", "authority.pem", "-CAkey", "authority.key"];
    openssl(
        &[&sign[..], &["-CAcreateserial", "-days", "30", "-extfile", "names", "-out", "tls.pem"]].concat(),
    )
}

fn make_token_key(folder: &Path) -> Result<()> {
    let args =
        ["req", "-x509", "-days", "30", "-subj", "/CN=kiln test tokens", "-newkey", "rsa:2048", "-nodes"];
    run(Command::new("openssl").current_dir(folder).args(args).args([
        "-keyout",
        "token.key",
        "-out",
        "token.pem",
    ]))
    .context("hint: install Debian's openssl")
}

/// A token server on a host of its own, 127.0.0.2.
fn token_server(folder: &Path) -> Result<Server> {
    let folder = folder.to_owned();
    Server::start("127.0.0.2", move |request| {
        let form = if request.method == "POST" {
            String::from_utf8_lossy(&request.body).into_owned()
        } else {
            request.path.split_once('?').map(|(_, query)| query.to_owned()).unwrap_or_default()
        };
        let field = |name: &str| {
            form.split('&').find_map(|pair| pair.strip_prefix(name)?.strip_prefix('=')).map(percent_decoded)
        };
        let known = match (request.method.as_str(), request.header("authorization")) {
            ("POST", None) => Some(field("refresh_token").as_deref() == Some(IDENTITY_TOKEN)),
            (_, Some(shown)) => Some(shown == format!("Basic {}", basic_auth(USER, PASSWORD))),
            (_, None) => None,
        };
        if known == Some(false) || field("service").as_deref() != Some("kiln-test") {
            return Response::new(401, r#"{"details":"incorrect username or password"}"#);
        }
        let scope = field("scope").unwrap_or_default();
        match token(&folder, &scope, known.is_some()) {
            Ok(token) => Response::new(200, json!({"token": token, "expires_in": 60}).to_string()),
            Err(error) => Response::new(500, error.to_string()),
        }
    })
}

/// A JSON Web Token as Distribution's "Docker Registry v2 authentication" wants it, signed with RS256.
fn token(folder: &Path, scope: &str, known: bool) -> Result<String> {
    let mut parts = scope.splitn(3, ':');
    let (kind, name, actions) = (
        parts.next().unwrap_or_default(),
        parts.next().unwrap_or_default(),
        parts.next().unwrap_or_default(),
    );
    let actions: Vec<&str> = if known {
        actions.split(',').collect()
    } else if name.starts_with("public/") {
        vec!["pull"]
    } else {
        Vec::new()
    };
    let now = SystemTime::now().duration_since(UNIX_EPOCH)?.as_secs();
    let certificate = fs::read_to_string(folder.join("token.pem"))?;
    let certificate: String = certificate.lines().filter(|line| !line.starts_with("---")).collect();
    let header = json!({"typ": "JWT", "alg": "RS256", "x5c": [certificate]});
    let claims = json!({
        "iss": "kiln-test", "sub": "", "aud": "kiln-test",
        "nbf": now - 60, "iat": now - 60, "exp": now + 600, "jti": "1",
        "access": [{"type": kind, "name": name, "actions": actions}],
    });
    let encoded = |value: &serde_json::Value| URL_SAFE_NO_PAD.encode(value.to_string());
    let signed = format!("{}.{}", encoded(&header), encoded(&claims));
    // One file for each signature: several clients may ask at once.
    let input = folder.join(format!("sign-{:?}", std::thread::current().id()));
    fs::write(&input, &signed)?;
    let mut openssl = Command::new("openssl");
    openssl.args(["dgst", "-sha256", "-sign"]).arg(folder.join("token.key")).arg(&input);
    Ok(format!("{signed}.{}", URL_SAFE_NO_PAD.encode(capture(&mut openssl)?)))
}

fn percent_decoded(text: &str) -> String {
    let mut bytes = Vec::new();
    let mut rest = text.as_bytes();
    while let Some((first, after)) = rest.split_first() {
        let hex = (*first == b'%').then(|| after.get(..2)).flatten();
        let byte = hex.and_then(|hex| u8::from_str_radix(std::str::from_utf8(hex).ok()?, 16).ok());
        bytes.push(byte.unwrap_or(if *first == b'+' { b' ' } else { *first }));
        rest = if byte.is_some() { &after[2..] } else { after };
    }
    String::from_utf8_lossy(&bytes).into_owned()
}
