//! TLS 1.3 with a certificate on both sides, and who the certificate speaks for.
//!
//! An [`Identity`] (certificate chain and key) and [`TrustRoots`] (the federation's CA) become a [`rustls::ServerConfig`] or
//! [`rustls::ClientConfig`]. The server hands its listener to an [`Acceptor`], which gives tonic authenticated streams; a
//! client opens a channel with [`connect_channel`]. Both sides take the configuration out of a `watch` channel at each
//! connection, so certificates change without a restart. There is no way to switch any of it off.
//!
//! Sessions are never resumed: a resumed session would skip the certificate checks, and so outlive the certificate.
//!
//! The crypto provider is ring, built here; no process-wide default is installed or read.

mod accept;
mod connect;
mod explain;
mod identity;
mod reload;
mod socket;
mod verify;

use std::{path::PathBuf, sync::Arc};

use rustls::{
    ClientConfig, ServerConfig,
    crypto::{CryptoProvider, ring},
    sign::SingleCertAndKey,
};

pub(crate) use self::identity::hex;
pub use self::{
    accept::{Accepted, Acceptor, AcceptorLimits, ConnectionInfo, HandshakeRefusal, TlsConnection},
    connect::{ChannelOptions, ConnectError, TlsSource, check_endpoint, connect_channel},
    explain::explain_tls_error,
    identity::{Identity, IdentityError, PeerIdentity, TlsFiles, TrustRoots},
    reload::TlsReload,
    socket::TlsSocket,
};
use crate::{
    code::{ErrorCode, Refusal},
    id::Role,
};

/// The application protocol that both sides ask for: gRPC runs over HTTP/2 only.
const ALPN: &[u8] = b"h2";

/// Why certificates, keys or a configuration made of them cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum TlsError {
    /// A file cannot be read.
    #[error("cannot read {path}: {source}")]
    Read {
        /// The file.
        path: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
    /// A key file that others than its owner can read.
    #[error(
        "the key file {path} can be read by others (mode {mode:04o}); make it private: chmod 600 {path}"
    )]
    KeyNotPrivate {
        /// The file.
        path: PathBuf,
        /// Its permission bits.
        mode: u32,
    },
    /// A file that should hold PEM certificates and does not.
    #[error("{path} holds no usable PEM certificate: {reason}")]
    BadCertificate {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        reason: String,
    },
    /// A file that should hold one PEM private key and does not.
    #[error("{path} holds no usable PEM private key: {reason}")]
    BadKey {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        reason: String,
    },
    /// The key is not the certificate's.
    #[error("the key in {key} does not belong to the certificate in {certificate}")]
    KeyMismatch {
        /// The certificate's file.
        certificate: PathBuf,
        /// The key's file.
        key: PathBuf,
    },
    /// The certificate does not say who it speaks for.
    #[error("the certificate in {path} cannot be used: {source}")]
    Identity {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        source: IdentityError,
    },
    /// The certificate speaks for somebody else than it is used for.
    #[error("the certificate in {path} is for {found}; {wanted}")]
    WrongIdentity {
        /// The file.
        path: PathBuf,
        /// Who it speaks for.
        found: crate::SpiffeId,
        /// What is needed instead.
        wanted: String,
    },
    /// The certificate would be refused by every peer.
    #[error("the certificate in {path} cannot be used: {reason}")]
    Unusable {
        /// The file.
        path: PathBuf,
        /// What is wrong with it, and what to do.
        reason: String,
    },
    /// An endpoint that cannot be connected to.
    #[error("`{url}` is no endpoint: {reason}")]
    Endpoint {
        /// As it was written.
        url: String,
        /// What to change.
        reason: String,
    },
    /// rustls refused the configuration.
    #[error("the TLS configuration cannot be used: {0}")]
    Configuration(#[from] rustls::Error),
}

