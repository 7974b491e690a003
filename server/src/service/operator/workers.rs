//! An operator's hand on jobs that workers run: rest, words on pairs, results and their end.

use std::sync::Arc;

use concord_common::{Digest, JobId, wire};
use concord_proto::v1;

use super::super::{
    BoxStream,
    pieces::{self, Wanted, unknown_object},
    view,
};
use crate::{context::Context, decide::workers, driver, error::Failure};

/// Most words on pairs in one call.
const MAX_WORDS: usize = 10_000;

/// Lets a job rest, or go on. For [`Context::to_the_end`].
pub(super) async fn set_paused(
    context: Arc<Context>,
    operator: String,
    job_id: JobId,
    paused: bool,
) -> Result<v1::Job, Failure> {
    let (now, id) = (context.now(), &job_id);
    let (change, job) = context
        .datastore
        .run_tx("pause_job", |tx| {
            Box::pin(async move {
                let change = workers::set_paused(tx, id, paused).await?;
                let (record, worker) = workers::worker_job(tx, id).await?;
                Ok::<_, Failure>((change, view::job(&record, Some(&worker), now)))
            })
        })
        .await?;
    if let Some(change) = change {
        tracing::info!(job.id = %job_id, operator, paused, "an operator paused a job or let it go on");
        change.announce(&context.hub);
    }
    Ok(job)
}

/// The page that shows the pairs of an iteration which wait for a word.
fn gallery_name(iteration: u32) -> String {
    format!("review/iteration-{iteration}.html")
}

/// The pairs that wait.
pub(super) async fn list_review(
    context: &Context,
    job_id: &JobId,
) -> Result<v1::ListReviewResponse, Failure> {
    context
        .datastore
        .run_read("list_review", |tx| {
            Box::pin(async move {
                let (_, worker) = workers::worker_job(tx, job_id).await?;
                let asked = tx.asked_pairs(job_id).await?;
                let waiting: Vec<u32> = asked
                    .into_iter()
                    .filter_map(|(item, answered)| (!answered).then_some(item))
                    .collect();
                let Some(iteration) = worker.waiting_iteration.filter(|_| !waiting.is_empty())
                else {
                    return Ok(v1::ListReviewResponse::default());
                };
                let gallery = gallery_name(iteration);
                let (is_there, _) = tx.count_artefacts(job_id, &gallery).await?;
                Ok::<_, Failure>(v1::ListReviewResponse {
                    iteration,
                    waiting,
                    gallery: if is_there { gallery } else { String::new() },
                })
            })
        })
        .await
}

/// Records words on pairs. For [`Context::to_the_end`].
pub(super) async fn review(
    context: Arc<Context>,
    operator: String,
    request: v1::ReviewPairsRequest,
) -> Result<v1::ReviewPairsResponse, Failure> {
    let job_id = &wire::job_id(&request.job_id)?;
    let accepted = request.accepted.iter().map(|&item| (item, true));
    let rejected = request.rejected.iter().map(|&item| (item, false));
    let mut words: Vec<(u32, bool)> = accepted.chain(rejected).collect();
    words.sort_unstable();
    let is_clear = words.is_sorted_by(|(before, _), (after, _)| before < after);
    if !(1..=MAX_WORDS).contains(&words.len()) || !is_clear {
        let problem = format!("must name 1 to {MAX_WORDS} different pairs, each in one of the two");
        return Err(wire::invalid_field("accepted` and `rejected", problem).into());
    }
    let (now, words, operator, iteration) =
        (context.now(), &words[..], &operator, request.iteration);
    let (change, waiting) = context
        .datastore
        .run_tx("review_pairs", |tx| {
            Box::pin(workers::review(tx, job_id, iteration, words, operator, now))
        })
        .await?;
    tracing::info!(job.id = %job_id, operator, iteration, pairs = words.len(), waiting, "an operator reviewed pairs");
    change.announce(&context.hub);
    Ok(v1::ReviewPairsResponse { waiting })
}

/// A job's results so far.
pub(super) async fn list_artefacts(
    context: &Context,
    job_id: &JobId,
) -> Result<v1::ListArtefactsResponse, Failure> {
    let found = context
        .datastore
        .run_read("list_artefacts", |tx| {
            Box::pin(async move {
                workers::worker_job(tx, job_id).await?;
                Ok::<_, Failure>(tx.artefacts(job_id).await?)
            })
        })
        .await?;
    let artefacts = found
        .into_iter()
        .map(|artefact| v1::Artefact {
            name: artefact.name,
            digest: artefact.digest.to_vec(),
            bytes: artefact.bytes,
        })
        .collect();
    Ok(v1::ListArtefactsResponse { artefacts })
}

/// Sends one of a job's objects from an offset on.
pub(super) async fn get_artefact(
    context: &Arc<Context>,
    operator: String,
    request: &v1::GetArtefactRequest,
) -> Result<BoxStream<v1::GetArtefactResponse>, Failure> {
    let job_id = wire::job_id(&request.job_id)?;
    let digest: Digest = wire::digest("digest", &request.digest)?;
    let id = &job_id;
    let found = context
        .datastore
        .run_read("find_object", |tx| {
            Box::pin(async move {
                workers::worker_job(tx, id).await?;
                Ok::<_, Failure>(tx.object(id, &digest).await?)
            })
        })
        .await?;
    let Some(total) = found else {
        return Err(unknown_object(&job_id, &digest).into());
    };
    let wanted = Wanted {
        job_id,
        digest,
        offset: request.offset,
        bytes: total,
        caller: operator,
    };
    pieces::send(context, wanted, move |chunk| v1::GetArtefactResponse {
        chunk: Some(chunk),
        total,
    })
    .await
}

/// Deletes all that is kept for a job that has ended. For [`Context::to_the_end`].
pub(super) async fn delete_files(
    context: Arc<Context>,
    operator: String,
    job_id: JobId,
) -> Result<v1::DeleteJobFilesResponse, Failure> {
    let (now, id) = (context.now(), &job_id);
    let (change, bytes_freed) = context
        .datastore
        .run_tx("delete_job_files", |tx| {
            Box::pin(workers::delete_files(tx, id, now))
        })
        .await?;
    if let Some(change) = change {
        tracing::info!(job.id = %job_id, operator, bytes = bytes_freed, "an operator deletes the files of a job");
        change.announce(&context.hub);
    }
    // Also if they were condemned before: that call may not have come to its end.
    driver::give_up(&context, id).await?;
    let job = context
        .datastore
        .run_read("get_job", |tx| {
            Box::pin(async move {
                let (record, worker) = workers::worker_job(tx, id).await?;
                Ok::<_, Failure>(view::job(&record, Some(&worker), now))
            })
        })
        .await?;
    Ok(v1::DeleteJobFilesResponse {
        job: Some(job),
        bytes_freed,
    })
}
