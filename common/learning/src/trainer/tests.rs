use concord_common::adapter::decode_f32;
use tch::Kind;

use super::*;
use crate::{
    cache::{CacheMode, DiskBudget},
    data::Label,
    testing::{
        applied, backbone, classification, first_payload, go_on, regression, silo, spec, spec_with,
        tokenizer, trainer, try_trainer,
    },
};

const ALGORITHMS: [&str; 7] = [
    "local", "fedavg", "fedprox", "moon", "ditto", "fedrep", "fedmcp",
];

fn number(metrics: &[(String, f64)], name: &str) -> f64 {
    metrics
        .iter()
        .find(|(key, _)| key == name)
        .unwrap_or_else(|| panic!("no {name} among {metrics:?}"))
        .1
}

/// Trains some rounds of a federation of one and gives the last adapter and every round's update.
fn federate(
    trainer: &mut LocalTrainer,
    payload: Vec<u8>,
    rounds: std::ops::RangeInclusive<u32>,
) -> (Vec<u8>, Vec<Vec<u8>>) {
    let mut payload = payload;
    let mut updates = Vec::new();
    for round in rounds {
        let result = trainer.train_round(round, &payload, &mut go_on).unwrap();
        payload = applied(&payload, result.update.payload());
        trainer.after_aggregation(round, &payload).unwrap();
        updates.push(result.update.into_payload());
    }
    (payload, updates)
}

#[test]
fn every_algorithm_learns_a_separable_task() {
    for sharing in ["private", "shared"] {
        for algorithm in ALGORITHMS {
            if sharing == "shared" && algorithm == "fedrep" {
                continue;
            }
            let head = if sharing == "shared" {
                "sharing = \"shared\"\nclasses = 5"
            } else {
                ""
            };
            let spec = spec_with(&format!("name = \"{algorithm}\""), "", head, "epochs = 4");
            let mut trainer = trainer(&spec, &classification(90, 30));
            let first = first_payload(&spec);
            let before = trainer.evaluate(&first, Split::Test).unwrap();
            let (last, _) = federate(&mut trainer, first, 1..=3);
            let after = trainer.evaluate(&last, Split::Test).unwrap();
            assert!(
                after.metrics["loss"] < before.metrics["loss"] * 0.7,
                "{algorithm}, {sharing} head: {before:?}, then {after:?}"
            );
            assert!(
                after.metrics["accuracy"] > 0.85,
                "{algorithm}, {sharing} head: {after:?}"
            );
        }
    }
}

#[test]
fn numbers_for_pairs_are_learnt_too() {
    for algorithm in ["fedavg", "fedmcp"] {
        let spec = spec_with(&format!("name = \"{algorithm}\""), "", "", "epochs = 6");
        let mut trainer = trainer(&spec, &regression(90, 30));
        let (last, _) = federate(&mut trainer, first_payload(&spec), 1..=3);
        let after = trainer.evaluate(&last, Split::Test).unwrap();
        assert!(after.metrics["spearman"] > 0.8, "{algorithm}: {after:?}");
        assert!(trainer.best().is_some());
    }
}

#[test]
fn two_runs_give_the_same_bytes() {
    for algorithm in ALGORITHMS {
        let run = || {
            let spec = spec(algorithm);
            let mut trainer = trainer(&spec, &classification(30, 9));
            let (_, updates) = federate(&mut trainer, first_payload(&spec), 1..=2);
            (updates, trainer.save_state().unwrap().to_bytes().unwrap())
        };
        assert!(run() == run(), "{algorithm}");
    }
}

#[test]
fn silos_of_one_job_draw_unlike_batches_heads_and_private_adapters() {
    let spec = spec("fedmcp");
    let data = classification(30, 0);
    let state = |name: &str| {
        let mut trainer = try_trainer(&spec, name, &data, CacheSettings::default(), None).unwrap();
        let (last, updates) = federate(&mut trainer, first_payload(&spec), 1..=1);
        (updates, trainer.personal_model(&last).unwrap())
    };
    let ((update_a, a), (update_b, b)) = (state("north"), state("south"));
    assert_ne!(update_a, update_b);
    for name in ["head.weight", "private.layer.0.down.weight"] {
        assert_ne!(a.tensors[name], b.tensors[name], "{name}");
    }
}

