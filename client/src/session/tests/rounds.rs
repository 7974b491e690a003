//! Whole rounds and what they send.

use super::*;

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
async fn a_log_that_breaks_ends_the_training_when_the_lease_is_to_be_renewed() {
    let pair = Pair::new(
        &spec("fedmcp", 1, "").replace("batch_size = 8", "batch_size = 8\nepochs = 1000"),
    );
    let gate = pair.north.gate();
    let mut north = pair.north.session(
        Outlet::new(pair.faulty(), Arc::clone(&gate)),
        &pair.federation.receipt_key(),
    );
    north.gate = Arc::clone(&gate);
    let id = job();
    let mut claim = north.coordinator.claim(&id, ONE).await.unwrap();
    claim.duration = Duration::from_millis(40);
    let lease = Lease::new(&claim, pair.north.stop.child_token());
    gate.break_log();
    let (outcome, ()) = tokio::join!(
        north.work(&id, ONE, &claim, &lease),
        north.renew(&id, ONE, &lease)
    );
    assert!(matches!(outcome, Err(SessionError::Stopped)), "{outcome:?}");
    assert_eq!(lease.refusal(), None);
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
        pair.north.folder.path().join("receipts.jsonl"),
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
        rejected: false,
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

#[tokio::test]
async fn the_servers_signature_is_kept_and_verifies_with_its_public_key() {
    let pair = Pair::new(&spec("fedmcp", 1, ""));
    let north = pair.north.join(&pair.federation);
    let signed = accepted(north.round(&job(), ONE).await.unwrap());
    let kept = pair.north.receipts();
    assert_eq!(kept.len(), 1);
    kept[0].verify().unwrap();
    assert_eq!(kept[0].receipt(), signed.receipt);
    let key = pair.federation.receipt_key();
    assert_eq!(kept[0].key_id, crate::receipts::key_id(&key));
    let shown = north.board.status().last_receipt.unwrap();
    assert_eq!((shown.job, shown.round), (job(), ONE));
}

#[tokio::test]
async fn work_that_was_recorded_before_the_round_went_on_is_not_missed() {
    let pair = Pair::new(&spec("fedmcp", 1, ""));
    let server = pair.faulty();
    server.plan(Call::Upload, Fault::Silence);
    let north = pair.north_on(&server);
    let claim = server.claim(&job(), ONE).await.unwrap();
    let lease = Lease::new(&claim, pair.north.stop.child_token());
    let id = job();
    let recorded = || pair.federation.notice_messages(&pair.north.silo)[0].outcome != 0;
    let (outcome, ()) = tokio::join!(north.work(&id, ONE, &claim, &lease), async {
        crate::testing::eventually("the record", recorded).await;
        lease.lost(Refusal::new(ErrorCode::WrongRound, "planned"));
    });
    accepted(outcome.unwrap());
    assert_eq!(pair.north.receipts().len(), 1);
}

#[tokio::test]
async fn only_the_job_at_hand_keeps_its_trainer() {
    let pair = Pair::new(&spec("fedavg", 2, ""));
    let north = pair.north.join(&pair.federation);
    accepted(north.round(&job(), ONE).await.unwrap());
    let other: JobId = "job-2".parse().unwrap();
    let silos = [pair.north.silo.clone(), pair.south.silo.clone()].into();
    let clock = crate::testing::clock();
    let federation = Federation::new(other.clone(), &spec("fedavg", 2, ""), silos, clock).unwrap();
    let next = Session {
        bench: north.bench.clone(),
        ..pair.north.join(&federation)
    };
    accepted(next.round(&other, ONE).await.unwrap());
    let trainer = |id: &JobId| north.key(id);
    let bench = &north.bench;
    assert_eq!(bench.last_round(&trainer(&job())).await.unwrap(), None);
    assert_eq!(bench.last_round(&trainer(&other)).await.unwrap(), Some(1));
}
