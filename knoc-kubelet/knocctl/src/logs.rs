//! `knocctl logs`: prints the bytes of one container's log unchanged, or those of one of its ranks. A log continues after the
//! link to the agent was lost.

mod rank;

use std::{pin::pin, process::ExitCode};

use futures::StreamExt as _;
use jiff::{SignedDuration, Timestamp};
use knoc_link::log_reader;
use knoc_proto::{
    pb::{self, LogStream, PodPhase, ReadLogsRequest, agent_client::AgentClient},
    reason::ErrorReason,
};
use tonic::{Response, Status, Streaming, transport::Channel};

use self::rank::OneRank;
use super::{
    CtlError, Global, find, output,
    session::{Session, asked},
};

#[derive(Debug, clap::Args)]
pub(super) struct Logs {
    /// Name, NAMESPACE/NAME or uid of the pod
    pod: String,
    /// The container, if the pod has several
    #[arg(short, long)]
    container: Option<String>,
    /// Follows the log until the container ends
    #[arg(short, long)]
    follow: bool,
    /// Prints only this many of the last lines
    #[arg(long, value_name = "LINES", value_parser = clap::value_parser!(i64).range(0..))]
    tail: Option<i64>,
    /// Prints only lines newer than this (10m, 1h30m)
    #[arg(long, value_name = "DURATION", value_parser = duration, conflicts_with = "since_time")]
    since: Option<SignedDuration>,
    /// Prints only lines from this time on (RFC 3339)
    #[arg(long, value_name = "TIME")]
    since_time: Option<Timestamp>,
    /// Prefixes each line with its time
    #[arg(long)]
    timestamps: bool,
    /// Prints the log of the instance before the last restart
    #[arg(short, long)]
    previous: bool,
    /// Stops after this many bytes
    #[arg(long, value_name = "BYTES", value_parser = clap::value_parser!(i64).range(1..))]
    limit_bytes: Option<i64>,
    /// Prints only one of the two streams
    #[arg(long, value_enum, default_value_t)]
    stream: Stream,
    /// Prints only the lines of this rank of an MPI program, without their labels
    #[arg(long, value_name = "NUMBER", conflicts_with_all = ["tail", "timestamps", "limit_bytes"])]
    rank: Option<u32>,
}

/// The output streams to print.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, clap::ValueEnum)]
enum Stream {
    /// Standard output and standard error.
    #[default]
    All,
    /// Standard output.
    Stdout,
    /// Standard error.
    Stderr,
}

fn duration(text: &str) -> Result<SignedDuration, String> {
    let span: SignedDuration = text
        .parse()
        .map_err(|error: jiff::Error| error.to_string())?;
    if span.is_negative() {
        Err("a span of the past is positive".to_owned())
    } else {
        Ok(span)
    }
}

impl Logs {
    pub(super) async fn run(self, global: &Global) -> Result<ExitCode, CtlError> {
        let mut session = Session::open(global)?;
        let pod = find::one(&mut session, global.namespace.as_deref(), &self.pod).await?;
        let container = container(&pod, self.container.as_deref());
        let request = self.request(&pod.uid, container, Timestamp::now());
        copy(&session, request, self.rank.map(OneRank::new)).await?;
        Ok(ExitCode::SUCCESS)
    }

    fn request(&self, uid: &str, container: String, now: Timestamp) -> ReadLogsRequest {
        let young = self.since.and_then(|span| now.checked_sub(span).ok());
        let since = self.since_time.or(young).map_or(0, |at| {
            i64::try_from(at.as_nanosecond()).unwrap_or(0).max(0)
        });
        let stream = match self.stream {
            Stream::All => LogStream::All,
            Stream::Stdout => LogStream::Stdout,
            Stream::Stderr => LogStream::Stderr,
        };
        ReadLogsRequest {
            uid: uid.to_owned(),
            container,
            follow: self.follow,
            previous: self.previous,
            timestamps: self.timestamps,
            since,
            tail_lines: self.tail.unwrap_or(-1),
            limit_bytes: self.limit_bytes.unwrap_or(0),
            stream: stream.into(),
            ..ReadLogsRequest::default()
        }
    }
}

/// The container that the user named, else the first one. If there are several, the choice is printed.
pub(super) fn container(pod: &pb::PodObserved, asked: Option<&str>) -> String {
    if let Some(asked) = asked {
        return asked.to_owned();
    }
    let names: Vec<&str> = pod
        .containers
        .iter()
        .map(|container| container.name.as_str())
        .collect();
    if let [first, _, ..] = names.as_slice() {
        output::complain(&format!("container {first} of: {}", names.join(", ")));
    }
    names
        .first()
        .map_or_else(String::new, |first| (*first).to_owned())
}

/// The log of a container, which continues after the link to the agent was lost.
struct PodLog(AgentClient<Channel>);

impl log_reader::Source for PodLog {
    type Chunks = Streaming<pb::LogChunk>;

