//! Redirects: credentials stay with the host they are for, and nothing leaves TLS or this machine.

use std::fs;

use kiln_testkit::http::{Request, Response, Server};
use kiln_testkit::layout::digest;
use kiln_testkit::registry::basic_auth;
use serde_json::json;

use crate::{Place, child, layer, one_image};

/// The files of an image: what a registry answers for each path.
pub(crate) struct Served {
    pub(crate) manifest: Vec<u8>,
    pub(crate) blobs: Vec<(String, Vec<u8>)>,
}

impl Served {
    pub(crate) fn new(place: &Place, layers: &[kiln_testkit::layout::Layer]) -> Self {
        let folder = tempfile::tempdir_in(place.folder.path()).expect("a folder");
        let manifest = one_image(folder.path(), layers);
        let blobs: Vec<(String, Vec<u8>)> = fs::read_dir(folder.path().join("blobs/sha256"))
            .expect("a folder")
            .map(|file| fs::read(file.expect("an entry").path()).expect("read"))
            .map(|content| (digest(&content), content))
            .collect();
        let manifest = blobs.iter().find(|(name, _)| *name == manifest).expect("the manifest").1.clone();
        Self { manifest, blobs }
    }

    /// What a registry that does nothing wrong answers.
    pub(crate) fn answer(&self, request: &Request) -> Response {
        if request.path == "/v2/" {
            return Response::new(200, "{}");
        }
        if request.path.contains("/manifests/") {
            return Response::new(200, self.manifest.clone())
                .header("Content-Type", "application/vnd.oci.image.manifest.v1+json")
                .header("Docker-Content-Digest", digest(&self.manifest));
        }
        match self.blobs.iter().find(|(name, _)| request.path.ends_with(name.as_str())) {
            Some((_, content)) => Response::new(200, content.clone()),
            None => Response::new(404, r#"{"errors":[{"code":"BLOB_UNKNOWN","message":"blob unknown"}]}"#),
        }
    }
}

#[test]
fn credentials_never_follow_a_redirect_to_another_host() {
    let place = Place::new();
    let served = Served::new(&place, &[layer("a", b"redirected")]);
    let manifest = digest(&served.manifest);
    let shown = format!("Basic {}", basic_auth("ada", "secret"));
    for (what, cdn_host) in [("another host", "127.0.0.2"), ("another port", "127.0.0.1")] {
        let files = Served { manifest: served.manifest.clone(), blobs: served.blobs.clone() };
        let cdn = Server::start(cdn_host, move |request| files.answer(request)).expect("a server");
        let target = cdn.url("");
        let files = Served { manifest: served.manifest.clone(), blobs: served.blobs.clone() };
        let wanted = shown.clone();
        let registry = Server::start("127.0.0.1", move |request| {
            if request.header("authorization") != Some(&wanted) {
                return Response::new(401, "").header("WWW-Authenticate", "Basic realm=\"x\"");
            }
            if request.path.contains("/blobs/") {
                // First to itself, where credentials may follow, then away.
                return match request.path.strip_prefix("/moved") {
                    None => Response::new(307, "").header("Location", format!("/moved{}", request.path)),
                    Some(path) => Response::new(302, "").header("Location", format!("{target}{path}")),
                };
            }
            files.answer(request)
        })
        .expect("a server");
        let pulled = pull_with_password(&registry, &place);
        assert_eq!(pulled, Ok(manifest.clone()), "{what}");
        let requests = cdn.requests();
        assert!(!requests.is_empty(), "{what}: nothing was redirected");
        for request in requests {
            assert_eq!(request.header("authorization"), None, "{what}: {}", request.path);
        }
        let moved = registry.requests().into_iter().filter(|request| request.path.starts_with("/moved"));
        assert!(moved.count() > 0, "{what}: credentials did follow within the host");
    }
}

/// Gives a child credentials for a registry, pulls with it, and says how that went.
fn pull_with_password(registry: &Server, place: &Place) -> Result<String, String> {
    let home = tempfile::tempdir_in(place.folder.path()).expect("a home");
    fs::create_dir(home.path().join(".docker")).expect("made");
    let config = json!({"auths": {registry.address().to_string(): {"auth": basic_auth("ada", "secret")}}});
    fs::write(home.path().join(".docker/config.json"), config.to_string()).expect("written");
    child::outcome(&mut child::command(&format!("{}/app:1", registry.address()), home.path()))
}

#[test]
fn a_challenge_after_a_redirect_is_not_answered() {
    let place = Place::new();
    let served = Served::new(&place, &[layer("a", b"x")]);
    let collector =
        Server::start("127.0.0.3", |_| Response::new(200, r#"{"token": "x"}"#)).expect("a server");
    let challenge = format!(r#"Bearer realm="{}",service="x""#, collector.url("/give-it-to-me"));
    let thief = Server::start("127.0.0.2", move |_| {
        Response::new(401, "").header("WWW-Authenticate", challenge.clone())
    })
    .expect("a server");
    let target = thief.url("/steal");
    let registry = Server::start("127.0.0.1", move |request| {
        if request.path.contains("/blobs/") {
            return Response::new(307, "").header("Location", target.clone());
        }
        served.answer(request)
    })
    .expect("a server");
    let error = pull_with_password(&registry, &place).expect_err("refused");
    assert!(error.contains("access denied"), "{error}");
    assert_eq!(thief.requests().len(), 1, "it is not asked again with anything to show");
    assert_eq!(collector.requests().len(), 0, "nobody it names is given the credentials");
}

#[tokio::test]
async fn bad_redirects_are_refused() {
    for (target, why) in [
        ("http://registry.invalid/blob", "without TLS"),
        ("ftp://127.0.0.1/blob", "not an http"),
        ("file:///etc/passwd", "not an"),
        ("https://", "not an address"),
        ("/v2/", "redirects"),
    ] {
        let place = Place::new();
        let registry = Server::start("127.0.0.1", move |request| match request.path.as_str() {
            "/v2/" if request.header("accept").is_none() => Response::new(200, ""),
            _ => Response::new(307, "").header("Location", target),
        })
        .expect("a server");
        let error = place.pull(&format!("{}/app:1", registry.address())).await.expect_err(target).to_string();
        assert!(error.contains(why), "{target}: {error}");
        place.assert_nothing_is_left();
    }
}
