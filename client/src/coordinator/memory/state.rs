//! What a federation in memory decides. It carries the round machine's effects out on maps in place of a database and a disk.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    time::Duration,
};

use bytes::Bytes;
use concord_common::{
    Clock, Digest, ErrorCode, JobId, RoundNumber, SiloId, Timestamp,
    adapter::{AdapterLayout, AdapterVersion},
    aggregate::{Aggregation, PayloadSource, Strategy, Update},
    chunk::{ChunkAssembler, Expected},
    code::Refusal,
    job::{JobSpec, TrainingSpec},
    round::{
        Contribution, Effect, Event, Outcome, Record, Round, RoundSpec,
        job::{JobState, Progress, Roster, Step, next_step},
    },
    wire::{self, MetricReport, Receipt, ReceiptSigner, SignedReceipt},
};
use concord_proto::v1;

use super::token;

const LEASE: Duration = Duration::from_hours(1);

pub(super) struct State {
    job: JobId,
    spec_toml: String,
    spec: TrainingSpec,
    layout: AdapterLayout,
    silos: BTreeSet<SiloId>,
    outcome: JobState,
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

fn refuse<T>(code: ErrorCode, message: &str) -> Result<T, Refusal> {
    Err(Refusal::new(code, message))
}

impl State {
    pub(super) fn new(
        job: JobId,
        spec_toml: &str,
        silos: BTreeSet<SiloId>,
        clock: &dyn Clock,
    ) -> Result<Self, Refusal> {
        let JobSpec::FederatedTraining(spec) = JobSpec::parse(spec_toml)?;
        let first = Bytes::from(spec.initial_adapter()?);
        let version = AdapterVersion::of(&first);
        let mut state = Self {
            job,
            spec_toml: spec_toml.to_owned(),
            layout: spec.adapter_shape().layout()?,
            spec: *spec,
            silos,
            outcome: JobState::Running,
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
        };
        state.advance(clock);
        Ok(state)
    }

    pub(super) fn outcome(&self) -> (JobState, String) {
        (self.outcome, self.reason.clone())
    }

    pub(super) fn versions(&self) -> &[AdapterVersion] {
        &self.versions
    }

    pub(super) fn layout(&self) -> &AdapterLayout {
        &self.layout
    }

    pub(super) fn reports(&self) -> &[MetricReport] {
        &self.reports
    }

