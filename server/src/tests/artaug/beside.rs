//! Workers' jobs and silos' jobs do not stand in each other's way.

use concord_proto::v1::{self, JobRelease, JobState};

use super::{FakeWorker, artaug};
use crate::tests::harness::{World, expect_published, spec};

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
