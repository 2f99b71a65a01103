//! Who is let in: every form of credential against real registries.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;

use kiln_oci::PullError;
use kiln_testkit::http::{Response, Server};
use kiln_testkit::registry::{Access, IDENTITY_TOKEN, PASSWORD, Registry, USER, basic_auth};

use crate::{Place, child, layer, push};

/// Writes a Docker config into the home of a child.
fn docker_config(home: &Path, config: &serde_json::Value) {
    fs::create_dir_all(home.join(".docker")).expect("made");
    fs::write(home.join(".docker/config.json"), config.to_string()).expect("written");
}

/// A credential helper that knows one registry, put where the child finds programs.
fn helper(home: &Path, name: &str, server: &str, user: &str, secret: &str) {
    let script = format!(
        "#!/bin/sh\n[ \"$1\" = get ] || exit 9\nread -r server\n\
         if [ \"$server\" = '{server}' ]; then printf '{{\"ServerURL\":\"%s\",\"Username\":\"{user}\",\"Secret\":\"{secret}\"}}' \"$server\"\n\
         else echo 'credentials not found in native keychain'; exit 1; fi\n"
    );
    let path = home.join(format!("docker-credential-{name}"));
    fs::write(&path, script).expect("written");
    fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).expect("made a program");
}

fn pull_with(
    config: &serde_json::Value,
    image: &str,
    place: &Place,
    prepare: impl FnOnce(&Path),
) -> Result<String, String> {
    let home = tempfile::tempdir_in(place.folder.path()).expect("a home");
    docker_config(home.path(), config);
    prepare(home.path());
    let path = std::env::var("PATH").unwrap_or_default();
    child::outcome(
        child::command(image, home.path()).env("PATH", format!("{}:{path}", home.path().display())),
    )
}

/// Every way to give credentials that works for the registry, and what is refused.
fn every_form_of_credential(access: Access) {
    let place = Place::new();
    let registry = Registry::start(access).expect("a registry");
    let digest = push(&registry, &place, "private/app:1", &[layer("a", b"private")]);
    let (image, host) = (registry.image("private/app:1"), registry.host());
    let auth = basic_auth(USER, PASSWORD);
    let nothing = |_: &Path| ();
    for (form, config) in [
        ("auth", serde_json::json!({"auths": {&host: {"auth": auth}}})),
        ("address as the key", serde_json::json!({"auths": {format!("https://{host}/v2/"): {"auth": auth}}})),
        ("plain fields", serde_json::json!({"auths": {&host: {"username": USER, "password": PASSWORD}}})),
    ] {
        assert_eq!(pull_with(&config, &image, &place, nothing), Ok(digest.clone()), "{form}");
    }

    let helpers = serde_json::json!({"credHelpers": {&host: "one"}, "credsStore": "all", "auths": {&host: {"auth": "eDp5"}}});
    let pulled = pull_with(&helpers, &image, &place, |home| {
        helper(home, "one", &host, USER, PASSWORD);
        helper(home, "all", &host, "other", "wrong");
    });
    assert_eq!(pulled, Ok(digest.clone()), "credHelpers come before credsStore and auths");

    let store = serde_json::json!({"credsStore": "all", "auths": {&host: {}}});
    let pulled = pull_with(&store, &image, &place, |home| helper(home, "all", &host, USER, PASSWORD));
    assert_eq!(pulled, Ok(digest.clone()), "credsStore");

    let pulled = pull_with(&store, &image, &place, |home| helper(home, "all", "elsewhere", USER, PASSWORD));
    let error = pulled.expect_err("a helper that knows nothing");
    assert!(error.contains("access denied") && error.contains("docker login"), "{error}");

    let wrong = serde_json::json!({"auths": {&host: {"auth": basic_auth(USER, "wrong")}}});
    let error = pull_with(&wrong, &image, &place, nothing).expect_err("a wrong password");
    assert!(error.contains("access denied") && error.contains("log in again"), "{error}");
    assert!(!error.contains("wrong"), "the password is shown: {error}");

    let other = serde_json::json!({"auths": {"127.0.0.1:1": {"auth": auth}, "localhost": {"auth": auth}}});
    let error = pull_with(&other, &image, &place, nothing).expect_err("credentials of another registry");
    assert!(error.contains("access denied"), "{error}");

    let broken = serde_json::json!({"credHelpers": {&host: "absent"}});
    let error = pull_with(&broken, &image, &place, nothing).expect_err("a helper that is not installed");
    assert!(error.contains("docker-credential-absent"), "{error}");
}

