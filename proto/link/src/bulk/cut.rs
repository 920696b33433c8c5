//! A caller that drops an answer lets go of the whole call, also where its request waits for room.
//!
//! hyper moves a request's body in a task of its own, and HTTP/2 resets a stream when the last handle of it is dropped.
//! While the peer gives no room, that task waits for room and for nothing else: it holds the stream, and the peer keeps a
//! command running for nobody, as long as that command does not take its input. So these tasks are spawned by [`Cutting`],
//! and one of them ends when the answer to its request is dropped.
//!
//! ```text
//!  Called: request ─► Upward ──polled in──► Task of Cutting ──┐
//!             Call ◄──── learns its Switch ◄──────────────────┘
//!          answer  ◄─ Holder ──dropped──► Call::cut ─► Switch ─► the Task ends, and with it the stream
//! ```
//!
//! A request is polled first in the connection's own task, which nobody must end: it is not ready then, and that task is
//! never taken for the request's own.
use std::{
    future::Future,
    pin::Pin,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    task::{Context, Poll},
};

use bytes::Bytes;
use futures::task::AtomicWaker;
use http_body::{Frame, SizeHint};
use http_body_util::BodyExt as _;
use hyper::rt::Executor;
use hyper_util::rt::TokioExecutor;
use tonic::{Status, body::Body};

tokio::task_local! {
    /// Of the task that is polled.
    static TASK: Arc<Switch>;
}

/// Ends a task from outside.
#[derive(Debug, Default)]
struct Switch {
    off: AtomicBool,
    waker: AtomicWaker,
}

impl Switch {
    fn turn_off(&self) {
        self.off.store(true, Ordering::Release);
        self.waker.wake();
    }
}

/// The executor of a channel whose calls can be let go of; their tasks are hyper's, and end with them.
#[derive(Debug, Clone, Copy, Default)]
pub struct Cutting;

impl<F> Executor<F> for Cutting
where
    F: Future<Output = ()> + Send + Unpin + 'static,
{
    fn execute(&self, future: F) {
        let switch = Arc::default();
        TokioExecutor::new().execute(Task { future, switch });
    }
}

struct Task<F> {
    future: F,
    switch: Arc<Switch>,
}

impl<F: Future<Output = ()> + Unpin> Future for Task<F> {
    type Output = ();

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<()> {
        let Self { future, switch } = &mut *self;
        switch.waker.register(cx.waker());
        if switch.off.load(Ordering::Acquire) {
            return Poll::Ready(());
        }
        TASK.sync_scope(Arc::clone(switch), || Pin::new(future).poll(cx))
    }
}

/// What both bodies of a call know.
#[derive(Debug, Default)]
enum Call {
    #[default]
    Begins,
    /// Its request is moved by this task.
    Moves(Arc<Switch>),
    Cut,
}

#[derive(Debug, Clone, Default)]
struct Shared(Arc<Mutex<Call>>);

impl Shared {
    fn replace(&self, call: impl FnOnce(&Call) -> Call) -> Call {
        let mut held = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let next = call(&held);
        std::mem::replace(&mut held, next)
    }

    fn moved_by(&self, task: &Arc<Switch>) {
        let before = self.replace(|call| match call {
            Call::Begins | Call::Moves(_) => Call::Moves(Arc::clone(task)),
            Call::Cut => Call::Cut,
        });
        if matches!(before, Call::Cut) {
            task.turn_off();
        }
    }

    fn cut(&self) {
        if let Call::Moves(task) = self.replace(|_| Call::Cut) {
            task.turn_off();
        }
    }
}

/// A request's body, and what lets go of it.
pub(super) fn cuttable(body: Body) -> (Body, Holder) {
    let call = Shared::default();
    let upward = Upward {
        body,
        call: call.clone(),
        seen: Seen::Never,
    };
    (Body::new(upward), Holder(call))
}

/// Lets go of a call when it is dropped.
pub(super) struct Holder(Shared);

impl Drop for Holder {
    fn drop(&mut self) {
        self.0.cut();
    }
}

impl Holder {
    /// An answer's body, with which the call is dropped.
    pub(super) fn with(self, body: Body) -> Body {
        Body::new(body.map_err(move |status| {
            let _held = &self;
            status
        }))
    }
}

/// By whom a request was polled.
enum Seen {
    Never,
    /// Then by this task, if it has a name: the connection's.
    Once(Option<Arc<Switch>>),
    ByItsTask,
}

struct Upward {
    body: Body,
    call: Shared,
    seen: Seen,
}

impl http_body::Body for Upward {
    type Data = Bytes;
    type Error = Status;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, Status>>> {
        let task = || TASK.try_with(Arc::clone).ok();
        match &self.seen {
            Seen::Never => {
                self.seen = Seen::Once(task());
                cx.waker().wake_by_ref();
                return Poll::Pending;
            }
            Seen::Once(first) => {
                let other =
                    |task: &Arc<Switch>| !first.as_ref().is_some_and(|it| Arc::ptr_eq(it, task));
                if let Some(task) = task().filter(other) {
                    self.call.moved_by(&task);
                    self.seen = Seen::ByItsTask;
                }
            }
            Seen::ByItsTask => {}
        }
        Pin::new(&mut self.body).poll_frame(cx)
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}
