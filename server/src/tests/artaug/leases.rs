//! Who holds a job, for how long, and who goes on with it.

use std::time::Duration;

use concord_common::ErrorCode;
use concord_proto::v1::{self, JobRelease, JobState, WorkerCommand};

use super::{FakeWorker, Held, advance, artaug, expect_all_refused, is_waiting, now};
use crate::{
    datastore::WorkerJobRecord,
    error::Failure,
    tests::harness::{World, code, eventually, refusal},
};

/// The workers' part of a job as it is stored.
async fn stored(world: &World, job_id: &str) -> WorkerJobRecord {
    let job_id = &job_id.parse().unwrap();
    let datastore = &world.server().context().datastore;
    let found = datastore.run_read("test", |tx| {
        Box::pin(async move { Ok::<_, Failure>(tx.worker_job(job_id).await?) })
    });
    found.await.unwrap().unwrap()
}

#[tokio::test]
async fn a_job_goes_from_the_queue_to_a_worker_and_to_its_end() {
    let world = World::start().await;
    let job_id = world.submit(&artaug()).await;
    let queued = world.job(&job_id).await.job.unwrap();
    assert_eq!(
        (queued.state(), queued.kind.as_str(), queued.name.as_str()),
        (JobState::Queued, "artaug", "icons")
    );
    let mut held = FakeWorker::of(&world, "w1").claim().await;
    assert_eq!(held.lease.job_id, job_id);
    assert_eq!(held.lease.spec_toml, artaug());
    assert_eq!((held.lease.attempt, held.lease.journal_lines), (1, 0));
    assert_eq!(held.lease.token.len(), 16);
    let running = world.job(&job_id).await.job.unwrap();
    assert_eq!(
        (running.state(), running.worker.as_str()),
        (JobState::Running, "w1")
    );
    held.release(JobRelease::Succeeded).await.unwrap();
    let ended = world.job(&job_id).await.job.unwrap();
    assert_eq!(ended.state(), JobState::Succeeded);
    assert!(ended.worker.is_empty() && ended.ended_at.is_some());
    expect_all_refused(&mut held).await;
    assert!(!is_waiting(&world).await);
}

#[tokio::test]
async fn a_worker_that_asks_early_gets_the_job_as_soon_as_it_is_submitted() {
    let world = World::start().await;
    let mut worker = FakeWorker::of(&world, "w1");
    let spec = artaug();
    let (held, job_id) = tokio::join!(worker.claim(), world.submit(&spec));
    assert_eq!(held.lease.job_id, job_id);
}

#[tokio::test]
async fn a_worker_of_other_kinds_is_told_to_come_back_later() {
    let world = World::start().await;
    world.submit(&artaug()).await;
    let mut worker = FakeWorker::of(&world, "w1");
    let request = v1::ClaimJobRequest {
        kinds: vec!["weaving".to_owned()],
        version: String::new(),
    };
    let answer = worker.client.claim_job(request).await.unwrap().into_inner();
    assert!(answer.lease.is_none());
    assert!(answer.retry_after.unwrap().seconds > 0);
    let request = v1::ClaimJobRequest::default();
    let answer = worker.client.claim_job(request).await;
    assert_eq!(code(answer), ErrorCode::InvalidRequest);
}

#[tokio::test]
async fn a_worker_that_failed_to_renew_loses_its_job_to_another_one_and_changes_nothing_any_more() {
    let world = World::start().await;
    let job_id = world.submit(&artaug()).await;
    let mut first = FakeWorker::of(&world, "w1").claim().await;
    first.append(0, &["one", "two"]).await.unwrap();
    first.put(b"picture").await.unwrap();
    // Renewed in time it holds on.
    for _ in 0..3 {
        advance(&world, Duration::from_secs(40));
        let answer = first.renew(None).await.unwrap();
        assert_eq!(answer.command(), WorkerCommand::GoOn);
    }
    advance(&world, Duration::from_secs(61));
    expect_all_refused(&mut first).await;

    let mut second = FakeWorker::of(&world, "w2").claim().await;
    assert_eq!(second.lease.job_id, job_id);
    assert_eq!((second.lease.attempt, second.lease.journal_lines), (2, 2));
    assert_ne!(second.lease.token, first.lease.token);
    expect_all_refused(&mut first).await;
    // Neither with the other's token in its own name, nor with its own in the other's.
    let mut thief = first.clone();
    thief.lease.token = second.lease.token.clone();
    expect_all_refused(&mut thief).await;
    assert_eq!(second.journal(0).await.unwrap(), ["one", "two"]);
    assert_eq!(second.append(2, &["three"]).await.unwrap(), 3);
    assert_eq!(world.job(&job_id).await.job.unwrap().worker, "w2");
}

