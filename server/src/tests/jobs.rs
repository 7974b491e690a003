use std::{collections::BTreeMap, time::Duration};

use concord_common::{
    Digest, ErrorCode,
    adapter::{decode_f32, encode_f32},
};
use concord_proto::v1::{self, JobState, Outcome, RoundPhase};

use super::harness::{World, code, constant, eventually, expect_published, spec, weighted_mean};

#[tokio::test]
async fn a_job_of_two_rounds_publishes_the_exact_weighted_means() {
    let world = World::start().await;
    let mut silos = world.silos(["a", "b", "c"]).await;
    let job_id = world.submit(&spec(2, 3, "")).await;
    let shares = [(0.1_f32, 10_u64), (-0.7, 20), (3.3, 3)];
    let mut base = Vec::new();
    for round in [1, 2] {
        let mut updates = BTreeMap::new();
        for (silo, (value, examples)) in silos.iter_mut().zip(shares) {
            let notice = silo.wait_for_round(&job_id, round).await;
            let adapter = silo
                .download(&job_id, &notice.base_version, 0)
                .await
                .unwrap();
            assert_eq!(Digest::of(&adapter).to_vec(), notice.base_version);
            base = adapter;
            let receipt = silo.contribute(&job_id, round, value, examples).await;
            assert_eq!(receipt.outcome(), Outcome::Accepted);
            assert_eq!(receipt.silo_id, silo.name);
        }
        for ((name, share), _) in ["a", "b", "c"].into_iter().zip(shares).zip(0..) {
            updates.insert(name, share);
        }
        base = weighted_mean(&base, &updates);
        let published = eventually("the published round", async || {
            let found = world.round(&job_id, round).await.round.unwrap();
            (found.phase() == RoundPhase::Published).then_some(found)
        })
        .await;
        assert_eq!(published.published_version, Digest::of(&base).to_vec());
        assert_eq!((published.cohort, published.accepted), (3, 3));
    }
    let job = world.wait_for_state(&job_id, JobState::Succeeded).await;
    assert_eq!(job.adapter_version, Digest::of(&base).to_vec());
    let last = silos[0]
        .download(&job_id, &job.adapter_version, 100)
        .await
        .unwrap();
    assert_eq!(last, base[100..]);
    let spooled = world.config.state_dir.join("spool");
    assert_eq!(std::fs::read_dir(spooled).unwrap().count(), 0);
    let ended = silos[1].notices().await;
    assert_eq!(ended[0].job_state(), JobState::Succeeded);
    assert_eq!(ended[0].base_version, job.adapter_version);
}

#[tokio::test]
async fn a_uniform_round_publishes_the_plain_mean_whatever_the_examples() {
    let world = World::start().await;
    let mut silos = world.silos(["a", "b", "c", "d"]).await;
    let job_id = world.submit(&spec(1, 4, "weighting = \"uniform\"")).await;
    let notice = silos[0].wait_for_round(&job_id, 1).await;
    let base = silos[0].download(&job_id, &notice.base_version, 0).await;
    // Weighted by examples this would be -0.12; the plain mean is 1.5, and its fourths are exact.
    let shares = [(1.0, 1), (2.0, 10), (3.5, 100), (-0.5, 1000)];
    for (silo, (value, examples)) in silos.iter_mut().zip(shares) {
        let receipt = silo.contribute(&job_id, 1, value, examples).await;
        assert_eq!(receipt.outcome(), Outcome::Accepted);
    }
    let job = world.wait_for_state(&job_id, JobState::Succeeded).await;
    let expected: Vec<f32> = decode_f32(&base.unwrap())
        .unwrap()
        .iter()
        .map(|value| (f64::from(*value) + 1.5) as f32)
        .collect();
    let last = silos[0].download(&job_id, &job.adapter_version, 0).await;
    assert_eq!(last.unwrap(), encode_f32(&expected));
}

