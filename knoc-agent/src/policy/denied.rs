//! PURE: `policy.denied` of the site file: certificates that are not accepted even though the CA
//! signed them.
//!
//! An entry names a public key, a serial number or an identity. Each entry also covers renewals: a
//! renewed certificate names all certificates that it descends from.

use std::{fmt, str::FromStr};

use base64::{Engine as _, prelude::BASE64_STANDARD_NO_PAD};
use knoc_link::{
    Identity,
    pki::{self, CertificateInfo},
};

/// More digits than any serial number has (RFC 5280: at most 20 octets).
const MAX_SERIAL: usize = 40;
/// The length of a SHA-256 in base64, without padding.
const KEY_BASE64: usize = 43;
/// The prefix of every identity.
const DOMAIN: &str = "spiffe://knoc/";

/// One entry.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Denied {
    /// The SHA-256 of the public key, in hexadecimal digits.
    Key(String),
    /// A serial number in hexadecimal digits, without leading zeros.
    Serial(String),
    /// `kubelet/NAME` or `ctl/NAME`; `*` at the end matches any rest.
    Identity(String),
}

/// An entry that cannot be parsed.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error(
    "{text:?} is not `sha256/` and the 64 hexadecimal digits of a public key's SHA-256, `serial/` and hexadecimal \
     digits, or an identity such as `kubelet/knoc-site`"
)]
pub struct InvalidDenied {
    text: String,
}

impl FromStr for Denied {
    type Err = InvalidDenied;

    fn from_str(text: &str) -> Result<Self, InvalidDenied> {
        let wrong = || InvalidDenied {
            text: text.to_owned(),
        };
        let text = text.trim();
        // The order of a URI, and the order that openssl prints. Some tools print capitals.
        let part = |kind: &str| {
            let (found, rest) = text.split_at_checked(kind.len())?;
            let rest = rest.strip_prefix(['/', ':', '='])?;
            found.eq_ignore_ascii_case(kind).then(|| rest.trim_start())
        };
        if let Some(key) = part("sha256") {
            return key_hash(key).map(Self::Key).ok_or_else(wrong);
        }
        if let Some(serial) = part("serial") {
            return serial_number(serial).map(Self::Serial).ok_or_else(wrong);
        }
        let name = text.strip_prefix(DOMAIN).unwrap_or(text);
        let whole = name.replace('*', "x");
        let stars = name.strip_suffix('*').unwrap_or(name).contains('*');
        match format!("{DOMAIN}{whole}").parse() {
            Ok(Identity::Kubelet { .. } | Identity::Ctl { .. }) if !stars => {
                Ok(Self::Identity(name.to_owned()))
            }
            Ok(_) | Err(_) => Err(wrong()),
        }
    }
}

/// Parses hexadecimal digits, with or without colons, or base64, which other tools use for pins.
fn key_hash(text: &str) -> Option<String> {
    let digits = hexadecimal(text);
    if let Some(digits) = digits.filter(|digits| digits.len() == 64) {
        return Some(digits);
    }
    let unpadded = text.trim_end_matches('=');
    // curl writes one more slash. The digits may begin with one themselves.
    let of_curl = unpadded
        .strip_prefix('/')
        .filter(|rest| rest.len() == KEY_BASE64);
    let digits = of_curl.unwrap_or(unpadded);
    let usual = digits.replace('-', "+").replace('_', "/");
    let bytes = BASE64_STANDARD_NO_PAD.decode(usual).ok()?;
    (bytes.len() == 32).then(|| pki::hexadecimal(&bytes))
}

fn serial_number(text: &str) -> Option<String> {
    let digits = text.strip_prefix("0x").or_else(|| text.strip_prefix("0X"));
    let digits = hexadecimal(digits.unwrap_or(text))?;
    let significant = digits.trim_start_matches('0');
    (!significant.is_empty() && significant.len() <= MAX_SERIAL).then(|| significant.to_owned())
}

fn hexadecimal(text: &str) -> Option<String> {
    let digits = text.replace(':', "").to_ascii_lowercase();
    let all = !digits.is_empty() && digits.bytes().all(|byte| byte.is_ascii_hexdigit());
    all.then_some(digits)
}

impl fmt::Display for Denied {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Key(key) => write!(f, "sha256/{key}"),
            Self::Serial(serial) => write!(f, "serial/{serial}"),
            Self::Identity(name) => f.write_str(name),
        }
    }
}

impl Denied {
    /// Whether the entry covers this certificate, or one that it was renewed from.
    #[must_use]
    pub fn covers(&self, identity: &Identity, certificate: &CertificateInfo) -> bool {
        let mut ancestors = certificate.ancestors.iter();
        match self {
            Self::Key(key) => *key == certificate.spki || ancestors.any(|one| one.spki == *key),
            Self::Serial(serial) => {
                *serial == certificate.serial || ancestors.any(|one| one.serial == *serial)
            }
            Self::Identity(pattern) => matches(pattern, identity),
        }
    }
}

