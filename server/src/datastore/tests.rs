//! What every database must do, as functions over a [`Datastore`]; and the list of databases that must do it.

use std::{collections::BTreeMap, time::Duration};

use concord_common::{
    Digest, ErrorCode, JobId, RoundNumber, SiloId, Timestamp,
    adapter::AdapterVersion,
    round::{Outcome, ParticipationWindow, Record, Round, RoundPhase, RoundSpec, job::JobState},
    wire::{MetricPoint, MetricReport},
};

use super::*;
use crate::error::Failure;

/// Stamps the contract over a database: one test per function.
macro_rules! contract {
    ($open:ident: $($name:ident),* $(,)?) => {
        mod $open {
            $(#[tokio::test]
            async fn $name() {
                let (_folder, datastore) = super::$open().await;
                super::$name(&datastore).await;
                datastore.close().await;
            })*
        }
    };
}

contract!(sqlite:
    a_job_is_stored_once_per_request_id,
    a_job_goes_from_queued_to_running_to_its_end,
    jobs_are_listed_newest_first_and_queued_oldest_first,
    a_round_is_restored_as_it_was,
    a_silos_part_in_a_round_is_replaced_as_a_whole,
    a_contribution_without_a_receipt_is_impossible,
    a_lease_is_replaced_and_seen_until_it_runs_out,
    an_upload_exists_once_per_job_round_and_silo,
    spooled_files_are_released_when_their_round_ends,
    a_report_for_the_same_point_replaces_the_earlier_one,
    a_silo_keeps_its_enrollment_and_first_call,
    jobs_of_a_silo_end_with_their_time_or_its_no,
    adapter_versions_are_found_by_content,
    a_failed_transaction_leaves_nothing,
    a_reader_cannot_write,
    transactions_at_once_all_count,
);

async fn sqlite() -> (tempfile::TempDir, Datastore) {
    let folder = tempfile::tempdir().unwrap();
    let datastore = Datastore::open(&folder.path().join("test.db"), Durability::Process)
        .await
        .unwrap();
    (folder, datastore)
}

/// Runs statements as one transaction and unwraps what they give.
macro_rules! tx {
    ($datastore:expr, |$tx:ident| $work:expr) => {
        $datastore
            .run_tx("test", |$tx| {
                Box::pin(async move { Ok::<_, Failure>($work) })
            })
            .await
            .unwrap()
    };
}

const T: Timestamp = Timestamp(1_000_000);

fn silo(name: &str) -> SiloId {
    name.parse().unwrap()
}

fn job_id(name: &str) -> JobId {
    name.parse().unwrap()
}

fn version(text: &str) -> AdapterVersion {
    AdapterVersion::of(text.as_bytes())
}

fn new_job(name: &str) -> NewJob {
    NewJob {
        job_id: job_id(name),
        request_id: format!("request of {name}"),
        submitted_by: "olga".to_owned(),
        submitted_at: T,
        spec_toml: "spec".to_owned(),
    }
}

fn new_round(job: &str, number: u32, cohort: &[&str]) -> Round {
    Round::new(RoundSpec {
        job: job_id(job),
        number: RoundNumber(number),
        cohort: cohort.iter().map(|name| silo(name)).collect(),
        window: ParticipationWindow {
            min_count: 1,
            max_count: Some(2),
            min_time: Duration::from_millis(1500),
            max_time: Duration::from_mins(1),
        },
        base: version("base"),
        opened_at: T,
    })
}

/// A running job `j` with an open round 1 for `a` and `b`.
async fn running_job(datastore: &Datastore) -> (JobId, RoundNumber) {
    let (job, round) = (&new_job("j"), &new_round("j", 1, &["a", "b"]));
    tx!(datastore, |tx| {
        tx.insert_job(job).await?;
        tx.start_job(&job.job_id, version("base"), T).await?;
        for silo in &round.spec().cohort {
            tx.add_job_silo(&job.job_id, silo).await?;
        }
        tx.insert_round(round).await?;
        tx.set_job_round(&job.job_id, RoundNumber(1)).await?;
    });
    (job_id("j"), RoundNumber(1))
}

fn accepted(name: &str, upload: u8) -> RoundSiloRecord {
    RoundSiloRecord {
        silo_id: silo(name),
        outcome: Some(Outcome::Accepted),
        recorded_at: Some(T),
        digest: Some(Digest::of(name.as_bytes())),
        examples: 7,
        receipt: Some(vec![1, 2, 3]),
        upload_id: Some([upload; 16]),
    }
}

async fn a_job_is_stored_once_per_request_id(datastore: &Datastore) {
    let first = &new_job("j");
    let mut second = new_job("k");
    second.request_id.clone_from(&first.request_id);
    let second = &second;
    tx!(datastore, |tx| tx.insert_job(first).await?);
    let again = datastore
        .run_tx("test", |tx| {
            Box::pin(async move { Ok::<_, Failure>(tx.insert_job(second).await?) })
        })
        .await;
    assert!(again.is_err());
    let found = tx!(datastore, |tx| tx.job_by_request(&first.request_id).await?);
    assert_eq!(found.unwrap().job_id, first.job_id);
}