#[tokio::test]
async fn a_late_contribution_is_discarded_with_a_receipt_and_a_retry_gets_the_same() {
    let world = World::start().await;
    let [mut a, mut b, mut c] = world.silos(["a", "b", "c"]).await;
    let job_id = world.submit(&spec(1, 2, "max_time = \"10m\"")).await;
    let slow = c.offer(&job_id, 1, constant(9.0), 5).await;
    let begun = c.begin(&slow).await;
    a.contribute(&job_id, 1, 1.0, 1).await;
    b.contribute(&job_id, 1, 2.0, 1).await;
    world.advance(Duration::from_secs(601));
    world.wait_for_state(&job_id, JobState::Succeeded).await;

    let chunks = concord_common::chunk::chunks(&slow.payload, 0, 1000).collect();
    let receipt = c.upload(&begun.upload_id, chunks).await.unwrap();
    assert_eq!(
        (receipt.outcome(), receipt.reason.as_str()),
        (Outcome::Discarded, "LATE")
    );
    assert_eq!(c.send(&slow).await.unwrap(), receipt);
    expect_published(&world, &mut c, &job_id, 1, &[("a", 1.0, 1), ("b", 2.0, 1)]).await;
    let shown = world.round(&job_id, 1).await;
    assert_eq!(shown.silos[2].outcome(), Outcome::Discarded);
}

#[tokio::test]
async fn a_contribution_that_begins_after_the_end_is_discarded_before_a_byte_is_sent() {
    let world = World::start().await;
    let [mut a, mut b] = world.silos(["a", "b"]).await;
    let job_id = world.submit(&spec(1, 1, "max_silos = 1")).await;
    let late = b.offer(&job_id, 1, constant(9.0), 5).await;
    a.contribute(&job_id, 1, 1.0, 1).await;
    world.wait_for_state(&job_id, JobState::Succeeded).await;
    let begun = b.begin(&late).await;
    let receipt = begun.receipt.unwrap();
    assert_eq!(
        (receipt.outcome(), receipt.reason.as_str()),
        (Outcome::Discarded, "LATE")
    );
    assert_eq!(b.send(&late).await.unwrap(), receipt);
}

#[tokio::test]
async fn a_retry_gets_the_same_receipt_and_counts_once() {
    let world = World::start().await;
    let [mut a, mut b] = world.silos(["a", "b"]).await;
    let job_id = world.submit(&spec(1, 2, "")).await;
    let offer = a.offer(&job_id, 1, constant(1.5), 4).await;
    let receipt = a.send(&offer).await.unwrap();
    assert_eq!(a.send(&offer).await.unwrap(), receipt);
    b.contribute(&job_id, 1, 0.5, 4).await;
    world.wait_for_state(&job_id, JobState::Succeeded).await;
    assert_eq!(a.send(&offer).await.unwrap(), receipt);
    expect_published(&world, &mut a, &job_id, 1, &[("a", 1.5, 4), ("b", 0.5, 4)]).await;
    let part = &world.job(&job_id).await.silos[0];
    assert_eq!(
        (part.bytes_up, part.accepted),
        (offer.payload.len() as u64, 1)
    );
}

#[tokio::test]
async fn a_round_with_too_few_contributions_fails_the_job_with_the_numbers() {
    let world = World::start().await;
    let [mut a, mut b] = world.silos(["a", "b"]).await;
    let job_id = world.submit(&spec(3, 2, "max_time = \"10m\"")).await;
    b.wait_for_round(&job_id, 1).await;
    a.contribute(&job_id, 1, 1.0, 1).await;
    world.advance(Duration::from_secs(601));
    let job = world.wait_for_state(&job_id, JobState::Failed).await;
    assert!(job.reason.contains("1 accepted"), "{}", job.reason);
    let notice = b.notices().await.remove(0);
    assert_eq!(notice.job_state(), JobState::Failed);
    assert_eq!(code(b.claim(&job_id, 1).await), ErrorCode::JobEnded);
}

#[tokio::test]
async fn a_silo_that_declines_is_not_waited_for_and_not_asked_again() {
    let world = World::start().await;
    let [mut a, mut b] = world.silos(["a", "b"]).await;
    let job_id = world.submit(&spec(2, 1, "")).await;
    b.wait_for_round(&job_id, 1).await;
    let no = v1::DeclineJobRequest {
        job_id: job_id.clone(),
        reason: "UNKNOWN_BACKBONE".to_owned(),
        message: "this silo has no backbone `none`".to_owned(),
    };
    b.client.decline_job(no).await.unwrap();
    for round in [1, 2] {
        a.contribute(&job_id, round, 1.0, 1).await;
    }
    world.wait_for_state(&job_id, JobState::Succeeded).await;
    let silos = world.job(&job_id).await.silos;
    assert_eq!(silos[1].outcome(), Outcome::Declined);
    assert_eq!(silos[1].reason, "UNKNOWN_BACKBONE");
    assert_eq!(world.round(&job_id, 2).await.silos.len(), 1);
}

