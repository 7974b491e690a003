//! A federation in memory and a gRPC server on loopback.

use std::{
    net::SocketAddr,
    sync::{Arc, Mutex},
    time::Duration,
};

use metrics::LocalRecorderGuard;
use metrics_exporter_prometheus::{PrometheusBuilder, PrometheusHandle};
use rustls::{ClientConfig, ServerConfig};
use rustls_pki_types::ServerName;
use tokio::{
    net::{TcpListener, TcpStream},
    sync::{oneshot, watch},
    task::JoinSet,
    time::timeout,
};
use tonic::transport::{Channel, Server};
use tonic_health::pb::{HealthCheckRequest, health_client::HealthClient, health_server};

use crate::{
    Clock as _, Role, SpiffeId, SystemClock, Timestamp,
    pki::{CertificateAuthority, IssuedCertificate},
    tls::{
        Acceptor, AcceptorLimits, ChannelOptions, Identity, PeerIdentity, TlsSource, TrustRoots,
        client_config, connect_channel, require_role, server_config,
    },
};

pub(super) const DAY: Duration = crate::pki::DAY;

/// No test waits longer for anything.
pub(super) const PATIENCE: Duration = Duration::from_secs(20);

pub(super) fn now() -> Timestamp {
    SystemClock.now()
}

/// A CA and what it issues.
pub(super) struct Federation {
    pub(super) ca: CertificateAuthority,
}

impl From<CertificateAuthority> for Federation {
    fn from(ca: CertificateAuthority) -> Self {
        Self { ca }
    }
}

impl Federation {
    pub(super) fn new(name: &str) -> Self {
        CertificateAuthority::create(name, now() - DAY * 10, 100)
            .unwrap()
            .into()
    }

    pub(super) fn identity(&self, role: Role, name: &str) -> Identity {
        self.identity_at(role, name, now() - DAY, DAY * 2)
    }

    pub(super) fn identity_at(
        &self,
        role: Role,
        name: &str,
        not_before: Timestamp,
        validity: Duration,
    ) -> Identity {
        let id = SpiffeId::new(self.ca.federation(), role, name).unwrap();
        let issued = self.ca.issue(&id, &[], &[], not_before, validity).unwrap();
        Identity::from_pem(issued.certificate_pem.as_bytes(), issued.key_pem.as_bytes()).unwrap()
    }

    pub(super) fn roots(&self) -> TrustRoots {
        TrustRoots::from_pem(self.ca.certificate_pem().as_bytes()).unwrap()
    }

    pub(super) fn roots_with(&self, other: &Self) -> TrustRoots {
        let both = format!(
            "{}{}",
            self.ca.certificate_pem(),
            other.ca.certificate_pem()
        );
        TrustRoots::from_pem(both.as_bytes()).unwrap()
    }

    pub(super) fn client(&self, identity: &Identity) -> Arc<ClientConfig> {
        client_config(identity, &self.roots(), self.ca.federation()).unwrap()
    }

    pub(super) fn server(&self) -> Arc<ServerConfig> {
        let identity = self.identity(Role::Server, "main");
        server_config(&identity, &self.roots(), self.ca.federation()).unwrap()
    }
}

/// A client that presents `issued` as it is, whatever stands in it.
pub(super) fn raw_client(
    roots: &TrustRoots,
    federation: &str,
    issued: &IssuedCertificate,
) -> Arc<ClientConfig> {
    use rustls_pki_types::{CertificateDer, PrivateKeyDer, pem::PemObject as _};

    let provider = super::provider();
    let verifier = super::verify::ServerVerifier::new(roots, federation, &provider);
    let chain = CertificateDer::pem_slice_iter(issued.certificate_pem.as_bytes())
        .collect::<Result<Vec<_>, _>>()
        .unwrap();
    let key = PrivateKeyDer::from_pem_slice(issued.key_pem.as_bytes()).unwrap();
    let mut config = ClientConfig::builder_with_provider(provider)
        .with_protocol_versions(&[&rustls::version::TLS13])
        .unwrap()
        .dangerous()
        .with_custom_certificate_verifier(Arc::new(verifier))
        .with_client_auth_cert(chain, key)
        .unwrap();
    config.alpn_protocols = vec![super::ALPN.to_vec()];
    Arc::new(config)
}

/// The call that the tests make; the service is for silos only.
pub(super) async fn call(channel: &Channel) -> Result<(), tonic::Status> {
    let mut client = HealthClient::new(channel.clone());
    timeout(PATIENCE, client.check(HealthCheckRequest::default()))
        .await
        .expect("the call was never answered")
        .map(|_| ())
}

