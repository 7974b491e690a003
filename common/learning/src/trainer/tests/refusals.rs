//! What is refused, and in which words.

use super::*;
use crate::{
    data::Label,
    testing::{classification, first_payload, go_on, spec, spec_with, trainer, try_trainer},
};

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
    let moved = spec_with("name = \"fedmcp\"", "position = \"attention\"", "", "");
    assert!(
        resume(&moved, "north", &state)
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
    // Which rows it was: batches of 8 out of 30.
    assert!(
        error.contains(" training rows from ") && error.contains("counted from 0: "),
        "{error}"
    );
    assert_eq!(trainer.last_round(), 0);
}
