//! Jobs in which every pair has a `LoRA` of its own.

use super::{held_up::stopped_when, *};

pub(super) fn spec() -> String {
    spec_with(&[
        ("[lora]", "[lora]\nmode = \"per-pair\""),
        ("batch = 2", "batch = 1"),
        ("reduced_rank = 4\n", ""),
    ])
}

/// What the checkpoints of each training in the journal name: their finished pairs, in order.
fn finished(server: &FakeServer) -> BTreeMap<(u64, String), Vec<Digest>> {
    let mut finished: BTreeMap<_, Vec<Digest>> = BTreeMap::new();
    for event in events(server, "checkpointed") {
        let names = digests(&event["result"]["finished"]);
        let all = finished.entry(training_of(&event)).or_default();
        all.extend(names);
    }
    finished
}

/// A job in whose first training two pairs are finished, with their names.
fn with_two_finished(folder: &Path) -> (Arc<FakeServer>, Vec<Digest>) {
    let two = |server: &FakeServer| {
        let mut all = finished(server).into_values();
        all.find(|names| names.len() == 2)
    };
    let server = stopped_when(&spec(), folder, |server| two(server).is_some());
    let names = two(&server).unwrap();
    (server, names)
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
        let different: BTreeSet<&Digest> = names.iter().collect();
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
    let folder = tempfile::tempdir().unwrap();
    let (server, names) = with_two_finished(folder.path());
    server.state().objects.remove(&names[0]).unwrap();
    ends_as_undisturbed(&server);
    // It is kept again, under the name that it has already.
    let finished = finished(&server);
    assert!(
        finished.values().all(|names| names.len() == 3),
        "{finished:?}"
    );
}

#[test]
fn what_only_the_server_has_lost_of_a_checkpoint_is_brought_to_it_again() {
    let folder = tempfile::tempdir().unwrap();
    let (server, mut objects) = with_two_finished(folder.path());
    let newest = events(&server, "checkpointed").pop().unwrap();
    objects.push(digest(&newest["result"]["state"]));
    {
        let mut state = server.state();
        for object in &objects {
            state.objects.remove(object).unwrap();
        }
        // The worker goes away again once it has written as many.
        state.loss = Loss::After(objects.len());
    }
    worker(&server, folder.path()).run();
    for object in &objects {
        assert!(server.state().objects.contains_key(object));
    }
    ends_as_undisturbed(&server);
}
