//! Jobs that workers run, from the server's side: leases that run out, and the worker process that the server starts for
//! itself. Nothing here is ever waited for by the round driver.

use std::{sync::Arc, time::Duration};

use tokio::time::Instant;

use super::LOOK_AGAIN;
use crate::{
    config::WorkerCommand, context::Context, decide::workers, error::Failure, metrics,
    service::worker::is_work_waiting,
};

mod process;

use process::Process;

/// First and longest wait before a worker that failed is started again.
const FIRST_PAUSE: Duration = Duration::from_millis(500);
const LONGEST_PAUSE: Duration = Duration::from_mins(1);
/// Longest wait where something was recorded while the worker lived, if by whom is not known: it may well get on.
const PAUSE_AT_WORK: Duration = Duration::from_secs(2);
/// A worker that lived this long did not fail at its start.
const LONG_LIFE: Duration = Duration::from_mins(1);
/// Longest time that a worker gets to save its work at the server's stop.
const STOP_GRACE: Duration = Duration::from_secs(10);
/// What of it is for giving the job back.
const GIVING_BACK: Duration = Duration::from_secs(2);

/// Lets workers keep the jobs that they held when the server stopped, as long as if they had just renewed their leases: they could
/// not. For the start of the server, before it takes a call.
///
/// # Errors
/// If the database fails.
pub(crate) async fn spare(context: &Context) -> Result<(), Failure> {
    let until = context.now() + context.config.workers.lease;
    let held = context
        .datastore
        .run_tx("spare_job_leases", |tx| {
            Box::pin(async move { Ok::<_, Failure>(tx.spare_worker_leases(until).await?) })
        })
        .await?;
    if held > 0 {
        tracing::info!(
            jobs = held,
            "workers may go on with the jobs that they hold"
        );
    }
    Ok(())
}

/// Ends leases that have run out until the server stops, so that their jobs go on with other workers.
pub(crate) async fn leases(context: Arc<Context>) {
    let stop = context.shutdown.token();
    let mut changes = context.hub.watch_workers();
    while !stop.is_cancelled() {
        changes.mark_unchanged();
        if let Err(error) = expire(&context).await {
            tracing::warn!(%error, "cannot look for workers that are gone; trying again");
        }
        tokio::select! {
            () = tokio::time::sleep(LOOK_AGAIN) => {}
            // The hub lives in the context, so that the sender cannot be gone.
            _ = changes.changed() => {}
            () = stop.cancelled() => {}
        }
    }
}

async fn expire(context: &Arc<Context>) -> Result<(), Failure> {
    let now = context.now();
    let any = context
        .datastore
        .run_read("find_lost_jobs", |tx| {
            Box::pin(async move { Ok::<_, Failure>(!tx.lost_jobs(now).await?.is_empty()) })
        })
        .await?;
    if !any {
        return Ok(());
    }
    let shared = Arc::clone(context);
    let expired = async move {
        let changes = shared
            .datastore
            .run_tx("expire_job_leases", |tx| Box::pin(workers::expire(tx, now)))
            .await?;
        for change in changes {
            change.announce(&shared.hub);
        }
        Ok(())
    };
    context.to_the_end(expired).await
}

/// Runs a worker on this machine while there is work for one, until the server stops; then lets it save its work.
pub(crate) async fn supervise(context: Arc<Context>) {
    let stop = context.shutdown.token();
    // However this ends: nobody waits for the worker any more.
    let _ended = context.workers_ended.clone().drop_guard();
    let Some(command) = context.config.workers.command() else {
        stop.cancelled().await;
        return;
    };
    let mut changes = context.hub.watch_workers();
    let mut pause = FIRST_PAUSE;
    while !stop.is_cancelled() {
        changes.mark_unchanged();
        if !is_wanted(&context).await {
            tokio::select! {
                () = tokio::time::sleep(LOOK_AGAIN) => {}
                // The hub lives in the context, so that the sender cannot be gone.
                _ = changes.changed() => {}
                () = stop.cancelled() => {}
            }
            continue;
        }
        let (began, kept) = (Instant::now(), kept_bytes(&context).await);
        let is_well = run_one(&context, &command).await;
        // One that ended well at once although there is work: something is wrong with it.
        let was_useful = began.elapsed() >= LONG_LIFE || (is_well && !is_wanted(&context).await);
        let longest = match (kept, kept_bytes(&context).await) {
            (Some(before), Some(after)) if after > before => PAUSE_AT_WORK,
            _ => LONGEST_PAUSE,
        };
        tokio::select! {
            () = tokio::time::sleep(pause_after(&mut pause, longest, is_well, was_useful)) => {}
            () = stop.cancelled() => {}
        }
    }
}

