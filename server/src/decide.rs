//! The decisions about rounds and jobs as parts of transactions: the pure machines in, rows out.
//!
//! Nothing here acts on anything but the open transaction. What a decision means for the rest of the world stands in the
//! [`Change`] that it returns, which [`Change::announce`] makes known after the commit.

use std::{collections::BTreeSet, time::Duration};

use concord_common::{
    ErrorCode, JobId, RoundNumber, SiloId, Timestamp,
    adapter::AdapterVersion,
    code::Refusal,
    job::{JobSpec, TrainingSpec},
    round::{
        Effect, Event, Outcome, Record, Round, RoundPhase, RoundSpec,
        job::{JobState, Progress, Roster, Step, next_step},
    },
    wire::{Receipt, ReceiptSigner},
};
use prost::Message as _;

use crate::{
    datastore::{Enrollment, JobRecord, RoundSiloRecord, Tx},
    error::{Failure, refuse},
    hub::Hub,
    metrics,
    spool::UploadId,
};

pub(crate) mod workers;

/// What a transaction changed, for those outside.
#[derive(Clone, Debug, Default)]
pub struct Change {
    /// What is recorded of the silo that the event was about.
    pub record: Option<RoundSiloRecord>,
    /// True if the record was there before.
    pub repeated: bool,
    /// Phases that rounds came into, in order.
    pub phases: Vec<RoundPhase>,
    /// State that the job came into.
    pub job_state: Option<JobState>,
    /// From the announcement of the round to its end.
    pub round_time: Option<Duration>,
    /// Adapter that the round published.
    pub published: Option<AdapterVersion>,
    /// When to look again, for a job that waits for silos.
    pub wait_until: Option<Timestamp>,
    /// True if the round is to be looked at earlier or later than before.
    pub deadline_moved: bool,
}

impl Change {
    /// Tells metrics and watchers; to be called once, after the commit.
    pub fn announce(&self, job_id: &JobId, hub: &Hub) {
        for &phase in &self.phases {
            if phase != RoundPhase::Collecting {
                metrics::round(phase);
            }
        }
        if let Some(time) = self.round_time {
            metrics::round_seconds(time);
        }
        if let Some(state) = self.job_state {
            metrics::job(state);
            tracing::info!(job.id = %job_id, state = %state, "job changed its state");
        }
        if let Some(record) = &self.record {
            let outcome = record.outcome.map_or("awaited", Outcome::as_str);
            metrics::contribution(if self.repeated { "repeated" } else { outcome });
            hub.silo_changed(&record.silo_id);
        }
        let silos_care = self
            .phases
            .iter()
            .any(|phase| phase.is_over() || *phase == RoundPhase::Announced);
        if silos_care || self.job_state.is_some() {
            hub.rounds_changed();
        }
        hub.job_changed(job_id);
        // A contribution of many leaves the driver with nothing to do but to wait for the others.
        let goes_on = self.record.is_some()
            && self.phases.is_empty()
            && self.job_state.is_none()
            && !self.deadline_moved;
        if !goes_on {
            hub.job_due(job_id);
        }
    }
}

/// A job that must exist.
pub(crate) async fn job(tx: &mut Tx<'_>, job_id: &JobId) -> Result<JobRecord, Failure> {
    match tx.job(job_id).await? {
        Some(job) => Ok(job),
        None => refuse(ErrorCode::UnknownJob, format!("there is no job `{job_id}`")),
    }
}

/// The specification of a stored job.
pub(crate) fn spec(job: &JobRecord) -> Result<TrainingSpec, Failure> {
    match JobSpec::parse(&job.spec_toml) {
        Ok(JobSpec::FederatedTraining(spec)) => Ok(*spec),
        // It was accepted when it was submitted, perhaps by an older version.
        Err(refusal) => refuse(
            ErrorCode::Internal,
            format!(
                "the specification of job `{}` can no longer be read: {}",
                job.job_id, refusal.message
            ),
        ),
    }
}

/// Lets a silo in if it may take part.
///
/// # Errors
/// `NOT_ENROLLED` if it is pending, suspended or revoked.
pub(crate) fn enrolled(silo_id: &SiloId, enrollment: Enrollment) -> Result<(), Failure> {
    let state = match enrollment {
        Enrollment::Active => return Ok(()),
        Enrollment::Suspended => "suspended",
        Enrollment::Revoked => "revoked",
        Enrollment::Pending | Enrollment::Unspecified => "waiting for an operator's approval",
    };
    refuse(
        ErrorCode::NotEnrolled,
        format!("silo `{silo_id}` is {state}; ask the federation's operator"),
    )
}

/// Applies an event to a round and stores what follows from it.
pub(crate) async fn apply(
    tx: &mut Tx<'_>,
    signer: &ReceiptSigner,
    job_id: &JobId,
    number: RoundNumber,
    event: Event,
    upload: Option<UploadId>,
    now: Timestamp,
) -> Result<Change, Failure> {
    let Some(mut round) = tx.round_machine(job_id, number).await? else {
        return refuse(
            ErrorCode::UnknownRound,
            format!("job `{job_id}` has no round {number}"),
        );
    };
    // An upload can outlast its silo's enrollment: what counts is what holds when it is recorded.
    if let Event::Contributed(contribution) = &event
        && let Some(silo) = tx.silo(&contribution.silo).await?
    {
        enrolled(&silo.silo_id, silo.enrollment)?;
    }
    let (before, deadline_before) = (round.phase(), round.next_deadline());
    let effects = round.apply(event, now)?;
    let mut change = Change::default();
    let mut failure = None;
    for effect in effects {
        match effect {
            Effect::Record(record) => {
                let row = row_of(&round, record, signer, upload, now);
                tx.record_outcome(job_id, number, &row).await?;
                change.record = Some(row);
            }
            Effect::Repeat(record) => {
                change.record = tx.round_silo(job_id, number, &record.silo).await?;
                change.repeated = true;
            }
            Effect::Publish { version } => change.published = Some(version),
            Effect::Fail { reason } => failure = Some(reason),
            // The phase says it.
            Effect::CloseForAggregation { .. } | Effect::Cancel => {}
        }
    }
    change.deadline_moved = round.next_deadline() != deadline_before;
    let phase = round.phase();
    if phase != before {
        let ended_at = phase.is_over().then_some(now);
        tx.set_round_phase(job_id, number, phase, ended_at, change.published)
            .await?;
        change.phases.push(phase);
        change.round_time = ended_at.map(|end| end.since(round.spec().opened_at));
    }
    if let Some(reason) = failure {
        tx.end_job(job_id, JobState::Failed, &reason, now).await?;
        change.job_state = Some(JobState::Failed);
    }
    Ok(change)
}

