//! An operator's hand on a worker's job.

use std::time::Duration;

use concord_common::{Digest, ErrorCode, config::ByteSize};
use concord_proto::v1::{self, JobRelease, JobState, WorkerCommand};

use super::{FakeWorker, advance, artaug, expect_all_refused, is_waiting};
use crate::tests::harness::{World, code, refusal, spec};

async fn pause(world: &World, job_id: &str) -> Result<v1::Job, tonic::Status> {
    let request = v1::PauseJobRequest {
        job_id: job_id.to_owned(),
    };
    let answer = world.operator().pause_job(request).await?;
    Ok(answer.into_inner().job.unwrap())
}

async fn resume(world: &World, job_id: &str) -> Result<v1::Job, tonic::Status> {
    let request = v1::ResumeJobRequest {
        job_id: job_id.to_owned(),
    };
    let answer = world.operator().resume_job(request).await?;
    Ok(answer.into_inner().job.unwrap())
}

async fn cancel(world: &World, job_id: &str) -> v1::Job {
    let request = v1::CancelJobRequest {
        job_id: job_id.to_owned(),
    };
    let answer = world.operator().cancel_job(request).await.unwrap();
    answer.into_inner().job.unwrap()
}

#[tokio::test]
async fn a_paused_job_is_given_back_and_rests_until_it_is_resumed() {
    let world = World::start().await;
    let job_id = world.submit(&artaug()).await;
    let mut worker = FakeWorker::of(&world, "w1");
    let mut held = worker.claim().await;
    for _ in 0..2 {
        assert!(pause(&world, &job_id).await.unwrap().paused);
    }
    // Until it lets go, the worker may bring what it has.
    let answer = held.renew(None).await.unwrap();
    assert_eq!(answer.command(), WorkerCommand::Pause);
    held.append(0, &["saved"]).await.unwrap();
    held.release(JobRelease::Paused).await.unwrap();
    assert!(!is_waiting(&world).await);
    let resting = world.job(&job_id).await.job.unwrap();
    assert!(resting.paused && resting.worker.is_empty());
    assert_eq!(resting.state(), JobState::Running);

    let mut waiting = worker.clone();
    let (mut held, job) = tokio::join!(waiting.claim(), resume(&world, &job_id));
    assert!(!job.unwrap().paused);
    assert_eq!(
        (held.lease.job_id.as_str(), held.lease.journal_lines),
        (&*job_id, 1)
    );
    let answer = held.renew(None).await.unwrap();
    assert_eq!(answer.command(), WorkerCommand::GoOn);
}

#[tokio::test]
async fn a_job_that_is_paused_in_the_queue_lets_the_next_one_go_first() {
    let world = World::start().await;
    let first = world.submit(&artaug()).await;
    let second = world.submit(&artaug()).await;
    assert_eq!(
        pause(&world, &first).await.unwrap().state(),
        JobState::Queued
    );
    let mut worker = FakeWorker::of(&world, "w1");
    let mut held = worker.claim().await;
    assert_eq!(held.lease.job_id, second);
    held.release(JobRelease::Succeeded).await.unwrap();
    resume(&world, &first).await.unwrap();
    assert_eq!(worker.claim().await.lease.job_id, first);
}

#[tokio::test]
async fn a_worker_that_dies_over_a_paused_job_leaves_it_paused() {
    let world = World::start().await;
    let job_id = world.submit(&artaug()).await;
    FakeWorker::of(&world, "w1").claim().await;
    pause(&world, &job_id).await.unwrap();
    advance(&world, Duration::from_secs(61));
    assert!(!is_waiting(&world).await);
    resume(&world, &job_id).await.unwrap();
    assert!(is_waiting(&world).await);
}

#[tokio::test]
async fn a_cancelled_job_ends_at_once_and_its_worker_is_told() {
    let world = World::start().await;
    let job_id = world.submit(&artaug()).await;
    let next = world.submit(&artaug()).await;
    let mut worker = FakeWorker::of(&world, "w1");
    let mut held = worker.claim().await;
    held.append(0, &["one"]).await.unwrap();
    let job = cancel(&world, &job_id).await;
    assert_eq!(job.state(), JobState::Cancelled);
    assert!(
        job.reason.contains("olga") && job.worker.is_empty(),
        "{job:?}"
    );
    assert_eq!(cancel(&world, &job_id).await, job);
    // As long as its worker may still be at it, no other one begins beside it.
    assert!(!is_waiting(&world).await);
    assert_eq!(code(held.append(1, &["two"]).await), ErrorCode::LeaseLost);
    let answer = held.renew(None).await.unwrap();
    assert_eq!(answer.command(), WorkerCommand::Cancel);
    expect_all_refused(&mut held).await;
    assert_eq!(worker.claim().await.lease.job_id, next);
}

