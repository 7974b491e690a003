//! The server's door: TCP connections in, authenticated streams out.

use std::{
    collections::HashMap,
    io,
    net::SocketAddr,
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use bytes::Bytes;
use futures::Stream;
use rustls::{CertificateError, Error, ServerConfig};
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::{TcpListener, TcpStream},
    sync::{OwnedSemaphorePermit, Semaphore, watch},
    task::JoinSet,
    time::timeout,
};
use tokio_rustls::{TlsAcceptor, server::TlsStream};
use tonic::transport::server::Connected;

use super::{
    ALPN, PeerIdentity,
    explain::{explain, rustls_error},
    socket::TlsSocket,
};
use crate::{SpiffeId, telemetry::names};

/// How much a refused peer may still send before it is cut off. Closing with bytes unread would reset the connection and
/// could take the alert, the peer's only explanation, with it.
const LINGER_BYTES: u64 = 64 * 1024;
const LINGER_TIME: Duration = Duration::from_secs(1);

/// Wait after the system refused to accept (no file descriptors left), so as not to spin.
const ACCEPT_RETRY: Duration = Duration::from_millis(100);

/// Bounds of an [`Acceptor`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct AcceptorLimits {
    /// Connections at once, handshakes included. One more is closed at once and counted as refused.
    pub max_connections: usize,
    /// Connections of one identity at once. One more is closed after its handshake and counted as refused.
    pub max_connections_per_peer: usize,
    /// Handshakes at once. More wait in the listener's queue.
    pub max_handshakes: usize,
    /// A handshake that takes longer is cut off.
    pub handshake_timeout: Duration,
}

impl Default for AcceptorLimits {
    fn default() -> Self {
        Self {
            max_connections: 1024,
            max_connections_per_peer: 16,
            max_handshakes: 64,
            handshake_timeout: Duration::from_secs(10),
        }
    }
}

/// Why a connection did not come to be; the label `reason` of the counter of refused handshakes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum HandshakeRefusal {
    /// The client presented no certificate.
    NoCertificate,
    /// The client's certificate is another CA's.
    UnknownCa,
    /// The client's certificate has expired or is not valid yet.
    Expired,
    /// The client's certificate is of another federation.
    WrongFederation,
    /// The client's certificate has no proper SPIFFE id, or is not for clients.
    BadIdentity,
    /// The handshake took too long.
    Timeout,
    /// The client refused the server's certificate.
    RefusedByClient,
    /// There are as many connections as are allowed.
    Limit,
    /// There are as many connections of this client as are allowed.
    PeerLimit,
    /// Anything else: no TLS, no TLS 1.3, no HTTP/2, or the connection broke.
    Protocol,
}

impl HandshakeRefusal {
    /// Every reason, in the order of the metric's documentation.
    pub const ALL: [Self; 10] = [
        Self::NoCertificate,
        Self::UnknownCa,
        Self::Expired,
        Self::WrongFederation,
        Self::BadIdentity,
        Self::Timeout,
        Self::RefusedByClient,
        Self::Limit,
        Self::PeerLimit,
        Self::Protocol,
    ];

    /// The label's value.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::NoCertificate => "no_certificate",
            Self::UnknownCa => "unknown_ca",
            Self::Expired => "expired",
            Self::WrongFederation => "wrong_federation",
            Self::BadIdentity => "bad_identity",
            Self::Timeout => "timeout",
            Self::RefusedByClient => "refused_by_client",
            Self::Limit => "limit",
            Self::PeerLimit => "peer_limit",
            Self::Protocol => "protocol",
        }
    }

    fn of(error: &Error) -> Self {
        match error {
            Error::NoCertificatesPresented => Self::NoCertificate,
            Error::InvalidCertificate(problem) => match problem {
                CertificateError::UnknownIssuer => Self::UnknownCa,
                CertificateError::Expired
                | CertificateError::ExpiredContext { .. }
                | CertificateError::NotValidYet
                | CertificateError::NotValidYetContext { .. } => Self::Expired,
                CertificateError::ApplicationVerificationFailure => Self::WrongFederation,
                _ => Self::BadIdentity,
            },
            Error::AlertReceived(_) => Self::RefusedByClient,
            _ => Self::Protocol,
        }
    }
}

/// What a handler can know of its caller; in the request's extensions.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ConnectionInfo {
    /// The other end's address.
    pub remote: SocketAddr,
    /// Who the caller's certificate speaks for.
    pub peer: PeerIdentity,
}

