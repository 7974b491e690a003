//! A whole federation in memory: the round machine, the checks and the aggregator that the server uses, without server,
//! network or database. For [`crate::simulate`] and for tests.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    fmt,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use bytes::Bytes;
use concord_common::{
    Clock, Digest, ErrorCode, JobId, RoundNumber, SiloId,
    adapter::{AdapterLayout, AdapterVersion},
    aggregate::{Aggregation, PayloadSource, Strategy, Update},
    chunk::{ChunkAssembler, DEFAULT_CHUNK_BYTES, Expected, MAX_CHUNK_BYTES, chunks},
    code::Refusal,
    job::{JobSpec, TrainingSpec},
    round::{
        Contribution, Effect, Event, Outcome, Record, Round, RoundPhase, RoundSpec,
        job::{JobState, Progress, Roster, Step, next_step},
    },
    wire::{self, MetricReport, Receipt, ReceiptError, ReceiptSigner, SignedReceipt},
};
use concord_proto::v1;
use futures::StreamExt as _;
use tokio::sync::watch;
use tokio_stream::wrappers::WatchStream;

use super::{
    Begun, CallError, Chunks, Claim, Coordinator, Notice, Notices, ServerInfo, begin_request,
};
use crate::egress::{Cleared, ClearedDecline, ClearedReport, Departure};

const LEASE: Duration = Duration::from_secs(3600);

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

struct State {
    job: JobId,
    spec_toml: String,
    spec: TrainingSpec,
    layout: AdapterLayout,
    silos: BTreeSet<SiloId>,
    job_state: JobState,
    reason: String,
    round: Option<Round>,
    progress: Progress,
    versions: Vec<AdapterVersion>,
    adapters: HashMap<AdapterVersion, Bytes>,
    spool: HashMap<Digest, Bytes>,
    uploads: HashMap<Vec<u8>, Upload>,
    receipts: HashMap<(RoundNumber, SiloId), SignedReceipt>,
    reports: Vec<MetricReport>,
}

struct Upload {
    silo: SiloId,
    round: RoundNumber,
    digest: Digest,
    examples: u64,
    assembler: ChunkAssembler,
    bytes: Vec<u8>,
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
        let JobSpec::FederatedTraining(spec) = JobSpec::parse(spec_toml)?;
        let layout = spec.adapter_shape().layout()?;
        let first = Bytes::from(spec.initial_adapter()?);
        let version = AdapterVersion::of(&first);
        let federation = Self {
            signer: ReceiptSigner::from_pkcs8(&ReceiptSigner::generate_pkcs8()?)?,
            changed: watch::Sender::new(0),
            state: Mutex::new(State {
                job,
                spec_toml: spec_toml.to_owned(),
                spec: *spec,
                layout,
                silos,
                job_state: JobState::Running,
                reason: String::new(),
                round: None,
                progress: Progress {
                    published: 0,
                    declined: BTreeSet::new(),
                    idle_since: clock.now(),
                },
                versions: vec![version],
                adapters: HashMap::from([(version, first)]),
                spool: HashMap::new(),
                uploads: HashMap::new(),
                receipts: HashMap::new(),
                reports: Vec::new(),
            }),
            clock,
        };
        federation.lock().advance(federation.clock.as_ref());
        Ok(Arc::new(federation))
    }

    /// The federation as this silo reaches it.
    pub fn coordinator(self: &Arc<Self>, silo: SiloId) -> MemoryCoordinator {
        MemoryCoordinator {
            federation: Arc::clone(self),
            silo,
        }
    }

    /// The job's id.
    pub fn job(&self) -> JobId {
        self.lock().job.clone()
    }

    /// The job's state, and why it failed.
    pub fn outcome(&self) -> (JobState, String) {
        let state = self.lock();
        (state.job_state, state.reason.clone())
    }

    /// The first adapter and then the one that each round published.
    pub fn versions(&self) -> Vec<AdapterVersion> {
        self.lock().versions.clone()
    }

    /// The newest adapter's payload.
    pub fn newest(&self) -> Bytes {
        let state = self.lock();
        state
            .versions
            .last()
            .and_then(|version| state.adapters.get(version))
            .cloned()
            .unwrap_or_default()
    }

    /// What this federation's receipts are verified with.
    pub fn receipt_key(&self) -> [u8; wire::PUBLIC_KEY_BYTES] {
        self.signer.public_key()
    }

    /// Everything that silos have reported.
    pub fn reports(&self) -> Vec<MetricReport> {
        self.lock().reports.clone()
    }

    /// Looks at the clock: a round whose time is up closes.
    pub fn tick(&self) {
        self.change(|state| state.apply(Event::Tick, self.clock.as_ref()).map(|_| ()))
            .unwrap_or_default();
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Runs a decision and tells everybody who watches.
    fn change<T>(&self, decide: impl FnOnce(&mut State) -> Result<T, Refusal>) -> Result<T, CallError> {
        let outcome = decide(&mut self.lock());
        self.changed.send_modify(|count| *count += 1);
        outcome.map_err(CallError::from_refusal)
    }
}

