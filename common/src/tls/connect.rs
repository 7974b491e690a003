//! A client's way to the server: one HTTP/2 channel that connects when it is first used and again whenever it breaks.

use std::{io, sync::Arc, time::Duration};

use bytes::BytesMut;
use hyper_util::rt::TokioIo;
use rustls::ClientConfig;
use rustls_pki_types::ServerName;
use tokio::{io::AsyncReadExt as _, net::TcpStream, sync::watch, time::timeout};
use tokio_rustls::{TlsConnector, client::TlsStream};
use tonic::transport::{Channel, Endpoint, Uri};

use super::{
    TlsError,
    explain::{explain, rustls_error},
    socket::TlsSocket,
};

/// Settings of a channel.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ChannelOptions {
    /// Time for the TCP connection, the handshake and the server's first word together.
    pub connect_timeout: Duration,
    /// A ping is sent after this long without traffic, also while no call is open.
    pub keep_alive_interval: Duration,
    /// A connection whose ping is not answered within this time is given up.
    pub keep_alive_timeout: Duration,
    /// Bytes that the server may send ahead on one stream. Each open stream can hold this much in memory.
    pub stream_window: u32,
    /// Bytes that the server may send ahead on all streams of the connection together: the bound on buffered input.
    pub connection_window: u32,
    /// Bytes in one HTTP/2 frame that the server may send; larger ones cost less per byte and hold other streams up longer.
    pub max_frame_size: u32,
}

impl Default for ChannelOptions {
    fn default() -> Self {
        Self {
            connect_timeout: Duration::from_secs(10),
            keep_alive_interval: Duration::from_secs(20),
            keep_alive_timeout: Duration::from_secs(10),
            stream_window: 2 * 1024 * 1024,
            connection_window: 4 * 1024 * 1024,
            max_frame_size: 64 * 1024,
        }
    }
}

/// Where a channel finds its TLS configuration at each connection: a fixed one, or one that can change.
#[derive(Debug, Clone)]
pub enum TlsSource {
    /// Always the same.
    Fixed(Arc<ClientConfig>),
    /// The newest in the channel.
    Watched(watch::Receiver<Arc<ClientConfig>>),
}

impl TlsSource {
    fn current(&self) -> Arc<ClientConfig> {
        match self {
            Self::Fixed(config) => Arc::clone(config),
            Self::Watched(receiver) => Arc::clone(&receiver.borrow()),
        }
    }
}

impl From<Arc<ClientConfig>> for TlsSource {
    fn from(config: Arc<ClientConfig>) -> Self {
        Self::Fixed(config)
    }
}

impl From<watch::Receiver<Arc<ClientConfig>>> for TlsSource {
    fn from(receiver: watch::Receiver<Arc<ClientConfig>>) -> Self {
        Self::Watched(receiver)
    }
}

/// Why a connection to the server did not come to be. In the source chain of the `tonic::Status` of the call that needed it.
#[derive(Debug, thiserror::Error)]
pub enum ConnectError {
    /// The server cannot be reached.
    #[error("cannot reach {address}: {source}")]
    Unreachable {
        /// Host and port.
        address: String,
        /// What the system said.
        source: io::Error,
    },
    /// It took too long.
    #[error("{address} did not answer within {}", humantime::format_duration(*after))]
    TooSlow {
        /// Host and port.
        address: String,
        /// The time it had.
        after: Duration,
    },
    /// One side refused the other during the handshake.
    #[error("no connection to {address}: {reason}")]
    Refused {
        /// Host and port.
        address: String,
        /// One sentence.
        reason: String,
    },
    /// The connection broke during the handshake without a word.
    #[error(
        "{address} closed the connection during the handshake; it may have reached its connection limit"
    )]
    Closed {
        /// Host and port.
        address: String,
    },
}

