use std::{fs, os::unix::fs::PermissionsExt as _, path::PathBuf};

use concord_common::{Digest, adapter::AdapterVersion, round::RoundPhase};

use super::*;
use crate::{
    coordinator::memory::{Federation, MemoryCoordinator},
    testing::{Call, Fault, Faulty, Home, federation, job, reported, spec},
};

const ONE: RoundNumber = RoundNumber(1);

/// Two silos and a job for both.
struct Pair {
    north: Home,
    south: Home,
    federation: Arc<Federation>,
}

impl Pair {
    fn new(spec_toml: &str) -> Self {
        Self {
            north: Home::new("north"),
            south: Home::new("south"),
            federation: federation(spec_toml, &["north", "south"]),
        }
    }

    fn faulty(&self) -> Faulty {
        Faulty::new(self.federation.coordinator(self.north.silo.clone()))
    }

    /// North's session on a server that misbehaves.
    fn north_on(&self, server: &Faulty) -> Session<Faulty> {
        self.north
            .session(server.clone(), &self.federation.receipt_key())
    }

    async fn notice(&self, home: &Home) -> Notice {
        let coordinator = self.federation.coordinator(home.silo.clone());
        coordinator.poll().await.unwrap().remove(0)
    }
}

fn accepted(outcome: RoundOutcome) -> SignedReceipt {
    match outcome {
        RoundOutcome::Answered(receipt)
            if receipt.receipt.outcome == ContributionOutcome::Accepted =>
        {
            *receipt
        }
        other => panic!("{other:?}"),
    }
}

fn declined(outcome: Result<RoundOutcome, SessionError>) -> Refusal {
    match outcome {
        Err(SessionError::Declined(refusal)) => refusal,
        other => panic!("{other:?}"),
    }
}

/// The adapters that a whole undisturbed job gives.
async fn undisturbed(spec_toml: &str) -> Vec<AdapterVersion> {
    let pair = Pair::new(spec_toml);
    let sessions = [
        pair.north.join(&pair.federation),
        pair.south.join(&pair.federation),
    ];
    work_to_the_end(&pair, &sessions).await;
    pair.federation.versions()
}

async fn work_to_the_end(pair: &Pair, sessions: &[Session<MemoryCoordinator>; 2]) {
    while !pair.federation.outcome().0.is_over() {
        for session in sessions {
            let notice = session.coordinator.poll().await.unwrap().remove(0);
            if notice.wants_work() {
                accepted(
                    session
                        .round(&notice.job, notice.round.unwrap())
                        .await
                        .unwrap(),
                );
            }
        }
    }
}

#[tokio::test]
async fn a_round_ends_with_a_receipt_a_vault_and_a_new_adapter() {
    let pair = Pair::new(&spec("fedmcp", 1, ""));
    let north = pair.north.join(&pair.federation);
    let receipt = accepted(north.round(&job(), ONE).await.unwrap());
    assert_eq!(receipt.receipt.silo, pair.north.silo);
    let (header, body) = pair
        .north
        .vault()
        .read(&job(), Record::State)
        .unwrap()
        .unwrap();
    assert_eq!((header.round, header.task.as_str()), (ONE, "toy"));
    assert!(body.len() > 1_000);
    assert_eq!(pair.federation.versions().len(), 1);

    accepted(
        pair.south
            .join(&pair.federation)
            .round(&job(), ONE)
            .await
            .unwrap(),
    );
    assert_eq!(pair.federation.versions().len(), 2);
    assert_eq!(pair.federation.outcome().0, JobState::Succeeded);
    let training = reported(&pair.federation, "north", 1, "training").unwrap();
    assert!(
        training["loss"].is_finite() && training["cka_pull"].is_finite(),
        "{training:?}"
    );
    assert!(training["examples"].total_cmp(&40.0).is_eq());
    assert!(reported(&pair.federation, "north", 1, "after_training").unwrap()["accuracy"] > 0.0);
}

