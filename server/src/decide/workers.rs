//! The decisions about jobs that workers run, as parts of transactions.
//!
//! A job is in one worker's hands at a time: whoever shows the token of the lease that has not run out. Everything that a
//! worker changes goes through [`gripped`] in the same transaction, so that a worker which lost its lease changes nothing.

use std::{collections::BTreeSet, time::Duration};

use concord_common::{ErrorCode, JobId, Timestamp, job::artaug, round::job::JobState};
use concord_proto::v1;

use super::job;
use crate::{
    datastore::{JobRecord, Tx, WorkerJobRecord, WorkerLease},
    error::{Failure, refuse},
    hub::Hub,
    metrics,
};

/// Leases that may run out in a row without a new line in the journal; then the job fails.
pub(crate) const MAX_IDLE_ATTEMPTS: u32 = 3;

/// How long younger jobs go before one that a worker gave back because of some trouble.
const PUT_OFF: Duration = Duration::from_mins(5);

/// How a lease ends that was not renewed in time.
const EXPIRED: &str = "expired";

/// Who says that it holds which job.
#[derive(Clone, Debug)]
pub(crate) struct Grip {
    pub job_id: JobId,
    pub token: [u8; 16],
    /// From the certificate.
    pub worker: String,
}

impl Grip {
    fn fits(&self, lease: &WorkerLease) -> bool {
        lease.token == self.token && lease.worker == self.worker
    }
}

/// What a transaction changed, for those outside.
#[derive(Clone, Debug)]
pub(crate) struct WorkerChange {
    job_id: JobId,
    /// State that the job came into.
    job_state: Option<JobState>,
    /// How a lease began or ended.
    lease: Option<&'static str>,
    /// Whether there may be work for a worker that there was not before.
    work: bool,
}

impl WorkerChange {
    fn new(job_id: &JobId) -> Self {
        Self {
            job_id: job_id.clone(),
            job_state: None,
            lease: None,
            work: false,
        }
    }

    /// Tells metrics and watchers; to be called once, after the commit.
    pub(crate) fn announce(&self, hub: &Hub) {
        let job_id = &self.job_id;
        if let Some(outcome) = self.lease {
            metrics::worker_lease(outcome);
        }
        if self.lease == Some(EXPIRED) {
            tracing::warn!(job.id = %job_id, "a worker lost its job: it did not renew its lease in time");
        }
        if let Some(state) = self.job_state {
            metrics::job(state);
            metrics::worker_job(state);
            tracing::info!(job.id = %job_id, state = %state, "job changed its state");
        }
        hub.job_changed(job_id);
        if self.work {
            hub.workers_changed();
        }
    }
}

/// The workers' part of a job that must be one of theirs.
pub(crate) async fn worker_job(
    tx: &mut Tx<'_>,
    job_id: &JobId,
) -> Result<(JobRecord, WorkerJobRecord), Failure> {
    let record = job(tx, job_id).await?;
    match tx.worker_job(job_id).await? {
        Some(worker) => Ok((record, worker)),
        None => refuse(
            ErrorCode::WrongKind,
            format!(
                "job `{job_id}` is of kind `{}`; this is for jobs of kind `{}`",
                record.kind,
                artaug::KIND
            ),
        ),
    }
}

/// The job that a worker holds.
///
/// # Errors
/// `LEASE_LOST` if it does not.
pub(crate) async fn gripped(
    tx: &mut Tx<'_>,
    grip: &Grip,
    now: Timestamp,
) -> Result<WorkerJobRecord, Failure> {
    let record = tx.worker_job(&grip.job_id).await?;
    match record {
        Some(record) if record.holder(now).is_some_and(|lease| grip.fits(lease)) => Ok(record),
        _ => lost(&grip.job_id),
    }
}

fn lost<T>(job_id: &JobId) -> Result<T, Failure> {
    refuse(
        ErrorCode::LeaseLost,
        format!(
            "this worker does not hold job `{job_id}`, or no longer; drop it and claim a job again"
        ),
    )
}

