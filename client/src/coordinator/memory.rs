//! A whole federation in memory: the round machine, the checks and the aggregator that the server uses, without server,
//! network or database. For [`crate::simulate`] and for tests.

use std::{
    collections::BTreeSet,
    fmt,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use bytes::Bytes;
use concord_common::{
    Clock, Digest, ErrorCode, JobId, RoundNumber, SiloId,
    adapter::AdapterVersion,
    chunk::{DEFAULT_CHUNK_BYTES, MAX_CHUNK_BYTES, chunks},
    code::Refusal,
    round::{Event, job::JobState},
    wire::{self, MetricReport, ReceiptError, ReceiptSigner, SignedReceipt},
};
use concord_proto::v1;
use futures::{Stream, StreamExt as _};
use tokio::sync::watch;
use tokio_stream::wrappers::WatchStream;

use self::state::State;
use super::{
    Begun, CallError, Chunks, Claim, Coordinator, Notice, Notices, ServerInfo, begin_request,
};
use crate::egress::{Cleared, ClearedDecline, ClearedReport, Departure};

mod state;

/// Why a federation cannot be set up.
#[derive(Debug, thiserror::Error)]
pub enum FederationError {
    /// The specification does not give a job.
    #[error(transparent)]
    Spec(#[from] Refusal),
    /// No key for receipts.
    #[error(transparent)]
    Key(#[from] ReceiptError),
}

/// One job and its silos.
pub struct Federation {
    clock: Arc<dyn Clock>,
    signer: ReceiptSigner,
    changed: watch::Sender<u64>,
    state: Mutex<State>,
}

impl fmt::Debug for Federation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Federation").finish_non_exhaustive()
    }
}

impl Federation {
    /// A job for these silos, with its first round open.
    ///
    /// # Errors
    /// If the specification is refused.
    pub fn new(
        job: JobId,
        spec_toml: &str,
        silos: BTreeSet<SiloId>,
        clock: Arc<dyn Clock>,
    ) -> Result<Arc<Self>, FederationError> {
        let state = State::new(job, spec_toml, silos, clock.as_ref())?;
        Ok(Arc::new(Self {
            signer: ReceiptSigner::from_pkcs8(&ReceiptSigner::generate_pkcs8()?)?,
            changed: watch::Sender::new(0),
            state: Mutex::new(state),
            clock,
        }))
    }

    /// The federation as this silo reaches it.
    pub fn coordinator(self: &Arc<Self>, silo: SiloId) -> MemoryCoordinator {
        MemoryCoordinator {
            federation: Arc::clone(self),
            silo,
        }
    }

    /// The job's state, and why it failed.
    pub fn outcome(&self) -> (JobState, String) {
        self.lock().outcome()
    }

    /// The first adapter and then the one that each round published.
    pub fn versions(&self) -> Vec<AdapterVersion> {
        self.lock().versions().to_vec()
    }

    /// Size of an adapter's payload in bytes.
    pub fn payload_bytes(&self) -> u64 {
        self.lock().layout().payload_bytes()
    }

    /// What this federation's receipts are verified with.
    pub fn receipt_key(&self) -> [u8; wire::PUBLIC_KEY_BYTES] {
        self.signer.public_key()
    }

    /// Everything that silos have reported.
    pub fn reports(&self) -> Vec<MetricReport> {
        self.lock().reports().to_vec()
    }

    /// Looks at the clock: a round whose time is up closes.
    ///
    /// # Errors
    /// If no round is open.
    pub fn tick(&self) -> Result<(), Refusal> {
        self.change(|state| state.apply(Event::Tick, self.clock.as_ref()).map(|_| ()))
    }

    /// The answer to `GetServerInfo`.
    pub fn info_message(&self) -> v1::GetServerInfoResponse {
        v1::GetServerInfoResponse {
            version: env!("CARGO_PKG_VERSION").to_owned(),
            federation: "memory".to_owned(),
            receipt_public_key: self.signer.public_key().to_vec(),
            max_chunk_bytes: MAX_CHUNK_BYTES as u32,
        }
    }

    /// The present state for a silo, as in `PollRounds`.
    pub fn notice_messages(&self, silo: &SiloId) -> Vec<v1::RoundNotice> {
        self.lock().notices(silo)
    }

    /// One item now and after every change.
    pub fn changes(&self) -> impl Stream<Item = ()> + Send + use<> {
        WatchStream::new(self.changed.subscribe()).map(|_| ())
    }

    /// The answer to `ClaimLease`.
    ///
    /// # Errors
    /// `UNKNOWN_JOB`, `JOB_ENDED`, `WRONG_ROUND`, `NOT_IN_COHORT` or `LATE`.
    pub fn claim_message(
        &self,
        silo: &SiloId,
        job: &JobId,
        round: RoundNumber,
    ) -> Result<v1::ClaimLeaseResponse, Refusal> {
        self.lock().claim(silo, job, round, self.clock.now())
    }

    /// Takes a silo's no.
    ///
    /// # Errors
    /// `UNKNOWN_JOB`, or the round machine's.
    pub fn decline(&self, silo: &SiloId, job: &JobId, code: ErrorCode) -> Result<(), Refusal> {
        let event = Event::Declined {
            silo: silo.clone(),
            code,
        };
        self.change(|state| {
            state.check_job(job)?;
            state.apply(event, self.clock.as_ref()).map(|_| ())
        })
    }

    /// Notes that a silo's contribution did not pass a check.
    #[cfg(test)]
    pub(crate) fn reject(&self, silo: &SiloId, code: ErrorCode) -> Result<(), Refusal> {
        let silo = silo.clone();
        self.change(|state| {
            let event = Event::Rejected { silo, code };
            state.apply(event, self.clock.as_ref()).map(|_| ())
        })
    }

    /// Forgets all that silos have sent in the open round, like a server that waits for no disk when its machine loses power.
    #[cfg(test)]
    pub(crate) fn lose_power(&self) {
        self.lock().lose_power();
        self.changed.send_modify(|count| *count += 1);
    }

    /// An adapter.
    ///
    /// # Errors
    /// `UNKNOWN_JOB` or `UNKNOWN_VERSION`.
    pub fn payload(&self, job: &JobId, version: AdapterVersion) -> Result<Bytes, Refusal> {
        self.lock().payload(job, version)
    }

    /// The answer to `BeginContribution`.
    ///
    /// # Errors
    /// The code of the first check that fails.
    pub fn begin_message(
        &self,
        silo: &SiloId,
        request: &v1::BeginContributionRequest,
    ) -> Result<v1::BeginContributionResponse, Refusal> {
        self.lock().begin(silo, request)
    }

    /// Takes a chunk of an upload.
    ///
    /// # Errors
    /// `UNKNOWN_UPLOAD`, or those of [`concord_common::chunk::ChunkAssembler::accept`].
    pub fn take_chunk(&self, upload_id: &[u8], chunk: &v1::Chunk) -> Result<(), Refusal> {
        self.lock().take_chunk(upload_id, chunk)
    }

    /// Ends an upload. The last one of a round aggregates, which blocks.
    ///
    /// # Errors
    /// `UNKNOWN_UPLOAD`, `TRUNCATED`, `DIGEST_MISMATCH`, or the round machine's.
    pub fn close_upload(&self, upload_id: &[u8]) -> Result<SignedReceipt, Refusal> {
        self.change(|state| state.close_upload(upload_id, &self.signer, self.clock.as_ref()))
    }

    /// Takes a report, in place of an earlier one of the same point.
    ///
    /// # Errors
    /// Those of [`MetricReport::from_silo`].
    pub fn report_message(&self, silo: &SiloId, report: &v1::MetricReport) -> Result<(), Refusal> {
        let report = MetricReport::from_silo(report, silo.clone())?;
        self.change(|state| {
            state.report(report);
            Ok(())
        })
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Runs a decision and tells everybody who watches.
    fn change<T>(
        &self,
        decide: impl FnOnce(&mut State) -> Result<T, Refusal>,
    ) -> Result<T, Refusal> {
        let outcome = decide(&mut self.lock());
        self.changed.send_modify(|count| *count += 1);
        outcome
    }
}

/// One silo's view of a [`Federation`].
#[derive(Debug, Clone)]
pub struct MemoryCoordinator {
    federation: Arc<Federation>,
    silo: SiloId,
}

fn notices(messages: &[v1::RoundNotice]) -> Result<Vec<Notice>, CallError> {
    messages.iter().map(Notice::from_proto).collect()
}

impl MemoryCoordinator {
    /// Sends at most this many chunks.
    pub(crate) fn send_chunks(
        &self,
        departure: &Departure,
        upload_id: &[u8],
        most: usize,
    ) -> Result<(), CallError> {
        let chunks = departure.cleared().cut().chunks(departure.offset());
        for chunk in chunks.take(most) {
            self.federation
                .take_chunk(upload_id, &chunk)
                .map_err(CallError::from_refusal)?;
        }
        Ok(())
    }
}

impl Coordinator for MemoryCoordinator {
    async fn info(&self) -> Result<ServerInfo, CallError> {
        ServerInfo::from_proto(self.federation.info_message())
    }

    async fn watch(&self) -> Result<Notices, CallError> {
        let (federation, silo) = (Arc::clone(&self.federation), self.silo.clone());
        let changes = self.federation.changes();
        Ok(Box::pin(changes.map(move |()| {
            notices(&federation.notice_messages(&silo))
        })))
    }

    async fn poll(&self) -> Result<Vec<Notice>, CallError> {
        notices(&self.federation.notice_messages(&self.silo))
    }

    async fn claim(&self, job: &JobId, round: RoundNumber) -> Result<Claim, CallError> {
        let message = self.federation.claim_message(&self.silo, job, round);
        Claim::from_proto(message.map_err(CallError::from_refusal)?)
    }

    async fn decline(&self, decline: &ClearedDecline) -> Result<(), CallError> {
        self.federation
            .decline(&self.silo, decline.job(), decline.code())
            .map_err(CallError::from_refusal)
    }

    async fn download(
        &self,
        job: &JobId,
        version: AdapterVersion,
        offset: u64,
    ) -> Result<Chunks, CallError> {
        let payload = self
            .federation
            .payload(job, version)
            .map_err(CallError::from_refusal)?;
        let pieces = chunks(&payload, offset, DEFAULT_CHUNK_BYTES).map(Ok);
        Ok(Box::pin(futures::stream::iter(pieces)))
    }

    async fn begin(&self, cleared: &Cleared, token: &[u8]) -> Result<Begun, CallError> {
        let begun = self
            .federation
            .begin_message(&self.silo, &begin_request(cleared, token));
        Begun::from_proto(begun.map_err(CallError::from_refusal)?)
    }

    async fn upload(
        &self,
        departure: &Departure,
        upload_id: &[u8],
    ) -> Result<SignedReceipt, CallError> {
        self.send_chunks(departure, upload_id, usize::MAX)?;
        let (federation, id) = (Arc::clone(&self.federation), upload_id.to_vec());
        tokio::task::spawn_blocking(move || federation.close_upload(&id))
            .await
            .map_err(|error| CallError::Protocol(error.to_string()))?
            .map_err(CallError::from_refusal)
    }

    async fn report(&self, report: &ClearedReport) -> Result<(), CallError> {
        self.federation
            .report_message(&self.silo, &report.report().to_proto())
            .map_err(CallError::from_refusal)
    }
}

/// 16 bytes that name something for one silo in one round.
fn token(purpose: &str, silo: &SiloId, job: &JobId, round: RoundNumber) -> Vec<u8> {
    let text = format!("{purpose} {silo} {job} {round}");
    Digest::of(text.as_bytes()).as_bytes()[..16].to_vec()
}
