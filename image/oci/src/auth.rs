//! What a registry wants to be shown, and getting it: challenges and bearer tokens.
//!
//! Distribution's "Token Authentication Specification" and "OAuth 2.0 Token Authentication". A token service may live
//! on another host; the user's credentials go there because the registry they are for named it, as every client
//! does, and over TLS unless the service is on this machine.

use bytes::Bytes;
use http::header::{ACCEPT, CONTENT_TYPE, HeaderMap, HeaderValue, WWW_AUTHENTICATE};
use http::{Method, Uri};
use serde::Deserialize;

use crate::credentials::Credential;
use crate::error::plain;
use crate::http::{Http, HttpError};

/// The most bytes a token service may answer with.
const MAX_TOKEN_BYTES: u64 = 1 << 20;
/// The most challenges read of one answer.
const MAX_CHALLENGES: usize = 8;

/// One way a registry takes to be shown something. RFC 9110 §11.6.1 "WWW-Authenticate".
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Challenge {
    /// Name and password.
    Basic,
    /// A token from a service.
    Bearer(TokenService),
}

/// Where a token is had, and for what.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct TokenService {
    pub(crate) realm: String,
    pub(crate) service: Option<String>,
    pub(crate) scope: Option<String>,
}

/// Why there is no token.
#[derive(Debug)]
pub(crate) enum TokenError {
    /// The service cannot be asked.
    Http(HttpError),
    /// The service says no.
    Denied(String),
    /// The service answers with an error, which may pass when `transient`.
    Failed { why: String, transient: bool },
}

#[derive(Deserialize)]
struct TokenAnswer {
    token: Option<String>,
    access_token: Option<String>,
}

/// The challenges in an answer's headers, those not understood left out.
pub(crate) fn challenges(headers: &HeaderMap) -> Vec<Challenge> {
    headers
        .get_all(WWW_AUTHENTICATE)
        .iter()
        .filter_map(|value| value.to_str().ok())
        .flat_map(parse)
        .take(MAX_CHALLENGES)
        .collect()
}

/// Reads `Bearer realm="…",scope="a,b", Basic realm="…"`.
fn parse(text: &str) -> Vec<Challenge> {
    let mut found: Vec<(String, Vec<(String, String)>)> = Vec::new();
    let mut rest = text.trim_start();
    while !rest.is_empty() {
        let (word, after) = rest.split_at(rest.find([' ', ',', '=', '\t']).unwrap_or(rest.len()));
        let after_space = after.trim_start();
        if let (Some(value), false) = (after_space.strip_prefix('='), word.is_empty()) {
            let Some((value, after)) = parameter(value.trim_start()) else { break };
            if let Some((_, parameters)) = found.last_mut() {
                parameters.push((word.to_ascii_lowercase(), value));
            }
            rest = after;
        } else {
            if !word.is_empty() {
                found.push((word.to_ascii_lowercase(), Vec::new()));
            }
            rest = after;
        }
        rest = rest.trim_start_matches([' ', ',', '\t']);
        if found.len() > MAX_CHALLENGES || (word.is_empty() && rest.starts_with('=')) {
            break;
        }
    }
    found
        .into_iter()
        .filter_map(|(scheme, mut parameters)| {
            let mut take = |name: &str| {
                let at = parameters.iter().position(|(found, _)| found == name)?;
                Some(parameters.swap_remove(at).1)
            };
            match scheme.as_str() {
                "basic" => Some(Challenge::Basic),
                "bearer" => {
                    let realm = take("realm")?;
                    Some(Challenge::Bearer(TokenService {
                        realm,
                        service: take("service"),
                        scope: take("scope"),
                    }))
                }
                _ => None,
            }
        })
        .collect()
}

/// Reads a value, quoted or not, and gives what follows it.
fn parameter(text: &str) -> Option<(String, &str)> {
    let Some(quoted) = text.strip_prefix('"') else {
        let (value, rest) = text.split_at(text.find([',', ' ', '\t']).unwrap_or(text.len()));
        return Some((value.to_owned(), rest));
    };
    let mut value = String::new();
    let mut characters = quoted.char_indices();
    while let Some((at, character)) = characters.next() {
        match character {
            '"' => return Some((value, &quoted[at + 1..])),
            '\\' => value.push(characters.next()?.1),
            other => value.push(other),
        }
    }
    None
}

