//! The user's credentials, from where Docker keeps them.
//!
//! `config.json` in `$DOCKER_CONFIG` or `~/.docker`: `auths` in the file itself, `credHelpers` for single registries,
//! `credsStore` for all. Helpers are programs named `docker-credential-<name>`, spoken to as
//! docker-credential-helpers' `get` says.

use std::collections::HashMap;
use std::fmt;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::Duration;

use base64::Engine as _;
use base64::engine::DecodePaddingMode;
use base64::engine::general_purpose::{GeneralPurpose, GeneralPurposeConfig, STANDARD};
use http::HeaderValue;
use serde::Deserialize;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::process::Command;

use crate::PullError;
use crate::error::plain;
use crate::manifest::null_is_default;

/// The most bytes of a config file.
const MAX_CONFIG_BYTES: u64 = 1 << 20;
/// The most bytes a helper may say.
const MAX_HELPER_BYTES: u64 = 64 << 10;
/// How long a helper may take; some ask the user.
const HELPER_TIMEOUT: Duration = Duration::from_mins(1);
/// How Docker Hub is called in config files.
const HUB_KEY: &str = "https://index.docker.io/v1/";

/// What a user shows a registry.
#[derive(Clone, PartialEq, Eq)]
pub(crate) enum Credential {
    /// Name and password.
    Password { user: String, password: String },
    /// A token the registry's token service takes in place of a password.
    IdentityToken(String),
    /// A token the registry itself takes.
    RegistryToken(String),
}

impl fmt::Debug for Credential {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Credential(not shown)")
    }
}

impl Credential {
    /// The `Authorization` that shows name and password. RFC 7617 "The 'Basic' HTTP Authentication Scheme".
    pub(crate) fn basic(user: &str, password: &str) -> Option<HeaderValue> {
        let mut value =
            HeaderValue::try_from(format!("Basic {}", STANDARD.encode(format!("{user}:{password}")))).ok()?;
        value.set_sensitive(true);
        Some(value)
    }

    /// The `Authorization` that shows a token. RFC 6750 "The OAuth 2.0 Authorization Framework: Bearer Token Usage".
    pub(crate) fn bearer(token: &str) -> Option<HeaderValue> {
        let mut value = HeaderValue::try_from(format!("Bearer {token}")).ok()?;
        value.set_sensitive(true);
        Some(value)
    }
}

#[derive(Deserialize, Default)]
#[serde(rename_all = "camelCase")]
struct DockerConfig {
    #[serde(default, deserialize_with = "null_is_default")]
    auths: HashMap<String, AuthEntry>,
    #[serde(default, deserialize_with = "null_is_default")]
    cred_helpers: HashMap<String, String>,
    #[serde(default, deserialize_with = "null_is_default")]
    creds_store: String,
}

#[derive(Deserialize, Default)]
struct AuthEntry {
    #[serde(default, deserialize_with = "null_is_default")]
    auth: String,
    #[serde(default, deserialize_with = "null_is_default")]
    username: String,
    #[serde(default, deserialize_with = "null_is_default")]
    password: String,
    #[serde(default, deserialize_with = "null_is_default")]
    identitytoken: String,
    #[serde(default, deserialize_with = "null_is_default")]
    registrytoken: String,
}

#[derive(Deserialize)]
#[serde(rename_all = "PascalCase")]
struct HelperAnswer {
    username: String,
    secret: String,
}

/// Finds the user's credential for a registry; `None` when there is none.
pub(crate) async fn find(registry: &str) -> Result<Option<Credential>, PullError> {
    let folder = std::env::var_os("DOCKER_CONFIG")
        .filter(|folder| !folder.is_empty())
        .map(PathBuf::from)
        .or_else(|| std::env::var_os("HOME").map(|home| Path::new(&home).join(".docker")));
    match folder {
        Some(folder) => find_in(&folder.join("config.json"), registry).await,
        None => Ok(None),
    }
}

