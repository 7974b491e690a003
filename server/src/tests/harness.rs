//! A federation for tests: certificates, a server on a port of its own, and silos without a model.

use std::{collections::BTreeMap, sync::Arc, time::Duration};

use bytes::Bytes;
use concord_common::{
    Clock, Digest, ErrorCode, Role, SpiffeId, SystemClock,
    adapter::{AdapterLayout, decode_f32, encode_f32},
    chunk,
    clock::MockClock,
    code::Refusal,
    config::{ListenSection, LogSection, TlsSection},
    job::JobSpec,
    pki::{CertificateAuthority, DAY},
    tls::{AcceptorLimits, ChannelOptions, client_config, connect_channel},
    wire::SignedReceipt,
};
use concord_proto::v1::{
    self, federation_service_client::FederationServiceClient,
    operator_service_client::OperatorServiceClient,
};
use futures::stream;
use tempfile::TempDir;
use tonic::{Request, Status, transport::Channel};

use crate::{
    RunningServer, Server,
    config::{
        Durability, EnrollmentPolicy, JobsSection, LimitsSection, OpsSection, RetentionSection,
        ServerConfig, SpoolSection, WorkersSection,
    },
};

/// Longest that a test waits for something that must happen.
const PATIENCE: Duration = Duration::from_secs(20);

pub(crate) const FEDERATION: &str = "north";

/// A server with everything that it needs; the folder outlives restarts.
pub(crate) struct World {
    pub folder: TempDir,
    pub ca: CertificateAuthority,
    pub clock: Arc<MockClock>,
    pub config: ServerConfig,
    pub server: Option<RunningServer>,
}

impl World {
    pub(crate) async fn start() -> Self {
        Self::start_with(|_| {}).await
    }

    pub(crate) async fn start_with(change: impl FnOnce(&mut ServerConfig)) -> Self {
        let mut world = Self::stopped();
        change(&mut world.config);
        world.restart().await;
        world
    }

