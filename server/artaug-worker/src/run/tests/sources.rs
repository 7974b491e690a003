//! What a job is made from, what it costs, and what its pages show between iterations.

use super::{held_up::begun, *};

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
    let (release, reason) = server.released();
    assert_eq!(release, JobRelease::Stopped, "{reason}");
    assert!(reason.contains("the prompts;"), "{reason}");
    server.state().grants = usize::MAX;
    worker(&server, folder.path()).run();
    succeeded(&server);
    assert!(server.state().lines.len() > lines);
    assert_eq!(
        server.lasting_results(),
        undisturbed(SPEC).lasting_results()
    );
}

#[test]
fn what_was_paid_before_the_advisor_went_away_stands_in_the_ledger() {
    let ledger_of = |paid: usize| {
        let server = Arc::new(FakeServer::new(SPEC));
        let folder = tempfile::tempdir().unwrap();
        let mut worker = worker(&server, folder.path());
        let workshop = FakeWorkshop::default();
        workshop.outage.paid.store(paid, Ordering::SeqCst);
        worker.workshop = Box::new(workshop);
        worker.run();
        succeeded(&server);
        let text = server.results()["ledger.json"].clone();
        serde_json::from_slice::<serde_json::Value>(&text).unwrap()
    };
    let (smooth, rough) = (ledger_of(0), ledger_of(3));
    let number = |ledger: &serde_json::Value, path: &str| {
        ledger
            .pointer(path)
            .and_then(serde_json::Value::as_u64)
            .unwrap()
    };
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
        let mut entry: serde_json::Value = serde_json::from_slice(last).unwrap();
        assert!(entry["memory"].as_u64().unwrap() > 0);
        entry["memory"] = (1_u64 << 50).into();
        *last = entry.to_string().into_bytes();
    }
    let folder = tempfile::tempdir().unwrap();
    worker(&server, folder.path()).run();
    succeeded(&server);
    let ledger = String::from_utf8(server.results()["ledger.json"].clone()).unwrap();
    assert!(
        ledger.contains(&format!("\"peak_memory\":{}", 1_u64 << 50)),
        "{ledger}"
    );
}