/// A channel to `url` (`https://host:port`), over mutual TLS. Nothing is connected yet: the first call does that, and a call
/// after a broken connection does it again, so the server need not be up.
///
/// # Errors
/// If `url` is no such URL.
pub fn connect_channel(
    url: &str,
    tls: impl Into<TlsSource>,
    options: ChannelOptions,
) -> Result<Channel, TlsError> {
    let target = Target::parse(url)?;
    let endpoint = Endpoint::from_shared(url.to_owned())
        .map_err(|error| TlsError::Endpoint {
            url: url.to_owned(),
            reason: error.to_string(),
        })?
        .http2_keep_alive_interval(options.keep_alive_interval)
        .keep_alive_timeout(options.keep_alive_timeout)
        .keep_alive_while_idle(true)
        .initial_stream_window_size(options.stream_window)
        .initial_connection_window_size(options.connection_window)
        .max_frame_size(options.max_frame_size);
    let tls = tls.into();
    let connector = tower::service_fn(move |_: Uri| {
        let target = target.clone();
        let config = tls.current();
        async move {
            let connection = timeout(options.connect_timeout, target.connect(config))
                .await
                .unwrap_or_else(|_| {
                    Err(ConnectError::TooSlow {
                        address: target.address(),
                        after: options.connect_timeout,
                    })
                })?;
            Ok::<_, ConnectError>(TokioIo::new(connection))
        }
    });
    Ok(endpoint.connect_with_connector_lazy(connector))
}

/// Whether [`connect_channel`] would take `url`.
///
/// # Errors
/// As for [`connect_channel`].
pub fn check_endpoint(url: &str) -> Result<(), TlsError> {
    Target::parse(url).map(drop)
}

/// The client's end; the server's first word was read already.
type ClientConnection = TlsSocket<TlsStream<TcpStream>, ()>;

/// A checked endpoint.
#[derive(Debug, Clone)]
struct Target {
    host: String,
    port: u16,
    name: ServerName<'static>,
}

impl Target {
    fn parse(url: &str) -> Result<Self, TlsError> {
        let refuse = |reason: &str| TlsError::Endpoint {
            url: url.to_owned(),
            reason: reason.to_owned(),
        };
        let uri: Uri = url
            .parse()
            .map_err(|_| refuse("write it as https://host:port"))?;
        if uri.scheme_str() != Some("https") {
            return Err(refuse(
                "it must begin with https://, there is no connection without TLS",
            ));
        }
        if !matches!(uri.path(), "" | "/") || uri.query().is_some() {
            return Err(refuse("nothing may follow the port"));
        }
        let (Some(host), Some(port @ 1..)) = (uri.host(), uri.port_u16()) else {
            return Err(refuse("write it as https://host:port"));
        };
        if uri
            .authority()
            .is_some_and(|all| all.as_str().contains('@'))
        {
            return Err(refuse("no name or password may stand before the host"));
        }
        let host = host.trim_start_matches('[').trim_end_matches(']');
        let name = ServerName::try_from(host.to_owned())
            .map_err(|_| refuse("the host is neither a DNS name nor an IP address"))?;
        Ok(Self {
            host: host.to_owned(),
            port,
            name,
        })
    }

    fn address(&self) -> String {
        if self.host.contains(':') {
            format!("[{}]:{}", self.host, self.port)
        } else {
            format!("{}:{}", self.host, self.port)
        }
    }

    async fn connect(&self, config: Arc<ClientConfig>) -> Result<ClientConnection, ConnectError> {
        let unreachable = |source| ConnectError::Unreachable {
            address: self.address(),
            source,
        };
        let socket = TcpStream::connect((self.host.as_str(), self.port))
            .await
            .map_err(unreachable)?;
        socket.set_nodelay(true).map_err(unreachable)?;
        let mut stream = TlsConnector::from(config)
            .connect(self.name.clone(), socket)
            .await
            .map_err(|error| self.refused(&error))?;
        // In TLS 1.3 the client has finished before the server has looked at its certificate, so a refusal only shows at the
        // first read. An HTTP/2 server speaks first (RFC 9113 section 3.4): waiting for that word tells an accepted
        // connection from a refused one while the reason can still be given.
        let mut first = BytesMut::with_capacity(1024);
        match stream.read_buf(&mut first).await {
            Ok(0) => Err(ConnectError::Closed {
                address: self.address(),
            }),
            Ok(_) => Ok(TlsSocket::new(stream, first.freeze(), ())),
            Err(error) => Err(self.refused(&error)),
        }
    }

    fn refused(&self, error: &io::Error) -> ConnectError {
        let address = self.address();
        match rustls_error(error) {
            Some(error) => ConnectError::Refused {
                address,
                reason: explain(error),
            },
            None => ConnectError::Closed { address },
        }
    }
}
