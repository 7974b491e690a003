//! What every database must do, as functions over a [`Datastore`]; and the list of databases that must do it.

use std::{collections::BTreeMap, time::Duration};

use concord_common::{
    Digest, ErrorCode, JobId, RoundNumber, SiloId, Timestamp,
    adapter::AdapterVersion,
    job::FEDERATED,
    round::{Outcome, ParticipationWindow, Record, Round, RoundPhase, RoundSpec, job::JobState},
    wire::{MetricPoint, MetricReport},
};

use super::*;
use crate::error::Failure;

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

mod jobs;
mod rounds;
mod silos;
mod transactions;
mod uploads;
mod versions;

/// Stamps the contract over a database: one test per function.
macro_rules! contract {
    ($open:ident: $($subject:ident { $($name:ident),* $(,)? })*) => {
        mod $open {
            $($(#[tokio::test]
            async fn $name() {
                let (_folder, datastore) = super::$open().await;
                super::$subject::$name(&datastore).await;
                datastore.close().await;
            })*)*
        }
    };
}

contract!(sqlite:
    jobs {
        a_job_is_stored_once_per_request_id,
        a_job_goes_from_queued_to_running_to_its_end,
        jobs_are_listed_newest_first_and_queued_oldest_first,
        a_report_for_the_same_point_replaces_the_earlier_one,
    }
    rounds {
        a_round_is_restored_as_it_was,
        a_silos_part_in_a_round_is_replaced_as_a_whole,
        a_contribution_without_a_receipt_is_impossible,
        a_lease_is_replaced_and_seen_until_it_runs_out,
    }
    uploads {
        an_upload_exists_once_per_job_round_and_silo,
        spooled_files_are_released_when_their_round_ends,
    }
    silos {
        a_silo_keeps_its_enrollment_and_first_call,
        jobs_of_a_silo_end_with_their_time_also_after_its_no,
        jobs_of_a_silo_are_cut_to_the_newest_ended_ones_and_never_leave_out_a_running_one,
    }
    versions {
        adapter_versions_are_found_by_content,
        old_versions_go_and_what_is_in_use_stays,
        a_version_that_another_job_has_too_is_not_given_up,
    }
    transactions {
        a_failed_transaction_leaves_nothing,
        a_reader_cannot_write,
        transactions_at_once_all_count,
    }
);

async fn sqlite() -> (tempfile::TempDir, Datastore) {
    let folder = tempfile::tempdir().unwrap();
    let datastore = Datastore::open(&folder.path().join("test.db"), Durability::Process)
        .await
        .unwrap();
    (folder, datastore)
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
        kind: FEDERATED,
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
        tx.add_job_silos(&job.job_id, &round.spec().cohort).await?;
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
    let mut writer = datastore.writer.lend().await.unwrap();
    sqlx::query(
        "INSERT INTO _sqlx_migrations (version, description, success, checksum, execution_time)
         VALUES (999, 'later', TRUE, x'00', 0)",
    )
    .execute(writer.connection())
    .await
    .unwrap();
    writer.give_back();
    datastore.close().await;
    let error = Datastore::open(&path, Durability::Power).await.unwrap_err();
    assert!(matches!(error, DatastoreError::Migrate(_)), "{error}");
}

#[tokio::test]
async fn a_database_from_before_there_were_workers_is_brought_up_to_date() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("test.db");
    let options = SqliteConnectOptions::new()
        .filename(&path)
        .create_if_missing(true);
    let mut old = SqliteConnection::connect_with(&options).await.unwrap();
    migrations::run_first(&mut old, 1).await.unwrap();
    sqlx::query(
        "INSERT INTO jobs (job_id, request_id, submitted_by, submitted_at, spec_toml, state, reason, round)
         VALUES ('old', 'request', 'olga', 1, 'spec', 'running', '', 0)",
    )
    .execute(&mut old)
    .await
    .unwrap();
    old.close().await.unwrap();

    let datastore = Datastore::open(&path, Durability::Power).await.unwrap();
    let old = tx!(&datastore, |tx| tx
        .jobs_in_state(JobState::Running, FEDERATED)
        .await?);
    assert_eq!(old.len(), 1);
    assert_eq!(old[0].job_id, job_id("old"));
    assert!(tx!(&datastore, |tx| tx.worker_job(&job_id("old")).await?).is_none());
    let new = &NewJob {
        kind: "artaug",
        ..new_job("new")
    };
    let waiting = tx!(&datastore, |tx| {
        tx.insert_job(new).await?;
        tx.insert_worker_job(&new.job_id, 7).await?;
        tx.claimable_job("artaug", T).await?
    });
    assert_eq!(waiting.unwrap().job_id, new.job_id);
}
