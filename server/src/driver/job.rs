//! One job, from where it stands to its end.

use std::{sync::Arc, time::Duration};

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

/// Times in a row that the disk may fail a job before it is ended, over a quarter of an hour. A full disk does not count.
const MAX_DISK_FAULTS: u32 = 20;
/// Longest wait after a fault of the disk.
const LONGEST_RETRY: Duration = Duration::from_mins(1);

/// Faults since the last turn that went well.
#[derive(Default)]
struct Faults {
    /// The disk's.
    of_disk: u32,
    /// Those of them that do not pass by themselves.
    lasting: u32,
}

impl Faults {
    /// Counts a fault; gives the wait until the next try, which grows as long as the disk fails.
    fn note(&mut self, error: &Failure) -> Duration {
        if !matches!(error, Failure::Io { .. }) {
            return RETRY;
        }
        let wait = RETRY * (1 << self.of_disk.min(6));
        self.of_disk += 1;
        self.lasting += u32::from(!error.wants_room());
        wait.min(LONGEST_RETRY)
    }

    /// Trying again has not helped.
    fn are_hopeless(&self) -> bool {
        self.lasting >= MAX_DISK_FAULTS
    }
}

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
    let mut faults = Faults::default();
    let mut verified = false;
    loop {
        changes.mark_unchanged();
        let wake = match turn(&context, &job_id, &mut verified).await {
            Ok(Wake::Never) => return,
            Ok(wake) => {
                faults = Faults::default();
                match wake {
                    Wake::At(deadline) => deadline,
                    _ => continue,
                }
            }
            Err(error) => {
                let wait = faults.note(&error);
                tracing::error!(job.id = %job_id, %error, retry_after = ?wait, "cannot drive a job on");
                if let Err(error) = give_up(&context, &job_id, &error, &faults).await {
                    tracing::error!(job.id = %job_id, %error, "cannot end a job either");
                }
                tokio::select! {
                    () = tokio::time::sleep(wait) => {}
                    // The job may have been cancelled.
                    _ = changes.changed() => {}
                }
                continue;
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
    faults: &Faults,
) -> Result<(), Failure> {
    match error {
        Failure::Refused(refusal) => fail(context, job_id, &refusal.message).await,
        _ if faults.are_hopeless() => {
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

#[cfg(test)]
mod tests {
    use std::io;

    use super::*;

    fn fault(source: io::Error) -> Failure {
        Failure::io("cannot store an aggregate")(source)
    }

    #[test]
    fn a_full_disk_never_ends_a_job_and_is_tried_less_and_less_often() {
        let wanting = [
            fault(io::ErrorKind::StorageFull.into()),
            fault(io::ErrorKind::QuotaExceeded.into()),
            fault(io::Error::from_raw_os_error(23)),
            fault(io::Error::from_raw_os_error(24)),
        ];
        let mut faults = Faults::default();
        let mut waits = Vec::new();
        for _ in 0..100 {
            waits.extend(wanting.iter().map(|error| faults.note(error).as_secs()));
        }
        assert!(!faults.are_hopeless());
        assert_eq!(waits[..8], [1, 2, 4, 8, 16, 32, 60, 60]);
    }

    #[test]
    fn a_disk_that_cannot_be_read_ends_a_job_after_a_while() {
        let mut faults = Faults::default();
        let mut waited = Duration::ZERO;
        while !faults.are_hopeless() {
            waited += faults.note(&fault(io::ErrorKind::PermissionDenied.into()));
        }
        assert!(waited > Duration::from_mins(10), "{waited:?}");
        assert_eq!(
            faults.note(&fault(io::ErrorKind::StorageFull.into())),
            LONGEST_RETRY
        );
    }
}
