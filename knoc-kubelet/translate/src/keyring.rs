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
/// How many steps all searches of a pod take together at most: less than a second. Only very many patterns take so many.
const STEPS: usize = 64 << 20;
/// What a comparison with a pattern takes at least.
const STEPS_LEAST: usize = 32;
/// The longest repository of an image; registries take 255 characters.
const LONGEST: usize = 1024;

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
    let mut search = Search::new(&keyring);
    let mut left = MOST;
    for image in images {
        let Some(name) = repository(&image) else {
            continue;
        };
        let Some(logins) = search.look_up(&name) else {
            let image = knoc_proto::text::quote(&image, 200);
            found.unused.push(format!(
                "The image pull secrets have too many patterns for the images of the pod: there are no credentials for {image} and those \
                 after it."
            ));
            break;
        };
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
struct Location {
    host: String,
    path: String,
}

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
        Self {
            host: host.to_ascii_lowercase(),
            path: path.to_owned(),
        }
    }
}

/// Whether a host fits only the host of the same text: it is neither a pattern nor an address that can be written in several ways.
fn is_plain(host: &str) -> bool {
    let usual = |c: char| c.is_alphanumeric() || ".-_:".contains(c);
    host.chars().all(usual) && host.matches(':').count() < 2 && !host.ends_with(':')
}

/// Whether a host of a location fits that of an image.
fn fits(host: &str, images_host: &str) -> bool {
    let ((host, port), (images_host, images_port)) = (split_port(host), split_port(images_host));
    let (parts, images_parts) = (host.split('.'), images_host.split('.'));
    port == images_port
        && parts.clone().count() == images_parts.clone().count()
        && parts
            .zip(images_parts)
            .all(|(glob, part)| matches(glob, part))
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

/// The credentials of a host by the beginning of a path.
type Paths = BTreeMap<String, Vec<RegistryLogin>>;

/// The credentials of all Secrets by location.
#[derive(Default)]
struct Keyring {
    /// Of hosts that are found by their text.
    plain: BTreeMap<String, Paths>,
    /// Of hosts with which that of an image is compared.
    patterns: BTreeMap<String, Paths>,
}

impl Keyring {
    fn add(&mut self, secret: &Secret, auths: Pairs) {
        let uid = secret.metadata.uid.clone().unwrap_or_default();
        for (location, (username, password)) in auths {
            let login = RegistryLogin {
                username,
                password,
                secret_uid: uid.clone(),
            };
            let Location { host, path } = Location::of(&location);
            let hosts = if is_plain(&host) {
                &mut self.plain
            } else {
                &mut self.patterns
            };
            let paths = hosts.entry(host).or_default();
            paths.entry(path).or_default().push(login);
        }
    }
}

/// The searches for the images of a pod, one after the other. What they take is limited: a Secret may have tens of thousands of
/// patterns, and a pod as many images.
struct Search<'k> {
    keyring: &'k Keyring,
    /// How many steps are left.
    steps: usize,
    /// The host of the last image.
    host: String,
    /// The hosts that fit it.
    fitting: Vec<(&'k str, &'k Paths)>,
}

impl<'k> Search<'k> {
    fn new(keyring: &'k Keyring) -> Self {
        Self {
            keyring,
            steps: STEPS,
            host: String::new(),
            fitting: Vec::new(),
        }
    }

    /// The credentials for a repository, in the order in which they are tried; `None` if the search takes too long.
    fn look_up(&mut self, repository: &str) -> Option<Vec<RegistryLogin>> {
        let (host, path) = split(repository);
        if host != self.host {
            self.find_hosts(host)?;
        }
        let mut found = Vec::new();
        for (host, paths) in &self.fitting {
            self.steps = self.steps.checked_sub(path.len().max(STEPS_LEAST))?;
            let beginnings = (0..=path.len()).filter_map(|end| path.get(..end));
            found.extend(beginnings.filter_map(|beginning| {
                let logins = paths.get(beginning)?;
                Some((format!("{host}{beginning}"), logins))
            }));
        }
        found.sort_by(|(one, _), (other, _)| other.cmp(one));
        let hub = self.keyring.plain.get(HUB).and_then(|hub| hub.get(""));
        let of_hub = hub.filter(|_| found.is_empty() && host == "docker.io");
        let logins = found.into_iter().map(|(_, logins)| logins).chain(of_hub);
        Some(logins.flatten().take(MAX_TRIES).cloned().collect())
    }

    /// Finds the hosts that fit that of an image.
    fn find_hosts(&mut self, host: &str) -> Option<()> {
        let keyring = self.keyring;
        host.clone_into(&mut self.host);
        let plain = keyring.plain.get_key_value(host);
        self.fitting = plain
            .map(|(host, paths)| (host.as_str(), paths))
            .into_iter()
            .collect();
        for (pattern, paths) in &keyring.patterns {
            let steps = pattern.len().saturating_mul(host.len()).max(STEPS_LEAST);
            self.steps = self.steps.checked_sub(steps)?;
            if fits(pattern, host) {
                self.fitting.push((pattern.as_str(), paths));
            }
        }
        Some(())
    }
}

/// The repository of an image with its registry, as keyrings know it: `docker.io/library/busybox`. `None` for a file, for an
/// image of a container library, which gets no credentials of pods, and for a name that has no repository.
fn repository(image: &str) -> Option<String> {
    let mut schemes = ["docker://", "oras://"].into_iter();
    let name = schemes.find_map(|scheme| image.strip_prefix(scheme));
    let name = name.unwrap_or(image);
    if name.starts_with('/') || name.starts_with("library://") {
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
    let known = !path.is_empty() && name.len() <= LONGEST;
    known.then(|| format!("{host}/{library}{path}"))
}

#[cfg(test)]
mod tests;
