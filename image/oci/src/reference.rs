//! Image names, as Docker reads them.

use std::fmt;
use std::net::Ipv6Addr;
use std::str::FromStr;

use kiln_support::digest::Digest;

/// The registry that is meant when a name says none.
const DEFAULT_REGISTRY: &str = "docker.io";
/// The most bytes of registry and repository together; Docker's limit.
const MAX_NAME_BYTES: usize = 255;
/// The most bytes of a tag. OCI Distribution Specification 1.1, "Pulling manifests".
const MAX_TAG_BYTES: usize = 128;

/// An image in a registry: `debian:12`, `ghcr.io/a/b@sha256:…`, `localhost:5000/x`.
///
/// What is left out is filled in as Docker does: `debian` is `docker.io/library/debian:latest`. Displayed in full.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Reference {
    registry: String,
    repository: String,
    tag: Option<String>,
    digest: Option<Digest>,
}

/// The text is no image name.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{text:?} is not an image name: {why}")]
pub struct ParseReferenceError {
    text: String,
    why: String,
}

impl Reference {
    /// The registry's host and port, `docker.io` for Docker Hub.
    pub fn registry(&self) -> &str {
        &self.registry
    }

    /// The repository in the registry, such as `library/debian`.
    pub fn repository(&self) -> &str {
        &self.repository
    }

    /// The tag. `None` only when a digest was given without one.
    pub fn tag(&self) -> Option<&str> {
        self.tag.as_deref()
    }

    /// The digest the name is pinned to. It, not the tag, then says what is meant.
    pub fn digest(&self) -> Option<&Digest> {
        self.digest.as_ref()
    }
}

impl fmt::Display for Reference {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.registry, self.repository)?;
        if let Some(tag) = &self.tag {
            write!(f, ":{tag}")?;
        }
        match &self.digest {
            Some(digest) => write!(f, "@{digest}"),
            None => Ok(()),
        }
    }
}

impl FromStr for Reference {
    type Err = ParseReferenceError;

    fn from_str(text: &str) -> Result<Self, ParseReferenceError> {
        parse(text).map_err(|why| ParseReferenceError { text: text.chars().take(300).collect(), why })
    }
}

fn parse(text: &str) -> Result<Reference, String> {
    if text.is_empty() {
        return Err("it is empty".to_owned());
    }
    let (rest, digest) = match text.split_once('@') {
        Some((rest, digest)) => (rest, Some(parse_digest(digest)?)),
        None => (text, None),
    };
    let (registry, path) = match rest.split_once('/') {
        Some((first, path)) if is_registry(first) => {
            let registry = check_registry(first)?;
            // A name by its capitals alone would read as a repository once they are small.
            if !is_registry(&registry) {
                return Err(format!(
                    "{first:?} is neither a registry, which has a dot or a port, nor in small letters"
                ));
            }
            (registry, path)
        }
        _ => (DEFAULT_REGISTRY.to_owned(), rest),
    };
    let (path, tag) = match path.split_once(':') {
        Some((path, tag)) => (path, Some(check_tag(tag)?)),
        None => (path, None),
    };
    if path.len() == 2 * Digest::BYTES && path.bytes().all(|byte| matches!(byte, b'0'..=b'9' | b'a'..=b'f')) {
        return Err("64 hexadecimal digits are an image's id, not its name".to_owned());
    }
    for component in path.split('/') {
        check_component(component)?;
    }
    let repository = if registry == DEFAULT_REGISTRY && !path.contains('/') {
        format!("library/{path}")
    } else {
        path.to_owned()
    };
    if registry.len() + 1 + repository.len() > MAX_NAME_BYTES {
        return Err(format!("registry and repository have more than {MAX_NAME_BYTES} characters"));
    }
    let tag = match (tag, digest) {
        (None, None) => Some("latest".to_owned()),
        (tag, _) => tag,
    };
    Ok(Reference { registry, repository, tag, digest })
}

