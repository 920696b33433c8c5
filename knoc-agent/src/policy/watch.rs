//! Task: watches the site file and the CA, and publishes what has changed.
//!
//! The task owns the sending ends of [`Live`](super::Live) and of the rules. Files are read by
//! blocking work, one read at a time; while a file system hangs, the last good policy and rules
//! stay in effect.

use std::sync::Arc;

use knoc_link::Credentials;
use knoc_proto::error::chain;
use tokio::sync::watch::Sender;
use tokio_util::sync::CancellationToken;

use super::{POLL, Publisher, Rules};
use crate::config::{Config, Policy, Source};

/// The task's state.
#[derive(Debug)]
pub struct Watcher {
    files: Files,
    publisher: Publisher,
    rules: Sender<Arc<Rules>>,
}

/// The files that are watched, and what was last read.
#[derive(Debug)]
struct Files {
    /// `None` if the configuration was not read from a file.
    source: Option<Source>,
    credentials: Option<Credentials>,
    policy: Arc<Policy>,
    site: Seen,
    ca: Seen,
    /// The digest of the `[tls]` files that the current rules were made from.
    tls: Option<[u8; 32]>,
}

/// A file's last problem, so that each problem is logged only once.
#[derive(Debug, Default)]
struct Seen {
    problem: Option<String>,
}

impl Seen {
    /// Records the file's current problem; true if it has changed.
    fn note(&mut self, problem: Option<String>) -> bool {
        let news = self.problem != problem;
        self.problem = problem;
        news
    }
}

impl Watcher {
    /// Creates a watcher of the files that `config` was read from.
    #[must_use]
    pub fn new(
        config: &Config,
        credentials: Option<Credentials>,
        publisher: Publisher,
        rules: Sender<Arc<Rules>>,
    ) -> Self {
        let policy = Arc::new(config.policy.clone());
        let tls = credentials.as_ref().and_then(|one| one.reread().ok());
        let watcher = Self {
            files: Files {
                source: config.source.clone(),
                credentials,
                policy,
                site: Seen::default(),
                ca: Seen::default(),
                tls,
            },
            publisher,
            rules,
        };
        watcher.publish_rules();
        watcher
    }

    /// Reads the files every [`POLL`] until `stop` is cancelled.
    pub async fn run(mut self, stop: CancellationToken) {
        loop {
            tokio::select! {
                biased;
                () = stop.cancelled() => return,
                () = tokio::time::sleep(POLL) => {}
            }
            let Self {
                mut files,
                publisher,
                rules,
            } = self;
            let looked = tokio::task::spawn_blocking(move || {
                let changed = files.look();
                (files, changed)
            });
            // Blocking work cannot be cancelled, and this work does not panic.
            let Ok((files, changed)) = looked.await else {
                return;
            };
            self = Self {
                files,
                publisher,
                rules,
            };
            self.publish(changed);
        }
    }

    fn publish(&self, changed: bool) {
        let problem = self.files.site.problem.clone();
        let problem = problem.or_else(|| self.files.ca.problem.clone());
        self.publisher.problem.send_if_modified(|known| {
            let news = *known != problem;
            *known = problem;
            news
        });
        if changed {
            self.publisher
                .policy
                .send_replace(Arc::clone(&self.files.policy));
            self.publish_rules();
        }
    }

    fn publish_rules(&self) {
        let trust = self.files.credentials.as_ref().map(Credentials::trust);
        let trust = match trust.transpose() {
            Ok(trust) => trust,
            Err(error) => {
                tracing::error!(
                    error = chain(&error),
                    "the CA cannot be used: nobody is served"
                );
                None
            }
        };
        let rules = Rules::new(&self.files.policy, trust);
        self.rules.send_replace(Arc::new(rules));
    }
}

impl Files {
    /// Reads all files; true if something in effect has changed. Blocking.
    fn look(&mut self) -> bool {
        let policy = self.look_at_policy();
        let ca = self.look_at_ca();
        policy || ca
    }

    fn look_at_policy(&mut self) -> bool {
        let Some(source) = &self.source else {
            return false;
        };
        let read = Config::load(&source.path, &source.home);
        match read {
            Ok(config) => {
                if self.site.note(None) {
                    tracing::info!("the site file is valid again");
                }
                if config.policy == *self.policy {
                    return false;
                }
                self.policy = Arc::new(config.policy);
                tracing::info!("[policy] of the site file has changed and is in effect");
                true
            }
            Err(error) => {
                let problem = format!(
                    "the site file cannot be used, the previous [policy] stays in effect: {}",
                    chain(&error)
                );
                if self.site.note(Some(problem.clone())) {
                    tracing::error!("{problem}");
                }
                false
            }
        }
    }

    fn look_at_ca(&mut self) -> bool {
        let Some(credentials) = &self.credentials else {
            return false;
        };
        match credentials.reread() {
            Ok(digest) => {
                let changed = self.tls.replace(digest) != Some(digest);
                if self.ca.note(None) {
                    tracing::info!("the files of [tls] are valid again");
                }
                if changed {
                    tracing::info!("the files of [tls] have changed and are in effect");
                }
                changed
            }
            Err(error) => {
                let problem = format!(
                    "the files of [tls] cannot be used, the previous ones stay in effect: {}",
                    chain(&error)
                );
                if self.ca.note(Some(problem.clone())) {
                    tracing::error!("{problem}");
                }
                false
            }
        }
    }
}

#[cfg(test)]
mod tests;
