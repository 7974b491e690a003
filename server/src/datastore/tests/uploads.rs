//! Uploads and the files behind them.

use super::*;

fn upload(id: u8, name: &str) -> UploadRecord {
    UploadRecord {
        upload_id: [id; 16],
        job_id: job_id("j"),
        round: RoundNumber(1),
        silo_id: silo(name),
        payload_digest: Digest::of(name.as_bytes()),
        payload_bytes: 100,
        examples: 5,
        touched_at: T,
    }
}

pub(super) async fn an_upload_exists_once_per_job_round_and_silo(datastore: &Datastore) {
    let (job, number) = &running_job(datastore).await;
    let (first, other, twice) = (&upload(1, "a"), &upload(2, "b"), &upload(3, "a"));
    tx!(datastore, |tx| {
        tx.insert_upload(first).await?;
        tx.insert_upload(other).await?;
    });
    let again = datastore
        .run_tx("test", |tx| {
            Box::pin(async move { Ok::<_, Failure>(tx.insert_upload(twice).await?) })
        })
        .await;
    assert!(again.is_err());
    assert_eq!(tx!(datastore, |tx| tx.upload_load().await?), (2, 200));
    let later = T + Duration::from_secs(1);
    assert!(tx!(datastore, |tx| tx
        .touch_upload(&[1; 16], later)
        .await?));
    assert!(!tx!(datastore, |tx| tx
        .touch_upload(&[3; 16], later)
        .await?));
    let order = tx!(datastore, |tx| tx.uploads().await?);
    assert_eq!(order[0], *other);
    let found = tx!(datastore, |tx| tx
        .upload_of(job, *number, &silo("a"))
        .await?);
    assert_eq!(found.unwrap().upload_id, [1; 16]);
    let of_b = tx!(datastore, |tx| tx.uploads_of(&silo("b")).await?);
    assert_eq!(of_b.as_slice(), std::slice::from_ref(other));
    assert!(tx!(datastore, |tx| tx.delete_upload(&[1; 16]).await?));
    assert!(!tx!(datastore, |tx| tx.delete_upload(&[1; 16]).await?));
    assert_eq!(tx!(datastore, |tx| tx.upload(&[1; 16]).await?), None);
    assert_eq!(
        tx!(datastore, |tx| tx.upload(&[2; 16]).await?).as_ref(),
        Some(other)
    );
}

pub(super) async fn spooled_files_are_released_when_their_round_ends(datastore: &Datastore) {
    let (job, number) = &running_job(datastore).await;
    let waiting = &upload(9, "b");
    tx!(datastore, |tx| {
        tx.record_outcome(job, *number, &accepted("a", 1)).await?;
        tx.insert_upload(waiting).await?;
    });
    let kept = tx!(datastore, |tx| tx.spooled().await?);
    assert_eq!(kept, [[1; 16], [9; 16]].into());
    assert!(tx!(datastore, |tx| tx.release_contributions().await?).is_empty());
    tx!(datastore, |tx| {
        tx.set_round_phase(job, *number, RoundPhase::Failed, Some(T), None)
            .await?;
    });
    assert_eq!(tx!(datastore, |tx| tx.spooled().await?), [[9; 16]].into());
    assert_eq!(
        tx!(datastore, |tx| tx.release_contributions().await?),
        [[1; 16]]
    );
    assert!(tx!(datastore, |tx| tx.release_contributions().await?).is_empty());
}
