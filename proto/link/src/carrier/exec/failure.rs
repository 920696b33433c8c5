//! PURE: why a command gave no link, or why the link over it ended, from what the command said on stderr.
use std::{fmt, io};

use super::marker::{MAX_BANNER, Speaks};

/// The lines of stderr that an error shows.
const SHOWN_LINES: usize = 3;

/// Why there is no link over a command.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Cause {
    /// The program itself is not on this host.
    NoProgram,
    /// The host's key is not the one in `known_hosts`.
    HostKeyChanged,
    /// `known_hosts` has no key for the host.
    HostKeyUnknown,
    /// The private key cannot be used.
    BadKey,
    /// This process runs as a user that the system does not know.
    NoUser,
    /// The login was refused.
    KeyRefused,
    /// The host allows no further session of this user.
    SessionLimit,
    /// The jump host does not answer, or does not reach the login node.
    JumpAway,
    /// The host does not answer.
    Unreachable,
    /// There is no `knoc-agent` on the login node.
    NoAgentProgram,
    /// `knoc-agent` on the login node says that it cannot reach the agent.
    NoAgent,
    /// The stream behind the command is not one of `knoc-agent connect`.
    NoMarker,
    /// The far side speaks something else than this side expects.
    OtherSpeech(Speaks),
    /// No marker in time.
    Late,
    /// Anything else; the command's stderr says more.
    Other,
}

impl Cause {
    /// PURE: the cause, from how the command ended and from its stderr.
    pub(super) fn of(code: Option<i32>, stderr: &str) -> Self {
        let says = |any: &[&str]| any.iter().any(|text| stderr.contains(text));
        if says(&["REMOTE HOST IDENTIFICATION HAS CHANGED"]) {
            Self::HostKeyChanged
        } else if says(&["host key is known for", "Host key verification failed"]) {
            Self::HostKeyUnknown
        } else if says(&["No user exists for uid"]) {
            Self::NoUser
        } else if says(&[
            "Session open refused",
            "no more sessions",
            "Too many logins",
            "session request failed",
            "shell request failed",
            "exec request failed",
        ]) {
            Self::SessionLimit
        } else if says(&["stdio forwarding failed", "UNKNOWN port 65535"]) {
            Self::JumpAway
        } else if says(&["Load key", "bad permissions", "UNPROTECTED PRIVATE KEY"]) {
            Self::BadKey
        } else if says(&[
            "Permission denied (",
            "Too many authentication failures",
            "No supported authentication",
        ]) {
            Self::KeyRefused
        } else if code == Some(127)
            || says(&[
                "knoc-agent: command not found",
                "knoc-agent: Command not found",
                "Unknown command: knoc-agent",
            ])
        {
            Self::NoAgentProgram
        } else if stderr.contains("knoc-agent: ") && code == Some(1) {
            // Whatever it says about the agent's socket; ssh itself ends with 255.
            Self::NoAgent
        } else if says(&[
            "Connection refused",
            "timed out",
            "No route to host",
            "Network is unreachable",
            "Could not resolve hostname",
            "Connection reset",
            "Connection closed by",
            "kex_exchange_identification",
            "not responding",
        ]) {
            Self::Unreachable
        } else {
            Self::Other
        }
    }

    /// Whether the other side may count this as an attempt to break in.
    #[must_use]
    pub fn is_authentication(self) -> bool {
        matches!(self, Self::KeyRefused | Self::BadKey)
    }

    /// Whether nothing changes until a person changes something.
    #[must_use]
    pub fn needs_a_person(self) -> bool {
        matches!(
            self,
            Self::NoProgram
                | Self::HostKeyChanged
                | Self::HostKeyUnknown
                | Self::NoUser
                | Self::NoAgentProgram
                | Self::NoMarker
                | Self::OtherSpeech(_)
        )
    }

