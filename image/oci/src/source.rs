//! Where an image comes from: a registry, or files on this machine.

use std::fmt;
use std::path::{Path, PathBuf};
use std::str::FromStr;

use crate::{ParseReferenceError, Reference};

/// Where an image comes from, as a user writes it.
///
/// | written | meant |
/// |---|---|
/// | `debian:12` | an image in a registry |
/// | `oci-layout:DIR[:TAG]` | an OCI layout in a folder |
/// | `oci-archive:FILE[:TAG]` | an OCI layout in a tar file |
/// | `docker-archive:FILE[:NAME]` | what `docker save` writes |
///
/// The path ends at its first colon. Displayed with the path made absolute: the name the store knows the image by.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub enum Source {
    /// An image in a registry.
    Registry(Reference),
    /// An OCI layout in a folder, and the name of the image in it; it can be left out when there is just one.
    OciLayout(PathBuf, Option<String>),
    /// An OCI layout in a tar file.
    OciArchive(PathBuf, Option<String>),
    /// What `docker save` writes.
    DockerArchive(PathBuf, Option<String>),
}

/// The text says no source of an image.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ParseSourceError {
    /// It is no name of an image in a registry.
    #[error(transparent)]
    Reference(#[from] ParseReferenceError),
    /// It names no file.
    #[error("{0:?} names no file: expected {0}PATH or {0}PATH:NAME")]
    NoPath(&'static str),
}

impl Source {
    fn kind(&self) -> &'static str {
        match self {
            Self::Registry(_) => "",
            Self::OciLayout(..) => "oci-layout:",
            Self::OciArchive(..) => "oci-archive:",
            Self::DockerArchive(..) => "docker-archive:",
        }
    }
}

impl fmt::Display for Source {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (path, name) = match self {
            Self::Registry(reference) => return reference.fmt(f),
            Self::OciLayout(path, name) | Self::OciArchive(path, name) | Self::DockerArchive(path, name) => {
                (path, name)
            }
        };
        let path = std::path::absolute(path).unwrap_or_else(|_| path.clone());
        write!(f, "{}{}", self.kind(), path.display())?;
        match name {
            Some(name) => write!(f, ":{name}"),
            None => Ok(()),
        }
    }
}

impl FromStr for Source {
    type Err = ParseSourceError;

    fn from_str(text: &str) -> Result<Self, ParseSourceError> {
        type Make = fn(PathBuf, Option<String>) -> Source;
        let kinds: [(&'static str, Make); 3] = [
            ("oci-layout:", Self::OciLayout),
            ("oci-archive:", Self::OciArchive),
            ("docker-archive:", Self::DockerArchive),
        ];
        for (kind, make) in kinds {
            let Some(rest) = text.strip_prefix(kind) else { continue };
            let (path, name) = match rest.split_once(':') {
                Some((path, name)) => (path, (!name.is_empty()).then(|| name.to_owned())),
                None => (rest, None),
            };
            if path.is_empty() {
                return Err(ParseSourceError::NoPath(kind));
            }
            return Ok(make(Path::new(path).to_owned(), name));
        }
        Ok(Self::Registry(text.parse()?))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_source_is_read_by_its_kind() {
        let source = |text: &str| text.parse::<Source>();
        assert_eq!(source("oci-layout:/a/b"), Ok(Source::OciLayout("/a/b".into(), None)));
        assert_eq!(source("oci-layout:/a/b:v1"), Ok(Source::OciLayout("/a/b".into(), Some("v1".to_owned()))));
        assert_eq!(
            source("docker-archive:x.tar:debian:12"),
            Ok(Source::DockerArchive("x.tar".into(), Some("debian:12".to_owned())))
        );
        assert_eq!(source("oci-archive:"), Err(ParseSourceError::NoPath("oci-archive:")));
        assert!(matches!(source("debian"), Ok(Source::Registry(_))));
        assert!(source("oci:x:y").is_err());
    }

    #[test]
    fn the_full_form_has_an_absolute_path() {
        let source: Source = "oci-layout:some/dir:v1".parse().expect("a source");
        let here = std::env::current_dir().expect("a folder");
        assert_eq!(source.to_string(), format!("oci-layout:{}/some/dir:v1", here.display()));
    }
}