#[tokio::test]
async fn a_job_goes_on_with_another_worker_after_the_server_was_restarted() {
    let mut world = World::start().await;
    let job_id = world.submit(&artaug()).await;
    let mut first = FakeWorker::of(&world, "w1").claim().await;
    first.append(0, &["one"]).await.unwrap();
    world.restart().await;
    // The lease is still good, and nobody else gets the job.
    assert!(!is_waiting(&world).await);
    first.client = FakeWorker::of(&world, "w1").client;
    assert_eq!(first.append(1, &["two"]).await.unwrap(), 2);
    advance(&world, Duration::from_secs(61));
    let mut second = FakeWorker::of(&world, "w2").claim().await;
    assert_eq!(second.lease.job_id, job_id);
    assert_eq!(second.journal(1).await.unwrap(), ["two"]);
}

#[tokio::test]
async fn a_stopped_worker_hands_its_job_over_at_once() {
    let world = World::start().await;
    let job_id = world.submit(&artaug()).await;
    for attempt in 1..=5 {
        let mut held = FakeWorker::of(&world, "w1").claim().await;
        assert_eq!(
            (held.lease.job_id.as_str(), held.lease.attempt),
            (&*job_id, attempt)
        );
        held.release(JobRelease::Stopped).await.unwrap();
        expect_all_refused(&mut held).await;
    }
    // Stops are no sign that the job cannot be run.
    let job = world.job(&job_id).await.job.unwrap();
    assert_eq!(job.state(), JobState::Running);
}

#[tokio::test]
async fn the_oldest_job_comes_first_and_no_more_are_held_than_may_be() {
    let world = World::start_with(|config| config.workers.max_running = 2).await;
    let mut jobs = Vec::new();
    for _ in 0..3 {
        jobs.push(world.submit(&artaug()).await);
    }
    let mut worker = FakeWorker::of(&world, "w1");
    let mut first = worker.claim().await;
    let second = worker.claim().await;
    assert_eq!(
        [&first.lease.job_id, &second.lease.job_id],
        [&jobs[0], &jobs[1]]
    );
    assert!(!is_waiting(&world).await);
    let mut waiting = worker.clone();
    let (third, ()) = tokio::join!(waiting.claim(), async {
        first.release(JobRelease::Failed).await.unwrap();
    });
    assert_eq!(third.lease.job_id, jobs[2]);
    let failed = world.job(&jobs[0]).await.job.unwrap();
    assert_eq!(failed.state(), JobState::Failed);
    assert!(failed.reason.contains("log"), "{}", failed.reason);
}

#[tokio::test]
async fn a_job_that_three_workers_in_a_row_lost_without_getting_on_fails() {
    let world = World::start().await;
    let job_id = world.submit(&artaug()).await;
    let mut worker = FakeWorker::of(&world, "w1");
    for attempt in 1..=3 {
        worker.claim().await;
        assert_eq!(stored(&world, &job_id).await.attempts, attempt);
        advance(&world, Duration::from_secs(61));
    }
    // Nobody has to ask for that.
    let job = world.wait_for_state(&job_id, JobState::Failed).await;
    assert!(job.reason.contains("3 times in a row"), "{}", job.reason);
    assert!(!is_waiting(&world).await);
}

