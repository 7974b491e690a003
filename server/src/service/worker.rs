//! What workers call.

use std::{sync::Arc, time::Duration};

use concord_common::{
    ErrorCode, code::Refusal, config::ByteSize, job::artaug, lifecycle::Shutdown, wire,
};
use concord_proto::v1::{self, worker_service_server::WorkerService};
use tokio::time::Instant;
use tonic::{Request, Response, Status, Streaming};

use super::{BoxStream, federation::shutting_down, worker_of};
use crate::{
    context::Context,
    datastore::{Tx, WorkerJobRecord},
    decide::workers::{self, Claimed, Grip},
    error::Failure,
};

mod check;
mod journal;
mod objects;

/// How long a call waits for a job.
const CLAIM_WAIT: Duration = Duration::from_secs(20);
/// When a worker that found no job is to ask again.
const RETRY_AFTER: Duration = Duration::from_secs(1);
/// When a worker is to ask again whose kinds of jobs this server does not have.
const RETRY_STRANGER: Duration = Duration::from_mins(1);
/// When a worker is to ask again for which there is no room.
const RETRY_FULL: Duration = Duration::from_mins(1);
/// Words on pairs in one answer.
const MAX_REVIEWS: u32 = 1000;

/// The service.
#[derive(Debug, Clone)]
pub struct Workers {
    context: Arc<Context>,
    shutdown: Shutdown,
}

impl Workers {
    /// The service over `context`; calls that wait for a job end when `shutdown` begins.
    pub fn new(context: Arc<Context>, shutdown: Shutdown) -> Self {
        Self { context, shutdown }
    }
}

#[tonic::async_trait]
impl WorkerService for Workers {
    type ReadJournalStream = BoxStream<v1::ReadJournalResponse>;
    type GetObjectStream = BoxStream<v1::GetObjectResponse>;

    async fn claim_job(
        &self,
        request: Request<v1::ClaimJobRequest>,
    ) -> Result<Response<v1::ClaimJobResponse>, Status> {
        let worker = worker_of(&request)?;
        let request = request.into_inner();
        check::claim(&request).map_err(Failure::from)?;
        if !request.kinds.iter().any(|kind| kind == artaug::KIND) {
            return Ok(Response::new(no_job(RETRY_STRANGER)));
        }
        let (hub, stop) = (&self.context.hub, self.shutdown.token());
        let mut changes = hub.watch_workers();
        let deadline = Instant::now() + CLAIM_WAIT;
        loop {
            self.context.workers_seen.note(self.context.now());
            changes.mark_unchanged();
            if stop.is_cancelled() {
                return Err(Failure::from(shutting_down()).into());
            }
            if self.is_work_waiting().await?
                && let Some(claimed) = self.claim(&worker, &request.version).await?
            {
                return Ok(Response::new(lease(&self.context, claimed)));
            }
            tokio::select! {
                // The hub lives in the context, so that the sender cannot be gone.
                _ = changes.changed() => {}
                () = tokio::time::sleep_until(deadline) => {
                    return Ok(Response::new(no_job(RETRY_AFTER)));
                }
                () = stop.cancelled() => {}
            }
        }
    }

    async fn renew_job_lease(
        &self,
        request: Request<v1::RenewJobLeaseRequest>,
    ) -> Result<Response<v1::RenewJobLeaseResponse>, Status> {
        let worker = worker_of(&request)?;
        let request = request.into_inner();
        let grip = check::grip(request.grip, worker).map_err(Failure::from)?;
        let progress = request.progress;
        check::progress(progress.as_ref()).map_err(Failure::from)?;
        let context = Arc::clone(&self.context);
        let renewed = async move {
            let now = context.now();
            context.workers_seen.note(now);
            let (grip, progress, duration) =
                (&grip, progress.as_ref(), context.config.workers.lease);
            let (change, command, reviews) = context
                .datastore
                .run_tx_unsynced("renew_job_lease", |tx| {
                    Box::pin(workers::renew(tx, grip, progress, duration, now))
                })
                .await?;
            change.announce(&context.hub);
            Ok(v1::RenewJobLeaseResponse {
                command: command as i32,
                reviews,
            })
        };
        Ok(Response::new(self.context.to_the_end(renewed).await?))
    }

    async fn read_journal(
        &self,
        request: Request<v1::ReadJournalRequest>,
    ) -> Result<Response<Self::ReadJournalStream>, Status> {
        let worker = worker_of(&request)?;
        let request = request.into_inner();
        let grip = check::grip(request.grip, worker).map_err(Failure::from)?;
        let lines = journal::read(Arc::clone(&self.context), grip, request.first).await?;
        Ok(Response::new(lines))
    }

