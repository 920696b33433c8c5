//! One container as the supervisor keeps it.

use std::sync::Arc;

use knoc_contract::logs::read::Follow;
use knoc_proto::pb::{self, container_status::State};
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

use super::super::{
    container::{Ended, Program},
    directory::{Entry, Log},
    plan::{Backoff, Container, Phase, Signalled, Time},
    report::{self, History},
    usage::{Account, Counters},
};

/// See the module.
#[derive(Debug)]
pub(super) struct Slot {
    pub(super) phase: Phase,
    pub(super) signalled: Signalled,
    pub(super) history: History,
    pub(super) program: Option<Arc<Program>>,
    pub(super) abort: CancellationToken,
    /// What the running attempt used.
    pub(super) account: Account,
    /// What the attempts before it used.
    pub(super) used_before: Counters,
    /// How many lost lines of the running attempt's log were told.
    pub(super) lost_lines: u64,
    backoff: Backoff,
    /// Has any attempt begun, in this job or before?
    tried: bool,
    /// Held while the attempt lasts: its end ends the log's followers.
    ending: Option<watch::Sender<bool>>,
    log: Option<Log>,
    previous_log: Option<Log>,
}

impl Slot {
    /// A container that was not started in this job; `before`: what an earlier run of the job reported of it.
    pub(super) fn new(backoff: Backoff, before: Option<&pb::ContainerStatus>) -> Self {
        let mut history = History::default();
        let mut tried = false;
        if let Some(before) = before {
            history.attempt = u32::try_from(before.restart_count).unwrap_or_default();
            (tried, history.ended) = match &before.state {
                Some(State::Running(_)) => (true, before.last_termination.clone()),
                Some(State::Terminated(ended)) => (true, Some(ended.clone())),
                Some(State::Waiting(_)) | None => (
                    before.last_termination.is_some(),
                    before.last_termination.clone(),
                ),
            };
        }
        Self {
            phase: Phase::Idle,
            signalled: Signalled::Nothing,
            history,
            program: None,
            abort: CancellationToken::new(),
            account: Account::default(),
            used_before: Counters::default(),
            lost_lines: 0,
            backoff,
            tried,
            ending: None,
            log: None,
            previous_log: None,
        }
    }

    pub(super) fn view(&self) -> Container {
        Container {
            phase: self.phase,
            signalled: self.signalled,
        }
    }

    pub(super) fn succeeded(&self) -> bool {
        matches!(self.phase, Phase::Exited { code: 0, .. })
    }

    /// A new attempt begins; answers where its log's news go.
    pub(super) fn begin(&mut self) -> watch::Sender<u64> {
        if self.tried {
            self.history.attempt += 1;
        }
        self.tried = true;
        self.phase = Phase::Starting;
        self.signalled = Signalled::Nothing;
        self.abort = CancellationToken::new();
        self.history.started_at = None;
        self.lost_lines = 0;
        let (written, news) = watch::channel(0);
        let (ending, ended) = watch::channel(false);
        self.ending = Some(ending);
        self.previous_log = self.log.take();
        let follow = Follow {
            written: Some(news),
            ended,
        };
        self.log = Some(Log {
            attempt: self.history.attempt,
            follow,
        });
        written
    }

    /// The attempt ended.
    pub(super) fn end(&mut self, ended: &Ended, id: String, now: Time) {
        let started_at = self.history.started_at;
        self.program = None;
        let mut account = std::mem::take(&mut self.account);
        self.used_before = self.used_before + account.end(ended.used);
        if let Some(ending) = self.ending.take() {
            ending.send_replace(true);
        }
        self.history.ended_before = self.history.ended.take();
        self.history.ended = Some(report::terminated(ended, started_at, id));
        let ran = started_at.map_or(Time::ZERO, |at| {
            Time::try_from(ended.finished_at.duration_since(at)).unwrap_or_default()
        });
        self.history.pause = self.backoff.after(ran);
        self.phase = Phase::Exited {
            code: ended.exit.code,
            restart_at: now + self.history.pause,
        };
    }

    /// What streams may know of it.
    pub(super) fn entry(&self) -> Entry {
        Entry {
            program: self.program.clone(),
            log: self.log.clone(),
            previous: self
                .previous_log
                .as_ref()
                .map(|log| log.attempt)
                .or_else(|| {
                    // Before this job's first attempt: that of an earlier run.
                    self.log.as_ref().and_then(|log| log.attempt.checked_sub(1))
                }),
        }
    }
}
