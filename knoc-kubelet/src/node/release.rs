//! PURE: which release of Kubernetes the Node reports. A kubelet must not be newer than its API server, and may be up
//! to three minor releases older: <https://kubernetes.io/releases/version-skew-policy/>.

use k8s_openapi::apimachinery::pkg::version::Info;

/// A minor release of Kubernetes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Release {
    major: u32,
    minor: u32,
}

/// The newest release whose API this kubelet was written for.
const OURS: Release = Release::new(1, 36);

impl Release {
    /// The release `major.minor`.
    #[must_use]
    pub const fn new(major: u32, minor: u32) -> Self {
        Self { major, minor }
    }

    /// The API server's own release. Some distributions append `+` to the minor.
    #[must_use]
    pub fn of(info: &Info) -> Option<Self> {
        let digits = |text: &str| {
            let end = text.find(|it: char| !it.is_ascii_digit());
            text.get(..end.unwrap_or(text.len()))?.parse().ok()
        };
        Some(Self::new(digits(&info.major)?, digits(&info.minor)?))
    }
}

/// The version that a kubelet reports to an API server of this release: the older of this and our own release, with
/// KNoC's version as build metadata, which does not count in comparisons.
#[must_use]
pub fn kubelet_version(server: Release) -> String {
    let Release { major, minor } = server.min(OURS);
    format!("v{major}.{minor}.0+knoc.{}", env!("CARGO_PKG_VERSION"))
}

/// The version if the API server's release is not known: the one reported `before`, else our own.
#[must_use]
pub fn version_without_server(before: Option<&str>) -> String {
    let before = before.filter(|text| !text.is_empty());
    before.map_or_else(|| kubelet_version(OURS), str::to_owned)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(major: &str, minor: &str) -> Option<Release> {
        Release::of(&Info {
            major: major.to_owned(),
            minor: minor.to_owned(),
            ..Info::default()
        })
    }

    #[test]
    fn the_api_servers_release_is_parsed() {
        for (major, minor, release) in [
            ("1", "36", Some(Release::new(1, 36))),
            ("1", "34+", Some(Release::new(1, 34))),
            ("1", "9", Some(Release::new(1, 9))),
            ("2", "0", Some(Release::new(2, 0))),
            ("", "", None),
            ("1", "x", None),
        ] {
            assert_eq!(of(major, minor), release, "{major}.{minor}");
        }
    }

    #[test]
    fn a_node_is_never_newer_than_its_api_server() {
        for (minor, said) in [(28, "28"), (35, "35"), (36, "36"), (37, "36"), (99, "36")] {
            let version = kubelet_version(Release::new(1, minor));
            let wanted = format!("v1.{said}.0+knoc.{}", env!("CARGO_PKG_VERSION"));
            assert_eq!(version, wanted);
        }
        assert!(kubelet_version(Release::new(2, 0)).starts_with("v1.36.0+knoc."));
    }

    #[test]
    fn without_an_answer_the_last_version_stays() {
        assert_eq!(
            version_without_server(Some("v1.34.0+knoc.0.0.9")),
            "v1.34.0+knoc.0.0.9"
        );
        assert_eq!(version_without_server(Some("")), kubelet_version(OURS));
        assert_eq!(version_without_server(None), kubelet_version(OURS));
    }
}
