//! Files that a power cut left with other bytes than were written.

use std::path::PathBuf;

use concord_common::Digest;
use concord_proto::v1::{JobState, Outcome, RoundPhase};

use super::harness::{World, constant, eventually, expect_published, layout, spec};
use crate::driver;

/// The one file of a folder under the state folder.
fn only_file(world: &World, folder: &str) -> PathBuf {
    let files: Vec<_> = std::fs::read_dir(world.config.state_dir.join(folder))
        .unwrap()
        .map(|file| file.unwrap().path())
        .collect();
    assert_eq!(files.len(), 1, "{files:?}");
    files.into_iter().next().unwrap()
}

/// Fills a file with zeros, as file systems do with blocks that were never written.
fn zero(path: &PathBuf) {
    let length = std::fs::metadata(path).unwrap().len() as usize;
    std::fs::write(path, vec![0; length]).unwrap();
}

#[tokio::test]
async fn a_contribution_that_was_damaged_on_the_disk_is_not_aggregated_and_may_be_sent_again() {
    let mut world = World::start().await;
    let [mut a, _b] = world.silos(["a", "b"]).await;
    let job_id = world.submit(&spec(1, 1, "max_time = \"1day\"")).await;
    let offer = a.offer(&job_id, 1, constant(1.25), 3).await;
    a.send(&offer).await.unwrap();
    world.stop().await;
    zero(&only_file(&world, "spool"));

    world.restart().await;
    let [mut a, mut b] = world.silos(["a", "b"]).await;
    let rejected = eventually("the damaged contribution", async || {
        let silos = world.round(&job_id, 1).await.silos;
        let part = silos.into_iter().find(|silo| silo.silo_id == "a")?;
        (part.outcome() == Outcome::Rejected).then_some(part)
    })
    .await;
    assert_eq!(rejected.reason, "INTERNAL");
    let offer = a.offer(&job_id, 1, constant(1.25), 3).await;
    assert_eq!(a.send(&offer).await.unwrap().outcome(), Outcome::Accepted);
    b.contribute(&job_id, 1, -0.5, 1).await;
    expect_published(
        &world,
        &mut a,
        &job_id,
        1,
        &[("a", 1.25, 3), ("b", -0.5, 1)],
    )
    .await;
}

#[tokio::test]
async fn nobody_waits_for_a_silo_whose_contribution_was_damaged() {
    let mut world = World::start().await;
    let [mut a, _b] = world.silos(["a", "b"]).await;
    let job_id = world.submit(&spec(2, 1, "max_time = \"1day\"")).await;
    a.contribute(&job_id, 1, 1.25, 3).await;
    world.stop().await;
    zero(&only_file(&world, "spool"));

    world.restart().await;
    let [mut a, mut b] = world.silos(["a", "b"]).await;
    // Long before its time is up: a daemon that has its receipt does not send again.
    b.contribute(&job_id, 1, -0.5, 1).await;
    expect_published(&world, &mut b, &job_id, 1, &[("b", -0.5, 1)]).await;
    // The next round asks it as before.
    a.wait_for_round(&job_id, 2).await;
}

#[tokio::test]
async fn a_contribution_that_was_lost_from_the_disk_is_not_waited_for_with_faults() {
    let mut world = World::start().await;
    let [mut a, _b] = world.silos(["a", "b"]).await;
    let job_id = world.submit(&spec(1, 2, "max_time = \"1day\"")).await;
    let offer = a.offer(&job_id, 1, constant(1.25), 3).await;
    a.send(&offer).await.unwrap();
    world.stop().await;
    std::fs::remove_file(only_file(&world, "spool")).unwrap();

    world.restart().await;
    // The other silo alone is too few.
    let failed = world.wait_for_state(&job_id, JobState::Failed).await;
    assert!(
        failed.reason.contains("1 contributions were damaged"),
        "{}",
        failed.reason
    );
    let round = world.round(&job_id, 1).await.round.unwrap();
    assert_eq!(round.phase(), RoundPhase::Failed);
}

#[tokio::test]
async fn a_damaged_first_adapter_is_drawn_again() {
    let mut world = World::start().await;
    let [_a] = world.silos(["a"]).await;
    let job_id = world.submit(&spec(1, 1, "max_time = \"1day\"")).await;
    let job = world.wait_for_state(&job_id, JobState::Running).await;
    world.stop().await;
    zero(&only_file(&world, "adapters"));

    world.restart().await;
    let [mut a] = world.silos(["a"]).await;
    a.wait_for_round(&job_id, 1).await;
    let payload = eventually("the adapter", async || {
        let payload = a.download(&job_id, &job.adapter_version, 0).await.ok()?;
        (Digest::of(&payload).to_vec() == job.adapter_version).then_some(payload)
    })
    .await;
    assert_eq!(payload.len() as u64, layout().payload_bytes());
    a.contribute(&job_id, 1, 1.0, 1).await;
    expect_published(&world, &mut a, &job_id, 1, &[("a", 1.0, 1)]).await;
}

#[tokio::test]
async fn digests_of_a_damaged_adapter_are_not_sent_with_the_one_that_was_drawn_again() {
    let world = World::start().await;
    let [mut a] = world.silos(["a"]).await;
    let job_id = world.submit(&spec(1, 1, "max_time = \"1day\"")).await;
    let version = a.wait_for_round(&job_id, 1).await.base_version;
    let adapter = only_file(&world, "adapters");
    let bytes = vec![0; std::fs::metadata(&adapter).unwrap().len() as usize];
    // The driver looks at the files once, when it takes the job up; if it comes to that only now, it draws the adapter again.
    eventually(
        "the damaged adapter, whose pieces are then remembered",
        async || {
            let damage = tempfile::NamedTempFile::new_in(world.folder.path()).unwrap();
            std::fs::write(damage.path(), &bytes).unwrap();
            damage.persist(&adapter).unwrap();
            let damaged = a.download(&job_id, &version, 0).await.ok()?;
            (Digest::of(&damaged).to_vec() != version).then_some(())
        },
    )
    .await;
    driver::verify_now(world.server().context(), &job_id.parse().unwrap())
        .await
        .unwrap();
    // The download checks the digest of each piece.
    let mended = a.download(&job_id, &version, 0).await.unwrap();
    assert_eq!(Digest::of(&mended).to_vec(), version);
}

#[tokio::test]
async fn a_job_whose_published_adapter_was_damaged_fails_with_a_reason() {
    let mut world = World::start().await;
    let [mut a] = world.silos(["a"]).await;
    let job_id = world.submit(&spec(2, 1, "max_time = \"1day\"")).await;
    a.contribute(&job_id, 1, 1.0, 1).await;
    a.wait_for_round(&job_id, 2).await;
    let job = world.job(&job_id).await.job.unwrap();
    let version = Digest::try_from(job.adapter_version.as_slice()).unwrap();
    world.stop().await;
    let path = world
        .config
        .state_dir
        .join("adapters")
        .join(version.to_string());
    zero(&path);

    world.restart().await;
    let failed = world.wait_for_state(&job_id, JobState::Failed).await;
    assert!(failed.reason.contains("damaged"), "{}", failed.reason);
}
