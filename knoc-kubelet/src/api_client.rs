//! A client of the API server whose connections are opened without a pause.
//!
//! kube's own client leaves Nagle's algorithm on. rustls sends the end of a handshake in several small writes, the API server
//! answers none but the last one, and so each new connection waits 40 ms for the acknowledgement that its kernel delays. In a
//! burst of pods the kubelet opens many. Apart from that the client is kube's: the same layers in the same order, without the one
//! that logs each request.

use hyper_timeout::TimeoutConnector;
use hyper_util::{
    client::legacy::{self, connect::HttpConnector},
    rt::TokioExecutor,
};
use kube::{
    Client,
    client::{ConfigExt as _, retry::RetryPolicy},
    config::Config,
};
use tower::{BoxError, ServiceBuilder, retry::RetryLayer};

/// A client of the API server that `config` names. It connects when the first request is made.
///
/// # Errors
///
/// If a certificate or key of the configuration cannot be used, or if it names a proxy.
pub fn connect(config: Config) -> kube::Result<Client> {
    if config.proxy_url.is_some() {
        // We have none of kube's proxies, and its error says so.
        return Client::try_from(config);
    }
    let mut connector = TimeoutConnector::new(config.rustls_https_connector_with_connector(tcp())?);
    connector.set_connect_timeout(config.connect_timeout);
    connector.set_read_timeout(config.read_timeout);
    connector.set_write_timeout(config.write_timeout);
    connector.set_reset_reader_on_write(config.reset_reader_on_write);
    let retries = config.default_retry.then(RetryPolicy::server_retry);
    let service = ServiceBuilder::new()
        .layer(config.base_uri_layer())
        .option_layer(retries.map(RetryLayer::new))
        .option_layer(config.auth_layer()?)
        .layer(config.extra_headers_layer()?)
        .map_err(BoxError::from)
        .service(legacy::Builder::new(TokioExecutor::new()).build(connector));
    Ok(Client::new(service, config.default_namespace))
}

fn tcp() -> HttpConnector {
    let mut tcp = HttpConnector::new();
    tcp.enforce_http(false);
    tcp.set_nodelay(true);
    tcp
}

#[cfg(test)]
mod tests {
    use tower::ServiceExt as _;

    use super::*;

    #[tokio::test]
    async fn a_connection_sends_small_writes_at_once() {
        let server = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let there = format!("http://{}", server.local_addr().unwrap());
        let stream = tcp().oneshot(there.parse().unwrap()).await.unwrap();
        assert!(stream.inner().nodelay().unwrap());
    }
}
