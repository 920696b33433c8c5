//! `knocctl doctor`: checks the chain from the configuration to the agent's tools step by step. Each finding is one line;
//! if a step fails, a second line says what to do. The first failed step on the way to the agent ends the checks. The
//! agent's own findings are always shown completely.
//!
//! With `--preflight`, it checks what an installation needs instead ([`preflight`]).

mod preflight;

use std::{process::ExitCode, time::Duration};

use futures::StreamExt as _;
use jiff::Timestamp;
use knoc_link::{Credentials, LinkError, ladder};
use knoc_proto::{error::chain, pb};
use serde_json::{Value, json};

use super::{
    CtlError, Global,
    config::{Context, Surroundings},
    output::{self, Format, plain, print, span},
    session::{Session, context, credentials, expect},
    view,
};

/// A certificate that expires sooner is reported as a problem.
const SOON: Duration = Duration::from_hours(30 * 24);
/// How long the agent may take for all its findings.
const DIAGNOSE: Duration = Duration::from_mins(2);
/// The same with `--probe`: the probe job may wait in the queue.
const PROBE: Duration = Duration::from_mins(10);

#[derive(Debug, clap::Args)]
pub(super) struct Doctor {
    /// Also submits a one-minute job and checks from inside it
    #[arg(long)]
    probe: bool,
    #[command(flatten)]
    preflight: preflight::Options,
}

/// The findings so far.
struct Report {
    format: Format,
    findings: Vec<pb::Finding>,
}

impl Report {
    fn good(&mut self, check: &str, detail: impl Into<String>) -> Result<(), CtlError> {
        let detail = detail.into();
        self.add(pb::Finding {
            check: check.into(),
            ok: true,
            detail,
            cure: String::new(),
        })
    }

    fn bad(&mut self, check: &str, detail: &str, cure: &str) -> Result<(), CtlError> {
        let (detail, cure) = (detail.to_owned(), cure.to_owned());
        self.add(pb::Finding {
            check: check.into(),
            ok: false,
            detail,
            cure,
        })
    }

    /// Keeps a finding; in the formats for people it is printed at once.
    fn add(&mut self, finding: pb::Finding) -> Result<(), CtlError> {
        if matches!(self.format, Format::Table | Format::Wide) {
            print(&line(&finding))?;
        }
        self.findings.push(finding);
        Ok(())
    }

    fn end(&self) -> Result<ExitCode, CtlError> {
        let whole = self.findings.iter().all(|finding| finding.ok);
        if matches!(self.format, Format::Json | Format::Yaml) {
            let value = || Value::Array(self.findings.iter().map(finding_json).collect());
            output::show(self.format, value, |_| String::new())?;
        }
        Ok(if whole {
            ExitCode::SUCCESS
        } else {
            ExitCode::FAILURE
        })
    }
}

pub(super) fn finding_json(finding: &pb::Finding) -> Value {
    json!({"check": finding.check, "ok": finding.ok, "detail": finding.detail, "cure": finding.cure})
}

pub(super) fn line(finding: &pb::Finding) -> String {
    let mark = if finding.ok { '✓' } else { '✗' };
    let cause = format!(
        "{mark} {}: {}\n",
        plain(&finding.check),
        plain(&finding.detail)
    );
    if finding.cure.is_empty() {
        cause
    } else {
        format!("{cause}  → {}\n", plain(&finding.cure))
    }
}

impl Doctor {
    pub(super) async fn run(self, global: &Global) -> Result<ExitCode, CtlError> {
        let mut report = Report {
            format: global.output,
            findings: Vec::new(),
        };
        if self.preflight.asked() {
            self.preflight.run(self.probe, global, &mut report).await?;
        } else {
            self.walk(global, &mut report).await?;
        }
        report.end()
    }

    /// Checks each step until the first that fails. The only errors are those of printing.
    async fn walk(&self, global: &Global, report: &mut Report) -> Result<(), CtlError> {
        let context = match context(global) {
            Ok(context) => context,
            Err(error) => {
                let cure = error.hint().unwrap_or_else(|| "fix that line".to_owned());
                return report.bad("configuration", &chain(&error), &cure);
            }
        };
        report.good("configuration", configured(&context))?;
        let credentials = match credentials(&context) {
            Ok(credentials) => credentials,
            Err(error) => {
                let cure = "take the three files from the agent's bundle (`knoc-agent init`)";
                return report.bad("certificates", &chain(&error), cure);
            }
        };
        if let Some(credentials) = &credentials
            && !check_dates(report, credentials, Timestamp::now())?
        {
            return Ok(());
        }
        if !check_carrier(report, &context, credentials.as_ref()).await? {
            return Ok(());
        }
        let mut session = match Session::of(&context) {
            Ok(session) => session,
            Err(error) => return report.bad("link", &chain(&error), ""),
        };
        match session.info().await {
            Ok(info) => {
                check_info(report, &info)?;
                check_upgrade(report, &info, &mut session).await?;
            }
            Err(error) => {
                let detail = chain(&error);
                return report.bad("agent", &detail, cure_by_rung(&detail));
            }
        }
        self.diagnose(report, &mut session).await
    }