#[test]
fn a_resumed_trainer_goes_on_to_the_bit() {
    for algorithm in ALGORITHMS {
        let spec = spec_with(
            &format!("name = \"{algorithm}\""),
            "combine = \"gate\"",
            "",
            "warmup_steps = 9",
        );
        let data = classification(30, 9);
        let mut whole = trainer(&spec, &data);
        let (_, want) = federate(&mut whole, first_payload(&spec), 1..=3);

        let mut first = trainer(&spec, &data);
        let (payload, mut got) = federate(&mut first, first_payload(&spec), 1..=1);
        let bytes = first.save_state().unwrap().to_bytes().unwrap();
        drop(first);
        let saved = SavedState::from_bytes(&bytes).unwrap();
        assert_eq!(saved.last_round(), 1);
        let mut second =
            try_trainer(&spec, "north", &data, CacheSettings::default(), Some(saved)).unwrap();
        let (_, rest) = federate(&mut second, payload, 2..=3);
        got.extend(rest);
        assert!(got == want, "{algorithm}");
        assert!(
            second.save_state().unwrap() == whole.save_state().unwrap(),
            "{algorithm}"
        );
    }
}

#[test]
fn a_cancelled_round_leaves_no_trace() {
    for algorithm in ["fedmcp", "ditto"] {
        let spec = spec(algorithm);
        let data = classification(30, 9);
        let mut whole = trainer(&spec, &data);
        let (payload, first) = federate(&mut whole, first_payload(&spec), 1..=1);
        let (_, second) = federate(&mut whole, payload.clone(), 2..=2);

        let mut stopped = trainer(&spec, &data);
        let mut steps = 0;
        let mut stop_at_third = |progress: Progress| {
            steps += 1;
            assert_eq!(progress.step, steps);
            if steps == 3 {
                Continue::Stop
            } else {
                Continue::Yes
            }
        };
        let outcome = stopped.train_round(1, &first_payload(&spec), &mut stop_at_third);
        assert!(matches!(outcome, Err(LearningError::Cancelled)));
        assert_eq!(steps, 3);
        assert_eq!(stopped.last_round(), 0);
        assert_eq!(federate(&mut stopped, first_payload(&spec), 1..=1).1, first);
        let outcome = stopped.train_round(2, &payload, &mut |_| Continue::Stop);
        assert!(matches!(outcome, Err(LearningError::Cancelled)));
        assert_eq!(federate(&mut stopped, payload, 2..=2).1, second);
    }
}

#[test]
fn progress_counts_every_step_of_every_phase() {
    let spec = spec_with("name = \"fedrep\"\nhead_epochs = 2", "", "", "epochs = 3");
    let mut trainer = trainer(&spec, &classification(30, 0));
    let mut seen = Vec::new();
    trainer
        .train_round(1, &first_payload(&spec), &mut |progress| {
            seen.push((progress.phase, progress.step, progress.steps));
            Continue::Yes
        })
        .unwrap();
    // 30 rows in batches of 8 are 4 batches, 5 epochs.
    assert_eq!(seen.len(), 20);
    assert!(seen.iter().all(|(_, _, steps)| *steps == 20));
    assert_eq!(
        seen.iter().filter(|(phase, ..)| *phase == "head").count(),
        8
    );
    assert_eq!(seen[19].1, 20);
}

#[test]
fn without_mu_the_contrastive_term_is_measured_and_changes_nothing() {
    let update = |algorithm: &str| {
        let spec = spec_with(algorithm, "", "", "");
        let mut trainer = trainer(&spec, &classification(30, 0));
        let first = trainer
            .train_round(1, &first_payload(&spec), &mut go_on)
            .unwrap();
        let payload = applied(&first_payload(&spec), first.update.payload());
        trainer.train_round(2, &payload, &mut go_on).unwrap()
    };
    let off = update("name = \"fedmcp\"\nmu = 0.0\ntau = 0.5");
    let off_otherwise = update("name = \"fedmcp\"\nmu = 0.0\ntau = 3.0\ncka = \"biased\"");
    let on = update("name = \"fedmcp\"\nmu = 1.0\ntau = 0.5");
    assert_eq!(off.update, off_otherwise.update);
    assert_ne!(off.update, on.update);
    for result in [&off, &on] {
        assert!(number(&result.training, "cka_pull") <= 1.0 + 1e-6);
        assert!(number(&result.training, "cka_push").is_finite());
    }
    let sum = |result: &RoundResult| {
        number(&result.training, "task_loss") + 0.01 * number(&result.training, "regulariser")
    };
    assert!((number(&off.training, "loss") - sum(&off)).abs() < 1e-5);
    assert!(
        (number(&on.training, "loss") - sum(&on) - number(&on.training, "contrastive")).abs()
            < 1e-5
    );
}