    fn cure(self) -> &'static str {
        match self {
            Self::NoProgram => "install it; the kubelet's image with the suffix -ssh has OpenSSH",
            Self::HostKeyChanged => {
                "if the site has really replaced the key, put the new one into known_hosts after comparing its fingerprint \
                 with the one that the site publishes; if it has not, somebody answers in its place"
            }
            Self::HostKeyUnknown => {
                "add the host's key to known_hosts: `ssh-keyscan -p PORT HOST`, then compare `ssh-keygen -lf known_hosts` \
                 with the fingerprint that the site publishes"
            }
            Self::BadKey => {
                "the private key must be a whole key without a passphrase in OpenSSH's or PEM format"
            }
            Self::NoUser => {
                "ssh needs a line in /etc/passwd for the user that it runs as: do not change runAsUser of the kubelet's image"
            }
            Self::KeyRefused => {
                "add the key to ~/.ssh/authorized_keys of that user, or fix user and key; the next attempts are minutes apart, \
                 so that the site does not block this address"
            }
            Self::SessionLimit => {
                "the host limits the sessions of this user: end some, or ask the site to raise MaxSessions or maxlogins"
            }
            Self::JumpAway => "check the jump host, and that it may connect to the login node",
            Self::Unreachable => "check host name, port and firewall between here and the host",
            Self::NoAgentProgram => {
                "install knoc-agent in ~/.local/bin of that login, or give its path in the setting for the program at the far side"
            }
            Self::NoAgent => "start the agent on the login node, or let it be started on demand",
            Self::NoMarker => {
                "the command must end in `knoc-agent connect` or `knoc-agent serve --stdio` of this version or later, and \
                 without a terminal"
            }
            Self::OtherSpeech(Speaks::Tls) => {
                "the key's forced command is `knoc-agent connect`, which serves clients with a certificate: give this one a \
                 certificate, or use `knoc-agent connect --plain`"
            }
            Self::OtherSpeech(Speaks::Plain) => {
                "a client with a certificate needs `knoc-agent connect` without --plain at the far side"
            }
            Self::Late => "the host answers too slowly, or the command waits for input",
            Self::Other => "",
        }
    }
}

impl fmt::Display for Cause {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::NoProgram => "the program is not on this host",
            Self::HostKeyChanged => "the host's key is not the one in known_hosts",
            Self::HostKeyUnknown => "known_hosts has no key that the host proves",
            Self::BadKey => "the private key cannot be used",
            Self::NoUser => "this process runs as a user that /etc/passwd does not name",
            Self::KeyRefused => "the login was refused",
            Self::SessionLimit => "the host allows no further session",
            Self::JumpAway => "the jump host does not answer, or does not reach the login node",
            Self::Unreachable => "the host does not answer, or closes the connection",
            Self::NoAgentProgram => "there is no knoc-agent on the login node",
            Self::NoAgent => "knoc-agent on the login node does not reach the agent",
            Self::NoMarker => "what answers is not `knoc-agent connect`",
            Self::OtherSpeech(Speaks::Tls) => {
                "the far side speaks TLS, and this client has no certificate"
            }
            Self::OtherSpeech(Speaks::Plain) => {
                "the far side speaks no TLS, and this client has a certificate"
            }
            Self::Late => "no answer in time",
            Self::Other => "the command has ended",
        })
    }
}

/// A command that gave no link, or whose link has ended.
#[derive(Debug, thiserror::Error)]
pub struct CommandFailure {
    /// Why.
    pub cause: Cause,
    /// How the command ended, if it has.
    pub(super) ended: Option<String>,
    /// The end of its stderr.
    pub(super) stderr: String,
    /// The system's message, if it could not be started.
    #[source]
    pub(super) source: Option<io::Error>,
}

impl fmt::Display for CommandFailure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.cause)?;
        if let Some(ended) = &self.ended {
            write!(f, " ({ended})")?;
        }
        let said = last_lines(&self.stderr);
        if !said.is_empty() {
            write!(f, ": {said}")?;
        }
        match self.cause.cure() {
            "" => Ok(()),
            cure => write!(f, "; {cure}"),
        }
    }
}

impl CommandFailure {
    /// A failure of this side, before the command has ended.
    pub(in crate::carrier) fn of(cause: Cause, stderr: String) -> Self {
        Self {
            cause,
            ended: None,
            stderr,
            source: None,
        }
    }

