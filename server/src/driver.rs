//! The round driver: takes jobs out of the queue in order, a bounded number at a time, and drives each to its end.
//!
//! All that it knows is in the database: after a restart it takes up every running job where it stands. A job's task waits
//! for changes and deadlines, and lets the pure machines decide inside transactions.

use std::{collections::HashMap, io::Write as _, sync::Arc, time::Duration};

use concord_common::{
    Digest, JobId, RoundNumber, Timestamp,
    adapter::{AdapterVersion, encode_f32},
    job::{FEDERATED, TrainingSpec},
    lifecycle::Heartbeat,
    round::job::JobState,
};
use tokio::task::{Id, JoinSet};

use crate::{
    blobs::BlobStore,
    context::Context,
    datastore::{JobRecord, RoundRecord, VersionRecord},
    decide::{self, Change},
    error::Failure,
    metrics,
};

mod aggregate;
mod job;
mod sweep;
mod verify;
pub(crate) mod workers;

pub(crate) use sweep::{finish_deletions, give_up};

#[cfg(test)]
pub(crate) use {sweep::sweep as sweep_now, verify::verify as verify_now};

/// Wait before something that failed is tried again.
const RETRY: Duration = Duration::from_secs(1);
/// How often the database is looked at although nobody announced a change: a call whose caller has gone away may have
/// been dropped between its commit and the announcement.
const LOOK_AGAIN: Duration = Duration::from_secs(3);
/// Longest sleep towards a deadline before the clock is read again: it may have been set, or belong to a test.
const CLOCK_CHECK: Duration = Duration::from_millis(500);
/// The driver counts as stuck after this time without a turn: much longer than the database waits for itself.
const ALLOWANCE: Duration = Duration::from_mins(3);

/// Longest wait for a place among [`Context::long_work`] before the driver counts as stuck.
const LONG_WORK_ALLOWANCE: Duration = Duration::from_hours(1);

/// How long silos may take to find a server that is back: two of their longest waits (`server.max_backoff`).
const RETURN: Duration = Duration::from_mins(2);

/// Elements of a new adapter that are encoded at once.
const ELEMENTS_AT_ONCE: usize = 1 << 16;

/// Runs jobs until the server stops; then lets go of them, to be taken up by the next start.
pub async fn run(context: Arc<Context>) {
    let stop = context.shutdown.token();
    let heart = context.shutdown.heartbeat("driver", ALLOWANCE);
    let mut running = Running::default();
    loop {
        heart.beat();
        let filled = tokio::select! {
            filled = fill(&context, &mut running, &heart) => filled,
            // A new adapter may take long, and longer while others are being aggregated; the next start draws it again.
            () = stop.cancelled() => break,
        };
        let retry = match filled {
            Ok(()) => None,
            Err(error) => {
                tracing::error!(%error, "cannot take jobs out of the queue; trying again");
                Some(RETRY)
            }
        };
        tokio::select! {
            () = stop.cancelled() => break,
            () = context.hub.queue_change() => {}
            () = tokio::time::sleep(retry.unwrap_or(LOOK_AGAIN)) => {}
            Some(ended) = running.tasks.join_next_with_id() => match ended {
                Ok((task, ())) => { running.jobs.remove(&task); }
                Err(error) => {
                    // The job's state is in the database, from which the next turn takes it up again.
                    let job_id = running.jobs.remove(&error.id());
                    let job_id = job_id.as_ref().map(JobId::as_str);
                    tracing::error!(job.id = job_id, %error, "a job's task broke off");
                    tokio::time::sleep(RETRY).await;
                }
            },
        }
    }
    running.tasks.shutdown().await;
}

/// Keeps open rounds open for a while, for the start of the server: a round's time may have run out while no server was there, and
/// its silos have finished updates in their hands.
pub(crate) async fn spare(context: &Context) -> Result<(), Failure> {
    let (now, grace) = (context.now(), context.config.jobs.lease + RETURN);
    let spared = context
        .datastore
        .run_tx("spare_rounds", |tx| {
            Box::pin(async move {
                let mut spared = 0;
                for job in tx.jobs_in_state(JobState::Running, FEDERATED).await? {
                    let number = RoundNumber(job.round);
                    let Some(round) = tx.round(&job.job_id, number).await? else {
                        continue;
                    };
                    if let Some(max_time) = spared_time(&round, now, grace) {
                        tx.set_round_time(&job.job_id, number, max_time).await?;
                        spared += 1;
                    }
                }
                Ok::<_, Failure>(spared)
            })
        })
        .await?;
    if spared > 0 {
        tracing::info!(
            rounds = spared,
            "open rounds wait longer, for silos to come back"
        );
    }
    Ok(())
}

/// The time after its announcement at which an open round is to close at the latest so that it stays open for `grace` from now on,
/// or for as long as it was open at most before; none if it does so anyway.
fn spared_time(round: &RoundRecord, now: Timestamp, grace: Duration) -> Option<Duration> {
    let max_time = round.closes_at.since(round.announced_at);
    let wanted = (now + grace.min(max_time)).since(round.announced_at);
    (round.phase.is_open() && wanted > max_time).then_some(wanted)
}

/// Sweeps out what is no longer needed until the server stops. Apart from [`run`], which waits for the database now and then
/// and must not find it held by a sweep that nobody goes on with in the meantime.
pub async fn sweep(context: Arc<Context>) {
    let stop = context.shutdown.token();
    tokio::select! {
        () = stop.cancelled() => {}
        () = sweep::run(&context) => {}
    }
}

