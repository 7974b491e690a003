//! Everything that a silo or an operator can get wrong: refused with a code, and the round goes on as if nothing had come.

use bytes::Bytes;
use concord_common::{Digest, ErrorCode, chunk, code::Refusal};
use concord_proto::v1::{self, JobState, Outcome};
use futures::{StreamExt as _, stream};

use super::{
    bad_header::with_value,
    harness::{FakeSilo, Offer, World, code, constant, expect_published, refusal, spec},
};

/// What is done to a proper report.
type Spoil = fn(&mut v1::MetricReport);

/// Begins a good contribution and uploads these chunks of it.
async fn upload(silo: &mut FakeSilo, good: &Offer, chunks: Vec<v1::Chunk>) -> Refusal {
    let begun = silo
        .client
        .begin_contribution(good.begin.clone())
        .await
        .unwrap()
        .into_inner();
    refusal(silo.upload(&begun.upload_id, chunks).await)
}

#[tokio::test]
async fn a_bad_chunk_is_refused_with_its_code_and_the_upload_goes_on() {
    let world = World::start().await;
    let [mut a, mut b] = world.silos(["a", "b"]).await;
    let job_id = world.submit(&spec(1, 2, "")).await;
    let good = a.offer(&job_id, 1, constant(2.0), 3).await;
    let from = |offset| chunk::chunks(&good.payload, offset, 400).collect::<Vec<_>>();
    let (all, later) = (from(0), from(400));

    let mut torn = from(800)[0].clone();
    torn.data.truncate(10);
    let bad = [
        (
            vec![all[0].clone(), all[0].clone()],
            ErrorCode::ChunkOffset,
            "go on at byte 400",
        ),
        (
            vec![later[0].clone(), later[2].clone()],
            ErrorCode::ChunkOffset,
            "go on at byte 800",
        ),
        (vec![torn], ErrorCode::BadChunk, "at byte 800"),
        (
            vec![chunk::chunk(800, Bytes::new())],
            ErrorCode::BadChunk,
            "1 to 1048576 bytes, this one 0",
        ),
        (
            vec![chunk::chunk(800, vec![0; (1 << 20) + 1].into())],
            ErrorCode::BadChunk,
            "1 to 1048576 bytes, this one 1048577",
        ),
        // Beyond the bound of messages.
        (
            vec![chunk::chunk(800, vec![0; 3 << 20].into())],
            ErrorCode::BadChunk,
            "1 to 1048576 bytes, this one has more",
        ),
    ];
    for (chunks, expected, fragment) in bad {
        let refusal = upload(&mut a, &good, chunks).await;
        assert_eq!(refusal.code, expected, "{fragment}");
        assert!(refusal.message.contains(fragment), "{refusal}");
    }
    assert_eq!(
        code(a.upload(&[1; 16], vec![]).await),
        ErrorCode::UnknownUpload
    );
    assert_eq!(
        code(a.upload(&[1; 3], vec![]).await),
        ErrorCode::InvalidRequest
    );

    let begun = a
        .client
        .begin_contribution(good.begin.clone())
        .await
        .unwrap()
        .into_inner();
    assert_eq!(begun.offset, 800, "the good chunks stay");
    // Another silo cannot go on with it.
    assert_eq!(
        code(b.upload(&begun.upload_id, vec![]).await),
        ErrorCode::UnknownUpload
    );
    assert_eq!(a.send(&good).await.unwrap().outcome(), Outcome::Accepted);
    b.contribute(&job_id, 1, 0.0, 1).await;
    expect_published(&world, &mut b, &job_id, 1, &[("a", 2.0, 3), ("b", 0.0, 1)]).await;
}

#[tokio::test]
async fn a_second_contribution_with_other_bytes_is_refused() {
    let world = World::start().await;
    let [mut a, mut b] = world.silos(["a", "b"]).await;
    let job_id = world.submit(&spec(1, 2, "")).await;
    let first = a.offer(&job_id, 1, constant(1.0), 1).await;
    a.send(&first).await.unwrap();
    let other = a.offer(&job_id, 1, constant(7.0), 1).await;
    assert_eq!(code(a.send(&other).await), ErrorCode::DuplicateContribution);
    b.contribute(&job_id, 1, 1.0, 1).await;
    expect_published(&world, &mut a, &job_id, 1, &[("a", 1.0, 1), ("b", 1.0, 1)]).await;
}

#[tokio::test]
async fn a_rejected_contribution_shows_at_the_operator_until_a_better_one_comes() {
    let world = World::start().await;
    let [mut a, _b] = world.silos(["a", "b"]).await;
    let job_id = world.submit(&spec(1, 2, "")).await;
    let bad = a.offer(&job_id, 1, with_value(f32::NAN), 1).await;
    assert_eq!(code(a.send(&bad).await), ErrorCode::NotFinite);
    let shown = world.round(&job_id, 1).await.silos.remove(0);
    assert_eq!(
        (shown.outcome(), shown.reason.as_str()),
        (Outcome::Rejected, "NOT_FINITE")
    );
    a.contribute(&job_id, 1, 1.0, 1).await;
    let shown = world.round(&job_id, 1).await.silos.remove(0);
    assert_eq!(
        (shown.outcome(), shown.reason.as_str()),
        (Outcome::Accepted, "")
    );
}

