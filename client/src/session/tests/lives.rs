//! Stops, kills and new lives of the daemon.

use super::*;

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
async fn a_daemon_that_asks_for_a_receipt_again_gets_the_same_and_keeps_it_once() {
    let pair = Pair::new(&spec("fedmcp", 1, ""));
    let north = pair.north.join(&pair.federation);
    let receipt = accepted(north.round(&job(), ONE).await.unwrap());
    let again = pair.north.join(&pair.federation);
    let fetched = again.receipt(&job(), ONE).await.unwrap();
    assert_eq!(fetched, Some(receipt));
    assert_eq!(pair.north.receipts().len(), 1);
}

#[tokio::test]
async fn an_accepted_update_stays_until_the_next_takes_its_place_or_the_job_ends() {
    let pair = Pair::new(&spec("fedmcp", 2, ""));
    let sessions = [
        pair.north.join(&pair.federation),
        pair.south.join(&pair.federation),
    ];
    let file = pair.north.folder.path().join("outbox/job-1.update");
    for round in 1..=2 {
        for session in &sessions {
            accepted(session.round(&job(), RoundNumber(round)).await.unwrap());
        }
        let kept = fs::read(&file).unwrap();
        let header = kept.split(|byte| *byte == b'\n').next().unwrap();
        let header: serde_json::Value = serde_json::from_slice(header).unwrap();
        assert_eq!(header["round"], round);
    }
    let notice = pair.notice(&pair.north).await;
    sessions[0].finish(&notice).await.unwrap().unwrap();
    assert!(!file.exists());
}

#[tokio::test]
async fn a_round_whose_update_is_gone_is_not_trained_on_top_of_itself() {
    let pair = Pair::new(&spec("fedmcp", 2, ""));
    let north = pair.north.join(&pair.federation);
    accepted(north.round(&job(), ONE).await.unwrap());
    fs::remove_file(pair.north.folder.path().join("outbox/job-1.update")).unwrap();
    pair.federation.lose_power();
    let state = pair.north.vault().file(&job(), Record::State);
    let before = fs::read(&state).unwrap();
    match north.round(&job(), ONE).await.unwrap() {
        RoundOutcome::Missed(refusal) => assert_eq!(refusal.code, ErrorCode::SiloFailed),
        RoundOutcome::Answered(receipt) => panic!("{receipt:?}"),
    }
    assert_eq!(fs::read(&state).unwrap(), before);
}