    /// Everything but the server.
    pub(crate) fn stopped() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let clock = Arc::new(MockClock::new(SystemClock.now()));
        let start = clock.now() - DAY;
        let ca = CertificateAuthority::create(FEDERATION, start, 30).unwrap();
        let written = ca.write(folder.path(), false).unwrap();
        let id = SpiffeId::new(FEDERATION, Role::Server, "hub").unwrap();
        let server = ca.issue(&id, &[], &[], start, DAY * 9).unwrap();
        let files = server.write(folder.path(), false).unwrap();
        let config = ServerConfig {
            federation: FEDERATION.to_owned(),
            state_dir: folder.path().join("state"),
            durability: Durability::Process,
            enrollment: EnrollmentPolicy::Auto,
            stop_timeout: Duration::from_secs(5),
            listen: ListenSection {
                address: ([127, 0, 0, 1], 0).into(),
                max_connections: AcceptorLimits::default().max_connections,
                max_connections_per_peer: AcceptorLimits::default().max_connections_per_peer,
                max_handshakes: AcceptorLimits::default().max_handshakes,
                handshake_timeout: AcceptorLimits::default().handshake_timeout,
            },
            tls: TlsSection {
                certificate: files.certificate,
                key: files.key,
                ca: written.certificate,
            },
            limits: LimitsSection::default(),
            spool: SpoolSection::default(),
            jobs: JobsSection::default(),
            workers: WorkersSection::default(),
            retention: RetentionSection::default(),
            ops: OpsSection {
                enabled: false,
                ..OpsSection::default()
            },
            log: LogSection::default(),
        };
        Self {
            folder,
            ca,
            clock,
            config,
            server: None,
        }
    }

    /// Stops the server if it runs and starts it again, on another port.
    pub(crate) async fn restart(&mut self) {
        self.stop().await;
        let clock: Arc<dyn Clock> = self.clock.clone();
        let server = Server::start(self.config.clone(), clock).await.unwrap();
        self.server = Some(server);
    }

    pub(crate) async fn stop(&mut self) {
        if let Some(server) = self.server.take() {
            server.stop(Duration::from_secs(2)).await;
        }
    }

    pub(crate) fn server(&self) -> &RunningServer {
        self.server.as_ref().unwrap()
    }

    pub(crate) fn channel(&self, role: Role, name: &str) -> Channel {
        let (identity, roots) = self.issue(role, name).load().unwrap();
        let tls = client_config(&identity, &roots, FEDERATION).unwrap();
        let url = format!("https://{}", self.server().addr);
        connect_channel(&url, tls, ChannelOptions::default()).unwrap()
    }

    /// Moves the server's clock and wakes whoever waits for a deadline.
    pub(crate) fn advance(&self, by: Duration) {
        self.clock.advance(by);
        self.server().context().hub.roster_changed();
    }

    /// The files of a new certificate.
    pub(crate) fn issue(&self, role: Role, name: &str) -> TlsSection {
        let id = SpiffeId::new(FEDERATION, role, name).unwrap();
        let start = self.clock.now() - DAY;
        let issued = self.ca.issue(&id, &[], &[], start, DAY * 9).unwrap();
        let written = issued.write(self.folder.path(), true).unwrap();
        TlsSection {
            certificate: written.certificate,
            key: written.key,
            ca: self.config.tls.ca.clone(),
        }
    }

    pub(crate) fn operator(&self) -> OperatorServiceClient<Channel> {
        OperatorServiceClient::new(self.channel(Role::Operator, "olga"))
    }

    pub(crate) async fn silo(&self, name: &str) -> FakeSilo {
        let client = FederationServiceClient::new(self.channel(Role::Silo, name));
        let mut silo = FakeSilo {
            name: name.to_owned(),
            client,
            public_key: Vec::new(),
        };
        let info = silo
            .client
            .get_server_info(v1::GetServerInfoRequest {})
            .await;
        silo.public_key = info.unwrap().into_inner().receipt_public_key;
        silo
    }

    pub(crate) async fn silos<const N: usize>(&self, names: [&str; N]) -> [FakeSilo; N] {
        let mut silos = Vec::new();
        for name in names {
            silos.push(self.silo(name).await);
        }
        silos.try_into().unwrap_or_else(|_| unreachable!())
    }

    /// Queues a job and gives its id.
    pub(crate) async fn submit(&self, spec: &str) -> String {
        let request = v1::SubmitJobRequest {
            request_id: uuid::Uuid::new_v4().to_string(),
            spec_toml: spec.to_owned(),
        };
        let answer = self
            .operator()
            .submit_job(request)
            .await
            .unwrap()
            .into_inner();
        answer.job.unwrap().job_id
    }

    pub(crate) async fn job(&self, job_id: &str) -> v1::GetJobResponse {
        let request = v1::GetJobRequest {
            job_id: job_id.to_owned(),
        };
        self.operator().get_job(request).await.unwrap().into_inner()
    }

    pub(crate) async fn round(&self, job_id: &str, round: u32) -> v1::GetRoundResponse {
        let request = v1::GetRoundRequest {
            job_id: job_id.to_owned(),
            round,
        };
        self.operator()
            .get_round(request)
            .await
            .unwrap()
            .into_inner()
    }

    /// Waits until a job is in a state.
    pub(crate) async fn wait_for_state(&self, job_id: &str, state: v1::JobState) -> v1::Job {
        eventually("the job's state", async || {
            let job = self.job(job_id).await.job.unwrap();
            (job.state() == state).then_some(job)
        })
        .await
    }
}

