//! The server as a silo sees it: [`Coordinator`], over gRPC ([`grpc`]) or in memory ([`memory`]).
//!
//! What a silo sends is typed by the egress gate ([`Cleared`], [`Departure`], ...), so that there is no call that takes bytes of
//! any other origin. What comes back is checked here before anybody uses it.

use std::{future::Future, pin::Pin, time::Duration};

use concord_common::{
    Digest, ErrorCode, JobId, RoundNumber, Timestamp,
    adapter::{AdapterLayout, AdapterVersion},
    code::Refusal,
    job::{JobSpec, TrainingSpec},
    round::{RoundPhase, job::JobState},
    wire::{self, SignedReceipt},
};
use concord_proto::v1;
use futures::Stream;

use crate::egress::{Cleared, ClearedDecline, ClearedReport, Departure, EgressError};

pub mod grpc;
pub mod memory;
#[cfg(test)]
mod tests;

/// Why a call did not do what it should.
#[derive(Clone, PartialEq, Debug, thiserror::Error)]
pub enum CallError {
    /// The server said no, and would say so again.
    #[error("the server refused: {0}")]
    Refused(Refusal),
    /// The server was not reached, broke off or is busy: worth another try.
    #[error("{reason}")]
    Unavailable {
        /// One sentence.
        reason: String,
        /// When the server wants to be asked again.
        retry_after: Option<Duration>,
    },
    /// The server answered with what the protocol does not allow.
    #[error("the server sent what the protocol does not allow: {0}")]
    Protocol(String),
    /// This silo's egress log takes no more lines, so the call was not made.
    #[error(transparent)]
    Egress(EgressError),
}

impl CallError {
    /// Whether another try can help.
    pub fn is_transient(&self) -> bool {
        matches!(self, Self::Unavailable { .. })
    }

    /// The server's code, if it gave one.
    pub fn code(&self) -> Option<ErrorCode> {
        match self {
            Self::Refused(refusal) => Some(refusal.code),
            Self::Unavailable { .. } | Self::Protocol(_) | Self::Egress(_) => None,
        }
    }

    /// From what the server refused; a limit or a stop is worth another try.
    pub(crate) fn from_refusal(refusal: Refusal) -> Self {
        match refusal.code {
            ErrorCode::Busy
            | ErrorCode::ShuttingDown
            | ErrorCode::TooSlow
            | ErrorCode::Internal => Self::Unavailable {
                reason: refusal.to_string(),
                retry_after: refusal.retry_after,
            },
            _ => Self::Refused(refusal),
        }
    }

    /// A field of an answer that cannot be.
    pub(crate) fn protocol(refusal: &Refusal) -> Self {
        Self::Protocol(refusal.message.clone())
    }
}

/// Facts about the server.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct ServerInfo {
    /// Its version.
    pub version: String,
    /// Its federation.
    pub federation: String,
    /// What receipts are verified with.
    pub receipt_key: Vec<u8>,
    /// Largest chunk that it takes.
    pub max_chunk_bytes: usize,
}

impl ServerInfo {
    /// From the server's message.
    ///
    /// # Errors
    /// [`CallError::Protocol`] if the key has not 32 bytes or no chunk size is given.
    pub fn from_proto(proto: v1::GetServerInfoResponse) -> Result<Self, CallError> {
        if proto.receipt_public_key.len() != wire::PUBLIC_KEY_BYTES {
            return Err(CallError::Protocol(format!(
                "`receipt_public_key` has {} bytes",
                proto.receipt_public_key.len()
            )));
        }
        if proto.max_chunk_bytes == 0 {
            return Err(CallError::Protocol("`max_chunk_bytes` is 0".to_owned()));
        }
        Ok(Self {
            version: proto.version,
            federation: proto.federation,
            receipt_key: proto.receipt_public_key,
            max_chunk_bytes: proto.max_chunk_bytes as usize,
        })
    }
}

/// A job as the server describes it to this silo.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Notice {
    /// Job.
    pub job: JobId,
    /// Its state.
    pub state: JobState,
    /// Current or last round; `None` before the first.
    pub round: Option<RoundNumber>,
    /// Phase of that round.
    pub phase: Option<RoundPhase>,
    /// Adapter to start from; the final one when the job has ended.
    pub base: Option<AdapterVersion>,
    /// When the round closes.
    pub closes_at: Option<Timestamp>,
    /// Whether this silo's part of the round is settled.
    pub answered: bool,
    /// Whether the server has rejected what this silo sent. It waits for a better contribution, or a no.
    pub rejected: bool,
}

