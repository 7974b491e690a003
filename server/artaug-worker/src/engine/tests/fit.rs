//! Trainings: their states, their adapters, and what they leave behind.

use concord_artaug::engine::Samples;
use concord_common::job::artaug::{LoraMode, LoraTargets};

use super::*;

/// A fit that nobody looks at.
fn trained(engine: &mut TorchEngine, fit: &Fit<'_>) -> Fitted {
    watched(engine, fit).0
}

/// A fit with what it told on its way.
fn watched(engine: &mut TorchEngine, fit: &Fit<'_>) -> (Fitted, Keeper) {
    let mut keeper = Keeper::default();
    let fitted = engine.fit(fit, &mut keeper).unwrap();
    (fitted, keeper)
}

/// One adapter for each pair.
fn per_pair(folder: &TempDir) -> Settings {
    let mut settings = settings(folder);
    settings.lora.mode = LoraMode::PerPair;
    settings
}

/// All trainings of an iteration, from every state that they saved, each by an engine that was started anew.
fn resumes_to_the_byte(settings: &Settings) {
    let (base, enhanced) = (lessons(0), lessons(50));
    let mut straight = opened(settings);
    let below = trained(&mut straight, &first(&base)).lora;
    for (training, lessons, below) in [
        (Training::First, &base, None),
        (Training::Second, &enhanced, Some(below.as_slice())),
        (Training::Control, &enhanced, None),
    ] {
        let fit = Fit {
            training,
            below,
            ..first(lessons)
        };
        let (fitted, keeper) = watched(&mut straight, &fit);
        assert_eq!(fitted, trained(&mut straight, &fit));
        let told: Vec<f64> = keeper.losses.iter().map(|(_, loss)| *loss).collect();
        assert_eq!(told, fitted.losses);
        assert!(!keeper.saved.is_empty());
        for saved in &keeper.saved {
            let mean = &fitted.losses[saved.step as usize - 2..saved.step as usize];
            assert!((saved.loss - mean.iter().sum::<f64>() / 2.0).abs() < 1e-12);
            let resumed = Fit {
                from: Some(saved.kept()),
                ..fit
            };
            let (again, later) = watched(&mut opened(settings), &resumed);
            assert_eq!(again, fitted, "{training:?} from step {}", saved.step);
            assert_eq!(later.losses[0].0, saved.step + 1);
            let rest: Vec<&Saved> = keeper
                .saved
                .iter()
                .filter(|other| other.step > saved.step)
                .collect();
            assert_eq!(later.saved.iter().collect::<Vec<_>>(), rest);
        }
    }
}

#[test]
fn a_fit_resumed_at_any_checkpoint_ends_in_the_same_bytes() {
    let folder = folder();
    resumes_to_the_byte(&settings(&folder));
}

#[test]
fn a_fit_of_one_adapter_a_pair_resumed_at_any_checkpoint_ends_in_the_same_bytes() {
    let folder = folder();
    let mut settings = per_pair(&folder);
    settings.lora.first_steps = 3;
    settings.lora.recompute = true;
    settings.lora.targets = LoraTargets::AllLinear;
    resumes_to_the_byte(&settings);
}