#[tokio::test]
async fn a_job_that_gets_on_now_and_then_is_never_given_up() {
    let world = World::start().await;
    let job_id = world.submit(&artaug()).await;
    let mut worker = FakeWorker::of(&world, "w1");
    for attempt in 1..=8_u64 {
        let mut held = worker.claim().await;
        if attempt % 3 == 0 {
            let lines = held.lease.journal_lines;
            held.append(lines, &["on"]).await.unwrap();
        }
        advance(&world, Duration::from_secs(61));
    }
    let held = worker.claim().await;
    assert_eq!(held.lease.job_id, job_id);
    assert_eq!(held.lease.journal_lines, 2);
}

#[tokio::test]
async fn lines_that_were_there_already_are_no_progress() {
    let world = World::start().await;
    let job_id = world.submit(&artaug()).await;
    let mut worker = FakeWorker::of(&world, "w1");
    let mut held = worker.claim().await;
    held.append(0, &["one"]).await.unwrap();
    advance(&world, Duration::from_secs(61));
    for _ in 0..3 {
        let mut held = worker.claim().await;
        held.append(0, &["one"]).await.unwrap();
        advance(&world, Duration::from_secs(61));
    }
    world.wait_for_state(&job_id, JobState::Failed).await;
}

#[tokio::test]
async fn how_far_a_job_is_reaches_the_operator_who_watches() {
    let world = World::start().await;
    let job_id = world.submit(&artaug()).await;
    let request = v1::WatchJobRequest {
        job_id: job_id.clone(),
    };
    let answer = world.operator().watch_job(request).await;
    let mut stream = answer.unwrap().into_inner();
    let mut held = FakeWorker::of(&world, "w1").claim().await;
    let progress = v1::ArtaugProgress {
        iteration: 1,
        iterations: 3,
        stage: "generate".to_owned(),
        done: 7,
        total: 288,
        per_second: 0.25,
        last_images: vec![vec![7; 32]],
        ..v1::ArtaugProgress::default()
    };
    held.renew(Some(progress.clone())).await.unwrap();
    let mut seen = None;
    while seen.as_ref() != Some(&progress) {
        let job = stream.message().await.unwrap().unwrap().job.unwrap();
        assert_eq!(job.kind, "artaug");
        seen = job.artaug;
    }
    held.release(JobRelease::Succeeded).await.unwrap();
    let mut last = None;
    while let Some(state) = stream.message().await.unwrap() {
        last = state.job;
    }
    let last = last.unwrap();
    assert_eq!(
        (last.state(), last.artaug),
        (JobState::Succeeded, Some(progress))
    );

    let bad = v1::ArtaugProgress {
        per_second: f64::INFINITY,
        ..v1::ArtaugProgress::default()
    };
    let answer = held.renew(Some(bad)).await;
    assert_eq!(code(answer), ErrorCode::InvalidRequest);
}

#[tokio::test]
async fn a_stopping_server_tells_those_who_wait_for_a_job() {
    let mut world = World::start().await;
    let mut worker = FakeWorker::of(&world, "w1");
    let waiting = tokio::task::JoinSet::from_iter([async move { worker.try_claim().await }]);
    let context = std::sync::Arc::clone(world.server().context());
    // Beside the server's own task that looks after leases.
    eventually("the waiting worker", async || {
        (context.hub.workers_watching() >= 2).then_some(())
    })
    .await;
    world.stop().await;
    let refused = refusal(waiting.join_all().await.remove(0));
    assert_eq!(refused.code, ErrorCode::ShuttingDown);
    assert!(refused.retry_after.is_some());
}

#[tokio::test]
async fn a_grip_is_well_formed_or_refused() {
    let world = World::start().await;
    world.submit(&artaug()).await;
    let held = FakeWorker::of(&world, "w1").claim().await;
    let mut client = held.client.clone();
    let grips = [
        None,
        Some(v1::JobGrip {
            job_id: "../..".to_owned(),
            ..held.grip()
        }),
        Some(v1::JobGrip {
            token: vec![0; 15],
            ..held.grip()
        }),
    ];
    for grip in grips {
        let request = v1::RenewJobLeaseRequest {
            grip,
            progress: None,
        };
        let answer = client.renew_job_lease(request).await;
        assert_eq!(code(answer), ErrorCode::InvalidRequest);
    }
    let mut stranger = held.clone();
    stranger.lease.job_id = "no-such-job".to_owned();
    expect_all_refused(&mut stranger).await;
    let lease = stored(&world, &held.lease.job_id).await.lease.unwrap();
    assert!(lease.expires_at > now(&world));
}

