//! Transactions themselves.

use super::*;

pub(super) async fn a_failed_transaction_leaves_nothing(datastore: &Datastore) {
    let job = &new_job("j");
    let result = datastore
        .run_tx("test", |tx| {
            Box::pin(async move {
                tx.insert_job(job).await?;
                Err::<(), _>(Failure::Datastore(DatastoreError::Missing(
                    "courage".to_owned(),
                )))
            })
        })
        .await;
    assert!(result.is_err());
    assert_eq!(tx!(datastore, |tx| tx.job(&job.job_id).await?), None);
}

pub(super) async fn a_reader_cannot_write(datastore: &Datastore) {
    let job = &new_job("j");
    let result = datastore
        .run_read("test", |tx| {
            Box::pin(async move { Ok::<_, Failure>(tx.insert_job(job).await?) })
        })
        .await;
    assert!(result.is_err());
}

pub(super) async fn transactions_at_once_all_count(datastore: &Datastore) {
    let (job, _) = &running_job(datastore).await;
    let writes = (0..50).map(|_| async {
        let a = &silo("a");
        tx!(datastore, |tx| tx.count_bytes(job, a, 1, 2).await?);
    });
    futures::future::join_all(writes).await;
    let parts = tx!(datastore, |tx| tx.job_silos(job).await?);
    assert_eq!((parts[0].bytes_up, parts[0].bytes_down), (50, 100));
}