    /// Runs the agent's own checks and adds their findings.
    async fn diagnose(&self, report: &mut Report, session: &mut Session) -> Result<(), CtlError> {
        let deadline = tokio::time::Instant::now() + if self.probe { PROBE } else { DIAGNOSE };
        let request = pb::DiagnoseRequest { probe: self.probe };
        let asked = tokio::time::timeout_at(deadline, session.client.diagnose(request)).await;
        let mut findings = match asked {
            Ok(Ok(response)) => response.into_inner(),
            Ok(Err(status)) => {
                return report.bad("agent's checks", &chain(&status), "look at the agent's log");
            }
            Err(_) => {
                return report.bad(
                    "agent's checks",
                    "no answer in time",
                    "look at the agent's log",
                );
            }
        };
        let before = report.findings.len();
        loop {
            match tokio::time::timeout_at(deadline, findings.next()).await {
                Ok(Some(Ok(finding))) => report.add(finding)?,
                Ok(None) if report.findings.len() > before => return Ok(()),
                Ok(None) => {
                    let cure = "an agent older than knocctl? `knoc-agent version` on its host";
                    return report.bad("agent's checks", "the agent named none", cure);
                }
                Ok(Some(Err(status))) => {
                    return report.bad(
                        "agent's checks",
                        &chain(&status),
                        "look at the agent's log",
                    );
                }
                Err(_) => {
                    let cure = "the next check hangs; the agent's log says which";
                    return report.bad("agent's checks", "not complete in time", cure);
                }
            }
        }
    }
}

fn configured(context: &Context) -> String {
    match &context.file {
        Some(file) => format!(
            "context {} of {}: {}",
            context.name,
            file.display(),
            context.route
        ),
        None => format!(
            "no context was asked for, so the agent's socket: {}",
            context.route
        ),
    }
}

/// Returns false if no further step can be checked.
fn check_dates(
    report: &mut Report,
    credentials: &Credentials,
    now: Timestamp,
) -> Result<bool, CtlError> {
    let info = credentials.info();
    let who = match &info.identity {
        Ok(identity) => identity.to_string(),
        Err(error) => {
            let cure = "ask for a certificate with the URI SAN spiffe://knoc/ctl/NAME";
            report.bad("certificates", &error.to_string(), cure)?;
            return Ok(false);
        }
    };
    let (from, until) = (info.validity.from, info.validity.until);
    let renew = "remove the old pair in tls/ on the login node; `knoc-agent init --site SITE` then makes a new one";
    if now > until {
        report.bad(
            "certificates",
            &format!("{who} expired on {}", view::whole(until)),
            renew,
        )?;
        return Ok(false);
    }
    if now < from {
        let detail = format!("{who} is valid only from {}", view::whole(from));
        report.bad("certificates", &detail, "is this machine's clock right?")?;
        return Ok(false);
    }
    let left = until.duration_since(now);
    let detail = format!("{who}, {} left", span(left.as_secs()));
    if left.unsigned_abs() < SOON {
        report.bad("certificates", &detail, renew)?;
    } else {
        report.good("certificates", detail)?;
    }
    Ok(true)
}

/// Each address: the network, SSH or the socket, and TLS. False where the walk ends here, because none answers.
async fn check_carrier(
    report: &mut Report,
    context: &Context,
    credentials: Option<&Credentials>,
) -> Result<bool, CtlError> {
    let mut failed = Vec::new();
    let mut answers = false;
    for carrier in context.route.carriers() {
        let began = tokio::time::Instant::now();
        match knoc_link::connect(carrier, credentials, &expect(context)).await {
            Ok(conn) => {
                let took = began.elapsed().as_millis();
                let found = format!("{carrier} answers in {took} ms: {}", conn.peer());
                report.good("link", found)?;
                answers = true;
            }
            Err(error) => failed.push(error),
        }
    }
    for error in failed {
        // Of several login nodes one is enough.
        if answers {
            report.good(
                "link",
                format!("{}; another address answers", chain(&error)),
            )?;
            continue;
        }
        let not_served = matches!(error, LinkError::NotServed { .. });
        let host = Surroundings::here().places.other_host();
        let host = host.filter(|_| not_served);
        let elsewhere =
            |host| format!("the agent of this state directory is on {host}: log in there");
        let cure = host.map_or_else(|| cure_of_link(&error).to_owned(), elsewhere);
        report.bad("link", &with_rung(&error), &cure)?;
    }
    Ok(answers)
}

