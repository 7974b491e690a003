//! One connection for one call. Understanding models take seconds; a connection kept open would save nothing and could go stale.

use std::{path::Path, sync::Arc, time::Duration};

use bytes::Bytes;
use http::{
    HeaderMap, Request, StatusCode,
    header::{ACCEPT, AUTHORIZATION, CONNECTION, CONTENT_LENGTH, CONTENT_TYPE, HOST, RETRY_AFTER},
};
use http_body_util::{BodyExt as _, Full, LengthLimitError, Limited};
use hyper::{body::Incoming, client::conn::http1};
use hyper_util::rt::TokioIo;
use rustls::{ClientConfig, RootCertStore};
use rustls_pki_types::{CertificateDer, ServerName, pem::PemObject as _};
use tokio::{
    io::{AsyncRead, AsyncWrite},
    net::TcpStream,
};
use tokio_rustls::TlsConnector;

use super::{Endpoint, EndpointError, settings::host_of};

/// Most headers of an answer.
const MAX_HEADERS: usize = 64;
/// Bytes of an answer's head that are read.
const MAX_HEAD: usize = 32 << 10;

/// How https endpoints are trusted.
pub(super) struct Tls(TlsConnector);

impl Tls {
    /// Trusts the authorities in `ca_file`, or the system's.
    pub(super) fn new(ca_file: Option<&Path>) -> Result<Self, EndpointError> {
        let refuse = |what: String| EndpointError::Setting {
            key: "ca_file",
            what,
        };
        let certificates: Vec<CertificateDer<'static>> = match ca_file {
            Some(path) => {
                let named = |what: String| refuse(format!("{}: {what}", path.display()));
                CertificateDer::pem_file_iter(path)
                    .and_then(Iterator::collect)
                    .map_err(|error| named(error.to_string()))?
            }
            None => rustls_native_certs::load_native_certs().certs,
        };
        let mut roots = RootCertStore::empty();
        let (added, _) = roots.add_parsable_certificates(certificates);
        if added == 0 {
            return Err(refuse(
                "no certificate authority found; name a PEM file with one".to_owned(),
            ));
        }
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let mut config = ClientConfig::builder_with_provider(provider)
            .with_safe_default_protocol_versions()
            .map_err(|error| refuse(error.to_string()))?
            .with_root_certificates(roots)
            .with_no_client_auth();
        config.alpn_protocols = vec![b"http/1.1".to_vec()];
        Ok(Self(TlsConnector::from(Arc::new(config))))
    }
}

/// Status, wished wait and body of one exchange. The caller bounds its time.
pub(super) async fn exchange(
    endpoint: &Endpoint,
    url: &str,
    body: Bytes,
) -> Result<(StatusCode, Option<Duration>, Bytes), EndpointError> {
    let failed = |what: String| EndpointError::Connection {
        url: url.to_owned(),
        what,
    };
    let host = host_of(&endpoint.base);
    let default_port = if endpoint.tls.is_some() { 443 } else { 80 };
    let port = endpoint.base.port_u16().unwrap_or(default_port);
    let stream = TcpStream::connect((host, port))
        .await
        .map_err(|error| failed(format!("cannot connect: {error}")))?;
    let request = request(endpoint, url, body).map_err(|error| failed(error.to_string()))?;
    match &endpoint.tls {
        None => talk(endpoint, url, stream, request).await,
        Some(Tls(connector)) => {
            let name =
                ServerName::try_from(host.to_owned()).map_err(|error| failed(error.to_string()))?;
            let stream = connector
                .connect(name, stream)
                .await
                .map_err(|error| failed(format!("TLS: {error}")))?;
            talk(endpoint, url, stream, request).await
        }
    }
}

fn request(endpoint: &Endpoint, url: &str, body: Bytes) -> http::Result<Request<Full<Bytes>>> {
    let target: http::Uri = url.parse()?;
    let path = target.path_and_query().map_or("/", |path| path.as_str());
    let host = endpoint
        .base
        .authority()
        .map_or("", |authority| authority.as_str());
    let mut request = Request::post(path)
        .header(HOST, host)
        .header(CONNECTION, "close")
        .header(CONTENT_TYPE, "application/json")
        .header(ACCEPT, "application/json");
    if let Some(key) = &endpoint.key {
        request = request.header(AUTHORIZATION, key);
    }
    request.body(Full::new(body))
}

async fn talk(
    endpoint: &Endpoint,
    url: &str,
    stream: impl AsyncRead + AsyncWrite + Unpin + Send,
    request: Request<Full<Bytes>>,
) -> Result<(StatusCode, Option<Duration>, Bytes), EndpointError> {
    let failed = |error: hyper::Error| EndpointError::Connection {
        url: url.to_owned(),
        what: error.to_string(),
    };
    let (mut sender, connection) = http1::Builder::new()
        .max_headers(MAX_HEADERS)
        .max_buf_size(MAX_HEAD)
        .handshake(TokioIo::new(stream))
        .await
        .map_err(failed)?;
    let answer = async {
        let response = sender.send_request(request).await.map_err(failed)?;
        let status = response.status();
        let wait = retry_after(response.headers());
        let body = read_body(endpoint, url, response).await?;
        Ok((status, wait, body))
    };
    tokio::pin!(answer);
    // The connection moves only while it is polled; it ends before the answer has been taken out of its channel.
    tokio::select! {
        result = &mut answer => return result,
        result = connection => if let Err(error) = result {
            tracing::debug!(error.message = %error, "endpoint connection ended with an error");
        },
    }
    answer.await
}

async fn read_body(
    endpoint: &Endpoint,
    url: &str,
    response: http::Response<Incoming>,
) -> Result<Bytes, EndpointError> {
    let limit = endpoint.settings.max_answer.bytes() as usize;
    let large = || EndpointError::Large {
        url: url.to_owned(),
        limit,
    };
    let announced = response
        .headers()
        .get(CONTENT_LENGTH)
        .and_then(|value| value.to_str().ok()?.parse::<u64>().ok());
    if announced.is_some_and(|length| length > limit as u64) {
        return Err(large());
    }
    match Limited::new(response.into_body(), limit).collect().await {
        Ok(collected) => Ok(collected.to_bytes()),
        Err(error) if error.is::<LengthLimitError>() => Err(large()),
        Err(error) => Err(EndpointError::Connection {
            url: url.to_owned(),
            what: format!("the answer broke off: {error}"),
        }),
    }
}

/// The wait that an answer asks for, in seconds; its other form, a date, is not used by model servers.
fn retry_after(headers: &HeaderMap) -> Option<Duration> {
    let seconds: u64 = headers
        .get(RETRY_AFTER)?
        .to_str()
        .ok()?
        .trim()
        .parse()
        .ok()?;
    Some(Duration::from_secs(seconds))
}