    /// The program could not be started.
    pub(super) fn not_started(source: io::Error) -> Self {
        let cause = if source.kind() == io::ErrorKind::NotFound {
            Cause::NoProgram
        } else {
            Cause::Other
        };
        Self {
            cause,
            ended: None,
            stderr: String::new(),
            source: Some(source),
        }
    }

    /// The command's input or output broke, and it did not say why.
    pub(in crate::carrier) fn broken(source: io::Error) -> Self {
        Self {
            source: Some(source),
            ..Self::of(Cause::Other, String::new())
        }
    }

    /// More was printed than a banner may have.
    pub(super) fn too_much(stderr: String) -> Self {
        Self {
            ended: Some(format!(
                "more than {} KiB without its marker",
                MAX_BANNER >> 10
            )),
            ..Self::of(Cause::NoMarker, stderr)
        }
    }
}

/// PURE: the last lines of a text as one line.
fn last_lines(text: &str) -> String {
    let lines = text.lines().map(str::trim).filter(|line| !line.is_empty());
    let mut last: Vec<&str> = lines.rev().take(SHOWN_LINES).collect();
    last.reverse();
    last.join(" / ")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[expect(clippy::too_many_lines, reason = "one table of texts and causes")]
    #[test]
    fn what_openssh_and_shells_say_is_recognised() {
        for (code, said, expected) in [
            (
                255,
                "@ WARNING: REMOTE HOST IDENTIFICATION HAS CHANGED! @\nHost key verification failed.",
                Cause::HostKeyChanged,
            ),
            (
                255,
                "No ED25519 host key is known for [127.0.0.1]:22 and you have requested strict checking.\r\nHost key verification failed.\r",
                Cause::HostKeyUnknown,
            ),
            (
                255,
                "u@login: Permission denied (publickey,password).",
                Cause::KeyRefused,
            ),
            (
                255,
                "Load key \"/dev/shm/k\": error in libcrypto\nu@h: Permission denied (publickey).",
                Cause::BadKey,
            ),
            (
                255,
                "ssh: connect to host login port 22: Connection refused",
                Cause::Unreachable,
            ),
            (
                255,
                "ssh: Could not resolve hostname nowhere: Name or service not known",
                Cause::Unreachable,
            ),
            (
                255,
                "channel 0: open failed: connect failed: Connection refused\nstdio forwarding failed\nConnection closed by UNKNOWN port 65535",
                Cause::JumpAway,
            ),
            (
                127,
                "bash: line 1: knoc-agent: command not found",
                Cause::NoAgentProgram,
            ),
            (
                127,
                "sh: 1: exec: knoc-agent: not found",
                Cause::NoAgentProgram,
            ),
            (1, "knoc-agent: Command not found.", Cause::NoAgentProgram),
            (
                1,
                "knoc-agent: relay to the agent: connect to unix:/run/x",
                Cause::NoAgent,
            ),
            (
                1,
                "knoc-agent: relay to the agent: no process of this host serves unix:/run/x: Connection refused (os error 111)",
                Cause::NoAgent,
            ),
            (
                255,
                "mux_client_request_session: session request failed: Session open refused by peer",
                Cause::SessionLimit,
            ),
            (
                254,
                "There were too many logins for 'u'.\nToo many logins for 'u'.",
                Cause::SessionLimit,
            ),
            (255, "No user exists for uid 1234", Cause::NoUser),
            (3, "something else", Cause::Other),
        ] {
            assert_eq!(Cause::of(Some(code), said), expected, "{said}");
        }
    }

    #[test]
    fn a_failure_says_cause_words_and_cure_in_one_line() {
        let failure = CommandFailure {
            ended: Some("exit status: 255".into()),
            ..CommandFailure::of(
                Cause::KeyRefused,
                "a banner\nof three\nlines\r\nu@h: Permission denied (publickey).\r\n".into(),
            )
        };
        let text = failure.to_string();
        assert!(text.starts_with("the login was refused (exit status: 255): of three / lines / u@h: Permission denied"), "{text}");
        assert!(
            text.contains("authorized_keys") && !text.contains('\n'),
            "{text}"
        );
    }
}
