//! What leaves the silo, and what does not.

use concord_common::adapter::{decode_f32, split_payload};

use super::*;
use crate::data::Label;
use crate::testing::{
    applied, classification, first_payload, go_on, spec, spec_with, trainer, try_trainer,
};

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
    let update = split_payload(&layout, result.update.payload()).unwrap();
    let bias = &update["head.bias"];
    assert!(bias[..3].iter().all(|x| *x != 0.0), "{bias:?}");
    // The others see neither a gradient nor, being 0, decay.
    assert!(bias[3..].iter().all(|x| *x == 0.0), "{bias:?}");
    assert_eq!(
        trainer.personal_model(&first).unwrap().tensors["head.bias"].shape,
        [3]
    );
}
