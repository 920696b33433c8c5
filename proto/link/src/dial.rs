//! The side that dials: a lazy channel that connects at the first request and reconnects after each disconnection.
use std::{future::Future, pin::Pin, time::Duration};

use hyper_util::rt::TokioIo;
use tokio::{task::JoinSet, time::Instant};
use tonic::transport::{Channel, Uri};

use super::{Carrier, Connection, Credentials, ExpectPeer, LinkError, Route, endpoint};

/// A channel to the peer at one of the addresses of `route`. It connects at the first request, and again at the next one
/// after a disconnection. If the peer cannot be reached, requests fail with `Unavailable` and the cause in the source chain.
/// Credentials are required over TCP and rejected over a unix socket, where the peer is identified by its uid. Over a
/// command they decide whether TLS is spoken.
pub fn dial(
    route: impl Into<Route>,
    credentials: Option<Credentials>,
    expect: ExpectPeer,
) -> Result<Channel, LinkError> {
    let route = route.into();
    for carrier in route.carriers() {
        let carrier = || carrier.clone();
        match (carrier(), &credentials) {
            (Carrier::Tcp(_) | Carrier::HttpConnect { .. }, None) => {
                return Err(LinkError::NoCredentials { carrier: carrier() });
            }
            (Carrier::Unix(_), Some(_)) => {
                return Err(LinkError::NeedlessCredentials { carrier: carrier() });
            }
            (Carrier::Tcp(_) | Carrier::HttpConnect { .. }, Some(_))
            | (Carrier::Unix(_), None)
            | (Carrier::Exec(_) | Carrier::Ssh(_), _) => {}
        }
    }
    Ok(channel(move || {
        let (route, credentials, expect) = (route.clone(), credentials.clone(), expect.clone());
        async move { route.connect(credentials.as_ref(), &expect).await }
    }))
}

/// How long the result of an attempt that no request waits for counts. The other side waits longer than that for HTTP/2.
const STALE: Duration = Duration::from_secs(5);

/// A lazy channel whose connections `open` opens.
///
/// The channel polls an attempt only while a request waits for it. So that an attempt whose requests were all cancelled
/// does not stop halfway, with a turn or a place in a queue that another channel needs, each runs in a task of its own,
/// which ends with the channel.
pub(super) fn channel<F>(open: impl Fn() -> F + Clone + Send + 'static) -> Channel
where
    F: Future<Output = Result<Connection, LinkError>> + Send + 'static,
{
    let connector = tower::service_fn(move |_: Uri| {
        let open = open.clone();
        let connecting: Pin<Box<dyn Future<Output = _> + Send>> =
            Box::pin(async move { attempts(open).await.map(TokioIo::new) });
        connecting
    });
    endpoint().connect_with_connector_lazy(connector)
}

/// The result of an attempt that ends while somebody waits for it.
async fn attempts<F>(open: impl Fn() -> F) -> Result<Connection, LinkError>
where
    F: Future<Output = Result<Connection, LinkError>> + Send + 'static,
{
    loop {
        let opening = open();
        let mut attempt = JoinSet::new();
        attempt.spawn(async move { (opening.await, Instant::now()) });
        match attempt.join_next().await.and_then(Result::ok) {
            Some((opened, ended)) if ended.elapsed() < STALE => return opened,
            Some(_) => {}
            None => return Err(LinkError::Ended),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicUsize, Ordering};

    use super::*;

    /// An attempt takes a second, and fails with its number. The first request is cancelled at once, and the next one comes
    /// after this time.
    async fn asked_again_after(pause: Duration) -> String {
        let begun = AtomicUsize::new(0);
        let mut asked = std::pin::pin!(attempts(move || {
            let number = begun.fetch_add(1, Ordering::Relaxed);
            async move {
                tokio::time::sleep(Duration::from_secs(1)).await;
                let error = format!("attempt {number}");
                Err(LinkError::TooEarly { error })
            }
        }));
        let cancelled = tokio::time::timeout(Duration::ZERO, &mut asked).await;
        cancelled.unwrap_err();
        tokio::time::sleep(pause).await;
        asked.await.unwrap_err().to_string()
    }

    #[tokio::test(start_paused = true)]
    async fn an_attempt_goes_on_without_its_request_and_an_old_result_does_not_count() {
        let begun = Instant::now();
        assert_eq!(asked_again_after(Duration::from_secs(2)).await, "attempt 0");
        assert!(begun.elapsed() < Duration::from_secs(3));
        assert_eq!(asked_again_after(STALE * 2).await, "attempt 1");
    }
}