/// The jobs that are being driven.
#[derive(Default)]
struct Running {
    tasks: JoinSet<()>,
    jobs: HashMap<Id, JobId>,
}

impl Running {
    /// Drives a job unless it is being driven.
    fn take_up(&mut self, context: &Arc<Context>, job_id: JobId) {
        if !self.jobs.values().any(|running| *running == job_id) {
            let task = job::drive(Arc::clone(context), job_id.clone());
            self.jobs.insert(self.tasks.spawn(task).id(), job_id);
        }
    }
}

/// Starts what is running in the database and not here, then queued jobs as far as there is room.
async fn fill(
    context: &Arc<Context>,
    running: &mut Running,
    heart: &Heartbeat,
) -> Result<(), Failure> {
    let (active, queued) = context
        .datastore
        .run_read("list_work", |tx| {
            Box::pin(async move {
                Ok::<_, Failure>((
                    tx.jobs_in_state(JobState::Running, FEDERATED).await?,
                    tx.jobs_in_state(JobState::Queued, FEDERATED).await?,
                ))
            })
        })
        .await?;
    for record in active {
        running.take_up(context, record.job_id);
    }
    for record in queued {
        if running.jobs.len() >= context.config.jobs.max_running {
            break;
        }
        heart.beat();
        match start(context, &record, heart).await {
            Ok(()) => {}
            Err(Failure::Refused(refusal)) => {
                fail(context, &record.job_id, &refusal.message).await?;
                continue;
            }
            Err(other) => return Err(other),
        }
        running.take_up(context, record.job_id);
    }
    Ok(())
}

/// Draws a queued job's first adapter and marks it as running, with its first round if there are silos.
async fn start(
    context: &Arc<Context>,
    record: &JobRecord,
    heart: &Heartbeat,
) -> Result<(), Failure> {
    let spec = decide::spec(record)?;
    context.config.check_adapter(&spec)?;
    let blobs = context.blobs.clone();
    heart.beat_within(LONG_WORK_ALLOWANCE);
    let beating = heart.clone();
    let (version, payload_bytes) = context
        .long_work(move || draw(&blobs, &spec, &beating))
        .await??;
    heart.beat();
    let now = context.now();
    let first = VersionRecord {
        round: 0,
        version,
        payload_bytes,
        created_at: now,
    };
    let job_id = &record.job_id;
    let first = &first;
    let change = context
        .datastore
        .run_tx("start_job", |tx| {
            Box::pin(async move {
                let mut change = Change::default();
                // It may have been cancelled in the meantime.
                if decide::job(tx, job_id).await?.state == JobState::Queued {
                    tx.start_job(job_id, first.version, now).await?;
                    tx.insert_version(job_id, first).await?;
                    change.job_state = Some(JobState::Running);
                    decide::step(tx, job_id, &mut change, now).await?;
                }
                Ok::<_, Failure>(change)
            })
        })
        .await?;
    context.blobs.settled(&first.version.0);
    change.announce(job_id, &context.hub);
    Ok(())
}

/// Stores a job's first adapter, which is in memory one tensor at a time only. Blocking; gives its version and size.
fn draw(
    blobs: &BlobStore,
    spec: &TrainingSpec,
    heart: &Heartbeat,
) -> Result<(AdapterVersion, u64), Failure> {
    let failed = || Failure::io("cannot store a job's first adapter");
    let mut writer = blobs.create().map_err(failed())?;
    let mut hasher = blake3::Hasher::new();
    for tensor in spec.initial_tensors()? {
        for elements in tensor.chunks(ELEMENTS_AT_ONCE) {
            heart.beat();
            let bytes = encode_f32(elements);
            hasher.update(&bytes);
            writer.write_all(&bytes).map_err(failed())?;
        }
    }
    heart.beat();
    let digest = Digest::from(hasher.finalize());
    let bytes = writer.finish(&digest).map_err(failed())?;
    Ok((AdapterVersion(digest), bytes))
}

/// Draws a job's first adapter anew and stores it; gives its version.
async fn redraw(context: &Arc<Context>, record: &JobRecord) -> Result<AdapterVersion, Failure> {
    let spec = decide::spec(record)?;
    let blobs = context.blobs.clone();
    // Nobody waits for this one.
    let heart = Heartbeat::new("a new adapter", ALLOWANCE);
    let (version, _) = context
        .long_work(move || draw(&blobs, &spec, &heart))
        .await??;
    context.blobs.settled(&version.0);
    // Transfers may have read the damaged file.
    context.pieces.forget(version);
    Ok(version)
}

/// Ends a job that the server cannot go on with.
async fn fail(context: &Context, job_id: &JobId, reason: &str) -> Result<(), Failure> {
    let now = context.now();
    let signer = &context.signer;
    let change = context
        .datastore
        .run_tx("fail_job", |tx| {
            Box::pin(decide::end(
                tx,
                signer,
                job_id,
                JobState::Failed,
                reason,
                now,
            ))
        })
        .await?;
    change.announce(job_id, &context.hub);
    Ok(())
}

/// Sleeps until the clock shows `deadline`.
async fn sleep_until(context: &Context, deadline: Timestamp) {
    loop {
        let left = deadline.since(context.now());
        if left.is_zero() {
            return;
        }
        tokio::time::sleep(left.min(CLOCK_CHECK)).await;
    }
}

/// Counts a job as running as long as it is driven.
fn level() -> metrics::Level {
    metrics::Level::running_job()
}
