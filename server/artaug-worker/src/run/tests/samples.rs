//! Images that are drawn in the middle of trainings.

use super::{
    held_up::{begun_of, stopped_when},
    pauses::paused_at,
    *,
};

fn spec() -> String {
    spec_with(&[(
        "checkpoint_every = 10",
        "checkpoint_every = 10\nsample_every = 4",
    )])
}

/// Step and images of samples.
type Samples = Vec<(u64, Vec<Digest>)>;

/// All samples, by iteration and training.
fn samples(server: &FakeServer) -> BTreeMap<(u64, String), Samples> {
    let mut samples: BTreeMap<_, Samples> = BTreeMap::new();
    for event in events(server, "sampled") {
        let result = &event["result"];
        let sample = (result["step"].as_u64().unwrap(), digests(&result["images"]));
        let all = samples.entry(training_of(&event)).or_default();
        all.push(sample);
    }
    samples
}

/// Their images.
fn images(server: &FakeServer) -> BTreeSet<Digest> {
    let samples = samples(server).into_values().flatten();
    samples.flat_map(|(_, images)| images).collect()
}

#[test]
fn trainings_draw_samples_on_their_way() {
    let server = undisturbed(&spec());
    succeeded(&server);
    let samples = samples(&server);
    assert_eq!(samples.len(), 2 * 3);
    for ((iteration, training), samples) in samples {
        let steps: Vec<u64> = samples.iter().map(|(step, _)| *step).collect();
        let last = if training == "first" { 25 } else { 15 };
        let wanted: Vec<u64> = (1..=last / 4).map(|number| 4 * number).collect();
        assert_eq!(steps, wanted, "{iteration} {training}");
        assert!(samples.iter().all(|(_, images)| images.len() == 4));
    }
    let page = text_of(&server, "gallery.html");
    assert!(page.contains("<figcaption>step 24</figcaption>"));
}

#[test]
fn samples_of_a_job_killed_after_every_single_write_are_drawn_once() {
    let whole = undisturbed(&spec());
    for same_folder in [true, false] {
        let server = killed_again_and_again(&spec(), Loss::After(1), same_folder);
        assert_eq!(samples(&server), samples(&whole));
    }
}

#[test]
fn samples_that_a_pause_came_before_are_drawn_when_the_training_goes_on() {
    let server = paused_at(&spec(), 8);
    let drawn: Vec<u64> = samples(&server)
        .into_values()
        .flatten()
        .map(|(step, _)| step)
        .collect();
    assert_eq!(drawn, [4]);
    ends_as_undisturbed(&server);
    assert_eq!(samples(&server), samples(&undisturbed(&spec())));
}

#[test]
fn lost_samples_are_drawn_again() {
    let whole = undisturbed(&spec());
    let wanted = images(&whole);
    let lines = whole.state().lines.len();
    let server = begun_of(&spec(), lines * 7 / 8);
    for image in &wanted {
        server.state().objects.remove(image);
    }
    ends_as_undisturbed(&server);
    assert_eq!(samples(&server), samples(&whole));
    let state = server.state();
    assert!(wanted.iter().all(|image| state.objects.contains_key(image)));
}

#[test]
fn a_training_whose_samples_come_out_otherwise_is_done_again_once() {
    let folder = tempfile::tempdir().unwrap();
    let server = stopped_when(&spec(), folder.path(), |server| {
        events(server, "fused").len() == 2
    });
    // All are trained and joined: nothing needs the last one's LoRA.
    let trained = events(&server, "trained");
    assert_eq!(trained.len(), 6);
    let lora = digest(&trained[5]["result"]["lora"]);
    for object in images(&server).into_iter().chain([lora]) {
        server.state().objects.remove(&object).unwrap();
    }
    let elsewhere = tempfile::tempdir().unwrap();
    let mut worker = worker(&server, elsewhere.path());
    let workshop = faulty("otherwise");
    let outage = Arc::clone(&workshop.outage);
    worker.workshop = workshop;
    worker.run();
    succeeded(&server);
    assert_eq!(outage.fits.load(Ordering::SeqCst), trained.len());
}