fn parse_digest(text: &str) -> Result<Digest, String> {
    match text.split_once(':') {
        Some((algorithm, _)) if algorithm != "sha256" => {
            Err(format!("digests are sha256 here, not {algorithm:?}"))
        }
        _ => text.parse().map_err(|error: kiln_support::digest::ParseDigestError| error.to_string()),
    }
}

/// True when the first part of a name says a registry and not a part of the repository: Docker's rule.
fn is_registry(first: &str) -> bool {
    first == "localhost"
        || first.contains(['.', ':', '['])
        || first.bytes().any(|byte| byte.is_ascii_uppercase())
}

fn check_registry(text: &str) -> Result<String, String> {
    let (host, port) = match text.strip_prefix('[') {
        Some(rest) => {
            let (address, port) = rest.split_once(']').ok_or("the IPv6 address of the registry has no ]")?;
            let address: Ipv6Addr =
                address.parse().map_err(|_| format!("{address:?} is not an IPv6 address"))?;
            let port = match port.strip_prefix(':') {
                Some(port) => Some(port),
                None if port.is_empty() => None,
                None => return Err("the registry has something after ] that is not a port".to_owned()),
            };
            (format!("[{address}]"), port)
        }
        None => match text.split_once(':') {
            Some((host, port)) => (check_host(host)?, Some(port)),
            None => (check_host(text)?, None),
        },
    };
    let host = if host == "index.docker.io" { DEFAULT_REGISTRY.to_owned() } else { host };
    match port {
        None => Ok(host),
        Some(port) => match port.parse::<u16>() {
            Ok(number) if number > 0 && port.bytes().all(|byte| byte.is_ascii_digit()) => {
                Ok(format!("{host}:{number}"))
            }
            _ => Err(format!("{port:?} is not a port of a registry")),
        },
    }
}

fn check_host(host: &str) -> Result<String, String> {
    let good = |label: &str| {
        !label.is_empty()
            && label.len() <= 63
            && !label.starts_with('-')
            && !label.ends_with('-')
            && label.bytes().all(|byte| byte.is_ascii_alphanumeric() || byte == b'-')
    };
    if host.len() <= 253 && host.split('.').all(good) {
        Ok(host.to_ascii_lowercase())
    } else {
        Err(format!("{host:?} is not the host name of a registry"))
    }
}

fn check_tag(tag: &str) -> Result<String, String> {
    let word = |byte: u8| byte.is_ascii_alphanumeric() || byte == b'_';
    let mut bytes = tag.bytes();
    if bytes.next().is_some_and(word) && bytes.all(|byte| word(byte) || matches!(byte, b'.' | b'-')) {
        if tag.len() <= MAX_TAG_BYTES {
            return Ok(tag.to_owned());
        }
        return Err(format!("the tag has more than {MAX_TAG_BYTES} characters"));
    }
    Err(format!("{tag:?} is not a tag (letters, digits, _ . -, not starting with . or -)"))
}

