//! The server may go away at any point: nothing is lost and nothing is counted twice.

use std::{sync::Arc, time::Duration};

use concord_common::{
    Clock, Digest, ErrorCode, RoundNumber, chunk, code::Refusal, round::RoundPhase,
};
use concord_proto::v1::{self, JobState, Outcome};
use futures::stream;
use tokio::task::JoinSet;

use super::{
    harness::{World, constant, eventually, expect_published, spec},
    offers::offering,
};
use crate::{context::Context, datastore::UploadRecord, error::Failure, ids::RandomIds};

#[tokio::test]
async fn a_round_goes_on_after_a_restart_and_receipts_stay_the_same() {
    let mut world = World::start().await;
    let [mut a, _b] = world.silos(["a", "b"]).await;
    let job_id = world.submit(&spec(2, 2, "")).await;
    let offer = a.offer(&job_id, 1, constant(1.25), 3).await;
    let receipt = a.send(&offer).await.unwrap();
    let key = a.public_key.clone();

    world.restart().await;
    let [mut a, mut b] = world.silos(["a", "b"]).await;
    assert_eq!(a.public_key, key);
    assert_eq!(a.send(&offer).await.unwrap(), receipt);
    b.contribute(&job_id, 1, -0.5, 1).await;
    expect_published(
        &world,
        &mut a,
        &job_id,
        1,
        &[("a", 1.25, 3), ("b", -0.5, 1)],
    )
    .await;

    world.restart().await;
    let [mut a, mut b] = world.silos(["a", "b"]).await;
    a.contribute(&job_id, 2, 1.0, 1).await;
    b.contribute(&job_id, 2, 1.0, 1).await;
    world.wait_for_state(&job_id, JobState::Succeeded).await;
}

#[tokio::test]
async fn an_upload_goes_on_where_it_was_cut_also_after_a_restart() {
    let mut world = World::start().await;
    let (mut a, job_id, offer) = offering(&world, "").await;
    let begun = a.begin(&offer).await;
    assert_eq!(begun.offset, 0);
    let chunks: Vec<_> = chunk::chunks(&offer.payload, 0, 300).take(2).collect();
    let (sender, receiver) = tokio::sync::mpsc::channel(4);
    for chunk in chunks {
        let message = v1::UploadContributionRequest {
            upload_id: begun.upload_id.clone(),
            chunk: Some(chunk),
        };
        sender.send(message).await.unwrap();
    }
    let mut client = a.client.clone();
    let mut cut = JoinSet::new();
    cut.spawn(async move {
        let messages = tokio_stream::wrappers::ReceiverStream::new(receiver);
        client.upload_contribution(messages).await
    });
    let spooled = world.config.state_dir.join("spool");
    eventually("600 bytes in the spool", async || {
        let file = std::fs::read_dir(&spooled).unwrap().next()?.unwrap();
        (file.metadata().unwrap().len() == 600).then_some(())
    })
    .await;
    // The connection is gone in the middle of the call.
    cut.shutdown().await;
    drop(sender);
    let again = a.begin(&offer).await;
    assert_eq!((again.offset, &again.upload_id), (600, &begun.upload_id));

    world.restart().await;
    let [mut a] = world.silos(["a"]).await;
    let resumed = a.begin(&offer).await;
    assert_eq!(
        (resumed.offset, &resumed.upload_id),
        (600, &begun.upload_id)
    );
    assert_eq!(a.send(&offer).await.unwrap().outcome(), Outcome::Accepted);
    expect_published(&world, &mut a, &job_id, 1, &[("a", 1.25, 3)]).await;
}

#[tokio::test]
async fn an_upload_whose_last_byte_came_before_the_crash_needs_no_chunk_more() {
    let mut world = World::start().await;
    let (mut a, job_id, offer) = offering(&world, "").await;
    let begun = a.begin(&offer).await;
    world.stop().await;
    let file = world
        .config
        .state_dir
        .join("spool")
        .join(crate::ids::hex(&begun.upload_id));
    std::fs::write(file, &offer.payload).unwrap();
    world.restart().await;
    let [mut a] = world.silos(["a"]).await;
    assert_eq!(a.send(&offer).await.unwrap().outcome(), Outcome::Accepted);
    world.wait_for_state(&job_id, JobState::Succeeded).await;
}

#[tokio::test]
async fn a_round_that_was_closed_before_the_crash_is_aggregated_after_it() {
    let mut world = World::start().await;
    let (mut a, job_id, offer) = offering(&world, "").await;
    let begun = a.begin(&offer).await;
    world.stop().await;
    record_without_a_driver(&world, &begun.upload_id, &offer.payload).await;
    world.restart().await;
    let [mut a] = world.silos(["a"]).await;
    expect_published(&world, &mut a, &job_id, 1, &[("a", 1.25, 3)]).await;
    assert_eq!(a.send(&offer).await.unwrap().outcome(), Outcome::Accepted);
}