#[tokio::test]
async fn an_outage_of_the_server_takes_no_job_from_its_worker() {
    let mut world = World::start().await;
    let job_id = world.submit(&artaug()).await;
    let mut held = FakeWorker::of(&world, "w1").claim().await;
    world.stop().await;
    world.clock.advance(Duration::from_mins(10));
    world.restart().await;
    assert!(!is_waiting(&world).await);
    held.client = FakeWorker::of(&world, "w1").client;
    let answer = held.renew(None).await.unwrap();
    assert_eq!(answer.command(), WorkerCommand::GoOn);
    assert_eq!(stored(&world, &job_id).await.attempts, 1);
    // From now on it is a lease like any other.
    advance(&world, Duration::from_secs(61));
    assert_eq!(
        FakeWorker::of(&world, "w2").claim().await.lease.job_id,
        job_id
    );
    assert_eq!(stored(&world, &job_id).await.idle_attempts, 1);
}

#[tokio::test]
async fn workers_that_went_away_with_the_server_say_nothing_about_the_job() {
    let mut world = World::start().await;
    let job_id = world.submit(&artaug()).await;
    for attempt in 1..=4 {
        FakeWorker::of(&world, "w1").claim().await;
        assert_eq!(stored(&world, &job_id).await.attempts, attempt);
        world.restart().await;
        advance(&world, Duration::from_secs(61));
    }
    eventually("the last lease's end", async || {
        is_waiting(&world).await.then_some(())
    })
    .await;
    assert_eq!(stored(&world, &job_id).await.idle_attempts, 0);
    let job = world.job(&job_id).await.job.unwrap();
    assert_eq!(job.state(), JobState::Running);
}

#[tokio::test]
async fn a_job_that_is_held_up_lets_younger_ones_go_first_and_says_why() {
    let world = World::start().await;
    let first = world.submit(&artaug()).await;
    let second = world.submit(&artaug()).await;
    let mut worker = FakeWorker::of(&world, "w1");
    let held_up = async |held: &mut Held, reason: &str| {
        let request = v1::ReleaseJobRequest {
            reason: reason.to_owned(),
            ..held.letting_go(JobRelease::Stopped)
        };
        held.release_as(request).await
    };
    let mut held = worker.claim().await;
    assert_eq!(held.lease.job_id, first);
    let answer = held_up(&mut held, "two\nlines").await;
    assert_eq!(code(answer), ErrorCode::InvalidRequest);
    held_up(&mut held, "the advisor `vision` is away")
        .await
        .unwrap();
    let shown = world.job(&first).await.job.unwrap();
    assert_eq!(shown.state(), JobState::Running);
    assert_eq!(shown.reason, "the advisor `vision` is away");

    let mut held = worker.claim().await;
    assert_eq!(held.lease.job_id, second);
    held.release(JobRelease::Stopped).await.unwrap();
    // Its turn comes again after a while, and at once if no other job waits.
    world.clock.advance(Duration::from_mins(6));
    let mut held = worker.claim().await;
    assert_eq!(held.lease.job_id, first);
    held_up(&mut held, "still away").await.unwrap();
    let mut held = worker.claim().await;
    assert_eq!(held.lease.job_id, second);
    held.release(JobRelease::Succeeded).await.unwrap();
    let mut held = worker.claim().await;
    assert_eq!(held.lease.job_id, first);
    assert_eq!(world.job(&first).await.job.unwrap().reason, "still away");
    // It got on.
    held.append(0, &["one"]).await.unwrap();
    assert_eq!(world.job(&first).await.job.unwrap().reason, "");
}
