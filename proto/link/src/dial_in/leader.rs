//! PURE: which of several agents of one site serves the kubelet.
//!
//! It is the one with the highest lease epoch that has ever dialled in. An older one is refused even while the newer one is
//! away: it may not know the pods that the newer one has accepted since.
use knoc_proto::pb;

/// The agent process that serves.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Leader {
    pub(super) instance: String,
    pub(super) epoch: i64,
    pub(super) hostname: String,
}

/// What becomes of a connection that an agent has opened.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Verdict {
    /// It is one more of the agent that serves.
    Same,
    /// Its agent serves from now on.
    Newer,
    /// Another agent serves.
    Refused,
}

impl Leader {
    pub(super) fn of(hello: &pb::DialOutHello) -> Self {
        Self {
            instance: hello.instance.clone(),
            epoch: hello.epoch,
            hostname: hello.hostname.clone(),
        }
    }
}

/// Judges an agent against the one that serves.
pub(super) fn judge(serving: Option<&Leader>, arrived: &Leader) -> Verdict {
    match serving {
        None => Verdict::Newer,
        Some(serving) if serving == arrived => Verdict::Same,
        Some(serving) if arrived.epoch > serving.epoch => Verdict::Newer,
        // Of two with the same epoch, the first one stays.
        Some(_) => Verdict::Refused,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn of_two_agents_the_higher_epoch_serves() {
        let agent = |host: &str, epoch| Leader {
            instance: format!("{host}/1"),
            epoch,
            hostname: host.to_owned(),
        };
        let (old, new) = (agent("login1", 7), agent("login2", 8));
        assert_eq!(judge(None, &old), Verdict::Newer);
        assert_eq!(judge(Some(&old), &old), Verdict::Same);
        assert_eq!(judge(Some(&old), &new), Verdict::Newer);
        assert_eq!(judge(Some(&new), &old), Verdict::Refused);
        assert_eq!(judge(Some(&old), &agent("login2", 7)), Verdict::Refused);
    }
}