async fn a_job_goes_from_queued_to_running_to_its_end(datastore: &Datastore) {
    let job = &new_job("j");
    let id = &job.job_id;
    tx!(datastore, |tx| tx.insert_job(job).await?);
    let queued = tx!(datastore, |tx| tx.job(id).await?).unwrap();
    assert_eq!((queued.state, queued.round), (JobState::Queued, 0));
    assert_eq!((queued.adapter_version, queued.started_at), (None, None));
    tx!(datastore, |tx| tx.start_job(id, version("0"), T).await?);
    tx!(datastore, |tx| {
        tx.set_job_round(id, RoundNumber(3)).await?;
        tx.set_job_version(id, version("3")).await?;
        tx.end_job(id, JobState::Failed, "too few", T + Duration::from_secs(9))
            .await?;
    });
    let ended = tx!(datastore, |tx| tx.job(id).await?).unwrap();
    assert!(ended.has_ended());
    assert_eq!(
        (ended.state, ended.reason.as_str()),
        (JobState::Failed, "too few")
    );
    assert_eq!(
        (ended.round, ended.adapter_version),
        (3, Some(version("3")))
    );
    for late in [JobState::Succeeded, JobState::Cancelled] {
        let again = datastore
            .run_tx("test", |tx| {
                Box::pin(async move { Ok::<_, Failure>(tx.end_job(id, late, "", T).await?) })
            })
            .await;
        assert!(again.is_err());
    }
}

async fn jobs_are_listed_newest_first_and_queued_oldest_first(datastore: &Datastore) {
    for name in ["j1", "j2", "j3"] {
        let job = &new_job(name);
        tx!(datastore, |tx| tx.insert_job(job).await?);
    }
    let names = |jobs: Vec<JobRecord>| -> Vec<String> {
        jobs.iter().map(|job| job.job_id.to_string()).collect()
    };
    let newest = tx!(datastore, |tx| tx.newest_jobs(2).await?);
    assert_eq!(names(newest), ["j3", "j2"]);
    let queued = tx!(datastore, |tx| tx.jobs_in_state(JobState::Queued).await?);
    assert_eq!(names(queued), ["j1", "j2", "j3"]);
}