/// Ends the leases that have run out. A job that was lost again and again without getting on fails.
pub(crate) async fn expire(tx: &mut Tx<'_>, now: Timestamp) -> Result<Vec<WorkerChange>, Failure> {
    let mut changes = Vec::new();
    for record in tx.lost_jobs(now).await? {
        let job_id = &record.job_id;
        let mut change = WorkerChange::new(job_id);
        change.work = true;
        if record.has_ended {
            // It was cancelled, and its worker never asked again.
            tx.free_worker_job(job_id, record.idle_attempts).await?;
            changes.push(change);
            continue;
        }
        change.lease = Some(EXPIRED);
        let is_idle = record.lines == record.lines_at_claim;
        let spared = record.lease.as_ref().is_some_and(|lease| lease.spared);
        let idle_attempts = match (spared, is_idle) {
            // The server was away: that the worker is too since then says nothing about the job.
            (true, _) => record.idle_attempts,
            (false, true) => record.idle_attempts + 1,
            (false, false) => 0,
        };
        tx.free_worker_job(job_id, idle_attempts).await?;
        if idle_attempts >= MAX_IDLE_ATTEMPTS {
            let reason = format!(
                "{idle_attempts} times in a row a worker lost the job without having got on with it; the worker's log says why"
            );
            tx.stop_asking(job_id).await?;
            tx.end_job(job_id, JobState::Failed, &reason, now).await?;
            change.job_state = Some(JobState::Failed);
        }
        changes.push(change);
    }
    Ok(changes)
}

/// A job for a worker.
#[derive(Clone, Debug)]
pub(crate) struct Claimed {
    pub job: JobRecord,
    pub worker: WorkerJobRecord,
    pub lease: WorkerLease,
}

/// The oldest job that a worker may take, unless as many are held as may be.
pub(crate) async fn waiting_job(
    tx: &mut Tx<'_>,
    max_running: usize,
    now: Timestamp,
) -> Result<Option<WorkerJobRecord>, Failure> {
    if tx.held_jobs(now).await? >= max_running as u64 {
        return Ok(None);
    }
    Ok(tx.claimable_job(artaug::KIND, now).await?)
}

/// Gives a worker the oldest job that waits.
pub(crate) async fn claim(
    tx: &mut Tx<'_>,
    worker: &str,
    token: [u8; 16],
    duration: Duration,
    max_running: usize,
    now: Timestamp,
) -> Result<(Vec<WorkerChange>, Option<Claimed>), Failure> {
    let mut changes = expire(tx, now).await?;
    let Some(found) = waiting_job(tx, max_running, now).await? else {
        return Ok((changes, None));
    };
    let job_id = &found.job_id;
    let lease = WorkerLease {
        worker: worker.to_owned(),
        token,
        expires_at: now + duration,
        spared: false,
    };
    let mut change = WorkerChange::new(job_id);
    change.lease = Some("granted");
    if job(tx, job_id).await?.state == JobState::Queued {
        tx.start_worker_job(job_id, now).await?;
        change.job_state = Some(JobState::Running);
    }
    tx.take_worker_job(job_id, &lease).await?;
    changes.push(change);
    let (job, worker) = worker_job(tx, job_id).await?;
    Ok((changes, Some(Claimed { job, worker, lease })))
}

