//! One call of the gRPC health service (`grpc.health.v1`) of the pod.

use std::{
    future::{Ready, ready},
    io,
    sync::{Mutex, PoisonError},
};

use hyper_util::rt::TokioIo;
use knoc_proto::{error::chain, pb};
use tokio::io::{AsyncRead, AsyncWrite};
use tonic::{
    Code,
    transport::{Channel, Endpoint, Uri},
};
use tonic_health::pb::{
    HealthCheckRequest, health_check_response::ServingStatus, health_client::HealthClient,
};

use super::{LOCALHOST, http::PROBE_AGENT, known::Known, tls};
use crate::health::Outcome;

/// The response is one small number.
const MAX_RESPONSE: usize = 64 << 10;

/// Calls the service, and judges the response as Kubernetes does. The caller limits the time.
pub(super) async fn check(action: &pb::GrpcAction, known: &Known) -> Outcome {
    let Some(port) = u16::try_from(action.port).ok().filter(|port| *port > 0) else {
        return Outcome::Errored(format!("{} is not a port", action.port));
    };
    let address = format!("{LOCALHOST}:{port}");
    let channel = match channel(&address, port, action.tls, known).await {
        Ok(channel) => channel,
        Err(error) => {
            let text = format!("error: failed to connect service at {address:?}: {error}");
            return Outcome::Failed(text);
        }
    };
    call(channel, &action.service).await
}

async fn call(channel: Channel, service: &str) -> Outcome {
    let mut client = HealthClient::new(channel).max_decoding_message_size(MAX_RESPONSE);
    let request = HealthCheckRequest {
        service: service.to_owned(),
    };
    match client.check(request).await {
        Ok(response) => match response.into_inner().status() {
            ServingStatus::Serving => Outcome::Passed,
            other @ (ServingStatus::Unknown
            | ServingStatus::NotServing
            | ServingStatus::ServiceUnknown) => {
                let status = other.as_str_name();
                Outcome::Failed(format!("service unhealthy (responded with {status:?})"))
            }
        },
        Err(status) if status.code() == Code::Unimplemented => Outcome::Failed(format!(
            "error: this server does not implement the grpc health protocol (grpc.health.v1.Health): {}",
            status.message()
        )),
        Err(status) => Outcome::Failed(format!(
            "error: health rpc probe failed: {}: {}",
            status.code(),
            status.message()
        )),
    }
}

async fn channel(address: &str, port: u16, tls: bool, known: &Known) -> Result<Channel, String> {
    let stream = known.connect(port).await?;
    if tls {
        over(address, tls::connect(stream, &[b"h2"]).await?).await
    } else {
        over(address, stream).await
    }
}

/// A channel over this one connection, which ends with the channel.
async fn over<S>(address: &str, stream: S) -> Result<Channel, String>
where
    S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
{
    let stream = Mutex::new(Some(stream));
    let connector = tower::service_fn(move |_: Uri| {
        let stream = stream.lock().unwrap_or_else(PoisonError::into_inner).take();
        let connected: Ready<io::Result<TokioIo<S>>> = ready(
            stream
                .map(TokioIo::new)
                .ok_or_else(|| io::ErrorKind::ConnectionAborted.into()),
        );
        connected
    });
    let endpoint = Endpoint::from_shared(format!("http://{address}"))
        .and_then(|endpoint| endpoint.user_agent(PROBE_AGENT))
        .map_err(|error| chain(&error))?;
    let connecting = endpoint.connect_with_connector(connector);
    connecting.await.map_err(|error| chain(&error))
}

#[cfg(test)]
mod tests {
    use tokio::{
        net::{TcpListener, TcpStream},
        task::JoinSet,
    };
    use tokio_stream::wrappers::TcpListenerStream;
    use tonic_health::{ServingStatus as Set, server::health_reporter};

    use super::*;

    async fn ask(address: std::net::SocketAddr, service: &str) -> Outcome {
        let stream = TcpStream::connect(address).await.unwrap();
        let channel = over(&address.to_string(), stream).await.unwrap();
        call(channel, service).await
    }

    #[tokio::test]
    async fn the_answer_of_the_health_service_decides() {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let (reporter, service) = health_reporter();
        reporter.set_service_status("db", Set::NotServing).await;
        let server = tonic::transport::Server::builder().add_service(service);
        let mut tasks = JoinSet::new();
        tasks.spawn(server.serve_with_incoming(TcpListenerStream::new(listener)));
        assert_eq!(ask(address, "").await, Outcome::Passed);
        let unhealthy = "service unhealthy (responded with \"NOT_SERVING\")";
        assert_eq!(
            ask(address, "db").await,
            Outcome::Failed(unhealthy.to_owned())
        );
        let Outcome::Failed(unknown) = ask(address, "other").await else {
            panic!("an unknown service passes");
        };
        assert!(
            unknown.starts_with("error: health rpc probe failed"),
            "{unknown}"
        );
    }

    #[tokio::test]
    async fn a_server_without_the_health_service_fails() {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let server =
            tonic::transport::Server::builder().add_routes(tonic::service::Routes::default());
        let mut tasks = JoinSet::new();
        tasks.spawn(server.serve_with_incoming(TcpListenerStream::new(listener)));
        let Outcome::Failed(why) = ask(address, "").await else {
            panic!("it passes");
        };
        assert!(
            why.contains("does not implement the grpc health protocol"),
            "{why}"
        );
    }
}
