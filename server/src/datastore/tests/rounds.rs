//! Rounds, parts in them, and leases.

use super::*;

pub(super) async fn a_round_is_restored_as_it_was(datastore: &Datastore) {
    let (job, number) = &running_job(datastore).await;
    let fresh = tx!(datastore, |tx| tx.round_machine(job, *number).await?).unwrap();
    assert_eq!(fresh, new_round("j", 1, &["a", "b"]));
    tx!(datastore, |tx| {
        tx.record_outcome(job, *number, &accepted("a", 1)).await?;
        tx.set_round_phase(job, *number, RoundPhase::Collecting, None, None)
            .await?;
    });
    let later = tx!(datastore, |tx| tx.round_machine(job, *number).await?).unwrap();
    assert_eq!(later.phase(), RoundPhase::Collecting);
    assert_eq!(
        later.record(&silo("a")),
        Some(&Record {
            silo: silo("a"),
            outcome: Outcome::Accepted,
            digest: Some(Digest::of(b"a")),
            examples: 7,
        })
    );
    let shown = tx!(datastore, |tx| tx.round(job, *number).await?).unwrap();
    assert_eq!((shown.cohort, shown.accepted), (2, 1));
    assert_eq!(shown.closes_at, T + Duration::from_mins(1));
    assert_eq!(tx!(datastore, |tx| tx.rounds(job).await?), [shown]);
    assert_eq!(
        tx!(datastore, |tx| tx.round(job, RoundNumber(2)).await?),
        None
    );
}

pub(super) async fn a_silos_part_in_a_round_is_replaced_as_a_whole(datastore: &Datastore) {
    let (job, number) = &running_job(datastore).await;
    let rejected = &RoundSiloRecord {
        outcome: Some(Outcome::Rejected(ErrorCode::NotFinite)),
        digest: None,
        examples: 0,
        receipt: None,
        upload_id: None,
        ..accepted("a", 1)
    };
    for record in [rejected, &accepted("a", 1), rejected] {
        tx!(datastore, |tx| tx
            .record_outcome(job, *number, record)
            .await?);
        let stored = tx!(datastore, |tx| tx
            .round_silo(job, *number, &silo("a"))
            .await?);
        assert_eq!(stored.as_ref(), Some(record));
    }
    assert_eq!(
        tx!(datastore, |tx| tx
            .round_silo(job, *number, &silo("z"))
            .await?),
        None
    );
}

pub(super) async fn a_contribution_without_a_receipt_is_impossible(datastore: &Datastore) {
    let (job, number) = &running_job(datastore).await;
    let broken = &RoundSiloRecord {
        receipt: None,
        ..accepted("a", 1)
    };
    let stranger = &accepted("z", 1);
    for record in [broken, stranger] {
        let result = datastore
            .run_tx("test", |tx| {
                Box::pin(
                    async move { Ok::<_, Failure>(tx.record_outcome(job, *number, record).await?) },
                )
            })
            .await;
        assert!(result.is_err());
    }
}

pub(super) async fn a_lease_is_replaced_and_seen_until_it_runs_out(datastore: &Datastore) {
    let (job, number) = &running_job(datastore).await;
    let a = &silo("a");
    let lease = |token: u8, seconds| LeaseRecord {
        token: [token; 16],
        expires_at: T + Duration::from_secs(seconds),
        attempts: u32::from(token),
    };
    assert_eq!(tx!(datastore, |tx| tx.lease(job, *number, a).await?), None);
    for next in [&lease(1, 5), &lease(2, 10)] {
        tx!(datastore, |tx| tx.put_lease(job, *number, a, next).await?);
        assert_eq!(
            tx!(datastore, |tx| tx.lease(job, *number, a).await?).as_ref(),
            Some(next)
        );
    }
    for (seconds, holders) in [(9, 1), (10, 0)] {
        let at = T + Duration::from_secs(seconds);
        let found = tx!(datastore, |tx| tx.lease_holders(job, *number, at).await?);
        assert_eq!(found.len(), holders);
    }
}
