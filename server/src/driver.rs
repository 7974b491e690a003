//! The round driver: takes jobs out of the queue in order, a bounded number at a time, and drives each to its end.
//!
//! All that it knows is in the database: after a restart it takes up every running job where it stands. A job's task waits
//! for changes and deadlines, and lets the pure machines decide inside transactions.

use std::{collections::HashSet, sync::Arc, time::Duration};

use concord_common::{JobId, Timestamp, adapter::AdapterVersion, round::job::JobState};
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;

use crate::{
    context::Context,
    datastore::{JobRecord, VersionRecord},
    decide::{self, Change},
    error::Failure,
    metrics,
};

mod aggregate;
mod job;
mod sweep;

#[cfg(test)]
pub(crate) use sweep::sweep as sweep_now;

/// Wait before something that failed is tried again.
const RETRY: Duration = Duration::from_secs(1);
/// How often the database is looked at although nobody announced a change: a call whose caller has gone away may have
/// been dropped between its commit and the announcement.
const LOOK_AGAIN: Duration = Duration::from_secs(3);
/// Longest sleep towards a deadline before the clock is read again: it may have been set, or belong to a test.
const CLOCK_CHECK: Duration = Duration::from_millis(500);

/// Runs jobs until `stop`; then lets go of them, to be taken up by the next start.
pub async fn run(context: Arc<Context>, stop: CancellationToken) {
    let mut running: JoinSet<JobId> = JoinSet::new();
    let mut jobs: HashSet<JobId> = HashSet::new();
    let mut sweep = std::pin::pin!(sweep::run(&context));
    loop {
        let retry = match fill(&context, &mut running, &mut jobs).await {
            Ok(()) => None,
            Err(error) => {
                tracing::error!(%error, "cannot take jobs out of the queue; trying again");
                Some(RETRY)
            }
        };
        tokio::select! {
            () = stop.cancelled() => break,
            () = &mut sweep => {}
            () = context.hub.queue_change() => {}
            () = tokio::time::sleep(retry.unwrap_or(LOOK_AGAIN)) => {}
            Some(ended) = running.join_next() => match ended {
                Ok(job_id) => { jobs.remove(&job_id); }
                Err(error) => {
                    // The job's state is in the database; a task that broke off is started again with the others.
                    tracing::error!(%error, "a job's task broke off");
                    running.shutdown().await;
                    jobs.clear();
                }
            },
        }
    }
    running.shutdown().await;
}

/// Starts what is running in the database and not here, then queued jobs as far as there is room.
async fn fill(
    context: &Arc<Context>,
    running: &mut JoinSet<JobId>,
    jobs: &mut HashSet<JobId>,
) -> Result<(), Failure> {
    let (active, queued) = context
        .datastore
        .run_read("list_work", |tx| {
            Box::pin(async move {
                Ok::<_, Failure>((
                    tx.jobs_in_state(JobState::Running).await?,
                    tx.jobs_in_state(JobState::Queued).await?,
                ))
            })
        })
        .await?;
    for record in active {
        if jobs.insert(record.job_id.clone()) {
            running.spawn(job::drive(Arc::clone(context), record.job_id));
        }
    }
    for record in queued {
        if jobs.len() >= context.config.jobs.max_running {
            break;
        }
        match start(context, &record).await {
            Ok(()) => {}
            Err(Failure::Refused(refusal)) => {
                fail(context, &record.job_id, &refusal.message).await?;
                continue;
            }
            Err(other) => return Err(other),
        }
        if jobs.insert(record.job_id.clone()) {
            running.spawn(job::drive(Arc::clone(context), record.job_id));
        }
    }
    Ok(())
}

/// Draws a queued job's first adapter and marks it as running, with its first round if there are silos.
async fn start(context: &Arc<Context>, record: &JobRecord) -> Result<(), Failure> {
    let spec = decide::spec(record)?;
    let blobs = context.blobs.clone();
    let (version, payload_bytes) = tokio::task::spawn_blocking(move || {
        let payload = spec.initial_adapter()?;
        let digest = blobs
            .put(&payload)
            .map_err(Failure::io("cannot store a job's first adapter"))?;
        Ok::<_, Failure>((AdapterVersion(digest), payload.len() as u64))
    })
    .await??;
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
    change.announce(job_id, &context.hub);
    Ok(())
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
