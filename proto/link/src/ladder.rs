//! PURE: on which rung of the ladder to the agent a link has failed, and what to do, from the text of its error.
//!
//! ```text
//! name resolution → port | proxy | SSH, host key, login, program there → TLS → identity → agent → version
//! ```
//!
//! The text is all that is left of an error that has passed gRPC, of one that an address had a moment ago, and of what the
//! other side's TLS says. The same rules serve `knocctl doctor` and the kubelet's condition and Events.

use std::fmt;

/// A step on the way to the agent.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Rung {
    /// The host's name.
    Name,
    /// The network to the port.
    Port,
    /// The proxy on the way.
    Proxy,
    /// The SSH server, or a jump host.
    Ssh,
    /// The host's key.
    HostKey,
    /// The user's key.
    Login,
    /// `knoc-agent` at the far side of a login.
    Program,
    /// The handshake, and the dates of certificates.
    Tls,
    /// Who the other side is, and whom it serves.
    Identity,
    /// The agent itself.
    Agent,
    /// Its version.
    Version,
}

impl fmt::Display for Rung {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Name => "name resolution",
            Self::Port => "port",
            Self::Proxy => "proxy",
            Self::Ssh => "SSH",
            Self::HostKey => "host key",
            Self::Login => "login",
            Self::Program => "program",
            Self::Tls => "TLS",
            Self::Identity => "identity",
            Self::Agent => "agent",
            Self::Version => "version",
        })
    }
}

/// What each rung's errors say, and what to do. The first that fits applies; an empty cure is in the error itself.
const RULES: &[(Rung, &[&str], &str)] = &[
    (
        Rung::HostKey,
        &[
            "key is not the one in known_hosts",
            "known_hosts has no key",
        ],
        "",
    ),
    (
        Rung::Login,
        &[
            "the login was refused",
            "the private key cannot be used",
            "/etc/passwd does not name",
        ],
        "",
    ),
    (
        Rung::Program,
        &[
            "no knoc-agent on the login node",
            "what answers is not `knoc-agent connect`",
            "the far side speaks",
        ],
        "",
    ),
    (
        Rung::Agent,
        &["knoc-agent on the login node does not reach the agent"],
        "",
    ),
    (Rung::Name, &["Could not resolve hostname"], ""),
    (
        Rung::Ssh,
        &[
            "no further session",
            "the jump host does not answer",
            "the host does not answer, or closes the connection",
            "log in to ssh:",
        ],
        "",
    ),
    (
        Rung::Proxy,
        &["the proxy ", "through a proxy"],
        "check the proxy's address and credentials, or HTTPS_PROXY and NO_PROXY",
    ),
    (
        Rung::Name,
        &["failed to lookup address"],
        "fix the host's name in the address, or the name server",
    ),
    (
        Rung::Tls,
        &["terminates TLS"],
        "let TLS pass through to the agent's port, or fix the address",
    ),
    (
        Rung::Identity,
        &[
            "of the CA that is trusted here",
            "does not trust the CA",
            "UnknownIssuer",
            "UnknownCA",
            "BadSignature",
            "DecryptError",
        ],
        "the two sides trust different CAs: take ca, cert and key from one bundle of this agent",
    ),
    (
        Rung::Tls,
        &["clock", "xpired", "NotValidYet"],
        "renew the certificate, or correct the clock that is wrong: compare `date` on both sides",
    ),
    (
        Rung::Identity,
        &["not the expected"],
        "this is another agent: fix the address or the name of the site",
    ),
    (
        Rung::Identity,
        &["policy.clients", "policy.denied"],
        "[policy] of the agent's site file decides who is served",
    ),
    (
        Rung::Version,
        &["does not speak HTTP/2", "nimplemented"],
        "the two sides are of versions that do not fit, or something else listens there",
    ),
    (
        Rung::Identity,
        &["refused our certificate", "alert"],
        "the agent refused our certificate; its log says why",
    ),
    (
        Rung::Tls,
        &["TLS handshake", "tls handshake"],
        "is it the agent that listens there? Its log says more",
    ),
    (
        Rung::Agent,
        &["no process of this host serves"],
        "start the agent (`knoc-agent serve`), or log in to the host on which it runs",
    ),
    (
        Rung::Port,
        &["Connection refused"],
        "nobody listens there: start the agent (`knoc-agent serve`), or fix the address",
    ),
    (
        Rung::Port,
        &[
            "no answer from",
            "timed out",
            "No route to host",
            "Network is unreachable",
        ],
        "a firewall drops the packets, or the host is down: check route and firewall between here and the login node",
    ),
];