/// Of each training: the fit without samples, and with them the same one; the last samples are what its `LoRA` alone draws.
#[test]
fn samples_change_nothing_and_show_what_is_trained_so_far() {
    let folder = folder();
    let mut settings = settings(&folder);
    settings.lora.recompute = true;
    let mut engine = opened(&settings);
    let (base, enhanced) = (lessons(0), lessons(50));
    let below = trained(&mut engine, &first(&base));
    let orders = [order("a red fox", 1, 0), order("the snow", 2, 0)];
    for (training, lessons, below, steps) in [
        (Training::First, &base, None, [1, 2, 3, 4, 5].as_slice()),
        (
            Training::Second,
            &enhanced,
            Some(below.lora.as_slice()),
            &[1, 2, 3, 4],
        ),
    ] {
        let plain = Fit {
            training,
            below,
            ..first(lessons)
        };
        let (fitted, without) = watched(&mut engine, &plain);
        let samples = Samples {
            every: 1,
            orders: &orders,
        };
        let sampled = Fit {
            samples: Some(samples),
            ..plain
        };
        let (same, keeper) = watched(&mut engine, &sampled);
        assert_eq!(same, fitted);
        assert_eq!(keeper.saved, without.saved);
        let at: Vec<u64> = keeper.samples.iter().map(|(step, _)| *step).collect();
        assert_eq!(at, steps);
        // This keeper has none yet of the step that it begins at.
        let late = &keeper.samples[1..];
        let from = Fit {
            from: Some(keeper.saved[0].kept()),
            ..sampled
        };
        let (same, later) = watched(&mut opened(&settings), &from);
        assert_eq!(same, fitted);
        assert_eq!(later.samples, late);
        // What follows from the LoRA alone, without what lay below it.
        let joined = engine.join(None, &fitted.lora).unwrap().merged;
        engine.open(Some(&joined)).unwrap();
        let drawn = draw(&mut engine, &orders);
        let (_, last) = keeper.samples.last().unwrap();
        let far = |one: &Drawn, other: &Drawn| -> u8 {
            let pixels = |drawn: &Drawn| -> Vec<u8> {
                let images = drawn.images.iter();
                images.flat_map(|image| image.pixels().to_vec()).collect()
            };
            let pairs = pixels(one).into_iter().zip(pixels(other));
            pairs.map(|(one, other)| one.abs_diff(other)).max().unwrap()
        };
        // Merging rounds otherwise than adding up.
        assert!(far(last, &drawn) <= 1, "{}", far(last, &drawn));
        engine.open(None).unwrap();
    }
}

#[test]
fn a_checkpoint_of_a_later_pair_does_not_hold_the_weights_of_those_before_it() {
    let folder = folder();
    let mut engine = opened(&per_pair(&folder));
    let lessons = lessons(0);
    let (fitted, keeper) = watched(&mut engine, &first(&lessons));
    // Five steps for each of two pairs.
    let of_pairs = keeper.saved.iter().map(|saved| saved.finished.len());
    assert_eq!(of_pairs.collect::<Vec<_>>(), [0, 0, 1, 1]);
    let (one, next) = (&keeper.saved[0], &keeper.saved[3]);
    // The end of the file is what was trained.
    let file = &next.finished[0];
    let trained = &file[file.len() - 64..];
    let holds = |bytes: &[u8]| bytes.windows(trained.len()).any(|part| part == trained);
    assert!(holds(&fitted.lora) && !holds(&next.state));
    let more = next.state.len() - one.state.len();
    assert!(
        more < 8 * 6 + 64,
        "6 losses and some digits, not {more} bytes"
    );
    for finished in [&[][..], &[fitted.lora.clone().into()]] {
        let state = &next.state;
        let other = Fit {
            from: Some(Kept { state, finished }),
            ..first(&lessons)
        };
        let refusal = engine.fit(&other, &mut Keeper::default()).unwrap_err();
        assert!(refusal.to_string().contains("finished pairs"), "{refusal}");
    }
}

/// Each pair's adapter is what it would be alone, and joining them is taking their mean.
#[test]
fn adapters_of_single_pairs_are_averaged() {
    let folder = folder();
    let mut engine = opened(&per_pair(&folder));
    let lessons = lessons(0);
    let both = trained(&mut engine, &first(&lessons));
    assert_eq!(both.losses.len(), 2 * 5);
    let alone: Vec<Lora> = lessons
        .iter()
        .map(|lesson| {
            let lesson = std::slice::from_ref(lesson);
            let fitted = trained(&mut engine, &first(lesson));
            let (_, lora) = adapters::read(&fitted.lora).unwrap().pop_first().unwrap();
            lora
        })
        .collect();
    let joined = engine.join(None, &both.lora).unwrap();
    let mean = Lora::sum(&[(&alone[0], 0.5), (&alone[1], 0.5)]).unwrap();
    let ours = adapters::read_joined(&joined.merged).unwrap();
    assert_eq!(ours.to_bytes().unwrap(), mean.to_bytes().unwrap());
    assert_eq!(ours.rank(), 4);
    assert!(joined.reduced.is_none());
    // One for every pair is nothing that a model can be made with.
    let refusal = engine.open(Some(&both.lora)).unwrap_err().to_string();
    assert!(refusal.contains("join them first"), "{refusal}");
}

