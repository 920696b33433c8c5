//! PURE: Kubernetes' remotecommand protocol, whatever carries it: versions, options, streams, terminal sizes, and how
//! the client learns the end of a command.

use http::HeaderMap;
use knoc_proto::pb;
use serde_json::json;

use crate::query::Query;
use crate::websocket::Encoding;

/// The header of a SPDY request that lists the client's protocol versions.
pub const VERSION_HEADER: &str = "x-stream-protocol-version";
/// The header of a rejection that lists our protocol versions.
pub const ACCEPTED_HEADER: &str = "x-accepted-stream-protocol-versions";
/// The protocol versions that are supported over SPDY, newest first.
pub const SPDY_VERSIONS: [(&str, Version); 4] = [
    ("v4.channel.k8s.io", Version::V4),
    ("v3.channel.k8s.io", Version::V3),
    ("v2.channel.k8s.io", Version::V2),
    ("channel.k8s.io", Version::V1),
];

/// The protocol versions that are supported over WebSocket, newest first. v5 is v4 with channels that the client may
/// close.
pub const WEBSOCKET_VERSIONS: [(&str, (Version, Encoding)); 5] = [
    (
        "v5.channel.k8s.io",
        (Version::V4, Encoding::BinaryWithClose),
    ),
    ("v4.channel.k8s.io", (Version::V4, Encoding::Binary)),
    ("v4.base64.channel.k8s.io", (Version::V4, Encoding::Base64)),
    ("channel.k8s.io", (Version::V1, Encoding::Binary)),
    ("base64.channel.k8s.io", (Version::V1, Encoding::Base64)),
];
/// The encoding for a WebSocket client that requests no subprotocol.
pub const WEBSOCKET_UNNAMED: (Version, Encoding) = (Version::V1, Encoding::Binary);

/// A version of the protocol. v3 added terminal sizes, v4 the exit code as JSON.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Version {
    /// Without terminal sizes; the end is reported as text.
    V1,
    /// Like v1, without its faults when streams are closed.
    V2,
    /// Like v2, with terminal sizes.
    V3,
    /// Like v3; the end is reported as a `Status` object in JSON with the exit code.
    V4,
}

/// Why no version can be used.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum NoVersion {
    /// The client names no version: HTTP status 400.
    Unnamed,
    /// The client names no version of ours: HTTP status 403.
    Foreign,
}

/// The client's first version that is in `ours`, with its name, which the response must repeat.
pub fn negotiate<T: Copy>(
    headers: &HeaderMap,
    ours: &[(&'static str, T)],
) -> Result<(&'static str, T), NoVersion> {
    let offered: Vec<&str> = headers
        .get_all(VERSION_HEADER)
        .iter()
        .filter_map(|value| value.to_str().ok())
        .flat_map(|value| value.split(','))
        .map(str::trim)
        .filter(|name| !name.is_empty())
        .collect();
    if offered.is_empty() {
        return Err(NoVersion::Unnamed);
    }
    let own = |name: &&str| ours.iter().find(|(own, _)| own == name).copied();
    offered.iter().find_map(own).ok_or(NoVersion::Foreign)
}

/// The streams of a process that a client requests.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[expect(
    clippy::struct_excessive_bools,
    reason = "four flags of the query, independent of each other"
)]
pub struct Wanted {
    /// The client writes to standard input.
    pub stdin: bool,
    /// The client reads standard output.
    pub stdout: bool,
    /// The client reads standard error.
    pub stderr: bool,
    /// The process gets a terminal.
    pub tty: bool,
}

impl Wanted {
    /// Reads the flags of a query, of which each must be exactly `1`; with a terminal there is no separate stderr.
    /// `None` if no stream is requested.
    #[must_use]
    pub fn parse(query: &Query) -> Option<Self> {
        let flag = |name: &str| query.first(name) == Some("1");
        let tty = flag("tty");
        let wanted = Self {
            stdin: flag("input"),
            stdout: flag("output"),
            stderr: flag("error") && !tty,
            tty,
        };
        (wanted.stdin || wanted.stdout || wanted.stderr).then_some(wanted)
    }

