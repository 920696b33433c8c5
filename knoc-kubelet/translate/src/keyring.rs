//! PURE: finds the credentials of a pod's `imagePullSecrets` that fit its images, as the kubelet's keyring does.
//!
//! A Secret lists credentials by location: a registry's host, which may contain wildcards, and the beginning of a
//! path. All locations that match an image are tried, the most specific one first. A location's port must be the
//! image's; the case of a host means nothing, here and in the image's name. The Secrets of a service account are among
//! those of the pod, because admission copies them there.

use std::{
    collections::{BTreeMap, BTreeSet},
    fmt,
};

use base64::{
    Engine as _,
    engine::general_purpose::{STANDARD, STANDARD_NO_PAD},
};
use k8s_openapi::api::core::v1::{Pod, Secret};
use knoc_proto::pb::{self, RegistryLogin};
use serde::Deserialize;

use crate::carried::PodSpec;

const JSON_TYPE: &str = "kubernetes.io/dockerconfigjson";
const JSON_KEY: &str = ".dockerconfigjson";
const LEGACY_TYPE: &str = "kubernetes.io/dockercfg";
const LEGACY_KEY: &str = ".dockercfg";
/// The keys of a Secret that are read.
pub(crate) const KEYS: [&str; 2] = [JSON_KEY, LEGACY_KEY];
/// The location that stands for Docker Hub, apart from `docker.io`.
const HUB: &str = "index.docker.io";
/// How many credentials are tried for one image at most.
const MAX_TRIES: usize = 32;
/// How many bytes the credentials for all images have together at most. They are sent with the rest of the pod, and the same ones may
/// fit thousands of images.
const MOST: usize = 2 << 20;

/// A Secret that names credentials which cannot be read. The text contains nothing of its content.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("image pull secret \"{name}\": {key}{why}")]
pub struct BadSecret {
    /// The Secret's name.
    pub name: String,
    /// The key in its data.
    pub key: &'static str,
    /// What is wrong.
    pub why: String,
}

/// The credentials for a pod's images, and what was not used.
#[derive(Clone, Default)]
pub struct PullCredentials {
    /// The credentials by image.
    pub credentials: pb::PullCredentials,
    /// Names of Secrets that do not exist.
    pub missing: Vec<String>,
    /// One sentence for each Secret that exists and holds no credentials.
    pub unused: Vec<String>,
}

/// Shows no credentials.
impl fmt::Debug for PullCredentials {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("PullCredentials")
            .field("missing", &self.missing)
            .field("unused", &self.unused)
            .finish_non_exhaustive()
    }
}

/// The names of the pod's pull secrets, in their order.
#[must_use]
pub fn pull_secrets(pod: &Pod) -> Vec<String> {
    pod.spec
        .as_ref()
        .map_or_else(Vec::new, |spec| names(PodSpec::from(spec)))
}

pub(crate) fn names(spec: PodSpec<'_>) -> Vec<String> {
    let mut seen = BTreeSet::new();
    let secrets = spec.image_pull_secrets.iter().flatten();
    let names = secrets.map(|secret| secret.name.clone());
    names
        .filter(|name| !name.is_empty() && seen.insert(name.clone()))
        .collect()
}

/// The credentials for the images of the pod, from those of its pull secrets that were found.
pub fn pull_credentials(
    pod: &Pod,
    secrets: &BTreeMap<String, Secret>,
) -> Result<PullCredentials, BadSecret> {
    let mut found = PullCredentials::default();
    let Some(spec) = pod.spec.as_ref().map(PodSpec::from) else {
        return Ok(found);
    };
    let mut keyring = Keyring::default();
    for name in names(spec) {
        let Some(secret) = secrets.get(&name) else {
            found.missing.push(name);
            continue;
        };
        match auths(&name, secret)? {
            Some(auths) => keyring.add(secret, auths),
            None => found.unused.push(format!(
                "The image pull secret {name} is not used: it must have the type {JSON_TYPE} and the key {JSON_KEY}, or the type \
                 {LEGACY_TYPE} and the key {LEGACY_KEY}."
            )),
        }
    }
    let images: BTreeSet<_> = spec.all_images().into_iter().collect();
    let mut left = MOST;
    for image in images {
        let name = repository(&image);
        let logins = name.map_or_else(Vec::new, |name| keyring.look_up(&name));
        if logins.is_empty() {
            continue;
        }
        let Some(rest) = left.checked_sub(logins.iter().map(size).sum()) else {
            let image = knoc_proto::text::quote(&image, 200);
            found.unused.push(format!(
                "The credentials for the images of the pod have more than 2 MiB together: there are none for {image} and those after it."
            ));
            break;
        };
        left = rest;
        let of_image = pb::ImageCredentials { image, logins };
        found.credentials.images.push(of_image);
    }
    Ok(found)
}

fn size(login: &RegistryLogin) -> usize {
    login.username.len() + login.password.len() + login.secret_uid.len()
}

/// A user name and a password, as a Secret has them.
#[derive(Default, Deserialize)]
struct Entry {
    username: Option<String>,
    password: Option<String>,
    /// `USERNAME:PASSWORD` in base64, which replaces the other two.
    auth: Option<String>,
}

