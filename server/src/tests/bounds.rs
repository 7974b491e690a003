//! What one silo or one job may take of the server.

use std::{convert::Infallible, sync::Arc, time::Duration};

use bytes::Bytes;
use concord_common::{ErrorCode, Role, chunk, code::Refusal, config::ByteSize};
use concord_proto::v1::{self, JobState, Outcome};
use futures::{StreamExt as _, stream};
use tokio::{
    sync::{Notify, mpsc},
    task::JoinSet,
};
use tonic::{Status, body::Body};
use tower::{Service as _, ServiceExt as _};

use super::harness::{FakeSilo, Offer, World, code, constant, eventually, layout, spec};
use crate::{datastore::NewJob, error::Failure};

/// Begins an upload, sends its first chunk and then nothing more. The call lives as long as the returned sender.
async fn stall(
    silo: &mut FakeSilo,
    offer: &Offer,
    calls: &mut JoinSet<Result<v1::Receipt, tonic::Status>>,
) -> mpsc::Sender<v1::UploadContributionRequest> {
    let begun = silo
        .client
        .begin_contribution(offer.begin.clone())
        .await
        .unwrap()
        .into_inner();
    let (sender, receiver) = mpsc::channel(4);
    let first = v1::UploadContributionRequest {
        upload_id: begun.upload_id,
        chunk: chunk::chunks(&offer.payload, 0, 300).next(),
    };
    sender.send(first).await.unwrap();
    let mut client = silo.client.clone();
    calls.spawn(async move {
        let messages = tokio_stream::wrappers::ReceiverStream::new(receiver);
        let answer = client.upload_contribution(messages).await?;
        Ok(answer.into_inner().receipt.unwrap())
    });
    sender
}

#[tokio::test]
async fn a_call_whose_message_trickles_in_is_ended_and_streams_live_on() {
    let time = Duration::from_millis(300);
    let world = World::start_with(|config| config.limits.message_time = time).await;
    let [mut a] = world.silos(["a"]).await;
    let request = v1::WatchRoundsRequest {};
    let mut watch = a.client.watch_rounds(request).await.unwrap().into_inner();
    watch.message().await.unwrap().unwrap();
    let job_id = world.submit(&spec(1, 1, "")).await;
    let offer = a.offer(&job_id, 1, constant(1.0), 1).await;
    let mut calls = JoinSet::new();
    let upload = stall(&mut a, &offer, &mut calls).await;

    // A message of five bytes is announced, and none of them comes.
    let head = stream::iter([Ok::<_, Infallible>(Bytes::from_static(&[0, 0, 0, 0, 5]))]);
    let body = axum::body::Body::from_stream(head.chain(stream::pending()));
    let request = http::Request::post("/concord.v1.FederationService/ClaimLease")
        .header("content-type", "application/grpc")
        .body(Body::new(body))
        .unwrap();
    let mut channel = world.channel(Role::Silo, "a");
    let called = channel.ready().await.unwrap().call(request);
    let answer = tokio::time::timeout(Duration::from_secs(20), called).await;
    let status = Status::from_header_map(answer.unwrap().unwrap().headers()).unwrap();
    assert_eq!(status.code(), tonic::Code::DeadlineExceeded);
    let refusal = Refusal::from_status(&status).unwrap();
    assert_eq!(refusal.code, ErrorCode::TooSlow);

    for chunk in chunk::chunks(&offer.payload, 0, 300).skip(1) {
        let next = v1::UploadContributionRequest {
            upload_id: Vec::new(),
            chunk: Some(chunk),
        };
        upload.send(next).await.unwrap();
    }
    drop(upload);
    let receipt = calls.join_next().await.unwrap().unwrap().unwrap();
    assert_eq!(receipt.outcome(), Outcome::Accepted);
    watch.message().await.unwrap().unwrap();
}

#[tokio::test]
async fn the_end_of_a_download_does_not_wait_until_its_bytes_are_counted() {
    let world = World::start().await;
    let [mut a] = world.silos(["a"]).await;
    let job_id = world.submit(&spec(1, 1, "")).await;
    let version = a.wait_for_round(&job_id, 1).await.base_version;
    let (held, release) = (&Notify::new(), &Notify::new());
    // Somebody else's transaction has the only connection that may write.
    let holding = world.server().context().datastore.run_tx("test", |_| {
        Box::pin(async move {
            held.notify_one();
            release.notified().await;
            Ok::<_, Failure>(())
        })
    });
    let downloading = async {
        held.notified().await;
        let download = a.download(&job_id, &version, 0);
        let adapter = tokio::time::timeout(Duration::from_secs(20), download).await;
        release.notify_one();
        adapter.unwrap().unwrap()
    };
    let (held, adapter) = tokio::join!(holding, downloading);
    held.unwrap();
    assert_eq!(adapter.len() as u64, layout().payload_bytes());
    eventually("the bytes to be counted", async || {
        let silos = world.job(&job_id).await.silos;
        (silos[0].bytes_down == layout().payload_bytes()).then_some(())
    })
    .await;
}