#[tokio::test]
async fn what_left_is_exactly_what_the_log_says() {
    let pair = Pair::new(&spec("fedmcp", 1, ""));
    let receipt = accepted(
        pair.north
            .join(&pair.federation)
            .round(&job(), ONE)
            .await
            .unwrap(),
    );
    let log = pair.north.egress_log();
    let kinds: Vec<&str> = log
        .iter()
        .map(|line| line["kind"].as_str().unwrap())
        .collect();
    assert_eq!(kinds, ["metrics", "metrics", "contribution"]);
    assert_eq!(log[2]["digest"], receipt.receipt.payload_digest.to_string());
    assert_eq!(log[2]["tensors"], 8);
    assert_eq!(log[2]["bytes"], pair.federation.payload_bytes());
}

#[tokio::test]
async fn a_job_is_finished_with_tests_reports_and_a_usable_model() {
    let pair = Pair::new(&spec("fedmcp", 2, ""));
    let sessions = [
        pair.north.join(&pair.federation),
        pair.south.join(&pair.federation),
    ];
    work_to_the_end(&pair, &sessions).await;
    let notice = pair.notice(&pair.north).await;
    assert!(sessions[0].wants_finish(&notice).unwrap());
    let finished = sessions[0].finish(&notice).await.unwrap().unwrap();
    assert!(!sessions[0].wants_finish(&notice).unwrap());

    // The evaluation of what a round published is reported at the start of the next, and for the last at the end.
    for round in [1, 2] {
        assert!(
            reported(&pair.federation, "north", round, "after_aggregation").is_some(),
            "{round}"
        );
    }
    let last = reported(&pair.federation, "north", 2, "last_test").unwrap();
    let best = reported(&pair.federation, "north", 2, "final_test").unwrap();
    let same = |told: f64, kept: f64| assert!(told.total_cmp(&kept).is_eq(), "{told} {kept}");
    same(
        last["accuracy"],
        finished.last_test.unwrap().metrics["accuracy"],
    );
    same(best["accuracy"], finished.best.test.metrics["accuracy"]);
    same(best["best_round"], f64::from(finished.best.round));

    let vault = pair.north.vault();
    assert!(vault.read(&job(), Record::State).unwrap().is_none());
    let (header, body) = vault.read(&job(), Record::Model).unwrap().unwrap();
    assert_eq!(header.metrics["test"], finished.best.test.metrics);
    let model = concord_learning::model::PersonalModel::from_bytes(&body).unwrap();
    assert_eq!(model.facts.silo, "north");
}

#[tokio::test]
async fn a_silo_that_trained_nothing_has_nothing_to_finish() {
    let pair = Pair::new(&spec("fedavg", 1, "min_silos = 1\nmax_silos = 1"));
    accepted(
        pair.south
            .join(&pair.federation)
            .round(&job(), ONE)
            .await
            .unwrap(),
    );
    let notice = pair.notice(&pair.north).await;
    let north = pair.north.join(&pair.federation);
    assert!(!north.wants_finish(&notice).unwrap());
    assert!(north.finish(&notice).await.unwrap().is_none());
}

#[tokio::test]
async fn a_job_that_the_silo_cannot_do_is_declined_with_a_code() {
    let digest = format!("digest = \"{}\"", Digest::of(b"other weights"));
    for (from, to, code) in [
        (
            "name = \"tiny\"",
            "name = \"huge\"",
            ErrorCode::UnknownBackbone,
        ),
        ("task = \"toy\"", "task = \"other\"", ErrorCode::UnknownTask),
        ("hidden = 24", "hidden = 48", ErrorCode::BackboneMismatch),
        ("layers = 2", digest.as_str(), ErrorCode::BackboneMismatch),
        (
            "name = \"fedmcp\"",
            "name = \"local\"",
            ErrorCode::PolicyRefused,
        ),
        (
            "max_length = 24",
            "max_length = 4000",
            ErrorCode::SiloFailed,
        ),
    ] {
        let to = if to == digest {
            format!("layers = 2\n{digest}")
        } else {
            to.to_owned()
        };
        let pair = Pair::new(&spec("fedmcp", 1, "").replace(from, &to));
        let refusal = declined(pair.north.join(&pair.federation).round(&job(), ONE).await);
        assert_eq!(refusal.code, code, "{refusal}");
        assert!(!refusal.message.contains('/'), "no paths: {refusal}");
        assert!(pair.notice(&pair.north).await.answered || pair.federation.outcome().0.is_over());
        let log = pair.north.egress_log();
        assert_eq!(log.last().unwrap()["code"], code.as_str());
    }
}

