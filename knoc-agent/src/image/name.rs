//! PURE: parses the name of an image in a registry as Docker and Kubernetes do.
//!
//! `[HOST[:PORT]/]PATH[:TAG][@DIGEST]`. The first part is a host if it contains a dot or a colon or
//! is `localhost`; otherwise the image is on Docker Hub. The case of a host means nothing, so that a name has it in
//! lower case. Names in the site's library are read as Apptainer reads them.

use std::{fmt, str::FromStr};

use super::digest::Digest;

const HUB: &str = "docker.io";
const HUB_LEGACY: &str = "index.docker.io";
/// The longest repository name that registries accept.
const MAX_REPOSITORY: usize = 255;
const MAX_TAG: usize = 128;
const MAX_HOST: usize = 255;

/// What the name of an image begins with that was pushed as a SIF file.
const ORAS: &str = "oras://";
/// What the name of a SIF file in a container library begins with.
pub(super) const LIBRARY: &str = "library://";
/// What a tag in a library begins with that is the digest of a file; its hexadecimal digits follow.
const HASH: &str = "sha256.";

/// Where an image is and in which form.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
enum Kind {
    /// A container image in a registry.
    Layers,
    /// A SIF file that was pushed to a registry.
    Pushed,
    /// A SIF file in the site's library.
    Library,
}

/// The name of an image in a registry, or in the site's library, whose host is then the registry.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Name {
    kind: Kind,
    registry: String,
    repository: String,
    tag: Option<String>,
    digest: Option<Digest>,
}

/// Why a text is not the name of an image.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum NameError {
    /// Nothing is left of the name without its tag and digest.
    #[error("repository name must have at least one component")]
    Empty,
    /// The part before the first slash is not a host.
    #[error("the registry must be HOST or HOST:PORT")]
    Registry,
    /// A part of the path is invalid.
    #[error(
        "repository name must consist of lower-case letters, digits, and single separators `.`, `_`, `__`, `-` between them"
    )]
    Repository,
    /// The path as a whole is too long.
    #[error("repository name must not be more than {MAX_REPOSITORY} characters")]
    TooLong,
    /// The tag after the colon is invalid.
    #[error(
        "a tag must be at most {MAX_TAG} letters, digits, `_`, `.` and `-`, and must not begin with `.` or `-`"
    )]
    Tag,
    /// The digest after the `@` is invalid.
    #[error("a digest must be sha256: or sha512: and lower-case hexadecimal digits")]
    Digest,
    /// The name has more parts than one in the site's library has.
    #[error(
        "it must be library://[HOST/]ENTITY/COLLECTION/CONTAINER[:TAG], and HOST that of images.library of the site file"
    )]
    Library,
}

impl Name {
    /// Parses `oras://…`, which is the name of a SIF file in a registry, `docker://…`, or a name without a scheme.
    pub fn of_pod(text: &str) -> Result<Self, NameError> {
        let (text, kind) = if let Some(text) = text.strip_prefix(ORAS) {
            (text, Kind::Pushed)
        } else {
            let text = text.strip_prefix("docker://").unwrap_or(text);
            (text, Kind::Layers)
        };
        Ok(Self {
            kind,
            ..text.parse()?
        })
    }

    /// Parses what follows `library://`: `[HOST/][[ENTITY/]COLLECTION/]CONTAINER[:TAG]`. `host` is that of the site's library.
    ///
    /// As in Apptainer, a name with up to three parts names no host, and the library fills in what is missing. But one that begins
    /// with the library's own host names it, so that a full name is never read as another one.
    pub fn of_library(text: &str, host: &str) -> Result<Self, NameError> {
        let (text, mut tag, mut digest) = split_version(text)?;
        let hex = tag.as_deref().and_then(|tag| tag.strip_prefix(HASH));
        let hash: Option<Digest> = hex.and_then(|hex| format!("sha256:{hex}").parse().ok());
        if digest.is_none() && hash.is_some() {
            (tag, digest) = (None, hash);
        }
        let named = text.split_once('/');
        let named = named.filter(|(first, _)| first.eq_ignore_ascii_case(host));
        let path = named.map_or(text, |(_, path)| path);
        if path.matches('/').count() > 2 {
            return Err(NameError::Library);
        }
        let place = (host.to_owned(), path.to_owned());
        Self::checked(Kind::Library, place, tag, digest)
    }