impl State {
    fn base(&self) -> AdapterVersion {
        self.versions[self.versions.len() - 1]
    }

    /// Opens the next round, or ends the job.
    fn advance(&mut self, clock: &dyn Clock) {
        let roster = Roster {
            active: self.silos.clone(),
            barred: BTreeSet::new(),
        };
        match next_step(&self.spec, &self.progress, &roster, clock.now()) {
            Step::Open { number, cohort } => {
                self.round = Some(Round::new(RoundSpec {
                    job: self.job.clone(),
                    number,
                    cohort,
                    window: (&self.spec.rounds).into(),
                    base: self.base(),
                    opened_at: clock.now(),
                }));
            }
            // Nobody joins a federation in memory later.
            Step::Wait { .. } => self.fail("too few silos".to_owned()),
            Step::Succeed => self.job_state = JobState::Succeeded,
            Step::Fail { reason } => self.fail(reason),
        }
    }

    fn fail(&mut self, reason: String) {
        self.job_state = JobState::Failed;
        self.reason = reason;
    }

    /// Applies an event and carries its effects out; the silo's record, if one was written or repeated.
    fn apply(&mut self, event: Event, clock: &dyn Clock) -> Result<Option<Record>, Refusal> {
        let Some(round) = self.round.as_mut() else {
            return Err(Refusal::new(ErrorCode::UnknownRound, "no round is open"));
        };
        let effects = round.apply(event, clock.now())?;
        let mut answer = None;
        for effect in effects {
            match effect {
                Effect::Record(record) => {
                    if let Outcome::Declined(_) = record.outcome {
                        self.progress.declined.insert(record.silo.clone());
                    }
                    answer = Some(record);
                }
                Effect::Repeat(record) => answer = Some(record),
                Effect::CloseForAggregation { contributions } => {
                    let event = match self.aggregate(&contributions) {
                        Ok(version) => Event::Aggregated { version },
                        Err(reason) => Event::AggregationFailed { reason },
                    };
                    self.apply(event, clock)?;
                }
                Effect::Publish { version } => {
                    self.versions.push(version);
                    self.spool.clear();
                    self.progress.published += 1;
                    self.progress.idle_since = clock.now();
                    self.advance(clock);
                }
                Effect::Fail { reason } => self.fail(reason),
                Effect::Cancel => self.job_state = JobState::Cancelled,
            }
        }
        Ok(answer)
    }

    fn aggregate(&mut self, contributions: &[Contribution]) -> Result<AdapterVersion, String> {
        let base = self
            .adapters
            .get(&self.base())
            .ok_or("the base adapter is gone")?;
        let updates: BTreeMap<SiloId, Update<'_>> = contributions
            .iter()
            .map(|contribution| {
                let delta = self
                    .spool
                    .get(&contribution.digest)
                    .ok_or("a contribution is gone")?;
                let update = Update {
                    examples: contribution.examples,
                    delta: delta as &dyn PayloadSource,
                };
                Ok((contribution.silo.clone(), update))
            })
            .collect::<Result<_, &str>>()?;
        let mut sink = Vec::with_capacity(base.len());
        let work = Aggregation {
            layout: &self.layout,
            base,
            updates,
        };
        let aggregate = Strategy::of(&self.spec.rounds)
            .aggregator()
            .aggregate(&work, &mut sink)
            .map_err(|error| error.to_string())?;
        self.adapters.insert(aggregate.version, sink.into());
        Ok(aggregate.version)
    }

    fn open_round(&self, job: &JobId, number: RoundNumber) -> Result<&Round, Refusal> {
        self.check_job(job)?;
        if self.job_state.is_over() {
            return Err(Refusal::new(ErrorCode::JobEnded, "the job has ended"));
        }
        match &self.round {
            Some(round) if round.spec().number == number => Ok(round),
            _ => Err(Refusal::new(
                ErrorCode::WrongRound,
                format!("round {number} is not the current one"),
            )),
        }
    }

    fn check_job(&self, job: &JobId) -> Result<(), Refusal> {
        if *job == self.job {
            return Ok(());
        }
        Err(Refusal::new(ErrorCode::UnknownJob, format!("there is no job {job}")))
    }

