//! Data at the edge of what can be trained on.

use super::*;
use crate::{
    data::{Label, Row},
    testing::{
        classification, first_payload, go_on, regression, spec, spec_with, trainer, try_trainer,
    },
};

#[test]
fn one_training_row_is_enough_for_every_algorithm_that_compares_no_rows() {
    for algorithm in ALGORITHMS {
        let mu = if algorithm == "fedmcp" {
            "mu = 0.0"
        } else {
            ""
        };
        let spec = spec_with(&format!("name = \"{algorithm}\"\n{mu}"), "", "", "");
        for mut data in [classification(1, 3), regression(1, 3)] {
            // Only the classes of the training row are known.
            data.validation
                .retain(|row| row.label == data.train[0].label);
            let mut trainer = trainer(&spec, &data);
            let (payload, _) = federate(&mut trainer, first_payload(&spec), 1..=2);
            let evaluation = trainer.evaluate(&payload, Split::Validation).unwrap();
            assert!(evaluation.metrics.values().all(|value| value.is_finite()));
        }
    }
}

#[test]
fn equal_targets_are_learnt_as_they_are_and_do_not_blow_the_scale_up() {
    let mut data = regression(12, 3);
    for row in data.train.iter_mut().chain(&mut data.validation) {
        // The mean of twelve of them is not 0.1 to the bit.
        row.label = Label::Value(0.1);
    }
    data.validation[0].label = Label::Value(0.6);
    let spec = spec_with("name = \"fedavg\"", "", "", "epochs = 5");
    let mut trainer = trainer(&spec, &data);
    assert!((trainer.task().scale().std - 1.0).abs() < 1e-12);
    let (payload, _) = federate(&mut trainer, first_payload(&spec), 1..=2);
    let evaluation = trainer.evaluate(&payload, Split::Validation).unwrap();
    // One of three is half a unit away, the others are met.
    let loss = evaluation.metrics["loss"];
    assert!((loss - 0.25 / 3.0).abs() < 0.05, "{loss}");
}

#[test]
fn a_batch_of_one_class_or_a_task_of_one_class_trains() {
    let spec = spec("fedmcp");
    let mut data = classification(24, 6);
    // Rows in the order of their classes, and batches of 8 in the order of the rows.
    data.train.sort_by_key(|row| format!("{:?}", row.label));
    let mut sorted = trainer(&spec, &data);
    sorted.set_batching(Batching::InOrder);
    federate(&mut sorted, first_payload(&spec), 1..=2);

    let only = data.train[0].label.clone();
    data.train.retain(|row| row.label == only);
    data.validation.retain(|row| row.label == only);
    data.problem = Problem::Classification {
        classes: TaskData::classes_of(&data.train).unwrap(),
    };
    let mut single = trainer(&spec, &data);
    let (payload, _) = federate(&mut single, first_payload(&spec), 1..=1);
    let evaluation = single.evaluate(&payload, Split::Validation).unwrap();
    assert!((evaluation.metrics["accuracy"] - 1.0).abs() < 1e-12);
    assert!(evaluation.metrics["mcc"].abs() < 1e-12);
}

#[test]
fn an_empty_text_is_a_row_like_any_other() {
    let spec = spec("fedmcp");
    let mut data = classification(16, 6);
    let label = data.train[0].label.clone();
    for rows in [&mut data.train, &mut data.validation] {
        rows.push(Row {
            text: String::new(),
            pair: None,
            label: label.clone(),
        });
    }
    let mut trainer = trainer(&spec, &data);
    let (payload, updates) = federate(&mut trainer, first_payload(&spec), 1..=1);
    assert!(updates[0].iter().any(|byte| *byte != 0));
    assert_eq!(
        trainer.evaluate(&payload, Split::Validation).unwrap().rows,
        7
    );
}

#[test]
fn a_last_batch_too_short_to_compare_does_not_water_the_similarities_down() {
    let spec = spec("fedmcp");
    let data = classification(9, 0);
    let mut trainer = try_trainer(&spec, "north", &data, CacheSettings::default(), None).unwrap();
    trainer.set_batching(Batching::InOrder);
    let result = trainer
        .train_round(1, &first_payload(&spec), &mut go_on)
        .unwrap();
    assert!((number(&result.training, "steps") - 2.0).abs() < 1e-12);
    // Batches of 8 and 1 rows. In the first step the global adapter still is what was received: entirely similar to it.
    let similar = number(&result.training, "cka_pull");
    assert!((similar - 1.0).abs() < 1e-3, "{similar}");
}