/// Whether the pattern (`kubelet/knoc`, `ctl/*` or a whole URI) matches the identity.
#[must_use]
pub fn matches(pattern: &str, identity: &Identity) -> bool {
    let identity = identity.to_string();
    let name = identity.strip_prefix(DOMAIN).unwrap_or(&identity);
    match pattern
        .strip_prefix(DOMAIN)
        .unwrap_or(pattern)
        .strip_suffix('*')
    {
        Some(prefix) => name.starts_with(prefix),
        None => name == pattern || identity == pattern,
    }
}

#[cfg(test)]
mod tests {
    use base64::prelude::BASE64_STANDARD;
    use knoc_link::pki::{Ancestor, Validity};

    use super::*;

    fn kubelet() -> Identity {
        Identity::Kubelet { name: "k".into() }
    }

    fn certificate(serial: &str, spki: &str, ancestors: &[(&str, &str)]) -> CertificateInfo {
        let now = jiff::Timestamp::UNIX_EPOCH;
        let ancestor = |(serial, spki): &(&str, &str)| Ancestor {
            serial: (*serial).to_owned(),
            spki: (*spki).to_owned(),
        };
        CertificateInfo {
            identity: Ok(kubelet()),
            issuer: String::new(),
            validity: Validity {
                from: now,
                until: now,
            },
            serial: serial.to_owned(),
            spki: spki.to_owned(),
            ancestors: ancestors.iter().map(ancestor).collect(),
        }
    }

    #[test]
    fn entries_are_read_as_people_write_them() {
        let key = "ab".repeat(32);
        let colons = ["AB"; 32].join(":");
        let base64 = BASE64_STANDARD.encode([0xab; 32]);
        for text in [
            format!("sha256/{key}"),
            format!("sha256:{}", key.to_uppercase()),
            format!("sha256/{colons}"),
            format!("SHA256={colons}"),
            format!("sha256//{base64}"),
            format!("sha256/{base64}"),
            format!("SHA256:{}", base64.trim_end_matches('=')),
        ] {
            assert_eq!(text.parse(), Ok(Denied::Key(key.clone())), "{text}");
        }
        // Its digits begin with a slash, and are those of two alphabets.
        let slashes = BASE64_STANDARD.encode([0xff; 32]);
        for text in [
            format!("sha256//{slashes}"),
            format!("sha256/{slashes}"),
            format!("sha256/{}", slashes.replace('/', "_")),
        ] {
            assert_eq!(text.parse(), Ok(Denied::Key("ff".repeat(32))), "{text}");
        }
        for text in [
            "serial/00AB12",
            "serial/ab:12",
            "serial=0xAB12",
            "serial:ab12",
            "serial/0Xab12",
            "SERIAL=AB12",
            " serial: ab12 ",
        ] {
            assert_eq!(text.parse(), Ok(Denied::Serial("ab12".into())), "{text}");
        }
        for text in ["kubelet/k", "spiffe://knoc/kubelet/k"] {
            assert_eq!(text.parse(), Ok(Denied::Identity("kubelet/k".into())));
        }
        assert_eq!("ctl/*".parse(), Ok(Denied::Identity("ctl/*".into())));
        for wrong in [
            "",
            "*",
            "ab12",
            "sha256/ab",
            "sha256/",
            "serial/",
            "serial/0",
            "serial/xyz",
            "kubelet",
            "kubelet/",
            "kubelet/a*b",
            "agent/site",
            "spiffe://else/kubelet/k",
        ] {
            assert!(wrong.parse::<Denied>().is_err(), "{wrong:?}");
        }
        let long = format!("serial/{}", "1".repeat(41));
        assert!(long.parse::<Denied>().is_err());
    }

    #[test]
    fn a_denial_covers_all_renewals() {
        let key = "ab".repeat(32);
        let other = "cd".repeat(32);
        let own = certificate("a1", &key, &[]);
        let renewed = certificate("b2", &other, &[("77", "00"), ("a1", &key)]);
        let foreign = certificate("c3", &other, &[("d4", "ee")]);
        for text in [format!("sha256/{key}"), "serial/A1".to_owned()] {
            let denied: Denied = text.parse().unwrap();
            assert!(denied.covers(&kubelet(), &own), "{text}");
            assert!(denied.covers(&kubelet(), &renewed), "{text}");
            assert!(!denied.covers(&kubelet(), &foreign), "{text}");
        }
        let denied: Denied = "kubelet/k".parse().unwrap();
        assert!(denied.covers(&kubelet(), &foreign));
        let other = Identity::Kubelet { name: "k2".into() };
        assert!(!denied.covers(&other, &foreign));
    }
}