#[tokio::test]
async fn a_lease_that_ran_out_must_be_claimed_again() {
    let world = World::start().await;
    let [mut a, _b] = world.silos(["a", "b"]).await;
    let job_id = world.submit(&spec(1, 2, "")).await;
    let offer = a.offer(&job_id, 1, constant(1.0), 1).await;
    let renewed = a.claim(&job_id, 1).await.unwrap();
    assert_eq!(renewed.lease_token, offer.begin.lease_token);
    world.advance(world.config.jobs.lease);
    assert_eq!(code(a.send(&offer).await), ErrorCode::LeaseLost);
    let fresh = a.offer(&job_id, 1, constant(1.0), 1).await;
    assert_ne!(fresh.begin.lease_token, offer.begin.lease_token);
    assert_eq!(a.send(&fresh).await.unwrap().outcome(), Outcome::Accepted);
}

#[tokio::test]
async fn a_silo_outside_the_job_finds_nothing() {
    let world = World::start().await;
    let [mut a, mut b] = world.silos(["a", "b"]).await;
    let text = spec(1, 1, "").replace("seed = 5", "seed = 5\nsilos = [\"a\"]");
    let job_id = world.submit(&text).await;
    let notice = a.wait_for_round(&job_id, 1).await;
    assert!(b.notices().await.is_empty());
    assert_eq!(code(b.claim(&job_id, 1).await), ErrorCode::UnknownJob);
    let download = b.download(&job_id, &notice.base_version, 0).await;
    assert_eq!(code(download), ErrorCode::UnknownJob);
    assert_eq!(code(a.claim(&job_id, 2).await), ErrorCode::UnknownRound);
    assert_eq!(
        code(a.download(&job_id, &[0; 32], 0).await),
        ErrorCode::UnknownVersion
    );
    let beyond = a.download(&job_id, &notice.base_version, 1 << 40).await;
    assert_eq!(code(beyond), ErrorCode::InvalidRequest);
}

#[tokio::test]
async fn a_claim_of_a_round_that_is_over_names_the_one_that_is_open() {
    let world = World::start().await;
    let [mut a] = world.silos(["a"]).await;
    let job_id = world.submit(&spec(2, 1, "")).await;
    a.contribute(&job_id, 1, 1.0, 1).await;
    a.wait_for_round(&job_id, 2).await;
    let refused = refusal(a.claim(&job_id, 1).await);
    assert_eq!(refused.code, ErrorCode::WrongRound);
    assert!(refused.message.contains("current one is 2"), "{refused}");
    a.contribute(&job_id, 2, 1.0, 1).await;
    world.wait_for_state(&job_id, JobState::Succeeded).await;
}

#[tokio::test]
async fn a_silo_of_the_job_that_this_round_does_not_ask_is_told_so() {
    let world = World::start().await;
    let [mut a, mut b] = world.silos(["a", "b"]).await;
    let job_id = world.submit(&spec(2, 1, "")).await;
    b.wait_for_round(&job_id, 1).await;
    let enroll = async |enrollment: v1::Enrollment| {
        let request = v1::SetEnrollmentRequest {
            silo_id: "b".to_owned(),
            enrollment: enrollment as i32,
        };
        world.operator().set_enrollment(request).await.unwrap();
    };
    b.contribute(&job_id, 1, 1.0, 1).await;
    // Round 2 opens while it may not take part.
    enroll(v1::Enrollment::Suspended).await;
    a.contribute(&job_id, 1, 1.0, 1).await;
    a.wait_for_round(&job_id, 2).await;
    enroll(v1::Enrollment::Active).await;
    let refused = refusal(b.claim(&job_id, 2).await);
    assert_eq!(refused.code, ErrorCode::NotInCohort);
    assert!(refused.message.contains("`b`"), "{refused}");
    a.contribute(&job_id, 2, 1.0, 1).await;
    world.wait_for_state(&job_id, JobState::Succeeded).await;
}

#[tokio::test]
async fn a_bad_specification_is_refused_with_the_key() {
    let world = World::start().await;
    for (text, key) in [
        (spec(1, 1, "colour = 1"), "colour"),
        (spec(0, 1, ""), "rounds.count"),
        (spec(1, 1, "").replace("fedavg", "local"), "simulate"),
        ("no toml at all".to_owned(), "cannot be read"),
        ("x".repeat(70_000), "at most"),
    ] {
        let request = v1::SubmitJobRequest {
            request_id: "id".to_owned(),
            spec_toml: text,
        };
        let status = world.operator().submit_job(request).await.unwrap_err();
        assert!(
            status.message().contains(key),
            "{key}: {}",
            status.message()
        );
        assert_eq!(code::<()>(Err(status)), ErrorCode::InvalidJobSpec);
    }
    let request = v1::SubmitJobRequest {
        request_id: String::new(),
        spec_toml: spec(1, 1, ""),
    };
    assert_eq!(
        code(world.operator().submit_job(request).await),
        ErrorCode::InvalidRequest
    );
    let jobs = world
        .operator()
        .list_jobs(v1::ListJobsRequest { limit: 0 })
        .await
        .unwrap();
    assert!(jobs.into_inner().jobs.is_empty());
}