/// Ends a job before its time, with its open round if it has one.
pub(crate) async fn end(
    tx: &mut Tx<'_>,
    signer: &ReceiptSigner,
    job_id: &JobId,
    state: JobState,
    reason: &str,
    now: Timestamp,
) -> Result<Change, Failure> {
    let record = job(tx, job_id).await?;
    if record.has_ended() {
        return refuse(
            ErrorCode::JobEnded,
            format!("job `{job_id}` has already {}", record.state),
        );
    }
    let mut change = Change::default();
    if record.round > 0 {
        let number = RoundNumber(record.round);
        change = apply(tx, signer, job_id, number, Event::Cancel, None, now).await?;
    }
    // A round whose time was up has failed the job just now.
    if change.job_state.is_none() {
        tx.end_job(job_id, state, reason, now).await?;
        change.job_state = Some(state);
    }
    Ok(change)
}

/// The row for a machine's record; with the receipt if the record is of a payload.
fn row_of(
    round: &Round,
    record: Record,
    signer: &ReceiptSigner,
    upload: Option<UploadId>,
    now: Timestamp,
) -> RoundSiloRecord {
    let receipt = record.digest.map(|payload_digest| {
        let signed = signer.sign(Receipt {
            job: round.spec().job.clone(),
            round: round.spec().number,
            silo: record.silo.clone(),
            payload_digest,
            outcome: record.outcome,
            recorded_at: now,
        });
        signed.to_proto().encode_to_vec()
    });
    RoundSiloRecord {
        silo_id: record.silo,
        outcome: Some(record.outcome),
        recorded_at: Some(now),
        digest: record.digest,
        examples: record.examples,
        receipt,
        upload_id: upload.filter(|_| record.outcome == Outcome::Accepted),
    }
}

/// Decides what a running job without an open round does next, and stores it.
pub(crate) async fn step(
    tx: &mut Tx<'_>,
    job_id: &JobId,
    change: &mut Change,
    now: Timestamp,
) -> Result<(), Failure> {
    let job = job(tx, job_id).await?;
    if job.state != JobState::Running {
        return Ok(());
    }
    let spec = spec(&job)?;
    let rounds = tx.rounds(job_id).await?;
    if rounds.iter().any(|round| !round.phase.is_over()) {
        return Ok(());
    }
    let published = rounds
        .iter()
        .filter(|round| round.phase == RoundPhase::Published)
        .count() as u32;
    let last_end = rounds.last().and_then(|round| round.ended_at);
    let declined = tx
        .job_silos(job_id)
        .await?
        .into_iter()
        .filter(|silo| silo.declined.is_some())
        .map(|silo| silo.silo_id)
        .collect();
    let progress = Progress {
        published,
        declined,
        idle_since: last_end.or(job.started_at).unwrap_or(job.submitted_at),
    };
    match next_step(&spec, &progress, &roster(tx).await?, now) {
        Step::Open { number, cohort } => {
            open_round(tx, &job, &spec, number, cohort, now).await?;
            change.phases.push(RoundPhase::Announced);
        }
        Step::Wait { until } => change.wait_until = Some(until),
        Step::Succeed => {
            tx.end_job(job_id, JobState::Succeeded, "", now).await?;
            change.job_state = Some(JobState::Succeeded);
        }
        Step::Fail { reason } => {
            tx.end_job(job_id, JobState::Failed, &reason, now).await?;
            change.job_state = Some(JobState::Failed);
        }
    }
    Ok(())
}

async fn roster(tx: &mut Tx<'_>) -> Result<Roster, Failure> {
    let mut roster = Roster::default();
    for silo in tx.silos().await? {
        let side = match silo.enrollment {
            Enrollment::Active => &mut roster.active,
            _ => &mut roster.barred,
        };
        side.insert(silo.silo_id);
    }
    Ok(roster)
}

async fn open_round(
    tx: &mut Tx<'_>,
    job: &JobRecord,
    spec: &TrainingSpec,
    number: RoundNumber,
    cohort: BTreeSet<SiloId>,
    now: Timestamp,
) -> Result<(), Failure> {
    let Some(base) = job.adapter_version else {
        return Err(Refusal::new(
            ErrorCode::Internal,
            format!("job `{}` runs without an adapter", job.job_id),
        )
        .into());
    };
    tx.add_job_silos(&job.job_id, &cohort).await?;
    let round = Round::new(RoundSpec {
        job: job.job_id.clone(),
        number,
        cohort,
        window: (&spec.rounds).into(),
        base,
        opened_at: now,
    });
    tx.insert_round(&round).await?;
    tx.set_job_round(&job.job_id, number).await?;
    Ok(())
}
