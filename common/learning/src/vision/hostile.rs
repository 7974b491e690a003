//! Files of weights, tables and projections can be anything: what is wrong with one is an error that names what is wrong, and nothing comes down.

use std::fs;

use proptest::{prelude::*, test_runner::TestRunner};

use super::{
    Alignment, AlignmentFacts, AlignmentSettings, EfficientNetLite0, Picture, Rows,
    tests::{fixture, seeded_weights},
};
use crate::{
    brisque::Brisque,
    diffusion::hostile::damage::{Damage, damage, damaged_beside_metadata, named},
    error::LearningError,
    named::{HostTensor, NamedTensors, to_safetensors},
};

fn runs(cases: u32, test: impl Fn(Damage) -> Result<(), TestCaseError>) {
    let mut runner = TestRunner::new(ProptestConfig {
        cases,
        failure_persistence: None,
        ..ProptestConfig::default()
    });
    runner.run(&damage(), test).unwrap();
}

fn tensors(shapes: &[(&str, &[usize])]) -> NamedTensors {
    shapes
        .iter()
        .map(|(name, shape)| {
            let count: usize = shape.iter().product();
            let values = (0..count).map(|place| 0.5 + (place % 7) as f32).collect();
            let shape = shape.to_vec();
            ((*name).to_owned(), HostTensor { shape, values })
        })
        .collect()
}

#[test]
fn damaged_weights_of_efficientnet_are_a_named_error_or_a_usable_network() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("model.safetensors");
    let good = to_safetensors(&seeded_weights(&fixture()), "").unwrap();
    let pixels = vec![90; 3 * 32 * 32];
    let picture = Picture {
        width: 32,
        height: 32,
        pixels: &pixels,
    };
    runs(40, |damage| {
        fs::write(&file, damaged_beside_metadata(&good, &damage)).unwrap();
        if let Some(network) = named(EfficientNetLite0::load(&file), &file)? {
            let (features, looks) = network.see(&[picture], 32).unwrap();
            prop_assert_eq!((features.len(), looks.len()), (1, 1));
        }
        Ok(())
    });
}

#[test]
fn a_damaged_table_of_brisque_is_a_named_error_or_gives_a_number() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("model.safetensors");
    let shapes: [(&str, &[usize]); 6] = [
        ("low", &[36]),
        ("high", &[36]),
        ("vectors", &[770, 36]),
        ("coefficients", &[770]),
        ("gamma", &[1]),
        ("rho", &[1]),
    ];
    let good = to_safetensors(&tensors(&shapes), "").unwrap();
    let pixels: Vec<u8> = (0..3 * 32 * 32_u32).map(|x| (x * x % 251) as u8).collect();
    let picture = Picture {
        width: 32,
        height: 32,
        pixels: &pixels,
    };
    fs::write(&file, &good).unwrap();
    Brisque::load(&file).unwrap().score(picture).unwrap();
    runs(200, |damage| {
        fs::write(&file, damaged_beside_metadata(&good, &damage)).unwrap();
        if let Some(table) = named(Brisque::load(&file), &file)? {
            // It need not be finite: a score that is not is a missing one.
            prop_assert!(table.score(picture).is_ok());
        }
        Ok(())
    });
}

#[test]
fn damaged_projections_are_an_error_or_project() {
    let shapes: [(&str, &[usize]); 7] = [
        ("image.mean", &[5]),
        ("image.spread", &[5]),
        ("image.weight", &[3, 5]),
        ("image.bias", &[3]),
        ("text.weight", &[3, 4]),
        ("text.bias", &[3]),
        ("scale", &[1]),
    ];
    let digest = concord_common::Digest::of(b"tower");
    let facts = AlignmentFacts {
        vision: digest,
        text: digest,
        side: 64,
        looks: false,
        settings: AlignmentSettings::default(),
        data: digest,
        low: 0.1,
        typical: 0.2,
    };
    let facts = serde_json::to_string(&facts).unwrap();
    let good = to_safetensors(&tensors(&shapes), &facts).unwrap();
    Alignment::from_bytes(&good).unwrap();
    runs(400, |damage| {
        match Alignment::from_bytes(&damaged_beside_metadata(&good, &damage)) {
            Ok((alignment, _)) => {
                // Of another width than the towers' they do not fit, which is told when they are used.
                let rows = Rows::new(4, vec![1.0; 4]).unwrap();
                if let Ok(projected) = alignment.project_texts(&rows) {
                    prop_assert_eq!(projected.width(), alignment.width());
                }
            }
            Err(error) => prop_assert!(
                matches!(error, LearningError::State(_) | LearningError::Payload(_)),
                "{}",
                error
            ),
        }
        Ok(())
    });
}

#[test]
fn facts_that_are_none_are_an_error_that_says_so() {
    let tensors = tensors(&[("scale", &[1])]);
    for facts in ["", "{}", "[1]", "null", "{\"vision\":3}", "\u{0}"] {
        let bytes = to_safetensors(&tensors, facts).unwrap();
        let refusal = Alignment::from_bytes(&bytes).unwrap_err().to_string();
        assert!(refusal.contains("facts"), "{facts:?}: {refusal}");
    }
}
