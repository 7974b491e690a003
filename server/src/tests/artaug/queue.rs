//! What an operator is told of a job that no worker takes.

use std::{fs, os::unix::fs::PermissionsExt as _, time::Duration};

use concord_proto::v1::{self, JobState};

use super::{FakeWorker, advance, artaug};
use crate::tests::harness::{World, spec};

async fn submit(world: &World, request_id: &str, spec_toml: String) -> v1::SubmitJobResponse {
    let request = v1::SubmitJobRequest {
        request_id: request_id.to_owned(),
        spec_toml,
    };
    let answer = world.operator().submit_job(request).await.unwrap();
    answer.into_inner()
}

async fn listed(world: &World, job_id: &str) -> v1::Job {
    let request = v1::ListJobsRequest { limit: 0 };
    let answer = world.operator().list_jobs(request).await.unwrap();
    let mut jobs = answer.into_inner().jobs.into_iter();
    jobs.find(|job| job.job_id == job_id).unwrap()
}

#[tokio::test]
async fn a_job_that_no_worker_will_take_is_queued_with_a_warning() {
    let world = World::start().await;
    let answer = submit(&world, "a", artaug()).await;
    assert!(answer.warning.contains("workers.config"), "{answer:?}");
    let job = answer.job.unwrap();
    assert_eq!(
        (job.state(), &job.reason),
        (JobState::Queued, &answer.warning)
    );
    assert_eq!(listed(&world, &job.job_id).await, job);
    assert_eq!(world.job(&job.job_id).await.job.unwrap(), job);
    // Sent again, it is still so; silos' jobs wait for no worker.
    assert_eq!(submit(&world, "a", artaug()).await.warning, answer.warning);
    assert_eq!(submit(&world, "b", spec(1, 1, "")).await.warning, "");

    FakeWorker::of(&world, "w1").claim().await;
    assert_eq!(submit(&world, "a", artaug()).await.warning, "");
    assert_eq!(world.job(&job.job_id).await.job.unwrap().reason, "");
}

#[tokio::test]
async fn a_worker_that_called_lately_may_call_again() {
    let mut world = World::start().await;
    let first = world.submit(&artaug()).await;
    let mut held = FakeWorker::of(&world, "w1").claim().await;
    assert_eq!(held.lease.job_id, first);
    held.release(v1::JobRelease::Succeeded).await.unwrap();
    let next = submit(&world, "a", artaug()).await;
    assert_eq!(
        (next.warning.as_str(), next.job.unwrap().reason.as_str()),
        ("", "")
    );
    advance(&world, Duration::from_secs(361));
    let later = submit(&world, "b", artaug()).await;
    assert!(later.warning.contains("6 minutes"), "{later:?}");

    // One that holds a job is there, although a server that has just started has not heard it.
    FakeWorker::of(&world, "w1").claim().await;
    world.restart().await;
    let answer = submit(&world, "c", artaug()).await;
    assert_eq!(answer.warning, "");
    let reason = answer.job.unwrap().reason;
    assert!(reason.contains("workers.max_running"), "{reason}");
}

#[tokio::test]
async fn a_server_that_starts_workers_of_its_own_warns_of_nothing() {
    let mut world = World::stopped();
    let script = world.folder.path().join("worker.sh");
    fs::write(&script, "#!/bin/sh\nexec sleep 1000\n").unwrap();
    fs::set_permissions(&script, fs::Permissions::from_mode(0o755)).unwrap();
    world.config.workers.config = Some(script.clone());
    world.config.workers.program = Some(script);
    world.restart().await;
    let answer = submit(&world, "a", artaug()).await;
    assert_eq!(answer.warning, "");
    assert_eq!(answer.job.unwrap().reason, "");
    world.stop().await;
}
