//! What each side demands of the other's certificate.

use std::{path::PathBuf, sync::Arc, time::Duration};

use rustls::{
    CertificateError, DigitallySignedStruct, DistinguishedName, Error, OtherError, RootCertStore,
    SignatureScheme,
    client::{
        danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier},
        verify_server_cert_signed_by_trust_anchor,
    },
    crypto::{
        CryptoProvider, WebPkiSupportedAlgorithms, verify_tls12_signature, verify_tls13_signature,
    },
    server::{
        ParsedCertificate, WebPkiClientVerifier,
        danger::{ClientCertVerified, ClientCertVerifier},
    },
};
use rustls_pki_types::{CertificateDer, ServerName, UnixTime};

use super::{Identity, IdentityError, PeerIdentity, TlsError, TrustRoots, provider};
use crate::{Role, Timestamp};

/// What is wrong with a peer's certificate beyond what rustls can say itself. Travels inside a [`rustls::OtherError`].
#[derive(Debug, thiserror::Error)]
pub(super) enum PeerProblem {
    #[error("the server's certificate is not signed by the CA in {}", ca.display())]
    ServerOfAnotherCa { ca: PathBuf },
    #[error("the server's certificate is for {found}, and the federation here is `{wanted}`")]
    ServerOfAnotherFederation { found: String, wanted: String },
    #[error("the peer's certificate is for {found}, which is no server")]
    NoServer { found: String },
    #[error("the server's certificate cannot be used: {0}")]
    ServerIdentity(IdentityError),
    #[error("the client's certificate cannot be used: {0}")]
    ClientIdentity(IdentityError),
}

impl From<PeerProblem> for Error {
    fn from(problem: PeerProblem) -> Self {
        Self::InvalidCertificate(CertificateError::Other(OtherError(Arc::new(problem))))
    }
}

/// True for a chain that does not end in one of our roots. A CA of the same name with another key shows as a bad signature.
pub(super) fn is_foreign(error: &Error) -> bool {
    matches!(
        error,
        Error::InvalidCertificate(CertificateError::UnknownIssuer | CertificateError::BadSignature)
    )
}

/// What a peer of ours does with our certificate, without a handshake.
pub(super) fn check_own(
    identity: &Identity,
    roots: &TrustRoots,
    now: Timestamp,
) -> Result<(), Error> {
    let key = identity.certified_key();
    let (leaf, intermediates) = key
        .cert
        .split_first()
        .expect("an identity is not made without a certificate");
    let seconds = u64::try_from(now.as_millis() / 1000).unwrap_or(0);
    let now = UnixTime::since_unix_epoch(Duration::from_secs(seconds));
    let provider = provider();
    if identity.id().role == Role::Server {
        let algorithms = provider.signature_verification_algorithms.all;
        let leaf = ParsedCertificate::try_from(leaf)?;
        let roots = roots.store();
        verify_server_cert_signed_by_trust_anchor(&leaf, &roots, intermediates, now, algorithms)
    } else {
        client_chain(roots, &provider)?
            .verify_client_cert(leaf, intermediates, now)
            .map(|_| ())
    }
}

fn client_chain(
    roots: &TrustRoots,
    provider: &Arc<CryptoProvider>,
) -> Result<Arc<dyn ClientCertVerifier>, Error> {
    WebPkiClientVerifier::builder_with_provider(roots.store(), Arc::clone(provider))
        .build()
        .map_err(|error| Error::General(error.to_string()))
}

/// The server's demands: chain, time, purpose (by webpki), then the federation.
#[derive(Debug)]
pub(super) struct ClientVerifier {
    chain: Arc<dyn ClientCertVerifier>,
    federation: String,
}

impl ClientVerifier {
    pub(super) fn new(
        roots: &TrustRoots,
        federation: &str,
        provider: &Arc<CryptoProvider>,
    ) -> Result<Self, TlsError> {
        let chain = client_chain(roots, provider)?;
        Ok(Self {
            chain,
            federation: federation.to_owned(),
        })
    }
}

impl ClientCertVerifier for ClientVerifier {
    fn root_hint_subjects(&self) -> &[DistinguishedName] {
        self.chain.root_hint_subjects()
    }

    fn verify_client_cert(
        &self,
        leaf: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        now: UnixTime,
    ) -> Result<ClientCertVerified, Error> {
        let verified = self
            .chain
            .verify_client_cert(leaf, intermediates, now)
            .map_err(|error| match error {
                error if is_foreign(&error) => CertificateError::UnknownIssuer.into(),
                error => error,
            })?;
        let peer = PeerIdentity::from_der(leaf).map_err(PeerProblem::ClientIdentity)?;
        if peer.id.federation != self.federation {
            tracing::debug!(peer = %peer.id, "a certificate of another federation was presented");
            // Sent as `access_denied`, which no other check sends, so that the client can tell.
            return Err(CertificateError::ApplicationVerificationFailure.into());
        }
        Ok(verified)
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        self.chain
            .verify_tls12_signature(message, certificate, signature)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        self.chain
            .verify_tls13_signature(message, certificate, signature)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.chain.supported_verify_schemes()
    }
}

/// A client's demands: chain, time, purpose (by webpki), then federation and role in place of a host name.
#[derive(Debug)]
pub(super) struct ServerVerifier {
    roots: Arc<RootCertStore>,
    ca: PathBuf,
    federation: String,
    algorithms: WebPkiSupportedAlgorithms,
}

impl ServerVerifier {
    pub(super) fn new(roots: &TrustRoots, federation: &str, provider: &CryptoProvider) -> Self {
        Self {
            roots: roots.store(),
            ca: roots.file().to_owned(),
            federation: federation.to_owned(),
            algorithms: provider.signature_verification_algorithms,
        }
    }
}

impl ServerCertVerifier for ServerVerifier {
    fn verify_server_cert(
        &self,
        leaf: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        _host: &ServerName<'_>,
        _ocsp: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, Error> {
        verify_server_cert_signed_by_trust_anchor(
            &ParsedCertificate::try_from(leaf)?,
            &self.roots,
            intermediates,
            now,
            self.algorithms.all,
        )
        .map_err(|error| match error {
            error if is_foreign(&error) => PeerProblem::ServerOfAnotherCa {
                ca: self.ca.clone(),
            }
            .into(),
            error => error,
        })?;
        let peer = PeerIdentity::from_der(leaf).map_err(PeerProblem::ServerIdentity)?;
        let found = peer.id.to_string();
        if peer.id.federation != self.federation {
            let wanted = self.federation.clone();
            return Err(PeerProblem::ServerOfAnotherFederation { found, wanted }.into());
        }
        if peer.id.role != Role::Server {
            return Err(PeerProblem::NoServer { found }.into());
        }
        Ok(ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        verify_tls12_signature(message, certificate, signature, &self.algorithms)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        verify_tls13_signature(message, certificate, signature, &self.algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.algorithms.supported_schemes()
    }
}
