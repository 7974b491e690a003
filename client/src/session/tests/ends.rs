//! Ends of jobs.

use super::*;

#[tokio::test]
async fn a_job_is_finished_with_tests_reports_and_a_usable_model() {
    let pair = Pair::new(&spec("fedmcp", 2, ""));
    let sessions = [
        pair.north.join(&pair.federation),
        pair.south.join(&pair.federation),
    ];
    work_to_the_end(&pair, &sessions).await;
    let notice = pair.notice(&pair.north).await;
    assert!(sessions[0].wants_finish(&notice));
    let finished = sessions[0].finish(&notice).await.unwrap().unwrap();
    assert!(!sessions[0].wants_finish(&notice));

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
    assert!(!north.wants_finish(&notice));
    assert!(north.finish(&notice).await.unwrap().is_none());
}

/// Nothing of the job is left but what `model` says.
async fn nothing_stays(home: &Home, session: &Session<MemoryCoordinator>, model: bool) {
    let vault = home.vault();
    assert!(vault.read(&job(), Record::State).unwrap().is_none());
    let found = vault.read(&job(), Record::Model).unwrap();
    assert_eq!(found.is_some(), model);
    let outbox = fs::read_dir(home.folder.path().join("outbox")).unwrap();
    assert_eq!(outbox.count(), 0);
    let key = session.key(&job());
    assert_eq!(session.bench.last_round(&key).await.unwrap(), None);
}

#[tokio::test]
async fn a_job_that_fails_in_its_first_round_leaves_nothing_behind() {
    let pair = Pair::new(&spec("fedmcp", 2, "min_silos = 2"));
    let north = pair.north.join(&pair.federation);
    accepted(north.round(&job(), ONE).await.unwrap());
    pair.federation
        .decline(&pair.south.silo, &job(), ErrorCode::PolicyRefused)
        .unwrap();
    assert_eq!(pair.federation.outcome().0, JobState::Failed);
    let notice = pair.notice(&pair.north).await;
    assert!(north.wants_finish(&notice));
    assert!(north.finish(&notice).await.unwrap().is_none());
    assert!(!north.wants_finish(&notice));
    nothing_stays(&pair.north, &north, false).await;
}

#[tokio::test]
async fn a_daemon_killed_after_the_model_was_saved_settles_the_job_without_doing_it_again() {
    let pair = Pair::new(&spec("fedmcp", 1, ""));
    let sessions = [
        pair.north.join(&pair.federation),
        pair.south.join(&pair.federation),
    ];
    work_to_the_end(&pair, &sessions).await;
    let notice = pair.notice(&pair.north).await;
    let (state, model) = (
        pair.north.vault().file(&job(), Record::State),
        pair.north.vault().file(&job(), Record::Model),
    );
    let before = fs::read(&state).unwrap();
    sessions[0].finish(&notice).await.unwrap().unwrap();
    let saved = fs::read(&model).unwrap();
    fs::write(&state, before).unwrap();

    let reports = pair.north.egress_log().len();
    let again = pair.north.join(&pair.federation);
    assert!(again.wants_finish(&notice));
    assert!(again.finish(&notice).await.unwrap().is_none());
    assert!(!again.wants_finish(&notice));
    assert_eq!(fs::read(&model).unwrap(), saved);
    assert_eq!(pair.north.egress_log().len(), reports);
    nothing_stays(&pair.north, &again, true).await;
}

#[tokio::test]
async fn a_job_whose_last_adapter_is_gone_still_gives_the_best_model_so_far() {
    let pair = Pair::new(&spec("fedmcp", 2, ""));
    let sessions = [
        pair.north.join(&pair.federation),
        pair.south.join(&pair.federation),
    ];
    work_to_the_end(&pair, &sessions).await;
    let server = pair.faulty();
    server.plan(Call::Download, Fault::Refused(ErrorCode::UnknownVersion));
    let notice = pair.notice(&pair.north).await;
    let finished = pair.north_on(&server).finish(&notice).await.unwrap();
    let finished = finished.unwrap();
    assert_eq!((finished.best.round, finished.last_test), (1, None));
}
