//! PURE: the credentials for registries that came with a pod.
//!
//! They are in memory only: with the pod until its images are there, and with a registry's token until that has expired
//! (ADR 0108). Nothing shows them: `Debug` hides them, and they are in no error.

use std::{collections::BTreeMap, fmt};

use base64::{Engine as _, prelude::BASE64_STANDARD};
use http::HeaderValue;
use knoc_proto::pb;

/// How many images of one pod may have credentials. No pod has as many containers.
const MAX_IMAGES: usize = 1000;
/// How many credentials one image may have.
const MAX_LOGINS: usize = 32;

/// A user name and a password, as the header that carries them.
#[derive(Clone, PartialEq, Eq, Hash)]
pub struct Login(HeaderValue);

impl fmt::Debug for Login {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Login")
    }
}

impl Login {
    /// The login of that user.
    #[must_use]
    pub fn new(username: &str, password: &str) -> Option<Self> {
        let pair = BASE64_STANDARD.encode(format!("{username}:{password}"));
        let mut header = HeaderValue::try_from(format!("Basic {pair}")).ok()?;
        header.set_sensitive(true);
        Some(Self(header))
    }

    /// The `Authorization` header with it.
    pub(super) fn header(&self) -> HeaderValue {
        self.0.clone()
    }
}

/// One of the credentials that are tried for an image.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Credential {
    /// `None`: the registry is asked without credentials.
    pub login: Option<Login>,
    /// The UID of the Secret that they come from.
    pub secret: String,
}

/// The credentials of a pod, by image, in the order in which they are tried.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Credentials(BTreeMap<String, Vec<Credential>>);

/// Why the credentials in a request are not accepted. The text contains none of them.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum BadCredentials {
    /// There are too many of them.
    #[error(
        "pull_credentials: more than {MAX_IMAGES} images, or more than {MAX_LOGINS} credentials for one image"
    )]
    TooMany,
    /// One is too long.
    #[error(
        "pull_credentials: a user name and its password have more than {} bytes",
        pb::RegistryLogin::MAX_LENGTH
    )]
    TooLong,
}

impl Credentials {
    /// Checks the credentials in a request.
    pub fn check(wire: pb::PullCredentials) -> Result<Self, BadCredentials> {
        let too_many = |image: &pb::ImageCredentials| image.logins.len() > MAX_LOGINS;
        if wire.images.len() > MAX_IMAGES || wire.images.iter().any(too_many) {
            return Err(BadCredentials::TooMany);
        }
        let images = wire.images.into_iter().map(|of_image| {
            let logins = of_image.logins.into_iter().map(credential);
            Ok((of_image.image, logins.collect::<Result<_, _>>()?))
        });
        images.collect::<Result<_, _>>().map(Self)
    }

    /// The credentials for an image as the pod names it.
    #[must_use]
    pub fn of(&self, image: &str) -> &[Credential] {
        self.0.get(image).map_or(&[], Vec::as_slice)
    }
}

fn credential(wire: pb::RegistryLogin) -> Result<Credential, BadCredentials> {
    let pb::RegistryLogin {
        username,
        password,
        secret_uid: secret,
    } = wire;
    if username.len() + password.len() > pb::RegistryLogin::MAX_LENGTH {
        return Err(BadCredentials::TooLong);
    }
    let named = !(username.is_empty() && password.is_empty());
    let login = named.then(|| Login::new(&username, &password)).flatten();
    Ok(Credential { login, secret })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn wire(image: &str, password: &str) -> pb::PullCredentials {
        let login = pb::RegistryLogin {
            username: "ann".to_owned(),
            password: password.to_owned(),
            secret_uid: "u".to_owned(),
        };
        pb::PullCredentials {
            images: vec![pb::ImageCredentials {
                image: image.to_owned(),
                logins: vec![login],
            }],
        }
    }

    #[test]
    fn credentials_are_found_by_image_and_never_shown() {
        let read = Credentials::check(wire("a/b", "hunter2")).unwrap();
        let [found] = read.of("a/b") else {
            panic!("one credential")
        };
        assert_eq!(found.login, Login::new("ann", "hunter2"));
        assert_ne!(found.login, Login::new("ann", "hunter3"));
        assert!(read.of("a/c").is_empty());
        let shown = format!("{read:?} {:?}", found.login.as_ref().unwrap().header());
        let encoded = BASE64_STANDARD.encode("ann:hunter2");
        assert!(
            !shown.contains("hunter2") && !shown.contains(&encoded),
            "{shown}"
        );
        let shown = format!("{:?}", wire("a/b", "hunter2"));
        assert!(
            !shown.contains("hunter2") && shown.contains("a/b"),
            "{shown}"
        );
    }

    #[test]
    fn too_many_and_too_long_ones_are_refused() {
        let long = "x".repeat(pb::RegistryLogin::MAX_LENGTH);
        assert_eq!(
            Credentials::check(wire("a", &long)),
            Err(BadCredentials::TooLong)
        );
        let mut many = wire("a", "p");
        many.images[0].logins = vec![many.images[0].logins[0].clone(); MAX_LOGINS + 1];
        assert_eq!(Credentials::check(many), Err(BadCredentials::TooMany));
    }

    #[test]
    fn an_empty_login_asks_without_credentials() {
        let mut empty = wire("a", "");
        empty.images[0].logins[0].username.clear();
        let read = Credentials::check(empty).unwrap();
        assert_eq!(read.of("a")[0].login, None);
    }
}
