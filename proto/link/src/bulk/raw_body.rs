//! Passes the bodies of requests and responses around tonic, as extensions of its own requests and responses.
use std::{
    future::Future,
    pin::Pin,
    sync::{Arc, Mutex, PoisonError},
    task::{Context, Poll},
};

use futures::{Stream, stream::Empty};
use prost::Message;
use tonic::{Request, Response, Status, Streaming, body::Body, server::NamedService};
use tower::Service;

use super::{
    cancel, has_raw_request, has_raw_response,
    messages::{Messages, Side, encode_request},
};

/// A body that can be taken once. It is shared because extensions must implement `Clone`.
#[derive(Clone)]
struct RawBody(Arc<Mutex<Option<Body>>>);

impl RawBody {
    fn new(body: Body) -> Self {
        Self(Arc::new(Mutex::new(Some(body))))
    }

    fn take(&self) -> Option<Body> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).take()
    }
}

/// The stream of a response as tonic sees it: it never has a message.
pub type NoMessages<T> = Empty<Result<T, Status>>;

type Answering<E> = Pin<Box<dyn Future<Output = Result<http::Response<Body>, E>> + Send>>;

/// Wraps a generated server, so that streams of bytes reach its handlers and leave them as raw bodies.
#[derive(Clone, Debug)]
pub struct RawServer<S>(S);

impl<S> RawServer<S> {
    /// Wraps `server`.
    pub fn new(server: S) -> Self {
        Self(server)
    }
}

impl<S: NamedService> NamedService for RawServer<S> {
    const NAME: &'static str = S::NAME;
}

impl<S> Service<http::Request<Body>> for RawServer<S>
where
    S: Service<http::Request<Body>, Response = http::Response<Body>>,
    S::Future: Send + 'static,
{
    type Response = http::Response<Body>;
    type Error = S::Error;
    type Future = Answering<S::Error>;

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), S::Error>> {
        self.0.poll_ready(cx)
    }

    fn call(&mut self, mut request: http::Request<Body>) -> Self::Future {
        if has_raw_request(request.uri().path()) {
            let body = std::mem::take(request.body_mut());
            request.extensions_mut().insert(RawBody::new(body));
        }
        let answering = self.0.call(request);
        Box::pin(async move {
            let mut response = answering.await?;
            let raw = response.extensions_mut().remove::<RawBody>();
            if let Some(body) = raw.and_then(|raw| raw.take()) {
                *response.body_mut() = body;
            }
            Ok(response)
        })
    }
}

/// Wraps the channel of a generated client, so that streams of bytes are sent and received as raw bodies. Dropping a
/// response cancels its call, if the channel's executor is [`super::CancellableExecutor`].
#[derive(Clone, Debug)]
pub struct RawClient<S>(S);

impl<S> RawClient<S> {
    /// Wraps `channel`.
    pub fn new(channel: S) -> Self {
        Self(channel)
    }
}

impl<S> Service<http::Request<Body>> for RawClient<S>
where
    S: Service<http::Request<Body>, Response = http::Response<Body>>,
    S::Future: Send + 'static,
{
    type Response = http::Response<Body>;
    type Error = S::Error;
    type Future = Answering<S::Error>;

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), S::Error>> {
        self.0.poll_ready(cx)
    }

    fn call(&mut self, mut request: http::Request<Body>) -> Self::Future {
        let raw = request.extensions_mut().remove::<RawBody>();
        if let Some(body) = raw.and_then(|raw| raw.take()) {
            *request.body_mut() = body;
        }
        if !has_raw_response(request.uri().path()) {
            return Box::pin(self.0.call(request));
        }
        let (body, cancel_on_drop) = cancel::cancellable(std::mem::take(request.body_mut()));
        *request.body_mut() = body;
        let answering = self.0.call(request);
        Box::pin(async move {
            let mut response = answering.await?;
            // A status in the headers is the whole response ("Trailers-Only").
            if !response.headers().contains_key(Status::GRPC_STATUS) {
                let body = cancel_on_drop.with(std::mem::take(response.body_mut()));
                response.extensions_mut().insert(RawBody::new(body));
            }
            Ok(response)
        })
    }
}

/// The messages that a handler behind [`RawServer`] receives. Fails if the server is not wrapped, or the method is not
/// a stream of bytes.
pub fn input<T: Message + Default>(request: Request<Streaming<T>>) -> Result<Messages<T>, Status> {
    let (_, extensions, _) = request.into_parts();
    let body = extensions.get::<RawBody>().and_then(RawBody::take);
    let body = body.ok_or_else(|| Status::internal("the server is not wrapped in `RawServer`"))?;
    Ok(Messages::new(body, Side::Server))
}

/// The response of a handler, with a body from [`super::encode`] or one that is passed on.
#[must_use]
pub fn answer<T>(body: Body) -> Response<NoMessages<T>> {
    let mut response = Response::new(futures::stream::empty());
    response.extensions_mut().insert(RawBody::new(body));
    response
}

/// The request of a caller behind [`RawClient`], with these messages.
pub fn request<S>(messages: S) -> Request<Empty<S::Item>>
where
    S: Stream<Item: Message> + Send + 'static,
{
    request_body(encode_request(messages))
}

/// The request of a caller behind [`RawClient`], with a body that is passed on.
#[must_use]
pub fn request_body<T>(body: Body) -> Request<Empty<T>> {
    let mut request = Request::new(futures::stream::empty());
    request.extensions_mut().insert(RawBody::new(body));
    request
}

/// The messages of a response.
#[must_use]
pub fn output<T: Message + Default>(response: &Response<Streaming<T>>) -> Messages<T> {
    match output_body(response) {
        Some(body) => Messages::new(body, Side::Client),
        None => Messages::none(),
    }
}

/// The body of a response, to be passed on; `None` if the response was a success without messages.
#[must_use]
pub fn output_body<T>(response: &Response<Streaming<T>>) -> Option<Body> {
    response
        .extensions()
        .get::<RawBody>()
        .and_then(RawBody::take)
}