    async fn append_journal(
        &self,
        request: Request<v1::AppendJournalRequest>,
    ) -> Result<Response<v1::AppendJournalResponse>, Status> {
        let worker = worker_of(&request)?;
        let request = request.into_inner();
        let grip = check::grip(request.grip, worker).map_err(Failure::from)?;
        check::lines(&request.lines).map_err(Failure::from)?;
        let next = journal::append(&self.context, &grip, request.first, &request.lines).await?;
        Ok(Response::new(v1::AppendJournalResponse { next }))
    }

    async fn find_missing_objects(
        &self,
        request: Request<v1::FindMissingObjectsRequest>,
    ) -> Result<Response<v1::FindMissingObjectsResponse>, Status> {
        let worker = worker_of(&request)?;
        let request = request.into_inner();
        let grip = check::grip(request.grip, worker).map_err(Failure::from)?;
        let digests = check::digests(&request.digests).map_err(Failure::from)?;
        let missing = objects::missing(&self.context, &grip, digests).await?;
        Ok(Response::new(v1::FindMissingObjectsResponse { missing }))
    }

    async fn put_object(
        &self,
        request: Request<Streaming<v1::PutObjectRequest>>,
    ) -> Result<Response<v1::PutObjectResponse>, Status> {
        let worker = worker_of(&request)?;
        let bytes_kept = objects::put(&self.context, worker, request.into_inner()).await?;
        Ok(Response::new(v1::PutObjectResponse { bytes_kept }))
    }

    async fn get_object(
        &self,
        request: Request<v1::GetObjectRequest>,
    ) -> Result<Response<Self::GetObjectStream>, Status> {
        let worker = worker_of(&request)?;
        let request = request.into_inner();
        let grip = check::grip(request.grip, worker).map_err(Failure::from)?;
        let digest = wire::digest("digest", &request.digest).map_err(Failure::from)?;
        let pieces = objects::get(&self.context, grip, digest, request.offset).await?;
        Ok(Response::new(pieces))
    }

    async fn remove_objects(
        &self,
        request: Request<v1::RemoveObjectsRequest>,
    ) -> Result<Response<v1::RemoveObjectsResponse>, Status> {
        let worker = worker_of(&request)?;
        let request = request.into_inner();
        let grip = check::grip(request.grip, worker).map_err(Failure::from)?;
        let digests = check::digests(&request.digests).map_err(Failure::from)?;
        let removed = objects::remove(Arc::clone(&self.context), grip, digests);
        let bytes_kept = self.context.to_the_end(removed).await?;
        Ok(Response::new(v1::RemoveObjectsResponse { bytes_kept }))
    }

    async fn read_reviews(
        &self,
        request: Request<v1::ReadReviewsRequest>,
    ) -> Result<Response<v1::ReadReviewsResponse>, Status> {
        let worker = worker_of(&request)?;
        let request = request.into_inner();
        let grip = &check::grip(request.grip, worker).map_err(Failure::from)?;
        let (now, after) = (self.context.now(), request.after);
        let reviews = self
            .context
            .datastore
            .run_read("read_reviews", |tx| {
                Box::pin(async move {
                    workers::gripped(tx, grip, now).await?;
                    Ok::<_, Failure>(tx.reviews_after(&grip.job_id, after, MAX_REVIEWS).await?)
                })
            })
            .await?;
        Ok(Response::new(v1::ReadReviewsResponse { reviews }))
    }

    async fn put_artefact(
        &self,
        request: Request<v1::PutArtefactRequest>,
    ) -> Result<Response<v1::PutArtefactResponse>, Status> {
        let worker = worker_of(&request)?;
        let request = request.into_inner();
        let grip = check::grip(request.grip, worker).map_err(Failure::from)?;
        let digest = wire::digest("digest", &request.digest).map_err(Failure::from)?;
        check::artefact_name(&request.name).map_err(Failure::from)?;
        let named = objects::name(Arc::clone(&self.context), grip, request.name, digest);
        self.context.to_the_end(named).await?;
        Ok(Response::new(v1::PutArtefactResponse {}))
    }

