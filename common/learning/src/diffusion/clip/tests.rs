//! Agreement with Python's `transformers`.

use super::*;
use crate::diffusion::testing::{self, CHECKPOINTS, FORWARD, GRADIENT, PLAIN, Spelling};

fn load(name: &str, spelling: Spelling, kind: Kind) -> ClipText {
    let folder = testing::checkpoint(name, spelling);
    ClipText::load(&folder.path().join("text_encoder"), testing::compute(kind)).unwrap()
}

#[test]
fn hidden_states_and_gradients_agree_with_transformers() {
    for name in CHECKPOINTS {
        let reference = testing::results(name, "reference.safetensors");
        let ids = reference.tensor("ids").unwrap();
        for ((kind, bound), (_, gradient_bound)) in FORWARD.into_iter().zip(GRADIENT) {
            let encoder = load(name, PLAIN, kind);
            testing::track(encoder.tensors());
            let hidden = encoder.run(&ids).unwrap();
            let theirs = reference
                .tensor(&format!("{}.text", testing::prefix(kind)))
                .unwrap();
            let apart = testing::apart(&hidden.slice(2, None, None, 3), &theirs);
            println!("clip {name} {kind:?}: forward {apart:.1e}");
            assert!(apart < bound, "{name} {kind:?}: {apart}");
            let apart = testing::gradients_apart(name, "text", &hidden, encoder.tensors());
            println!("clip {name} {kind:?}: gradients {apart:.1e}");
            assert!(apart < gradient_bound, "{name} {kind:?}: {apart}");
        }
    }
}

#[test]
fn names_with_the_model_in_front_are_read() {
    let prefixed = Spelling {
        name: |part, name| {
            if part == "text_encoder" {
                format!("text_model.{name}")
            } else {
                name.to_owned()
            }
        },
        ..PLAIN
    };
    let ids = Tensor::from_slice(&[521_i64, 4, 522]).view([1, 3]);
    let with = load("sd1", prefixed, Kind::Float).run(&ids).unwrap();
    let without = load("sd1", PLAIN, Kind::Float).run(&ids).unwrap();
    assert_eq!(testing::apart(&with, &without), 0.0);
}

#[test]
fn ids_outside_the_vocabulary_and_long_texts_are_refused() {
    let encoder = load("sd1", PLAIN, Kind::Float);
    for ids in [
        Tensor::from_slice(&[0_i64, 523]).view([1, 2]),
        Tensor::from_slice(&[-1_i64, 5]).view([1, 2]),
        Tensor::zeros([1, 78], (Kind::Int64, encoder.compute.device)),
    ] {
        assert!(matches!(encoder.run(&ids), Err(LearningError::Data(_))));
    }
}
