//! Workers' jobs and silos' jobs do not stand in each other's way.

use concord_common::{Digest, chunk};
use concord_proto::v1::{self, JobRelease, JobState, put_object_request::Part};

use super::{FakeWorker, artaug};
use crate::{
    config::Durability,
    tests::harness::{World, eventually, expect_published, spec},
};

#[tokio::test]
async fn rounds_go_on_beside_a_job_that_a_worker_holds() {
    let mut world = World::start_with(|config| config.jobs.max_running = 1).await;
    let [mut a] = world.silos(["a"]).await;
    let pictures = world.submit(&artaug()).await;
    let waiting = world.submit(&artaug()).await;
    let rounds = world.submit(&spec(2, 1, "")).await;
    let mut held = FakeWorker::of(&world, "w1").claim().await;
    a.contribute(&rounds, 1, 0.5, 3).await;
    expect_published(&world, &mut a, &rounds, 1, &[("a", 0.5, 3)]).await;
    held.append(0, &["one"]).await.unwrap();

    // The server takes its own up again, and leaves the worker's to the worker.
    world.restart().await;
    let mut a = world.silo("a").await;
    held.client = FakeWorker::of(&world, "w1").client;
    a.contribute(&rounds, 2, 0.25, 3).await;
    let job = world.wait_for_state(&rounds, JobState::Succeeded).await;
    assert_eq!(
        (job.kind.as_str(), job.worker.as_str()),
        ("federated-training", "")
    );
    assert_eq!(held.append(1, &["two"]).await.unwrap(), 2);

    let request = v1::ListJobsRequest { limit: 0 };
    let jobs = world.operator().list_jobs(request).await.unwrap();
    let listed: Vec<_> = jobs
        .into_inner()
        .jobs
        .into_iter()
        .map(|job| (job.job_id, job.kind, job.worker))
        .collect();
    let row =
        |id: &str, kind: &str, worker: &str| (id.to_owned(), kind.to_owned(), worker.to_owned());
    assert_eq!(
        listed,
        [
            row(&rounds, "federated-training", ""),
            row(&waiting, "artaug", ""),
            row(&pictures, "artaug", "w1"),
        ]
    );
    held.release(JobRelease::Succeeded).await.unwrap();
    world.wait_for_state(&pictures, JobState::Succeeded).await;
}

#[tokio::test]
async fn a_full_queue_of_one_kind_does_not_turn_the_other_away() {
    let world = World::start_with(|config| config.jobs.max_queued = 1).await;
    world.submit(&artaug()).await;
    world.submit(&spec(1, 1, "")).await;
}

#[tokio::test]
async fn a_revoked_silo_changes_nothing_for_workers() {
    let world = World::start().await;
    let [_a] = world.silos(["a"]).await;
    let job_id = world.submit(&artaug()).await;
    let mut held = FakeWorker::of(&world, "w1").claim().await;
    let request = v1::SetEnrollmentRequest {
        silo_id: "a".to_owned(),
        enrollment: v1::Enrollment::Revoked as i32,
    };
    world.operator().set_enrollment(request).await.unwrap();
    held.append(0, &["one"]).await.unwrap();
    let job = world.job(&job_id).await.job.unwrap();
    assert_eq!(job.state(), JobState::Running);
}

#[tokio::test]
async fn rounds_go_on_while_a_large_object_comes_and_is_synced() {
    let world = World::start_with(|config| config.durability = Durability::Power).await;
    let [mut a] = world.silos(["a"]).await;
    world.submit(&artaug().replace("1 MiB", "64 MiB")).await;
    let rounds = world.submit(&spec(3, 1, "")).await;
    let mut held = FakeWorker::of(&world, "w1").claim().await;
    let large: Vec<u8> = (0..40_u32 << 20).map(|n| (n % 251) as u8).collect();
    let large = bytes::Bytes::from(large);
    let digest = Digest::of(&large);
    let header = Part::Header(v1::PutObjectHeader {
        grip: Some(held.grip()),
        digest: digest.to_vec(),
        bytes: large.len() as u64,
    });
    let chunks = chunk::chunks(&large, 0, 1 << 20).map(Part::Chunk);
    let parts: Vec<_> = [header].into_iter().chain(chunks).collect();
    let mut sender = held.clone();
    let work = async {
        for round in 1..=3 {
            a.contribute(&rounds, round, 0.5, 3).await;
        }
        world.wait_for_state(&rounds, JobState::Succeeded).await;
    };
    let (kept, ()) = tokio::join!(sender.put_parts(parts), work);
    assert_eq!(kept.unwrap(), large.len() as u64);
    assert_eq!(held.get(digest, 0).await.unwrap(), large);
}

#[tokio::test]
async fn the_bytes_of_an_object_are_on_the_disk_before_anybody_has_to_wait_for_it() {
    let world = World::start_with(|config| config.durability = Durability::Power).await;
    world.submit(&artaug()).await;
    let mut held = FakeWorker::of(&world, "w1").claim().await;
    let context = world.server().context();
    // Somebody else changes files and rows: the object comes whole meanwhile, and has no name before that is over.
    let change = context.objects.change().await;
    let folder = world
        .config
        .state_dir
        .join("artaug")
        .join(&held.lease.job_id);
    let mut sender = held.clone();
    let sending = tokio::task::JoinSet::from_iter([async move { sender.put(b"picture").await }]);
    let sizes = || {
        let files = std::fs::read_dir(&folder).into_iter().flatten();
        files
            .map(|file| file.unwrap().metadata().unwrap().len())
            .collect::<Vec<_>>()
    };
    eventually("the bytes", async || (sizes() == [7]).then_some(())).await;
    let digest = Digest::of(b"picture");
    assert_eq!(held.missing(&[digest]).await.unwrap(), [digest.to_vec()]);
    drop(change);
    assert_eq!(sending.join_all().await.remove(0).unwrap(), 7);
    assert!(held.missing(&[digest]).await.unwrap().is_empty());
}
