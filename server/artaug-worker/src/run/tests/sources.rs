//! What a job is made from, what it costs, and what its pages show between iterations.

use super::{
    held_up::{begun, was_held_up},
    *,
};

#[test]
fn a_job_does_not_go_on_with_other_prompts_than_it_began_with() {
    let server = begun(30);
    let folder = tempfile::tempdir().unwrap();
    let mut other = worker(&server, folder.path());
    other.workshop = Box::new(FakeWorkshop {
        // The file that the job names has been edited.
        more_prompts: vec!["purple cow".to_owned()],
        ..FakeWorkshop::default()
    });
    other.run();
    let lines = server.state().lines.len();
    was_held_up(&server, "the prompts;");
    assert!(server.state().lines.len() > lines);
}

#[test]
fn what_was_paid_before_the_advisor_went_away_stands_in_the_ledger() {
    let ledger_of = |paid: usize| {
        let workshop = FakeWorkshop::default();
        workshop.outage.paid.store(paid, Ordering::SeqCst);
        let server = run_by(SPEC, |worker| worker.workshop = Box::new(workshop));
        succeeded(&server);
        serde_json::from_str::<Value>(&text_of(&server, "ledger.json")).unwrap()
    };
    let (smooth, rough) = (ledger_of(0), ledger_of(3));
    let number = |ledger: &Value, path: &str| ledger.pointer(path).and_then(Value::as_u64).unwrap();
    for (path, more) in [
        ("/rejected_replies", 3),
        ("/advice/calls", 6),
        ("/advice/prompt_tokens", 300),
    ] {
        assert_eq!(number(&rough, path), number(&smooth, path) + more, "{path}");
    }
}

#[test]
fn the_ledger_tells_the_most_memory_that_any_worker_held() {
    let server = begun(40);
    {
        // The worker before held far more than this process ever does.
        let mut state = server.state();
        let last = state.lines.last_mut().unwrap();
        let mut entry: Value = serde_json::from_slice(last).unwrap();
        assert!(entry["memory"].as_u64().unwrap() > 0);
        entry["memory"] = (1_u64 << 50).into();
        *last = entry.to_string().into_bytes();
    }
    let folder = tempfile::tempdir().unwrap();
    worker(&server, folder.path()).run();
    succeeded(&server);
    let ledger = text_of(&server, "ledger.json");
    assert!(
        ledger.contains(&format!("\"peak_memory\":{}", 1_u64 << 50)),
        "{ledger}"
    );
}

#[test]
fn a_kill_costs_no_more_paid_scores_than_those_of_the_images_in_hand() {
    let server = Arc::new(FakeServer::new(SPEC));
    let folder = tempfile::tempdir().unwrap();
    let outage = FakeWorkshop::default().outage;
    let evaluated = || events(&server, "evaluated").len();
    while server.state().releases.is_empty() {
        {
            let mut state = server.state();
            state.loss = Loss::After(3);
            state.grants = 1;
        }
        let before = (outage.judged.load(Ordering::SeqCst), evaluated());
        let mut worker = worker(&server, folder.path());
        worker.workshop = Box::new(FakeWorkshop {
            outage: Arc::clone(&outage),
            ..FakeWorkshop::default()
        });
        let helpers = worker.habits.helpers;
        worker.run();
        let asked = outage.judged.load(Ordering::SeqCst) - before.0;
        let kept = evaluated() - before.1;
        // Each helper has one image in hand.
        assert!(asked <= kept + helpers, "{asked} asked, {kept} kept");
    }
    succeeded(&server);
    assert!(evaluated() > 0);
    assert_eq!(
        server.lasting_results(),
        undisturbed(SPEC).lasting_results()
    );
}

#[test]
fn a_fused_model_without_room_is_left_out_and_the_job_succeeds() {
    let server = run_by(&limited("disk = \"3 MiB\""), |worker| {
        worker.workshop = faulty("heavy");
    });
    succeeded(&server);
    let results = server.results();
    assert!(results.keys().all(|name| !name.starts_with("fused/")));
    assert!(results.keys().any(|name| name.starts_with("lora/merged/")));
    let card = text_of(&server, "MODEL_CARD.md");
    assert!(card.contains("The fused model was left out"), "{card}");
    assert!(card.contains("limits.disk"), "{card}");
    // Where there is room, the card names its files.
    let card = text_of(&undisturbed(SPEC), "MODEL_CARD.md");
    assert!(card.contains("fused/unet/weights"), "{card}");
}