/// What to do about a link that failed: about a socket or the files of the context by the error itself, else by its rung.
fn cure_of_link(error: &LinkError) -> &'static str {
    match error {
        LinkError::Connect { source, carrier } => match (source.kind(), carrier) {
            (std::io::ErrorKind::NotFound, knoc_link::Carrier::Unix(_)) => {
                "start the agent on this machine (`knoc-agent serve`), or configure a context with its address"
            }
            (std::io::ErrorKind::PermissionDenied, knoc_link::Carrier::Unix(_)) => {
                "the socket is another user's: log in as the agent's user"
            }
            _ => cure_by_rung(&chain(error)),
        },
        LinkError::Timeout { .. } => {
            "a firewall drops the packets, or the host is down; if only a proxy leads there, name it in `proxy`"
        }
        LinkError::Proxy { .. } => {
            "check `proxy` and `proxy-credentials` of the context, or the variables HTTPS_PROXY and NO_PROXY"
        }
        LinkError::WrongUser { .. } => {
            "somebody else has taken the socket's path: tell your administrators"
        }
        LinkError::UnsafeFolder { .. }
        | LinkError::NotAFolder { .. }
        | LinkError::Folder { .. } => {
            "make it a folder of your own with mode 0700 (chmod 700), or name another one in listen.socket of the site file"
        }
        LinkError::NoCredentials { .. }
        | LinkError::NeedlessCredentials { .. }
        | LinkError::Credentials { .. } => "fix ca, cert and key of the context",
        LinkError::Handshake { .. }
        | LinkError::NotServed { .. }
        | LinkError::Command { .. }
        | LinkError::Secret { .. }
        | LinkError::NoAddress { .. }
        | LinkError::TooEarly { .. }
        | LinkError::Listen { .. }
        | LinkError::InUse { .. }
        | LinkError::NotHttp2 { .. }
        | LinkError::Greeting { .. }
        | LinkError::Superseded { .. }
        | LinkError::TooMany { .. }
        | LinkError::NobodyDialledIn { .. }
        | LinkError::Ended => cure_by_rung(&chain(error)),
    }
}

fn cure_by_rung(error: &str) -> &'static str {
    ladder::look(error).map_or("", |(_, cure)| cure)
}

/// The error with the rung of the ladder to the agent before it.
fn with_rung(error: &LinkError) -> String {
    let said = chain(error);
    match ladder::look(&said) {
        Some((rung, _)) => format!("{rung}: {said}"),
        None => said,
    }
}

fn check_info(report: &mut Report, info: &pb::AgentInfo) -> Result<(), CtlError> {
    let ours = env!("CARGO_PKG_VERSION");
    let skew = if info.version == ours {
        String::new()
    } else {
        format!(" (knocctl is {ours})")
    };
    let detail = format!(
        "knoc-agent {}{skew} of site {}, {}@{}, {}, {}",
        info.version, info.site, info.user, info.hostname, info.scheduler, info.runtime
    );
    report.good("agent", detail)
}

/// An agent older than this version lets any kubelet lead any node; an agent of this version does not. Newer agents check
/// this themselves.
async fn check_upgrade(
    report: &mut Report,
    info: &pb::AgentInfo,
    session: &mut Session,
) -> Result<(), CtlError> {
    if info.capabilities.iter().any(|it| it == "renew") {
        return Ok(());
    }
    match session.pods().await {
        Ok(pods) => match other_nodes(&pods, &info.site) {
            None => Ok(()),
            Some((detail, cure)) => report.bad("upgrade", &detail, &cure),
        },
        Err(error) => report.bad("upgrade", &chain(&error), "look at the agent's log"),
    }
}