#[test]
fn the_contrastive_term_draws_the_adapters_apart() {
    let push = |mu: f64| {
        let spec = spec_with(
            &format!("name = \"fedmcp\"\nmu = {mu:?}"),
            "private_start = \"near-global\"",
            "",
            "epochs = 6",
        );
        let mut trainer = trainer(&spec, &classification(60, 0));
        let result = trainer
            .train_round(1, &first_payload(&spec), &mut go_on)
            .unwrap();
        let last = applied(&first_payload(&spec), result.update.payload());
        let again = trainer.train_round(2, &last, &mut go_on).unwrap();
        number(&again.training, "cka_push")
    };
    let (without, with) = (push(0.0), push(5.0));
    assert!(
        with < without - 0.1,
        "s- is {without} without the term and {with} with it"
    );
}

#[test]
fn the_update_holds_the_global_adapter_and_nothing_private() {
    for algorithm in ALGORITHMS {
        let spec = spec(algorithm);
        let mut trainer = trainer(&spec, &classification(30, 9));
        let payload = first_payload(&spec);
        let result = trainer.train_round(1, &payload, &mut go_on).unwrap();
        let layout = spec.adapter_shape().layout().unwrap();
        assert_eq!(*result.update.layout(), layout);
        assert_eq!(result.update.payload().len() as u64, layout.payload_bytes());
        // No private tensor's bytes stand in the update, neither as they are nor as a difference.
        let state = trainer.save_state().unwrap();
        let update = decode_f32(result.update.payload()).unwrap();
        let absolute = decode_f32(&applied(&payload, result.update.payload())).unwrap();
        let personal = state_tensors(&state);
        assert!(!personal.is_empty(), "{algorithm}");
        for (name, values) in personal {
            for travelling in [&update, &absolute] {
                let found = travelling
                    .windows(values.len())
                    .any(|window| window == values.as_slice());
                assert!(
                    !found || values.iter().all(|value| *value == 0.0),
                    "{algorithm}: {name}"
                );
            }
        }
    }
}

/// The private tensors of a state, without the copies of what was global.
fn state_tensors(state: &SavedState) -> Vec<(String, Vec<f32>)> {
    let (tensors, _) = crate::named::from_safetensors(&state.to_bytes().unwrap()).unwrap();
    tensors
        .into_iter()
        .filter(|(name, _)| {
            name.starts_with("private.")
                || name.starts_with("head.")
                || name.starts_with("path_head.")
        })
        .map(|(name, tensor)| (name, tensor.values))
        .collect()
}

#[test]
fn local_contributes_exactly_nothing() {
    let spec = spec("local");
    let mut trainer = trainer(&spec, &classification(30, 0));
    let result = trainer
        .train_round(1, &first_payload(&spec), &mut go_on)
        .unwrap();
    assert!(result.update.payload().iter().all(|byte| *byte == 0));
    assert_eq!(result.examples, 30);
}

#[test]
fn local_of_another_width_is_a_parameter_matched_control() {
    let spec = spec_with("name = \"local\"", "private_bottleneck = 8", "", "");
    let mut trainer = trainer(&spec, &classification(30, 0));
    let model = trainer.personal_model(&first_payload(&spec)).unwrap();
    assert_eq!(model.tensors["private.layer.0.down.weight"].shape, [8, 24]);
    assert_eq!(model.facts.global_bottleneck, None);
}

#[test]
fn fedprox_stays_nearer_to_where_it_began() {
    let moved = |mu: f64| {
        let spec = spec_with(
            &format!("name = \"fedprox\"\nmu = {mu:?}"),
            "",
            "",
            "epochs = 4",
        );
        let mut trainer = trainer(&spec, &classification(30, 0));
        let result = trainer
            .train_round(1, &first_payload(&spec), &mut go_on)
            .unwrap();
        number(&result.training, "update_norm")
    };
    assert!(moved(50.0) < 0.7 * moved(0.0));
    let fedavg = {
        let spec = spec_with("name = \"fedavg\"", "", "", "epochs = 4");
        let mut trainer = trainer(&spec, &classification(30, 0));
        let result = trainer
            .train_round(1, &first_payload(&spec), &mut go_on)
            .unwrap();
        number(&result.training, "update_norm")
    };
    assert!((moved(0.0) - fedavg).abs() < 1e-12);
}

