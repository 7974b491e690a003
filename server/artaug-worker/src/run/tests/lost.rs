//! Objects that are lost or damaged.

use super::{
    held_up::{begun, stopped_when},
    *,
};

#[test]
fn lost_objects_are_made_again_and_the_job_ends_in_the_same_bytes() {
    let whole = undisturbed(SPEC);
    let lines = whole.state().lines.len();
    for part in [1, 3, 5, 7] {
        let server = begun(lines * part / 8);
        server.state().objects.clear();
        server.state().grants = usize::MAX;
        let folder = tempfile::tempdir().unwrap();
        worker(&server, folder.path()).run();
        succeeded(&server);
        assert_eq!(server.state().releases.len(), 1, "{part}");
        assert_eq!(server.lasting_results(), whole.lasting_results());
        // Also what the end did not need: every image is in the gallery again.
        let state = server.state();
        for line in state.lines.iter().map(|line| String::from_utf8_lossy(line)) {
            if line.contains("\"checkpointed\"") {
                continue;
            }
            let entry: serde_json::Value = serde_json::from_str(&line).unwrap();
            let result = &entry["event"]["result"];
            for key in ["image", "lora", "losses", "merged", "reduced", "control"] {
                let Some(object) = result[key].as_str() else {
                    continue;
                };
                assert!(
                    state.objects.contains_key(&object.parse().unwrap()),
                    "{line}"
                );
            }
        }
    }
}

#[test]
fn what_only_the_server_has_lost_is_brought_to_it_again() {
    let server = begun(30);
    let folder = tempfile::tempdir().unwrap();
    server.state().loss = Loss::After(20);
    worker(&server, folder.path()).run();
    let lost = {
        let mut state = server.state();
        state.loss = Loss::Never;
        state.grants = usize::MAX;
        std::mem::take(&mut state.objects)
    };
    let mut away = worker(&server, folder.path());
    // An engine that draws nothing more: the objects here are enough to see that.
    away.workshop = faulty("draw");
    away.run();
    let own = std::fs::read_dir(folder.path().join("jobs"));
    assert!(own.unwrap().next().is_none(), "the job has failed");
    let state = server.state();
    assert!(!state.objects.is_empty());
    assert!(
        state
            .objects
            .iter()
            .all(|(digest, bytes)| lost.get(digest) == Some(bytes))
    );
}

#[test]
fn objects_that_are_damaged_on_the_server_are_made_again() {
    let server = begun(40);
    server.state().grants = usize::MAX;
    for bytes in server.state().objects.values_mut() {
        bytes[0] ^= 1;
    }
    let folder = tempfile::tempdir().unwrap();
    worker(&server, folder.path()).run();
    // Each is noticed when it is needed; the job is given back and goes on with it.
    let first = server.state().releases[0].clone();
    assert_eq!(first.release(), JobRelease::Stopped);
    assert!(first.reason.contains("damaged"), "{}", first.reason);
    succeeded(&server);
    assert_eq!(
        server.lasting_results(),
        undisturbed(SPEC).lasting_results()
    );
}

#[test]
fn a_lost_checkpoint_costs_its_steps_and_nothing_else() {
    let folder = tempfile::tempdir().unwrap();
    let server = stopped_when(SPEC, folder.path(), |server| {
        !events(server, "checkpointed").is_empty()
    });
    let state = digest(&events(&server, "checkpointed")[0]["result"]["state"]);
    server.state().objects.remove(&state).unwrap();
    ends_as_undisturbed(&server);
}

/// As one of an earlier version cannot.
#[test]
fn a_checkpoint_that_cannot_be_used_costs_its_steps_and_nothing_else() {
    // The third is of the second training, or it names a finished pair.
    for spec in [SPEC, per_pair::spec().as_str()] {
        let folder = tempfile::tempdir().unwrap();
        let server = stopped_when(spec, folder.path(), |server| {
            events(server, "checkpointed").len() == 3
        });
        let mut newer = worker(&server, folder.path());
        newer.workshop = faulty("states");
        newer.run();
        succeeded(&server);
        assert_eq!(
            server.lasting_results(),
            undisturbed(spec).lasting_results()
        );
    }
}

#[test]
fn a_training_that_cannot_be_done_fails_the_job_also_after_a_checkpoint() {
    for (fault, after_checkpoint, fits) in [
        ("lessons", false, 1),
        // The state may be at fault, so it is tried without.
        ("lessons", true, 2),
        ("steps", false, 1),
        // A step from the state was done, so it is not.
        ("steps", true, 1),
    ] {
        let folder = tempfile::tempdir().unwrap();
        let server = stopped_when(SPEC, folder.path(), |server| {
            !after_checkpoint || !events(server, "checkpointed").is_empty()
        });
        let mut worker = worker(&server, folder.path());
        let workshop = faulty(fault);
        let outage = Arc::clone(&workshop.outage);
        worker.workshop = workshop;
        worker.run();
        let (release, reason) = server.released();
        assert_eq!(release, JobRelease::Failed, "{reason}");
        let tried = outage.fits.load(Ordering::SeqCst);
        assert_eq!(tried, fits, "{fault}, {after_checkpoint}");
    }
}