/// ring's primitives with TLS 1.3 suites only; AES-128 first because it is the quickest where AES is in hardware.
fn provider() -> Arc<CryptoProvider> {
    Arc::new(CryptoProvider {
        cipher_suites: vec![
            ring::cipher_suite::TLS13_AES_128_GCM_SHA256,
            ring::cipher_suite::TLS13_AES_256_GCM_SHA384,
            ring::cipher_suite::TLS13_CHACHA20_POLY1305_SHA256,
        ],
        ..ring::default_provider()
    })
}

/// The server's side: demands a client certificate that chains to `roots`, is valid now and names `federation`. The role in
/// it is left to the services, see [`require_role`].
///
/// # Errors
/// If `identity` is not a server's certificate of `federation`, or rustls refuses it.
pub fn server_config(
    identity: &Identity,
    roots: &TrustRoots,
    federation: &str,
) -> Result<Arc<ServerConfig>, TlsError> {
    identity.require_federation(federation)?;
    identity.require_role(&[Role::Server])?;
    let provider = provider();
    let verifier = verify::ClientVerifier::new(roots, federation, &provider)?;
    let mut config = ServerConfig::builder_with_provider(provider)
        .with_protocol_versions(&[&rustls::version::TLS13])?
        .with_client_cert_verifier(Arc::new(verifier))
        .with_cert_resolver(Arc::new(SingleCertAndKey::from(identity.certified_key())));
    config.alpn_protocols = vec![ALPN.to_vec()];
    config.session_storage = Arc::new(rustls::server::NoServerSessionStorage {});
    config.send_tls13_tickets = 0;
    Ok(Arc::new(config))
}

/// A client's side: presents `identity` and takes a server whose certificate chains to `roots`, is valid now, names
/// `federation` and has the role `server`.
///
/// That replaces the usual check of the host name: the identity is the SPIFFE id in the certificate, whatever address the
/// server is reached at. A host name adds nothing to it, since only the federation's CA can issue that id, and it would tie
/// a certificate to addresses that change.
///
/// # Errors
/// If `identity` is of another federation, or rustls refuses it.
pub fn client_config(
    identity: &Identity,
    roots: &TrustRoots,
    federation: &str,
) -> Result<Arc<ClientConfig>, TlsError> {
    identity.require_federation(federation)?;
    identity.require_role(&[Role::Silo, Role::Operator, Role::Worker])?;
    let provider = provider();
    let verifier = verify::ServerVerifier::new(roots, federation, &provider);
    let mut config = ClientConfig::builder_with_provider(provider)
        .with_protocol_versions(&[&rustls::version::TLS13])?
        .dangerous()
        .with_custom_certificate_verifier(Arc::new(verifier))
        .with_client_cert_resolver(Arc::new(SingleCertAndKey::from(identity.certified_key())));
    config.alpn_protocols = vec![ALPN.to_vec()];
    config.resumption = rustls::client::Resumption::disabled();
    Ok(Arc::new(config))
}

/// The caller's identity if its certificate has `role`; for the first line of every handler.
///
/// # Errors
/// [`ErrorCode::WrongRole`] naming both roles; [`ErrorCode::Internal`] if the request did not come through an [`Acceptor`].
pub fn require_role<T>(request: &tonic::Request<T>, role: Role) -> Result<PeerIdentity, Refusal> {
    require_one_role_of(request, &[role])
}

/// The same as [`require_role`] for services that several roles may call.
///
/// # Errors
/// As for [`require_role`].
pub fn require_one_role_of<T>(
    request: &tonic::Request<T>,
    roles: &[Role],
) -> Result<PeerIdentity, Refusal> {
    let Some(info) = request.extensions().get::<ConnectionInfo>() else {
        return Err(Refusal::new(
            ErrorCode::Internal,
            "the connection carries no identity",
        ));
    };
    if roles.contains(&info.peer.id.role) {
        return Ok(info.peer.clone());
    }
    let wanted: Vec<_> = roles.iter().map(|role| role.as_str()).collect();
    Err(Refusal::new(
        ErrorCode::WrongRole,
        format!(
            "this service is for the role {}, and the certificate is for {}",
            wanted.join(" or "),
            info.peer.id
        ),
    ))
}

#[cfg(test)]
mod tests;