#[tokio::test]
async fn bad_metrics_are_refused() {
    let world = World::start().await;
    let [mut a] = world.silos(["a"]).await;
    let job_id = world.submit(&spec(1, 1, "")).await;
    a.wait_for_round(&job_id, 1).await;
    let good = v1::MetricReport {
        silo_id: String::new(),
        job_id,
        round: 1,
        point: v1::MetricPoint::Training as i32,
        metrics: vec![v1::Metric {
            name: "loss".to_owned(),
            value: 1.0,
        }],
    };
    let spoilt: [(Spoil, ErrorCode); 4] = [
        (
            |report| report.metrics[0].value = f64::NAN,
            ErrorCode::InvalidRequest,
        ),
        (|report| report.metrics.clear(), ErrorCode::InvalidRequest),
        (|report| report.round = 9, ErrorCode::UnknownRound),
        (
            |report| report.job_id = "other".to_owned(),
            ErrorCode::UnknownJob,
        ),
    ];
    for (spoil, expected) in spoilt {
        let mut report = good.clone();
        spoil(&mut report);
        let request = v1::ReportMetricsRequest {
            report: Some(report),
        };
        assert_eq!(code(a.client.report_metrics(request).await), expected);
    }
}

#[tokio::test]
async fn a_full_spool_says_busy_and_the_round_goes_on() {
    let world = World::start_with(|config| config.spool.max_uploads = 1).await;
    let [mut a, mut b] = world.silos(["a", "b"]).await;
    let job_id = world.submit(&spec(1, 2, "")).await;
    let first = a.offer(&job_id, 1, constant(1.0), 1).await;
    a.client
        .begin_contribution(first.begin.clone())
        .await
        .unwrap();
    let second = b.offer(&job_id, 1, constant(1.0), 1).await;
    assert_eq!(code(b.send(&second).await), ErrorCode::Busy);
    a.send(&first).await.unwrap();
    b.send(&second).await.unwrap();
    world.wait_for_state(&job_id, JobState::Succeeded).await;
}

#[tokio::test]
async fn an_upload_in_which_nothing_moves_is_cut_and_can_be_resumed() {
    let idle = std::time::Duration::from_millis(200);
    let world = World::start_with(|config| config.limits.transfer_idle = idle).await;
    let [mut a] = world.silos(["a"]).await;
    let job_id = world.submit(&spec(1, 1, "")).await;
    let good = a.offer(&job_id, 1, constant(1.0), 1).await;
    let begun = a
        .client
        .begin_contribution(good.begin.clone())
        .await
        .unwrap()
        .into_inner();
    let first = v1::UploadContributionRequest {
        upload_id: begun.upload_id,
        chunk: chunk::chunks(&good.payload, 0, 400).next(),
    };
    let stuck = stream::iter([first]).chain(stream::pending());
    assert_eq!(
        code(a.client.upload_contribution(stuck).await),
        ErrorCode::TooSlow
    );
    let begun = a
        .client
        .begin_contribution(good.begin.clone())
        .await
        .unwrap()
        .into_inner();
    assert_eq!(begun.offset, 400);
    assert_eq!(a.send(&good).await.unwrap().outcome(), Outcome::Accepted);
}

#[tokio::test]
async fn a_download_that_nobody_reads_is_cut_and_its_turn_goes_to_the_next() {
    let world = World::start_with(|config| {
        config.limits.transfer_idle = std::time::Duration::from_millis(200);
        config.limits.max_transfers = 1;
    })
    .await;
    let [mut a, mut b] = world.silos(["a", "b"]).await;
    // More bytes than all buffers on the way can hold.
    let large = spec(1, 2, "").replace("hidden = 16", "hidden = 16384");
    let job_id = world
        .submit(&large.replace("bottleneck = 8", "bottleneck = 64"))
        .await;
    let notice = a.wait_for_round(&job_id, 1).await;
    let request = v1::DownloadAdapterRequest {
        job_id: job_id.clone(),
        version: notice.base_version.clone(),
        offset: 0,
    };
    let mut unread = a
        .client
        .download_adapter(request)
        .await
        .unwrap()
        .into_inner();
    let adapter = b.download(&job_id, &notice.base_version, 0).await.unwrap();
    assert_eq!(Digest::of(&adapter).to_vec(), notice.base_version);
    let mut received = 0;
    let end = loop {
        match unread.message().await {
            Ok(Some(message)) => received += message.chunk.unwrap().data.len(),
            end => break end,
        }
    };
    assert_eq!(code(end), ErrorCode::TooSlow);
    // What came is good: the download goes on behind it.
    let rest = a
        .download(&job_id, &notice.base_version, received as u64)
        .await
        .unwrap();
    assert_eq!(rest, adapter[received..]);
}
