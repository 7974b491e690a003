//! Everything that a silo or an operator can get wrong: refused with a code, and the round goes on as if nothing had come.

use bytes::Bytes;
use concord_common::{Digest, ErrorCode, adapter::encode_f32, chunk};
use concord_proto::v1::{self, JobState, Outcome};
use futures::{StreamExt as _, stream};

use super::harness::{FakeSilo, Offer, World, code, constant, expect_published, layout, spec};

/// A name, what is done to a proper offer, and the code that must come back.
type Case = (&'static str, fn(&mut Offer), ErrorCode);

/// What is done to a proper report.
type Spoil = fn(&mut v1::MetricReport);

fn tensors(offer: &mut Offer) -> &mut Vec<v1::TensorInfo> {
    &mut offer.begin.layout.as_mut().unwrap().tensors
}

/// Another payload, properly announced.
fn send_instead(offer: &mut Offer, payload: Bytes) {
    offer.begin.payload_digest = Digest::of(&payload).to_vec();
    offer.payload = payload;
}

fn with_value(value: f32) -> Bytes {
    let mut values = vec![1.0; layout().elements() as usize];
    values[77] = value;
    encode_f32(&values).into()
}

const HEADERS: &[Case] = &[
    (
        "a wrong tensor name",
        |o| tensors(o)[1].name = "other".to_owned(),
        ErrorCode::TensorName,
    ),
    (
        "a wrong shape",
        |o| tensors(o)[0].shape.reverse(),
        ErrorCode::TensorShape,
    ),
    (
        "a wrong dtype",
        |o| tensors(o)[2].dtype = 0,
        ErrorCode::TensorDtype,
    ),
    (
        "a tensor too few",
        |o| drop(tensors(o).pop()),
        ErrorCode::TensorCount,
    ),
    (
        "thousands of tensors",
        |o| {
            let one = tensors(o)[0].clone();
            *tensors(o) = vec![one; 5000];
        },
        ErrorCode::TensorCount,
    ),
    (
        "tensors in another order",
        |o| tensors(o).swap(0, 2),
        ErrorCode::TensorOrder,
    ),
    (
        "no layout",
        |o| o.begin.layout = None,
        ErrorCode::InvalidRequest,
    ),
    (
        "no examples",
        |o| o.begin.examples = 0,
        ErrorCode::BadWeight,
    ),
    (
        "a huge weight",
        |o| o.begin.examples = u64::MAX,
        ErrorCode::BadWeight,
    ),
    (
        "another size",
        |o| o.begin.payload_bytes += 4,
        ErrorCode::PayloadSize,
    ),
    (
        "a short digest",
        |o| o.begin.payload_digest.truncate(31),
        ErrorCode::InvalidRequest,
    ),
    (
        "another base",
        |o| o.begin.base_version[0] ^= 1,
        ErrorCode::WrongBaseVersion,
    ),
    (
        "a round to come",
        |o| o.begin.round = 2,
        ErrorCode::UnknownRound,
    ),
    ("round 0", |o| o.begin.round = 0, ErrorCode::InvalidRequest),
    (
        "another job",
        |o| o.begin.job_id = "nothing".to_owned(),
        ErrorCode::UnknownJob,
    ),
    (
        "a job id that is none",
        |o| o.begin.job_id = "../x".to_owned(),
        ErrorCode::InvalidRequest,
    ),
    (
        "a lease that is none",
        |o| o.begin.lease_token[0] ^= 1,
        ErrorCode::LeaseLost,
    ),
    (
        "NaN",
        |o| send_instead(o, with_value(f32::NAN)),
        ErrorCode::NotFinite,
    ),
    (
        "infinity",
        |o| send_instead(o, with_value(f32::INFINITY)),
        ErrorCode::NotFinite,
    ),
    (
        "a norm beyond the bound",
        |o| send_instead(o, with_value(1e6)),
        ErrorCode::NormTooLarge,
    ),
    (
        "other bytes than announced",
        |o| o.payload = constant(3.0),
        ErrorCode::DigestMismatch,
    ),
    (
        "a longer payload",
        |o| {
            let mut longer = o.payload.to_vec();
            longer.extend([0; 8]);
            o.payload = longer.into();
        },
        ErrorCode::PayloadSize,
    ),
    (
        "a shorter payload",
        |o| o.payload.truncate(100),
        ErrorCode::Truncated,
    ),
    (
        "a header beyond every bound",
        |o| {
            let mut one = tensors(o)[0].clone();
            one.name = "x".repeat(1000);
            *tensors(o) = vec![one; 3000];
        },
        ErrorCode::InvalidRequest,
    ),
];

#[tokio::test]
async fn a_bad_contribution_is_refused_with_its_code_and_the_round_goes_on() {
    let world = World::start().await;
    let [mut a, mut b] = world.silos(["a", "b"]).await;
    let job_id = world
        .submit(&spec(1, 2, "[limits]\nmax_update_norm = 1000.0"))
        .await;
    let good = a.offer(&job_id, 1, constant(2.0), 3).await;
    for (what, spoil, expected) in HEADERS {
        let mut bad = good.clone();
        spoil(&mut bad);
        assert_eq!(code(a.send(&bad).await), *expected, "{what}");
        let round = world.round(&job_id, 1).await;
        assert_eq!(
            round.round.unwrap().phase(),
            v1::RoundPhase::Announced,
            "{what}"
        );
    }
    assert_eq!(a.send(&good).await.unwrap().outcome(), Outcome::Accepted);
    b.contribute(&job_id, 1, 0.0, 1).await;
    expect_published(&world, &mut b, &job_id, 1, &[("a", 2.0, 3), ("b", 0.0, 1)]).await;
}

/// Begins a good contribution and uploads these chunks of it.
async fn upload(silo: &mut FakeSilo, good: &Offer, chunks: Vec<v1::Chunk>) -> ErrorCode {
    let begun = silo
        .client
        .begin_contribution(good.begin.clone())
        .await
        .unwrap()
        .into_inner();
    code(silo.upload(&begun.upload_id, chunks).await)
}

#[tokio::test]
async fn a_bad_chunk_is_refused_with_its_code_and_the_upload_goes_on() {
    let world = World::start().await;
    let [mut a, mut b] = world.silos(["a", "b"]).await;
    let job_id = world.submit(&spec(1, 2, "")).await;
    let good = a.offer(&job_id, 1, constant(2.0), 3).await;
    let all: Vec<_> = chunk::chunks(&good.payload, 0, 400).collect();

    let repeated = vec![all[0].clone(), all[0].clone()];
    assert_eq!(
        upload(&mut a, &good, repeated).await,
        ErrorCode::ChunkOffset
    );
    let gap = vec![all[1].clone(), all[3].clone()];
    assert_eq!(upload(&mut a, &good, gap).await, ErrorCode::ChunkOffset);
    let mut torn = all[2].clone();
    torn.data.truncate(10);
    assert_eq!(upload(&mut a, &good, vec![torn]).await, ErrorCode::BadChunk);
    let empty = chunk::chunk(800, Bytes::new());
    assert_eq!(
        upload(&mut a, &good, vec![empty]).await,
        ErrorCode::BadChunk
    );
    let huge = chunk::chunk(800, vec![0; (1 << 20) + 1].into());
    assert_eq!(upload(&mut a, &good, vec![huge]).await, ErrorCode::BadChunk);
    let beyond_every_bound = chunk::chunk(800, vec![0; 3 << 20].into());
    assert_eq!(
        upload(&mut a, &good, vec![beyond_every_bound]).await,
        ErrorCode::BadChunk
    );
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