/// PURE: the nodes whose kubelet has a certificate of another name, unless an administrator issued one for the node.
fn other_nodes(pods: &[pb::PodObserved], site: &str) -> Option<(String, String)> {
    let usual = format!("knoc-{site}");
    let named = pods.iter().map(|pod| pod.node_name.as_str());
    let mut nodes: Vec<&str> = named
        .filter(|node| !node.is_empty() && *node != usual)
        .collect();
    nodes.sort_unstable();
    nodes.dedup();
    let first = nodes.first()?;
    let detail = format!(
        "pods of {} are led by a kubelet that an agent of version {} refuses, unless its certificate is of that node's name",
        nodes.join(", "),
        env!("CARGO_PKG_VERSION")
    );
    let cure = format!(
        "before the agent is upgraded add a line for each to [policy.nodes] of its site file: \"{first}\" = \"kubelet/{usual}\""
    );
    Some((detail, cure))
}

#[cfg(test)]
mod tests {
    use knoc_link::{
        Identity,
        pki::{Ca, Validity},
    };

    use super::*;

    fn report() -> Report {
        Report {
            format: Format::Json,
            findings: Vec::new(),
        }
    }

    #[test]
    fn a_failed_check_prints_its_cause_and_its_cure() {
        let finding = pb::Finding {
            check: "slurm".into(),
            ok: false,
            detail: "squeue hangs\nbadly".into(),
            cure: "ask for help".into(),
        };
        assert_eq!(
            line(&finding),
            "✗ slurm: squeue hangs badly\n  → ask for help\n"
        );
    }

    #[test]
    fn certificates_are_looked_at_before_the_link() {
        let ca = Ca::generate("ca").unwrap();
        let now = Timestamp::now();
        let days = |days: i64| SignedDays(days);
        let check = |from: SignedDays, life: u64| {
            let validity = Validity::starting(now + from.span(), Duration::from_hours(life * 24));
            let who = Identity::Ctl { name: "ann".into() };
            let pair = ca.issue_for(&who, &[], validity).unwrap();
            let credentials =
                Credentials::from_pem(ca.cert_pem(), &pair.cert_pem, &pair.key_pem).unwrap();
            let mut report = report();
            let goes_on = check_dates(&mut report, &credentials, now).unwrap();
            (
                goes_on,
                report.findings[0].ok,
                report.findings[0].detail.clone(),
            )
        };
        let (goes_on, ok, detail) = check(days(0), 300);
        assert!(goes_on && ok, "{detail}");
        let (goes_on, ok, detail) = check(days(0), 10);
        assert!(goes_on && !ok && detail.ends_with("9d left"), "{detail}");
        let (goes_on, ok, detail) = check(days(-20), 10);
        assert!(!goes_on && !ok && detail.contains("expired on"), "{detail}");
        let (goes_on, _, detail) = check(days(2), 10);
        assert!(!goes_on && detail.contains("valid only from"), "{detail}");
    }

    struct SignedDays(i64);

    impl SignedDays {
        fn span(&self) -> jiff::SignedDuration {
            jiff::SignedDuration::from_hours(24 * self.0)
        }
    }

    #[tokio::test]
    async fn a_missing_socket_is_a_finding_with_a_cure() {
        let folder = tempfile::tempdir().unwrap();
        let context = Context {
            name: "local".into(),
            file: None,
            route: knoc_link::Carrier::Unix(folder.path().join("knoc/none.sock")).into(),
            files: None,
            site: None,
        };
        let mut report = report();
        assert!(!check_carrier(&mut report, &context, None).await.unwrap());
        assert!(report.findings[0].cure.contains("knoc-agent serve"));
        assert_eq!(
            format!("{:?}", report.end().unwrap()),
            format!("{:?}", ExitCode::FAILURE)
        );
    }

    #[test]
    fn a_kubelet_that_an_upgrade_would_lock_out_is_named_before() {
        let pods = |nodes: &[&str]| {
            let pod = |node: &&str| pb::PodObserved {
                node_name: (*node).to_owned(),
                ..pb::PodObserved::default()
            };
            nodes.iter().map(pod).collect::<Vec<_>>()
        };
        assert_eq!(other_nodes(&pods(&["knoc-s", ""]), "s"), None);
        let (detail, cure) = other_nodes(&pods(&["knoc-s", "gpu", "gpu", "big"]), "s").unwrap();
        assert!(detail.contains("big, gpu"), "{detail}");
        assert!(cure.contains("\"big\" = \"kubelet/knoc-s\""), "{cure}");
    }

    #[test]
    fn failed_handshakes_have_cures() {
        for (detail, cure) in [
            ("received fatal alert: UnknownCA", "different CAs"),
            ("received fatal alert: CertificateExpired", "clock"),
            ("the peer is a, not the expected b", "another agent"),
            ("received fatal alert: CertificateUnknown", "its log"),
            ("tls handshake eof", "listens there"),
        ] {
            assert!(cure_by_rung(detail).contains(cure), "{detail}");
        }
    }
}