/// An accepted, authenticated stream.
pub type TlsConnection = TlsSocket<TlsStream<TcpStream>, Accepted>;

/// What goes with an accepted stream.
#[derive(Debug)]
pub struct Accepted {
    info: ConnectionInfo,
    _open: OpenConnection,
}

/// Counts a connection as long as it lives, and holds its place among the allowed ones.
#[derive(Debug)]
struct OpenConnection {
    _permit: OwnedSemaphorePermit,
    _share: OwnedSemaphorePermit,
}

impl OpenConnection {
    fn new(permit: OwnedSemaphorePermit, share: OwnedSemaphorePermit) -> Self {
        metrics::gauge!(names::TLS_CONNECTIONS_OPEN).increment(1.0);
        Self {
            _permit: permit,
            _share: share,
        }
    }
}

/// What each identity may take of the connections, so that one cannot keep the others out.
#[derive(Debug)]
struct Shares {
    each: usize,
    peers: Mutex<HashMap<SpiffeId, Arc<Semaphore>>>,
}

impl Shares {
    /// A place for a connection of `peer`, if there is one.
    fn place(&self, peer: &SpiffeId) -> Option<OwnedSemaphorePermit> {
        let mut peers = self.peers.lock().unwrap_or_else(PoisonError::into_inner);
        // A place holds its semaphore too, so the map stays as small as the number of peers.
        peers.retain(|_, places| Arc::strong_count(places) > 1);
        let places = peers
            .entry(peer.clone())
            .or_insert_with(|| Arc::new(Semaphore::new(self.each)));
        Arc::clone(places).try_acquire_owned().ok()
    }
}

impl Drop for OpenConnection {
    fn drop(&mut self) {
        metrics::gauge!(names::TLS_CONNECTIONS_OPEN).decrement(1.0);
    }
}

impl TlsConnection {
    /// Where the connection comes from and who is at its other end.
    pub fn info(&self) -> &ConnectionInfo {
        &self.about().info
    }
}

impl Connected for TlsConnection {
    type ConnectInfo = ConnectionInfo;

    fn connect_info(&self) -> ConnectionInfo {
        self.info().clone()
    }
}

/// Accepts TCP connections and carries out their handshakes, several at once, each with a deadline. Handshakes that run when
/// the stream is dropped are aborted with it.
#[derive(Debug)]
pub struct Acceptor {
    listener: TcpListener,
    tls: watch::Receiver<Arc<ServerConfig>>,
    handshake_timeout: Duration,
    connections: Arc<Semaphore>,
    shares: Arc<Shares>,
    handshakes: Arc<Semaphore>,
    running: JoinSet<Option<TlsConnection>>,
}

impl Acceptor {
    /// Takes over a bound listener. The newest configuration in `tls` is used at each accept.
    pub fn new(
        listener: TcpListener,
        tls: watch::Receiver<Arc<ServerConfig>>,
        limits: AcceptorLimits,
    ) -> Self {
        Self {
            listener,
            tls,
            handshake_timeout: limits.handshake_timeout,
            connections: Arc::new(Semaphore::new(limits.max_connections)),
            shares: Arc::new(Shares {
                each: limits.max_connections_per_peer,
                peers: Mutex::default(),
            }),
            handshakes: Arc::new(Semaphore::new(limits.max_handshakes)),
            running: JoinSet::new(),
        }
    }

    /// The address that is listened on.
    ///
    /// # Errors
    /// If the system does not tell.
    pub fn local_addr(&self) -> io::Result<SocketAddr> {
        self.listener.local_addr()
    }

    /// The accepted connections, in the order in which their handshakes end; for
    /// [`serve_with_incoming_shutdown`](tonic::transport::server::Router::serve_with_incoming_shutdown). Never ends and
    /// never yields an error: what goes wrong with one peer is logged and counted, and the others go on.
    pub fn into_stream(self) -> impl Stream<Item = io::Result<TlsConnection>> + Send {
        futures::stream::unfold(self, |mut acceptor| async move {
            let connection = acceptor.next().await;
            Some((Ok(connection), acceptor))
        })
    }

    async fn next(&mut self) -> TlsConnection {
        loop {
            let handshakes = Arc::clone(&self.handshakes);
            let accepted = async {
                let permit = handshakes
                    .acquire_owned()
                    .await
                    .expect("the semaphore is never closed");
                (self.listener.accept().await, permit)
            };
            tokio::select! {
                Some(done) = self.running.join_next() => match done {
                    Ok(Some(connection)) => return connection,
                    Ok(None) => {}
                    Err(error) => tracing::error!(%error, "a tls handshake broke off"),
                },
                (accepted, permit) = accepted => match accepted {
                    Ok((socket, remote)) => self.begin(socket, remote, permit),
                    Err(error) => {
                        tracing::warn!(%error, "cannot accept a connection");
                        tokio::time::sleep(ACCEPT_RETRY).await;
                    }
                },
            }
        }
    }