async fn find_in(path: &Path, registry: &str) -> Result<Option<Credential>, PullError> {
    let failed = |why: String| PullError::Credentials { registry: registry.to_owned(), why };
    let file = match tokio::fs::File::open(path).await {
        Ok(file) => file,
        Err(error)
            if matches!(error.kind(), std::io::ErrorKind::NotFound | std::io::ErrorKind::NotADirectory) =>
        {
            return Ok(None);
        }
        Err(error) => return Err(failed(format!("cannot open {}: {error}", path.display()))),
    };
    let mut content = Vec::new();
    file.take(MAX_CONFIG_BYTES + 1)
        .read_to_end(&mut content)
        .await
        .map_err(|error| failed(format!("cannot read {}: {error}", path.display())))?;
    if content.len() as u64 > MAX_CONFIG_BYTES {
        return Err(failed(format!("{} has more than {MAX_CONFIG_BYTES} bytes", path.display())));
    }
    // Where the error is, not what it says: that can quote the file, and so a secret.
    let config: DockerConfig = serde_json::from_slice(&content).map_err(|error| {
        let (line, column) = (error.line(), error.column());
        failed(format!("{} is not a docker config: line {line}, column {column}", path.display()))
    })?;

    let keys = keys(registry);
    let helper = keys.iter().find_map(|key| config.cred_helpers.get(key)).map(String::as_str);
    let helper = helper.or(Some(config.creds_store.as_str())).filter(|name| !name.is_empty());
    if let Some(helper) = helper
        && let Some(credential) = ask_helper(helper, &keys[0]).await.map_err(failed)?
    {
        return Ok(Some(credential));
    }
    let entry = keys.iter().find_map(|key| config.auths.get(key)).or_else(|| {
        let named = |text: &str| keys.iter().any(|key| registry_of(key) == registry_of(text));
        config.auths.iter().find(|(key, _)| named(key)).map(|(_, entry)| entry)
    });
    entry.map_or(Ok(None), |entry| read_entry(entry).map_err(failed))
}

/// What a registry may be called in a config, the usual one first: what helpers are asked for.
fn keys(registry: &str) -> Vec<String> {
    let mut keys = Vec::new();
    if registry == "docker.io" {
        keys.extend([HUB_KEY, "index.docker.io", "registry-1.docker.io"].map(ToOwned::to_owned));
    }
    keys.push(registry.to_owned());
    keys.push(format!("https://{registry}"));
    keys
}

/// The host and port in a key, which may be an address with a path.
fn registry_of(key: &str) -> &str {
    let key = key.strip_prefix("https://").or_else(|| key.strip_prefix("http://")).unwrap_or(key);
    key.split('/').next().unwrap_or_default()
}

fn read_entry(entry: &AuthEntry) -> Result<Option<Credential>, String> {
    if !entry.registrytoken.is_empty() {
        return Ok(Some(Credential::RegistryToken(entry.registrytoken.clone())));
    }
    if !entry.identitytoken.is_empty() {
        return Ok(Some(Credential::IdentityToken(entry.identitytoken.clone())));
    }
    if entry.auth.is_empty() {
        let (user, password) = (entry.username.clone(), entry.password.clone());
        return Ok((!user.is_empty()).then_some(Credential::Password { user, password }));
    }
    let either = GeneralPurposeConfig::new().with_decode_padding_mode(DecodePaddingMode::Indifferent);
    let decoded = GeneralPurpose::new(&base64::alphabet::STANDARD, either).decode(entry.auth.trim());
    let decoded = decoded.ok().and_then(|bytes| String::from_utf8(bytes).ok());
    let (user, password) = decoded
        .as_deref()
        .and_then(|text| text.trim_end_matches('\0').split_once(':'))
        .ok_or("its \"auth\" in the docker config is not user:password in base64")?;
    Ok(Some(Credential::Password { user: user.to_owned(), password: password.to_owned() }))
}

async fn ask_helper(name: &str, server: &str) -> Result<Option<Credential>, String> {
    if !name.bytes().all(|byte| byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'_' | b'.')) {
        return Err(format!("{:?} is not the name of a credential helper", plain(name)));
    }
    let program = format!("docker-credential-{name}");
    let mut child = Command::new(&program)
        .arg("get")
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .kill_on_drop(true)
        .spawn()
        .map_err(|error| format!("cannot run {program}: {error}"))?;
    let (Some(mut input), Some(output)) = (child.stdin.take(), child.stdout.take()) else {
        return Err(format!("{program} has no pipes"));
    };
    let talk = async {
        // A helper that ends without reading breaks the pipe; what it said still counts.
        let _ = input.write_all(server.as_bytes()).await;
        drop(input);
        let mut said = Vec::new();
        output
            .take(MAX_HELPER_BYTES)
            .read_to_end(&mut said)
            .await
            .map_err(|error| format!("{program}: {error}"))?;
        let status = child.wait().await.map_err(|error| format!("{program}: {error}"))?;
        Ok::<_, String>((status, said))
    };
    let (status, said) = tokio::time::timeout(HELPER_TIMEOUT, talk)
        .await
        .map_err(|_| format!("{program} said nothing for {} s", HELPER_TIMEOUT.as_secs()))??;
    if !status.success() {
        let said = plain(String::from_utf8_lossy(&said));
        // The words docker-credential-helpers defines for "there is none", on standard output.
        if said.contains("credentials not found") {
            return Ok(None);
        }
        return Err(format!("{program} failed ({status}): {said}"));
    }
    let answer: HelperAnswer =
        serde_json::from_slice(&said).map_err(|_| format!("{program} gave no Username and Secret"))?;
    Ok(Some(if answer.username == "<token>" {
        Credential::IdentityToken(answer.secret)
    } else {
        Credential::Password { user: answer.username, password: answer.secret }
    }))
}