/// Gets a token for `scope` from the service a registry named.
pub(crate) async fn token(
    http: &Http,
    service: &TokenService,
    scope: &str,
    credential: Option<&Credential>,
) -> Result<HeaderValue, TokenError> {
    let final_failure = |why: String| TokenError::Failed { why, transient: false };
    let realm: Uri = service
        .realm
        .parse()
        .map_err(|_| final_failure(format!("the realm {:?} is no address", plain(&service.realm))))?;
    let mut fields = Vec::new();
    if let Some(service) = &service.service {
        fields.push(("service", service.as_str()));
    }
    fields.push(("scope", service.scope.as_deref().unwrap_or(scope)));

    let mut headers = HeaderMap::new();
    headers.insert(ACCEPT, HeaderValue::from_static("application/json"));
    let answer = if let Some(Credential::IdentityToken(identity)) = credential {
        fields.extend([
            ("grant_type", "refresh_token"),
            ("client_id", "kiln"),
            ("refresh_token", identity.as_str()),
        ]);
        headers.insert(CONTENT_TYPE, HeaderValue::from_static("application/x-www-form-urlencoded"));
        let form = Bytes::from(form(&fields));
        http.send(Method::POST, &realm, &headers, None, form).await
    } else {
        let authorization = match credential {
            Some(Credential::Password { user, password }) => Credential::basic(user, password),
            _ => None,
        };
        let separator = if realm.query().is_some() { '&' } else { '?' };
        let url: Uri = format!("{realm}{separator}{}", form(&fields))
            .parse()
            .map_err(|_| final_failure("the token service's address is too long".to_owned()))?;
        http.send(Method::GET, &url, &headers, authorization.as_ref(), Bytes::new()).await
    };
    let answer = answer.map_err(TokenError::Http)?;
    let status = answer.status;
    let content = answer.body.read(MAX_TOKEN_BYTES).await.map_err(TokenError::Http)?;
    match status.as_u16() {
        200..=299 => {}
        400 | 401 | 403 => {
            return Err(TokenError::Denied(format!(
                "the token service at {} says {status}",
                service_host(&realm)
            )));
        }
        code => {
            return Err(TokenError::Failed {
                why: format!("the token service at {} says {status}", service_host(&realm)),
                transient: code == 429 || code >= 500,
            });
        }
    }
    let answer: TokenAnswer = serde_json::from_slice(&content)
        .map_err(|_| final_failure("the token service's answer is not what it should be".to_owned()))?;
    answer
        .token
        .or(answer.access_token)
        .filter(|token| !token.is_empty())
        .and_then(|token| Credential::bearer(&token))
        .ok_or_else(|| final_failure("the token service's answer has no token".to_owned()))
}

fn service_host(realm: &Uri) -> String {
    plain(realm.host().unwrap_or_default())
}

/// `application/x-www-form-urlencoded`. WHATWG URL Standard §5.2 "application/x-www-form-urlencoded serializing".
fn form(fields: &[(&str, &str)]) -> String {
    let mut text = String::new();
    for (name, value) in fields {
        if !text.is_empty() {
            text.push('&');
        }
        for (part, separator) in [(name, "="), (value, "")] {
            for byte in part.bytes() {
                if byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'.' | b'_' | b'*') {
                    text.push(char::from(byte));
                } else {
                    text.push('%');
                    for digit in [byte >> 4, byte & 15] {
                        text.push(char::from(b"0123456789ABCDEF"[usize::from(digit)]));
                    }
                }
            }
            text.push_str(separator);
        }
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn bearer(realm: &str, service: Option<&str>, scope: Option<&str>) -> Challenge {
        Challenge::Bearer(TokenService {
            realm: realm.to_owned(),
            service: service.map(ToOwned::to_owned),
            scope: scope.map(ToOwned::to_owned),
        })
    }

    #[test]
    fn challenges_are_read_in_every_form_servers_write() {
        for (text, expected) in [
            (
                r#"Bearer realm="https://auth.example/token",service="r.example",scope="repository:a/b:pull,push""#,
                vec![bearer(
                    "https://auth.example/token",
                    Some("r.example"),
                    Some("repository:a/b:pull,push"),
                )],
            ),
            (r#"Basic realm="x""#, vec![Challenge::Basic]),
            ("Basic", vec![Challenge::Basic]),
            (r#"bearer Realm = "a\"b" , service=x"#, vec![bearer("a\"b", Some("x"), None)]),
            (
                r#"Negotiate, Basic realm="x", charset="UTF-8", Bearer realm="https://y""#,
                vec![Challenge::Basic, bearer("https://y", None, None)],
            ),
            (r#"Bearer service="no realm""#, vec![]),
            (r#"Bearer realm="cut"#, vec![]),
            ("", vec![]),
            ("=, =", vec![]),
        ] {
            assert_eq!(parse(text), expected, "{text}");
        }
    }

    #[test]
    fn fields_cannot_break_out_of_a_form() {
        assert_eq!(
            form(&[("scope", "repository:a/b:pull"), ("x", "&y=é")]),
            "scope=repository%3Aa%2Fb%3Apull&x=%26y%3D%C3%A9"
        );
    }

    proptest! {
        #[test]
        fn reading_a_challenge_never_panics_and_ends(text in "[\\PC]{0,60}|[a-cB =,\"\\\\]{0,60}") {
            let _ = parse(&text);
        }
    }
}