#[tokio::test]
async fn a_cancelled_job_discards_what_is_on_its_way_with_a_receipt() {
    let world = World::start().await;
    let [mut a, _b] = world.silos(["a", "b"]).await;
    let job_id = world.submit(&spec(1, 2, "")).await;
    let offer = a.offer(&job_id, 1, constant(1.0), 1).await;
    let begun = a.begin(&offer).await;
    let cancel = v1::CancelJobRequest {
        job_id: job_id.clone(),
    };
    let cancelled = world
        .operator()
        .cancel_job(cancel.clone())
        .await
        .unwrap()
        .into_inner();
    let job = cancelled.job.unwrap();
    assert_eq!(job.state(), JobState::Cancelled);
    assert!(job.reason.contains("olga"), "{}", job.reason);
    let again = world
        .operator()
        .cancel_job(cancel)
        .await
        .unwrap()
        .into_inner();
    assert_eq!(again.job.unwrap(), job);

    let chunks = concord_common::chunk::chunks(&offer.payload, 0, 1000).collect();
    let receipt = a.upload(&begun.upload_id, chunks).await.unwrap();
    assert_eq!(
        (receipt.outcome(), receipt.reason.as_str()),
        (Outcome::Discarded, "JOB_ENDED")
    );
    assert_eq!(
        world.round(&job_id, 1).await.round.unwrap().phase(),
        RoundPhase::Cancelled
    );
}

#[tokio::test]
async fn queued_jobs_run_in_order_as_far_as_there_is_room() {
    let world = World::start_with(|config| config.jobs.max_running = 1).await;
    let [mut a] = world.silos(["a"]).await;
    let first = world.submit(&spec(1, 1, "")).await;
    let second = world.submit(&spec(1, 1, "")).await;
    let third = world.submit(&spec(1, 1, "")).await;
    let cancel = v1::CancelJobRequest {
        job_id: second.clone(),
    };
    a.wait_for_round(&first, 1).await;
    assert_eq!(
        world.job(&second).await.job.unwrap().state(),
        JobState::Queued
    );
    world.operator().cancel_job(cancel).await.unwrap();
    a.contribute(&first, 1, 1.0, 1).await;
    a.contribute(&third, 1, 1.0, 1).await;
    world.wait_for_state(&third, JobState::Succeeded).await;
    assert_eq!(
        world.job(&second).await.job.unwrap().state(),
        JobState::Cancelled
    );
}

#[tokio::test]
async fn two_jobs_run_at_once() {
    let world = World::start().await;
    let [mut a] = world.silos(["a"]).await;
    let first = world.submit(&spec(1, 1, "")).await;
    let second = world.submit(&spec(1, 1, "")).await;
    a.wait_for_round(&first, 1).await;
    a.contribute(&second, 1, 2.0, 1).await;
    a.contribute(&first, 1, 1.0, 1).await;
    for job_id in [first, second] {
        world.wait_for_state(&job_id, JobState::Succeeded).await;
    }
}

#[tokio::test]
async fn a_job_waits_for_its_silos_and_fails_if_they_do_not_come() {
    let world = World::start().await;
    let patient = world.submit(&spec(1, 1, "max_time = \"10m\"")).await;
    world.wait_for_state(&patient, JobState::Running).await;
    let [mut a] = world.silos(["a"]).await;
    a.contribute(&patient, 1, 1.0, 1).await;
    world.wait_for_state(&patient, JobState::Succeeded).await;

    let lonely = world.submit(&spec(1, 2, "max_time = \"10m\"")).await;
    world.wait_for_state(&lonely, JobState::Running).await;
    world.advance(Duration::from_secs(601));
    let job = world.wait_for_state(&lonely, JobState::Failed).await;
    assert!(job.reason.contains("at least 2 silos"), "{}", job.reason);
}

