//! Old adapter versions: what goes, what stays, and that nothing is lost on the way.

use std::time::Duration;

use concord_common::{Digest, ErrorCode};
use concord_proto::v1::JobState;

use super::harness::{FakeSilo, World, code, eventually, spec};
use crate::{driver::sweep_now, error::Failure};

/// A server that keeps two versions of a job, and them for an hour after its end.
async fn world() -> World {
    World::start_with(|config| {
        config.retention.versions = 2;
        config.retention.ended_jobs = Duration::from_hours(1);
    })
    .await
}

/// The blobs on the disk.
fn stored(world: &World) -> usize {
    let folder = world.config.state_dir.join("adapters");
    std::fs::read_dir(folder).unwrap().count()
}

/// Contributes to a round and waits until it is published; gives the version.
async fn publish(world: &World, silo: &mut FakeSilo, job_id: &str, round: u32) -> Vec<u8> {
    silo.contribute(job_id, round, 0.25, 1).await;
    eventually("the published round", async || {
        let found = world.round(job_id, round).await.round.unwrap();
        (!found.published_version.is_empty()).then_some(found.published_version)
    })
    .await
}

async fn sweep(world: &World) {
    sweep_now(world.server().context()).await.unwrap();
}

#[tokio::test]
async fn a_running_job_keeps_its_newest_versions_and_goes_on() {
    let world = world().await;
    let [mut a] = world.silos(["a"]).await;
    let job_id = world.submit(&spec(4, 1, "")).await;
    let first = a.wait_for_round(&job_id, 1).await.base_version;
    let mut versions = Vec::new();
    for round in 1..=3 {
        versions.push(publish(&world, &mut a, &job_id, round).await);
    }
    assert_eq!(stored(&world), 4);
    sweep(&world).await;
    assert_eq!(stored(&world), 2);
    for gone in [&first, &versions[0]] {
        let answer = a.download(&job_id, gone, 0).await;
        assert_eq!(code(answer), ErrorCode::UnknownVersion);
    }
    for kept in &versions[1..] {
        let adapter = a.download(&job_id, kept, 0).await.unwrap();
        assert_eq!(Digest::of(&adapter).to_vec(), *kept);
    }
    // The rounds themselves are not forgotten.
    let shown = world.round(&job_id, 1).await.round.unwrap();
    assert_eq!(
        (shown.base_version, shown.published_version),
        (first, versions[0].clone())
    );
    publish(&world, &mut a, &job_id, 4).await;
    world.wait_for_state(&job_id, JobState::Succeeded).await;
}

#[tokio::test]
async fn an_ended_job_keeps_its_last_adapter_alone_after_its_time_and_that_for_ever() {
    let world = world().await;
    let [mut a] = world.silos(["a"]).await;
    let job_id = world.submit(&spec(2, 1, "")).await;
    for round in [1, 2] {
        publish(&world, &mut a, &job_id, round).await;
    }
    let job = world.wait_for_state(&job_id, JobState::Succeeded).await;
    sweep(&world).await;
    assert_eq!(stored(&world), 2);
    for hours in [2, 24 * 365 * 10] {
        world.clock.advance(Duration::from_hours(hours));
        sweep(&world).await;
        assert_eq!(stored(&world), 1);
    }
    let folder = world.config.state_dir.join("adapters");
    let last = Digest::try_from(job.adapter_version.as_slice()).unwrap();
    let payload = std::fs::read(folder.join(last.to_string())).unwrap();
    assert_eq!(Digest::of(&payload), last);
}

#[tokio::test]
async fn a_crash_between_forgetting_and_deleting_loses_nothing_but_space() {
    let mut world = world().await;
    let [mut a] = world.silos(["a"]).await;
    let job_id = world.submit(&spec(4, 1, "")).await;
    let mut last = Vec::new();
    for round in 1..=3 {
        last = publish(&world, &mut a, &job_id, round).await;
    }
    let context = world.server().context();
    let before = context.now();
    let gone = context
        .datastore
        .run_tx("test", |tx| {
            Box::pin(async move { Ok::<_, Failure>(tx.prune_versions(2, before).await?) })
        })
        .await
        .unwrap();
    assert_eq!((gone.len(), stored(&world)), (2, 4));

    world.restart().await;
    assert_eq!(stored(&world), 2);
    let mut a = world.silo("a").await;
    a.download(&job_id, &last, 0).await.unwrap();
    publish(&world, &mut a, &job_id, 4).await;
    world.wait_for_state(&job_id, JobState::Succeeded).await;
}

#[tokio::test]
async fn an_adapter_that_another_job_has_too_stays() {
    let world = world().await;
    let [mut a] = world.silos(["a"]).await;
    let first = world.submit(&spec(3, 1, "")).await;
    // The same seed draws the same first adapter.
    let second = world.submit(&spec(1, 1, "")).await;
    let base = a.wait_for_round(&second, 1).await.base_version;
    assert_eq!(a.wait_for_round(&first, 1).await.base_version, base);
    for round in 1..=3 {
        publish(&world, &mut a, &first, round).await;
    }
    sweep(&world).await;
    assert_eq!(
        code(a.download(&first, &base, 0).await),
        ErrorCode::UnknownVersion
    );
    let adapter = a.download(&second, &base, 0).await.unwrap();
    assert_eq!(Digest::of(&adapter).to_vec(), base);
}