#[tokio::test]
async fn data_that_cannot_be_used_is_declined_without_a_word_about_it() {
    let pair = Pair::new(&spec("fedmcp", 1, ""));
    let file = pair.north.folder.path().join("data/validation.csv");
    fs::write(file, "text,label\nsome rain,canary-label\n").unwrap();
    let refusal = declined(pair.north.join(&pair.federation).round(&job(), ONE).await);
    assert_eq!(refusal.code, ErrorCode::BadData);
    assert!(!refusal.message.contains("canary"), "{refusal}");
}

#[tokio::test]
async fn a_torn_vault_is_declined_and_left_as_it_is() {
    let pair = Pair::new(&spec("fedmcp", 2, ""));
    accepted(
        pair.north
            .join(&pair.federation)
            .round(&job(), ONE)
            .await
            .unwrap(),
    );
    accepted(
        pair.south
            .join(&pair.federation)
            .round(&job(), ONE)
            .await
            .unwrap(),
    );
    let file = pair.north.vault().file(&job(), Record::State);
    let torn = fs::read(&file).unwrap()[..100].to_vec();
    fs::write(&file, &torn).unwrap();
    let refusal = declined(
        pair.north
            .join(&pair.federation)
            .round(&job(), RoundNumber(2))
            .await,
    );
    assert_eq!(refusal.code, ErrorCode::SiloFailed);
    assert_eq!(fs::read(&file).unwrap(), torn);
}

#[tokio::test]
async fn a_daemon_stopped_before_the_upload_sends_the_same_bytes_after_its_restart() {
    let spec_toml = spec("fedmcp", 2, "");
    let pair = Pair::new(&spec_toml);
    let server = pair.faulty();
    server.plan(Call::Upload, Fault::Stop(pair.north.stop.clone()));
    let outcome = pair.north_on(&server).round(&job(), ONE).await;
    assert!(matches!(outcome, Err(SessionError::Stopped)), "{outcome:?}");
    assert_eq!(
        pair.north.egress_log().last().unwrap()["kind"],
        "contribution"
    );
    let saved = fs::read(pair.north.vault().file(&job(), Record::State)).unwrap();

    // The next life has the same folder and nothing else.
    let north = Home {
        stop: CancellationToken::new(),
        ..pair.north
    };
    let pair = Pair { north, ..pair };
    let reports = pair.federation.reports().len();
    accepted(
        pair.north
            .join(&pair.federation)
            .round(&job(), ONE)
            .await
            .unwrap(),
    );
    assert_eq!(
        pair.federation.reports().len(),
        reports,
        "nothing is trained again"
    );
    assert_eq!(
        fs::read(pair.north.vault().file(&job(), Record::State)).unwrap(),
        saved
    );
    accepted(
        pair.south
            .join(&pair.federation)
            .round(&job(), ONE)
            .await
            .unwrap(),
    );
    assert_eq!(
        pair.federation.versions(),
        undisturbed(&spec_toml).await[..2]
    );
}

#[tokio::test]
async fn a_daemon_stopped_before_the_vault_is_saved_trains_again_to_the_same_bytes() {
    let spec_toml = spec("fedmcp", 2, "");
    let expected = undisturbed(&spec_toml).await;
    let pair = Pair::new(&spec_toml);
    let server = pair.faulty();
    server.plan(Call::Report, Fault::Stop(pair.north.stop.clone()));
    let outcome = pair.north_on(&server).round(&job(), ONE).await;
    assert!(matches!(outcome, Err(SessionError::Stopped)), "{outcome:?}");
    assert!(
        pair.north
            .vault()
            .read(&job(), Record::State)
            .unwrap()
            .is_none()
    );

    let north = Home {
        stop: CancellationToken::new(),
        ..pair.north
    };
    let pair = Pair { north, ..pair };
    let sessions = [
        pair.north.join(&pair.federation),
        pair.south.join(&pair.federation),
    ];
    work_to_the_end(&pair, &sessions).await;
    assert_eq!(pair.federation.versions(), expected);
}

