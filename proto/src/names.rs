//! PURE: the rules of the Kubernetes API for names, each as one function.
//!
//! They accept exactly what the functions named in each doc (`k8s.io/apimachinery/pkg/util/validation`) accept, and
//! return the same messages. For names that become file names or arguments, [`crate::ids`] has types. See
//! <https://kubernetes.io/docs/concepts/overview/working-with-objects/names/>.
use std::net::IpAddr;

/// The most bytes of a DNS label, of the name part of a label's key, and of a label's value.
const LABEL: usize = 63;
/// The most bytes of a DNS subdomain and of a key of a ConfigMap.
const SUBDOMAIN: usize = 253;
/// The most bytes of a port's name.
const PORT: usize = 15;

/// Why a string is not a valid name; `Display` completes a sentence that begins with the name.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum BadName {
    /// The name is longer than this many bytes.
    #[error("must be no more than {0} characters")]
    TooLong(usize),
    /// The name is empty.
    #[error("must not be empty")]
    Empty,
    /// The name does not have the form that this message describes.
    #[error("{0}")]
    Form(&'static str),
}

fn within(value: &str, limit: usize) -> Result<(), BadName> {
    if value.is_empty() {
        return Err(BadName::Empty);
    }
    if value.len() > limit {
        return Err(BadName::TooLong(limit));
    }
    Ok(())
}

fn form(holds: bool, otherwise: &'static str) -> Result<(), BadName> {
    if holds {
        Ok(())
    } else {
        Err(BadName::Form(otherwise))
    }
}

/// Whether `text` begins and ends with a byte that `edge` accepts, and between them has only such bytes and those of
/// `more`.
fn framed(text: &str, edge: fn(u8) -> bool, more: &[u8]) -> bool {
    let bytes = text.as_bytes();
    let ends = [bytes.first(), bytes.last()];
    ends.iter().all(|byte| byte.is_some_and(|byte| edge(*byte)))
        && bytes.iter().all(|byte| edge(*byte) || more.contains(byte))
}

fn lower_case(byte: u8) -> bool {
    byte.is_ascii_lowercase() || byte.is_ascii_digit()
}

fn alphanumeric(byte: u8) -> bool {
    byte.is_ascii_alphanumeric()
}

/// `IsDNS1123Label`: names of namespaces, containers and volumes, and a pod's `hostname`.
pub fn dns_label(value: &str) -> Result<(), BadName> {
    within(value, LABEL)?;
    form(
        framed(value, lower_case, b"-"),
        "a lowercase RFC 1123 label must consist of lower case alphanumeric characters or '-', and must start and end \
         with an alphanumeric character",
    )
}

/// `IsDNS1123Subdomain`: names of pods, nodes, service accounts, ConfigMaps and Secrets, and host aliases. Only the
/// whole name is limited in length, not its labels.
pub fn dns_subdomain(value: &str) -> Result<(), BadName> {
    within(value, SUBDOMAIN)?;
    form(
        value
            .split('.')
            .all(|label| framed(label, lower_case, b"-")),
        "a lowercase RFC 1123 subdomain must consist of lower case alphanumeric characters, '-' or '.', and must start \
         and end with an alphanumeric character",
    )
}

/// `IsConfigMapKey`: keys of ConfigMaps and Secrets.
pub fn config_map_key(value: &str) -> Result<(), BadName> {
    within(value, SUBDOMAIN)?;
    form(value != ".", "must not be '.'")?;
    form(!value.starts_with(".."), "must not start with '..'")?;
    form(
        value
            .bytes()
            .all(|byte| alphanumeric(byte) || b"-._".contains(&byte)),
        "a valid config key must consist of alphanumeric characters, '-', '_' or '.'",
    )
}

