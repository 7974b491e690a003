//! A silo without a model: it speaks the whole protocol over mutual TLS, and adds a constant where a daemon would train.

use anyhow::{Context as _, bail, ensure};
use bytes::{Bytes, BytesMut};
use concord_common::{
    Digest, SiloId,
    adapter::{AdapterLayout, AdapterVersion},
    chunk::{ChunkAssembler, Cut, DEFAULT_CHUNK_BYTES, Expected, chunks},
    tls::{ChannelOptions, TlsError, TlsFiles, client_config, connect_channel},
    wire::{self, SignedReceipt},
};
use concord_proto::v1::{
    self, federation_service_client::FederationServiceClient,
    operator_service_client::OperatorServiceClient,
};
use tokio_stream::StreamExt as _;
use tonic::{Status, Streaming, transport::Channel};

/// A channel to the server with the certificate in `files`.
///
/// # Errors
/// If a file cannot be used or the URL is none.
pub fn channel(files: &TlsFiles, federation: &str, url: &str) -> Result<Channel, TlsError> {
    let (identity, roots) = files.load()?;
    let config = client_config(&identity, &roots, federation)?;
    connect_channel(url, config, ChannelOptions::default())
}

/// An operator's client.
///
/// # Errors
/// As [`channel`].
pub fn operator(
    files: &TlsFiles,
    federation: &str,
    url: &str,
) -> Result<OperatorServiceClient<Channel>, TlsError> {
    Ok(OperatorServiceClient::new(channel(files, federation, url)?))
}

/// A silo's side of the protocol.
#[derive(Debug, Clone)]
pub struct Silo {
    id: SiloId,
    client: FederationServiceClient<Channel>,
}

/// What a silo's stream of notices comes to.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Notice {
    /// A round waits for this silo.
    Work {
        /// Job.
        job_id: String,
        /// Round, counted from 1.
        round: u32,
    },
    /// The job has ended.
    Ended {
        /// How.
        state: v1::JobState,
        /// Its last adapter.
        version: Vec<u8>,
    },
}

impl Silo {
    /// A silo with the certificate in `files`. Nothing is connected yet.
    ///
    /// # Errors
    /// As [`channel`].
    pub fn new(
        id: SiloId,
        files: &TlsFiles,
        federation: &str,
        url: &str,
    ) -> Result<Self, TlsError> {
        Ok(Self {
            id,
            client: FederationServiceClient::new(channel(files, federation, url)?),
        })
    }

    /// The silo's name.
    pub fn id(&self) -> &SiloId {
        &self.id
    }

    /// The bare client, for calls that a well-behaved silo would not make.
    pub fn raw(&mut self) -> &mut FederationServiceClient<Channel> {
        &mut self.client
    }

    /// Begins to watch for rounds.
    ///
    /// # Errors
    /// The server's refusal.
    pub async fn watch(&mut self) -> Result<Streaming<v1::WatchRoundsResponse>, Status> {
        let response = self.client.watch_rounds(v1::WatchRoundsRequest {}).await?;
        Ok(response.into_inner())
    }

    /// The next notice about a job from a watch: a round after `done` that waits for this silo, or the job's end.
    ///
    /// # Errors
    /// If the stream breaks.
    pub async fn next_notice(
        &mut self,
        watch: &mut Streaming<v1::WatchRoundsResponse>,
        job_id: &str,
        done: u32,
    ) -> anyhow::Result<Notice> {
        while let Some(state) = watch.next().await {
            let state = state.context("the stream of notices broke")?;
            let found = state
                .notices
                .into_iter()
                .find(|notice| notice.job_id == job_id)
                .and_then(|notice| as_notice(notice, done));
            if let Some(found) = found {
                return Ok(found);
            }
        }
        bail!("the server ended the stream of notices")
    }

    /// Takes the lease on this silo's part of a round.
    ///
    /// # Errors
    /// The server's refusal.
    pub async fn claim(&mut self, job_id: &str, round: u32) -> Result<Lease, Status> {
        let request = v1::ClaimLeaseRequest {
            job_id: job_id.to_owned(),
            round,
        };
        let lease = self.client.claim_lease(request).await?.into_inner();
        let layout = lease.layout.clone().unwrap_or_default();
        Ok(Lease {
            job_id: job_id.to_owned(),
            round,
            layout: AdapterLayout::from_proto(&layout)?,
            base: wire::adapter_version("base_version", &lease.base_version)?,
            token: lease.lease_token,
        })
    }

    /// Fetches an adapter and checks every chunk and the whole.
    ///
    /// # Errors
    /// The server's refusal, or ours of what it sent.
    pub async fn download(
        &mut self,
        job_id: &str,
        layout: &AdapterLayout,
        version: AdapterVersion,
    ) -> Result<Vec<u8>, Status> {
        let mut payload = Vec::new();
        self.download_into(job_id, layout, version, &mut payload)
            .await?;
        Ok(payload)
    }