/// User names and passwords by location.
type Pairs = BTreeMap<String, (String, String)>;

/// The entries of a Secret, or `None` if it is not a Secret for pulling images.
fn auths(name: &str, secret: &Secret) -> Result<Option<Pairs>, BadSecret> {
    #[derive(Deserialize)]
    struct Whole {
        auths: Option<BTreeMap<String, Option<Entry>>>,
    }
    let key = match secret.type_.as_deref() {
        Some(JSON_TYPE) => JSON_KEY,
        Some(LEGACY_TYPE) => LEGACY_KEY,
        Some(_) | None => return Ok(None),
    };
    let bad = |why: String| BadSecret {
        name: name.to_owned(),
        key,
        why,
    };
    let data = secret.data.as_ref().and_then(|data| data.get(key));
    let Some(data) = data.filter(|data| !data.0.is_empty()) else {
        return Ok(None);
    };
    let read = if key == JSON_KEY {
        serde_json::from_slice(&data.0).map(|whole: Whole| whole.auths.unwrap_or_default())
    } else {
        serde_json::from_slice(&data.0)
    };
    // The error's own text may quote a password.
    let read: BTreeMap<String, Option<Entry>> = read.map_err(|error| {
        let (line, column) = (error.line(), error.column());
        bad(format!(
            " is not a Docker configuration (line {line}, column {column})"
        ))
    })?;
    let pairs = read.into_iter().map(|(location, auth)| {
        // A location may be a URL that contains a password.
        let shown = location.rsplit('@').next().unwrap_or_default();
        let why = format!("[{shown:?}].auth is not USERNAME:PASSWORD in base64");
        let pair = auth.unwrap_or_default().pair().ok_or_else(|| bad(why))?;
        if pair.0.len() + pair.1.len() > pb::RegistryLogin::MAX_LENGTH {
            let most = pb::RegistryLogin::MAX_LENGTH;
            return Err(bad(format!("[{shown:?}] is longer than {most} bytes")));
        }
        Ok((location, pair))
    });
    pairs.collect::<Result<_, _>>().map(Some)
}

impl Entry {
    fn pair(self) -> Option<(String, String)> {
        let text = self.auth.unwrap_or_default();
        let text = text.trim();
        if text.is_empty() {
            let username = self.username.unwrap_or_default();
            return Some((username, self.password.unwrap_or_default()));
        }
        let bytes = if text.ends_with('=') {
            STANDARD.decode(text)
        } else {
            STANDARD_NO_PAD.decode(text)
        };
        let text = String::from_utf8(bytes.ok()?).ok()?;
        let (username, password) = text.split_once(':')?;
        Some((username.to_owned(), password.to_owned()))
    }
}

/// Where credentials are valid: a host, which may contain wildcards, with or without a port, and the beginning of a path.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
struct Location(String);

impl Location {
    fn of(text: &str) -> Self {
        let bare = match text.split_once("://") {
            Some((scheme, rest)) if is_web(scheme) => rest,
            Some(_) | None => text,
        };
        let bare = bare.split(['?', '#']).next().unwrap_or_default();
        let (host, path) = split(bare);
        // The addresses of a registry's API stand for the registry.
        let api = path.starts_with("/v1/") || path.starts_with("/v2/");
        let path = if api {
            path.get(3..).unwrap_or_default()
        } else {
            path
        };
        let path = if path == "/" { "" } else { path };
        Self(format!("{}{path}", host.to_ascii_lowercase()))
    }

    fn fits(&self, image: &str) -> bool {
        let ((host, path), (images_host, images_path)) = (split(&self.0), split(image));
        let ((host, port), (images_host, images_port)) =
            (split_port(host), split_port(images_host));
        let parts: Vec<&str> = host.split('.').collect();
        let images_parts: Vec<&str> = images_host.split('.').collect();
        port == images_port
            && parts.len() == images_parts.len()
            && images_path.starts_with(path)
            && parts
                .iter()
                .zip(images_parts)
                .all(|(glob, part)| matches(glob, part))
    }
}

fn is_web(scheme: &str) -> bool {
    ["https", "http"]
        .iter()
        .any(|web| scheme.eq_ignore_ascii_case(web))
}

/// Host and path, which begins with a slash unless it is empty.
fn split(location: &str) -> (&str, &str) {
    location.split_at(location.find('/').unwrap_or(location.len()))
}

/// Name or address, and port. The brackets of an address are no pattern.
fn split_port(host: &str) -> (&str, &str) {
    let (name, port) = match host.rsplit_once(':') {
        // The colons of an address in brackets are not followed by a port.
        Some((name, port)) if !port.contains(']') => (name, port),
        Some(_) | None => (host, ""),
    };
    let inner = name
        .strip_prefix('[')
        .and_then(|name| name.strip_suffix(']'));
    (
        inner.filter(|inner| inner.contains(':')).unwrap_or(name),
        port,
    )
}

