//! How a job comes into the queue.

use std::time::Duration;

use concord_common::{
    ErrorCode, JobId,
    code::Refusal,
    job::{AlgorithmSpec, Submission},
    round::job::JobState,
    wire,
};
use concord_proto::v1;

use super::{Operator, Outlook};
use crate::{
    datastore::{JobRecord, NewJob},
    decide,
    error::{Failure, refuse},
    ids::new_job_id,
    metrics,
};

/// Longest request id in bytes.
const MAX_REQUEST_ID: usize = 64;

impl Operator {
    /// Queues a job, or finds the one that an earlier call with the same request id has queued. For [`to_the_end`](crate::context::Context::to_the_end).
    pub(super) async fn submit(
        &self,
        operator: String,
        request: v1::SubmitJobRequest,
    ) -> Result<v1::SubmitJobResponse, Failure> {
        let id = &request.request_id;
        if !(1..=MAX_REQUEST_ID).contains(&id.len()) || id.chars().any(char::is_control) {
            let problem = format!("must be 1 to {MAX_REQUEST_ID} printable bytes");
            return Err(wire::invalid_field("request_id", problem).into());
        }
        let context = &self.context;
        let spec = Submission::parse(&request.spec_toml)?;
        let quota = self.acceptable(&spec)?;
        let now = context.now();
        let job = &NewJob {
            job_id: new_job_id(spec.name(), context.ids.as_ref()),
            request_id: request.request_id,
            submitted_by: operator,
            submitted_at: now,
            spec_toml: request.spec_toml,
            kind: spec.kind(),
        };
        let max_queued = context.config.jobs.max_queued;
        let (record, existed) = context
            .datastore
            .run_tx("submit_job", |tx| {
                Box::pin(async move {
                    if let Some(existing) = tx.job_by_request(&job.request_id).await? {
                        return same_request(existing, job).map(|existing| (existing, true));
                    }
                    let queued = tx.jobs_in_state(JobState::Queued, job.kind).await?;
                    if queued.len() >= max_queued {
                        return Err(Refusal::new(
                            ErrorCode::Busy,
                            format!("{max_queued} jobs are queued already; try again later"),
                        )
                        .retry_after(Duration::from_mins(1))
                        .into());
                    }
                    tx.insert_job(job).await?;
                    if let Some(quota) = quota {
                        tx.insert_worker_job(&job.job_id, quota).await?;
                    }
                    Ok::<_, Failure>((decide::job(tx, &job.job_id).await?, false))
                })
            })
            .await?;
        if !existed {
            metrics::job(JobState::Queued);
            tracing::info!(job.id = %record.job_id, operator = %record.submitted_by, "job queued");
            if quota.is_some() {
                self.announce_work(&record.job_id);
            } else {
                context.hub.queue_changed();
            }
        }
        let job = self.job_state(&record.job_id, i64::MAX).await?.view;
        let outlook = context
            .datastore
            .run_read("find_workers", |tx| {
                Box::pin(Outlook::look(context, tx, now))
            })
            .await?;
        Ok(v1::SubmitJobResponse {
            warning: outlook.warning(&job).unwrap_or_default().to_owned(),
            job: Some(job),
            existed,
        })
    }

    /// Checks what a specification asks of this server; for a job that workers run, gives the bytes that it may keep.
    fn acceptable(&self, spec: &Submission) -> Result<Option<u64>, Failure> {
        let training = match spec {
            Submission::Federated(training) => training,
            Submission::Artaug(spec) => {
                self.context.config.check_disk(spec)?;
                return Ok(Some(spec.limits.disk.bytes()));
            }
        };
        if matches!(training.algorithm, AlgorithmSpec::Local {}) {
            return refuse(
                ErrorCode::InvalidJobSpec,
                "`algorithm.name`: `local` exchanges nothing, so there is nothing for a server to do; run it with \
                 `concord-client simulate`",
            );
        }
        self.context.config.check_adapter(training)?;
        Ok(None)
    }

    /// Tells workers of a new job.
    fn announce_work(&self, job_id: &JobId) {
        metrics::worker_job(JobState::Queued);
        if self.context.config.workers.config.is_none() {
            tracing::info!(
                job.id = %job_id,
                "this server starts no workers (`workers.config` is not set): the job waits for a worker from elsewhere"
            );
        }
        self.context.hub.workers_changed();
    }
}

/// The job of an earlier call with the same request id, if that call asked for the same.
fn same_request(existing: JobRecord, job: &NewJob) -> Result<JobRecord, Failure> {
    if existing.spec_toml == job.spec_toml {
        return Ok(existing);
    }
    refuse(
        ErrorCode::RequestIdReused,
        format!(
            "request id `{}` was used for job `{}` with another specification; choose a new id",
            job.request_id, existing.job_id
        ),
    )
}