    /// The number of streams that a SPDY client opens, including the error stream.
    #[must_use]
    pub fn streams(self, version: Version) -> usize {
        let resize = version >= Version::V3;
        self.roles()
            .filter(|role| resize || *role != Role::Resize)
            .count()
    }

    /// The requested streams, always including the error stream.
    pub fn roles(self) -> impl Iterator<Item = Role> {
        let all = [
            (Role::Stdin, self.stdin),
            (Role::Stdout, self.stdout),
            (Role::Stderr, self.stderr),
            (Role::Error, true),
            (Role::Resize, self.tty),
        ];
        all.into_iter()
            .filter_map(|(role, wanted)| wanted.then_some(role))
    }

    /// For each channel number of a WebSocket, whether the client may write the channel.
    #[must_use]
    pub fn writable(self) -> [bool; 5] {
        [self.stdin, false, false, false, self.tty]
    }
}

/// The role of a stream. Its number is the channel of a WebSocket.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Role {
    /// Standard input, written by the client.
    Stdin = 0,
    /// Standard output.
    Stdout = 1,
    /// Standard error.
    Stderr = 2,
    /// The error stream, on which the end of the process is reported.
    Error = 3,
    /// Terminal sizes, written by the client.
    Resize = 4,
}

impl Role {
    /// The role for a value of the stream header `streamtype`.
    #[must_use]
    pub fn parse(name: &str) -> Option<Self> {
        match name {
            "error" => Some(Self::Error),
            "stdin" => Some(Self::Stdin),
            "stdout" => Some(Self::Stdout),
            "stderr" => Some(Self::Stderr),
            "resize" => Some(Self::Resize),
            _ => None,
        }
    }
}

/// How a remote command ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Ending {
    /// It exited with this code; 128 + signal number if a signal ended it.
    Exited(i32),
    /// It could not be run, or its end is unknown: what was being done, and why that failed.
    Failed(&'static str, String),
}

impl Ending {
    /// The contents of the error stream; in v1 to v3 a success is empty.
    #[must_use]
    pub fn status(&self, version: Version) -> String {
        let failure = match self {
            Self::Exited(0) if version >= Version::V4 => {
                return json!({"metadata": {}, "status": "Success"}).to_string();
            }
            Self::Exited(0) => return String::new(),
            Self::Exited(code) => format!(
                "command terminated with non-zero exit code: command terminated with exit code {code}"
            ),
            Self::Failed(about, reason) => {
                format!("Internal error occurred: error {about} container: {reason}")
            }
        };
        if version < Version::V4 {
            return failure;
        }
        let status = match self {
            Self::Exited(code) => json!({
                "metadata": {}, "status": "Failure", "message": failure, "reason": "NonZeroExitCode",
                "details": {"causes": [{"reason": "ExitCode", "message": code.to_string()}]},
            }),
            Self::Failed(about, reason) => json!({
                "metadata": {}, "status": "Failure", "message": failure, "reason": "InternalError",
                "details": {"causes": [{
                    "message": format!("error {about} container: {reason}"),
                }]},
                "code": 500,
            }),
        };
        status.to_string()
    }
}

/// The most bytes of an incomplete terminal size; a client sends about thirty.
const MAX_SIZE: usize = 1024;

/// Extracts terminal sizes from a resize stream: JSON objects without separators, in pieces of any size.
#[derive(Debug, Default)]
pub struct Resizes(Vec<u8>);

impl Resizes {
    /// Adds bytes, and returns the sizes that are complete now. Bytes that are not JSON are dropped.
    pub fn feed(&mut self, bytes: &[u8]) -> Vec<pb::TerminalSize> {
        self.0.extend_from_slice(bytes);
        let mut values =
            serde_json::Deserializer::from_slice(&self.0).into_iter::<serde_json::Value>();
        let mut sizes = Vec::new();
        let mut used = 0;
        let broken = loop {
            match values.next() {
                None => break false,
                Some(Ok(value)) => {
                    used = values.byte_offset();
                    sizes.extend(size(&value));
                }
                Some(Err(error)) => break !error.is_eof(),
            }
        };
        drop(values);
        if broken {
            self.0.clear();
        } else {
            self.0.drain(..used);
        }
        if self.0.len() > MAX_SIZE {
            self.0.clear();
        }
        sizes
    }
}

