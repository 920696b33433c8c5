//! PURE: the options of `containerLogs`, parsed and checked as the Kubernetes kubelet does for `v1.PodLogOptions`.

use jiff::Timestamp;
use knoc_proto::{ids::PodUid, pb};

use knoc_remotecommand::query::Query;

/// Why the options of a log request are rejected; the texts are those of the Kubernetes kubelet.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum BadOptions {
    /// A value could not be parsed: 400.
    Undecodable,
    /// The values contradict each other or are out of range: 422.
    Invalid,
}

/// Which part of a container's log is requested.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub(super) struct LogOptions {
    pub(super) follow: bool,
    pub(super) previous: bool,
    pub(super) timestamps: bool,
    pub(super) since: Option<Since>,
    pub(super) tail_lines: Option<i64>,
    pub(super) limit_bytes: Option<i64>,
    pub(super) stream: pb::LogStream,
}

/// The time of the first requested line.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Since {
    Seconds(i64),
    Time(Timestamp),
}

impl LogOptions {
    /// Reads and checks the options of a request.
    pub(super) fn parse(query: &Query) -> Result<Self, BadOptions> {
        // The legacy name wins over the new one, and "all" is the same as neither.
        let tail_lines = match query.first("tail").filter(|tail| !tail.is_empty()) {
            Some("all") => None,
            Some(tail) => Some(integer(tail)?),
            None => query.first("tailLines").map(integer).transpose()?,
        };
        let limit_bytes = query.first("limitBytes").map(integer).transpose()?;
        let seconds = query.first("sinceSeconds").map(integer).transpose()?;
        let time = query.first("sinceTime").map(time).transpose()?.flatten();
        let stream = stream(query.first("stream"))?;
        let split = stream != pb::LogStream::All;
        if tail_lines.is_some_and(|lines| lines < 0 || split)
            || limit_bytes.is_some_and(|bytes| bytes < 1)
        {
            return Err(BadOptions::Invalid);
        }
        let since = match (seconds, time) {
            (Some(_), Some(_)) => return Err(BadOptions::Invalid),
            (Some(seconds), None) if seconds < 1 => return Err(BadOptions::Invalid),
            (Some(seconds), None) => Some(Since::Seconds(seconds)),
            (None, Some(time)) => Some(Since::Time(time)),
            (None, None) => None,
        };
        Ok(Self {
            follow: boolean(query.first("follow")),
            previous: boolean(query.first("previous")),
            timestamps: boolean(query.first("timestamps")),
            since,
            tail_lines,
            limit_bytes,
            stream,
        })
    }

    /// The request to the agent for these options.
    pub(super) fn request(
        &self,
        uid: &PodUid,
        container: &str,
        now: Timestamp,
    ) -> pb::ReadLogsRequest {
        let now = nanoseconds(now);
        let since = match self.since {
            None => 0,
            Some(Since::Seconds(seconds)) => now
                .saturating_sub(seconds.saturating_mul(1_000_000_000))
                .max(1),
            Some(Since::Time(time)) => nanoseconds(time).max(1),
        };
        pb::ReadLogsRequest {
            uid: uid.to_string(),
            container: container.to_owned(),
            follow: self.follow,
            previous: self.previous,
            timestamps: self.timestamps,
            since,
            tail_lines: self.tail_lines.unwrap_or(-1),
            limit_bytes: self.limit_bytes.unwrap_or(0),
            stream: self.stream.into(),
            ..pb::ReadLogsRequest::default()
        }
    }
}

fn nanoseconds(time: Timestamp) -> i64 {
    i64::try_from(time.as_nanosecond()).unwrap_or(i64::MAX)
}

fn integer(text: &str) -> Result<i64, BadOptions> {
    text.parse().map_err(|_| BadOptions::Undecodable)
}

/// Converts a query parameter as apimachinery does: only absence, `false` and `0` are false.
fn boolean(value: Option<&str>) -> bool {
    value.is_some_and(|text| !text.eq_ignore_ascii_case("false") && text != "0")
}

fn time(text: &str) -> Result<Option<Timestamp>, BadOptions> {
    if text.is_empty() || text == "null" {
        return Ok(None);
    }
    text.parse().map(Some).map_err(|_| BadOptions::Undecodable)
}

fn stream(value: Option<&str>) -> Result<pb::LogStream, BadOptions> {
    match value {
        None | Some("" | "All") => Ok(pb::LogStream::All),
        Some("Stdout") => Ok(pb::LogStream::Stdout),
        Some("Stderr") => Ok(pb::LogStream::Stderr),
        Some(_) => Err(BadOptions::Invalid),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(raw: &str) -> Result<LogOptions, BadOptions> {
        let query = Query::parse(raw).map_err(|_| BadOptions::Undecodable)?;
        LogOptions::parse(&query)
    }

    #[test]
    fn reads_every_option() {
        let options = parse(
            "follow=true&previous=1&timestamps&tailLines=7&limitBytes=9&sinceTime=2026-11-22T10%3A00%3A00Z",
        )
        .unwrap();
        assert_eq!(
            options,
            LogOptions {
                follow: true,
                previous: true,
                timestamps: true,
                since: Some(Since::Time("2026-11-22T10:00:00Z".parse().unwrap())),
                tail_lines: Some(7),
                limit_bytes: Some(9),
                stream: pb::LogStream::All,
            }
        );
        let off = parse("follow=false&previous=0&timestamps=False&stream=Stderr").unwrap();
        assert_eq!(
            off,
            LogOptions {
                stream: pb::LogStream::Stderr,
                ..LogOptions::default()
            }
        );
    }

    #[test]
    fn legacy_tail_wins_and_all_means_none() {
        assert_eq!(parse("tail=3&tailLines=5").unwrap().tail_lines, Some(3));
        assert_eq!(parse("tail=all&tailLines=5").unwrap().tail_lines, None);
        assert_eq!(parse("tail=&tailLines=5").unwrap().tail_lines, Some(5));
    }

    #[test]
    fn refuses_as_upstream() {
        for raw in [
            "tailLines=x",
            "tail=x",
            "limitBytes=1.5",
            "sinceSeconds=",
            "sinceTime=yesterday",
        ] {
            assert_eq!(parse(raw), Err(BadOptions::Undecodable), "{raw}");
        }
        for raw in [
            "tailLines=-1",
            "limitBytes=0",
            "sinceSeconds=0",
            "sinceSeconds=5&sinceTime=2026-11-22T10:00:00Z",
            "stream=Both",
            "stream=Stdout&tailLines=5",
        ] {
            assert_eq!(parse(raw), Err(BadOptions::Invalid), "{raw}");
        }
    }

    #[test]
    fn asks_the_agent_in_its_units() {
        let now: Timestamp = "2026-11-22T10:00:00Z".parse().unwrap();
        let uid = "u".parse().unwrap();
        let request = parse("sinceSeconds=60").unwrap().request(&uid, "c", now);
        assert_eq!(request.since, nanoseconds(now) - 60_000_000_000);
        assert_eq!((request.tail_lines, request.limit_bytes), (-1, 0));
        let zero = parse("tailLines=0").unwrap().request(&uid, "c", now);
        assert_eq!((zero.tail_lines, zero.since), (0, 0));
        let ages = parse("sinceSeconds=9223372036854775807").unwrap();
        assert_eq!(ages.request(&uid, "c", now).since, 1);
    }
}
