//! Platforms, and which of an index's images fits one.

use std::fmt;
use std::str::FromStr;

/// What an image was built for: `linux/amd64`, `linux/arm64/v8`. Kept in OCI's words, whatever words were read.
///
/// OCI Image Specification 1.1, "Image Index", "Platform Variants".
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Platform {
    /// The operating system, `linux`.
    pub os: String,
    /// The architecture as Go names it: `amd64`, `arm64`.
    pub architecture: String,
    /// The architecture's variant, `None` for the least one: `amd64` is v1, `arm64` is v8, `arm` is v7.
    pub variant: Option<String>,
}

/// The text is no platform.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{0:?} is not a platform: expected OS/ARCHITECTURE or OS/ARCHITECTURE/VARIANT, such as linux/amd64")]
pub struct ParsePlatformError(String);

impl Platform {
    /// The platform of a machine on this host, in the architecture's least variant.
    ///
    /// The least because the guest can have less than the host: where KVM has no hardware virtualization, the guest
    /// has no AVX. Whoever knows better says `linux/amd64/v3`.
    pub fn host() -> Self {
        Self::new("linux", std::env::consts::ARCH, "")
    }

    /// The platform these words mean; empty words mean nothing said.
    pub fn new(os: &str, architecture: &str, variant: &str) -> Self {
        let os = os.to_ascii_lowercase();
        let architecture = architecture.to_ascii_lowercase();
        let variant = variant.to_ascii_lowercase();
        let (architecture, variant) = match (architecture.as_str(), variant.as_str()) {
            ("x86_64" | "x86-64" | "amd64", "" | "v1" | "1") => ("amd64", ""),
            ("x86_64" | "x86-64" | "amd64", variant) => ("amd64", variant),
            ("aarch64" | "arm64", "" | "v8" | "8") => ("arm64", ""),
            ("aarch64" | "arm64", variant) => ("arm64", variant),
            ("armhf", _) | ("arm", "" | "v7" | "7") => ("arm", ""),
            ("armel", _) => ("arm", "v6"),
            ("i386" | "i686" | "x86", variant) => ("386", variant),
            (architecture, variant) => (architecture, variant),
        };
        Self {
            os,
            architecture: architecture.to_owned(),
            variant: (!variant.is_empty()).then(|| variant.to_owned()),
        }
    }

    /// How well an image built for `built` runs where `self` is wanted: higher is better, `None` not at all.
    ///
    /// A lower variant of the same architecture runs on a higher one.
    pub fn fit(&self, built: &Self) -> Option<u32> {
        if self.os != built.os || self.architecture != built.architecture {
            return None;
        }
        if self.variant == built.variant {
            return Some(u32::MAX);
        }
        let level = |platform: &Self| -> Option<u32> {
            match (&platform.variant, platform.architecture.as_str()) {
                (None, "amd64") => Some(1),
                (None, "arm64") => Some(8),
                (None, "arm") => Some(7),
                (None, _) => Some(0),
                (Some(variant), _) => variant.strip_prefix('v')?.parse().ok(),
            }
        };
        let (wanted, built) = (level(self)?, level(built)?);
        (built <= wanted).then_some(built)
    }
}

impl fmt::Display for Platform {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.os, self.architecture)?;
        match &self.variant {
            Some(variant) => write!(f, "/{variant}"),
            None => Ok(()),
        }
    }
}

impl FromStr for Platform {
    type Err = ParsePlatformError;

    fn from_str(text: &str) -> Result<Self, ParsePlatformError> {
        let words: Vec<&str> = text.split('/').collect();
        let good = |word: &&str| {
            !word.is_empty()
                && word.len() <= 32
                && word.bytes().all(|byte| byte.is_ascii_alphanumeric() || matches!(byte, b'_' | b'-'))
        };
        if !words.iter().all(good) {
            return Err(ParsePlatformError(text.chars().take(100).collect()));
        }
        match words[..] {
            [os, architecture] => Ok(Self::new(os, architecture, "")),
            [os, architecture, variant] => Ok(Self::new(os, architecture, variant)),
            _ => Err(ParsePlatformError(text.chars().take(100).collect())),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn platform(text: &str) -> Platform {
        text.parse().expect(text)
    }

    #[test]
    fn many_words_mean_the_same_platform() {
        for (text, meant) in [
            ("linux/x86_64", "linux/amd64"),
            ("Linux/AMD64/v1", "linux/amd64"),
            ("linux/aarch64", "linux/arm64"),
            ("linux/arm64/v8", "linux/arm64"),
            ("linux/arm/v7", "linux/arm"),
            ("linux/armhf", "linux/arm"),
            ("linux/i386", "linux/386"),
            ("linux/amd64/v3", "linux/amd64/v3"),
        ] {
            assert_eq!(platform(text).to_string(), meant);
        }
        for text in ["", "linux", "linux/", "/amd64", "linux/amd64/v1/x", "linux/a md", "linux/../x"] {
            assert!(text.parse::<Platform>().is_err(), "{text}");
        }
    }

    #[test]
    fn the_highest_variant_that_runs_fits_best() {
        let best = |wanted: &str, built: &[&str]| -> Option<String> {
            let wanted = platform(wanted);
            built
                .iter()
                .map(|text| platform(text))
                .filter_map(|built| Some((wanted.fit(&built)?, built)))
                .max_by_key(|(fit, _)| *fit)
                .map(|(_, built)| built.to_string())
        };
        let amd64 = ["linux/amd64/v2", "linux/amd64", "linux/amd64/v3", "linux/arm64", "windows/amd64"];
        assert_eq!(best("linux/amd64", &amd64).as_deref(), Some("linux/amd64"));
        assert_eq!(best("linux/amd64/v2", &amd64).as_deref(), Some("linux/amd64/v2"));
        assert_eq!(best("linux/amd64/v4", &amd64).as_deref(), Some("linux/amd64/v3"));
        assert_eq!(best("linux/amd64", &["linux/amd64/v2", "linux/386"]), None);
        assert_eq!(best("linux/arm/v7", &["linux/arm/v6", "linux/arm/v5"]).as_deref(), Some("linux/arm/v6"));
        assert_eq!(best("linux/arm/v6", &["linux/arm/v7"]), None);
        assert_eq!(best("linux/arm64/v9", &["linux/arm64/v8"]).as_deref(), Some("linux/arm64"));
        assert_eq!(best("linux/riscv64", &amd64), None);
    }
}
