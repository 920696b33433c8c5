//! Bodies beside tonic: as extensions of the messages that it knows.
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
    bytes_come, bytes_go, cut,
    messages::{Messages, Side, encode_request},
};

/// A body that is taken once. Extensions have to be clonable.
#[derive(Clone)]
struct Beside(Arc<Mutex<Option<Body>>>);

impl Beside {
    fn new(body: Body) -> Self {
        Self(Arc::new(Mutex::new(Some(body))))
    }

    fn take(&self) -> Option<Body> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).take()
    }
}

/// A server's answer to one of these methods, for tonic: there is nothing in it to encode.
pub type Nothing<T> = Empty<Result<T, Status>>;

type Answering<E> = Pin<Box<dyn Future<Output = Result<http::Response<Body>, E>> + Send>>;

/// A generated server whose streams of bytes go beside it.
#[derive(Clone, Debug)]
pub struct Served<S>(S);

impl<S> Served<S> {
    /// Around `server`.
    pub fn new(server: S) -> Self {
        Self(server)
    }
}

impl<S: NamedService> NamedService for Served<S> {
    const NAME: &'static str = S::NAME;
}

impl<S> Service<http::Request<Body>> for Served<S>
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
        if bytes_come(request.uri().path()) {
            let body = std::mem::take(request.body_mut());
            request.extensions_mut().insert(Beside::new(body));
        }
        let answering = self.0.call(request);
        Box::pin(async move {
            let mut response = answering.await?;
            let beside = response.extensions_mut().remove::<Beside>();
            if let Some(body) = beside.and_then(|beside| beside.take()) {
                *response.body_mut() = body;
            }
            Ok(response)
        })
    }
}

/// A channel whose streams of bytes go beside the generated client. Who drops an answer lets go of the call, where the
/// channel's executor is [`super::Cutting`].
#[derive(Clone, Debug)]
pub struct Called<S>(S);

impl<S> Called<S> {
    /// Around `channel`.
    pub fn new(channel: S) -> Self {
        Self(channel)
    }
}

impl<S> Service<http::Request<Body>> for Called<S>
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
        let beside = request.extensions_mut().remove::<Beside>();
        if let Some(body) = beside.and_then(|beside| beside.take()) {
            *request.body_mut() = body;
        }
        if !bytes_go(request.uri().path()) {
            return Box::pin(self.0.call(request));
        }
        let (body, holder) = cut::cuttable(std::mem::take(request.body_mut()));
        *request.body_mut() = body;
        let answering = self.0.call(request);
        Box::pin(async move {
            let mut response = answering.await?;
            // A status at the head is the whole answer.
            if !response.headers().contains_key(Status::GRPC_STATUS) {
                let body = holder.with(std::mem::take(response.body_mut()));
                response.extensions_mut().insert(Beside::new(body));
            }
            Ok(response)
        })
    }
}

/// What a handler of [`Served`] is sent. Fails where the method is none of ours.
pub fn input<T: Message + Default>(request: Request<Streaming<T>>) -> Result<Messages<T>, Status> {
    let (_, extensions, _) = request.into_parts();
    let body = extensions.get::<Beside>().and_then(Beside::take);
    let body = body.ok_or_else(|| Status::internal("the server is not `Served`"))?;
    Ok(Messages::new(body, Side::Server))
}

/// A handler's answer: the body that [`super::encode`] made, or another one's.
#[must_use]
pub fn answer<T>(body: Body) -> Response<Nothing<T>> {
    let mut response = Response::new(futures::stream::empty());
    response.extensions_mut().insert(Beside::new(body));
    response
}

/// A caller's request through [`Called`]: messages of its own, or a body that it passes on.
pub fn request<S>(messages: S) -> Request<Empty<S::Item>>
where
    S: Stream<Item: Message> + Send + 'static,
{
    request_body(encode_request(messages))
}

/// The same of a body that is passed on.
#[must_use]
pub fn request_body<T>(body: Body) -> Request<Empty<T>> {
    let mut request = Request::new(futures::stream::empty());
    request.extensions_mut().insert(Beside::new(body));
    request
}

/// What a caller is answered, message by message.
#[must_use]
pub fn output<T: Message + Default>(response: &Response<Streaming<T>>) -> Messages<T> {
    match output_body(response) {
        Some(body) => Messages::new(body, Side::Client),
        None => Messages::none(),
    }
}

/// The same to be passed on; none where the answer was a success at its head.
#[must_use]
pub fn output_body<T>(response: &Response<Streaming<T>>) -> Option<Body> {
    response.extensions().get::<Beside>().and_then(Beside::take)
}
