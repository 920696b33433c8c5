//! The two watches. Each sends a snapshot and then every change; a reader that falls behind
//! receives only the newest state.

use std::sync::Arc;

use futures::{Stream, StreamExt as _, stream};
use knoc_proto::{
    pb::{self, pod_event::Event},
    reason::ErrorReason,
};
use tokio::sync::watch::Receiver;
use tokio_util::sync::CancellationToken;
use tonic::Status;

use crate::site::Site;

fn stopping() -> Status {
    ErrorReason::ShuttingDown.status("the agent is stopping")
}

/// The `WatchNode` stream.
pub(super) fn node(
    mut node: Receiver<pb::NodeInfo>,
    stop: CancellationToken,
) -> impl Stream<Item = Result<pb::NodeInfo, Status>> + Send {
    node.mark_changed();
    stream::unfold(Some(node), move |node| {
        let stop = stop.clone();
        async move {
            let mut node = node?;
            tokio::select! {
                biased;
                () = stop.cancelled() => Some((Err(stopping()), None)),
                changed = node.changed() => match changed {
                    Ok(()) => {
                        let info = node.borrow_and_update().clone();
                        Some((Ok(info), Some(node)))
                    }
                    Err(_) => Some((Err(stopping()), None)),
                },
            }
        }
    })
}

/// The state of a pod watch.
enum WatchState {
    Start,
    Seen {
        generation: i64,
        changed: Receiver<i64>,
    },
    End,
}

/// The `WatchPods` stream.
pub(super) fn pods(
    site: Arc<Site>,
    stop: CancellationToken,
) -> impl Stream<Item = Result<pb::PodEvent, Status>> + Send {
    let batches = stream::unfold(WatchState::Start, move |state| {
        let (site, stop) = (Arc::clone(&site), stop.clone());
        async move { batch(&site, &stop, state).await }
    });
    batches.flat_map(stream::iter)
}

type Batch = Vec<Result<pb::PodEvent, Status>>;

async fn batch(
    site: &Site,
    stop: &CancellationToken,
    state: WatchState,
) -> Option<(Batch, WatchState)> {
    let event = |event| Ok(pb::PodEvent { event: Some(event) });
    match state {
        WatchState::Start => {
            // Subscribe before the snapshot, so that a change in between is sent as an update.
            let changed = site.board.subscribe();
            let (pods, synced) = site.board.snapshot();
            let generation = synced.generation;
            let items = pods
                .into_iter()
                .map(|pod| event(Event::Item((*pod).clone())));
            let batch = items.chain([event(Event::Synced(synced))]).collect();
            Some((
                batch,
                WatchState::Seen {
                    generation,
                    changed,
                },
            ))
        }
        WatchState::Seen {
            generation,
            mut changed,
        } => {
            let news = tokio::select! {
                biased;
                () = stop.cancelled() => None,
                news = changed.wait_for(|newest| *newest > generation) => news.ok().map(|n| *n),
            };
            if news.is_none() {
                return Some((vec![Err(stopping())], WatchState::End));
            }
            match site.board.since(generation) {
                Ok((events, generation)) => {
                    let batch = events.into_iter().map(event).collect();
                    Some((
                        batch,
                        WatchState::Seen {
                            generation,
                            changed,
                        },
                    ))
                }
                Err(behind) => {
                    let status = ErrorReason::Overloaded.status(behind.to_string());
                    Some((vec![Err(status)], WatchState::End))
                }
            }
        }
        WatchState::End => None,
    }
}
