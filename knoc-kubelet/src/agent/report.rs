//! Task: tells as Events of the node why there is no link to the agent, and when there is one again, for people who have
//! only kubectl. The same explanation is the message of the condition `AgentConnected`.
//!
//! An Event is written when the link goes down and when the rung of the ladder changes on which it fails, not at each
//! attempt.

use jiff::Timestamp;
use knoc_link::ladder::{self, Rung};
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

use super::Link;
use crate::pods::events::{Events, Note, about_node};

/// What was told last about a link that is down.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Told {
    /// It fails on this rung.
    Rung(Rung),
    /// It fails with a text that no rung is known for.
    Text(String),
}

/// PURE: what to tell now, as warning, reason and message.
fn news(told: &mut Option<Told>, link: &Link) -> Option<(bool, &'static str, String)> {
    match link {
        Link::Up { info, .. } => {
            told.take()?;
            let message = format!(
                "the agent of site {} on {} answers again",
                info.site, info.hostname
            );
            Some((false, "AgentConnected", message))
        }
        Link::Down { message, .. } if message == Link::NOT_YET => None,
        Link::Down { message, .. } => {
            let now = match ladder::look(message) {
                Some((rung, _)) => Told::Rung(rung),
                None => Told::Text(message.clone()),
            };
            if told.as_ref() == Some(&now) {
                return None;
            }
            *told = Some(now);
            Some((true, "AgentUnreachable", ladder::explain(message)))
        }
    }
}

/// Runs until `shutdown`.
pub async fn run(
    mut link: watch::Receiver<Link>,
    events: Events,
    node: String,
    shutdown: CancellationToken,
) {
    let mut told = None;
    loop {
        let news = news(&mut told, &link.borrow_and_update());
        if let Some((warning, reason, message)) = news {
            events.record(Note {
                object: about_node(&node),
                warning,
                reason: reason.to_owned(),
                message,
                at: Timestamp::now(),
                salt: 0,
                times: 1,
            });
        }
        tokio::select! {
            biased;
            () = shutdown.cancelled() => return,
            changed = link.changed() => if changed.is_err() { return },
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use knoc_proto::pb;
    use tokio::time::Instant;

    use super::*;

    fn down(message: &str) -> Link {
        Link::Down {
            since: Timestamp::UNIX_EPOCH,
            at: Instant::now(),
            message: message.to_owned(),
        }
    }

    #[test]
    fn each_rung_is_told_once_and_the_end_of_it_too() {
        let mut told = None;
        let mut tell = |link: Link| news(&mut told, &link);
        let up = || Link::Up {
            info: Arc::new(pb::AgentInfo::default()),
            since: Timestamp::UNIX_EPOCH,
        };
        assert_eq!(tell(Link::never()), None, "nothing was tried yet");
        assert_eq!(tell(up()), None, "nothing was told before");
        let (warning, reason, message) = tell(down("connect to x: Connection refused")).unwrap();
        assert!(warning && reason == "AgentUnreachable");
        assert!(
            message.starts_with("port: ") && message.contains("start the agent"),
            "{message}"
        );
        assert_eq!(tell(down("connect to y: Connection refused")), None);
        let (_, _, message) = tell(down("no answer: known_hosts has no key")).unwrap();
        assert!(message.starts_with("host key: "), "{message}");
        let (warning, reason, _) = tell(up()).unwrap();
        assert!(!warning && reason == "AgentConnected");
        assert_eq!(tell(up()), None);
    }
}