    fn begin(&mut self, socket: TcpStream, remote: SocketAddr, slot: OwnedSemaphorePermit) {
        let Ok(place) = Arc::clone(&self.connections).try_acquire_owned() else {
            refuse(
                remote,
                HandshakeRefusal::Limit,
                "there are as many connections as are allowed",
            );
            return;
        };
        let config = Arc::clone(&self.tls.borrow());
        let (deadline, shares) = (self.handshake_timeout, Arc::clone(&self.shares));
        self.running.spawn(async move {
            let _slot = slot;
            let shaken = timeout(deadline, handshake(socket, config))
                .await
                .unwrap_or_else(|_| {
                    Err(Failure {
                        reason: HandshakeRefusal::Timeout,
                        detail: "the handshake took too long".to_owned(),
                        socket: None,
                    })
                });
            match shaken {
                Ok((stream, peer)) => {
                    let Some(share) = shares.place(&peer.id) else {
                        let detail = format!("{} has as many connections as are allowed", peer.id);
                        refuse(remote, HandshakeRefusal::PeerLimit, &detail);
                        return None;
                    };
                    metrics::counter!(names::TLS_CONNECTIONS).increment(1);
                    tracing::debug!(%remote, peer = %peer.id, "connection accepted");
                    let accepted = Accepted {
                        info: ConnectionInfo { remote, peer },
                        _open: OpenConnection::new(place, share),
                    };
                    Some(TlsSocket::new(stream, Bytes::new(), accepted))
                }
                Err(failure) => {
                    refuse(remote, failure.reason, &failure.detail);
                    if let Some(socket) = failure.socket {
                        linger(socket).await;
                    }
                    None
                }
            }
        });
    }
}

fn refuse(remote: SocketAddr, reason: HandshakeRefusal, detail: &str) {
    metrics::counter!(names::TLS_HANDSHAKES_REFUSED, "reason" => reason.as_str()).increment(1);
    tracing::warn!(%remote, reason = reason.as_str(), detail, "connection refused");
}

/// A handshake that came to nothing.
struct Failure {
    reason: HandshakeRefusal,
    detail: String,
    /// The connection, where an alert was sent on it.
    socket: Option<TcpStream>,
}

impl Failure {
    fn new(reason: HandshakeRefusal, detail: impl Into<String>) -> Self {
        Self {
            reason,
            detail: detail.into(),
            socket: None,
        }
    }
}

async fn handshake(
    socket: TcpStream,
    config: Arc<ServerConfig>,
) -> Result<(TlsStream<TcpStream>, PeerIdentity), Failure> {
    socket
        .set_nodelay(true)
        .map_err(|error| Failure::new(HandshakeRefusal::Protocol, error.to_string()))?;
    let accepted = TlsAcceptor::from(config)
        .accept(socket)
        .into_fallible()
        .await;
    let stream = accepted.map_err(|(error, socket)| {
        let (reason, detail) = match rustls_error(&error) {
            Some(error) => (HandshakeRefusal::of(error), explain(error)),
            None => (HandshakeRefusal::Protocol, error.to_string()),
        };
        Failure {
            socket: Some(socket),
            ..Failure::new(reason, detail)
        }
    })?;
    let (_, session) = stream.get_ref();
    if session.alpn_protocol() != Some(ALPN) {
        return Err(Failure::new(
            HandshakeRefusal::Protocol,
            "the client did not ask for HTTP/2",
        ));
    }
    let leaf = session
        .peer_certificates()
        .and_then(<[_]>::first)
        .expect("the verifier refuses clients without a certificate");
    let peer = PeerIdentity::from_der(leaf)
        .map_err(|error| Failure::new(HandshakeRefusal::BadIdentity, error.to_string()))?;
    Ok((stream, peer))
}

/// Lets the alert reach a refused peer: no more to send, and what it still sends is read away, within bounds.
async fn linger(mut socket: TcpStream) {
    let drain = async {
        socket.shutdown().await?;
        tokio::io::copy(&mut socket.take(LINGER_BYTES), &mut tokio::io::sink()).await
    };
    // Nothing hangs on the outcome: the peer is refused already.
    let _ = timeout(LINGER_TIME, drain).await;
}
