//! What the settings say of machine, drawing and training, and what the model reads of a text.

use std::thread;

use concord_common::job::artaug::LoraTargets;
use concord_learning::torch::threads_in_use;

use super::*;

/// A setting's name, and another value for it.
type Change<T> = (&'static str, fn(&mut T));

#[test]
fn the_engine_computes_with_as_many_threads_as_its_settings_say() {
    let folder = folder();
    for threads in [2, 1] {
        let settings = Settings {
            threads,
            ..settings(&folder)
        };
        let mut engine = opened(&settings);
        assert_eq!(threads_in_use(), threads);
        // The number is the calling thread's own, and any may call.
        let by_another = thread::scope(|scope| {
            let other = scope.spawn(|| {
                use_threads(7);
                draw(&mut engine, &[order("a red fox", 1, 0)]);
                threads_in_use()
            });
            other.join().unwrap()
        });
        assert_eq!(by_another, threads);
    }
}

#[test]
fn texts_that_the_model_does_not_read_to_their_end_are_counted_for_each_order() {
    let folder = folder();
    let mut engine = opened(&settings(&folder));
    // Each word is one of the 75 tokens that a text may have.
    let (whole, long) = ("the ".repeat(75), "the ".repeat(76));
    let mut advised = order(&long, 2, 2);
    let letters = "x ".repeat(100);
    advised.regions[1].prompt = RegionPrompt::new(letters.trim()).unwrap();
    let orders = [order(&whole, 1, 1), advised, order(&long, 3, 0)];
    assert_eq!(draw(&mut engine, &orders).cut, [0, 2, 1]);
}

#[test]
fn every_setting_of_the_sampler_changes_the_image() {
    let folder = folder();
    let plain = settings(&folder);
    let drawn = |sampler: SamplerSpec| {
        let settings = Settings {
            sampler,
            ..plain.clone()
        };
        let drawn = draw(&mut opened(&settings), &[order("a red fox", 1, 1)]);
        drawn.images[0].pixels().to_vec()
    };
    let changes: [Change<SamplerSpec>; 7] = [
        ("guidance", |spec| spec.guidance = 9.0),
        ("negative_prompt", |spec| {
            spec.negative_prompt = String::from("the dark snow in a cold night");
        }),
        ("region_strength", |spec| spec.region_strength = 20.0),
        ("steps", |spec| spec.steps = 5),
        ("kind: dpm-solver", |spec| spec.kind = Solver::DpmSolver),
        ("kind: euler", |spec| spec.kind = Solver::Euler),
        // As many bytes as before.
        ("size", |spec| spec.size = Some([16, 24])),
    ];
    let mut seen = vec![drawn(plain.sampler.clone())];
    for (name, change) in changes {
        let mut sampler = plain.sampler.clone();
        change(&mut sampler);
        let image = drawn(sampler);
        assert!(!seen.contains(&image), "{name} changes nothing");
        seen.push(image);
    }
}

/// But for `recompute`, which is about memory.
#[test]
fn every_setting_of_a_training_changes_the_lora() {
    let folder = folder();
    let plain = settings(&folder);
    let lessons = lessons(0);
    let fitted = |lora: LoraSpec| {
        let settings = Settings {
            lora,
            ..plain.clone()
        };
        let fitted = opened(&settings).fit(&first(&lessons), &mut Keeper::default());
        fitted.unwrap().lora
    };
    let changes: [Change<LoraSpec>; 8] = [
        ("learning_rate", |spec| spec.learning_rate = 1e-2),
        // With the rate of 5e-3 a twentieth in each step.
        ("weight_decay", |spec| spec.weight_decay = 10.0),
        ("clip_norm", |spec| spec.clip_norm = 1e-4),
        ("accumulation", |spec| spec.accumulation = 3),
        ("batch", |spec| spec.batch = 3),
        ("rank", |spec| spec.rank = 3),
        ("targets", |spec| spec.targets = LoraTargets::AllLinear),
        ("first_steps", |spec| spec.first_steps = 6),
    ];
    let before = fitted(plain.lora.clone());
    let mut seen = vec![before.clone()];
    for (name, change) in changes {
        let mut spec = plain.lora.clone();
        change(&mut spec);
        let lora = fitted(spec);
        assert!(!seen.contains(&lora), "{name} changes nothing");
        seen.push(lora);
    }
    let shapes = |object: &[u8]| -> Vec<(String, Vec<i64>, Vec<i64>)> {
        let lora = adapters::read_joined(object).unwrap();
        let pairs = lora.pairs.into_iter();
        pairs
            .map(|(name, pair)| (name, pair.down.size(), pair.up.size()))
            .collect()
    };
    let sparing = LoraSpec {
        recompute: true,
        ..plain.lora.clone()
    };
    assert_eq!(shapes(&fitted(sparing)), shapes(&before));
}