#[tokio::test]
async fn a_round_whose_time_ran_out_while_no_server_was_there_waits_for_silos_to_come_back() {
    let mut world = World::start().await;
    let [mut a, _b] = world.silos(["a", "b"]).await;
    let job_id = world.submit(&spec(2, 2, "max_time = \"1h\"")).await;
    a.contribute(&job_id, 1, 1.25, 3).await;
    world.stop().await;
    world.clock.advance(Duration::from_hours(20));
    world.restart().await;
    let [mut a, mut b] = world.silos(["a", "b"]).await;
    // The updates were finished meanwhile.
    b.contribute(&job_id, 1, -0.5, 1).await;
    expect_published(
        &world,
        &mut a,
        &job_id,
        1,
        &[("a", 1.25, 3), ("b", -0.5, 1)],
    )
    .await;

    // If nobody comes back it closes all the same.
    a.wait_for_round(&job_id, 2).await;
    world.stop().await;
    world.clock.advance(Duration::from_hours(2));
    world.restart().await;
    world.advance(world.config.jobs.lease + Duration::from_mins(3));
    let job = world.wait_for_state(&job_id, JobState::Failed).await;
    assert!(job.reason.contains("2 did not answer"), "{}", job.reason);
}

/// What the server does up to the commit of a contribution that closes its round, and nothing after it.
async fn record_without_a_driver(world: &World, upload_id: &[u8], payload: &[u8]) {
    let clock: Arc<dyn Clock> = world.clock.clone();
    let context = Context::open(world.config.clone(), clock, Arc::new(RandomIds))
        .await
        .unwrap();
    let id: [u8; 16] = upload_id.try_into().unwrap();
    std::fs::write(context.spool.path(&id), payload).unwrap();
    let upload = row_of(&context, id).await;
    let change = crate::service::record_upload(&context, &upload)
        .await
        .unwrap();
    assert_eq!(change.phases, [RoundPhase::Aggregating]);
    let round = context
        .datastore
        .run_read("test", |tx| {
            let job_id = upload.job_id.clone();
            Box::pin(async move { Ok::<_, Failure>(tx.round(&job_id, RoundNumber(1)).await?) })
        })
        .await
        .unwrap();
    assert_eq!(round.unwrap().phase, RoundPhase::Aggregating);
    context.datastore.close().await;
}

#[tokio::test]
async fn files_that_nothing_refers_to_are_swept_at_the_start() {
    let mut world = World::start().await;
    let job_id = world.submit(&spec(1, 1, "")).await;
    let job = world.wait_for_state(&job_id, JobState::Running).await;
    world.stop().await;
    let (spool, adapters) = (
        world.config.state_dir.join("spool"),
        world.config.state_dir.join("adapters"),
    );
    std::fs::write(spool.join("00".repeat(16)), b"left over").unwrap();
    std::fs::write(adapters.join(".tmp123"), b"left over").unwrap();
    world.restart().await;
    assert_eq!(std::fs::read_dir(spool).unwrap().count(), 0);
    let kept: Vec<_> = std::fs::read_dir(adapters).unwrap().collect();
    assert_eq!(kept.len(), 1);
    let version = Digest::try_from(job.adapter_version.as_slice()).unwrap();
    assert_eq!(
        kept[0].as_ref().unwrap().file_name().to_str(),
        Some(version.to_string().as_str())
    );
}

#[tokio::test]
async fn an_expired_upload_is_forgotten_and_may_begin_again() {
    let world = World::start().await;
    let (mut a, job_id, offer) = offering(&world, "max_time = \"1day\"").await;
    let begun = a.begin(&offer).await;
    world.advance(world.config.spool.expiry * 2);
    crate::driver::sweep_now(world.server().context())
        .await
        .unwrap();
    let gone = a.upload(&begun.upload_id, Vec::new()).await;
    assert_eq!(
        super::harness::code(gone),
        concord_common::ErrorCode::UnknownUpload
    );
    let fresh = a.offer(&job_id, 1, constant(1.25), 3).await;
    assert_eq!(a.send(&fresh).await.unwrap().outcome(), Outcome::Accepted);
}

