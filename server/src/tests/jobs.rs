use std::collections::BTreeMap;

use concord_common::{Digest, ErrorCode};
use concord_proto::v1::{self, JobState, Outcome, RoundPhase};

use super::harness::{World, code, constant, eventually, spec, weighted_mean};

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
            let adapter = silo.download(&job_id, &notice.base_version, 0).await.unwrap();
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
    let last = silos[0].download(&job_id, &job.adapter_version, 100).await.unwrap();
    assert_eq!(last, base[100..]);
    let spooled = world.config.state_dir.join("spool");
    assert_eq!(std::fs::read_dir(spooled).unwrap().count(), 0);
    let ended = silos[1].notices().await;
    assert_eq!(ended[0].job_state(), JobState::Succeeded);
    assert_eq!(ended[0].base_version, job.adapter_version);
}