#[test]
fn basic_registries_take_every_form_of_credential() {
    every_form_of_credential(Access::Password);
}

#[test]
fn token_registries_take_every_form_of_credential() {
    every_form_of_credential(Access::Token);
}

#[test]
fn an_identity_token_is_traded_for_a_bearer_token() {
    let place = Place::new();
    let registry = Registry::start(Access::Token).expect("a registry");
    let digest = push(&registry, &place, "private/app:1", &[layer("a", b"private")]);
    let (image, host) = (registry.image("private/app:1"), registry.host());
    let config = |token: &str| serde_json::json!({"auths": {&host: {"identitytoken": token}}});
    assert_eq!(pull_with(&config(IDENTITY_TOKEN), &image, &place, |_| ()), Ok(digest.clone()));
    assert!(pull_with(&config("another"), &image, &place, |_| ()).is_err());

    let store = serde_json::json!({"credsStore": "all"});
    let pulled =
        pull_with(&store, &image, &place, |home| helper(home, "all", &host, "<token>", IDENTITY_TOKEN));
    assert_eq!(pulled, Ok(digest));
    // The token went to the service in the body, not where logs keep it.
    let requests = registry.tokens().expect("a token server").requests();
    assert!(requests.iter().all(|request| !request.path.contains(IDENTITY_TOKEN)));
}

