//! PURE: which pods may use a cached image.
//!
//! An image that was pulled without credentials is for everybody. One that was pulled with credentials is for pods that
//! have shown, for the same repository, that they can pull it too: by a Secret that pulled it before, or by the registry's
//! answer to their own credentials. Another repository must deliver the image itself first, because a registry could
//! claim to have any digest (ADR 0109). What is recorded are the UIDs of Secrets, not what is in them.

use std::collections::{BTreeMap, BTreeSet};

use serde::{Deserialize, Serialize};

use super::login::Credential;

/// How many repositories of one image are recorded. For others the image is downloaded again.
const MAX_REPOSITORIES: usize = 100;
/// How many Secrets are recorded for one repository. Pods with others cost a request to the registry.
const MAX_SECRETS: usize = 1000;

/// Which pods may use an image.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Access {
    /// The UIDs of the Secrets that could pull it, by repository. Absent: everybody may use the image.
    #[serde(
        rename = "PulledWith",
        default,
        skip_serializing_if = "Option::is_none"
    )]
    secrets: Option<BTreeMap<String, BTreeSet<String>>>,
}

/// Whether a pod may use a cached image.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Verdict {
    /// It may.
    Granted,
    /// It may if the repository gives it the image's manifest.
    Ask,
    /// It may if the repository delivers the whole image.
    Prove,
}

impl Access {
    /// The access to an image that was just pulled from there, with credentials or without.
    pub(super) fn pulled(repository: &str, with_credentials: bool) -> Self {
        let secrets = with_credentials.then(|| [(repository.to_owned(), BTreeSet::new())].into());
        Self { secrets }
    }

    /// Whether a pod with these credentials may use the image under a name of that repository.
    pub(super) fn verdict(&self, repository: &str, credentials: &[Credential]) -> Verdict {
        let Some(secrets) = &self.secrets else {
            return Verdict::Granted;
        };
        let Some(secrets) = secrets.get(repository) else {
            return Verdict::Prove;
        };
        let mut known = credentials.iter();
        if known.any(|credential| secrets.contains(&credential.secret)) {
            Verdict::Granted
        } else {
            Verdict::Ask
        }
    }

    /// Records that the repository gave the image for this credential. Returns whether anything changed.
    pub(super) fn grant(&mut self, repository: &str, credential: &Credential) -> bool {
        let Some(secrets) = &mut self.secrets else {
            return false;
        };
        if credential.login.is_none() {
            self.secrets = None;
            return true;
        }
        let mut changed = !secrets.contains_key(repository);
        if changed && secrets.len() >= MAX_REPOSITORIES {
            secrets.pop_first();
        }
        let known = secrets.entry(repository.to_owned()).or_default();
        if !credential.secret.is_empty() && !known.contains(&credential.secret) {
            if known.len() >= MAX_SECRETS {
                known.pop_first();
            }
            known.insert(credential.secret.clone());
            changed = true;
        }
        changed
    }

    /// Joins what another pull of the same image found out.
    pub(super) fn join(&mut self, other: Self) {
        let Some(other) = other.secrets else {
            self.secrets = None;
            return;
        };
        if let Some(secrets) = &mut self.secrets {
            for (repository, more) in other {
                if secrets.len() < MAX_REPOSITORIES || secrets.contains_key(&repository) {
                    secrets.entry(repository).or_default().extend(more);
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::{super::login::Login, *};

    fn with(secret: &str) -> [Credential; 1] {
        [Credential {
            login: Login::new("ann", "password"),
            secret: secret.to_owned(),
        }]
    }

    #[test]
    fn an_image_pulled_without_credentials_is_for_everybody() {
        let mut public = Access::pulled("a/b", false);
        assert_eq!(public.verdict("c/d", &[]), Verdict::Granted);
        assert!(!public.grant("a/b", &with("u1")[0]));
        assert_eq!(serde_json::to_string(&public).unwrap(), "{}");
        assert_eq!(serde_json::from_str::<Access>("{}").unwrap(), public);
    }

    #[test]
    fn a_private_image_is_for_secrets_that_pulled_it_from_the_same_repository() {
        let mut access = Access::pulled("a/b", true);
        assert_eq!(access.verdict("a/b", &with("u1")), Verdict::Ask);
        assert!(access.grant("a/b", &with("u1")[0]));
        assert!(!access.grant("a/b", &with("u1")[0]));
        assert_eq!(access.verdict("a/b", &with("u1")), Verdict::Granted);
        assert_eq!(access.verdict("a/b", &with("u2")), Verdict::Ask);
        assert_eq!(access.verdict("a/b", &[]), Verdict::Ask);
        assert_eq!(access.verdict("c/d", &with("u1")), Verdict::Prove);
        let text = serde_json::to_string(&access).unwrap();
        assert_eq!(serde_json::from_str::<Access>(&text).unwrap(), access);
        assert!(!text.contains("password"));
        // A credential without a Secret is asked about each time.
        assert!(!access.grant("a/b", &with("")[0]));
        assert_eq!(access.verdict("a/b", &with("")), Verdict::Ask);
        // The registry gave it without credentials.
        assert!(access.grant("a/b", &Credential::default()));
        assert_eq!(access.verdict("c/d", &[]), Verdict::Granted);
    }

    #[test]
    fn what_is_recorded_is_bounded() {
        let mut access = Access::pulled("a/b", true);
        for number in 0..=MAX_SECRETS {
            access.grant("a/b", &with(&format!("u{number:05}"))[0]);
        }
        assert_eq!(access.verdict("a/b", &with("u00000")), Verdict::Ask);
        for number in 0..=MAX_REPOSITORIES {
            access.grant(&format!("r{number}"), &with("u")[0]);
        }
        let recorded = access.secrets.map_or(0, |secrets| secrets.len());
        assert_eq!(recorded, MAX_REPOSITORIES);
    }
}
