//! PURE: a failed handshake in words: what is wrong, whose certificate or clock it is about, and what the cause usually is.
use std::io;

use jiff::Timestamp;
use knoc_proto::error::chain;
use rustls::{
    AlertDescription, CertificateError, Error, InvalidMessage, OtherError, PeerIncompatible,
};
use rustls_pki_types::UnixTime;

/// The peer speaks an older version of TLS, or none.
const OLDER_TLS: &str = "the peer does not speak TLS 1.3: either it is another service, or something on the way terminates TLS";

/// The error of a handshake, in words. rustls shows errors of ours only as Rust values, and times as numbers of seconds.
pub(crate) fn readable_error(error: io::Error) -> io::Error {
    let inner = error
        .get_ref()
        .and_then(|inner| inner.downcast_ref::<Error>());
    match inner.and_then(words) {
        Some(words) => io::Error::new(error.kind(), words),
        None => error,
    }
}

#[expect(
    clippy::wildcard_enum_match_arm,
    reason = "rustls adds errors; those without a text of ours keep its own"
)]
fn words(error: &Error) -> Option<String> {
    match error {
        Error::InvalidCertificate(wrong) => of_certificate(wrong),
        Error::AlertReceived(alert) => of_alert(*alert).map(str::to_owned),
        // A client's list of versions is new in TLS 1.3.
        Error::PeerIncompatible(PeerIncompatible::SupportedVersionsExtensionRequired) => {
            Some(OLDER_TLS.to_owned())
        }
        Error::NoCertificatesPresented => Some(
            "no certificate of the peer arrived: either it has none, or something on the way terminates TLS (an Ingress or a \
             load balancer that does not pass TLS through)"
                .to_owned(),
        ),
        Error::InvalidMessage(InvalidMessage::InvalidContentType) => Some(
            "the peer does not speak TLS: either it is another service, or something on the way terminates TLS (an Ingress or \
             a load balancer that does not pass TLS through)"
                .to_owned(),
        ),
        _ => None,
    }
}

#[expect(
    clippy::wildcard_enum_match_arm,
    reason = "rustls adds errors; those without a text of ours keep its own"
)]
fn of_certificate(wrong: &CertificateError) -> Option<String> {
    match wrong {
        CertificateError::Other(OtherError(ours)) => Some(chain(ours.as_ref())),
        CertificateError::ExpiredContext { time, not_after } => Some(format!(
            "the peer's certificate expired at {}, and by the clock of this host it is {}: renew the certificate, or compare the \
             clocks of both sides",
            date(*not_after),
            date(*time)
        )),
        CertificateError::NotValidYetContext { time, not_before } => Some(format!(
            "the peer's certificate is not yet valid: it begins at {}, and by the clock of this host it is {}: compare the clocks \
             of both sides",
            date(*not_before),
            date(*time)
        )),
        CertificateError::UnknownIssuer => {
            Some("the peer's certificate is not of the CA that is trusted here".to_owned())
        }
        _ => None,
    }
}

/// The peer's complaint about us. Its own log has the details.
#[expect(
    clippy::wildcard_enum_match_arm,
    reason = "rustls adds alerts; those without a text of ours keep its own"
)]
fn of_alert(alert: AlertDescription) -> Option<&'static str> {
    match alert {
        AlertDescription::CertificateExpired => Some(
            "by the clock of the peer, our certificate is expired or not yet valid: renew it, or compare the clocks of both sides",
        ),
        AlertDescription::UnknownCA => {
            Some("the peer does not trust the CA of our certificate; its log says which one came")
        }
        AlertDescription::CertificateUnknown
        | AlertDescription::BadCertificate
        | AlertDescription::UnsupportedCertificate
        | AlertDescription::AccessDenied => {
            Some("the peer refused our certificate; its log says why")
        }
        AlertDescription::CertificateRequired => {
            Some("our certificate did not reach the peer: something on the way terminates TLS")
        }
        AlertDescription::ProtocolVersion => Some(OLDER_TLS),
        // What a web server answers that knows HTTP/1.1 only, such as an Ingress that was not told to pass TLS through.
        AlertDescription::NoApplicationProtocol => Some(
            "the peer offers no HTTP/2: either it is another service, or something on the way terminates TLS",
        ),
        AlertDescription::UnrecognisedName => Some(
            "nothing is known under this host name there: an Ingress or a load balancer chooses the service by it",
        ),
        _ => None,
    }
}

fn date(time: UnixTime) -> String {
    let seconds = i64::try_from(time.as_secs()).unwrap_or(i64::MAX);
    Timestamp::from_second(seconds).map_or_else(|_| format!("{seconds} s"), |at| at.to_string())
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    fn said(error: Error) -> String {
        readable_error(io::Error::other(error)).to_string()
    }

    #[test]
    fn a_clock_that_is_off_is_named_with_its_side() {
        let at = |seconds| UnixTime::since_unix_epoch(Duration::from_secs(seconds));
        let early = CertificateError::NotValidYetContext {
            time: at(1_800_000_000),
            not_before: at(1_800_003_600),
        };
        let text = said(early.into());
        for part in [
            "not yet valid",
            "2027-01-15T08:00:00Z",
            "2027-01-15T09:00:00Z",
            "by the clock of this host",
        ] {
            assert!(text.contains(part), "{part}: {text}");
        }
        let text = said(Error::AlertReceived(AlertDescription::CertificateExpired));
        assert!(text.contains("by the clock of the peer"), "{text}");
    }

    #[test]
    fn an_ingress_that_terminates_tls_is_named_whatever_it_answers() {
        for alert in [
            AlertDescription::ProtocolVersion,
            AlertDescription::NoApplicationProtocol,
            AlertDescription::CertificateRequired,
        ] {
            let text = said(Error::AlertReceived(alert));
            assert!(text.contains("terminates TLS"), "{alert:?}: {text}");
        }
        let older = PeerIncompatible::SupportedVersionsExtensionRequired;
        assert_eq!(said(Error::PeerIncompatible(older)), OLDER_TLS);
    }

    #[test]
    fn other_errors_stay_as_they_are() {
        let text = said(Error::DecryptError);
        assert_eq!(text, Error::DecryptError.to_string());
        let plain = io::Error::new(io::ErrorKind::ConnectionReset, "reset");
        assert_eq!(readable_error(plain).to_string(), "reset");
    }
}