#[test]
fn a_fit_leaves_the_model_as_it_was_also_when_it_is_stopped() {
    let folder = folder();
    let mut engine = opened(&settings(&folder));
    let orders = [order("a red fox", 1, 1)];
    let before = (engine.digest().unwrap(), draw(&mut engine, &orders));
    let lessons = lessons(0);
    for stop_after in [None, Some(1), Some(4)] {
        let mut keeper = Keeper {
            stop_after,
            ..Keeper::default()
        };
        let result = engine.fit(&first(&lessons), &mut keeper);
        match stop_after {
            None => assert!(result.is_ok()),
            Some(_) => assert!(matches!(result, Err(EngineError::Stopped))),
        }
        let after = (engine.digest().unwrap(), draw(&mut engine, &orders));
        assert_eq!(after, before);
    }
}

/// Two lessons are made ready, then each of five steps has two passes.
#[test]
fn a_fit_can_be_stopped_within_a_step() {
    let folder = folder();
    let mut engine = opened(&settings(&folder));
    let lessons = lessons(0);
    let (fitted, keeper) = watched(&mut engine, &first(&lessons));
    assert_eq!(keeper.asked, 2 + 5);
    for (stop_within, steps) in [(1, 0), (2, 0), (3, 0), (5, 2)] {
        let mut keeper = Keeper {
            stop_within: Some(stop_within),
            ..Keeper::default()
        };
        let stopped = engine.fit(&first(&lessons), &mut keeper);
        assert!(matches!(stopped, Err(EngineError::Stopped)));
        assert_eq!(keeper.losses.len(), steps, "{stop_within}");
    }
    assert_eq!(trained(&mut engine, &first(&lessons)), fitted);
}

/// By the keeper's word after a step, in the middle of one, whose passes so far are made again, and before the first of a pair.
#[test]
fn a_fit_that_is_stopped_gives_its_last_step_and_goes_on_from_it_to_the_same_bytes() {
    let folder = folder();
    for (settings, stops) in [
        (
            settings(&folder),
            [
                (Some(3), None, 3),
                (Some(5), None, 5),
                (None, Some(4), 1),
                (None, Some(6), 3),
            ],
        ),
        // Seven questions belong to the first pair.
        (
            per_pair(&folder),
            [
                (Some(5), None, 5),
                (Some(7), None, 7),
                (None, Some(8), 5),
                (None, Some(9), 6),
            ],
        ),
    ] {
        let lessons = lessons(0);
        let fitted = trained(&mut opened(&settings), &first(&lessons));
        for (stop_after, stop_within, step) in stops {
            let mut keeper = Keeper {
                stop_after,
                stop_within,
                wants_state: true,
                ..Keeper::default()
            };
            let stopped = opened(&settings).fit(&first(&lessons), &mut keeper);
            assert!(matches!(stopped, Err(EngineError::Stopped)));
            let last = keeper.saved.last().unwrap();
            assert_eq!(last.step, step);
            assert!(last.loss.is_finite());
            let resumed = Fit {
                from: Some(last.kept()),
                ..first(&lessons)
            };
            let (again, later) = watched(&mut opened(&settings), &resumed);
            assert_eq!(again, fitted, "from step {step}");
            let told: Vec<u64> = later.losses.iter().map(|(step, _)| *step).collect();
            let rest: Vec<u64> = (step + 1..=fitted.losses.len() as u64).collect();
            assert_eq!(told, rest);
        }
    }
}