/// `IsRelaxedEnvVarName`, the rule since Kubernetes 1.34: names of environment variables. Their length is not limited.
pub fn environment_variable(value: &str) -> Result<(), BadName> {
    if value.is_empty() {
        return Err(BadName::Empty);
    }
    form(
        value
            .bytes()
            .all(|byte| (b' '..=b'~').contains(&byte) && byte != b'='),
        "a valid environment variable name must consist only of printable ASCII characters other than '='",
    )
}

/// `IsValidPortName`: names of ports of containers and Services.
pub fn port_name(value: &str) -> Result<(), BadName> {
    within(value, PORT)?;
    form(
        value.bytes().all(|byte| lower_case(byte) || byte == b'-'),
        "must contain only alpha-numeric characters (a-z, 0-9), and hyphens (-)",
    )?;
    form(
        value.bytes().any(|byte| byte.is_ascii_lowercase()),
        "must contain at least one letter (a-z)",
    )?;
    form(
        !value.contains("--"),
        "must not contain consecutive hyphens",
    )?;
    form(
        !value.starts_with('-') && !value.ends_with('-'),
        "must not begin or end with a hyphen",
    )
}

/// `IsQualifiedName`: keys of labels, and names of resources.
pub fn qualified_name(value: &str) -> Result<(), BadName> {
    let name = match value.split_once('/') {
        None => value,
        Some((prefix, name)) => {
            dns_subdomain(prefix)?;
            name
        }
    };
    within(name, LABEL)?;
    form(
        framed(name, alphanumeric, b"-_."),
        "the name must consist of alphanumeric characters, '-', '_' or '.', and must start and end with an alphanumeric \
         character, with an optional DNS subdomain prefix and '/'",
    )
}

/// `ValidateAnnotations`: keys of annotations, whose prefix may contain capitals.
pub fn annotation_key(value: &str) -> Result<(), BadName> {
    qualified_name(&value.to_lowercase())
}

/// `IsValidLabelValue`: values of labels, which may be empty.
pub fn label_value(value: &str) -> Result<(), BadName> {
    if value.is_empty() {
        return Ok(());
    }
    within(value, LABEL)?;
    form(
        framed(value, alphanumeric, b"-_."),
        "a valid label must be an empty string or consist of alphanumeric characters, '-', '_' or '.', and must start \
         and end with an alphanumeric character",
    )
}

/// The IP address of a host alias, IPv4 or IPv6.
pub fn ip_address(value: &str) -> Result<(), BadName> {
    form(
        value.parse::<IpAddr>().is_ok(),
        "must be a valid IP address, (e.g. 10.9.8.7 or 2001:db8::ffff)",
    )
}

/// An IP address as the API server reads it in a pod: leading zeros, which it takes for decimal digits and other programs for octal
/// ones or for a mistake, are left out. Any other text stays as it is.
#[must_use]
pub fn without_leading_zeros(value: &str) -> String {
    let start = value.rfind(':').map_or(0, |colon| colon + 1);
    let (head, tail) = value.split_at(start);
    let octets = tail
        .split('.')
        .map(|octet| match octet.trim_start_matches('0') {
            "" if !octet.is_empty() => "0",
            short => short,
        });
    let octets: Vec<&str> = octets.collect();
    let short = format!("{head}{}", octets.join("."));
    if value.parse::<IpAddr>().is_err() && short.parse::<IpAddr>().is_ok() {
        return short;
    }
    value.to_owned()
}

/// The host name of a pod whose spec sets none: the pod's name, cut to the 63 characters that a host name may have
/// (`truncatePodHostnameIfNeeded` of the kubelet).
#[must_use]
pub fn host_name(pod: &str) -> &str {
    let end = pod.floor_char_boundary(LABEL);
    pod[..end].trim_end_matches(['-', '.'])
}

/// The host name of a pod as the agent receives it: `spec.hostname`, or [`host_name`] of the pod's name, which may
/// contain dots.
pub fn is_host_name(value: &str) -> Result<(), BadName> {
    within(value, LABEL)?;
    dns_subdomain(value)
}

#[cfg(test)]
mod tests;
