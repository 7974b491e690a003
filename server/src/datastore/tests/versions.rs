//! Adapter versions and which of them are kept.

use std::collections::BTreeSet;

use super::*;

pub(super) async fn adapter_versions_are_found_by_content(datastore: &Datastore) {
    let (job, _) = &running_job(datastore).await;
    for (round, text) in [(0, "base"), (1, "next"), (2, "base")] {
        let record = &VersionRecord {
            round,
            version: version(text),
            payload_bytes: 10,
            created_at: T,
        };
        tx!(datastore, |tx| tx.insert_version(job, record).await?);
    }
    let found = tx!(datastore, |tx| tx.version(job, version("base")).await?).unwrap();
    assert_eq!(found.round, 2);
    assert_eq!(
        tx!(datastore, |tx| tx.version(job, version("other")).await?),
        None
    );
    let all = tx!(datastore, |tx| tx.all_versions().await?);
    assert_eq!(all, [version("base").0, version("next").0].into());
}

/// Stores a job's versions, one a round from 0 on; the last one is the job's present version.
async fn publish(datastore: &Datastore, name: &str, versions: &[&str]) {
    let (job, last) = (&new_job(name), versions.last().unwrap());
    tx!(datastore, |tx| {
        let id = &job.job_id;
        tx.insert_job(job).await?;
        tx.start_job(id, version(versions[0]), T).await?;
        for (round, text) in versions.iter().enumerate() {
            let record = VersionRecord {
                round: round as u32,
                version: version(text),
                payload_bytes: 10,
                created_at: T,
            };
            tx.insert_version(id, &record).await?;
        }
        tx.set_job_version(id, version(last)).await?;
    });
}

fn digests<const N: usize>(texts: [&str; N]) -> BTreeSet<Digest> {
    texts.map(|text| version(text).0).into()
}

pub(super) async fn old_versions_go_and_what_is_in_use_stays(datastore: &Datastore) {
    publish(datastore, "j", &["0", "1", "2", "3", "4"]).await;
    let job = &job_id("j");
    // An open round that started long ago.
    let open = version("1");
    let round = &Round::new(RoundSpec {
        base: open,
        ..new_round("j", 5, &["a"]).spec().clone()
    });
    tx!(datastore, |tx| tx.insert_round(round).await?);
    let kept = |datastore: &Datastore| {
        let datastore = datastore.clone();
        async move { tx!(datastore, |tx| tx.all_versions().await?) }
    };
    let gone = tx!(datastore, |tx| tx.prune_versions(2, T).await?);
    assert_eq!(gone, digests(["0", "2"]));
    assert_eq!(kept(datastore).await, digests(["1", "3", "4"]));
    assert_eq!(
        tx!(datastore, |tx| tx.version(job, open).await?)
            .unwrap()
            .round,
        1
    );
    let again = tx!(datastore, |tx| tx.prune_versions(2, T).await?);
    assert_eq!(again, BTreeSet::new());

    // Of an ended job the last one stays, whatever the limits.
    tx!(datastore, |tx| {
        tx.set_round_phase(job, RoundNumber(5), RoundPhase::Failed, Some(T), None)
            .await?;
        tx.end_job(job, JobState::Failed, "", T).await?;
    });
    let gone = tx!(datastore, |tx| tx.prune_versions(3, T).await?);
    assert_eq!(gone, BTreeSet::new());
    let later = T + Duration::from_millis(1);
    let gone = tx!(datastore, |tx| tx.prune_versions(3, later).await?);
    assert_eq!(gone, digests(["1", "3"]));
    assert_eq!(kept(datastore).await, digests(["4"]));
}

pub(super) async fn a_version_that_another_job_has_too_is_not_given_up(datastore: &Datastore) {
    publish(datastore, "j", &["same", "j1", "j2"]).await;
    publish(datastore, "k", &["same", "k1"]).await;
    let job = &job_id("j");
    let gone = tx!(datastore, |tx| tx.prune_versions(2, T).await?);
    assert_eq!(gone, BTreeSet::new());
    assert_eq!(
        tx!(datastore, |tx| tx.version(job, version("same")).await?),
        None
    );
    assert!(tx!(datastore, |tx| tx
        .is_version(&version("same").0)
        .await?));
    assert!(!tx!(datastore, |tx| tx
        .is_version(&version("other").0)
        .await?));
}