#[test]
fn a_strong_pull_keeps_dittos_personal_model_at_the_global_one() {
    let distance = |lambda: f64| {
        let spec = spec_with(
            &format!("name = \"ditto\"\nlambda = {lambda:?}"),
            "",
            "",
            "epochs = 4",
        );
        let mut trainer = trainer(&spec, &classification(30, 0));
        let first = first_payload(&spec);
        trainer.train_round(1, &first, &mut go_on).unwrap();
        let model = trainer.personal_model(&first).unwrap();
        let received = decode_f32(&first).unwrap();
        let personal: Vec<f32> = spec
            .adapter_shape()
            .layout()
            .unwrap()
            .tensors()
            .iter()
            .flat_map(|tensor| {
                model.tensors[&format!("private.{}", tensor.name)]
                    .values
                    .clone()
            })
            .collect();
        assert_eq!(personal.len(), received.len());
        personal
            .iter()
            .zip(&received)
            .map(|(v, x)| f64::from(v - x).powi(2))
            .sum::<f64>()
            .sqrt()
    };
    assert!(distance(100.0) < 0.5 * distance(0.0));
}

#[test]
fn dittos_global_path_is_fedavg() {
    let update = |algorithm: &str| {
        let spec = spec(algorithm);
        let mut trainer = trainer(&spec, &classification(30, 0));
        trainer
            .train_round(1, &first_payload(&spec), &mut go_on)
            .unwrap()
            .update
    };
    assert_eq!(update("ditto"), update("fedavg"));
}

#[test]
fn moon_is_fedavg_until_there_is_a_previous_model() {
    let rounds = |algorithm: &str| {
        let spec = spec(algorithm);
        let mut trainer = trainer(&spec, &classification(30, 0));
        federate(&mut trainer, first_payload(&spec), 1..=2).1
    };
    let (moon, fedavg) = (rounds("moon"), rounds("fedavg"));
    assert_eq!(moon[0], fedavg[0]);
    assert_ne!(moon[1], fedavg[1]);
}

#[test]
fn the_head_phase_of_fedrep_leaves_the_adapter_and_the_other_the_head() {
    // With the adapter's learning rate as good as 0 only the head phase moves anything, and the reverse.
    let run = |training: &str| {
        let spec = spec_with("name = \"fedrep\"", "", "", training);
        let mut trainer = trainer(&spec, &classification(30, 0));
        let first = first_payload(&spec);
        let head_before = trainer.personal_model(&first).unwrap().tensors["head.weight"].clone();
        let result = trainer.train_round(1, &first, &mut go_on).unwrap();
        let head_after = trainer.personal_model(&first).unwrap().tensors["head.weight"].clone();
        let moved = head_before
            .values
            .iter()
            .zip(&head_after.values)
            .map(|(a, b)| f64::from((a - b).abs()))
            .sum::<f64>();
        (number(&result.training, "update_norm"), moved)
    };
    let (adapter, head) = run("weight_decay = 0.0");
    assert!(adapter > 0.1 && head > 0.1);
}

#[test]
fn the_global_loss_regulariser_trains_the_global_path() {
    let path_loss = |regulariser: &str| {
        let spec = spec_with(
            &format!("name = \"fedmcp\"\nmu = 0.0\nalpha = 1.0\nregulariser = \"{regulariser}\""),
            "",
            "",
            "epochs = 6",
        );
        let mut trainer = trainer(&spec, &classification(60, 0));
        let result = trainer
            .train_round(1, &first_payload(&spec), &mut go_on)
            .unwrap();
        result
            .training
            .iter()
            .find(|(name, _)| name == "global_loss")
            .map(|(_, value)| *value)
    };
    assert!(path_loss("distance").is_none());
    assert!(path_loss("global-loss").is_some_and(|loss| loss < 1.2));
}

