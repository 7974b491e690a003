mod folder;
mod interop;

use std::path::PathBuf;

use tch::{Kind, Tensor};

use super::*;
use crate::reference::Reference;

const FAMILIES: [&str; 4] = ["bert", "roberta", "xlm-roberta", "distilbert"];

fn fixture(family: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("fixtures")
        .join(family)
}

fn backbone(family: &str, kind: Kind) -> Backbone {
    Backbone::load(&fixture(family), kind).unwrap()
}

const POSITIONS: [AdapterPosition; 2] = [AdapterPosition::Ffn, AdapterPosition::Attention];

fn reference(family: &str) -> Reference {
    reference_at(family, AdapterPosition::Ffn)
}

/// The same batch and adapters in every position.
fn reference_at(family: &str, position: AdapterPosition) -> Reference {
    let name = match position {
        AdapterPosition::Ffn => "reference.safetensors",
        AdapterPosition::Attention => "reference-attention.safetensors",
    };
    Reference::read(&fixture(family).join(name)).unwrap()
}

fn largest_difference(a: &Tensor, b: &Tensor) -> f64 {
    assert_eq!(a.size(), b.size());
    (a - b).abs().max().double_value(&[])
}

#[test]
fn the_prefix_and_the_rest_give_the_same_bits_as_the_whole() {
    for (family, position) in FAMILIES
        .into_iter()
        .flat_map(|family| POSITIONS.map(|position| (family, position)))
    {
        let backbone = backbone(family, Kind::Float);
        let reference = reference(family);
        let batch = reference.batch();
        let mut plain = NoHook(position);
        let whole = backbone.forward(batch, &mut plain).unwrap();
        for layer in 0..backbone.config().layers {
            let first = Place { layer, position };
            let prefix = backbone.run_prefix(batch, first).unwrap();
            let output = backbone
                .run_from_prefix(&prefix, &batch.mask, &mut plain)
                .unwrap();
            assert_eq!(output, whole, "{family}, first adapter at {first:?}");
        }
    }
}

#[test]
fn a_prefix_is_never_written_to() {
    let backbone = backbone("xlm-roberta", Kind::Float);
    for position in POSITIONS {
        let reference = reference_at("xlm-roberta", position);
        let batch = reference.batch();
        let mut adapters = reference.adapters(Kind::Float).unwrap();
        for layer in 0..2 {
            let first = Place { layer, position };
            let prefix = backbone.run_prefix(batch, first).unwrap();
            let before = [prefix.output.copy(), prefix.residual.copy()];
            let hooks: [&mut dyn LayerHook; 2] = [&mut NoHook(position), &mut adapters];
            for hook in hooks {
                let _ = backbone
                    .run_from_prefix(&prefix, &batch.mask, hook)
                    .unwrap();
                assert_eq!([&prefix.output, &prefix.residual], before.each_ref());
            }
        }
    }
}

#[test]
fn adapters_on_a_prefix_give_the_same_bits_as_on_the_whole() {
    // The adapters of the XLM-R fixture stand in layer 1 alone.
    let backbone = backbone("xlm-roberta", Kind::Float);
    let [after_ffn, after_attention] = POSITIONS.map(|position| {
        let reference = reference_at("xlm-roberta", position);
        let batch = reference.batch();
        let mut adapters = reference.adapters(Kind::Float).unwrap();
        let plain = backbone.forward(batch, &mut NoHook(position)).unwrap();
        let whole = backbone.forward(batch, &mut adapters).unwrap();
        let first = Place { layer: 1, position };
        let prefix = backbone.run_prefix(batch, first).unwrap();
        let output = backbone
            .run_from_prefix(&prefix, &batch.mask, &mut adapters)
            .unwrap();
        assert_eq!(output, whole, "{position}");
        assert!(largest_difference(&whole, &plain) > 0.01, "{position}");
        assert!(output.requires_grad());
        assert!(!prefix.output.requires_grad() && !prefix.residual.requires_grad());
        output
    });
    assert!(largest_difference(&after_ffn, &after_attention) > 0.01);
}

#[test]
fn a_prefix_serves_no_adapters_of_another_position() {
    let backbone = backbone("bert", Kind::Float);
    let reference = reference("bert");
    let batch = reference.batch();
    let first = Place {
        layer: 1,
        position: AdapterPosition::Attention,
    };
    let prefix = backbone.run_prefix(batch, first).unwrap();
    let error = backbone
        .run_from_prefix(&prefix, &batch.mask, &mut NoHook::default())
        .unwrap_err()
        .to_string();
    assert!(
        error.contains("position attention, these have ffn"),
        "{error}"
    );
}

#[test]
fn layers_run_in_two_parts_give_the_same_bits_as_in_one() {
    let backbone = backbone("bert", Kind::Float);
    let reference = reference("bert");
    let batch = reference.batch();
    let whole = backbone.forward(batch, &mut NoHook::default()).unwrap();
    let lower = backbone.embed(batch).unwrap();
    let lower = backbone
        .run_layers(&lower, &batch.mask, 0..1, &mut NoHook::default())
        .unwrap();
    let upper = backbone
        .run_layers(&lower, &batch.mask, 1..2, &mut NoHook::default())
        .unwrap();
    assert_eq!(upper, whole);
}