    async fn release_job(
        &self,
        request: Request<v1::ReleaseJobRequest>,
    ) -> Result<Response<v1::ReleaseJobResponse>, Status> {
        let worker = worker_of(&request)?;
        let request = request.into_inner();
        let release = check::release(&request).map_err(Failure::from)?;
        let grip = check::grip(request.grip, worker).map_err(Failure::from)?;
        let (progress, reviews) = (request.progress, request.reviews);
        let context = Arc::clone(&self.context);
        let released = async move {
            let now = context.now();
            let (grip, release, progress) = (&grip, &release, progress.as_ref());
            let change = context
                .datastore
                .run_tx("release_job", |tx| {
                    Box::pin(workers::release(tx, grip, release, reviews, progress, now))
                })
                .await?;
            tracing::info!(
                job.id = %grip.job_id, worker = grip.worker, release = release.name(), "a worker gave a job back"
            );
            change.announce(&context.hub);
            Ok(())
        };
        self.context.to_the_end(released).await?;
        Ok(Response::new(v1::ReleaseJobResponse {}))
    }
}

impl Workers {
    /// Whether claiming may give a job: a look that keeps nobody from writing.
    async fn is_work_waiting(&self) -> Result<bool, Failure> {
        is_work_waiting(&self.context).await
    }

    async fn claim(&self, worker: &str, version: &str) -> Result<Option<Claimed>, Failure> {
        let (context, worker) = (Arc::clone(&self.context), worker.to_owned());
        let version = version.to_owned();
        let claimed = async move {
            let (now, token) = (context.now(), context.ids.token());
            let (settings, worker) = (&context.config.workers, &worker);
            // What follows from it may be asked for again, such as the lease itself.
            let (changes, claimed) = context
                .datastore
                .run_tx_unsynced("claim_job", |tx| {
                    let (lease, most) = (settings.lease, settings.max_running);
                    Box::pin(workers::claim(tx, worker, token, lease, most, now))
                })
                .await?;
            if let Some(claimed) = &claimed {
                tracing::info!(
                    job.id = %claimed.job.job_id, worker, version, attempt = claimed.worker.attempts,
                    "a worker took a job"
                );
            }
            for change in changes {
                change.announce(&context.hub);
            }
            Ok(claimed)
        };
        self.context.to_the_end(claimed).await
    }
}

/// Whether there is a job that a worker may take now.
pub(crate) async fn is_work_waiting(context: &Context) -> Result<bool, Failure> {
    let (now, most) = (context.now(), context.config.workers.max_running);
    context
        .datastore
        .run_read("find_waiting_job", |tx| {
            Box::pin(async move { Ok(workers::waiting_job(tx, most, now).await?.is_some()) })
        })
        .await
}

fn no_job(retry_after: Duration) -> v1::ClaimJobResponse {
    v1::ClaimJobResponse {
        lease: None,
        retry_after: Some(wire::duration_to_proto(retry_after)),
    }
}

fn lease(context: &Context, claimed: Claimed) -> v1::ClaimJobResponse {
    v1::ClaimJobResponse {
        lease: Some(v1::WorkerLease {
            job_id: claimed.job.job_id.to_string(),
            token: claimed.lease.token.to_vec(),
            duration: Some(wire::duration_to_proto(context.config.workers.lease)),
            spec_toml: claimed.job.spec_toml,
            attempt: claimed.worker.attempts,
            journal_lines: claimed.worker.lines,
        }),
        retry_after: None,
    }
}

/// Whether `more` bytes may be kept for a job.
///
/// # Errors
/// `QUOTA_EXCEEDED` if it would keep more than it may, `BUSY` if all jobs together would: the job goes on as soon as an operator has
/// made room.
async fn within_bounds(
    tx: &mut Tx<'_>,
    record: &WorkerJobRecord,
    more: u64,
    most: ByteSize,
) -> Result<(), Failure> {
    within_quota(record, more)?;
    let kept = tx.all_kept_bytes().await?;
    if kept.saturating_add(more) <= most.bytes() {
        return Ok(());
    }
    tracing::warn!(
        job.id = %record.job_id, kept, more, "a worker's job waits for room: `workers.max_total_disk` is reached"
    );
    Err(Refusal::new(
        ErrorCode::Busy,
        format!(
            "the server keeps {kept} bytes for jobs of workers and may keep {} (`workers.max_total_disk`); {more} more do not fit",
            most.bytes()
        ),
    )
    .retry_after(RETRY_FULL)
    .into())
}

/// `QUOTA_EXCEEDED` if a job would keep more than it may.
fn within_quota(record: &WorkerJobRecord, more: u64) -> Result<(), Refusal> {
    let kept = record.kept_bytes();
    if kept.saturating_add(more) <= record.quota {
        return Ok(());
    }
    Err(Refusal::new(
        ErrorCode::QuotaExceeded,
        format!(
            "job `{}` keeps {kept} bytes and may keep {} (`limits.disk`); {more} more do not fit",
            record.job_id, record.quota
        ),
    ))
}