    pub(super) fn report(&mut self, report: MetricReport) {
        self.reports.retain(|old| {
            (&old.silo, old.round, old.point) != (&report.silo, report.round, report.point)
        });
        self.reports.push(report);
    }

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
            Step::Wait { .. } => self.fail(format!(
                "{} silos are there, the job needs {}",
                self.silos.len(),
                self.spec.rounds.min_silos
            )),
            Step::Succeed => self.outcome = JobState::Succeeded,
            Step::Fail { reason } => self.fail(reason),
        }
    }

    fn fail(&mut self, reason: String) {
        self.outcome = JobState::Failed;
        self.reason = reason;
    }

    /// Applies an event and carries its effects out; the silo's record, if one was written or repeated.
    pub(super) fn apply(
        &mut self,
        event: Event,
        clock: &dyn Clock,
    ) -> Result<Option<Record>, Refusal> {
        let Some(round) = self.round.as_mut() else {
            return refuse(ErrorCode::UnknownRound, "no round is open");
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
                Effect::Cancel => self.outcome = JobState::Cancelled,
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

    #[cfg(test)]
    pub(super) fn lose_power(&mut self) {
        self.uploads.clear();
        self.receipts.clear();
        self.round = self
            .round
            .take()
            .map(|round| Round::new(round.spec().clone()));
    }

    pub(super) fn check_job(&self, job: &JobId) -> Result<(), Refusal> {
        if *job == self.job {
            return Ok(());
        }
        refuse(ErrorCode::UnknownJob, "there is no such job")
    }

    fn current_round(
        &self,
        job: &JobId,
        number: RoundNumber,
        silo: &SiloId,
    ) -> Result<&Round, Refusal> {
        self.check_job(job)?;
        if self.outcome.is_over() {
            return refuse(ErrorCode::JobEnded, "the job has ended");
        }
        match &self.round {
            Some(round) if round.spec().number != number => {
                refuse(ErrorCode::WrongRound, "this round is not the current one")
            }
            Some(round) if round.spec().cohort.contains(silo) => Ok(round),
            Some(_) => refuse(ErrorCode::NotInCohort, "the silo was not asked"),
            None => refuse(ErrorCode::UnknownRound, "no round is open"),
        }
    }

    pub(super) fn notices(&self, silo: &SiloId) -> Vec<v1::RoundNotice> {
        let round = self
            .round
            .as_ref()
            .filter(|round| round.spec().cohort.contains(silo));
        if round.is_none() && !self.outcome.is_over() {
            return Vec::new();
        }
        let outcome = round
            .and_then(|round| round.record(silo))
            .map(|record| record.outcome);
        vec![v1::RoundNotice {
            job_id: self.job.to_string(),
            job_state: v1::JobState::from(self.outcome) as i32,
            round: round.map_or(0, |round| round.spec().number.0),
            phase: round.map_or(0, |round| v1::RoundPhase::from(round.phase()) as i32),
            base_version: self.base().0.to_vec(),
            closes_at: round.map(|round| round.spec().closes_at().to_proto()),
            outcome: wire::outcome_to_proto(outcome).0 as i32,
        }]
    }

    pub(super) fn claim(
        &self,
        silo: &SiloId,
        job: &JobId,
        number: RoundNumber,
        now: Timestamp,
    ) -> Result<v1::ClaimLeaseResponse, Refusal> {
        let round = self.current_round(job, number, silo)?;
        if !round.phase().is_open() {
            return refuse(ErrorCode::Late, "the round is closed");
        }
        Ok(v1::ClaimLeaseResponse {
            lease_token: token("lease", silo, job, number),
            expires_at: Some((now + LEASE).to_proto()),
            spec_toml: self.spec_toml.clone(),
            layout: Some(self.layout.to_proto()),
            layout_digest: self.layout.digest().to_vec(),
            base_version: round.spec().base.0.to_vec(),
            payload_bytes: self.layout.payload_bytes(),
            lease_duration: Some(wire::duration_to_proto(LEASE)),
        })
    }

    pub(super) fn payload(&self, job: &JobId, version: AdapterVersion) -> Result<Bytes, Refusal> {
        self.check_job(job)?;
        self.adapters
            .get(&version)
            .cloned()
            .ok_or_else(|| Refusal::new(ErrorCode::UnknownVersion, "there is no such adapter"))
    }

    pub(super) fn begin(
        &mut self,
        silo: &SiloId,
        request: &v1::BeginContributionRequest,
    ) -> Result<v1::BeginContributionResponse, Refusal> {
        let job = wire::job_id(&request.job_id)?;
        let number = wire::round_number(request.round)?;
        let digest = wire::digest("payload_digest", &request.payload_digest)?;
        if let Some(receipt) = self.receipts.get(&(number, silo.clone()))
            && receipt.receipt.payload_digest == digest
        {
            return Ok(v1::BeginContributionResponse {
                receipt: Some(receipt.to_proto()),
                ..v1::BeginContributionResponse::default()
            });
        }
        let round = self.current_round(&job, number, silo)?;
        if request.lease_token != token("lease", silo, &job, number) {
            return refuse(ErrorCode::LeaseLost, "the lease token is wrong");
        }
        self.layout
            .check_same(wire::required("layout", request.layout.as_ref())?)?;
        if wire::adapter_version("base_version", &request.base_version)? != round.spec().base {
            return refuse(
                ErrorCode::WrongBaseVersion,
                "it is no delta to the round's base",
            );
        }
        if request.examples == 0 || request.examples > self.spec.limits.max_examples {
            return refuse(
                ErrorCode::BadWeight,
                "the number of examples is not within the job's bounds",
            );
        }
        let expected = Expected {
            layout: self.layout.clone(),
            digest,
            max_norm: self.spec.limits.max_update_norm,
        };
        expected.check_size(request.payload_bytes)?;
        let id = token("upload", silo, &job, number);
        self.uploads
            .retain(|known, upload| *known != id || upload.digest == digest);
        let upload = self.uploads.entry(id.clone()).or_insert_with(|| Upload {
            silo: silo.clone(),
            round: number,
            digest,
            examples: request.examples,
            assembler: ChunkAssembler::new(expected),
            bytes: Vec::new(),
        });
        upload.assembler.begin_stream();
        Ok(v1::BeginContributionResponse {
            offset: upload.assembler.offset(),
            upload_id: id,
            receipt: None,
        })
    }

    pub(super) fn take_chunk(&mut self, id: &[u8], chunk: &v1::Chunk) -> Result<(), Refusal> {
        let Some(upload) = self.uploads.get_mut(id) else {
            return refuse(ErrorCode::UnknownUpload, "there is no such upload");
        };
        upload.assembler.accept(chunk)?;
        upload.bytes.extend_from_slice(&chunk.data);
        Ok(())
    }

    pub(super) fn close_upload(
        &mut self,
        id: &[u8],
        signer: &ReceiptSigner,
        clock: &dyn Clock,
    ) -> Result<SignedReceipt, Refusal> {
        let Some(upload) = self.uploads.get(id) else {
            return refuse(ErrorCode::UnknownUpload, "there is no such upload");
        };
        upload.assembler.finish()?;
        let (silo, round, digest) = (upload.silo.clone(), upload.round, upload.digest);
        let contribution = Contribution {
            silo: silo.clone(),
            digest,
            examples: upload.examples,
        };
        if let Some(upload) = self.uploads.remove(id) {
            self.spool.insert(digest, upload.bytes.into());
        }
        // One that was begun in an earlier round is of no use to this one.
        let record = match &self.round {
            Some(open) if open.spec().number == round => {
                self.apply(Event::Contributed(contribution), clock)?
            }
            _ => None,
        };
        let receipt = signer.sign(Receipt {
            job: self.job.clone(),
            round,
            silo: silo.clone(),
            payload_digest: digest,
            outcome: record.map_or(Outcome::Discarded(ErrorCode::Late), |record| record.outcome),
            recorded_at: clock.now(),
        });
        self.receipts.insert((round, silo), receipt.clone());
        Ok(receipt)
    }
}