/// Renews a lease and says what the worker is to do, and the number of the newest word on a pair.
pub(crate) async fn renew(
    tx: &mut Tx<'_>,
    grip: &Grip,
    progress: Option<&v1::ArtaugProgress>,
    duration: Duration,
    now: Timestamp,
) -> Result<(WorkerChange, v1::WorkerCommand, u64), Failure> {
    let job_id = &grip.job_id;
    let mut change = WorkerChange::new(job_id);
    if let Some(record) = tx.worker_job(job_id).await?
        && record.has_ended
        && record.lease.is_some_and(|lease| grip.fits(&lease))
    {
        // Told once: the next job need not wait until this lease has run out.
        tx.free_worker_job(job_id, record.idle_attempts).await?;
        change.lease = Some("cancelled");
        change.work = true;
        return Ok((change, v1::WorkerCommand::Cancel, record.reviews));
    }
    let record = gripped(tx, grip, now).await?;
    tx.renew_worker_lease(job_id, now + duration).await?;
    note_progress(tx, &record, progress).await?;
    let command = if record.paused {
        v1::WorkerCommand::Pause
    } else {
        v1::WorkerCommand::GoOn
    };
    Ok((change, command, record.reviews))
}

/// Keeps how far a job is. Once it has gone on from the review, nobody is asked about its pairs any more.
async fn note_progress(
    tx: &mut Tx<'_>,
    record: &WorkerJobRecord,
    progress: Option<&v1::ArtaugProgress>,
) -> Result<(), Failure> {
    let Some(progress) = progress else {
        return Ok(());
    };
    if record.progress.as_ref() != Some(progress) {
        tx.set_worker_progress(&record.job_id, progress).await?;
    }
    if record.waiting_iteration.is_some()
        && !matches!(progress.stage.as_str(), "" | "filter" | "review")
    {
        tx.stop_asking(&record.job_id).await?;
    }
    Ok(())
}

/// Why a worker gives a job back.
#[derive(Clone, Debug)]
pub(crate) enum Release {
    Succeeded,
    Failed {
        reason: String,
    },
    Stopped {
        /// What holds the job up, if that is why.
        trouble: Option<String>,
    },
    Paused,
    Review {
        iteration: u32,
        waiting: BTreeSet<u32>,
    },
}

impl Release {
    /// For logs.
    pub(crate) fn name(&self) -> &'static str {
        match self {
            Self::Succeeded => "succeeded",
            Self::Failed { .. } => "failed",
            Self::Stopped { trouble: None } => "stopped",
            Self::Stopped { trouble: Some(_) } => "held up",
            Self::Paused => "paused",
            Self::Review { .. } => "waits for review",
        }
    }
}

/// Takes a job back from its worker.
pub(crate) async fn release(
    tx: &mut Tx<'_>,
    grip: &Grip,
    release: &Release,
    reviews: u64,
    progress: Option<&v1::ArtaugProgress>,
    now: Timestamp,
) -> Result<WorkerChange, Failure> {
    let record = gripped(tx, grip, now).await?;
    let job_id = &grip.job_id;
    if reviews > record.reviews {
        let problem = format!("the newest word on a pair has number {}", record.reviews);
        return Err(concord_common::wire::invalid_field("reviews", problem).into());
    }
    note_progress(tx, &record, progress).await?;
    tx.set_reviews_done(job_id, reviews).await?;
    tx.free_worker_job(job_id, record.idle_attempts).await?;
    let mut change = WorkerChange::new(job_id);
    change.lease = Some("released");
    change.work = true;
    match release {
        Release::Succeeded => {
            tx.stop_asking(job_id).await?;
            tx.end_job(job_id, JobState::Succeeded, "", now).await?;
            change.job_state = Some(JobState::Succeeded);
        }
        Release::Failed { reason } => {
            tx.stop_asking(job_id).await?;
            tx.end_job(job_id, JobState::Failed, reason, now).await?;
            change.job_state = Some(JobState::Failed);
        }
        Release::Stopped { trouble: None } | Release::Paused => {}
        Release::Stopped {
            trouble: Some(trouble),
        } => tx.put_off(job_id, trouble, now + PUT_OFF).await?,
        Release::Review { iteration, waiting } => {
            tx.wait_for_reviews(job_id, *iteration, waiting).await?;
        }
    }
    Ok(change)
}