/// The rung on which a link has failed, and what to do about it unless the error says it; `None` if the text is not known.
#[must_use]
pub fn look(error: &str) -> Option<(Rung, &'static str)> {
    let mut rules = RULES.iter();
    let fits = |texts: &[&str]| texts.iter().any(|text| error.contains(text));
    let (rung, _, cure) = rules.find(|(_, texts, _)| fits(texts))?;
    Some((*rung, cure))
}

/// Whether the login node refused a further session of this user.
#[must_use]
pub fn no_further_session(error: &str) -> bool {
    error.contains("allows no further session")
}

/// The error with its rung before it and its cure behind it, in one line.
#[must_use]
pub fn explain(error: &str) -> String {
    match look(error) {
        Some((rung, "")) => format!("{rung}: {error}"),
        Some((rung, cure)) => format!("{rung}: {error}; {cure}"),
        None => error.to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Errors, the rung of each, and a part of its cure.
    const ERRORS: &[(&str, Rung, &str)] = &[
        (
            "connect to login:10350: failed to lookup address information: Name or service not known",
            Rung::Name,
            "name server",
        ),
        (
            "connect to tcp:1.2.3.4:10350: Connection refused (os error 111)",
            Rung::Port,
            "nobody listens",
        ),
        (
            "no answer from login:10350 within 10 s",
            Rung::Port,
            "firewall",
        ),
        (
            "connect to login:10350 through a proxy: connect to the proxy p:3128: Connection refused",
            Rung::Proxy,
            "NO_PROXY",
        ),
        (
            "connect to ssh:u@login: the jump host does not answer, or does not reach the login node",
            Rung::Ssh,
            "",
        ),
        (
            "connect to ssh:u@login: known_hosts has no key that the host proves",
            Rung::HostKey,
            "",
        ),
        (
            "connect to ssh:u@login: the login was refused (exit status: 255)",
            Rung::Login,
            "",
        ),
        (
            "connect to ssh:u@login: there is no knoc-agent on the login node",
            Rung::Program,
            "",
        ),
        (
            "connect to ssh:u@login: knoc-agent on the login node does not reach the agent",
            Rung::Agent,
            "",
        ),
        (
            "TLS handshake with login: tls handshake eof",
            Rung::Tls,
            "listens there",
        ),
        (
            "TLS handshake with login: received fatal alert: UnknownCA",
            Rung::Identity,
            "different CAs",
        ),
        (
            "TLS handshake with login: received fatal alert: CertificateExpired",
            Rung::Tls,
            "clock",
        ),
        (
            "TLS handshake with login: received fatal alert: CertificateUnknown",
            Rung::Identity,
            "its log",
        ),
        (
            "the peer is agent/a, not the expected agent/b",
            Rung::Identity,
            "another agent",
        ),
        ("1.2.3.4 does not speak HTTP/2", Rung::Version, "versions"),
    ];

    #[test]
    fn a_limit_of_sessions_is_known_by_what_the_error_says() {
        let limit = crate::carrier::exec::Cause::SessionLimit.to_string();
        assert!(no_further_session(&limit));
        assert!(!no_further_session("the login was refused"));
    }

    #[test]
    fn each_rung_is_known_by_what_its_errors_say() {
        for &(error, rung, cure) in ERRORS {
            let (found, advice) = look(error).unwrap();
            assert_eq!(found, rung, "{error}");
            assert!(advice.contains(cure), "{error}: {advice}");
        }
        assert_eq!(look("the agent ended WatchPods"), None);
    }

    #[test]
    fn an_explanation_is_one_line_and_repeats_no_cure() {
        assert_eq!(
            explain("connect to x: Connection refused"),
            "port: connect to x: Connection refused; nobody listens there: start the agent (`knoc-agent serve`), or fix the address"
        );
        let ssh = "connect to ssh:login: the login was refused; add the key";
        assert_eq!(explain(ssh), format!("login: {ssh}"));
        assert_eq!(explain("something else"), "something else");
    }
}
