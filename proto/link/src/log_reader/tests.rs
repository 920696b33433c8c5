use std::{
    collections::VecDeque,
    sync::{Arc, Mutex},
};

use futures::stream::BoxStream;

use super::*;

/// Every answer in order, and the requests that were made.
#[derive(Clone, Default)]
struct Script(Arc<Mutex<Played>>);

#[derive(Default)]
struct Played {
    answers: VecDeque<Result<Vec<Result<pb::LogChunk, Status>>, Status>>,
    requests: Vec<pb::ReadLogsRequest>,
    interruptions: usize,
    gone: bool,
}

impl Source for Script {
    type Chunks = BoxStream<'static, Result<pb::LogChunk, Status>>;

    async fn open(&self, request: pb::ReadLogsRequest) -> Result<Self::Chunks, Status> {
        let mut played = self.0.lock().unwrap();
        played.requests.push(request);
        let away = || Err(Status::unavailable("nobody answers"));
        let answer = played.answers.pop_front().unwrap_or_else(away)?;
        Ok(stream::iter(answer).boxed())
    }

    fn wanted(&self) -> Result<(), Status> {
        if self.0.lock().unwrap().gone {
            return Err(Status::not_found("the pod was deleted"));
        }
        Ok(())
    }

    fn interrupted(&self, _: &Status) {
        self.0.lock().unwrap().interruptions += 1;
    }
}

fn at(offset: u64, data: &'static str, end: bool) -> Result<pb::LogChunk, Status> {
    Ok(pb::LogChunk {
        data: Bytes::from_static(data.as_bytes()),
        next: Some(pb::LogPosition {
            inode: 7,
            offset,
            ..pb::LogPosition::default()
        }),
        end,
    })
}

fn bare(data: &'static str) -> Result<pb::LogChunk, Status> {
    Ok(pb::LogChunk {
        data: Bytes::from_static(data.as_bytes()),
        ..pb::LogChunk::default()
    })
}

fn broken() -> Result<pb::LogChunk, Status> {
    Err(Status::unknown("h2 protocol error: broken pipe"))
}

impl Script {
    fn answering(self, answer: Vec<Result<pb::LogChunk, Status>>) -> Self {
        self.0.lock().unwrap().answers.push_back(Ok(answer));
        self
    }

    fn refusing(self, status: Status) -> Self {
        self.0.lock().unwrap().answers.push_back(Err(status));
        self
    }

    /// The whole log, and the error that ended it.
    async fn read(&self, limit_bytes: i64) -> (String, Option<Status>) {
        let request = pb::ReadLogsRequest {
            follow: true,
            tail_lines: 0,
            limit_bytes,
            ..pb::ReadLogsRequest::default()
        };
        let mut items = std::pin::pin!(read(self.clone(), request).await.unwrap());
        let mut text = Vec::new();
        while let Some(item) = items.next().await {
            match item {
                Ok(bytes) => text.extend_from_slice(&bytes),
                Err(status) => {
                    assert!(items.next().await.is_none(), "an error is the last item");
                    return (String::from_utf8(text).unwrap(), Some(status));
                }
            }
        }
        (String::from_utf8(text).unwrap(), None)
    }

    /// The offsets at which the requests continued.
    fn offsets(&self) -> Vec<Option<u64>> {
        let played = self.0.lock().unwrap();
        let from = |request: &pb::ReadLogsRequest| request.from.as_ref().map(|from| from.offset);
        assert!(played.requests.iter().all(|request| request.positions));
        played.requests.iter().map(from).collect()
    }
}

#[tokio::test(start_paused = true)]
async fn a_log_continues_at_the_byte_that_was_reached() {
    let script = Script::default()
        .answering(vec![at(10, "", false), at(14, "one\n", false), broken()])
        .refusing(Status::unavailable("the agent starts"))
        .refusing(ErrorReason::ShuttingDown.status("the agent stops"))
        .answering(vec![at(14, "", false), at(18, "two\n", false)])
        .answering(vec![at(18, "", false), at(24, "three\n", true)]);
    assert_eq!(script.read(0).await.0, "one\ntwo\nthree\n");
    assert_eq!(
        script.offsets(),
        [None, Some(14), Some(14), Some(14), Some(18)]
    );
    assert_eq!(script.0.lock().unwrap().interruptions, 2);
}

#[tokio::test(start_paused = true)]
async fn a_log_that_was_silent_until_the_cut_does_not_choose_its_last_lines_anew() {
    let script = Script::default()
        .answering(vec![at(10, "", false), broken()])
        .answering(vec![at(10, "", false), at(14, "new\n", true)]);
    assert_eq!(script.read(0).await.0, "new\n");
    assert_eq!(script.offsets(), [None, Some(10)]);
}

#[tokio::test(start_paused = true)]
async fn a_byte_limit_holds_over_all_parts() {
    let script = Script::default()
        .answering(vec![at(4, "one\n", false), broken()])
        .answering(vec![
            at(4, "", false),
            at(6, "tw", false),
            at(9, "no", false),
        ]);
    let (text, error) = script.read(6).await;
    assert_eq!((text.as_str(), error.is_none()), ("one\ntw", true));
    assert_eq!(script.0.lock().unwrap().requests[1].limit_bytes, 2);
}

#[tokio::test(start_paused = true)]
async fn an_agent_that_stays_away_is_given_up_with_its_last_error() {
    let script = Script::default().answering(vec![at(4, "one\n", false), broken()]);
    let began = Instant::now();
    let (text, error) = script.read(0).await;
    assert_eq!(text, "one\n");
    let error = error.unwrap();
    assert!(error.message().contains("5 min: nobody answers"), "{error}");
    assert!(began.elapsed() >= GIVE_UP && began.elapsed() < GIVE_UP + PAUSE_MOST);
    let attempts = script.offsets().len();
    assert!((40..150).contains(&attempts), "{attempts} attempts");
    assert_eq!(script.0.lock().unwrap().interruptions, 1);
}

#[tokio::test(start_paused = true)]
async fn what_the_agent_itself_refuses_is_not_tried_again() {
    let script = Script::default()
        .answering(vec![at(4, "one\n", false), broken()])
        .refusing(ErrorReason::NotFound.status("no pod u"));
    let error = script.read(0).await.1.unwrap();
    assert_eq!(error.message(), "no pod u");
    let script = Script::default().answering(vec![at(4, "one\n", false), broken()]);
    script.0.lock().unwrap().gone = true;
    let error = script.read(0).await.1.unwrap();
    assert_eq!(error.message(), "the pod was deleted");
    assert_eq!(script.offsets(), [None]);
}

#[tokio::test(start_paused = true)]
async fn an_older_agent_ends_a_log_as_before_and_never_doubles_it() {
    // Older from the beginning: no positions, so neither the end nor an error can be more than that.
    let script = Script::default().answering(vec![bare("one\n")]);
    assert_eq!(script.read(0).await.0, "one\n");
    let script = Script::default().answering(vec![bare("one\n"), broken()]);
    assert!(script.read(0).await.1.is_some());
    assert_eq!(script.offsets(), [None]);
    // Older than the one before the cut: it would begin anew.
    let script = Script::default()
        .answering(vec![at(4, "one\n", false), broken()])
        .answering(vec![bare("one\n")]);
    let (text, error) = script.read(0).await;
    assert_eq!(
        (text.as_str(), error.unwrap().code()),
        ("one\n", Code::Unimplemented)
    );
}
