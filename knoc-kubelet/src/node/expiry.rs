//! PURE: the Node's condition about the certificates of the link to the agent.

use jiff::Timestamp;
use knoc_link::pki;

use super::condition::Condition;
use crate::agent::renew::LinkCertificate;

/// The condition `AgentCertificateExpiring`, which is True if a certificate of the link ends within 30 days. `agents`
/// is the end of the agent's certificate in Unix seconds, or 0. None if the link has no certificates.
pub(super) fn condition(ours: &LinkCertificate, agents: i64, now: Timestamp) -> Option<Condition> {
    let agents = Timestamp::from_second(agents).ok().filter(|_| agents != 0);
    let sides = [
        ("kubelet", ours.validity.map(|validity| validity.until)),
        ("agent", agents),
    ];
    let mut parts = Vec::new();
    let mut expiring = false;
    for (side, until) in sides {
        let Some(until) = until else { continue };
        expiring |= pki::ends_soon(until, now);
        let verb = if now > until {
            "expired on"
        } else {
            "is valid until"
        };
        let until = until.strftime("%Y-%m-%dT%H:%M:%SZ");
        parts.push(format!(
            "the {side}'s certificate on the link {verb} {until}"
        ));
    }
    if parts.is_empty() {
        return None;
    }
    let problem = &ours.problem;
    if !problem.is_empty() {
        parts.push(format!(
            "the kubelet's certificate is due but could not be renewed: {problem}"
        ));
    }
    let (status, reason) = match (expiring, problem.is_empty()) {
        (true, _) => ("True", "CertificateExpiring"),
        (false, false) => ("False", "RenewalFailed"),
        (false, true) => ("False", "CertificatesValid"),
    };
    Some(("AgentCertificateExpiring", status, reason, parts.join("; ")))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(second: i64) -> Timestamp {
        Timestamp::from_second(second).unwrap()
    }

    #[test]
    fn a_certificate_of_the_link_warns_from_30_days_before_its_end() {
        let day = 86_400;
        let said = |ours: Option<i64>, agents: i64, problem: &str| {
            let certificate = LinkCertificate {
                validity: ours.map(|days| pki::Validity {
                    from: at(0),
                    until: at(100 * day + days * day),
                }),
                problem: problem.to_owned(),
            };
            let agents = if agents == 0 { 0 } else { (100 + agents) * day };
            let (_, status, reason, text) = condition(&certificate, agents, at(100 * day))?;
            Some(format!("{status} {reason} {text}"))
        };
        assert_eq!(said(None, 0, ""), None, "over a unix socket");
        for (ours, agents, problem, expected) in [
            (31, 31, "", "False CertificatesValid"),
            (30, 31, "", "True CertificateExpiring"),
            (31, 30, "", "True CertificateExpiring"),
            (-1, 31, "no CA key", "True CertificateExpiring"),
            (90, 0, "no CA key", "False RenewalFailed"),
        ] {
            let text = said(Some(ours), agents, problem).unwrap();
            assert!(text.starts_with(expected), "{text}");
            assert_eq!(text.contains("expired on"), ours < 0, "{text}");
            assert!(text.contains(problem), "{text}");
        }
    }
}