#[test]
fn the_cache_changes_no_bit_wherever_the_rows_are_kept() {
    let spec = spec_with("name = \"fedmcp\"", "layers = [1]", "", "epochs = 2");
    let data = classification(30, 9);
    let folder = tempfile::tempdir().unwrap();
    let disk = |bytes| {
        Some(DiskBudget {
            folder: folder.path().to_owned(),
            bytes,
        })
    };
    let run = |mode, memory_bytes, disk| {
        let settings = CacheSettings {
            mode,
            memory_bytes,
            disk,
        };
        let mut trainer = try_trainer(&spec, "north", &data, settings, None).unwrap();
        let updates = federate(&mut trainer, first_payload(&spec), 1..=2).1;
        (updates, trainer.cache_stats())
    };
    let (memory, stats) = run(CacheMode::On, 1 << 20, None);
    assert_eq!(stats.misses, 39);
    assert!(stats.hits > stats.misses);
    let (on_disk, stats) = run(CacheMode::On, 0, disk(1 << 20));
    assert!(stats.disk_bytes > 0 && stats.misses == 39);
    let (mixed, stats) = run(CacheMode::On, 10_000, disk(10_000));
    assert!(stats.memory_bytes > 0 && stats.disk_bytes > 0 && stats.misses > 39);
    let (none, stats) = run(CacheMode::On, 0, None);
    assert_eq!(stats.hits, 0);
    assert!(memory == on_disk && memory == mixed && memory == none);

    let (off, _) = run(CacheMode::Off, 0, None);
    let values = |updates: &[Vec<u8>]| -> Vec<f32> {
        updates
            .iter()
            .flat_map(|update| decode_f32(update).unwrap())
            .collect()
    };
    let largest = values(&off)
        .iter()
        .zip(&values(&memory))
        .map(|(a, b)| (a - b).abs())
        .fold(0.0, f32::max);
    assert!(largest < 1e-3, "{largest}");
}

#[test]
fn the_best_model_is_the_one_with_the_highest_metric() {
    let spec = spec_with("name = \"fedavg\"", "", "", "epochs = 3");
    let mut trainer = trainer(&spec, &classification(60, 30));
    let mut payload = first_payload(&spec);
    let mut highest = f64::NEG_INFINITY;
    for round in 1..=3 {
        let result = trainer.train_round(round, &payload, &mut go_on).unwrap();
        payload = applied(&payload, result.update.payload());
        let published = trainer.after_aggregation(round, &payload).unwrap().unwrap();
        highest = highest.max(published.metrics["accuracy"]);
        let (name, value) = trainer.best().unwrap().facts.validation.clone().unwrap();
        assert_eq!(name, "accuracy");
        assert!((value - highest).abs() < 1e-12);
    }
}

#[test]
fn without_validation_rows_the_newest_model_is_kept() {
    let spec = spec("fedavg");
    let mut trainer = trainer(&spec, &classification(30, 0));
    let result = trainer
        .train_round(1, &first_payload(&spec), &mut go_on)
        .unwrap();
    assert_eq!(result.validation, None);
    assert_eq!(trainer.best(), None);
    for round in 1..=2 {
        assert_eq!(
            trainer
                .after_aggregation(round, &first_payload(&spec))
                .unwrap(),
            None
        );
        assert_eq!(trainer.best().unwrap().facts.round, round);
    }
}

#[test]
fn a_label_of_the_test_rows_that_is_unseen_in_training_is_an_error_at_evaluation() {
    let spec = spec("fedavg");
    let mut data = classification(30, 9);
    data.test[4].label = Label::Class("music".to_owned());
    let mut trainer = trainer(&spec, &data);
    trainer
        .train_round(1, &first_payload(&spec), &mut go_on)
        .unwrap();
    let error = trainer
        .evaluate(&first_payload(&spec), Split::Test)
        .unwrap_err()
        .to_string();
    assert!(
        error.contains("test row 4") && error.contains("`music`"),
        "{error}"
    );
}