#[tokio::test]
async fn a_new_life_for_every_round_gives_the_same_adapters() {
    let spec_toml = spec("fedmcp", 3, "");
    let pair = Pair::new(&spec_toml);
    for round in 1..=3 {
        for home in [&pair.north, &pair.south] {
            accepted(
                home.join(&pair.federation)
                    .round(&job(), RoundNumber(round))
                    .await
                    .unwrap(),
            );
        }
    }
    assert_eq!(pair.federation.versions(), undisturbed(&spec_toml).await);
}

#[tokio::test]
async fn the_best_model_is_the_same_after_a_new_life_for_every_round() {
    let spec_toml = spec("fedmcp", 3, "");
    let mut finished = Vec::new();
    for restarts in [false, true] {
        let pair = Pair::new(&spec_toml);
        let mut sessions = [
            pair.north.join(&pair.federation),
            pair.south.join(&pair.federation),
        ];
        for round in 1..=3 {
            if restarts {
                sessions = [
                    pair.north.join(&pair.federation),
                    pair.south.join(&pair.federation),
                ];
            }
            for session in &sessions {
                accepted(session.round(&job(), RoundNumber(round)).await.unwrap());
            }
        }
        let notice = pair.notice(&pair.north).await;
        finished.push(sessions[0].finish(&notice).await.unwrap().unwrap());
    }
    assert_eq!(finished[0], finished[1]);
}

#[tokio::test]
async fn a_stop_during_training_ends_it_between_two_steps() {
    let pair = Pair::new(
        &spec("fedmcp", 1, "").replace("batch_size = 8", "batch_size = 8\nepochs = 1000"),
    );
    let north = pair.north.join(&pair.federation);
    let board = Arc::clone(&north.board);
    let (stop, id) = (pair.north.stop.clone(), job());
    let (outcome, ()) = tokio::join!(north.round(&id, ONE), async {
        crate::testing::eventually("the first steps", || {
            board.status().work.is_some_and(|work| work.step > 2)
        })
        .await;
        stop.cancel();
    });
    assert!(matches!(outcome, Err(SessionError::Stopped)), "{outcome:?}");
    assert!(board.status().work.is_none());
}

#[tokio::test]
async fn a_round_that_ends_elsewhere_is_missed() {
    let pair = Pair::new(&spec("fedmcp", 1, "min_silos = 1\nmax_silos = 1"));
    accepted(
        pair.south
            .join(&pair.federation)
            .round(&job(), ONE)
            .await
            .unwrap(),
    );
    match pair
        .north
        .join(&pair.federation)
        .round(&job(), ONE)
        .await
        .unwrap()
    {
        RoundOutcome::Missed(refusal) => assert_eq!(refusal.code, ErrorCode::JobEnded),
        RoundOutcome::Answered(receipt) => panic!("{receipt:?}"),
    }
}

#[tokio::test]
async fn a_contribution_that_comes_late_gets_its_receipt_and_the_state_is_kept() {
    let pair = Pair::new(&spec("fedmcp", 2, "min_silos = 1\nmax_silos = 1"));
    let server = pair.faulty();
    // The answer to the claim comes, the round closes meanwhile, and the upload is refused as of the wrong round.
    let north = pair.north_on(&server);
    let late = async {
        let claim = server.claim(&job(), ONE).await.unwrap();
        accepted(
            pair.south
                .join(&pair.federation)
                .round(&job(), ONE)
                .await
                .unwrap(),
        );
        claim
    };
    let claim = late.await;
    let lease = Lease::new(&claim, pair.north.stop.child_token());
    let outcome = north.work(&job(), ONE, &claim, &lease).await;
    match outcome {
        Err(SessionError::Call(CallError::Refused(refusal))) => {
            assert_eq!(refusal.code, ErrorCode::WrongRound);
        }
        other => panic!("{other:?}"),
    }
    let header = pair
        .north
        .vault()
        .read(&job(), Record::State)
        .unwrap()
        .unwrap()
        .0;
    assert_eq!(header.round, ONE);
}

