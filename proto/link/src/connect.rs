//! One connection to one address, with its peer checked.
use std::io;

use rustls_pki_types::ServerName;

use super::{
    CONNECT_TIMEOUT, Carrier, Connection, Credentials, ExpectPeer, LinkError, Peer,
    PeerCertificate,
    carrier::{
        Dial, Unverified,
        exec::{self, COMMAND_TIMEOUT, marker::Speaks},
        http_connect, ssh, tcp, unix,
    },
    tls::{self, ClaimedIdentity, readable_error},
};

/// One connection with a verified peer: what [`dial`](super::dial()) does at each attempt, for callers that report every
/// step. Cancel safe: dropping the future closes the connection, and ends the command if there is one.
pub async fn connect(
    carrier: &Carrier,
    credentials: Option<&Credentials>,
    expect: &ExpectPeer,
) -> Result<Connection, LinkError> {
    let speaks = match credentials {
        Some(_) => Speaks::Tls,
        None => Speaks::Plain,
    };
    let connecting = async {
        match (carrier, credentials) {
            (Carrier::Tcp(address), Some(credentials)) => {
                let dialler = tcp::Dialler { address };
                over_tls(&dialler, carrier, credentials, expect, None).await
            }
            (Carrier::HttpConnect { address, proxy }, Some(credentials)) => {
                let dialler = http_connect::Dialler { address, proxy };
                over_tls(&dialler, carrier, credentials, expect, None).await
            }
            (Carrier::Tcp(_) | Carrier::HttpConnect { .. }, None) => {
                Err(LinkError::NoCredentials {
                    carrier: carrier.clone(),
                })
            }
            (Carrier::Unix(path), _) => {
                let (stream, peer) = unix::connect(path).await?;
                Ok(Connection::new(stream, peer))
            }
            (Carrier::Exec(argv), _) => {
                let dialler = exec::Dialler {
                    argv,
                    carrier,
                    speaks,
                };
                over_command(&dialler, carrier, credentials, expect).await
            }
            (Carrier::Ssh(ssh), _) => {
                let dialler = ssh::Dialler {
                    ssh,
                    carrier,
                    speaks,
                };
                over_command(&dialler, carrier, credentials, expect).await
            }
        }
    };
    // A command has its own limit, whose error says what the command wrote meanwhile.
    let limit = if carrier.starts_a_process() {
        COMMAND_TIMEOUT + CONNECT_TIMEOUT
    } else {
        CONNECT_TIMEOUT
    };
    tokio::time::timeout(limit, connecting)
        .await
        .unwrap_or_else(|_| {
            Err(LinkError::Timeout {
                carrier: carrier.clone(),
            })
        })
}

/// A connection over a command: over TLS if we have a certificate. Without one the far socket has checked its peer's user,
/// and who is at the far side is what the command makes of it.
async fn over_command(
    dialler: &impl Dial,
    carrier: &Carrier,
    credentials: Option<&Credentials>,
    expect: &ExpectPeer,
) -> Result<Connection, LinkError> {
    match credentials {
        Some(credentials) => over_tls(dialler, carrier, credentials, expect, None).await,
        None => Ok(Connection::new(dialler.dial().await?.io, Peer::Command)),
    }
}

/// Opens a connection by `dialler`, and runs TLS over it with our certificate. `name` is sent in the handshake (SNI), for
/// a proxy that chooses the server by it.
pub(super) async fn over_tls(
    dialler: &impl Dial,
    carrier: &Carrier,
    credentials: &Credentials,
    expect: &ExpectPeer,
    name: Option<ServerName<'static>>,
) -> Result<Connection, LinkError> {
    let Unverified { io, origin } = dialler.dial().await?;
    let claimed = ClaimedIdentity::default();
    let failed = |source| LinkError::Handshake {
        peer: carrier.to_string(),
        claimed: claimed.text(),
        source: readable_error(source),
    };
    let material = credentials.material();
    let (roots, key) = (&material.roots, &material.key);
    let config = tls::client(roots, key, expect.clone(), claimed.clone())
        .map_err(|error| failed(io::Error::other(error)))?;
    let stream = match name {
        Some(name) => tls::connect_by_name(io, config, name).await,
        None => tls::connect(io, config).await,
    };
    let stream = stream.map_err(failed)?;
    let Some(identity) = claimed.identity() else {
        return Err(failed(io::Error::other("the peer presented no identity")));
    };
    let certificate = PeerCertificate::of(tls::peer_chain(&stream));
    let certificate = certificate.map_err(|error| failed(io::Error::other(error)))?;
    let peer = Peer::Tls {
        identity,
        origin,
        certificate,
    };
    Ok(Connection::new(stream, peer))
}
