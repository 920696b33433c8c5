//! Stable names of refusals. Across the wire only these decide behaviour; the message is for people.
//!
//! Pure. A reason travels in the trailer `knoc-reason` of a gRPC status. Names are never reused and never renamed;
//! an unknown one (a newer peer's) reads as absent, and the gRPC code alone then decides.
use std::fmt;

use tonic::{Code, Status, metadata::MetadataValue};

use crate::text;

/// The trailer that carries the reason.
pub const TRAILER: &str = "knoc-reason";

/// How much of a message is sent. It travels as a header, percent-encoded, and HTTP/2 bounds those to 16 KiB.
const MESSAGE: usize = 4 << 10;

macro_rules! reasons {
    ($($(#[$doc:meta])* $name:ident => $code:ident, $retryable:literal;)*) => {
        /// Why a request was refused.
        #[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
        pub enum ErrorReason {
            $($(#[$doc])* $name,)*
        }

        impl ErrorReason {
            /// All of them, for tables and tests.
            pub const ALL: &[Self] = &[$(Self::$name,)*];

            /// The stable name on the wire.
            #[must_use]
            pub fn as_str(self) -> &'static str {
                match self {
                    $(Self::$name => stringify!($name),)*
                }
            }

            /// May the same request succeed later without anything being changed?
            #[must_use]
            pub fn retryable(self) -> bool {
                match self {
                    $(Self::$name => $retryable,)*
                }
            }

            /// The gRPC code it travels with, for callers that know no reasons.
            #[must_use]
            pub fn code(self) -> Code {
                match self {
                    $(Self::$name => Code::$code,)*
                }
            }
        }
    };
}

reasons! {
    /// No pod of this uid.
    NotFound => NotFound, false;
    /// The request's leadership epoch is lower than one seen: another kubelet leads.
    StaleLeader => FailedPrecondition, false;
    /// The same uid with a shape that may not change.
    SpecConflict => AlreadyExists, false;
    /// The pod's shape or values do not pass validation; all reasons in the message.
    InvalidSpec => InvalidArgument, false;
    /// Asked of a finished pod's leftovers while the pod is not finished.
    NotFinished => FailedPrecondition, true;
    /// The pod or container does not run now; streams need it to.
    NotRunning => FailedPrecondition, true;
    /// The pod has no container of this name, or it has no such instance.
    ContainerNotFound => NotFound, false;
    /// A newer agent holds the state directory; this one changes nothing any more.
    AgentFenced => FailedPrecondition, false;
    /// Slurm's controller does not answer.
    SchedulerUnavailable => Unavailable, true;
    /// A bounded queue is full, or a limit of the site is reached.
    Overloaded => ResourceExhausted, true;
    /// The agent serves another cluster.
    ClusterMismatch => PermissionDenied, false;
    /// The agent's policy or the peer's identity forbids it.
    PermissionDenied => PermissionDenied, false;
    /// The peer itself is not served: its identity or certificate is denied, expired, or not of the CA. Says nothing of
    /// what it asked for.
    PeerDenied => PermissionDenied, false;
    /// The peer may not claim this leadership: another identity's node, or an epoch that cannot be.
    LeadershipDenied => FailedPrecondition, false;
    /// Nothing of the pod's own listens on this port, or it refused the connection.
    NotListening => FailedPrecondition, true;
    /// This agent, runtime or site cannot do it.
    Unsupported => Unimplemented, false;
    /// The job's shim has no link to the agent at the moment.
    ShimUnreachable => Unavailable, true;
    /// The request itself is malformed (missing field, first message of a stream).
    InvalidRequest => InvalidArgument, false;
    /// The process is about to end; another one takes over.
    ShuttingDown => Unavailable, true;
    /// The agent's own fault, such as a full disk; the message has the chain.
    Internal => Internal, true;
}

impl ErrorReason {
    /// The gRPC status that carries this reason.
    #[must_use]
    pub fn status(self, message: impl Into<String>) -> Status {
        let message = message.into();
        let mut status = Status::new(self.code(), text::shorten(&message, MESSAGE));
        status
            .metadata_mut()
            .insert(TRAILER, MetadataValue::from_static(self.as_str()));
        status
    }

    /// The reason a status carries, if it is one this version knows.
    #[must_use]
    pub fn of(status: &Status) -> Option<Self> {
        let name = status.metadata().get(TRAILER)?.to_str().ok()?;
        Self::ALL
            .iter()
            .copied()
            .find(|reason| reason.as_str() == name)
    }

    /// May the request that got this status succeed later? By reason where there is one, by code otherwise.
    #[must_use]
    pub fn may_retry(status: &Status) -> bool {
        let by_code = matches!(
            status.code(),
            Code::Unavailable
                | Code::ResourceExhausted
                | Code::Aborted
                | Code::DeadlineExceeded
                | Code::Cancelled
        );
        Self::of(status).map_or(by_code, Self::retryable)
    }
}

impl fmt::Display for ErrorReason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_reason_survives_the_trailer() {
        for reason in ErrorReason::ALL {
            let status = reason.status("words");
            assert_eq!(ErrorReason::of(&status), Some(*reason));
            assert_eq!(ErrorReason::may_retry(&status), reason.retryable());
            assert_eq!(status.message(), "words");
        }
    }

    #[test]
    fn a_message_is_bounded() {
        let status = ErrorReason::InvalidSpec.status("\n".repeat(1 << 20));
        assert!(status.message().len() <= MESSAGE);
    }

    #[test]
    fn unknown_reasons_fall_back_to_the_code() {
        let mut status = Status::unavailable("x");
        status
            .metadata_mut()
            .insert(TRAILER, MetadataValue::from_static("FromTheFuture"));
        assert_eq!(ErrorReason::of(&status), None);
        assert!(ErrorReason::may_retry(&status));
        assert!(!ErrorReason::may_retry(&Status::invalid_argument("x")));
    }
}
