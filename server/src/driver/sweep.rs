//! Housekeeping: uploads that nobody goes on with, the contributions of rounds that ended without being aggregated, and old
//! adapter versions.

use std::{collections::BTreeSet, sync::Arc, time::Duration};

use super::aggregate::delete_files;
use crate::{context::Context, error::Failure, spool::UploadId};

mod retention;

pub(crate) use retention::{finish_deletions, give_up};

/// Time between two looks.
const EVERY: Duration = Duration::from_secs(30);

/// Sweeps for as long as it is polled.
pub(super) async fn run(context: &Arc<Context>) {
    loop {
        tokio::time::sleep(EVERY).await;
        if let Err(error) = sweep(context).await {
            tracing::warn!(%error, "cannot sweep out what is no longer needed");
        }
    }
}

/// Forgets what is no longer needed and deletes its files.
pub(crate) async fn sweep(context: &Arc<Context>) -> Result<(), Failure> {
    let (spool, before) = (&context.spool, context.now() - context.config.spool.expiry);
    let expired: BTreeSet<UploadId> = context
        .datastore
        .run_tx("expire_uploads", |tx| {
            Box::pin(async move {
                let mut expired = BTreeSet::new();
                for upload in tx.uploads().await? {
                    if upload.touched_at < before && !spool.is_busy(&upload.upload_id) {
                        tx.delete_upload(&upload.upload_id).await?;
                        expired.insert(upload.upload_id);
                    }
                }
                Ok::<_, Failure>(expired)
            })
        })
        .await?;
    let leftovers = context
        .datastore
        .run_tx("release_contributions", |tx| {
            Box::pin(async move { Ok::<_, Failure>(tx.release_contributions().await?) })
        })
        .await?;
    if !expired.is_empty() {
        tracing::info!(
            uploads = expired.len(),
            "forgot uploads that nobody went on with"
        );
    }
    let files = expired.into_iter().chain(leftovers).collect();
    delete_files(context, files).await;
    retention::retain(context).await
}