    fn notices(&self, silo: &SiloId) -> Vec<v1::RoundNotice> {
        let round = self
            .round
            .as_ref()
            .filter(|round| round.spec().cohort.contains(silo));
        if round.is_none() && !self.job_state.is_over() {
            return Vec::new();
        }
        let outcome = round
            .and_then(|round| round.record(silo))
            .map(|record| record.outcome);
        vec![v1::RoundNotice {
            job_id: self.job.to_string(),
            job_state: v1::JobState::from(self.job_state) as i32,
            round: round.map_or(0, |round| round.spec().number.0),
            phase: round.map_or(0, |round| v1::RoundPhase::from(round.phase()) as i32),
            base_version: self.base().0.to_vec(),
            closes_at: round.map(|round| round.spec().closes_at().to_proto()),
            outcome: wire::outcome_to_proto(outcome).0 as i32,
        }]
    }
}

/// One silo's view of a [`Federation`].
#[derive(Debug, Clone)]
pub struct MemoryCoordinator {
    federation: Arc<Federation>,
    silo: SiloId,
}

/// 16 bytes that name something for one silo in one round.
fn token(purpose: &str, silo: &SiloId, job: &JobId, round: RoundNumber) -> Vec<u8> {
    let text = format!("{purpose} {silo} {job} {round}");
    Digest::of(text.as_bytes()).as_bytes()[..16].to_vec()
}

fn protocol(refusal: Refusal) -> CallError {
    CallError::protocol(&refusal)
}

impl MemoryCoordinator {
    fn notices(&self) -> Result<Vec<Notice>, CallError> {
        let notices = self.federation.lock().notices(&self.silo);
        notices.iter().map(Notice::from_proto).collect()
    }

    fn check_token(&self, cleared: &Cleared, shown: &[u8]) -> Result<(), Refusal> {
        if shown == token("lease", &self.silo, cleared.job(), cleared.round()) {
            return Ok(());
        }
        Err(Refusal::new(ErrorCode::LeaseLost, "the lease token is wrong"))
    }

    /// The checks of the server before an upload.
    fn open_upload(&self, state: &mut State, cleared: &Cleared, shown: &[u8]) -> Result<Begun, Refusal> {
        let request = begin_request(cleared, shown);
        if let Some(receipt) = state.receipts.get(&(cleared.round(), self.silo.clone()))
            && receipt.receipt.payload_digest == cleared.digest()
        {
            return Ok(Begun::Recorded(receipt.clone()));
        }
        let round = state.open_round(cleared.job(), cleared.round())?;
        self.check_token(cleared, shown)?;
        let layout = wire::required("layout", request.layout.as_ref())?;
        state.layout.check_same(layout)?;
        if cleared.base() != round.spec().base {
            return Err(Refusal::new(ErrorCode::WrongBaseVersion, "not the round's base"));
        }
        if request.examples == 0 || request.examples > state.spec.limits.max_examples {
            return Err(Refusal::new(ErrorCode::BadWeight, "not within the job's bounds"));
        }
        let expected = Expected {
            layout: state.layout.clone(),
            digest: cleared.digest(),
            max_norm: state.spec.limits.max_update_norm,
        };
        expected.check_size(request.payload_bytes)?;
        let id = token("upload", &self.silo, cleared.job(), cleared.round());
        let fresh = state
            .uploads
            .get(&id)
            .is_none_or(|upload| upload.digest != cleared.digest());
        if fresh {
            state.uploads.insert(
                id.clone(),
                Upload {
                    silo: self.silo.clone(),
                    round: cleared.round(),
                    digest: cleared.digest(),
                    examples: cleared.examples(),
                    assembler: ChunkAssembler::new(expected),
                    bytes: Vec::new(),
                },
            );
        }
        let offset = state.uploads[&id].assembler.offset();
        Ok(Begun::Upload { id, offset })
    }

    fn take_chunk(state: &mut State, id: &[u8], chunk: &v1::Chunk) -> Result<(), Refusal> {
        let upload = state
            .uploads
            .get_mut(id)
            .ok_or_else(|| Refusal::new(ErrorCode::UnknownUpload, "no such upload"))?;
        upload.assembler.accept(chunk)?;
        upload.bytes.extend_from_slice(&chunk.data);
        Ok(())
    }

    fn close_upload(&self, state: &mut State, id: &[u8]) -> Result<SignedReceipt, Refusal> {
        let missing = || Refusal::new(ErrorCode::UnknownUpload, "no such upload");
        let upload = state.uploads.get(id).ok_or_else(missing)?;
        upload.assembler.finish()?;
        let upload = state.uploads.remove(id).ok_or_else(missing)?;
        state.spool.insert(upload.digest, upload.bytes.into());
        let recorded_at = self.federation.clock.now();
        let event = Event::Contributed(Contribution {
            silo: upload.silo.clone(),
            digest: upload.digest,
            examples: upload.examples,
        });
        let record = state.apply(event, self.federation.clock.as_ref())?;
        let outcome = record.map_or(Outcome::Discarded(ErrorCode::Late), |record| record.outcome);
        let receipt = self.federation.signer.sign(Receipt {
            job: state.job.clone(),
            round: upload.round,
            silo: upload.silo.clone(),
            payload_digest: upload.digest,
            outcome,
            recorded_at,
        });
        state
            .receipts
            .insert((upload.round, upload.silo), receipt.clone());
        Ok(receipt)
    }
}

