//! The config of an image, from bytes nobody vouches for.
//!
//! OCI Image Specification 1.1, "Image Configuration"; Docker's are the same but for what Go leaves `null`.

use std::collections::BTreeMap;

use kiln_support::digest::Digest;
use serde::{Deserialize, Deserializer};

use crate::Platform;
use crate::manifest::{MAX_LAYERS, null_is_default};

/// The most bytes of a config.
pub const MAX_CONFIG_BYTES: u64 = 8 << 20;

/// How to run an image.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Config {
    /// The command that is always run; what a user gives follows as its arguments.
    pub entrypoint: Vec<String>,
    /// The command, or the arguments of [`Config::entrypoint`], when a user gives none.
    pub cmd: Vec<String>,
    /// The environment, as `NAME=value`.
    pub env: Vec<String>,
    /// `user`, `uid`, `user:group` or `uid:gid`; empty for root.
    pub user: String,
    /// The folder the command starts in; empty for `/`.
    pub working_dir: String,
    /// The signal that asks it to stop, such as `SIGTERM` or `15`.
    pub stop_signal: Option<String>,
    /// The ports it listens on, such as `80/tcp`.
    pub exposed_ports: Vec<String>,
    /// The folders that hold data.
    pub volumes: Vec<String>,
    /// Labels.
    pub labels: BTreeMap<String, String>,
}

/// All Kiln reads of an image's config.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ImageConfig {
    /// What it was built for; `None` when the config does not say.
    pub platform: Option<Platform>,
    /// When it was built, as RFC 3339 writes it.
    pub created: Option<String>,
    /// How to run it.
    pub run: Config,
    /// The digests of its layers' uncompressed content, from the lowest up.
    pub diff_ids: Vec<Digest>,
}

/// The bytes are no config of an image.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("malformed: {0}")]
pub struct ParseConfigError(String);

/// Reads the config of an image.
///
/// # Errors
/// When it is malformed or past a limit.
pub fn parse_config(bytes: &[u8]) -> Result<ImageConfig, ParseConfigError> {
    let malformed = |why: String| ParseConfigError(why);
    if bytes.len() as u64 > MAX_CONFIG_BYTES {
        return Err(malformed(format!("it has more than {MAX_CONFIG_BYTES} bytes")));
    }
    let raw: RawImage = serde_json::from_slice(bytes).map_err(|error| malformed(error.to_string()))?;
    if raw.rootfs.kind != "layers" {
        return Err(malformed(format!("rootfs.type is {:?}, expected \"layers\"", raw.rootfs.kind)));
    }
    if raw.rootfs.diff_ids.len() > MAX_LAYERS {
        return Err(malformed(format!("it has more than {MAX_LAYERS} layers")));
    }
    let diff_ids = raw.rootfs.diff_ids.iter().map(|text| text.parse());
    let platform = (!raw.os.is_empty() && !raw.architecture.is_empty())
        .then(|| Platform::new(&raw.os, &raw.architecture, &raw.variant));
    let run = raw.config;
    Ok(ImageConfig {
        platform,
        created: raw.created,
        run: Config {
            entrypoint: run.entrypoint,
            cmd: run.cmd,
            env: run.env,
            user: run.user,
            working_dir: run.working_dir,
            stop_signal: run.stop_signal.filter(|signal| !signal.is_empty()),
            exposed_ports: run.exposed_ports.into_iter().map(|(port, _)| port).collect(),
            volumes: run.volumes.into_iter().map(|(folder, _)| folder).collect(),
            labels: run.labels,
        },
        diff_ids: diff_ids
            .collect::<Result<_, _>>()
            .map_err(|error: kiln_support::digest::ParseDigestError| malformed(error.to_string()))?,
    })
}

#[derive(Deserialize)]
struct RawImage {
    #[serde(default, deserialize_with = "null_is_default")]
    os: String,
    #[serde(default, deserialize_with = "null_is_default")]
    architecture: String,
    #[serde(default, deserialize_with = "null_is_default")]
    variant: String,
    created: Option<String>,
    #[serde(default, deserialize_with = "null_is_default")]
    config: RawConfig,
    rootfs: RawRootfs,
}

#[derive(Deserialize)]
struct RawRootfs {
    #[serde(rename = "type", default)]
    kind: String,
    #[serde(default, deserialize_with = "null_is_default")]
    diff_ids: Vec<String>,
}

