//! A caller may go away at any moment of its call: what was committed is announced all the same.

use std::{pin::pin, sync::Arc};

use concord_proto::v1;

use super::{
    harness::{World, constant, eventually, spec},
    offers::offering,
};
use crate::{
    context::Context,
    error::Failure,
    service::{conclude_upload, federation::Federation, federation::begin},
};

/// Drives a call until its transaction is committed, and drops it there, as tonic does when the caller disconnects.
async fn drop_after_commit<T>(
    call: impl Future<Output = Result<T, Failure>>,
    mut committed: impl AsyncFnMut() -> bool,
) {
    let mut call = pin!(call);
    loop {
        let over = futures::poll!(call.as_mut()).is_ready();
        // The database works on threads of its own; it gets time to commit while nobody asks the call to go on.
        for _ in 0..20 {
            if committed().await {
                return;
            }
        }
        assert!(!over, "the call is over and has committed nothing");
    }
}

/// Whether a silo's part in round 1 is decided.
async fn is_recorded(context: &Context, job_id: &str, silo: &str) -> bool {
    let (job_id, silo) = (job_id.parse().unwrap(), silo.parse().unwrap());
    let (job_id, silo) = (&job_id, &silo);
    let recorded = context
        .datastore
        .run_read("test", |tx| {
            Box::pin(async move {
                Ok::<_, Failure>(
                    tx.round_silo(job_id, concord_common::RoundNumber(1), silo)
                        .await?,
                )
            })
        })
        .await
        .unwrap();
    recorded.is_some_and(|silo| silo.outcome.is_some())
}

#[tokio::test]
async fn an_upload_whose_caller_goes_away_after_the_commit_wakes_the_driver_and_the_silos() {
    let world = World::start().await;
    let (mut a, job_id, offer) = offering(&world, "max_time = \"1day\"").await;
    let begun = a.begin(&offer).await;
    let context = Arc::clone(world.server().context());
    let id: [u8; 16] = begun.upload_id.as_slice().try_into().unwrap();
    std::fs::write(context.spool.path(&id), &offer.payload).unwrap();
    let upload = super::restart::row_of(&context, id).await;
    let expected = concord_common::chunk::Expected {
        layout: super::harness::layout(),
        digest: upload.payload_digest,
        max_norm: None,
    };
    let turn = context.spool.take_turn(id).await;
    let session = context.spool.resume(turn, expected).unwrap();
    let mut at_silo = context.hub.watch_silo(&"a".parse().unwrap());
    let mut at_job = context.hub.watch_job(&job_id.parse().unwrap());

    let concluded = conclude_upload(Arc::clone(&context), upload, session);
    let call = context.to_the_end(concluded);
    drop_after_commit(call, || is_recorded(&context, &job_id, "a")).await;

    at_silo.changed().await.unwrap();
    at_job.changed().await.unwrap();
    world.wait_for_state(&job_id, v1::JobState::Succeeded).await;
}

#[tokio::test]
async fn a_header_that_comes_too_late_is_announced_although_its_caller_has_gone() {
    let world = World::start().await;
    let [mut a, mut b] = world.silos(["a", "b"]).await;
    let job_id = world.submit(&spec(1, 1, "max_silos = 1")).await;
    let late = a.offer(&job_id, 1, constant(1.0), 1).await;
    b.contribute(&job_id, 1, 1.0, 1).await;
    world.wait_for_state(&job_id, v1::JobState::Succeeded).await;
    let context = Arc::clone(world.server().context());
    let mut at_silo = context.hub.watch_silo(&"a".parse().unwrap());
    let begun = begin::begin(Arc::clone(&context), "a".parse().unwrap(), late.begin);
    let call = context.to_the_end(begun);
    drop_after_commit(call, || is_recorded(&context, &job_id, "a")).await;
    at_silo.changed().await.unwrap();
}

#[tokio::test]
async fn a_silo_that_declines_and_goes_away_is_announced() {
    let world = World::start().await;
    let [mut a, _b] = world.silos(["a", "b"]).await;
    let job_id = world.submit(&spec(1, 1, "max_time = \"1day\"")).await;
    a.wait_for_round(&job_id, 1).await;
    let context = Arc::clone(world.server().context());
    let service = Federation::new(Arc::clone(&context), context.shutdown.clone());
    let mut at_silo = context.hub.watch_silo(&"a".parse().unwrap());
    let request = v1::DeclineJobRequest {
        job_id: job_id.clone(),
        reason: "BAD_DATA".to_owned(),
        message: String::new(),
    };
    let declined = async move { service.decline(&"a".parse().unwrap(), &request).await };
    let call = context.to_the_end(declined);
    drop_after_commit(call, || is_recorded(&context, &job_id, "a")).await;
    at_silo.changed().await.unwrap();
}

#[tokio::test]
async fn an_upload_over_the_wire_counts_although_its_caller_disconnects_before_the_answer() {
    let world = World::start().await;
    let (a, job_id, offer) = offering(&world, "max_time = \"1day\"").await;
    let context = Arc::clone(world.server().context());
    let mut silo = a.clone();
    let mut call = Box::pin(async move { silo.send(&offer).await });
    // Nobody looks at the answer, and the connection's end of the call is dropped as soon as the contribution is in.
    eventually("the contribution", async || {
        let _ = futures::poll!(call.as_mut());
        is_recorded(&context, &job_id, "a").await.then_some(())
    })
    .await;
    drop(call);
    world.wait_for_state(&job_id, v1::JobState::Succeeded).await;
}