    fn checked(
        kind: Kind,
        (registry, repository): (String, String),
        tag: Option<String>,
        digest: Option<Digest>,
    ) -> Result<Self, NameError> {
        if !repository.split('/').all(is_part) {
            return Err(NameError::Repository);
        }
        if repository.len() > MAX_REPOSITORY {
            return Err(NameError::TooLong);
        }
        let tag = tag.or_else(|| digest.is_none().then(|| "latest".to_owned()));
        Ok(Self {
            kind,
            registry,
            repository,
            tag,
            digest,
        })
    }

    /// Checks that the registry has what the name says.
    pub fn fits(&self, sif: bool) -> Result<(), String> {
        match (self.kind, sif) {
            (Kind::Pushed | Kind::Library, true) | (Kind::Layers, false) => Ok(()),
            (Kind::Pushed | Kind::Library, false) => Err(format!(
                "this is a container image and not a SIF file: leave {} out",
                self.scheme()
            )),
            (Kind::Layers, true) => Err(format!(
                "this was pushed as a SIF file: write {ORAS} before its name"
            )),
        }
    }

    /// What its name begins with, if it is a SIF file.
    #[must_use]
    pub fn scheme(&self) -> &'static str {
        match self.kind {
            Kind::Layers => "",
            Kind::Pushed => ORAS,
            Kind::Library => LIBRARY,
        }
    }

    /// Whether it is in the site's library.
    #[must_use]
    pub fn in_library(&self) -> bool {
        self.kind == Kind::Library
    }

    /// The repository for which access to an image is recorded. A library is not the registry on the same host.
    #[must_use]
    pub fn owner(&self) -> String {
        let scheme = if self.in_library() { LIBRARY } else { "" };
        format!("{scheme}{}", self.repository_path())
    }

    /// What the site's policy is compared with: `HOST/PATH`. Of a short name in a library only the host, because what the library puts
    /// before it is not known here.
    #[must_use]
    pub fn policy_path(&self) -> String {
        if self.in_library() && self.repository.matches('/').count() < 2 {
            return self.registry.clone();
        }
        self.repository_path()
    }

    /// The host in lower case, with its port if the name has one.
    #[must_use]
    pub fn registry(&self) -> &str {
        &self.registry
    }

    /// The path in the registry.
    #[must_use]
    pub fn repository(&self) -> &str {
        &self.repository
    }

    /// The tag; present unless there is a digest.
    #[must_use]
    pub fn tag(&self) -> Option<&str> {
        self.tag.as_deref()
    }

    /// The digest, if the name has one.
    #[must_use]
    pub fn digest(&self) -> Option<&Digest> {
        self.digest.as_ref()
    }

    /// The full name, with the defaults filled in.
    #[must_use]
    pub fn whole(&self) -> String {
        self.to_string()
    }

    /// The reference for requests to a registry: the digest, or else the tag.
    #[must_use]
    pub fn version(&self) -> String {
        let digest = self.digest.as_ref().map(ToString::to_string);
        digest.or_else(|| self.tag.clone()).unwrap_or_default()
    }

    /// `HOST/PATH`.
    #[must_use]
    pub fn repository_path(&self) -> String {
        format!("{}/{}", self.registry, self.repository)
    }

    /// The same repository at that digest.
    #[must_use]
    pub fn at(&self, digest: &Digest) -> Self {
        Self {
            tag: None,
            digest: Some(digest.clone()),
            ..self.clone()
        }
    }
}

impl fmt::Display for Name {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}{}/{}", self.scheme(), self.registry, self.repository)?;
        if let Some(tag) = &self.tag {
            write!(f, ":{tag}")?;
        }
        match &self.digest {
            Some(digest) => write!(f, "@{digest}"),
            None => Ok(()),
        }
    }
}

impl FromStr for Name {
    type Err = NameError;