#[tokio::test]
async fn a_cancelled_job_whose_worker_is_gone_is_no_failed_attempt() {
    let world = World::start().await;
    let job_id = world.submit(&artaug()).await;
    let next = world.submit(&artaug()).await;
    let mut worker = FakeWorker::of(&world, "w1");
    worker.claim().await;
    let job = cancel(&world, &job_id).await;
    advance(&world, Duration::from_secs(61));
    assert_eq!(worker.claim().await.lease.job_id, next);
    assert_eq!(world.job(&job_id).await.job.unwrap(), job);
}

#[tokio::test]
async fn an_ended_job_cannot_be_paused_and_a_silos_job_knows_none_of_this() {
    let world = World::start().await;
    let job_id = world.submit(&artaug()).await;
    cancel(&world, &job_id).await;
    assert_eq!(code(pause(&world, &job_id).await), ErrorCode::JobEnded);
    assert_eq!(code(resume(&world, &job_id).await), ErrorCode::JobEnded);
    assert_eq!(code(pause(&world, "nothing").await), ErrorCode::UnknownJob);
    let federated = world.submit(&spec(1, 1, "")).await;
    assert_eq!(code(pause(&world, &federated).await), ErrorCode::WrongKind);
    assert_eq!(code(resume(&world, &federated).await), ErrorCode::WrongKind);
    let mut operator = world.operator();
    let request = v1::ListReviewRequest {
        job_id: federated.clone(),
    };
    assert_eq!(
        code(operator.list_review(request).await),
        ErrorCode::WrongKind
    );
    let request = v1::ListArtefactsRequest { job_id: federated };
    assert_eq!(
        code(operator.list_artefacts(request).await),
        ErrorCode::WrongKind
    );
}

#[tokio::test]
async fn an_operator_fetches_results_and_pictures_of_the_job_that_has_them() {
    let world = World::start_with(|config| config.workers.max_running = 2).await;
    let job_id = world.submit(&artaug()).await;
    let other = world.submit(&artaug()).await;
    let mut held = FakeWorker::of(&world, "w1").claim().await;
    let picture = vec![7; 400_000];
    let digest = Digest::of(&picture);
    held.put(&picture).await.unwrap();
    held.name("gallery/1.png", digest).await.unwrap();
    held.release(JobRelease::Succeeded).await.unwrap();
    let mut operator = world.operator();
    let request = v1::ListArtefactsRequest {
        job_id: job_id.clone(),
    };
    let listed = operator.list_artefacts(request).await.unwrap().into_inner();
    let expected = v1::Artefact {
        name: "gallery/1.png".to_owned(),
        digest: digest.to_vec(),
        bytes: 400_000,
    };
    assert_eq!(listed.artefacts, [expected]);

    for offset in [0, 399_999, 400_000] {
        let request = v1::GetArtefactRequest {
            job_id: job_id.clone(),
            digest: digest.to_vec(),
            offset,
        };
        let mut stream = operator.get_artefact(request).await.unwrap().into_inner();
        let mut bytes = Vec::new();
        while let Some(piece) = stream.message().await.unwrap() {
            assert_eq!(piece.total, 400_000);
            bytes.extend_from_slice(&piece.chunk.unwrap().data);
        }
        assert_eq!(bytes, picture[offset as usize..]);
    }
    for (job_id, digest, expected) in [
        (&other, digest.to_vec(), ErrorCode::UnknownObject),
        (&job_id, vec![0; 32], ErrorCode::UnknownObject),
        (&job_id, vec![0; 31], ErrorCode::InvalidRequest),
    ] {
        let request = v1::GetArtefactRequest {
            job_id: job_id.clone(),
            digest,
            offset: 0,
        };
        assert_eq!(code(operator.get_artefact(request).await), expected);
    }
}

#[tokio::test]
async fn a_specification_of_this_kind_is_checked_before_it_is_queued() {
    let world = World::start_with(|config| {
        config.workers.max_disk = ByteSize::mebibytes(2);
    })
    .await;
    for (disk, reason) in [("1 kB", "limits.disk"), ("3 MiB", "workers.max_disk")] {
        let request = v1::SubmitJobRequest {
            request_id: "a".to_owned(),
            spec_toml: artaug().replace("1 MiB", disk),
        };
        let refused = refusal(world.operator().submit_job(request).await);
        assert_eq!(refused.code, ErrorCode::InvalidJobSpec);
        assert!(refused.message.contains(reason), "{refused}");
    }
}