/// Asks again and again until there is an answer.
pub(crate) async fn eventually<T>(what: &str, mut ask: impl AsyncFnMut() -> Option<T>) -> T {
    let give_up = tokio::time::Instant::now() + PATIENCE;
    loop {
        if let Some(answer) = ask().await {
            return answer;
        }
        assert!(
            tokio::time::Instant::now() < give_up,
            "waited in vain for {what}"
        );
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
}

/// A specification with these rounds; `rest` may add or replace settings of the section `[rounds]` and further sections.
pub(crate) fn spec(rounds: u32, min_silos: u32, rest: &str) -> String {
    format!(
        r#"kind = "federated-training"
name = "test job"
task = "main"
seed = 5
[backbone]
name = "none"
hidden = 16
layers = 2
[adapter]
bottleneck = 8
[algorithm]
name = "fedavg"
[rounds]
count = {rounds}
min_silos = {min_silos}
{rest}
"#
    )
}

/// The tensors of [`spec`]'s jobs.
pub(crate) fn layout() -> AdapterLayout {
    let spec = JobSpec::parse(&spec(1, 1, "")).unwrap();
    spec.training().adapter_shape().layout().unwrap()
}

/// A payload whose every element is `value`.
pub(crate) fn constant(value: f32) -> Bytes {
    encode_f32(&vec![value; layout().elements() as usize]).into()
}

/// A silo that calls what a daemon calls.
#[derive(Clone)]
pub(crate) struct FakeSilo {
    pub name: String,
    pub client: FederationServiceClient<Channel>,
    pub public_key: Vec<u8>,
}

/// Everything of a contribution that a test may spoil.
#[derive(Clone)]
pub(crate) struct Offer {
    pub begin: v1::BeginContributionRequest,
    pub payload: Bytes,
    pub chunk_bytes: usize,
}

impl FakeSilo {
    pub(crate) async fn notices(&mut self) -> Vec<v1::RoundNotice> {
        let answer = self.client.poll_rounds(v1::PollRoundsRequest {}).await;
        answer.unwrap().into_inner().notices
    }

    /// Waits until the silo is asked to work on a round.
    pub(crate) async fn wait_for_round(&mut self, job_id: &str, round: u32) -> v1::RoundNotice {
        let name = self.name.clone();
        eventually(&format!("round {round} at {name}"), async || {
            self.notices().await.into_iter().find(|notice| {
                notice.job_id == job_id
                    && notice.round == round
                    && notice.job_state() == v1::JobState::Running
                    && matches!(
                        notice.phase(),
                        v1::RoundPhase::Announced | v1::RoundPhase::Collecting
                    )
            })
        })
        .await
    }

    pub(crate) async fn claim(
        &mut self,
        job_id: &str,
        round: u32,
    ) -> Result<v1::ClaimLeaseResponse, Status> {
        let request = v1::ClaimLeaseRequest {
            job_id: job_id.to_owned(),
            round,
        };
        Ok(self.client.claim_lease(request).await?.into_inner())
    }

    pub(crate) async fn download(
        &mut self,
        job_id: &str,
        version: &[u8],
        offset: u64,
    ) -> Result<Vec<u8>, Status> {
        let request = v1::DownloadAdapterRequest {
            job_id: job_id.to_owned(),
            version: version.to_vec(),
            offset,
        };
        let mut stream = self.client.download_adapter(request).await?.into_inner();
        let mut payload = Vec::new();
        while let Some(message) = stream.message().await? {
            let chunk = message.chunk.unwrap();
            assert_eq!(chunk.offset, offset + payload.len() as u64);
            payload.extend_from_slice(&chunk.data);
            assert_eq!(chunk.digest, Digest::of(&payload).to_vec());
        }
        Ok(payload)
    }

    /// A proper contribution for a round, after waiting for it and claiming it.
    pub(crate) async fn offer(
        &mut self,
        job_id: &str,
        round: u32,
        payload: Bytes,
        examples: u64,
    ) -> Offer {
        self.wait_for_round(job_id, round).await;
        let lease = self.claim(job_id, round).await.unwrap();
        Offer {
            begin: v1::BeginContributionRequest {
                job_id: job_id.to_owned(),
                round,
                lease_token: lease.lease_token,
                layout: lease.layout,
                base_version: lease.base_version,
                payload_digest: Digest::of(&payload).to_vec(),
                payload_bytes: payload.len() as u64,
                examples,
            },
            payload,
            chunk_bytes: 300,
        }
    }

    /// Begins, uploads what is wanted, and checks the receipt's signature.
    pub(crate) async fn send(&mut self, offer: &Offer) -> Result<v1::Receipt, Status> {
        let begun = self
            .client
            .begin_contribution(offer.begin.clone())
            .await?
            .into_inner();
        let receipt = if let Some(receipt) = begun.receipt {
            receipt
        } else {
            let chunks = chunk::chunks(&offer.payload, begun.offset, offer.chunk_bytes);
            self.upload(&begun.upload_id, chunks.collect()).await?
        };
        SignedReceipt::from_proto(&receipt)
            .unwrap()
            .verify(&self.public_key)
            .unwrap();
        Ok(receipt)
    }

    pub(crate) async fn upload(
        &mut self,
        upload_id: &[u8],
        chunks: Vec<v1::Chunk>,
    ) -> Result<v1::Receipt, Status> {
        let mut messages: Vec<_> = chunks
            .into_iter()
            .map(|chunk| v1::UploadContributionRequest {
                upload_id: Vec::new(),
                chunk: Some(chunk),
            })
            .collect();
        match messages.first_mut() {
            Some(first) => first.upload_id = upload_id.to_vec(),
            None => messages.push(v1::UploadContributionRequest {
                upload_id: upload_id.to_vec(),
                chunk: None,
            }),
        }
        let request = Request::new(stream::iter(messages));
        let answer = self.client.upload_contribution(request).await?;
        Ok(answer.into_inner().receipt.unwrap())
    }

    /// A silo's whole part in a round: every element of its update is `value`.
    pub(crate) async fn contribute(
        &mut self,
        job_id: &str,
        round: u32,
        value: f32,
        examples: u64,
    ) -> v1::Receipt {
        let offer = self.offer(job_id, round, constant(value), examples).await;
        self.send(&offer).await.unwrap()
    }
}

/// What a round of these silos must publish; checks that it does.
pub(crate) async fn expect_published(
    world: &World,
    silo: &mut FakeSilo,
    job_id: &str,
    round: u32,
    updates: &[(&str, f32, u64)],
) {
    let updates = updates
        .iter()
        .map(|(name, value, examples)| (*name, (*value, *examples)))
        .collect();
    let published = eventually("the published round", async || {
        let found = world.round(job_id, round).await.round.unwrap();
        (found.phase() == v1::RoundPhase::Published).then_some(found)
    })
    .await;
    let base = silo
        .download(job_id, &published.base_version, 0)
        .await
        .unwrap();
    let expected = weighted_mean(&base, &updates);
    assert_eq!(published.published_version, Digest::of(&expected).to_vec());
    assert_eq!(published.accepted as usize, updates.len());
}

/// The code that a call was refused with.
pub(crate) fn code<T>(answer: Result<T, Status>) -> ErrorCode {
    refusal(answer).code
}

/// What a call was refused with.
pub(crate) fn refusal<T>(answer: Result<T, Status>) -> Refusal {
    let Err(status) = answer else {
        panic!("the call was let through");
    };
    let refusal = Refusal::from_status(&status).unwrap_or_else(|| panic!("{status:?}"));
    assert!(!refusal.message.is_empty());
    refusal
}

/// What the server must publish: base plus the weighted mean of constant updates, in silo-id order.
pub(crate) fn weighted_mean(base: &[u8], updates: &BTreeMap<&str, (f32, u64)>) -> Vec<u8> {
    let total: u64 = updates.values().map(|(_, examples)| examples).sum();
    let step: f64 = updates
        .values()
        .map(|(value, examples)| *examples as f64 / total as f64 * f64::from(*value))
        .sum();
    let values = decode_f32(base).unwrap();
    encode_f32(
        &values
            .iter()
            .map(|value| (f64::from(*value) + step) as f32)
            .collect::<Vec<_>>(),
    )
}
