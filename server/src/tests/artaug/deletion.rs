//! An operator deletes what an ended job has left: all of it or, after a crash, the rest at the next start.

use concord_common::{Digest, ErrorCode, JobId};
use concord_proto::v1::{self, JobRelease, JobState};
use tonic::Status;

use super::{
    FakeWorker, Held, artaug, at, expect_all_refused,
    objects::{files, folder},
};
use crate::{
    datastore::WorkerJobRecord,
    decide::workers,
    driver::sweep_now,
    error::Failure,
    tests::harness::{World, code, refusal, spec},
};

async fn delete(world: &World, job_id: &str) -> Result<v1::DeleteJobFilesResponse, Status> {
    let request = v1::DeleteJobFilesRequest {
        job_id: job_id.to_owned(),
    };
    let answer = world.operator().delete_job_files(request).await?;
    Ok(answer.into_inner())
}

/// A job in a worker's hands that keeps a result of 6 bytes, a picture of 7, a checkpoint of 10 and lines of 6.
async fn furnished(world: &World) -> Held {
    world.submit(&artaug()).await;
    let mut held = FakeWorker::of(world, "w1").claim().await;
    for bytes in [b"result".as_slice(), b"picture", b"checkpoint"] {
        held.put(bytes).await.unwrap();
    }
    held.name("lora/merged.safetensors", Digest::of(b"result"))
        .await
        .unwrap();
    held.append(0, &["one", "two"]).await.unwrap();
    let progress = v1::ArtaugProgress {
        last_images: vec![Digest::of(b"picture").to_vec()],
        bytes_kept: 29,
        ..at(1, "generate")
    };
    held.renew(Some(progress)).await.unwrap();
    held
}

/// The same, ended.
async fn ended(world: &World) -> String {
    let mut held = furnished(world).await;
    held.release(JobRelease::Succeeded).await.unwrap();
    held.lease.job_id
}

async fn record(world: &World, job_id: &str) -> WorkerJobRecord {
    let job_id: &JobId = &job_id.parse().unwrap();
    let found = world.server().context().datastore.run_read("test", |tx| {
        Box::pin(async move { Ok::<_, Failure>(tx.worker_job(job_id).await?) })
    });
    found.await.unwrap().unwrap()
}

/// Nothing of the job is left but the job itself.
async fn expect_gone(world: &World, job_id: &str) {
    assert!(files(world, job_id).is_empty());
    assert_eq!(record(world, job_id).await.kept_bytes(), 0);
    let id: &JobId = &job_id.parse().unwrap();
    let left = world.server().context().datastore.run_read("test", |tx| {
        Box::pin(async move {
            let lines = tx.journal_lines(id, 0, 10, 1 << 20).await?;
            Ok::<_, Failure>((lines, tx.all_kept_bytes().await?))
        })
    });
    assert_eq!(left.await.unwrap(), (Vec::new(), 0));
    let request = v1::ListArtefactsRequest {
        job_id: job_id.to_owned(),
    };
    let listed = world.operator().list_artefacts(request).await.unwrap();
    assert!(listed.into_inner().artefacts.is_empty());
    let request = v1::GetArtefactRequest {
        job_id: job_id.to_owned(),
        digest: Digest::of(b"picture").to_vec(),
        offset: 0,
    };
    let answer = world.operator().get_artefact(request).await;
    assert_eq!(code(answer), ErrorCode::UnknownObject);
}

#[tokio::test]
async fn the_files_of_an_ended_job_are_deleted_and_the_job_stays_as_it_ended() {
    let mut world = World::start().await;
    let job_id = ended(&world).await;
    let before = world.job(&job_id).await;
    let answer = delete(&world, &job_id).await.unwrap();
    assert_eq!(answer.bytes_freed, 29);
    expect_gone(&world, &job_id).await;
    let mut expected = before.job.clone().unwrap();
    expected.files_deleted_at = Some(world.server().context().now().to_proto());
    if let Some(progress) = &mut expected.artaug {
        // They would lead nowhere.
        progress.last_images.clear();
        progress.bytes_kept = 0;
    }
    assert_eq!(expected.state(), JobState::Succeeded);
    assert_eq!(answer.job.as_ref(), Some(&expected));
    let after = world.job(&job_id).await;
    assert_eq!(after.job.as_ref(), Some(&expected));
    assert_eq!(after.spec_toml, before.spec_toml);

    // Repeated it changes nothing, also after a restart, which leaves not even the folder.
    world.advance(std::time::Duration::from_secs(5));
    let again = delete(&world, &job_id).await.unwrap();
    assert_eq!((again.bytes_freed, again.job), (0, Some(expected.clone())));
    world.restart().await;
    assert!(!folder(&world, &job_id).exists());
    let again = delete(&world, &job_id).await.unwrap();
    assert_eq!((again.bytes_freed, again.job), (0, Some(expected)));
    sweep_now(world.server().context()).await.unwrap();
    expect_gone(&world, &job_id).await;
}

