//! Agreement with Python's `transformers`.

use std::fs;

use concord_common::seed::Seed;

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
    assert!(testing::same(&with, &without));
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

/// Files of others can be anything: whatever is changed in the header, the configuration or the length, the loader gives a model or an error.
#[test]
fn damaged_files_never_bring_the_loader_down() {
    let folder = testing::checkpoint("sd2", PLAIN);
    let home = folder.path().join("text_encoder");
    let (weights, config) = (home.join("model.safetensors"), home.join("config.json"));
    let (good_weights, good_config) = (fs::read(&weights).unwrap(), fs::read(&config).unwrap());
    let header = 8 + u64::from_le_bytes(good_weights[..8].try_into().unwrap()) as usize;
    let mut rng = Seed(11).rng();
    let mut refused = 0;
    for round in 0..300 {
        let (mut bytes, mut text) = (good_weights.clone(), good_config.clone());
        match round % 4 {
            0 => bytes.truncate(rng.below(bytes.len() as u64) as usize),
            1 => text.truncate(rng.below(text.len() as u64) as usize),
            2 => {
                let place = rng.below(header as u64) as usize;
                bytes[place] = b"0123456789{}[]\",:-\xff\0F"[rng.below(21) as usize];
            }
            _ => {
                let place = rng.below(text.len() as u64) as usize;
                text[place] = b"0123456789{}[]\",:-\xff\0F"[rng.below(21) as usize];
            }
        }
        fs::write(&weights, bytes).unwrap();
        fs::write(&config, text).unwrap();
        refused += usize::from(ClipText::load(&home, Compute::CPU).is_err());
    }
    assert!(refused > 200, "{refused}");
}