    /// The same into memory that is there already; what it holds is replaced.
    ///
    /// # Errors
    /// As [`Silo::download`].
    pub async fn download_into(
        &mut self,
        job_id: &str,
        layout: &AdapterLayout,
        version: AdapterVersion,
        payload: &mut Vec<u8>,
    ) -> Result<(), Status> {
        let request = v1::DownloadAdapterRequest {
            job_id: job_id.to_owned(),
            version: version.0.to_vec(),
            offset: 0,
        };
        let mut stream = self.client.download_adapter(request).await?.into_inner();
        payload.clear();
        payload.reserve_exact(layout.payload_bytes() as usize);
        let mut assembler = ChunkAssembler::new(Expected {
            layout: layout.clone(),
            digest: version.0,
            max_norm: None,
        });
        while let Some(message) = stream.next().await {
            let chunk = wire::required("chunk", message?.chunk)?;
            assembler.accept(&chunk)?;
            payload.extend_from_slice(&chunk.data);
        }
        assembler.finish()?;
        Ok(())
    }

    /// Uploads a delta; the answer is the server's receipt.
    ///
    /// # Errors
    /// The server's refusal.
    pub async fn contribute(
        &mut self,
        lease: &Lease,
        payload: &Bytes,
        examples: u64,
    ) -> Result<SignedReceipt, Status> {
        let cut = Cut::new(payload.clone(), DEFAULT_CHUNK_BYTES);
        let begun = self
            .client
            .begin_contribution(lease.header(payload, cut.digest(), examples))
            .await?
            .into_inner();
        let receipt = if begun.receipt.is_some() {
            begun.receipt
        } else {
            let messages = messages(&begun.upload_id, cut.chunks(begun.offset));
            self.client
                .upload_contribution(tokio_stream::iter(messages))
                .await?
                .into_inner()
                .receipt
        };
        Ok(SignedReceipt::from_proto(&wire::required(
            "receipt", receipt,
        )?)?)
    }
}

fn as_notice(notice: v1::RoundNotice, done: u32) -> Option<Notice> {
    use v1::{JobState, RoundPhase};
    match (notice.job_state(), notice.phase(), notice.outcome()) {
        (state @ (JobState::Succeeded | JobState::Failed | JobState::Cancelled), _, _) => {
            Some(Notice::Ended {
                state,
                version: notice.base_version,
            })
        }
        (
            JobState::Running,
            RoundPhase::Announced | RoundPhase::Collecting,
            v1::Outcome::Unspecified,
        ) if notice.round > done => Some(Notice::Work {
            job_id: notice.job_id,
            round: notice.round,
        }),
        _ => None,
    }
}

/// The messages of an upload from byte `from` on; each chunk is hashed when it is taken.
pub fn upload_messages(
    upload_id: &[u8],
    payload: &Bytes,
    from: u64,
) -> impl Iterator<Item = v1::UploadContributionRequest> + use<> {
    messages(upload_id, chunks(payload, from, DEFAULT_CHUNK_BYTES))
}

fn messages<C: Iterator<Item = v1::Chunk>>(
    upload_id: &[u8],
    chunks: C,
) -> impl Iterator<Item = v1::UploadContributionRequest> + use<C> {
    let mut upload_id = upload_id.to_vec();
    chunks.map(move |chunk| v1::UploadContributionRequest {
        upload_id: std::mem::take(&mut upload_id),
        chunk: Some(chunk),
    })
}

/// What a silo was given for its part of a round.
#[derive(Debug, Clone)]
pub struct Lease {
    /// Job.
    pub job_id: String,
    /// Round, counted from 1.
    pub round: u32,
    /// The tensors that travel.
    pub layout: AdapterLayout,
    /// Adapter to start from.
    pub base: AdapterVersion,
    /// Shown with the contribution.
    pub token: Vec<u8>,
}

impl Lease {
    /// The header of a contribution with this lease.
    pub fn begin(&self, payload: &[u8], examples: u64) -> v1::BeginContributionRequest {
        self.header(payload, Digest::of(payload), examples)
    }

    fn header(
        &self,
        payload: &[u8],
        digest: Digest,
        examples: u64,
    ) -> v1::BeginContributionRequest {
        v1::BeginContributionRequest {
            job_id: self.job_id.clone(),
            round: self.round,
            lease_token: self.token.clone(),
            layout: Some(self.layout.to_proto()),
            base_version: self.base.0.to_vec(),
            payload_digest: digest.to_vec(),
            payload_bytes: payload.len() as u64,
            examples,
        }
    }
}

/// The delta of a silo that adds `constant` to every element of `base`: what is left of it in `f32` arithmetic.
///
/// # Errors
/// If `base` is no whole number of elements.
pub fn added(base: &[u8], constant: f32) -> anyhow::Result<Bytes> {
    let mut delta = BytesMut::new();
    add(base, constant, &mut delta)?;
    Ok(delta.freeze())
}

/// [`added`] into memory that is there already; what it holds is replaced.
///
/// # Errors
/// As [`added`].
pub fn add(base: &[u8], constant: f32, delta: &mut BytesMut) -> anyhow::Result<()> {
    let (elements, rest) = base.as_chunks::<4>();
    ensure!(
        rest.is_empty(),
        "{} bytes are no whole number of f32",
        base.len()
    );
    delta.resize(base.len(), 0);
    for (delta, value) in delta.as_chunks_mut().0.iter_mut().zip(elements) {
        let value = f32::from_le_bytes(*value);
        *delta = ((value + constant) - value).to_le_bytes();
    }
    Ok(())
}