/// Ends a job on an operator's word. Its worker is told when it renews its lease; all else that it does is refused from now on.
pub(crate) async fn cancel(
    tx: &mut Tx<'_>,
    job_id: &JobId,
    reason: &str,
    now: Timestamp,
) -> Result<WorkerChange, Failure> {
    let (record, _) = worker_job(tx, job_id).await?;
    not_ended(&record)?;
    tx.stop_asking(job_id).await?;
    tx.end_job(job_id, JobState::Cancelled, reason, now).await?;
    let mut change = WorkerChange::new(job_id);
    change.job_state = Some(JobState::Cancelled);
    change.work = true;
    Ok(change)
}

/// Lets a job rest, or go on. Gives nothing if that is the case already.
pub(crate) async fn set_paused(
    tx: &mut Tx<'_>,
    job_id: &JobId,
    paused: bool,
) -> Result<Option<WorkerChange>, Failure> {
    let (record, worker) = worker_job(tx, job_id).await?;
    not_ended(&record)?;
    if worker.paused == paused {
        return Ok(None);
    }
    tx.set_paused(job_id, paused).await?;
    let mut change = WorkerChange::new(job_id);
    change.work = !paused;
    Ok(Some(change))
}

/// Condemns all that is kept for a job that has ended; gives the bytes that it keeps. What follows is
/// [`give_up`](crate::driver::give_up), or the next start of the server. Nothing but those bytes is given if that was done before.
pub(crate) async fn delete_files(
    tx: &mut Tx<'_>,
    job_id: &JobId,
    now: Timestamp,
) -> Result<(Option<WorkerChange>, u64), Failure> {
    let (record, worker) = worker_job(tx, job_id).await?;
    if !record.has_ended() {
        return refuse(
            ErrorCode::JobNotEnded,
            format!(
                "job `{job_id}` is {}: its files can be deleted once it has ended; cancel it first",
                record.state
            ),
        );
    }
    if worker.files_deleted_at.is_some() {
        return Ok((None, worker.kept_bytes()));
    }
    tx.condemn_files(job_id, now).await?;
    Ok((Some(WorkerChange::new(job_id)), worker.kept_bytes()))
}

/// Records an operator's words on pairs and gives the number of pairs that still wait.
pub(crate) async fn review(
    tx: &mut Tx<'_>,
    job_id: &JobId,
    iteration: u32,
    words: &[(u32, bool)],
    operator: &str,
    now: Timestamp,
) -> Result<(WorkerChange, u32), Failure> {
    let (record, worker) = worker_job(tx, job_id).await?;
    not_ended(&record)?;
    let asked = tx.asked_pairs(job_id).await?;
    let asked: BTreeSet<u32> = asked.into_iter().map(|(item, _)| item).collect();
    let strange = words.iter().find(|(item, _)| !asked.contains(item));
    if worker.waiting_iteration != Some(iteration) || strange.is_some() {
        let what = strange.map_or_else(
            || format!("iteration {iteration}"),
            |(item, _)| format!("pair {item} of iteration {iteration}"),
        );
        return refuse(
            ErrorCode::NotWaiting,
            format!("{what} of job `{job_id}` waits for no word; list what waits and try again"),
        );
    }
    let words: Vec<_> = (worker.reviews + 1..)
        .zip(words)
        .map(|(number, &(item, accepted))| v1::PairReview {
            number,
            iteration,
            item,
            accepted,
        })
        .collect();
    tx.insert_reviews(job_id, &words, operator, now).await?;
    let open = tx.asked_pairs(job_id).await?;
    let open = open.iter().filter(|(_, answered)| !answered).count();
    let mut change = WorkerChange::new(job_id);
    change.work = true;
    Ok((change, open as u32))
}

fn not_ended(job: &JobRecord) -> Result<(), Failure> {
    if job.has_ended() {
        return refuse(
            ErrorCode::JobEnded,
            format!("job `{}` has already {}", job.job_id, job.state),
        );
    }
    Ok(())
}