    async fn open(&self, request: ReadLogsRequest) -> Result<Self::Chunks, Status> {
        let answer = self.0.clone().read_logs(request).await?;
        Ok(answer.into_inner())
    }

    fn interrupted(&self, _: &Status) {
        output::complain("the link to the agent was lost; the log continues once it is back");
    }
}

/// Copies a log to standard output, or the lines of one rank.
async fn copy(
    session: &Session,
    request: ReadLogsRequest,
    mut rank: Option<OneRank>,
) -> Result<(), CtlError> {
    let what = format!("read the log of {}", request.container);
    let log = PodLog(session.client.clone());
    let opened = async { log_reader::read(log, request).await.map(Response::new) };
    let mut bytes = pin!(asked(&what, opened).await?);
    while let Some(bytes) = bytes.next().await {
        let bytes = bytes.map_err(|source| CtlError::Agent {
            what: what.clone(),
            source,
        })?;
        match &mut rank {
            None => output::pass(&bytes).await?,
            Some(rank) => output::pass(&rank.take(&bytes)).await?,
        }
    }
    Ok(())
}

/// Follows the log of a container that may not run yet, for `run --logs`.
pub(super) struct Follow<'a> {
    pub(super) uid: &'a str,
    pub(super) container: &'a str,
}

impl Follow<'_> {
    /// Waits for the container's first instance, then copies its log until it ends.
    pub(super) async fn until_the_end(&self, session: &mut Session) -> Result<(), CtlError> {
        let began = |pod: &pb::PodObserved| {
            let started = |status: &pb::ContainerStatus| {
                use pb::container_status::State;
                matches!(status.state, Some(State::Running(_) | State::Terminated(_)))
            };
            pod.phase() == PodPhase::Finished
                || pod
                    .containers
                    .iter()
                    .any(|status| status.name == self.container && started(status))
        };
        session.wait_for(self.uid, began).await?;
        let request = ReadLogsRequest {
            uid: self.uid.to_owned(),
            container: self.container.to_owned(),
            follow: true,
            tail_lines: -1,
            ..ReadLogsRequest::default()
        };
        match copy(session, request, None).await {
            // The container never started; the pod's outcome, which is printed next, says why.
            Err(CtlError::Agent { source, .. })
                if ErrorReason::of(&source) == Some(ErrorReason::ContainerNotFound) =>
            {
                Ok(())
            }
            other => other,
        }
    }
}

#[cfg(test)]
mod tests {
    use clap::Parser as _;

    use super::*;

    #[derive(Debug, clap::Parser)]
    struct Line {
        #[command(flatten)]
        logs: Logs,
    }

    fn parsed(arguments: &[&str]) -> Result<Logs, String> {
        let line = Line::try_parse_from(["logs"].iter().chain(arguments));
        line.map(|line| line.logs)
            .map_err(|error| error.to_string())
    }

    #[test]
    fn all_options_reach_the_request() {
        let logs = parsed(&[
            "web",
            "-f",
            "-p",
            "--tail",
            "5",
            "--since",
            "1h30m",
            "--timestamps",
            "--limit-bytes",
            "9",
            "--stream",
            "stderr",
        ]);
        let now = Timestamp::from_second(10_000).unwrap();
        let request = logs.unwrap().request("u", "main".into(), now);
        let wanted = ReadLogsRequest {
            uid: "u".into(),
            container: "main".into(),
            follow: true,
            previous: true,
            timestamps: true,
            since: 4600 * 1_000_000_000,
            tail_lines: 5,
            limit_bytes: 9,
            stream: LogStream::Stderr.into(),
            ..ReadLogsRequest::default()
        };
        assert_eq!(request, wanted);
    }

    #[test]
    fn defaults_mean_everything() {
        let request = parsed(&["web"])
            .unwrap()
            .request("u", String::new(), Timestamp::UNIX_EPOCH);
        assert_eq!(
            (request.since, request.tail_lines, request.limit_bytes),
            (0, -1, 0)
        );
    }

    #[test]
    fn mistakes_are_refused() {
        for wrong in [
            &["web", "--tail", "-1"][..],
            &["web", "--since", "yesterday"],
            &["web", "--since=-5m"],
            &["web", "--limit-bytes", "0"],
            &["web", "--rank", "-1"],
            &["web", "--rank", "1", "--tail", "5"],
            &["web", "--rank", "1", "--timestamps"],
            &[
                "web",
                "--since",
                "5m",
                "--since-time",
                "2026-01-01T00:00:00Z",
            ],
        ] {
            parsed(wrong).unwrap_err();
        }
    }

    #[test]
    fn the_first_container_is_the_default() {
        let pod = super::super::view::tests::sample();
        assert_eq!(container(&pod, None), "main");
        assert_eq!(container(&pod, Some("side")), "side");
        assert_eq!(container(&pb::PodObserved::default(), None), "");
    }
}
