//! Dropping a response cancels its whole call, even while the request waits for the peer's flow control.
//!
//! hyper sends the body of a request in a task of its own, and HTTP/2 resets a stream when its last handle is dropped.
//! While the peer's flow-control window is full, that task waits for nothing but the window: it holds the stream, and
//! the peer keeps a command running that nobody uses until the command reads its input. Therefore
//! [`CancellableExecutor`] spawns these tasks, and the task of a request ends when the response to that request is
//! dropped.
//!
//! ```text
//!  request ─► RequestBody ──polled in──► CancellableTask of CancellableExecutor ──┐
//!                Call ◄──── learns the task's AbortFlag ◄─────────────────────────┘
//!  response ◄─ CancelOnDrop ──dropped──► Call::Cancelled ─► AbortFlag ─► the task ends, and with it the stream
//! ```
//!
//! A request is first polled in the connection's own task, which must not be aborted. The body is not ready then, and
//! that task is never recorded as the request's own.
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
    /// The flag of the task that is being polled.
    static TASK: Arc<AbortFlag>;
}

/// Ends a task when it is set by another task.
#[derive(Debug, Default)]
struct AbortFlag {
    set: AtomicBool,
    waker: AtomicWaker,
}

impl AbortFlag {
    fn set(&self) {
        self.set.store(true, Ordering::Release);
        self.waker.wake();
    }
}

/// The executor of a channel whose calls can be cancelled. It runs hyper's tasks, each of which ends with its call or
/// with the connection.
#[derive(Debug, Clone, Copy, Default)]
pub struct CancellableExecutor;

impl<F> Executor<F> for CancellableExecutor
where
    F: Future<Output = ()> + Send + Unpin + 'static,
{
    fn execute(&self, future: F) {
        let abort = Arc::default();
        TokioExecutor::new().execute(CancellableTask { future, abort });
    }
}

struct CancellableTask<F> {
    future: F,
    abort: Arc<AbortFlag>,
}

impl<F: Future<Output = ()> + Unpin> Future for CancellableTask<F> {
    type Output = ();

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<()> {
        let Self { future, abort } = &mut *self;
        abort.waker.register(cx.waker());
        if abort.set.load(Ordering::Acquire) {
            return Poll::Ready(());
        }
        TASK.sync_scope(Arc::clone(abort), || Pin::new(future).poll(cx))
    }
}

/// The state of a call, shared by its request and its response.
#[derive(Debug, Default)]
enum Call {
    #[default]
    Begun,
    /// The task with this flag sends the request.
    SentBy(Arc<AbortFlag>),
    Cancelled,
}

#[derive(Debug, Clone, Default)]
struct SharedCall(Arc<Mutex<Call>>);

impl SharedCall {
    fn replace(&self, call: impl FnOnce(&Call) -> Call) -> Call {
        let mut held = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let next = call(&held);
        std::mem::replace(&mut held, next)
    }

    fn sent_by(&self, task: &Arc<AbortFlag>) {
        let before = self.replace(|call| match call {
            Call::Begun | Call::SentBy(_) => Call::SentBy(Arc::clone(task)),
            Call::Cancelled => Call::Cancelled,
        });
        if matches!(before, Call::Cancelled) {
            task.set();
        }
    }

    fn cancel(&self) {
        if let Call::SentBy(task) = self.replace(|_| Call::Cancelled) {
            task.set();
        }
    }
}

/// Makes the body of a request cancellable, and returns it with the guard that cancels it.
pub(super) fn cancellable(body: Body) -> (Body, CancelOnDrop) {
    let call = SharedCall::default();
    let request = RequestBody {
        body,
        call: call.clone(),
        polled: Polled::Never,
    };
    (Body::new(request), CancelOnDrop(call))
}

/// Cancels a call when it is dropped.
pub(super) struct CancelOnDrop(SharedCall);

impl Drop for CancelOnDrop {
    fn drop(&mut self) {
        self.0.cancel();
    }
}

impl CancelOnDrop {
    /// The body of a response that cancels its call when it is dropped.
    pub(super) fn with(self, body: Body) -> Body {
        Body::new(body.map_err(move |status| {
            let _held = &self;
            status
        }))
    }
}

/// Which task has polled a request.
enum Polled {
    Never,
    /// The connection's own task, if it is known.
    ByConnection(Option<Arc<AbortFlag>>),
    ByOwnTask,
}

struct RequestBody {
    body: Body,
    call: SharedCall,
    polled: Polled,
}

impl http_body::Body for RequestBody {
    type Data = Bytes;
    type Error = Status;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, Status>>> {
        let task = || TASK.try_with(Arc::clone).ok();
        match &self.polled {
            Polled::Never => {
                self.polled = Polled::ByConnection(task());
                cx.waker().wake_by_ref();
                return Poll::Pending;
            }
            Polled::ByConnection(first) => {
                let other =
                    |task: &Arc<AbortFlag>| !first.as_ref().is_some_and(|it| Arc::ptr_eq(it, task));
                if let Some(task) = task().filter(other) {
                    self.call.sent_by(&task);
                    self.polled = Polled::ByOwnTask;
                }
            }
            Polled::ByOwnTask => {}
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
