//! Jobs in which every pair has a `LoRA` of its own.

use super::*;

fn spec() -> String {
    spec_with(&[
        ("[lora]", "[lora]\nmode = \"per-pair\""),
        ("batch = 2", "batch = 1"),
        ("reduced_rank = 4\n", ""),
    ])
}

/// What the checkpoints of each training in the journal name: their finished pairs, in order.
fn finished(server: &FakeServer) -> BTreeMap<(u64, String), Vec<String>> {
    let mut finished: BTreeMap<_, Vec<String>> = BTreeMap::new();
    for line in &server.state().lines {
        let entry: serde_json::Value = serde_json::from_slice(line).unwrap();
        let event = &entry["event"];
        if event["event"] != "checkpointed" {
            continue;
        }
        let training = event["training"].as_str().unwrap().to_owned();
        let key = (event["iteration"].as_u64().unwrap(), training);
        let names = event["result"]["finished"].as_array();
        let names = names.into_iter().flatten();
        let all = finished.entry(key).or_default();
        all.extend(names.map(|name| name.as_str().unwrap().to_owned()));
    }
    finished
}

#[test]
fn a_finished_pair_is_kept_once_and_not_in_every_checkpoint_after_it() {
    let server = undisturbed(&spec());
    succeeded(&server);
    let finished = finished(&server);
    assert_eq!(finished.len(), 2 * 3);
    for (training, names) in &finished {
        // Of four pairs the last is finished by the training's end.
        assert_eq!(names.len(), 3, "{training:?}");
        let different: BTreeSet<&String> = names.iter().collect();
        assert_eq!(different.len(), 3, "{training:?}");
    }
    // And no longer than the training.
    let state = server.state();
    let mut objects = state.objects.values();
    assert!(!objects.any(|bytes| bytes.starts_with(b"finished")));
}

#[test]
fn a_job_for_each_pair_killed_after_every_single_write_ends_in_the_same_bytes() {
    killed_again_and_again(&spec(), Loss::After(1), true);
    killed_again_and_again(&spec(), Loss::After(1), false);
}

#[test]
fn a_lost_finished_pair_costs_the_steps_of_its_training_and_nothing_else() {
    let wanted = undisturbed(&spec()).lasting_results();
    let server = Arc::new(FakeServer::new(&spec()));
    let mut removed = false;
    while server.state().releases.is_empty() {
        {
            let mut state = server.state();
            state.loss = if removed { Loss::Never } else { Loss::After(1) };
            state.grants = 1;
        }
        let folder = tempfile::tempdir().unwrap();
        worker(&server, folder.path()).run();
        let named = finished(&server).into_values().next().unwrap_or_default();
        if !removed && named.len() == 2 {
            let lost: Digest = named[0].parse().unwrap();
            server.state().objects.remove(&lost).unwrap();
            removed = true;
        }
    }
    succeeded(&server);
    assert!(removed);
    assert_eq!(server.lasting_results(), wanted);
    // It is kept again, under the name that it has already.
    let finished = finished(&server);
    assert!(
        finished.values().all(|names| names.len() == 3),
        "{finished:?}"
    );
}
