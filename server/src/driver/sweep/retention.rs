//! Old adapter versions: forgotten in one transaction, and their payloads deleted after its commit. A crash in between leaves
//! payloads that nothing refers to; the next start sweeps them out.

use std::{collections::BTreeSet, sync::Arc};

use concord_common::{Digest, JobId, Timestamp};

use crate::{blobs::BlobStore, context::Context, error::Failure};

/// Lines of a journal that are deleted in one transaction.
const LINES_AT_ONCE: u32 = 1000;

/// Keeps what `[retention]` says and gives up the rest.
pub(super) async fn retain(context: &Arc<Context>) -> Result<(), Failure> {
    keep_results(context, context.now() - context.config.retention.ended_jobs).await?;
    let settings = &context.config.retention;
    let (newest, before) = (settings.versions, context.now() - settings.ended_jobs);
    let gone = context
        .datastore
        .run_tx("prune_versions", |tx| {
            Box::pin(async move { Ok::<_, Failure>(tx.prune_versions(newest, before).await?) })
        })
        .await?;
    let mut condemned = gone;
    condemned.retain(|digest| context.blobs.condemn(digest));
    if condemned.is_empty() {
        return Ok(());
    }
    // Another job may have come to the same adapter since.
    let found = &condemned;
    let needed = context
        .datastore
        .run_read("check_versions", |tx| {
            Box::pin(async move {
                let mut needed = BTreeSet::new();
                for digest in found {
                    if tx.is_version(digest).await? {
                        needed.insert(*digest);
                    }
                }
                Ok::<_, Failure>(needed)
            })
        })
        .await?;
    let blobs = context.blobs.clone();
    let deleted = tokio::task::spawn_blocking(move || delete(&blobs, &condemned, &needed)).await?;
    tracing::info!(adapters = deleted, "deleted old adapter versions");
    Ok(())
}

/// Goes on where a crash came into the deletion of a job's files. For the start of the server.
///
/// # Errors
/// If the database fails.
pub(crate) async fn finish_deletions(context: &Arc<Context>) -> Result<(), Failure> {
    // No job ended before that.
    keep_results(context, Timestamp(0)).await
}

/// Gives up the journals of workers' jobs that ended before this moment, or whose files an operator had deleted, and all objects of
/// theirs that are no results.
async fn keep_results(context: &Arc<Context>, ended_before: Timestamp) -> Result<(), Failure> {
    let jobs = context
        .datastore
        .run_read("find_bulky_jobs", |tx| {
            Box::pin(async move { Ok::<_, Failure>(tx.bulky_worker_jobs(ended_before).await?) })
        })
        .await?;
    for job_id in jobs {
        give_up(context, &job_id).await?;
    }
    Ok(())
}

/// Gives up the journal of a worker's job that has ended, and all of its objects that are no results. Where it breaks off, the next
/// sweep or start goes on.
///
/// # Errors
/// If the database fails.
pub(crate) async fn give_up(context: &Arc<Context>, job_id: &JobId) -> Result<(), Failure> {
    drop_journal(context, job_id).await?;
    let _change = context.objects.change().await;
    let gone = context
        .datastore
        .run_tx("keep_only_artefacts", |tx| {
            Box::pin(async move { Ok::<_, Failure>(tx.keep_only_artefacts(job_id).await?) })
        })
        .await?;
    tracing::info!(job.id = %job_id, objects = gone.len(), "deleted what an ended job does not keep: its journal, and objects that are no results");
    let (store, job_id) = (Arc::clone(&context.objects), job_id.clone());
    tokio::task::spawn_blocking(move || {
        for digest in gone {
            if let Err(error) = store.delete(&job_id, &digest) {
                tracing::warn!(job.id = %job_id, %error, "cannot delete an object; the next start does");
            }
        }
    })
    .await?;
    Ok(())
}

/// Deletes the lines of an ended job's journal, some at a time: everybody else waits for a transaction's end.
async fn drop_journal(context: &Arc<Context>, job_id: &JobId) -> Result<(), Failure> {
    loop {
        let dropped = context
            .datastore
            .run_tx("drop_journal_lines", |tx| {
                Box::pin(async move {
                    Ok::<_, Failure>(tx.drop_journal_lines(job_id, LINES_AT_ONCE).await?)
                })
            })
            .await?;
        if dropped < u64::from(LINES_AT_ONCE) {
            return Ok(());
        }
    }
}

/// Deletes what is condemned and not needed; blocking. Gives the number of blobs.
fn delete(blobs: &BlobStore, condemned: &BTreeSet<Digest>, needed: &BTreeSet<Digest>) -> u64 {
    let mut deleted = 0;
    for digest in condemned {
        if needed.contains(digest) {
            blobs.spare(digest);
            continue;
        }
        match blobs.delete_condemned(digest) {
            Ok(done) => deleted += u64::from(done),
            Err(error) => tracing::warn!(%error, "cannot delete an old adapter version"),
        }
    }
    deleted
}
