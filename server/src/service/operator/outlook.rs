//! Why a job waits in the queue that a worker is to take.

use std::time::Duration;

use concord_common::{Timestamp, job::artaug};
use concord_proto::v1;

use crate::{context::Context, datastore::Tx, error::Failure};

/// A worker asks again sooner, also one that rests after trouble; one that is at work renews its lease.
const LATELY: Duration = Duration::from_mins(6);

/// What is said if nobody is known who would take a job.
const NOBODY: &str = "no worker asks for jobs: this server starts none (`workers.config` is not set), and none has called in the \
     last 6 minutes; the job waits until one does";

/// What is known of the workers.
#[derive(Debug, Clone, Copy)]
pub(super) struct Outlook {
    /// Jobs that workers hold, and the most that they may.
    held: u64,
    max_running: u64,
    /// Whether the server starts workers, or one has called lately.
    may_come: bool,
}

impl Outlook {
    /// Looks at settings, leases and the last call of a worker.
    pub(super) async fn look(
        context: &Context,
        tx: &mut Tx<'_>,
        now: Timestamp,
    ) -> Result<Self, Failure> {
        let settings = &context.config.workers;
        Ok(Self {
            held: tx.held_jobs(now).await?,
            max_running: settings.max_running as u64,
            may_come: settings.config.is_some() || context.workers_seen.within(LATELY, now),
        })
    }

    /// A sentence if nobody is known who would take this job at the moment.
    pub(super) fn warning(&self, job: &v1::Job) -> Option<&'static str> {
        (waits_in_queue(job) && !self.may_come && self.held == 0).then_some(NOBODY)
    }

    /// The job with the reason why it waits in the queue, if it does and the reason is known.
    pub(super) fn explained(&self, mut job: v1::Job) -> v1::Job {
        if !waits_in_queue(&job) || job.paused || !job.reason.is_empty() {
            return job;
        }
        if let Some(warning) = self.warning(&job) {
            warning.clone_into(&mut job.reason);
        } else if self.held >= self.max_running {
            job.reason = format!(
                "workers hold as many jobs as they may (`workers.max_running` = {}); the job waits for its turn",
                self.max_running
            );
        }
        job
    }
}

fn waits_in_queue(job: &v1::Job) -> bool {
    job.kind == artaug::KIND && job.state() == v1::JobState::Queued
}

#[cfg(test)]
mod tests {
    use super::*;

    fn queued(kind: &str) -> v1::Job {
        let mut job = v1::Job {
            kind: kind.to_owned(),
            ..v1::Job::default()
        };
        job.set_state(v1::JobState::Queued);
        job
    }

    fn outlook(held: u64, may_come: bool) -> Outlook {
        Outlook {
            held,
            max_running: 2,
            may_come,
        }
    }

    #[test]
    fn a_job_waits_for_a_worker_or_for_its_turn_and_others_for_neither() {
        let reason = |outlook: Outlook| outlook.explained(queued("artaug")).reason;
        assert_eq!(reason(outlook(0, false)), NOBODY);
        assert_eq!(reason(outlook(0, true)), "");
        // A worker that holds a job was there, whether or not it has called since the start of the server.
        assert_eq!(reason(outlook(1, false)), "");
        assert!(reason(outlook(2, true)).contains("workers.max_running"));
        let silos = queued("federated-training");
        assert_eq!(outlook(0, false).explained(silos.clone()), silos);
        assert_eq!(outlook(0, false).warning(&silos), None);

        let mut paused = queued("artaug");
        paused.paused = true;
        assert_eq!(outlook(0, false).explained(paused.clone()), paused);
        let mut held_up = queued("artaug");
        held_up.reason = "the advisor is away".to_owned();
        assert_eq!(outlook(0, false).explained(held_up.clone()), held_up);
        let mut running = queued("artaug");
        running.set_state(v1::JobState::Running);
        assert_eq!(outlook(0, false).explained(running.clone()), running);
        assert_eq!(outlook(0, false).warning(&running), None);
    }
}