#[cfg(test)]
mod tests {
    use super::*;

    async fn find_with(config: &str, registry: &str) -> Result<Option<Credential>, PullError> {
        let folder = tempfile::tempdir().expect("a folder");
        let path = folder.path().join("config.json");
        std::fs::write(&path, config).expect("written");
        find_in(&path, registry).await
    }

    fn password(user: &str, password: &str) -> Credential {
        Credential::Password { user: user.to_owned(), password: password.to_owned() }
    }

    #[tokio::test]
    async fn auths_are_found_by_every_name_a_registry_has() {
        let auth = STANDARD.encode("me:pa:ss");
        for (key, registry) in [
            ("r.example", "r.example"),
            ("https://r.example", "r.example"),
            ("https://r.example/v2/", "r.example"),
            ("http://localhost:5000", "localhost:5000"),
            (HUB_KEY, "docker.io"),
            ("docker.io", "docker.io"),
            ("index.docker.io", "docker.io"),
        ] {
            let config = format!(r#"{{"auths": {{"other.example": {{}}, "{key}": {{"auth": "{auth}"}}}}}}"#);
            assert_eq!(
                find_with(&config, registry).await.expect(key),
                Some(password("me", "pa:ss")),
                "{key}"
            );
            assert_eq!(find_with(&config, "x.r.example").await.expect(key), None, "{key}");
            assert_eq!(find_with(&config, "r.example:444").await.expect(key), None, "{key}");
        }
    }

    #[tokio::test]
    async fn every_form_of_an_entry_is_read() {
        for (entry, expected) in [
            (r#""username": "u", "password": "p""#, Some(password("u", "p"))),
            (r#""auth": "dTpw""#, Some(password("u", "p"))),
            (r#""auth": "dTpwcA""#, Some(password("u", "pp"))),
            (r#""identitytoken": "t""#, Some(Credential::IdentityToken("t".to_owned()))),
            (r#""auth": "dTo=", "identitytoken": "t""#, Some(Credential::IdentityToken("t".to_owned()))),
            (r#""registrytoken": "t""#, Some(Credential::RegistryToken("t".to_owned()))),
            (r#""email": "x""#, None),
        ] {
            let config = format!(r#"{{"auths": {{"r.example": {{{entry}}}}}, "HttpHeaders": {{}}}}"#);
            assert_eq!(find_with(&config, "r.example").await.expect(entry), expected, "{entry}");
        }
    }

    #[tokio::test]
    async fn a_broken_config_is_an_error_that_shows_no_secret() {
        for config in [
            r#"{"auths": {"r.example": {"auth": "c2VjcmV0"}}}"#,
            r#"{"auths": {"r.example": {"auth": "hunter2%"}}}"#,
            r#"{"auths": {"r.example": {"auth": ["hunter2"]}}}"#,
            r#"{"auths": {"r.example": "hunter2"}}"#,
            "hunter2",
            r#"{"credsStore": "../x"}"#,
            r#"{"credsStore": "there-is-no-such-helper"}"#,
        ] {
            let error = find_with(config, "r.example").await.expect_err(config).to_string();
            assert!(error.contains("r.example"), "{error}");
            assert!(!error.contains("c2VjcmV0") && !error.contains("hunter2"), "{error}");
        }
        let missing = Path::new("/nonexistent/config.json");
        assert_eq!(find_in(missing, "r.example").await.expect("none is fine"), None);
    }

    #[test]
    fn a_credential_is_never_printed() {
        let credential = Credential::IdentityToken("secret".to_owned());
        assert!(!format!("{credential:?}").contains("secret"));
        let header = Credential::bearer("secret").expect("a header");
        assert!(!format!("{header:?}").contains("secret"));
    }
}
