//! The daemon is killed between any two steps of a round, and lives again with nothing but its folder.

use std::collections::BTreeSet;

use concord_common::ErrorCode;
use tokio_util::sync::CancellationToken;

use super::*;
use crate::testing::Deed;

/// Where it is killed: how far it has come, the call that does not come to its end, and whether the server has acted on it.
type Point = (&'static str, Call, fn(CancellationToken) -> Fault);

const POINTS: [Point; 6] = [
    ("nothing is done", Call::Claim, Fault::Stop),
    (
        "the update is in the outbox and the vault not saved",
        Call::Report,
        Fault::Stop,
    ),
    (
        "the vault is saved and nothing announced",
        Call::Begin,
        Fault::Stop,
    ),
    ("the update is announced", Call::Begin, Fault::StopAfter),
    (
        "the upload is in the log and nothing sent",
        Call::Upload,
        Fault::Stop,
    ),
    (
        "the server has recorded and the receipt not come",
        Call::Upload,
        Fault::StopAfter,
    ),
];

#[tokio::test]
async fn a_daemon_killed_between_any_two_steps_comes_back_with_the_same_bytes_and_doubles_nothing()
{
    let spec_toml = spec("fedmcp", 2, "");
    let expected = {
        let federation = federation(&spec_toml, &["north", "south"]);
        let daemons = ["north", "south"].map(|name| Running::start(name, &federation, |_| {}));
        eventually("the undisturbed end", || is_over(&federation)).await;
        for daemon in daemons {
            daemon.stop().await;
        }
        federation.versions()
    };
    for (point, call, fault) in POINTS {
        let federation = federation(&spec_toml, &["north", "south"]);
        let home = Home::new("north");
        let stop = home.stop.clone();
        let first = Running::of(home, &federation, |server| server.plan(call, fault(stop)));
        first.task.await.unwrap().unwrap();
        assert_eq!(first.server.left(), 0, "{point}");

        let north = Running::of(first.home.revived(), &federation, |_| {});
        // Alone north cannot end the round, so its receipt is there to be fetched.
        eventually(point, || north.home.receipts().len() == 1).await;
        let south = Running::start("south", &federation, |_| {});
        let tested = || reported(&federation, "north", 2, "final_test").is_some();
        eventually(point, tested).await;
        assert_eq!(federation.versions(), expected, "{point}");
        let home = north.stop().await;
        south.stop().await;

        let receipts = home.receipts();
        let rounds: Vec<u32> = receipts.iter().map(|kept| kept.round.0).collect();
        assert_eq!(rounds, [1, 2], "{point}");
        let log = home.egress_log();
        for kept in receipts {
            kept.verify().unwrap();
            let sent: BTreeSet<&str> = log
                .iter()
                .filter(|line| line["kind"] == "contribution" && line["round"] == kept.round.0)
                .map(|line| line["digest"].as_str().unwrap())
                .collect();
            let signed = kept.payload_digest.to_string();
            assert_eq!(sent, BTreeSet::from([signed.as_str()]), "{point}");
        }
    }
}

/// A daemon killed between the server's word that its update does not pass and its own answer to that.
async fn killed_over_a_rejection(federation: &Arc<Federation>, code: ErrorCode) -> Home {
    let home = Home::new("north");
    let stop = home.stop.clone();
    let (judge, silo) = (Arc::clone(federation), home.silo.clone());
    let first = Running::of(home, federation, |server| {
        let noted = Deed::new(move || judge.reject(&silo, code).unwrap());
        server.plan(Call::Begin, Fault::First(noted));
        server.plan(Call::Upload, Fault::Stop(stop));
    });
    first.task.await.unwrap().unwrap();
    assert_eq!(first.server.left(), 0);
    first.home.revived()
}

#[tokio::test]
async fn a_daemon_killed_over_a_rejection_takes_the_round_up_again() {
    let spec_toml = spec("fedmcp", 1, "");
    let federation = federation(&spec_toml, &["north", "south"]);
    let home = killed_over_a_rejection(&federation, ErrorCode::DigestMismatch).await;
    let north = Running::of(home, &federation, |_| {});
    eventually("a better contribution", || north.home.receipts().len() == 1).await;
    north.stop().await;
}

#[tokio::test]
async fn a_daemon_killed_over_a_rejection_that_it_cannot_better_says_no_in_its_next_life() {
    let spec_toml = spec("fedmcp", 1, "");
    let federation = federation(&spec_toml, &["north", "south"]);
    let code = ErrorCode::NormTooLarge;
    let home = killed_over_a_rejection(&federation, code).await;
    let north = Running::of(home, &federation, |server| {
        server.plan(Call::Upload, Fault::Refused(code));
    });
    eventually("the end of a job that cannot go on", || {
        is_over(&federation)
    })
    .await;
    let home = north.stop().await;
    let log = home.egress_log();
    assert!(log.iter().any(|line| line["kind"] == "decline"), "{log:?}");
}

#[tokio::test]
async fn a_contribution_that_the_servers_machine_has_lost_is_sent_again_byte_for_byte() {
    let spec_toml = spec("fedmcp", 2, "");
    let run = async |lost: bool, killed: bool| {
        let federation = federation(&spec_toml, &["north", "south"]);
        let mut north = Running::start("north", &federation, |_| {});
        eventually("the receipt", || north.home.receipts().len() == 1).await;
        if killed {
            let home = north.stop().await.revived();
            federation.lose_power();
            north = Running::of(home, &federation, |_| {});
        } else if lost {
            federation.lose_power();
        }
        let south = Running::start("south", &federation, |_| {});
        eventually("the end", || is_over(&federation)).await;
        assert_eq!(federation.outcome().0, JobState::Succeeded);
        south.stop().await;
        let home = north.stop().await;
        let sent: Vec<_> = home
            .egress_log()
            .into_iter()
            .filter(|line| line["kind"] == "contribution" && line["round"] == 1)
            .map(|line| line["digest"].clone())
            .collect();
        assert_eq!(sent.len(), if lost { 2 } else { 1 });
        assert_eq!(sent.first(), sent.last());
        federation.versions()
    };
    let expected = run(false, false).await;
    assert_eq!(run(true, false).await, expected);
    assert_eq!(run(true, true).await, expected);
}
