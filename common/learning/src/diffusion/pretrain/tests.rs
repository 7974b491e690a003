//! A tiny model on patches, trained from nothing.

use std::{fs, path::Path};

use tempfile::TempDir;

use super::*;
use crate::diffusion::{
    params::Compute,
    testing::{self, PLAIN},
};

/// The configurations of a fixture, turned into a model on patches with a straight flow.
fn folder() -> TempDir {
    let folder = testing::checkpoint("sd2", PLAIN);
    let replace = |file: &str, changes: &[(&str, &str)]| {
        let file = folder.path().join(file);
        let mut text = fs::read_to_string(&file).unwrap();
        for (from, to) in changes {
            assert!(text.contains(from), "{from}");
            text = text.replace(from, to);
        }
        fs::write(&file, text).unwrap();
    };
    replace("model_index.json", &[("\"vae\"", "\"no_vae\"")]);
    replace(
        "model_index.json",
        &[("\"unet\"", "\"_concord_patches\":2,\"unet\"")],
    );
    replace(
        "unet/config.json",
        &[
            ("\"in_channels\":4", "\"in_channels\":12"),
            ("\"out_channels\":4", "\"out_channels\":12"),
        ],
    );
    fs::write(
        folder.path().join("scheduler/scheduler_config.json"),
        r#"{"_class_name":"FlowMatchEulerDiscreteScheduler","num_train_timesteps":1000,"shift":1.0}"#,
    )
    .unwrap();
    folder
}

const COURSE: Course = Course {
    learning_rate: 2e-3,
    decay_from: 3,
    adamw: AdamWSettings {
        weight_decay: 0.01,
        warmup_steps: 2,
        clip_norm: 1.0,
    },
    average: 0.9,
};

fn fingerprint(recipe: &str) -> BTreeMap<String, String> {
    BTreeMap::from([("recipe".to_owned(), recipe.to_owned())])
}

fn begin(folder: &Path) -> (TextToImage, Pretrainer) {
    let model = TextToImage::fresh(folder, Seed(4), Compute::CPU).unwrap();
    let trainer = Pretrainer::new(&model, COURSE, fingerprint("a")).unwrap();
    (model, trainer)
}

fn batch(step: u64) -> Batch {
    Batch {
        images: (0..2 * 16 * 16 * 3)
            .map(|place| (place * 7 % 256) as u8)
            .collect(),
        side: 16,
        captions: vec!["a red fox".to_owned(), String::new()],
        seed: Seed(9).derive(&format!("{step}")),
    }
}

#[test]
fn a_run_that_goes_on_from_its_state_ends_in_the_same_bytes() {
    let folder = folder();
    let (model, mut whole) = begin(folder.path());
    let mut losses = Vec::new();
    for step in 0..6 {
        losses.push(whole.train(&model, &batch(step)).unwrap());
    }
    assert!(losses[5] < losses[0], "{losses:?}");

    let (model, mut first) = begin(folder.path());
    for step in 0..3 {
        first.train(&model, &batch(step)).unwrap();
    }
    let state = first.save(12.5).unwrap();
    let (model, mut second) = begin(folder.path());
    second.restore(&state).unwrap();
    assert_eq!((second.step(), second.seconds()), (3, 12.5));
    assert_eq!(second.save(12.5).unwrap(), state);
    for step in 3..6 {
        second.train(&model, &batch(step)).unwrap();
    }
    assert_eq!(second.save(0.0).unwrap(), whole.save(0.0).unwrap());
}

#[test]
fn a_state_of_another_run_is_refused_with_what_differs() {
    let folder = folder();
    let (model, trainer) = begin(folder.path());
    let state = trainer.save(0.0).unwrap();
    let mut other = Pretrainer::new(&model, COURSE, fingerprint("b")).unwrap();
    let refusal = other.restore(&state).unwrap_err().to_string();
    assert!(refusal.contains("recipe was a, now it is b"), "{refusal}");
    assert!(other.restore(&state[..state.len() - 1]).is_err());
}

#[test]
fn the_average_is_what_is_written_and_read_in_half_precision() {
    let folder = folder();
    let (model, mut trainer) = begin(folder.path());
    for step in 0..3 {
        trainer.train(&model, &batch(step)).unwrap();
    }
    let trained = model.digest().unwrap();
    let state = trainer.save(1.0).unwrap();

    let fresh = TextToImage::fresh(folder.path(), Seed(5), Compute::CPU).unwrap();
    let facts = load_average(&fresh, &state).unwrap();
    assert_eq!((facts.step, facts.seconds), (3, 1.0));
    assert_ne!(fresh.digest().unwrap(), trained);
    let target = folder.path().join("half");
    fresh.save_half(&target).unwrap();
    let loaded = TextToImage::load(&target, Compute::CPU).unwrap();
    let mut largest = 0.0_f64;
    for ((name, ours), (other, theirs)) in fresh.weights().iter().zip(loaded.weights().iter()) {
        assert_eq!(name, other);
        largest = largest.max(testing::apart(ours, theirs));
    }
    assert!(largest > 0.0 && largest < 1e-3, "{largest}");
    assert_eq!(loaded.codec().factor(), 2);
    assert_eq!(loaded.native_size()[0], 12);
}

#[test]
fn a_folder_with_impossible_patches_is_refused() {
    let folder = folder();
    let index = folder.path().join("model_index.json");
    let text = fs::read_to_string(&index).unwrap();
    for (from, to, what) in [
        ("_concord_patches\":2", "_concord_patches\":9", "2..=4"),
        ("_concord_patches\":2", "_concord_patches\":\"x\"", "number"),
        (
            "_concord_patches\":2",
            "_concord_patches\":3",
            "latents have 27",
        ),
        ("\"no_vae\"", "\"vae\"", "both"),
    ] {
        fs::write(&index, text.replace(from, to)).unwrap();
        let refusal = TextToImage::fresh(folder.path(), Seed(1), Compute::CPU)
            .unwrap_err()
            .to_string();
        assert!(refusal.contains(what), "{refusal}");
    }
}

#[test]
fn the_rate_falls_late_and_the_average_forgets_its_beginning() {
    assert!((COURSE.rate(0) - 2e-3).abs() < 1e-12);
    assert!((COURSE.rate(2) - 2e-3).abs() < 1e-12);
    assert!((COURSE.rate(11) - 1e-3).abs() < 1e-12);
    assert!((COURSE.keep(0) - 0.1).abs() < 1e-12);
    assert!((COURSE.keep(10_000) - 0.9).abs() < 1e-12);
}
