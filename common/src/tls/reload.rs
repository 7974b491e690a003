//! Certificates that are read anew while the process runs.

use std::sync::Arc;

use rustls::{ClientConfig, ServerConfig};
use tokio::sync::watch;

use super::{Identity, PeerIdentity, TlsError, TlsFiles, TrustRoots, client_config, server_config};
use crate::{Timestamp, telemetry::names};

type Build<C> = fn(&Identity, &TrustRoots, &str) -> Result<Arc<C>, TlsError>;

/// One side's TLS configuration with the files that it comes from. New material is checked before it takes the place of the
/// old: a reload that fails changes nothing.
#[derive(Debug)]
pub struct TlsReload<C> {
    files: TlsFiles,
    peer: PeerIdentity,
    build: Build<C>,
    sender: watch::Sender<Arc<C>>,
}

impl TlsReload<ServerConfig> {
    /// Reads a server's files. A server whose certificate nobody would accept at `now` is not worth starting: that is an
    /// error.
    ///
    /// # Errors
    /// As for [`TlsFiles::load`], [`server_config`] and [`Identity::check`].
    pub fn server(files: TlsFiles, federation: &str, now: Timestamp) -> Result<Self, TlsError> {
        let (identity, roots) = files.load()?;
        identity.check(&roots, now)?;
        Self::new(files, &identity, &roots, federation, server_config)
    }
}

impl TlsReload<ClientConfig> {
    /// Reads a client's files. If the server is going to refuse the certificate at `now`, that is logged and nothing more:
    /// the files may be replaced while the client keeps trying.
    ///
    /// # Errors
    /// As for [`TlsFiles::load`] and [`client_config`].
    pub fn client(files: TlsFiles, federation: &str, now: Timestamp) -> Result<Self, TlsError> {
        let (identity, roots) = files.load()?;
        if let Err(error) = identity.check(&roots, now) {
            tracing::warn!(%error, "the server will refuse this certificate");
        }
        Self::new(files, &identity, &roots, federation, client_config)
    }
}

impl<C> TlsReload<C> {
    fn new(
        files: TlsFiles,
        identity: &Identity,
        roots: &TrustRoots,
        federation: &str,
        build: Build<C>,
    ) -> Result<Self, TlsError> {
        let config = build(identity, roots, federation)?;
        record_expiry(identity);
        Ok(Self {
            files,
            peer: identity.peer().clone(),
            build,
            sender: watch::channel(config).0,
        })
    }

    /// The configuration, now and after each reload; for an [`Acceptor`](super::Acceptor) or
    /// [`connect_channel`](super::connect_channel).
    pub fn subscribe(&self) -> watch::Receiver<Arc<C>> {
        self.sender.subscribe()
    }

    /// Who this side is, with the first certificate's serial number and end.
    pub fn peer(&self) -> &PeerIdentity {
        &self.peer
    }

    /// Reads the files again and, if all is well with them at `now`, publishes what is made of them. Connections that are
    /// open go on as they are.
    ///
    /// # Errors
    /// If the files cannot be used, or the certificate is for somebody else than before; the old material stays.
    pub fn reload(&self, now: Timestamp) -> Result<PeerIdentity, TlsError> {
        let (identity, roots) = self.files.load()?;
        if *identity.id() != self.peer.id {
            return Err(TlsError::WrongIdentity {
                path: self.files.certificate.clone(),
                found: identity.id().clone(),
                wanted: format!(
                    "this process runs as {}; restart it to change that",
                    self.peer.id
                ),
            });
        }
        identity.check(&roots, now)?;
        let config = (self.build)(&identity, &roots, &self.peer.id.federation)?;
        record_expiry(&identity);
        self.sender.send_replace(config);
        Ok(identity.peer().clone())
    }
}

fn record_expiry(identity: &Identity) {
    let seconds = identity.not_after().as_millis() / 1000;
    metrics::gauge!(names::TLS_CERTIFICATE_EXPIRY).set(seconds as f64);
}
