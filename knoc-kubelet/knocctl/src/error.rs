//! Why a command failed, and what to do next. Pure.

use std::{io, net::SocketAddr, path::PathBuf};

use knoc_link::{CredentialsError, LinkError};
use knoc_proto::reason::ErrorReason;
use tonic::{Code, Status};

use super::{config::ConfigError, manifest::ManifestError};

/// Why a command failed.
#[derive(Debug, thiserror::Error)]
pub(crate) enum CtlError {
    /// The configuration is wrong.
    #[error(transparent)]
    Config(#[from] ConfigError),
    /// The certificates are no good.
    #[error("load the certificates of context {context}")]
    Credentials {
        /// Which context.
        context: String,
        /// Why.
        #[source]
        source: CredentialsError,
    },
    /// No link can be made.
    #[error("reach the agent")]
    Link {
        /// Why.
        #[source]
        source: LinkError,
    },
    /// The agent refused, or could not be asked.
    #[error("{what}")]
    Agent {
        /// What was tried.
        what: String,
        /// Its answer.
        #[source]
        source: Status,
    },
    /// The agent took too long.
    #[error("{what}: no answer within {seconds} s")]
    Timeout {
        /// What was tried.
        what: String,
        /// The deadline.
        seconds: u64,
    },
    /// The agent ended a stream too early.
    #[error("{what}: the link ended before the answer was complete")]
    CutShort {
        /// What was tried.
        what: String,
    },
    /// The manifest cannot be run.
    #[error(transparent)]
    Manifest(#[from] ManifestError),
    /// A file cannot be read.
    #[error("read {}", path.display())]
    Read {
        /// Which.
        path: PathBuf,
        /// The system's words.
        #[source]
        source: io::Error,
    },
    /// No such pod.
    #[error("the agent knows no pod {wanted}")]
    NoPod {
        /// As given.
        wanted: String,
    },
    /// Several such pods.
    #[error("{wanted} is ambiguous: {}", candidates.join(", "))]
    Ambiguous {
        /// As given.
        wanted: String,
        /// Namespace/name and uid of each.
        candidates: Vec<String>,
    },
    /// There is one of this name already.
    #[error("the pod {name} is there already (uid {uid})")]
    Exists {
        /// Namespace/name.
        name: String,
        /// Its uid.
        uid: String,
    },
    /// The command could not be started in the container.
    #[error("start the command in the container: {words}")]
    NotStarted {
        /// The system's words.
        words: String,
    },
    /// The agent let go of us while the program goes on.
    #[error("{words}")]
    Detached {
        /// Why.
        words: String,
    },
    /// No program is left to talk to.
    #[error("the pod {pod} has ended")]
    PodEnded {
        /// As given.
        pod: String,
    },
    /// A local port cannot be had.
    #[error("listen on {address}")]
    Listen {
        /// Where.
        address: SocketAddr,
        /// The system's words.
        #[source]
        source: io::Error,
    },
    /// Both sides of a copy here, or both in pods.
    #[error("one of source and destination must be POD:PATH, the other a local path")]
    CopySides,
    /// Nothing that has a name.
    #[error("{path:?} names no file or folder to copy")]
    CopyPath {
        /// As given.
        path: String,
    },
    /// A local file cannot be read or written, or the archive cannot be.
    #[error("{what}")]
    Copy {
        /// What was tried, on which file.
        what: String,
        /// The system's words.
        #[source]
        source: io::Error,
    },
    /// An archive that wants to be written elsewhere.
    #[error("the archive from the pod names {}, outside of what was asked for", name.display())]
    Archive {
        /// The entry.
        name: PathBuf,
    },
    /// `cp` rests on `tar`.
    #[error("there is no `tar` in the container of {pod}")]
    NoTar {
        /// As given.
        pod: String,
    },
    /// `tar` failed in the container.
    #[error("tar in the container of {pod} ended with code {code}: {words}")]
    Tar {
        /// As given.
        pod: String,
        /// Its exit code.
        code: i32,
        /// What it said.
        words: String,
    },
    /// The terminal does not do what it should.
    #[error("{what} of the terminal")]
    Terminal {
        /// What was tried.
        what: &'static str,
        /// The system's words.
        #[source]
        source: io::Error,
    },
    /// A signal asked us to end.
    #[error("ended by {name}")]
    Signal {
        /// Its name.
        name: &'static str,
    },
    /// Standard input cannot be read.
    #[error("read standard input")]
    Input {
        /// The system's words.
        #[source]
        source: io::Error,
    },
    /// Standard output cannot be written.
    #[error("write to standard output")]
    Print {
        /// The system's words.
        #[source]
        source: io::Error,
    },
    /// Others could read its memory.
    #[error("keep the memory of this process private")]
    Private {
        /// The system's words.
        #[source]
        source: io::Error,
    },
    /// Nothing can run.
    #[error("start the runtime")]
    Runtime {
        /// The system's words.
        #[source]
        source: io::Error,
    },
}

impl CtlError {
    /// What to do next, where that is known.
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

/// What the agent's refusal asks for.
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
        ErrorReason::ClusterMismatch | ErrorReason::PermissionDenied => {
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
    fn every_reason_that_a_user_can_mend_has_a_hint() {
        for reason in ErrorReason::ALL {
            let source = reason.status("words");
            let error = CtlError::Agent {
                what: "delete pod x".into(),
                source,
            };
            let silent = matches!(
                reason,
                ErrorReason::InvalidSpec | ErrorReason::InvalidRequest
            );
            assert_eq!(error.hint().is_none(), silent, "{reason}");
            assert_eq!(knoc_proto::error::chain(&error), "delete pod x: words");
        }
    }
}