    fn from_str(text: &str) -> Result<Self, NameError> {
        let (text, tag, digest) = split_version(text)?;
        Self::checked(Kind::Layers, split_host(text)?, tag, digest)
    }
}

/// Splits the tag and the digest off.
fn split_version(text: &str) -> Result<(&str, Option<String>, Option<Digest>), NameError> {
    let (text, digest) = match text.split_once('@') {
        Some((rest, digest)) => {
            let digest = digest.parse().map_err(|_| NameError::Digest)?;
            (rest, Some(digest))
        }
        None => (text, None),
    };
    let last = text.rfind('/').map_or(0, |slash| slash + 1);
    let (text, tag) = match text.get(last..).and_then(|part| part.split_once(':')) {
        // A colon without a slash after it begins the tag.
        Some((part, tag)) => (&text[..last + part.len()], Some(tag.to_owned())),
        None => (text, None),
    };
    if tag.as_deref().is_some_and(|tag| !is_tag(tag)) {
        return Err(NameError::Tag);
    }
    if text.is_empty() {
        return Err(NameError::Empty);
    }
    Ok((text, tag, digest))
}

fn split_host(text: &str) -> Result<(String, String), NameError> {
    let host = text
        .split_once('/')
        .filter(|(host, _)| host.contains(['.', ':']) || host.eq_ignore_ascii_case("localhost"));
    let (host, path) = host.unwrap_or((HUB, text));
    if !is_host(host) {
        return Err(NameError::Registry);
    }
    let host = registry(host);
    let path = if host == HUB && !path.contains('/') {
        format!("library/{path}")
    } else {
        path.to_owned()
    };
    Ok((host, path))
}

/// The one form of a registry's host in names, in which hosts are compared.
pub(super) fn registry(host: &str) -> String {
    let host = host.to_ascii_lowercase();
    if host == HUB_LEGACY {
        HUB.to_owned()
    } else {
        host
    }
}

/// The beginning of images' names, from the site file, in the form in which names have it.
pub(super) fn prefix(text: &str) -> String {
    let text = text.trim_end_matches('/');
    let (host, path) = text.split_at(text.find('/').unwrap_or(text.len()));
    format!("{}{path}", registry(host))
}

/// Whether the text is `HOST`, `HOST:PORT` or `[IPv6]:PORT`.
pub(super) fn is_host(text: &str) -> bool {
    if text.len() > MAX_HOST {
        return false;
    }
    let (host, port) = match text.strip_prefix('[').and_then(|rest| rest.split_once(']')) {
        Some((address, rest)) => {
            if address.parse::<std::net::Ipv6Addr>().is_err() {
                return false;
            }
            let port = rest.strip_prefix(':');
            return (rest.is_empty() && port.is_none()) || port.is_some_and(is_port);
        }
        None => match text.split_once(':') {
            Some((host, port)) => (host, Some(port)),
            None => (text, None),
        },
    };
    let label = |label: &str| {
        let plain = |byte: u8| byte.is_ascii_alphanumeric() || byte == b'-';
        !label.is_empty()
            && label.bytes().all(plain)
            && !label.starts_with('-')
            && !label.ends_with('-')
    };
    host.split('.').all(label) && port.is_none_or(is_port)
}

fn is_port(text: &str) -> bool {
    text.bytes().all(|byte| byte.is_ascii_digit()) && text.parse::<u16>().is_ok_and(|port| port > 0)
}

fn is_tag(text: &str) -> bool {
    let word = |byte: u8| byte.is_ascii_alphanumeric() || byte == b'_';
    text.len() <= MAX_TAG
        && text.bytes().next().is_some_and(word)
        && text.bytes().all(|byte| word(byte) || b".-".contains(&byte))
}

/// Whether the text consists of letters and digits with `.`, `_`, `__` or any number of `-` between
/// them.
fn is_part(text: &str) -> bool {
    let alphanumeric = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit();
    let ends = text.starts_with(alphanumeric) && text.ends_with(alphanumeric);
    let separator = |run: &str| {
        run.is_empty() || matches!(run, "." | "_" | "__") || run.bytes().all(|byte| byte == b'-')
    };
    ends && text.split(alphanumeric).all(separator)
}