impl Notice {
    /// From the server's message.
    ///
    /// # Errors
    /// [`CallError::Protocol`] naming the field.
    pub fn from_proto(proto: &v1::RoundNotice) -> Result<Self, CallError> {
        let read = || -> Result<Self, Refusal> {
            Ok(Self {
                job: wire::job_id(&proto.job_id)?,
                state: wire::job_state_from_proto(proto.job_state)?,
                round: (proto.round > 0).then_some(RoundNumber(proto.round)),
                phase: (proto.round > 0)
                    .then(|| wire::phase_from_proto(proto.phase))
                    .transpose()?,
                base: (!proto.base_version.is_empty())
                    .then(|| wire::adapter_version("base_version", &proto.base_version))
                    .transpose()?,
                closes_at: proto.closes_at.as_ref().map(Timestamp::from_proto),
                answered: proto.outcome != v1::Outcome::Unspecified as i32
                    && proto.outcome != v1::Outcome::Rejected as i32,
                rejected: proto.outcome == v1::Outcome::Rejected as i32,
            })
        };
        read().map_err(|refusal| CallError::protocol(&refusal))
    }

    /// A job of which nothing is known but that it has ended.
    pub(crate) fn of_ended(job: JobId) -> Self {
        Self {
            job,
            state: JobState::Cancelled,
            round: None,
            phase: None,
            base: None,
            closes_at: None,
            answered: false,
            rejected: false,
        }
    }

    /// Whether the round waits for this silo.
    pub fn wants_work(&self) -> bool {
        self.state == JobState::Running
            && self.phase.is_some_and(RoundPhase::is_open)
            && !self.answered
    }
}

/// Length of a lease token and of an upload id in bytes.
const TOKEN_BYTES: usize = 16;

/// A leased part of a round.
#[derive(Clone, PartialEq, Debug)]
pub struct Claim {
    /// To show with the contribution.
    pub token: Vec<u8>,
    /// When the lease runs out.
    pub expires_at: Timestamp,
    /// How long it lasts.
    pub duration: Duration,
    /// The job's specification as sent.
    pub spec_toml: String,
    /// The same, read and checked.
    pub spec: TrainingSpec,
    /// The tensors that travel: the same from the specification and from the server.
    pub layout: AdapterLayout,
    /// Adapter to start from.
    pub base: AdapterVersion,
}

impl Claim {
    /// From the server's message. The layout is computed from the specification, not believed.
    ///
    /// # Errors
    /// [`CallError::Protocol`] naming what is missing, malformed or contradicts itself.
    pub fn from_proto(proto: v1::ClaimLeaseResponse) -> Result<Self, CallError> {
        let protocol = |message: String| Err(CallError::Protocol(message));
        let refused = |refusal: Refusal| CallError::protocol(&refusal);
        if proto.lease_token.len() != TOKEN_BYTES {
            return protocol(format!(
                "`lease_token` has {} bytes",
                proto.lease_token.len()
            ));
        }
        let JobSpec::FederatedTraining(spec) = JobSpec::parse(&proto.spec_toml).map_err(refused)?;
        let layout = spec.adapter_shape().layout().map_err(refused)?;
        let sent = wire::required("layout", proto.layout.as_ref()).map_err(refused)?;
        layout.check_same(sent).map_err(refused)?;
        let digest = wire::digest("layout_digest", &proto.layout_digest).map_err(refused)?;
        if digest != layout.digest() {
            return protocol("`layout_digest` is not the digest of `layout`".to_owned());
        }
        if proto.payload_bytes != layout.payload_bytes() {
            return protocol(format!(
                "`payload_bytes` is {}, the layout has {}",
                proto.payload_bytes,
                layout.payload_bytes()
            ));
        }
        let expires_at =
            wire::required("expires_at", proto.expires_at.as_ref()).map_err(refused)?;
        let duration = wire::required("lease_duration", proto.lease_duration.as_ref())
            .and_then(|duration| wire::duration_from_proto("lease_duration", duration))
            .map_err(refused)?;
        if duration.is_zero() {
            return protocol("`lease_duration` is 0".to_owned());
        }
        Ok(Self {
            expires_at: Timestamp::from_proto(expires_at),
            duration,
            spec: *spec,
            layout,
            base: wire::adapter_version("base_version", &proto.base_version).map_err(refused)?,
            token: proto.lease_token,
            spec_toml: proto.spec_toml,
        })
    }