/// Whether the text matches a pattern with `*`, `?`, `[a-z]` and `\`. A pattern that is not valid matches nothing.
fn matches(pattern: &str, text: &str) -> bool {
    let Some(pattern) = terms(pattern) else {
        return false;
    };
    let text: Vec<char> = text.chars().collect();
    let (mut at, mut position) = (0, 0);
    // Where to go on if a `*` matches one more character.
    let mut star = None;
    while position < text.len() || at < pattern.len() {
        match (pattern.get(at), text.get(position)) {
            (Some(Term::Any), _) => {
                star = Some((at + 1, position));
                at += 1;
                continue;
            }
            (Some(term), Some(c)) if term.fits(*c) => {
                at += 1;
                position += 1;
                continue;
            }
            (_, _) => {}
        }
        match star {
            Some((after, from)) if from < text.len() => {
                star = Some((after, from + 1));
                at = after;
                position = from + 1;
            }
            Some(_) | None => return false,
        }
    }
    true
}

/// A part of a pattern.
enum Term {
    /// Any number of characters.
    Any,
    /// Any one character.
    One,
    Char(char),
    /// A character in one of these ranges, or in none of them.
    Class(bool, Vec<(char, char)>),
}

impl Term {
    fn fits(&self, c: char) -> bool {
        match self {
            Self::Any => false,
            Self::One => true,
            Self::Char(own) => *own == c,
            Self::Class(not, ranges) => {
                ranges.iter().any(|(low, high)| (*low..=*high).contains(&c)) != *not
            }
        }
    }
}

/// The terms of a pattern; `None` if it is not valid.
fn terms(pattern: &str) -> Option<Vec<Term>> {
    let mut chars = pattern.chars().peekable();
    let mut terms = Vec::new();
    while let Some(c) = chars.next() {
        terms.push(match c {
            '*' => Term::Any,
            '?' => Term::One,
            '\\' => Term::Char(chars.next()?),
            '[' => {
                let not = chars.next_if_eq(&'^').is_some();
                let mut ranges = Vec::new();
                while ranges.is_empty() || chars.next_if_eq(&']').is_none() {
                    let low = bound(&mut chars)?;
                    let high = match chars.next_if_eq(&'-') {
                        Some(_) => bound(&mut chars)?,
                        None => low,
                    };
                    ranges.push((low, high));
                }
                Term::Class(not, ranges)
            }
            c => Term::Char(c),
        });
    }
    Some(terms)
}

/// One end of a range.
fn bound(chars: &mut impl Iterator<Item = char>) -> Option<char> {
    match chars.next()? {
        '\\' => chars.next(),
        '-' | ']' => None,
        c => Some(c),
    }
}

/// The credentials of all Secrets by location.
#[derive(Default)]
struct Keyring(BTreeMap<Location, Vec<RegistryLogin>>);

impl Keyring {
    fn add(&mut self, secret: &Secret, auths: Pairs) {
        let uid = secret.metadata.uid.clone().unwrap_or_default();
        for (location, (username, password)) in auths {
            let login = RegistryLogin {
                username,
                password,
                secret_uid: uid.clone(),
            };
            self.0
                .entry(Location::of(&location))
                .or_default()
                .push(login);
        }
    }

    /// The credentials for a repository, in the order in which they are tried.
    fn look_up(&self, repository: &str) -> Vec<RegistryLogin> {
        let mut fitting = self
            .0
            .iter()
            .rev()
            .filter(|(location, _)| location.fits(repository))
            .peekable();
        let hub = Location(HUB.to_owned());
        let of_hub = if fitting.peek().is_none() && repository.starts_with("docker.io/") {
            self.0.get(&hub)
        } else {
            None
        };
        let logins = fitting.map(|(_, logins)| logins).chain(of_hub);
        logins.flatten().take(MAX_TRIES).cloned().collect()
    }
}

/// The repository of an image with its registry, as keyrings know it: `docker.io/library/busybox`. `None` for a file, and
/// for a name that has no repository.
fn repository(image: &str) -> Option<String> {
    let mut schemes = ["docker://", "oras://"].into_iter();
    let name = schemes.find_map(|scheme| image.strip_prefix(scheme));
    let name = name.unwrap_or(image);
    if name.starts_with('/') {
        return None;
    }
    let name = name.split('@').next().unwrap_or_default();
    let last = name.rfind('/').map_or(0, |slash| slash + 1);
    let tag = name.get(last..)?.find(':').map(|colon| last + colon);
    let name = name.get(..tag.unwrap_or(name.len()))?;
    let (host, path) = match name.split_once('/') {
        Some((host, path))
            if host.contains(['.', ':']) || host.eq_ignore_ascii_case("localhost") =>
        {
            (host.to_ascii_lowercase(), path)
        }
        Some(_) | None => ("docker.io".to_owned(), name),
    };
    let host = if host == HUB {
        "docker.io"
    } else {
        host.as_str()
    };
    let library = if host == "docker.io" && !path.contains('/') {
        "library/"
    } else {
        ""
    };
    (!path.is_empty()).then(|| format!("{host}/{library}{path}"))
}

#[cfg(test)]
mod tests;
