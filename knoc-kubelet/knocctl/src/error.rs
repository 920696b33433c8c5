//! Why a command failed, and what to do next. Pure.

use std::{io, net::SocketAddr, path::PathBuf};

use knoc_link::{CredentialsError, LinkError};
use knoc_proto::reason::ErrorReason;
use tonic::{Code, Status};

use super::{agent::ManageError, config::ConfigError, manifest::ManifestError};

/// Why a command failed.
#[derive(Debug, thiserror::Error)]
pub(crate) enum CtlError {
    #[error(transparent)]
    Config(#[from] ConfigError),
    #[error("load the certificates of context {context}")]
    Credentials {
        context: String,
        #[source]
        source: CredentialsError,
    },
    #[error("reach the agent")]
    Link {
        #[source]
        source: LinkError,
    },
    /// The agent returned an error, or the request did not reach it.
    #[error("{what}")]
    Agent {
        what: String,
        #[source]
        source: Status,
    },
    #[error("{what}: no answer within {seconds} s")]
    Timeout { what: String, seconds: u64 },
    #[error("{what}: the link ended before the answer was complete")]
    CutShort { what: String },
    #[error(transparent)]
    Manifest(#[from] ManifestError),
    /// An agent cannot be installed or managed over SSH.
    #[error(transparent)]
    Manage(#[from] ManageError),
    #[error("read {}", path.display())]
    Read {
        path: PathBuf,
        #[source]
        source: io::Error,
    },
    #[error("the agent knows no pod {wanted}")]
    NoPod { wanted: String },
    #[error("{wanted} is ambiguous: {}", candidates.join(", "))]
    Ambiguous {
        wanted: String,
        /// `NAMESPACE/NAME (UID)` of each pod that matches.
        candidates: Vec<String>,
    },
    /// The manifest's pod has another uid than the existing pod of the same name.
    #[error("the pod {name} is there already (uid {uid})")]
    Exists {
        /// `NAMESPACE/NAME`.
        name: String,
        /// The uid of the existing pod.
        uid: String,
    },
    #[error("start the command in the container: {message}")]
    NotStarted { message: String },
    /// The agent closed the attached streams; the program continues to run.
    #[error("{message}")]
    Detached { message: String },
    #[error("the pod {pod} has ended")]
    PodEnded { pod: String },
    #[error("listen on {address}")]
    Listen {
        address: SocketAddr,
        #[source]
        source: io::Error,
    },
    /// Both sides of a copy are local, or both are in pods.
    #[error("one of source and destination must be POD:PATH, the other a local path")]
    CopySides,
    /// The path has no last component, such as `/` or `..`.
    #[error("{path:?} names no file or folder to copy")]
    CopyPath { path: String },
    /// A local file or the archive cannot be read or written.
    #[error("{what}")]
    Copy {
        /// The action and its file.
        what: String,
        #[source]
        source: io::Error,
    },
    /// The archive contains an entry that would be written outside of the destination.
    #[error("the archive from the pod names {}, outside of what was asked for", name.display())]
    Archive { name: PathBuf },
    /// `cp` needs `tar` in the container.
    #[error("there is no `tar` in the container of {pod}")]
    NoTar { pod: String },
    #[error("tar in the container of {pod} ended with code {code}: {stderr}")]
    Tar {
        pod: String,
        code: i32,
        /// The last part of its stderr.
        stderr: String,
    },
    /// A setting of the local terminal cannot be read or changed.
    #[error("{what} of the terminal")]
    Terminal {
        what: &'static str,
        #[source]
        source: io::Error,
    },
    /// knocctl was ended by a signal.
    #[error("ended by {name}")]
    Signal { name: &'static str },
    #[error("read standard input")]
    Input {
        #[source]
        source: io::Error,
    },
    #[error("write to standard output")]
    Print {
        #[source]
        source: io::Error,
    },
    /// Other processes of the user could read knocctl's memory.
    #[error("keep the memory of this process private")]
    Private {
        #[source]
        source: io::Error,
    },
    /// tokio's runtime cannot be started.
    #[error("start the runtime")]
    Runtime {
        #[source]
        source: io::Error,
    },
}

impl CtlError {
    /// What to do next, if that is known.
    #[must_use]
    pub(crate) fn hint(&self) -> Option<String> {
        let hint = match self {
            Self::Config(error) => return error.hint(),
            Self::Credentials { .. } => {
                "the files come from the agent's bundle (`knoc-agent init`); `knocctl doctor` checks each of them"
            }
            Self::Link { .. } => "run `knocctl doctor` to check the whole chain",
            Self::Agent { source, .. } => return hint_for(source),
            Self::Timeout { .. } | Self::CutShort { .. } => {
                "try again, or run `knocctl doctor` to check the whole chain"
            }
            Self::Manifest(error) => return error.hint(),
            Self::Manage(error) => return error.hint(),
            Self::NoPod { .. } => "`knocctl pods` lists the pods that the agent knows",
            Self::Ambiguous { .. } => "use the uid, or NAMESPACE/NAME",
            Self::Exists { name, .. } => {
                return Some(format!(
                    "`knocctl delete {name}` deletes it and its job directory"
                ));
            }
            Self::Detached { .. } => {
                "`knocctl logs` has the complete output; attach again to continue"
            }
            Self::PodEnded { .. } => "`knocctl describe POD` shows how it ended",
            Self::Listen { .. } => {
                "choose another local port (LOCAL:REMOTE), or any free one (:REMOTE)"
            }
            Self::CopySides => {
                "`knocctl cp --help` shows the forms; a local path with a colon begins with ./"
            }
            Self::CopyPath { .. } => "give the file or folder itself",
            Self::NoTar { .. } => {
                "put `tar` in the image, or pass bytes through exec: `knocctl exec -i POD -- sh -c 'cat >FILE' <FILE`"
            }
            Self::Tar { .. } => {
                "check that the path exists and that the container's user can write there"
            }
            Self::NotStarted { .. } => "is the command in the image? Try a shell: `-- sh`",
            Self::Read { .. }
            | Self::Copy { .. }
            | Self::Archive { .. }
            | Self::Terminal { .. }
            | Self::Signal { .. }
            | Self::Input { .. }
            | Self::Print { .. }
            | Self::Private { .. }
            | Self::Runtime { .. } => return None,
        };
        Some(hint.to_owned())
    }
}

/// What to do about the agent's error.
fn hint_for(status: &Status) -> Option<String> {
    let Some(reason) = ErrorReason::of(status) else {
        let hint = if status.code() == Code::Unavailable {
            "is the agent running? Run `knocctl doctor` to check the whole chain"
        } else if status.code() == Code::Unimplemented {
            "the agent is older than this: `knocctl info` shows its version"
        } else {
            return None;
        };
        return Some(hint.to_owned());
    };
    let hint = match reason {
        ErrorReason::NotFound => "`knocctl pods` lists the pods that the agent knows",
        ErrorReason::ContainerNotFound => "`knocctl describe POD` shows the pod's containers",
        ErrorReason::NotFinished => "`knocctl delete POD` ends the pod first",
        ErrorReason::NotRunning | ErrorReason::ShimUnreachable => {
            "`knocctl describe POD` shows where the pod stands"
        }
        ErrorReason::NotListening => {
            "a program of the pod must listen on this port at 127.0.0.1, ::1 or all addresses; its log may say more"
        }
        ErrorReason::SpecConflict => {
            "a pod cannot change while it runs: delete it, or run it by another name"
        }
        ErrorReason::PeerDenied => {
            "the agent's site file or CA does not let this certificate in: `knocctl doctor` says which one is used"
        }
        ErrorReason::LeadershipDenied => {
            "only a node's kubelet claims its leadership; see policy.nodes"
        }
        ErrorReason::StaleLeader | ErrorReason::AgentFenced => {
            "another process has taken over; `knocctl info` shows which agent answers"
        }
        ErrorReason::SchedulerUnavailable => {
            "Slurm's controller does not answer; the agent tries again by itself"
        }
        ErrorReason::Overloaded | ErrorReason::ShuttingDown => "try again in a moment",
        ErrorReason::ClusterMismatch
        | ErrorReason::PermissionDenied
        | ErrorReason::PolicyDenied => {
            "the agent's site file says whom it serves and what they may do ([policy])"
        }
        ErrorReason::Unsupported => {
            "`knocctl info` shows versions, scheduler and runtime of the agent"
        }
        ErrorReason::Internal => "the agent's log has more; `knocctl doctor` looks at its parts",
        ErrorReason::InvalidSpec | ErrorReason::InvalidRequest => return None,
    };
    Some(hint.to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_reason_that_a_user_can_fix_has_a_hint() {
        for reason in ErrorReason::ALL {
            let source = reason.status("message");
            let error = CtlError::Agent {
                what: "delete pod x".into(),
                source,
            };
            let silent = matches!(
                reason,
                ErrorReason::InvalidSpec | ErrorReason::InvalidRequest
            );
            assert_eq!(error.hint().is_none(), silent, "{reason}");
            assert_eq!(knoc_proto::error::chain(&error), "delete pod x: message");
        }
    }
}