#[test]
fn what_cannot_be_trained_on_is_refused_before_it_starts() {
    let refuse = |spec: &TrainingSpec, data: &TaskData| {
        try_trainer(spec, "north", data, CacheSettings::default(), None)
            .unwrap_err()
            .to_string()
    };
    let data = classification(30, 9);

    let mut unseen = data.clone();
    unseen.validation[2].label = Label::Class("music".to_owned());
    assert!(refuse(&spec("fedavg"), &unseen).contains("`music`"));

    let mut empty = data.clone();
    empty.train.clear();
    assert!(refuse(&spec("fedavg"), &empty).contains("no training rows"));

    let few = classification(3, 0);
    assert!(refuse(&spec("fedmcp"), &few).contains("at least 4 rows"));

    let mut pair = data.clone();
    pair.train[0].pair = Some("rain".to_owned());
    assert!(refuse(&spec("fedavg"), &pair).contains("train row 0"));

    let narrow = spec_with(
        "name = \"fedavg\"",
        "",
        "sharing = \"shared\"\nclasses = 2",
        "",
    );
    assert!(refuse(&narrow, &data).contains("head.classes"));

    let shared = spec_with(
        "name = \"fedrep\"",
        "",
        "sharing = \"shared\"\nclasses = 3",
        "",
    );
    assert!(refuse(&shared, &data).contains("head.sharing"));

    let unequal = spec_with("name = \"ditto\"", "private_bottleneck = 2", "", "");
    assert!(refuse(&unequal, &data).contains("private_bottleneck"));

    let spearman = spec_with("name = \"fedavg\"", "", "", "metric = \"spearman\"");
    assert!(refuse(&spearman, &data).contains("training.metric"));

    let mut other = spec("fedavg");
    other.backbone.digest = Some(Digest::of(b"another"));
    assert!(refuse(&other, &data).contains("digest"));
}

#[test]
fn fedmcp_without_mu_works_with_fewer_rows_than_the_estimate_needs() {
    let spec = spec_with("name = \"fedmcp\"\nmu = 0.0", "", "", "");
    let mut trainer = trainer(&spec, &classification(3, 0));
    trainer
        .train_round(1, &first_payload(&spec), &mut go_on)
        .unwrap();
}

#[test]
fn another_silos_jobs_or_damaged_states_are_refused() {
    let spec_a = spec("fedmcp");
    let data = classification(30, 0);
    let mut original = trainer(&spec_a, &data);
    original
        .train_round(1, &first_payload(&spec_a), &mut go_on)
        .unwrap();
    let state = original.save_state().unwrap();
    let resume = |spec: &TrainingSpec, name: &str, state: &SavedState| {
        try_trainer(
            spec,
            name,
            &data,
            CacheSettings::default(),
            Some(state.clone()),
        )
        .map(drop)
        .map_err(|error| error.to_string())
    };
    assert!(resume(&spec_a, "north", &state).is_ok());
    assert!(
        resume(&spec_a, "south", &state)
            .unwrap_err()
            .contains("another silo")
    );
    let other = spec_with("name = \"fedmcp\"\nmu = 0.0", "", "", "");
    assert!(
        resume(&other, "north", &state)
            .unwrap_err()
            .contains("another specification")
    );

    let (mut tensors, facts) = crate::named::from_safetensors(&state.to_bytes().unwrap()).unwrap();
    tensors.remove("adam.v.head.bias").unwrap();
    let damaged =
        SavedState::from_bytes(&crate::named::to_safetensors(&tensors, &facts).unwrap()).unwrap();
    assert!(
        resume(&spec_a, "north", &damaged)
            .unwrap_err()
            .contains("adam.v.head.bias")
    );
}

#[test]
fn a_payload_of_another_size_or_with_infinities_is_refused_and_training_goes_on() {
    let spec = spec("fedmcp");
    let mut trainer = trainer(&spec, &classification(30, 0));
    let good = first_payload(&spec);
    assert!(trainer.train_round(1, &good[4..], &mut go_on).is_err());
    let mut bad = good.clone();
    bad[..4].copy_from_slice(&f32::NAN.to_le_bytes());
    let error = trainer
        .train_round(1, &bad, &mut go_on)
        .unwrap_err()
        .to_string();
    assert!(error.contains("layer.0.down.weight"), "{error}");
    trainer.train_round(1, &good, &mut go_on).unwrap();
}

#[test]
fn a_learning_rate_that_blows_up_is_reported_and_undone() {
    let spec = spec_with(
        "name = \"fedavg\"",
        "init_up = 1.0",
        "",
        "clip_norm = 0.0\nepochs = 5",
    );
    let mut wild = spec.clone();
    wild.training.learning_rate = 1e30;
    let mut trainer = trainer(&wild, &classification(30, 0));
    let error = trainer
        .train_round(1, &first_payload(&wild), &mut go_on)
        .unwrap_err()
        .to_string();
    assert!(
        error.contains("round 1") && error.contains("learning rate"),
        "{error}"
    );
    assert_eq!(trainer.last_round(), 0);
}

