//! PURE: stable names for the reasons of failed calls. Peers base their behaviour only on these; messages are for
//! users.
//!
//! A reason is sent in the trailer `knoc-reason` of a gRPC status. Names are never reused and never renamed; an unknown
//! one (of a newer peer) is treated as absent, and then the gRPC code alone decides.
use std::fmt;

use tonic::{Code, Status, metadata::MetadataValue};

use crate::text;

/// The gRPC trailer that carries the reason.
pub const TRAILER: &str = "knoc-reason";

/// The most bytes of a message that are sent. A message is sent as a percent-encoded header, and HTTP/2 headers are
/// limited to 16 KiB.
const MESSAGE: usize = 4 << 10;

macro_rules! reasons {
    ($($(#[$doc:meta])* $name:ident => $code:ident, $retryable:literal;)*) => {
        /// Why a call failed.
        #[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
        pub enum ErrorReason {
            $($(#[$doc])* $name,)*
        }

        impl ErrorReason {
            /// All reasons, for tables and tests.
            pub const ALL: &[Self] = &[$(Self::$name,)*];

            /// The stable name that is sent.
            #[must_use]
            pub fn as_str(self) -> &'static str {
                match self {
                    $(Self::$name => stringify!($name),)*
                }
            }

            /// Whether the same request may succeed later although the caller changes nothing.
            #[must_use]
            pub fn retryable(self) -> bool {
                match self {
                    $(Self::$name => $retryable,)*
                }
            }

            /// The gRPC code that is sent with this reason, for callers that do not know reasons.
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
    /// No pod has this uid.
    NotFound => NotFound, false;
    /// The request's leadership epoch is lower than one seen before: another kubelet leads.
    StaleLeader => FailedPrecondition, false;
    /// A pod with this uid exists, and the request changes a part of its shape that must not change.
    SpecConflict => AlreadyExists, false;
    /// The pod's shape or values are invalid; the message names every problem.
    InvalidSpec => InvalidArgument, false;
    /// The request requires a finished pod, and the pod has not finished.
    NotFinished => FailedPrecondition, true;
    /// The pod or container is not running, which streams require.
    NotRunning => FailedPrecondition, true;
    /// The pod has no container of this name, or the container has no such instance.
    ContainerNotFound => NotFound, false;
    /// A newer agent holds the state directory; this one no longer changes anything.
    AgentFenced => FailedPrecondition, false;
    /// Slurm's controller (slurmctld) does not answer.
    SchedulerUnavailable => Unavailable, true;
    /// A bounded queue is full, or a limit of the site is reached.
    Overloaded => ResourceExhausted, true;
    /// The agent serves another cluster.
    ClusterMismatch => PermissionDenied, false;
    /// The agent's policy denies the request to this identity.
    PermissionDenied => PermissionDenied, false;
    /// The site does not let pods reach this Service of the cluster.
    PolicyDenied => PermissionDenied, false;
    /// The peer itself is denied: its identity or certificate is denied or expired, or was not issued by the site's CA.
    /// This does not depend on the request.
    PeerDenied => PermissionDenied, false;
    /// The peer may not claim this leadership: the node belongs to another identity, or the epoch is impossible.
    LeadershipDenied => FailedPrecondition, false;
    /// No process of the pod listens on this port, or it refused the connection.
    NotListening => FailedPrecondition, true;
    /// This agent, runtime or site does not support the request.
    Unsupported => Unimplemented, false;
    /// The job's shim has no link to the agent at the moment.
    ShimUnreachable => Unavailable, true;
    /// The request is malformed (a missing field, or a wrong first message of a stream).
    InvalidRequest => InvalidArgument, false;
    /// The process is shutting down; another one takes over.
    ShuttingDown => Unavailable, true;
    /// The agent itself has failed, for example because of a full disk; the message has the chain of errors.
    Internal => Internal, true;
}

impl ErrorReason {
    /// A gRPC status with this reason, and with `message` escaped and bounded in length.
    #[must_use]
    pub fn status(self, message: impl Into<String>) -> Status {
        let message = message.into();
        let mut status = Status::new(self.code(), text::shorten(&message, MESSAGE));
        status
            .metadata_mut()
            .insert(TRAILER, MetadataValue::from_static(self.as_str()));
        status
    }

    /// The reason of a status, if it is one that this version knows.
    #[must_use]
    pub fn of(status: &Status) -> Option<Self> {
        let name = status.metadata().get(TRAILER)?.to_str().ok()?;
        Self::ALL
            .iter()
            .copied()
            .find(|reason| reason.as_str() == name)
    }

    /// Whether the request that got this status may succeed later: decided by the reason if there is one, otherwise by
    /// the code.
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