async fn is_wanted(context: &Context) -> bool {
    is_work_waiting(context).await.unwrap_or_else(|error| {
        tracing::warn!(%error, "cannot look for jobs that wait for a worker; trying again");
        false
    })
}

/// What is kept for all jobs: a larger number after a worker's end means that work was recorded meanwhile.
async fn kept_bytes(context: &Context) -> Option<u64> {
    let kept = context.datastore.run_read("sum_kept_bytes", |tx| {
        Box::pin(async move { Ok::<_, Failure>(tx.all_kept_bytes().await?) })
    });
    match kept.await {
        Ok(bytes) => Some(bytes),
        Err(error) => {
            tracing::warn!(%error, "cannot see whether a worker has recorded anything");
            None
        }
    }
}

/// How long to wait after a worker's end, at most `longest` after a failure; `pause` becomes that of the next failure.
fn pause_after(
    pause: &mut Duration,
    longest: Duration,
    is_well: bool,
    was_useful: bool,
) -> Duration {
    if was_useful {
        *pause = FIRST_PAUSE;
        if is_well {
            return Duration::ZERO;
        }
    }
    let now = (*pause).min(longest);
    *pause = (now * 2).min(longest);
    now
}

/// How long a worker gets to save its work at the server's stop.
fn stop_grace(context: &Context) -> Duration {
    STOP_GRACE.min(context.config.stop_timeout / 2)
}

/// Runs one worker to its end, or to the server's; gives whether it ended well.
async fn run_one(context: &Arc<Context>, command: &WorkerCommand) -> bool {
    let shutdown = &context.shutdown;
    let grace = stop_grace(context);
    // It is to have given its job back before it is killed.
    let stop_within = grace.saturating_sub(GIVING_BACK).max(grace / 2);
    let mut process = match Process::start(command, stop_within) {
        Ok(process) => process,
        Err(error) => {
            let program = command.program.display();
            tracing::error!(%program, %error, "cannot start a worker");
            return false;
        }
    };
    metrics::worker_start();
    tracing::info!(process = process.id(), program = %command.program.display(), "started a worker");
    let ended = tokio::select! {
        ended = process.ended() => ended,
        () = shutdown.token().cancelled_owned() => {
            process.stop(grace, shutdown.hard_token()).await
        }
    };
    match ended {
        Ok(status) if status.success() => {
            tracing::info!(process = process.id(), "the worker has ended");
            true
        }
        Ok(status) => {
            tracing::warn!(process = process.id(), %status, "the worker has failed");
            false
        }
        Err(error) => {
            tracing::error!(process = process.id(), %error, "cannot tell how the worker ended");
            false
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pauses_grow_from_failure_to_failure_and_not_from_job_to_job() {
        let mut pause = FIRST_PAUSE;
        // Jobs of some seconds, one after the other.
        for _ in 0..10 {
            assert_eq!(
                pause_after(&mut pause, LONGEST_PAUSE, true, true),
                Duration::ZERO
            );
        }
        let waits: Vec<_> = (0..10)
            .map(|_| pause_after(&mut pause, LONGEST_PAUSE, false, false))
            .collect();
        assert_eq!(waits[..3], [FIRST_PAUSE, FIRST_PAUSE * 2, FIRST_PAUSE * 4]);
        assert_eq!(waits[9], LONGEST_PAUSE);
        // It ended well, and there is work all the same.
        assert_eq!(
            pause_after(&mut pause, LONGEST_PAUSE, true, false),
            LONGEST_PAUSE
        );
        // It failed after a long life.
        assert_eq!(
            pause_after(&mut pause, LONGEST_PAUSE, false, true),
            FIRST_PAUSE
        );
        assert_eq!(
            pause_after(&mut pause, LONGEST_PAUSE, true, true),
            Duration::ZERO
        );
    }

    #[test]
    fn a_worker_that_fails_while_work_is_recorded_waits_two_seconds_at_most() {
        let mut pause = LONGEST_PAUSE;
        for _ in 0..3 {
            let wait = pause_after(&mut pause, PAUSE_AT_WORK, false, false);
            assert_eq!(wait, PAUSE_AT_WORK);
        }
        let mut first = FIRST_PAUSE;
        let wait = pause_after(&mut first, PAUSE_AT_WORK, false, false);
        assert_eq!(wait, FIRST_PAUSE);
    }
}
