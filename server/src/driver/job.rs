//! One job, from where it stands to its end.

use std::sync::Arc;

use concord_common::{
    JobId, RoundNumber, Timestamp,
    round::{Event, Round, RoundPhase, job::JobState},
};

use super::{LOOK_AGAIN, RETRY, aggregate, fail, level, sleep_until, verify};
use crate::{
    context::Context,
    decide::{self, Change},
    error::Failure,
};

/// Times that the disk may fail a job before it is ended.
const MAX_DISK_FAULTS: u32 = 20;

/// What there is to do.
enum Next {
    /// Nothing any more.
    Over,
    /// Wait for contributions until the deadline.
    Collect {
        round: RoundNumber,
        deadline: Timestamp,
    },
    /// Aggregate the contributions.
    Aggregate(Box<Round>),
    /// Decide what comes after the last round.
    Step,
}

/// Drives a job to its end. Faults of the server are logged and tried again.
pub(super) async fn drive(context: Arc<Context>, job_id: JobId) {
    let _level = level();
    let mut changes = context.hub.watch_due(&job_id);
    let mut disk_faults = 0;
    let mut verified = false;
    loop {
        changes.mark_unchanged();
        let wake = match turn(&context, &job_id, &mut verified).await {
            Ok(Wake::Never) => return,
            Ok(Wake::Now) => {
                disk_faults = 0;
                continue;
            }
            Ok(Wake::At(deadline)) => deadline,
            Err(error) => {
                tracing::error!(job.id = %job_id, %error, "cannot drive a job on");
                disk_faults += u32::from(matches!(error, Failure::Io { .. }));
                if let Err(error) = give_up(&context, &job_id, &error, disk_faults).await {
                    tracing::error!(job.id = %job_id, %error, "cannot end a job either");
                }
                context.now() + RETRY
            }
        };
        tokio::select! {
            () = sleep_until(&context, wake) => {}
            () = tokio::time::sleep(LOOK_AGAIN) => {}
            // The context holds the sender, so that it cannot be gone.
            _ = changes.changed() => {}
        }
    }
}

/// Ends the job if trying again cannot help.
async fn give_up(
    context: &Context,
    job_id: &JobId,
    error: &Failure,
    disk_faults: u32,
) -> Result<(), Failure> {
    match error {
        Failure::Refused(refusal) => fail(context, job_id, &refusal.message).await,
        _ if disk_faults >= MAX_DISK_FAULTS => {
            let reason =
                "the server cannot read or write this job's files; its log has the details";
            fail(context, job_id, reason).await
        }
        _ => Ok(()),
    }
}

/// When to look at the job again, at the latest.
enum Wake {
    Never,
    Now,
    At(Timestamp),
}

/// Makes sure of the job's files at first, then acts.
async fn turn(
    context: &Arc<Context>,
    job_id: &JobId,
    verified: &mut bool,
) -> Result<Wake, Failure> {
    if !*verified {
        verify::verify(context, job_id).await?;
        *verified = true;
    }
    act(context, job_id).await
}

async fn act(context: &Arc<Context>, job_id: &JobId) -> Result<Wake, Failure> {
    match look(context, job_id).await? {
        Next::Over => Ok(Wake::Never),
        Next::Collect { round, deadline } if deadline <= context.now() => {
            tick(context, job_id, round).await?;
            Ok(Wake::Now)
        }
        Next::Collect { deadline, .. } => Ok(Wake::At(deadline)),
        Next::Aggregate(round) => {
            aggregate::publish(context, &round).await?;
            Ok(Wake::Now)
        }
        Next::Step => {
            let change = step(context, job_id).await?;
            Ok(change.wait_until.map_or(Wake::Now, Wake::At))
        }
    }
}

async fn look(context: &Context, job_id: &JobId) -> Result<Next, Failure> {
    context
        .datastore
        .run_read("look_at_job", |tx| {
            Box::pin(async move {
                let job = decide::job(tx, job_id).await?;
                if job.state != JobState::Running {
                    return Ok(Next::Over);
                }
                let Some(round) = tx.round_machine(job_id, RoundNumber(job.round)).await? else {
                    return Ok(Next::Step);
                };
                Ok::<_, Failure>(match (round.phase(), round.next_deadline()) {
                    (RoundPhase::Aggregating, _) => Next::Aggregate(Box::new(round)),
                    (_, Some(deadline)) => Next::Collect {
                        round: round.spec().number,
                        deadline,
                    },
                    (_, None) => Next::Step,
                })
            })
        })
        .await
}

async fn tick(context: &Context, job_id: &JobId, round: RoundNumber) -> Result<(), Failure> {
    let now = context.now();
    let signer = &context.signer;
    let change = context
        .datastore
        .run_tx("tick_round", |tx| {
            Box::pin(decide::apply(
                tx,
                signer,
                job_id,
                round,
                Event::Tick,
                None,
                now,
            ))
        })
        .await?;
    change.announce(job_id, &context.hub);
    Ok(())
}

async fn step(context: &Context, job_id: &JobId) -> Result<Change, Failure> {
    let now = context.now();
    let change = context
        .datastore
        .run_tx("step_job", |tx| {
            Box::pin(async move {
                let mut change = Change::default();
                decide::step(tx, job_id, &mut change, now).await?;
                Ok::<_, Failure>(change)
            })
        })
        .await?;
    if change.wait_until.is_none() {
        change.announce(job_id, &context.hub);
    }
    Ok(change)
}