/// A server with metrics of its own. It runs on the test's thread and ends with it.
pub(super) struct Running {
    pub(super) address: SocketAddr,
    pub(super) tls: watch::Sender<Arc<ServerConfig>>,
    callers: Arc<Mutex<Vec<PeerIdentity>>>,
    metrics: PrometheusHandle,
    stop: Option<oneshot::Sender<()>>,
    tasks: JoinSet<()>,
    _recorder: LocalRecorderGuard<'static>,
}

impl Running {
    pub(super) fn start(federation: &Federation) -> Self {
        Self::start_with(federation.server(), AcceptorLimits::default())
    }

    pub(super) fn start_with(config: Arc<ServerConfig>, limits: AcceptorLimits) -> Self {
        Self::start_at(([127, 0, 0, 1], 0).into(), config, limits)
    }

    pub(super) fn start_at(
        address: SocketAddr,
        config: Arc<ServerConfig>,
        limits: AcceptorLimits,
    ) -> Self {
        let recorder = PrometheusBuilder::new().build_recorder();
        let metrics = recorder.handle();
        // Leaked because the guard borrows it; a test's process is short.
        let recorder = metrics::set_default_local_recorder(Box::leak(Box::new(recorder)));

        let listener = std::net::TcpListener::bind(address).unwrap();
        listener.set_nonblocking(true).unwrap();
        let listener = TcpListener::from_std(listener).unwrap();
        let (tls, receiver) = watch::channel(config);
        let acceptor = Acceptor::new(listener, receiver, limits);
        let address = acceptor.local_addr().unwrap();

        let callers = Arc::new(Mutex::new(Vec::new()));
        let seen = Arc::clone(&callers);
        let check = move |request: tonic::Request<()>| {
            let peer = require_role(&request, Role::Silo)?;
            seen.lock().unwrap().push(peer);
            Ok(request)
        };
        let service = health_server::HealthServer::with_interceptor(
            tonic_health::server::HealthService::from_health_reporter(
                tonic_health::server::HealthReporter::new(),
            ),
            check,
        );
        let (stop, stopped) = oneshot::channel();
        let mut tasks = JoinSet::new();
        tasks.spawn(async move {
            Server::builder()
                .add_service(service)
                .serve_with_incoming_shutdown(acceptor.into_stream(), async {
                    let _ = stopped.await;
                })
                .await
                .unwrap();
        });
        Self {
            address,
            tls,
            callers,
            metrics,
            stop: Some(stop),
            tasks,
            _recorder: recorder,
        }
    }

    pub(super) fn channel(&self, client: impl Into<TlsSource>) -> Channel {
        let url = format!("https://{}", self.address);
        connect_channel(&url, client, ChannelOptions::default()).unwrap()
    }

    /// A TLS connection on which no HTTP/2 is spoken yet.
    pub(super) async fn connect_raw(
        &self,
        client: Arc<ClientConfig>,
    ) -> tokio_rustls::client::TlsStream<TcpStream> {
        let socket = TcpStream::connect(self.address).await.unwrap();
        let name = ServerName::try_from("127.0.0.1").unwrap();
        tokio_rustls::TlsConnector::from(client)
            .connect(name, socket)
            .await
            .unwrap()
    }

    pub(super) fn callers(&self) -> Vec<PeerIdentity> {
        self.callers.lock().unwrap().clone()
    }

    pub(super) fn metrics(&self) -> String {
        self.metrics.render()
    }

    /// Connections whose handshake succeeded.
    pub(super) fn connections(&self) -> u64 {
        self.metrics()
            .lines()
            .find_map(|line| line.strip_prefix("concord_tls_connections_total "))
            .map_or(0, |count| count.parse().unwrap())
    }

    /// Waits until a line of the metrics is `line`.
    pub(super) async fn wait_for(&self, line: &str) {
        let there = async {
            while !self.metrics().lines().any(|known| known == line) {
                tokio::task::yield_now().await;
            }
        };
        timeout(PATIENCE, there)
            .await
            .unwrap_or_else(|_| panic!("no line `{line}` in\n{}", self.metrics()));
    }

    pub(super) async fn wait_for_refusals(&self, reason: &str, count: u64) {
        let line = format!("concord_tls_handshakes_refused_total{{reason=\"{reason}\"}} {count}");
        self.wait_for(&line).await;
    }

    /// Stops in good order and waits for the end.
    pub(super) async fn stop(mut self) {
        let _ = self.stop.take().unwrap().send(());
        let ended = async { while self.tasks.join_next().await.is_some() {} };
        timeout(PATIENCE, ended)
            .await
            .expect("the server did not stop");
    }
}
