//! Images that are drawn in the middle of trainings.

use super::{held_up::begun_of, *};

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
    for line in &server.state().lines {
        let entry: serde_json::Value = serde_json::from_slice(line).unwrap();
        let event = &entry["event"];
        if event["event"] != "sampled" {
            continue;
        }
        let training = event["training"].as_str().unwrap().to_owned();
        let images = event["result"]["images"].as_array().unwrap().iter();
        let images = images.map(|image| image.as_str().unwrap().parse().unwrap());
        samples
            .entry((event["iteration"].as_u64().unwrap(), training))
            .or_default()
            .push((event["result"]["step"].as_u64().unwrap(), images.collect()));
    }
    samples
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
    let page = String::from_utf8(server.results()["gallery.html"].clone()).unwrap();
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
fn lost_samples_are_drawn_again() {
    let whole = undisturbed(&spec());
    let wanted: BTreeSet<Digest> = samples(&whole)
        .into_values()
        .flatten()
        .flat_map(|(_, images)| images)
        .collect();
    let lines = whole.state().lines.len();
    let server = begun_of(&spec(), lines * 7 / 8);
    for image in &wanted {
        server.state().objects.remove(image);
    }
    server.state().grants = usize::MAX;
    let folder = tempfile::tempdir().unwrap();
    worker(&server, folder.path()).run();
    succeeded(&server);
    assert_eq!(samples(&server), samples(&whole));
    let state = server.state();
    assert!(wanted.iter().all(|image| state.objects.contains_key(image)));
}