#[derive(Deserialize, Default)]
#[serde(rename_all = "PascalCase")]
struct RawConfig {
    #[serde(default, deserialize_with = "one_or_many")]
    entrypoint: Vec<String>,
    #[serde(default, deserialize_with = "one_or_many")]
    cmd: Vec<String>,
    #[serde(default, deserialize_with = "null_is_default")]
    env: Vec<String>,
    #[serde(default, deserialize_with = "null_is_default")]
    user: String,
    #[serde(default, deserialize_with = "null_is_default")]
    working_dir: String,
    stop_signal: Option<String>,
    #[serde(default, deserialize_with = "null_is_default")]
    exposed_ports: serde_json::Map<String, serde_json::Value>,
    #[serde(default, deserialize_with = "null_is_default")]
    volumes: serde_json::Map<String, serde_json::Value>,
    #[serde(default, deserialize_with = "null_is_default")]
    labels: BTreeMap<String, String>,
}

/// Old images have a command as one string, which Docker takes as the program's name.
fn one_or_many<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Vec<String>, D::Error> {
    #[derive(Deserialize)]
    #[serde(untagged)]
    enum OneOrMany {
        One(String),
        Many(Vec<String>),
    }
    Ok(match Option::<OneOrMany>::deserialize(deserializer)? {
        None => Vec::new(),
        Some(OneOrMany::One(one)) => vec![one],
        Some(OneOrMany::Many(many)) => many,
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use serde_json::json;

    fn parse(value: &serde_json::Value) -> Result<ImageConfig, ParseConfigError> {
        parse_config(&serde_json::to_vec(value).expect("JSON"))
    }

    #[test]
    fn every_field_is_read() {
        let config = parse(&json!({
            "os": "linux", "architecture": "arm64", "variant": "v8", "created": "2026-01-02T03:04:05Z",
            "config": {
                "Entrypoint": ["/entry", "-x"], "Cmd": ["a"], "Env": ["PATH=/bin", "E="], "User": "1000:50",
                "WorkingDir": "/work", "StopSignal": "SIGINT", "ExposedPorts": {"80/tcp": {}, "53/udp": {}},
                "Volumes": {"/data": {}}, "Labels": {"k": "v"},
            },
            "rootfs": {"type": "layers", "diff_ids": [Digest::of("1").to_string()]},
            "history": [{"created_by": "x"}],
        }))
        .expect("a config");
        assert_eq!(config.platform.as_ref().map(ToString::to_string).as_deref(), Some("linux/arm64"));
        assert_eq!(config.diff_ids, [Digest::of("1")]);
        assert_eq!(config.run.entrypoint, ["/entry", "-x"]);
        assert_eq!(config.run.cmd, ["a"]);
        assert_eq!(config.run.env, ["PATH=/bin", "E="]);
        assert_eq!((config.run.user.as_str(), config.run.working_dir.as_str()), ("1000:50", "/work"));
        assert_eq!(config.run.stop_signal.as_deref(), Some("SIGINT"));
        assert_eq!(config.run.exposed_ports, ["53/udp", "80/tcp"]);
        assert_eq!(config.run.volumes, ["/data"]);
        assert_eq!(config.run.labels.get("k").map(String::as_str), Some("v"));
    }

    #[test]
    fn null_and_absent_mean_nothing() {
        let null = json!({
            "os": "linux", "architecture": "amd64",
            "config": {
                "Entrypoint": null, "Cmd": null, "Env": null, "User": null, "WorkingDir": null, "StopSignal": "",
                "ExposedPorts": null, "Volumes": null, "Labels": null,
            },
            "rootfs": {"type": "layers", "diff_ids": null},
        });
        assert_eq!(parse(&null).expect("a config").run, Config::default());
        let absent = parse(&json!({"config": null, "rootfs": {"type": "layers"}})).expect("a config");
        assert_eq!((absent.run, absent.platform), (Config::default(), None));
    }

    #[test]
    fn a_command_in_one_string_is_a_program() {
        let config = json!({"config": {"Cmd": "/bin/sh -c x"}, "rootfs": {"type": "layers"}});
        assert_eq!(parse(&config).expect("a config").run.cmd, ["/bin/sh -c x"]);
    }

    #[test]
    fn a_malformed_config_is_refused() {
        for config in [
            json!({}),
            json!({"rootfs": {"type": "foreign"}}),
            json!({"rootfs": {"type": "layers", "diff_ids": ["sha256:no"]}}),
            json!({"rootfs": {"type": "layers", "diff_ids": vec![Digest::EMPTY.to_string(); MAX_LAYERS + 1]}}),
            json!({"rootfs": {"type": "layers"}, "config": {"Env": "PATH=/"}}),
            json!([]),
        ] {
            assert!(parse(&config).is_err(), "{config}");
        }
    }

    proptest! {
        #[test]
        fn parsing_bytes_never_panics(bytes: Vec<u8>) {
            let _ = parse_config(&bytes);
        }
    }
}