#[tokio::test]
async fn a_slow_silo_does_not_hold_up_an_honest_one() {
    let world = World::start_with(|config| {
        config.limits.max_transfers = 2;
        config.limits.max_transfers_per_silo = 1;
        // Much shorter than the slow silo may idle.
        config.limits.transfer_wait = Duration::from_secs(5);
    })
    .await;
    let [mut slow, mut honest] = world.silos(["slow", "honest"]).await;
    let mut calls = JoinSet::new();
    let mut stalled = Vec::new();
    let mut jobs = Vec::new();
    for _ in 0..2 {
        let job_id = world.submit(&spec(1, 1, "max_time = \"1day\"")).await;
        let offer = slow.offer(&job_id, 1, constant(1.0), 1).await;
        stalled.push(stall(&mut slow, &offer, &mut calls).await);
        jobs.push(job_id);
    }
    let spooled = world.config.state_dir.join("spool");
    eventually("a chunk of the slow silo", async || {
        let mut files = std::fs::read_dir(&spooled).unwrap().flatten();
        files
            .any(|file| file.metadata().is_ok_and(|file| file.len() == 300))
            .then_some(())
    })
    .await;
    for job_id in jobs {
        let receipt = honest.contribute(&job_id, 1, 1.0, 1).await;
        assert_eq!(receipt.outcome(), Outcome::Accepted);
    }
    drop(stalled);
}

#[tokio::test]
async fn an_upload_that_nobody_announced_gets_no_turn() {
    let world = World::start_with(|config| {
        config.limits.max_transfers = 1;
        config.limits.max_waiting_transfers = 0;
    })
    .await;
    let [mut a, mut b] = world.silos(["a", "b"]).await;
    let job_id = world.submit(&spec(1, 1, "max_time = \"1day\"")).await;
    let offer = a.offer(&job_id, 1, constant(1.0), 1).await;
    let mut calls = JoinSet::new();
    let stalled = stall(&mut a, &offer, &mut calls).await;
    let spooled = world.config.state_dir.join("spool");
    eventually("a file in the spool", async || {
        std::fs::read_dir(&spooled).unwrap().next().map(drop)
    })
    .await;
    // All turns are taken, and it is told the reason that no turn would change.
    let answer = b.upload(&[7; 16], Vec::new()).await;
    assert_eq!(code(answer), ErrorCode::UnknownUpload);
    drop(stalled);
}

#[tokio::test]
async fn an_upload_that_is_replaced_while_it_waits_leaves_no_file_behind() {
    let world = World::start().await;
    let [mut a] = world.silos(["a"]).await;
    let job_id = world.submit(&spec(1, 1, "max_time = \"1day\"")).await;
    let offer = a.offer(&job_id, 1, constant(1.0), 1).await;
    let begun = a
        .client
        .begin_contribution(offer.begin.clone())
        .await
        .unwrap()
        .into_inner();
    let context = Arc::clone(world.server().context());
    let id: [u8; 16] = begun.upload_id.as_slice().try_into().unwrap();
    let turn = context.spool.take_turn(id).await;
    let mut calls = JoinSet::new();
    let mut silo = a.clone();
    calls.spawn(async move { silo.upload(&begun.upload_id, Vec::new()).await });
    turn.cut().cancelled().await;
    // The call waits for the turn of an upload that another header replaces now.
    context
        .datastore
        .run_tx("test", |tx| {
            Box::pin(async move { Ok::<_, Failure>(tx.delete_upload(&id).await?) })
        })
        .await
        .unwrap();
    drop(turn);
    let answer = calls.join_next().await.unwrap().unwrap();
    assert_eq!(code(answer), ErrorCode::UnknownUpload);
    assert!(!context.spool.path(&id).exists());
}

#[tokio::test]
async fn a_job_whose_adapter_is_larger_than_the_server_takes_fails_with_both_sizes() {
    let world = World::start_with(|config| config.jobs.max_adapter = ByteSize(1 << 10)).await;
    let context = world.server().context();
    // As if it had been queued when the setting was another.
    let job = NewJob {
        kind: concord_common::job::FEDERATED,
        job_id: "large-1".parse().unwrap(),
        request_id: "large".to_owned(),
        submitted_by: "olga".to_owned(),
        submitted_at: context.now(),
        spec_toml: spec(1, 1, ""),
    };
    let queued = &job;
    context
        .datastore
        .run_tx("test", |tx| {
            Box::pin(async move { Ok::<_, Failure>(tx.insert_job(queued).await?) })
        })
        .await
        .unwrap();
    context.hub.queue_changed();
    let failed = world.wait_for_state("large-1", JobState::Failed).await;
    let bytes = layout().payload_bytes().to_string();
    for part in [
        bytes.as_str(),
        "1 KiB",
        "jobs.max_adapter",
        "adapter.bottleneck",
    ] {
        assert!(failed.reason.contains(part), "{part}: {}", failed.reason);
    }
}