impl Coordinator for MemoryCoordinator {
    async fn info(&self) -> Result<ServerInfo, CallError> {
        ServerInfo::from_proto(v1::GetServerInfoResponse {
            version: env!("CARGO_PKG_VERSION").to_owned(),
            federation: "memory".to_owned(),
            receipt_public_key: self.federation.signer.public_key().to_vec(),
            max_chunk_bytes: MAX_CHUNK_BYTES as u32,
        })
    }

    async fn watch(&self) -> Result<Notices, CallError> {
        let this = self.clone();
        let changes = WatchStream::new(self.federation.changed.subscribe());
        Ok(Box::pin(changes.map(move |_| this.notices())))
    }

    async fn poll(&self) -> Result<Vec<Notice>, CallError> {
        self.notices()
    }

    async fn claim(&self, job: &JobId, round: RoundNumber) -> Result<Claim, CallError> {
        let message = {
            let state = self.federation.lock();
            let open = state.open_round(job, round).map_err(CallError::from_refusal)?;
            if !open.spec().cohort.contains(&self.silo) {
                let refusal = Refusal::new(ErrorCode::NotInCohort, "the silo was not asked");
                return Err(CallError::from_refusal(refusal));
            }
            if open.phase() == RoundPhase::Aggregating {
                let refusal = Refusal::new(ErrorCode::Late, "the round is closed");
                return Err(CallError::from_refusal(refusal));
            }
            v1::ClaimLeaseResponse {
                lease_token: token("lease", &self.silo, job, round),
                expires_at: Some((self.federation.clock.now() + LEASE).to_proto()),
                spec_toml: state.spec_toml.clone(),
                layout: Some(state.layout.to_proto()),
                layout_digest: state.layout.digest().to_vec(),
                base_version: open.spec().base.0.to_vec(),
                payload_bytes: state.layout.payload_bytes(),
                lease_duration: Some(wire::duration_to_proto(LEASE)),
            }
        };
        Claim::from_proto(message)
    }

    async fn decline(&self, decline: &ClearedDecline) -> Result<(), CallError> {
        let event = Event::Declined {
            silo: self.silo.clone(),
            code: decline.code(),
        };
        self.federation.change(|state| {
            state.check_job(decline.job())?;
            state.apply(event, self.federation.clock.as_ref()).map(|_| ())
        })
    }

    async fn download(
        &self,
        job: &JobId,
        version: AdapterVersion,
        offset: u64,
    ) -> Result<Chunks, CallError> {
        let payload = {
            let state = self.federation.lock();
            state.check_job(job).map_err(CallError::from_refusal)?;
            state.adapters.get(&version).cloned().ok_or_else(|| {
                CallError::from_refusal(Refusal::new(
                    ErrorCode::UnknownVersion,
                    format!("there is no adapter {version}"),
                ))
            })?
        };
        let pieces = chunks(&payload, offset, DEFAULT_CHUNK_BYTES).map(Ok);
        Ok(Box::pin(futures::stream::iter(pieces)))
    }

    async fn begin(&self, cleared: &Cleared, token: &[u8]) -> Result<Begun, CallError> {
        let begun = self.open_upload(&mut self.federation.lock(), cleared, token);
        begun.map_err(CallError::from_refusal)
    }

    async fn upload(&self, departure: &Departure, upload_id: &[u8]) -> Result<SignedReceipt, CallError> {
        for chunk in chunks(departure.cleared().payload(), departure.offset(), DEFAULT_CHUNK_BYTES) {
            Self::take_chunk(&mut self.federation.lock(), upload_id, &chunk)
                .map_err(CallError::from_refusal)?;
        }
        let federation = Arc::clone(&self.federation);
        let this = self.clone();
        let id = upload_id.to_vec();
        // The last contribution of a round is aggregated here, which blocks.
        tokio::task::spawn_blocking(move || federation.change(|state| this.close_upload(state, &id)))
            .await
            .map_err(|error| CallError::Protocol(error.to_string()))?
    }

    async fn report(&self, report: &ClearedReport) -> Result<(), CallError> {
        let report = MetricReport::from_silo(&report.report().to_proto(), self.silo.clone()).map_err(protocol)?;
        self.federation.change(|state| {
            state.reports.retain(|old| {
                (&old.silo, old.round, old.point) != (&report.silo, report.round, report.point)
            });
            state.reports.push(report);
            Ok(())
        })
    }
}