/// Accepts field names in any case, as upstream does: the JavaScript client writes them in lower case.
fn size(value: &serde_json::Value) -> Option<pb::TerminalSize> {
    let field = |name: &str| {
        let mut fields = value.as_object()?.iter();
        let (_, value) = fields.find(|(own, _)| own.eq_ignore_ascii_case(name))?;
        let cells = u16::try_from(value.as_u64()?).ok();
        // As with any runtime, a terminal does not shrink to nothing.
        cells.filter(|cells| *cells > 0).map(u32::from)
    };
    let (width, height): (Option<u32>, Option<u32>) = (field("Width"), field("Height"));
    Some(pb::TerminalSize {
        width: width?,
        height: height?,
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn offered(values: &[&str]) -> HeaderMap {
        let mut headers = HeaderMap::new();
        for value in values {
            headers.append(VERSION_HEADER, value.parse().unwrap());
        }
        headers
    }

    #[test]
    fn takes_the_first_version_of_the_client_that_is_supported() {
        let v5_first = offered(&["v5.channel.k8s.io", "v4.channel.k8s.io", "channel.k8s.io"]);
        let negotiate = |headers: &HeaderMap| super::negotiate(headers, &SPDY_VERSIONS);
        assert_eq!(negotiate(&v5_first), Ok(("v4.channel.k8s.io", Version::V4)));
        let list = offered(&["v2.channel.k8s.io, v4.channel.k8s.io"]);
        assert_eq!(negotiate(&list), Ok(("v2.channel.k8s.io", Version::V2)));
        assert_eq!(negotiate(&offered(&[])), Err(NoVersion::Unnamed));
        assert_eq!(negotiate(&offered(&[" "])), Err(NoVersion::Unnamed));
        assert_eq!(negotiate(&offered(&["v9"])), Err(NoVersion::Foreign));
    }

    #[test]
    fn reads_flags_exactly() {
        let wanted = |raw: &str| Wanted::parse(&Query::parse(raw).unwrap());
        let all = wanted("input=1&output=1&error=1&tty=1").unwrap();
        assert!(all.tty && all.stdin && all.stdout && !all.stderr);
        assert_eq!(all.streams(Version::V4), 4);
        assert_eq!(all.streams(Version::V2), 3);
        assert_eq!(wanted("input=true&tty=1&error=1"), None);
    }

    #[test]
    fn reports_ends_as_upstream() {
        assert_eq!(
            Ending::Exited(0).status(Version::V4),
            r#"{"metadata":{},"status":"Success"}"#
        );
        assert_eq!(Ending::Exited(0).status(Version::V3), "");
        let failed = Ending::Exited(3).status(Version::V4);
        let status: serde_json::Value = serde_json::from_str(&failed).unwrap();
        assert_eq!(status["reason"], "NonZeroExitCode");
        let cause = json!({"reason": "ExitCode", "message": "3"});
        assert_eq!(status["details"]["causes"][0], cause);
        let text = Ending::Failed("executing command in", "no such file".to_owned());
        let text = text.status(Version::V1);
        assert_eq!(
            text,
            "Internal error occurred: error executing command in container: no such file"
        );
    }

    #[test]
    fn sizes_are_read_in_pieces_of_any_size() {
        let wire = br#"{"Width":80,"Height":24}{"Width":100,"Height":50}
            {"Width":70000,"Height":1}{"Width":0,"Height":0}{"Width":9,"Height":0}{"Width":1,"Height":2}{"height":33,"width":101}"#;
        let expected = [(80, 24), (100, 50), (1, 2), (101, 33)];
        for step in 1..wire.len() {
            let mut resizes = Resizes::default();
            let sizes: Vec<_> = wire
                .chunks(step)
                .flat_map(|piece| resizes.feed(piece))
                .map(|size| (size.width, size.height))
                .collect();
            assert_eq!(sizes, expected, "in pieces of {step}");
        }
    }

    proptest! {
        #[test]
        fn never_panics_and_stays_bounded(pieces in prop::collection::vec(prop::collection::vec(any::<u8>(), 0..300), 0..20)) {
            let mut resizes = Resizes::default();
            for piece in pieces {
                drop(resizes.feed(&piece));
                prop_assert!(resizes.0.len() <= MAX_SIZE);
            }
        }
    }
}
