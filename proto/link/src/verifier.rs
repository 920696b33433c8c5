//! The base of all certificate verifiers. A verifier implements [`CheckCertificate`], which says what a peer's
//! certificate must satisfy, and [`Tls13Verifier`] does the rest of the handshake for both TLS roles.
//!
//! Only TLS 1.3 is supported, with ring as the cryptography provider. It is passed explicitly everywhere: no
//! process-wide default is installed.
use std::{
    fmt,
    sync::{Arc, OnceLock},
};

use rustls::{
    DigitallySignedStruct, DistinguishedName, SignatureScheme,
    client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier},
    crypto::{CryptoProvider, verify_tls13_signature},
    server::danger::{ClientCertVerified, ClientCertVerifier},
};
use rustls_pki_types::{CertificateDer, ServerName, UnixTime};

/// The cryptography provider (ring) of every TLS connection of KNoC.
pub fn provider() -> Arc<CryptoProvider> {
    static PROVIDER: OnceLock<Arc<CryptoProvider>> = OnceLock::new();
    Arc::clone(PROVIDER.get_or_init(|| Arc::new(rustls::crypto::ring::default_provider())))
}

/// What a peer's certificate must satisfy. [`Tls13Verifier`] always checks in addition that the peer holds the
/// certificate's key.
pub trait CheckCertificate: fmt::Debug + Send + Sync {
    /// Accepts the certificate or returns the reason for its rejection. `intermediates` are the other certificates that
    /// the peer sent.
    fn check(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        now: UnixTime,
    ) -> Result<(), rustls::Error>;

    /// The authorities that a server names when it requests a client certificate.
    fn root_hints(&self) -> &[DistinguishedName] {
        &[]
    }

    /// Whether the server rejects clients without a certificate.
    fn mandatory(&self) -> bool {
        true
    }
}

/// Verifies the peer of a TLS 1.3 handshake in either role by the check `C`. The server's name is ignored: it does not
/// say who answers there.
#[derive(Debug)]
pub struct Tls13Verifier<C>(pub C);

/// The methods about signatures, which are the same for both roles: they check that the peer holds the key of its certificate.
macro_rules! signatures {
    () => {
        fn verify_tls12_signature(
            &self,
            _message: &[u8],
            _cert: &CertificateDer<'_>,
            _dss: &DigitallySignedStruct,
        ) -> Result<HandshakeSignatureValid, rustls::Error> {
            // It is never negotiated.
            let message = "TLS 1.2 is not supported".to_owned();
            Err(rustls::Error::General(message))
        }

        fn verify_tls13_signature(
            &self,
            message: &[u8],
            cert: &CertificateDer<'_>,
            dss: &DigitallySignedStruct,
        ) -> Result<HandshakeSignatureValid, rustls::Error> {
            let algorithms = &provider().signature_verification_algorithms;
            verify_tls13_signature(message, cert, dss, algorithms)
        }

        fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
            provider()
                .signature_verification_algorithms
                .supported_schemes()
        }
    };
}

impl<C: CheckCertificate> ServerCertVerifier for Tls13Verifier<C> {
    fn verify_server_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        _server_name: &ServerName<'_>,
        _ocsp_response: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        self.0.check(end_entity, intermediates, now)?;
        Ok(ServerCertVerified::assertion())
    }

    signatures!();
}

impl<C: CheckCertificate> ClientCertVerifier for Tls13Verifier<C> {
    fn client_auth_mandatory(&self) -> bool {
        self.0.mandatory()
    }

    fn root_hint_subjects(&self) -> &[DistinguishedName] {
        self.0.root_hints()
    }

    fn verify_client_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        now: UnixTime,
    ) -> Result<ClientCertVerified, rustls::Error> {
        self.0.check(end_entity, intermediates, now)?;
        Ok(ClientCertVerified::assertion())
    }

    signatures!();
}