#[tokio::test]
async fn files_of_jobs_that_have_not_ended_are_unknown_or_silos_stay() {
    let world = World::start().await;
    let queued = world.submit(&artaug()).await;
    let refused = refusal(delete(&world, &queued).await);
    assert_eq!(refused.code, ErrorCode::JobNotEnded);
    assert!(refused.message.contains("is queued"), "{refused}");
    let mut held = FakeWorker::of(&world, "w1").claim().await;
    held.put(b"picture").await.unwrap();
    let refused = refusal(delete(&world, &queued).await);
    assert_eq!(refused.code, ErrorCode::JobNotEnded);
    assert!(refused.message.contains("cancel it first"), "{refused}");
    assert_eq!(files(&world, &queued).len(), 1);
    assert_eq!(held.put(b"picture").await.unwrap(), 7);
    assert_eq!(code(delete(&world, "nothing").await), ErrorCode::UnknownJob);
    assert_eq!(code(delete(&world, "").await), ErrorCode::InvalidRequest);
    let federated = world.submit(&spec(1, 1, "")).await;
    assert_eq!(code(delete(&world, &federated).await), ErrorCode::WrongKind);
}

#[tokio::test]
async fn a_worker_that_has_not_heard_of_the_cancelling_brings_nothing_back() {
    let world = World::start().await;
    let mut held = furnished(&world).await;
    let job_id = held.lease.job_id.clone();
    let request = v1::CancelJobRequest {
        job_id: job_id.clone(),
    };
    world.operator().cancel_job(request).await.unwrap();
    assert_eq!(delete(&world, &job_id).await.unwrap().bytes_freed, 29);
    assert_eq!(code(held.put(b"late").await), ErrorCode::LeaseLost);
    expect_gone(&world, &job_id).await;
    let answer = held.renew(None).await.unwrap();
    assert_eq!(answer.command(), v1::WorkerCommand::Cancel);
    expect_all_refused(&mut held).await;
    expect_gone(&world, &job_id).await;
}

#[tokio::test]
async fn deleted_files_make_room_for_other_jobs() {
    let world = World::start_with(|config| {
        config.workers.max_total_disk = concord_common::config::ByteSize::mebibytes(1);
    })
    .await;
    world.submit(&artaug()).await;
    let mut held = FakeWorker::of(&world, "w1").claim().await;
    let large = vec![1; 700_000];
    held.put(&large).await.unwrap();
    held.name("a.bin", Digest::of(&large)).await.unwrap();
    held.release(JobRelease::Succeeded).await.unwrap();
    let mut next = furnished(&world).await;
    assert_eq!(code(next.put(&vec![2; 700_000]).await), ErrorCode::Busy);
    delete(&world, &held.lease.job_id).await.unwrap();
    next.put(&vec![2; 700_000]).await.unwrap();
}

/// Where a deletion breaks off.
#[derive(Clone, Copy, PartialEq, PartialOrd)]
enum Crash {
    /// The files are condemned.
    Condemned,
    /// Half of the journal is gone.
    MidJournal,
    /// All rows are gone, and no file.
    BeforeFiles,
}

/// Does as a deletion does until it breaks off.
async fn begin_deletion(world: &World, job_id: &str, crash: Crash) {
    let context = world.server().context();
    let (id, now): (&JobId, _) = (&job_id.parse().unwrap(), context.now());
    let begun = context.datastore.run_tx("test", |tx| {
        Box::pin(async move {
            let (change, bytes) = workers::delete_files(tx, id, now).await?;
            assert_eq!((change.is_some(), bytes), (true, 29));
            if crash >= Crash::MidJournal {
                assert_eq!(tx.drop_journal_lines(id, 1).await?, 1);
            }
            if crash == Crash::BeforeFiles {
                assert_eq!(tx.keep_only_artefacts(id).await?.len(), 3);
            }
            Ok::<_, Failure>(())
        })
    });
    begun.await.unwrap();
    assert_eq!(files(world, job_id).len(), 3);
}

#[tokio::test]
async fn a_deletion_that_a_crash_came_into_is_finished_at_the_start() {
    for crash in [Crash::Condemned, Crash::MidJournal, Crash::BeforeFiles] {
        let mut world = World::start().await;
        let job_id = ended(&world).await;
        let other = ended(&world).await;
        begin_deletion(&world, &job_id, crash).await;
        let condemned = record(&world, &job_id).await.files_deleted_at;
        assert!(condemned.is_some());
        world.restart().await;
        assert!(files(&world, &job_id).is_empty());
        let found = record(&world, &job_id).await;
        assert_eq!((found.kept_bytes(), found.files_deleted_at), (0, condemned));
        assert_eq!(delete(&world, &job_id).await.unwrap().bytes_freed, 0);
        // Nobody else's files went with them.
        assert_eq!(files(&world, &other).len(), 3);
        assert_eq!(record(&world, &other).await.kept_bytes(), 29);
    }
}

#[tokio::test]
async fn a_deletion_that_broke_off_is_finished_by_the_next_sweep() {
    let world = World::start().await;
    let job_id = ended(&world).await;
    begin_deletion(&world, &job_id, Crash::Condemned).await;
    sweep_now(world.server().context()).await.unwrap();
    expect_gone(&world, &job_id).await;
}

#[tokio::test]
async fn a_call_that_finishes_a_deletion_tells_what_was_left() {
    // The first of the two lines is gone already, and then all that the server knows of.
    for (crash, left) in [
        (Crash::Condemned, 29),
        (Crash::MidJournal, 26),
        (Crash::BeforeFiles, 0),
    ] {
        let world = World::start().await;
        let job_id = ended(&world).await;
        begin_deletion(&world, &job_id, crash).await;
        assert_eq!(record(&world, &job_id).await.kept_bytes(), left);
        assert_eq!(delete(&world, &job_id).await.unwrap().bytes_freed, left);
        assert_eq!(record(&world, &job_id).await.kept_bytes(), 0);
        // Files without a row wait for the next start.
        if crash < Crash::BeforeFiles {
            expect_gone(&world, &job_id).await;
        }
    }
}
