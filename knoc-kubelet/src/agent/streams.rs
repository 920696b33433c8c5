//! Which connection carries streams of bytes: one of their own, or, if the login node allows no further session, the one for control.
//!
//! Over SSH each connection is a login. A site may limit the sessions of a user to one, and control already has it. This is found
//! out by the first stream, before anything of it is sent, and tried again every [`AGAIN`]. While streams share the connection for control, a
//! large copy may delay the status of a pod.

use std::{
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use knoc_link::ladder;
use knoc_proto::error::chain;
use tokio::time::Instant;

use super::{Agent, Channels};

/// How long the connection for control is shared before a connection for streams is tried again.
const AGAIN: Duration = Duration::from_mins(10);

/// PURE: which connection carries streams.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
enum Which {
    /// One of their own, and no other is possible: a connection costs no login.
    #[default]
    Always,
    /// One of their own, if it can be opened.
    Unknown,
    /// One of their own, which was opened before.
    Own,
    /// The one for control, until this time.
    Shared(Instant),
}

impl Which {
    /// What is known at this time.
    fn at(self, now: Instant) -> Self {
        match self {
            Self::Shared(until) if until <= now => Self::Unknown,
            Self::Always | Self::Unknown | Self::Own | Self::Shared(_) => self,
        }
    }
}

/// What is known about the connection for streams. Clones share it.
#[derive(Clone, Debug, Default)]
pub(super) struct Streams(Arc<Mutex<Which>>);

impl Streams {
    /// For connections that are logins, whose number may be limited.
    pub(super) fn over_logins() -> Self {
        Self(Arc::new(Mutex::new(Which::Unknown)))
    }

    fn now(&self) -> Which {
        let which = *self.0.lock().unwrap_or_else(PoisonError::into_inner);
        which.at(Instant::now())
    }

    /// Notes what was found out; returns whether that is news. What costs no login stays as it is.
    fn note(&self, found: Which) -> bool {
        let mut which = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let kind = std::mem::discriminant::<Which>;
        let news = *which != Which::Always && kind(&which) != kind(&found);
        if *which != Which::Always {
            *which = found;
        }
        news
    }

    /// New connections are in use, so nothing is known about them.
    pub(super) fn forget(&self) {
        self.note(Which::Unknown);
    }
}

impl Agent {
    /// Whether streams have to use the connection for control now. Opens the connection for streams if nothing is known about it.
    pub(super) async fn shares_control(&self, channels: &Channels) -> bool {
        match self.streams.now() {
            Which::Always | Which::Own => false,
            Which::Shared(_) => true,
            Which::Unknown => {
                // A call that changes nothing, over the connection for streams.
                let own = self.with(Channels {
                    control: channels.bulk.clone(),
                    bulk: channels.bulk.clone(),
                });
                match own.get_info().await {
                    Ok(_) => {
                        if self.streams.note(Which::Own) {
                            tracing::debug!("streams have a connection of their own");
                        }
                        false
                    }
                    Err(status) => {
                        self.noticed(&status);
                        matches!(self.streams.now(), Which::Shared(_))
                    }
                }
            }
        }
    }

    /// Notes why a stream could not be opened: if the login node allows no further session, the next one uses the connection for control.
    pub fn noticed(&self, status: &tonic::Status) {
        let error = chain(status);
        if ladder::no_further_session(&error)
            && self.streams.note(Which::Shared(Instant::now() + AGAIN))
        {
            tracing::warn!(
                error,
                "the login node allows one session only: logs, commands and copies share it with pods' status"
            );
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_shared_connection_is_tried_again_later() {
        let now = Instant::now();
        let shared = Which::Shared(now + AGAIN);
        assert_eq!(shared.at(now), shared);
        assert_eq!(shared.at(now + AGAIN), Which::Unknown);
        assert_eq!(Which::Own.at(now + AGAIN), Which::Own);
    }

    #[test]
    fn only_logins_can_be_limited() {
        let (logins, tcp) = (Streams::over_logins(), Streams::default());
        let shared = Which::Shared(Instant::now() + AGAIN);
        assert!(!tcp.note(shared));
        assert_eq!(tcp.now(), Which::Always);
        assert!(logins.note(shared));
        assert!(!logins.note(shared), "no news");
        assert_eq!(logins.now(), shared);
        logins.forget();
        assert_eq!(logins.now(), Which::Unknown);
    }
}
