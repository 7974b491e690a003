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
/// A worker that lived this long did not fail at its start.
const LONG_LIFE: Duration = Duration::from_mins(1);
/// Longest time that a worker gets to save its work at the server's stop.
const STOP_GRACE: Duration = Duration::from_secs(10);

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
        let wanted = is_work_waiting(&context).await.unwrap_or_else(|error| {
            tracing::warn!(%error, "cannot look for jobs that wait for a worker; trying again");
            false
        });
        if !wanted {
            tokio::select! {
                () = tokio::time::sleep(LOOK_AGAIN) => {}
                // The hub lives in the context, so that the sender cannot be gone.
                _ = changes.changed() => {}
                () = stop.cancelled() => {}
            }
            continue;
        }
        let began = Instant::now();
        if run_one(&context, &command).await && began.elapsed() >= LONG_LIFE {
            pause = FIRST_PAUSE;
            continue;
        }
        // Also one that ended well at once although there is work: something is wrong with it.
        tokio::select! {
            () = tokio::time::sleep(pause) => {}
            () = stop.cancelled() => {}
        }
        pause = if began.elapsed() >= LONG_LIFE {
            FIRST_PAUSE
        } else {
            (pause * 2).min(LONGEST_PAUSE)
        };
    }
}

/// Runs one worker to its end, or to the server's; gives whether it ended well.
async fn run_one(context: &Arc<Context>, command: &WorkerCommand) -> bool {
    let shutdown = &context.shutdown;
    let mut process = match Process::start(command) {
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
            let grace = STOP_GRACE.min(context.config.stop_timeout / 2);
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