#[test]
fn padding_changes_nothing_in_the_rows_it_fills() {
    for family in FAMILIES {
        let backbone = backbone(family, Kind::Double);
        let reference = reference(family);
        let batch = reference.batch();
        let together = backbone.forward(batch, &mut NoHook::default()).unwrap();
        for row in 0..batch.mask.size()[0] {
            let tokens = batch.mask.get(row).sum(Kind::Int64).int64_value(&[]);
            let cut = |tensor: &Tensor| tensor.narrow(0, row, 1).narrow(1, 0, tokens);
            let alone = Batch {
                input_ids: cut(&batch.input_ids),
                token_types: cut(&batch.token_types),
                mask: cut(&batch.mask),
            };
            let output = backbone.forward(&alone, &mut NoHook::default()).unwrap();
            assert!(
                largest_difference(&output, &cut(&together)) < 1e-12,
                "{family}, row {row}"
            );
        }
    }
}

#[test]
fn token_types_matter_to_bert_alone() {
    for family in FAMILIES {
        let backbone = backbone(family, Kind::Double);
        let reference = reference(family);
        let batch = reference.batch();
        let swapped = Batch {
            input_ids: batch.input_ids.shallow_clone(),
            token_types: batch.token_types.ones_like(),
            mask: batch.mask.shallow_clone(),
        };
        let before = backbone.forward(batch, &mut NoHook::default()).unwrap();
        let after = backbone.forward(&swapped, &mut NoHook::default()).unwrap();
        let difference = largest_difference(&before, &after);
        assert_eq!(difference > 0.0, family == "bert", "{family}");
    }
}

#[test]
fn the_weights_are_frozen() {
    let backbone = backbone("distilbert", Kind::Float);
    let output = backbone
        .forward(reference("distilbert").batch(), &mut NoHook::default())
        .unwrap();
    assert!(!output.requires_grad());
}

#[test]
fn a_row_longer_than_the_positions_is_refused() {
    for family in FAMILIES {
        let backbone = backbone(family, Kind::Float);
        let long = Tensor::full([1, 33], 5, (Kind::Int64, tch::Device::Cpu));
        let batch = Batch {
            input_ids: long.shallow_clone(),
            token_types: long.zeros_like(),
            mask: long.ones_like(),
        };
        let error = backbone.embed(&batch).unwrap_err().to_string();
        assert!(error.contains("33 tokens"), "{error}");
        assert!(error.contains("positions for 32"), "{error}");

        let longest = Batch {
            input_ids: batch.input_ids.narrow(1, 0, 32),
            token_types: batch.token_types.narrow(1, 0, 32),
            mask: batch.mask.narrow(1, 0, 32),
        };
        assert!(
            backbone.forward(&longest, &mut NoHook::default()).is_ok(),
            "{family}"
        );
    }
}

#[test]
fn a_row_of_nothing_but_padding_is_refused() {
    let backbone = backbone("bert", Kind::Float);
    let reference = reference("bert");
    let batch = Batch {
        input_ids: reference.batch().input_ids.shallow_clone(),
        token_types: reference.batch().token_types.shallow_clone(),
        mask: reference.batch().mask.zeros_like(),
    };
    let error = backbone
        .forward(&batch, &mut NoHook::default())
        .unwrap_err();
    assert!(error.to_string().contains("all padding"), "{error}");
}

#[test]
fn a_batch_of_unlike_shapes_is_refused() {
    let backbone = backbone("bert", Kind::Float);
    let reference = reference("bert");
    let batch = Batch {
        input_ids: reference.batch().input_ids.shallow_clone(),
        token_types: reference.batch().token_types.narrow(0, 0, 1),
        mask: reference.batch().mask.shallow_clone(),
    };
    assert!(backbone.embed(&batch).is_err());
}

#[test]
fn an_id_outside_the_vocabulary_is_an_error_and_no_crash() {
    let backbone = backbone("bert", Kind::Float);
    let ids = Tensor::full([1, 3], 90, (Kind::Int64, tch::Device::Cpu));
    let batch = Batch {
        token_types: ids.zeros_like(),
        mask: ids.ones_like(),
        input_ids: ids,
    };
    assert!(matches!(
        backbone.embed(&batch),
        Err(LearningError::Torch(_))
    ));
}

#[test]
fn a_layer_that_does_not_exist_is_refused() {
    let backbone = backbone("bert", Kind::Float);
    let reference = reference("bert");
    let batch = reference.batch();
    let beyond = Place {
        layer: 2,
        position: AdapterPosition::Ffn,
    };
    let error = backbone.run_prefix(batch, beyond).unwrap_err().to_string();
    assert!(error.contains("no layer 2: this backbone has 2"), "{error}");
    let hidden = backbone.embed(batch).unwrap();
    assert!(
        backbone
            .run_layers(&hidden, &batch.mask, 0..3, &mut NoHook::default())
            .is_err()
    );
}