#[tokio::test]
async fn a_lease_lost_for_good_ends_the_training() {
    let pair = Pair::new(
        &spec("fedmcp", 1, "").replace("batch_size = 8", "batch_size = 8\nepochs = 1000"),
    );
    let server = pair.faulty();
    let north = pair.north_on(&server);
    let mut claim = server.claim(&job(), ONE).await.unwrap();
    claim.duration = Duration::from_millis(40);
    let lease = Lease::new(&claim, pair.north.stop.child_token());
    server.plan(Call::Claim, Fault::Unreachable);
    server.plan(Call::Claim, Fault::Refused(ErrorCode::WrongRound));
    let id = job();
    let work = async {
        let outcome = north.work(&id, ONE, &claim, &lease).await;
        lease.done.cancel();
        outcome
    };
    let (outcome, ()) = tokio::join!(work, north.renew(&id, ONE, &lease));
    assert!(matches!(outcome, Err(SessionError::Stopped)), "{outcome:?}");
    assert_eq!(lease.refusal().unwrap().code, ErrorCode::WrongRound);
    assert_eq!(server.left(), 0);
}

#[tokio::test]
async fn metrics_that_the_server_does_not_want_do_not_stop_the_work() {
    let pair = Pair::new(&spec("fedmcp", 1, ""));
    let server = pair.faulty();
    server.plan(Call::Report, Fault::Refused(ErrorCode::InvalidRequest));
    server.plan(Call::Report, Fault::Unreachable);
    accepted(pair.north_on(&server).round(&job(), ONE).await.unwrap());
    assert!(reported(&pair.federation, "north", 1, "training").is_none());
    assert!(reported(&pair.federation, "north", 1, "after_training").is_some());
}

#[tokio::test]
async fn a_silo_that_reports_nothing_sends_its_update_alone() {
    let mut pair = Pair::new(&spec("fedmcp", 1, ""));
    pair.north.profile.reports_metrics = false;
    accepted(
        pair.north
            .join(&pair.federation)
            .round(&job(), ONE)
            .await
            .unwrap(),
    );
    assert!(pair.federation.reports().is_empty());
    assert_eq!(pair.north.egress_log().len(), 1);
}

#[tokio::test]
async fn an_update_beyond_the_silos_own_bound_is_held_back_and_the_job_declined() {
    let pair = Pair::new(&spec("fedmcp", 1, "[limits]\nmax_update_norm = 1e-9"));
    let refusal = declined(pair.north.join(&pair.federation).round(&job(), ONE).await);
    assert_eq!(refusal.code, ErrorCode::SiloFailed);
    assert!(refusal.message.contains("NORM_TOO_LARGE"), "{refusal}");
    let log = pair.north.egress_log();
    assert!(
        log.iter().all(|line| line["kind"] != "contribution"),
        "{log:?}"
    );
}

#[tokio::test]
async fn everything_in_the_state_folder_is_for_its_owner_only() {
    let pair = Pair::new(&spec("fedmcp", 1, ""));
    accepted(
        pair.north
            .join(&pair.federation)
            .round(&job(), ONE)
            .await
            .unwrap(),
    );
    let mut folders: Vec<PathBuf> = ["vault", "outbox", "downloads"]
        .iter()
        .map(|name| pair.north.folder.path().join(name))
        .collect();
    let mut files = vec![
        pair.north.folder.path().join("egress.jsonl"),
        pair.north.folder.path().join("status.json"),
    ];
    while let Some(folder) = folders.pop() {
        let mode = fs::metadata(&folder).unwrap().permissions().mode();
        assert_eq!(mode & 0o777, 0o700, "{}", folder.display());
        for entry in fs::read_dir(folder).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                folders.push(path);
            } else {
                files.push(path);
            }
        }
    }
    assert!(files.len() > 3, "{files:?}");
    for file in files {
        let mode = fs::metadata(&file).unwrap().permissions().mode();
        assert_eq!(mode & 0o777, 0o600, "{}", file.display());
    }
}

#[test]
fn a_round_wants_work_while_it_is_open_and_unanswered() {
    let notice = Notice {
        job: job(),
        state: JobState::Running,
        round: Some(ONE),
        phase: Some(RoundPhase::Announced),
        base: None,
        closes_at: None,
        answered: false,
    };
    assert!(notice.wants_work());
    for other in [
        Notice {
            answered: true,
            ..notice.clone()
        },
        Notice {
            phase: Some(RoundPhase::Aggregating),
            ..notice.clone()
        },
        Notice {
            state: JobState::Succeeded,
            ..notice.clone()
        },
        Notice {
            phase: None,
            ..notice
        },
    ] {
        assert!(!other.wants_work(), "{other:?}");
    }
}