    /// Digest that the vault binds its records to.
    pub fn spec_digest(&self) -> Digest {
        Digest::of(self.spec_toml.as_bytes())
    }
}

/// The server's answer to an announced contribution.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Begun {
    /// Send the bytes from `offset` on.
    Upload {
        /// Names the upload.
        id: Vec<u8>,
        /// First byte wanted.
        offset: u64,
    },
    /// This very contribution is recorded already.
    Recorded(SignedReceipt),
}

impl Begun {
    /// From the server's message.
    ///
    /// # Errors
    /// [`CallError::Protocol`] naming what is malformed.
    pub fn from_proto(proto: v1::BeginContributionResponse) -> Result<Self, CallError> {
        if let Some(receipt) = &proto.receipt {
            return SignedReceipt::from_proto(receipt)
                .map(Self::Recorded)
                .map_err(|refusal| CallError::protocol(&refusal));
        }
        if proto.upload_id.len() != TOKEN_BYTES {
            return Err(CallError::Protocol(format!(
                "`upload_id` has {} bytes",
                proto.upload_id.len()
            )));
        }
        Ok(Self::Upload {
            id: proto.upload_id,
            offset: proto.offset,
        })
    }
}

/// Everything about this silo, whenever it changes.
pub type Notices = Pin<Box<dyn Stream<Item = Result<Vec<Notice>, CallError>> + Send>>;

/// The pieces of an adapter.
pub type Chunks = Pin<Box<dyn Stream<Item = Result<v1::Chunk, CallError>> + Send>>;

/// The calls of `concord.v1.FederationService`, one to one. Nothing here tries twice: that is the caller's decision.
pub trait Coordinator: Send + Sync + 'static {
    /// Facts about the server.
    fn info(&self) -> impl Future<Output = Result<ServerInfo, CallError>> + Send;

    /// The state for this silo, now and after every change.
    fn watch(&self) -> impl Future<Output = Result<Notices, CallError>> + Send;

    /// The same, once.
    fn poll(&self) -> impl Future<Output = Result<Vec<Notice>, CallError>> + Send;

    /// Takes or renews the lease on this silo's part of a round.
    fn claim(
        &self,
        job: &JobId,
        round: RoundNumber,
    ) -> impl Future<Output = Result<Claim, CallError>> + Send;

    /// Says that this silo will not take part.
    fn decline(
        &self,
        decline: &ClearedDecline,
    ) -> impl Future<Output = Result<(), CallError>> + Send;

    /// An adapter's payload from byte `offset` on.
    fn download(
        &self,
        job: &JobId,
        version: AdapterVersion,
        offset: u64,
    ) -> impl Future<Output = Result<Chunks, CallError>> + Send;

    /// Announces a contribution.
    fn begin(
        &self,
        cleared: &Cleared,
        token: &[u8],
    ) -> impl Future<Output = Result<Begun, CallError>> + Send;

    /// Sends its bytes.
    fn upload(
        &self,
        departure: &Departure,
        upload_id: &[u8],
    ) -> impl Future<Output = Result<SignedReceipt, CallError>> + Send;

    /// Reports numbers.
    fn report(&self, report: &ClearedReport) -> impl Future<Output = Result<(), CallError>> + Send;
}

/// The header of a contribution as the protocol has it.
fn begin_request(cleared: &Cleared, token: &[u8]) -> v1::BeginContributionRequest {
    v1::BeginContributionRequest {
        job_id: cleared.job().to_string(),
        round: cleared.round().0,
        lease_token: token.to_vec(),
        layout: Some(cleared.layout().to_proto()),
        base_version: cleared.base().0.to_vec(),
        payload_digest: cleared.digest().to_vec(),
        payload_bytes: cleared.payload().len() as u64,
        examples: cleared.examples(),
    }
}