#[test]
fn only_the_wanted_number_of_rows_is_used() {
    let spec = spec_with("name = \"fedavg\"", "", "", "max_examples = 10");
    let data = classification(30, 0);
    let mut north = trainer(&spec, &data);
    assert_eq!(north.examples(), 10);
    north
        .train_round(1, &first_payload(&spec), &mut go_on)
        .unwrap();
    assert_eq!(north.cache_stats().misses, 10);
    let south = try_trainer(&spec, "south", &data, CacheSettings::default(), None).unwrap();
    assert_ne!(north.rows, south.rows);
}

#[test]
fn trainers_can_share_prepared_rows() {
    let spec = spec("fedavg");
    let backbone = backbone(Kind::Float);
    let data = classification(30, 0);
    let task = Arc::new(
        PreparedTask::new(
            &data,
            &backbone,
            &tokenizer(&backbone),
            spec.training.max_length as usize,
            first_layer(&spec),
            CacheSettings::default(),
        )
        .unwrap(),
    );
    let with = |spec: &TrainingSpec| {
        LocalTrainer::with_task(spec, &silo("north"), backbone.clone(), task.clone(), None)
    };
    let mut first = with(&spec).unwrap();
    let alone = trainer(&spec, &data)
        .train_round(1, &first_payload(&spec), &mut go_on)
        .unwrap();
    let shared = first
        .train_round(1, &first_payload(&spec), &mut go_on)
        .unwrap();
    assert_eq!(shared.update, alone.update);
    let misses = task.cache_stats().misses;
    let again = with(&spec)
        .unwrap()
        .train_round(1, &first_payload(&spec), &mut go_on)
        .unwrap();
    assert_eq!(again.update, alone.update);
    assert_eq!(task.cache_stats().misses, misses);

    let mut top = spec.clone();
    top.adapter.layers = [1].into();
    assert!(with(&top).is_err());
}

#[test]
fn a_trainer_can_be_handed_to_the_torch_thread() {
    fn send<T: Send>() {}
    send::<LocalTrainer>();
    send::<SavedState>();
    send::<PersonalModel>();
    send::<RoundResult>();
}

#[test]
fn trap_6_silos_with_unlike_label_sets_share_an_adapter_and_no_head() {
    let spec = spec("fedmcp");
    let three = classification(30, 0);
    let mut two = three.clone();
    two.train
        .retain(|row| row.label != Label::Class("food".to_owned()));
    two.problem = Problem::Classification {
        classes: TaskData::classes_of(&two.train).unwrap(),
    };
    let first = first_payload(&spec);
    let outputs = |name: &str, data: &TaskData| {
        let mut trainer = try_trainer(&spec, name, data, CacheSettings::default(), None).unwrap();
        let update = trainer.train_round(1, &first, &mut go_on).unwrap().update;
        assert!(
            update
                .layout()
                .tensors()
                .iter()
                .all(|tensor| !tensor.name.contains("head"))
        );
        let model = trainer.personal_model(&first).unwrap();
        (
            update.payload().len(),
            model.tensors["head.bias"].values.len(),
        )
    };
    let ((bytes_a, classes_a), (bytes_b, classes_b)) =
        (outputs("north", &three), outputs("south", &two));
    assert_eq!(bytes_a, bytes_b);
    assert_eq!((classes_a, classes_b), (3, 2));
}

#[test]
fn trap_6_a_shared_head_serves_unlike_label_sets_by_its_first_outputs() {
    let spec = spec_with(
        "name = \"fedavg\"",
        "",
        "sharing = \"shared\"\nclasses = 5",
        "",
    );
    let mut trainer = trainer(&spec, &classification(30, 0));
    let first = first_payload(&spec);
    let result = trainer.train_round(1, &first, &mut go_on).unwrap();
    let layout = spec.adapter_shape().layout().unwrap();
    let update = concord_common::adapter::split_payload(&layout, result.update.payload()).unwrap();
    let bias = &update["head.bias"];
    assert!(bias[..3].iter().all(|x| *x != 0.0), "{bias:?}");
    // The others see neither a gradient nor, being 0, decay.
    assert!(bias[3..].iter().all(|x| *x == 0.0), "{bias:?}");
    assert_eq!(
        trainer.personal_model(&first).unwrap().tensors["head.bias"].shape,
        [3]
    );
}