async fn a_round_is_restored_as_it_was(datastore: &Datastore) {
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

async fn a_silos_part_in_a_round_is_replaced_as_a_whole(datastore: &Datastore) {
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

async fn a_contribution_without_a_receipt_is_impossible(datastore: &Datastore) {
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

async fn a_lease_is_replaced_and_seen_until_it_runs_out(datastore: &Datastore) {
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

async fn an_upload_exists_once_per_job_round_and_silo(datastore: &Datastore) {
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
    tx!(datastore, |tx| tx
        .touch_upload(&[1; 16], T + Duration::from_secs(1))
        .await?);
    let order = tx!(datastore, |tx| tx.uploads().await?);
    assert_eq!(order[0], *other);
    let found = tx!(datastore, |tx| tx
        .upload_of(job, *number, &silo("a"))
        .await?);
    assert_eq!(found.unwrap().upload_id, [1; 16]);
    tx!(datastore, |tx| tx.delete_upload(&[1; 16]).await?);
    assert_eq!(tx!(datastore, |tx| tx.upload(&[1; 16]).await?), None);
    assert_eq!(
        tx!(datastore, |tx| tx.upload(&[2; 16]).await?).as_ref(),
        Some(other)
    );
}

async fn spooled_files_are_released_when_their_round_ends(datastore: &Datastore) {
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

fn report(value: f64, round: u32) -> MetricReport {
    MetricReport {
        silo: silo("a"),
        job: job_id("j"),
        round: RoundNumber(round),
        point: MetricPoint::AfterTraining,
        metrics: BTreeMap::from([("accuracy".to_owned(), value)]),
    }
}

async fn a_report_for_the_same_point_replaces_the_earlier_one(datastore: &Datastore) {
    let (job, _) = &running_job(datastore).await;
    for report in [&report(0.1, 1), &report(1.0 / 3.0, 2), &report(0.2, 1)] {
        tx!(datastore, |tx| tx.put_report(report).await?);
    }
    let all = tx!(datastore, |tx| tx.reports_after(job, 0).await?);
    let reports: Vec<_> = all.iter().map(|record| record.report.clone()).collect();
    assert_eq!(reports, [report(0.2, 1), report(1.0 / 3.0, 2)]);
    let newest = all[0].seq;
    assert!(newest > all[1].seq);
    assert!(tx!(datastore, |tx| tx.reports_after(job, newest).await?).is_empty());
}

async fn a_silo_keeps_its_enrollment_and_first_call(datastore: &Datastore) {
    let a = &silo("a");
    tx!(datastore, |tx| tx
        .see_silo(a, Enrollment::Pending, T)
        .await?);
    assert!(tx!(datastore, |tx| tx
        .set_enrollment(a, Enrollment::Active)
        .await?));
    assert!(!tx!(datastore, |tx| tx
        .set_enrollment(&silo("b"), Enrollment::Active)
        .await?));
    let later = T + Duration::from_secs(5);
    tx!(datastore, |tx| tx
        .see_silo(a, Enrollment::Pending, later)
        .await?);
    let seen = SiloRecord {
        silo_id: a.clone(),
        enrollment: Enrollment::Active,
        first_seen: T,
        last_seen: later,
    };
    assert_eq!(tx!(datastore, |tx| tx.silo(a).await?).as_ref(), Some(&seen));
    assert_eq!(tx!(datastore, |tx| tx.silos().await?), [seen]);
}

async fn jobs_of_a_silo_end_with_their_time_or_its_no(datastore: &Datastore) {
    let (job, _) = &running_job(datastore).await;
    let (a, b) = (&silo("a"), &silo("b"));
    let seen = async |silo: &SiloId, since: Timestamp| {
        tx!(datastore, |tx| tx.jobs_of_silo(silo, since).await?).len()
    };
    tx!(datastore, |tx| tx
        .decline_job(job, b, ErrorCode::UnknownTask, "no such task")
        .await?);
    assert_eq!(
        (
            seen(a, T).await,
            seen(b, T).await,
            seen(&silo("z"), T).await
        ),
        (1, 1, 0)
    );
    let parts = tx!(datastore, |tx| tx.job_silos(job).await?);
    assert_eq!(
        parts[1].declined,
        Some((ErrorCode::UnknownTask, "no such task".to_owned()))
    );
    tx!(datastore, |tx| {
        tx.count_bytes(job, a, 10, 200).await?;
        tx.count_bytes(job, a, 1, 0).await?;
        tx.record_outcome(job, RoundNumber(1), &accepted("a", 1))
            .await?;
        tx.end_job(job, JobState::Succeeded, "", T).await?;
    });
    let parts = tx!(datastore, |tx| tx.job_silos(job).await?);
    assert_eq!(
        (parts[0].bytes_up, parts[0].bytes_down, parts[0].accepted),
        (11, 200, 1)
    );
    assert_eq!((seen(a, T).await, seen(b, T).await), (1, 0));
    assert_eq!(seen(a, T + Duration::from_millis(1)).await, 0);
}

async fn adapter_versions_are_found_by_content(datastore: &Datastore) {
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

async fn a_failed_transaction_leaves_nothing(datastore: &Datastore) {
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

async fn a_reader_cannot_write(datastore: &Datastore) {
    let job = &new_job("j");
    let result = datastore
        .run_read("test", |tx| {
            Box::pin(async move { Ok::<_, Failure>(tx.insert_job(job).await?) })
        })
        .await;
    assert!(result.is_err());
}

async fn transactions_at_once_all_count(datastore: &Datastore) {
    let (job, _) = &running_job(datastore).await;
    let writes = (0..50).map(|_| async {
        let a = &silo("a");
        tx!(datastore, |tx| tx.count_bytes(job, a, 1, 2).await?);
    });
    futures::future::join_all(writes).await;
    let parts = tx!(datastore, |tx| tx.job_silos(job).await?);
    assert_eq!((parts[0].bytes_up, parts[0].bytes_down), (50, 100));
}

#[tokio::test]
async fn another_process_in_the_way_is_waited_for() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("test.db");
    let ours = Datastore::open(&path, Durability::Process).await.unwrap();
    let theirs = Datastore::open(&path, Durability::Process).await.unwrap();
    let writes = (0..40).map(|index| {
        let datastore = if index % 2 == 0 { &ours } else { &theirs };
        async move {
            let job = &new_job(&format!("j{index}"));
            tx!(datastore, |tx| tx.insert_job(job).await?);
        }
    });
    futures::future::join_all(writes).await;
    assert_eq!(tx!(&ours, |tx| tx.newest_jobs(100).await?).len(), 40);
}

#[tokio::test]
async fn a_database_of_a_newer_version_is_refused() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("test.db");
    let datastore = Datastore::open(&path, Durability::Power).await.unwrap();
    sqlx::query(
        "INSERT INTO _sqlx_migrations (version, description, success, checksum, execution_time)
         VALUES (999, 'later', TRUE, x'00', 0)",
    )
    .execute(&datastore.writer)
    .await
    .unwrap();
    datastore.close().await;
    let error = Datastore::open(&path, Durability::Power).await.unwrap_err();
    assert!(matches!(error, DatastoreError::Migrate(_)), "{error}");
}