#[test]
fn an_identity_token_is_not_sent_on_by_a_redirect() {
    let place = Place::new();
    let thief = Server::start("127.0.0.2", |_| Response::new(200, r#"{"token": "x"}"#)).expect("a server");
    let target = thief.url("/token");
    let service =
        Server::start("127.0.0.1", move |_| Response::new(307, "").header("Location", target.clone()));
    let service = service.expect("a server");
    let challenge = format!(r#"Bearer realm="{}",service="x""#, service.url("/token"));
    let registry = Server::start("127.0.0.1", move |_| {
        Response::new(401, "").header("WWW-Authenticate", challenge.clone())
    })
    .expect("a server");
    let config =
        serde_json::json!({"auths": {registry.address().to_string(): {"identitytoken": IDENTITY_TOKEN}}});
    let error =
        pull_with(&config, &format!("{}/app:1", registry.address()), &place, |_| ()).expect_err("refused");
    assert!(error.contains("posted on"), "{error}");
    assert_eq!(service.requests().len(), 1);
    assert_eq!(thief.requests().len(), 0);
}

#[test]
fn docker_config_names_the_folder_of_the_config() {
    let place = Place::new();
    let registry = Registry::start(Access::Password).expect("a registry");
    let digest = push(&registry, &place, "app:1", &[layer("a", b"private")]);
    let elsewhere = place.path("elsewhere");
    fs::create_dir(&elsewhere).expect("made");
    let config = serde_json::json!({"auths": {registry.host(): {"auth": basic_auth(USER, PASSWORD)}}});
    fs::write(elsewhere.join("config.json"), config.to_string()).expect("written");
    let mut command = child::command(&registry.image("app:1"), &place.path("no-home"));
    assert_eq!(child::outcome(command.env("DOCKER_CONFIG", &elsewhere)), Ok(digest));
}

#[tokio::test]
async fn a_public_repository_is_pulled_with_an_anonymous_token() {
    let place = Place::new();
    let registry = Registry::start(Access::Token).expect("a registry");
    push(&registry, &place, "public/app:1", &[layer("a", b"one"), layer("b", b"two"), layer("c", b"three")]);
    push(&registry, &place, "private/app:1", &[layer("a", b"private")]);
    let before = registry.tokens().expect("a token server").requests().len();
    place.pull(&registry.image("public/app:1")).await.expect("pulled");
    let asked = registry.tokens().expect("a token server").requests();
    assert_eq!(asked.len() - before, 1, "one token serves a whole pull");
    assert!(asked[before].header("authorization").is_none());

    let other = Place::new();
    let error = other.pull(&registry.image("private/app:1")).await.expect_err("private");
    assert!(matches!(error, PullError::Denied { with_credentials: false, .. }), "{error}");
    other.assert_nothing_is_left();
}

/// A token server that gives `t1`, `t2` and so on, and a registry that takes for layers what was given after `t1`.
fn rotating_tokens(place: &Place, satisfied: bool) -> (Server, Server) {
    let layers = [layer("a", b"one"), layer("b", b"two"), layer("c", b"three")];
    let blobs: Vec<String> = layers.iter().map(|layer| layer.digest.clone()).collect();
    let served = crate::redirects::Served::new(place, &layers);
    let given = std::sync::atomic::AtomicUsize::new(0);
    let tokens = Server::start("127.0.0.2", move |_| {
        let number = given.fetch_add(1, std::sync::atomic::Ordering::SeqCst) + 1;
        Response::new(200, format!(r#"{{"token": "t{number}"}}"#))
    })
    .expect("a server");
    let challenge = format!(r#"Bearer realm="{}",service="x""#, tokens.url("/token"));
    let registry = Server::start("127.0.0.1", move |request| {
        let shown = request.header("authorization").unwrap_or_default();
        let for_layer = blobs.iter().any(|blob| request.path.ends_with(blob.as_str()));
        if request.path != "/v2/" && (!satisfied || shown.is_empty() || (for_layer && shown == "Bearer t1")) {
            return Response::new(401, "").header("WWW-Authenticate", challenge.clone());
        }
        served.answer(request)
    })
    .expect("a server");
    (registry, tokens)
}

#[tokio::test]
async fn of_many_requests_whose_token_ran_out_one_gets_the_next() {
    let place = Place::new();
    let (registry, tokens) = rotating_tokens(&place, true);
    place.pull(&format!("{}/app:1", registry.address())).await.expect("pulled");
    assert_eq!(tokens.requests().len(), 2);
}

#[tokio::test]
async fn a_registry_that_no_token_satisfies_is_not_asked_for_ever() {
    let place = Place::new();
    let (registry, tokens) = rotating_tokens(&place, false);
    let error = place.pull(&format!("{}/app:1", registry.address())).await.expect_err("refused");
    assert!(matches!(error, PullError::Denied { .. }), "{error}");
    assert_eq!(tokens.requests().len(), 1);
    assert_eq!(registry.requests().iter().filter(|request| request.path != "/v2/").count(), 2);
}

#[test]
fn tls_is_checked_against_the_certificates_of_the_system() {
    let place = Place::new();
    let registry = Registry::start_with_tls(Access::Password).expect("a registry");
    let digest = push(&registry, &place, "app:1", &[layer("a", b"over TLS")]);
    let home = place.path("home");
    docker_config(
        &home,
        &serde_json::json!({"auths": {registry.host(): {"auth": basic_auth(USER, PASSWORD)}}}),
    );
    let image = registry.image("app:1");
    let trusting = child::outcome(child::command(&image, &home).env("SSL_CERT_FILE", registry.authority()));
    assert_eq!(trusting, Ok(digest));
    let error =
        child::outcome(child::command(&image, &home).env_remove("SSL_CERT_FILE")).expect_err("not trusted");
    assert!(error.contains("certificate") && error.contains("SSL_CERT_FILE"), "{error}");
}

/// Plain HTTP to an address that is not loopback, in a network namespace where that address is ours.
#[test]
fn plain_http_reaches_other_hosts_only_when_asked() {
    let script = "ip link set lo up && ip addr add 192.0.2.1/32 dev lo && \
                  exec \"$1\" --ignored --exact auth::other_host_child --nocapture";
    let output = std::process::Command::new("unshare")
        .args(["--user", "--map-root-user", "--net", "sh", "-c", script, "sh"])
        .arg(std::env::current_exe().expect("this test"))
        .output()
        .expect("unshare of util-linux and ip of iproute2, which every Debian has");
    let said = String::from_utf8_lossy(&output.stdout) + String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success() && said.contains("1 passed"), "{said}");
}

#[test]
#[ignore = "the part the test above plays in a network namespace"]
fn other_host_child() {
    let registry = Registry::start_at("192.0.2.1", Access::Open, false).expect("a registry");
    let place = Place::new();
    let folder = place.path("layout");
    crate::one_image(&folder, &[layer("a", b"x")]);
    let image = format!("192.0.2.1:{}/app:1", registry.port());
    kiln_testkit::run(
        std::process::Command::new("skopeo")
            .args(["--insecure-policy", "copy", "-q", "--dest-tls-verify=false"])
            .arg(format!("oci:{}:latest", folder.display()))
            .arg(format!("docker://{image}")),
    )
    .expect("pushed");
    let error = child::outcome(&mut child::command(&image, folder.as_path())).expect_err("refused");
    assert!(error.contains("--allow-http"), "{error}");
    let mut asked = child::command(&image, folder.as_path());
    child::allow_http(&mut asked);
    child::outcome(&mut asked).expect("pulled when asked");
}