#[tokio::test]
async fn a_stop_lets_an_upload_finish_and_ends_streams_with_a_word() {
    let mut world = World::start().await;
    let [mut a, b] = world.silos(["a", "b"]).await;
    let job_id = world.submit(&spec(1, 2, "")).await;
    let offer = a.offer(&job_id, 1, constant(1.0), 1).await;
    let mut watching = a
        .client
        .watch_rounds(v1::WatchRoundsRequest {})
        .await
        .unwrap()
        .into_inner();
    watching.message().await.unwrap();
    let begun = a.begin(&offer).await;
    let mut chunks =
        chunk::chunks(&offer.payload, 0, 300).map(|chunk| v1::UploadContributionRequest {
            upload_id: begun.upload_id.clone(),
            chunk: Some(chunk),
        });
    let (sender, receiver) = tokio::sync::mpsc::channel(100);
    sender.send(chunks.next().unwrap()).await.unwrap();
    let mut client = a.client.clone();
    let mut upload = JoinSet::new();
    upload.spawn(async move {
        let messages = tokio_stream::wrappers::ReceiverStream::new(receiver);
        client.upload_contribution(messages).await
    });
    let spooled = world.config.state_dir.join("spool");
    eventually("the first chunk in the spool", async || {
        let file = std::fs::read_dir(&spooled).unwrap().next()?.unwrap();
        (file.metadata().unwrap().len() == 300).then_some(())
    })
    .await;

    let server = world.server.take().unwrap();
    let mut stopping = JoinSet::new();
    stopping.spawn(server.stop(std::time::Duration::from_secs(10)));
    let last = watching.message().await;
    assert_eq!(
        super::harness::code(last),
        concord_common::ErrorCode::ShuttingDown
    );
    let mut rest = stream::iter(chunks);
    while let Some(message) = futures::StreamExt::next(&mut rest).await {
        sender.send(message).await.unwrap();
    }
    drop(sender);
    let receipt = upload
        .join_next()
        .await
        .unwrap()
        .unwrap()
        .unwrap()
        .into_inner()
        .receipt
        .unwrap();
    assert_eq!(receipt.outcome(), Outcome::Accepted);
    drop((a, b));
    let outcome = stopping.join_next().await.unwrap().unwrap();
    assert_eq!(outcome, concord_common::lifecycle::StopOutcome::Clean);

    world.restart().await;
    let [_a, mut b] = world.silos(["a", "b"]).await;
    b.contribute(&job_id, 1, 1.0, 1).await;
    world.wait_for_state(&job_id, JobState::Succeeded).await;
}

#[tokio::test]
async fn an_upload_that_another_has_replaced_is_not_recorded_and_the_other_counts() {
    let world = World::start().await;
    let [mut a] = world.silos(["a"]).await;
    let job_id = world.submit(&spec(1, 1, "")).await;
    let first = a.offer(&job_id, 1, constant(1.25), 3).await;
    let begun = a.begin(&first).await;
    let context = Arc::clone(world.server.as_ref().unwrap().context());
    let id: [u8; 16] = begun.upload_id.as_slice().try_into().unwrap();
    let upload = row_of(&context, id).await;
    // As if the first upload's last byte were just being synced to the disk.
    let second = a.offer(&job_id, 1, constant(2.5), 3).await;
    a.client
        .begin_contribution(second.begin.clone())
        .await
        .unwrap();
    let refused = crate::service::record_upload(&context, &upload).await;
    assert!(
        matches!(&refused, Err(Failure::Refused(refusal)) if refusal.code == ErrorCode::UnknownUpload)
    );
    assert_eq!(a.send(&second).await.unwrap().outcome(), Outcome::Accepted);
    expect_published(&world, &mut a, &job_id, 1, &[("a", 2.5, 3)]).await;
}

#[tokio::test]
async fn an_upload_that_is_thrown_away_is_first_taken_from_whoever_goes_on_with_it() {
    let world = World::start().await;
    let (mut a, _, offer) = offering(&world, "").await;
    let begun = a.begin(&offer).await;
    let context = Arc::clone(world.server().context());
    let id: [u8; 16] = begun.upload_id.as_slice().try_into().unwrap();
    let upload = row_of(&context, id).await;
    // A second call that has looked at the row and not yet opened the file.
    let second = context.spool.take_turn(id).await;
    let refusal = Refusal::new(ErrorCode::NotFinite, "a value is not finite");
    let mut thrown = JoinSet::new();
    thrown.spawn(crate::service::throw_upload_away(
        Arc::clone(&context),
        upload,
        refusal,
    ));
    second.cut().cancelled().await;
    row_of(&context, id).await;
    std::fs::write(context.spool.path(&id), b"part").unwrap();
    drop(second);
    thrown.join_next().await.unwrap().unwrap().unwrap();
    std::fs::metadata(context.spool.path(&id)).unwrap_err();
    let again = a.upload(&begun.upload_id, Vec::new()).await;
    assert_eq!(super::harness::code(again), ErrorCode::UnknownUpload);
}

#[tokio::test]
async fn a_contribution_that_was_committed_but_never_announced_is_seen_all_the_same() {
    let world = World::start().await;
    let (mut a, job_id, offer) = offering(&world, "max_time = \"1day\"").await;
    let begun = a.begin(&offer).await;
    let context = Arc::clone(world.server.as_ref().unwrap().context());
    let id: [u8; 16] = begun.upload_id.as_slice().try_into().unwrap();
    std::fs::write(context.spool.path(&id), &offer.payload).unwrap();
    let upload = row_of(&context, id).await;
    crate::service::record_upload(&context, &upload)
        .await
        .unwrap();
    world.wait_for_state(&job_id, JobState::Succeeded).await;
}

pub(super) async fn row_of(context: &Context, id: [u8; 16]) -> UploadRecord {
    context
        .datastore
        .run_read("test", |tx| {
            Box::pin(async move { Ok::<_, Failure>(tx.upload(&id).await?) })
        })
        .await
        .unwrap()
        .unwrap()
}