/// Checks one part of a repository: lower-case letters and digits, with `.`, `_`, `__` or any number of `-` between.
fn check_component(component: &str) -> Result<(), String> {
    let alphanumeric = |byte: u8| matches!(byte, b'a'..=b'z' | b'0'..=b'9');
    let bytes = component.as_bytes();
    let ends =
        bytes.first().copied().is_some_and(alphanumeric) && bytes.last().copied().is_some_and(alphanumeric);
    let between = |separator: &[u8]| {
        matches!(separator, b"" | b"." | b"_" | b"__") || separator.iter().all(|byte| *byte == b'-')
    };
    if ends && bytes.split(|byte| alphanumeric(*byte)).all(between) {
        return Ok(());
    }
    let why = if component.is_empty() {
        "a part of the repository is empty"
    } else if component.bytes().any(|byte| byte.is_ascii_uppercase()) {
        "the repository must be in lower case"
    } else {
        "a repository has lower-case letters and digits, with . _ __ or - between them"
    };
    Err(format!("{why}: {component:?}"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const HEX: &str = "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855";

    #[test]
    fn a_registry_by_capitals_alone_is_refused() {
        assert!("Foo/bar".parse::<Reference>().is_err());
        assert!("Foo.example/bar".parse::<Reference>().is_ok());
    }

    #[test]
    fn names_mean_what_docker_means() {
        for (text, full) in [
            ("debian", "docker.io/library/debian:latest"),
            ("debian:12", "docker.io/library/debian:12"),
            ("docker.io/debian", "docker.io/library/debian:latest"),
            ("index.docker.io/library/debian", "docker.io/library/debian:latest"),
            ("user/app", "docker.io/user/app:latest"),
            ("ghcr.io/a/b/c:v1.2_3-x", "ghcr.io/a/b/c:v1.2_3-x"),
            ("localhost/x", "localhost/x:latest"),
            ("localhost:5000/x", "localhost:5000/x:latest"),
            ("localhost:5000/x:y", "localhost:5000/x:y"),
            ("127.0.0.1:5000/x", "127.0.0.1:5000/x:latest"),
            ("[::1]:5000/x:y", "[::1]:5000/x:y"),
            ("[2001:DB8::1]/x", "[2001:db8::1]/x:latest"),
            ("Registry.Example.COM/x", "registry.example.com/x:latest"),
            ("a__b/c--d.e", "docker.io/a__b/c--d.e:latest"),
            ("debian:latest", "docker.io/library/debian:latest"),
            ("5000/x", "docker.io/5000/x:latest"),
        ] {
            assert_eq!(text.parse::<Reference>().map(|name| name.to_string()), Ok(full.to_owned()), "{text}");
        }
        let pinned: Reference = format!("ghcr.io/a/b@sha256:{HEX}").parse().expect("a name");
        assert_eq!((pinned.tag(), pinned.digest()), (None, Some(&Digest::EMPTY)));
        let both: Reference = format!("debian:12@sha256:{HEX}").parse().expect("a name");
        assert_eq!(both.to_string(), format!("docker.io/library/debian:12@sha256:{HEX}"));
    }

    #[test]
    fn what_is_no_name_is_refused_with_the_reason() {
        for (text, why) in [
            ("", "empty"),
            ("Debian", "lower case"),
            ("debian:", "not a tag"),
            ("debian:-x", "not a tag"),
            ("x/debian:a/b", "not a tag"),
            ("a//b", "empty"),
            ("/a", "empty"),
            ("a/", "empty"),
            ("a_-b", "lower-case letters"),
            ("a..b", "lower-case letters"),
            ("x.y/a..b", "lower-case letters"),
            ("-a", "lower-case letters"),
            ("../../etc/passwd", "not the host"),
            ("x/../y", "lower-case letters"),
            ("debian@sha256:abc", "not a digest"),
            ("debian@sha512:abc", "sha256 here"),
            ("debian@latest", "not a digest"),
            ("localhost:0/x", "not a port"),
            ("localhost:65536/x", "not a port"),
            ("localhost:+5/x", "not a port"),
            ("localhost:/x", "not a port"),
            ("[::1/x", "no ]"),
            ("[::1]5/x", "not a port"),
            ("[x]/x", "not an IPv6"),
            ("exa mple.com/x", "not the host"),
            ("http://example.com/x", "not a port"),
            ("dé.b/x", "not the host"),
            ("user:pass@example.com/x", "not a digest"),
            (HEX, "id"),
        ] {
            let said = text.parse::<Reference>().expect_err(text).to_string();
            assert!(said.contains(why), "{text}: {said}");
        }
        assert!(format!("x:{}", "t".repeat(129)).parse::<Reference>().is_err());
        assert!(format!("x:{}", "t".repeat(128)).parse::<Reference>().is_ok());
        assert!("x".repeat(300).parse::<Reference>().is_err());
    }

    proptest! {
        #[test]
        fn parsing_never_panics_and_the_full_form_means_the_same(text in "[\\PC]{0,40}|[a-zA-Z0-9.:/@_\\[\\]-]{0,60}") {
            if let Ok(reference) = text.parse::<Reference>() {
                prop_assert_eq!(reference.to_string().parse::<Reference>(), Ok(reference));
            }
        }
    }
}