#[tokio::test]
async fn a_silo_that_watches_sees_the_present_state_at_once_and_then_each_change() {
    let world = World::start().await;
    let [mut a, mut b] = world.silos(["a", "b"]).await;
    let mut stream = a
        .client
        .watch_rounds(v1::WatchRoundsRequest {})
        .await
        .unwrap()
        .into_inner();
    assert!(stream.message().await.unwrap().unwrap().notices.is_empty());
    let job_id = world.submit(&spec(2, 2, "")).await;
    let opened = stream.message().await.unwrap().unwrap().notices;
    assert_eq!(
        (opened[0].round, opened[0].phase()),
        (1, RoundPhase::Announced)
    );
    a.contribute(&job_id, 1, 1.0, 1).await;
    let counted = stream.message().await.unwrap().unwrap().notices;
    assert_eq!(
        (counted[0].round, counted[0].outcome()),
        (1, Outcome::Accepted)
    );
    b.contribute(&job_id, 1, 1.0, 1).await;
    let next = stream.message().await.unwrap().unwrap().notices;
    assert_eq!(
        (next[0].round, next[0].outcome()),
        (2, Outcome::Unspecified)
    );
    assert_ne!(next[0].base_version, opened[0].base_version);
    let silos = world
        .operator()
        .list_silos(v1::ListSilosRequest {})
        .await
        .unwrap()
        .into_inner();
    let connected: Vec<_> = silos.silos.iter().map(|silo| silo.connected).collect();
    assert_eq!(connected, [true, false]);
}

#[tokio::test]
async fn an_operator_who_watches_sees_every_report_once_and_the_end() {
    let world = World::start().await;
    let [mut a] = world.silos(["a"]).await;
    let job_id = world.submit(&spec(1, 1, "")).await;
    let request = v1::WatchJobRequest {
        job_id: job_id.clone(),
    };
    let mut stream = world
        .operator()
        .watch_job(request)
        .await
        .unwrap()
        .into_inner();
    a.wait_for_round(&job_id, 1).await;
    let report = v1::MetricReport {
        job_id: job_id.clone(),
        silo_id: "somebody-else".to_owned(),
        round: 1,
        point: v1::MetricPoint::AfterTraining as i32,
        metrics: vec![v1::Metric {
            name: "accuracy".to_owned(),
            value: 0.75,
        }],
    };
    let request = v1::ReportMetricsRequest {
        report: Some(report),
    };
    a.client.report_metrics(request.clone()).await.unwrap();
    a.contribute(&job_id, 1, 1.0, 1).await;
    let mut reports = Vec::new();
    let mut last = None;
    while let Some(state) = stream.message().await.unwrap() {
        reports.extend(state.metrics);
        last = state.job;
    }
    assert_eq!(last.unwrap().state(), JobState::Succeeded);
    assert_eq!(reports.len(), 1);
    assert_eq!(
        (reports[0].silo_id.as_str(), reports[0].metrics[0].value),
        ("a", 0.75)
    );
    // A late report still reaches the job.
    a.client.report_metrics(request).await.unwrap();
    assert_eq!(world.job(&job_id).await.metrics.len(), 1);
}

#[tokio::test]
async fn a_repeated_submission_makes_one_job() {
    let world = World::start().await;
    let request = v1::SubmitJobRequest {
        request_id: "once".to_owned(),
        spec_toml: spec(1, 1, ""),
    };
    let first = world
        .operator()
        .submit_job(request.clone())
        .await
        .unwrap()
        .into_inner();
    let again = world
        .operator()
        .submit_job(request.clone())
        .await
        .unwrap()
        .into_inner();
    assert_eq!((first.existed, again.existed), (false, true));
    assert_eq!(first.job.unwrap().job_id, again.job.unwrap().job_id);
    let other = v1::SubmitJobRequest {
        spec_toml: spec(2, 1, ""),
        ..request
    };
    assert_eq!(
        code(world.operator().submit_job(other).await),
        ErrorCode::RequestIdReused
    );
    let jobs = world
        .operator()
        .list_jobs(v1::ListJobsRequest { limit: 0 })
        .await
        .unwrap();
    assert_eq!(jobs.into_inner().jobs.len(), 1);
}
