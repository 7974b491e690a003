//! What each algorithm does to the adapters.

use concord_common::adapter::decode_f32;

use super::*;
use crate::testing::{
    applied, classification, first_payload, go_on, regression, spec, spec_with, trainer,
};

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
fn fedrep_trains_the_head_and_the_rest_apart() {
    let spec = spec_with("name = \"fedrep\"\nhead_epochs = 2", "", "", "epochs = 3");
    let mut trainer = trainer(&spec, &classification(30, 0));
    let result = trainer
        .train_round(1, &first_payload(&spec), &mut go_on)
        .unwrap();
    assert!(number(&result.training, "update_norm") > 0.1);
    // 4 batches an epoch.
    for (name, counters) in trainer.optimiser.counters() {
        let updates = if name.starts_with("head.") { 8 } else { 12 };
        assert_eq!(counters.lifetime, updates, "{name}");
    }
    assert_eq!(trainer.optimiser.counters().len(), 2 + 2 * 4);
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
