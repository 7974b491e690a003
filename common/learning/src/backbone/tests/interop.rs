//! Agreement with Python's `transformers`.

use std::env;

use super::*;
use crate::{
    reference::{Bounds, mean_pool},
    tokenize::{TextTokenizer, pad},
};

fn agrees(family: &str) {
    for position in POSITIONS {
        let reference = reference_at(family, position);
        for (kind, bounds) in [(Kind::Float, Bounds::F32), (Kind::Double, Bounds::F64)] {
            let found = reference.compare(&backbone(family, kind)).unwrap();
            assert!(
                found.within(bounds),
                "{family}, {position}, in {kind:?}: {found:?}"
            );
        }
    }
}

#[test]
fn bert_with_adapters_agrees_with_transformers() {
    agrees("bert");
}

#[test]
fn roberta_with_adapters_agrees_with_transformers() {
    agrees("roberta");
}

#[test]
fn xlm_roberta_with_adapters_agrees_with_transformers() {
    agrees("xlm-roberta");
}

#[test]
fn distilbert_with_adapters_agrees_with_transformers() {
    agrees("distilbert");
}

/// The comparison must be able to fail: with another weight anywhere the results are far apart.
#[test]
fn a_backbone_with_other_weights_does_not_agree() {
    let mut other = backbone("bert", Kind::Double);
    other.layers.swap(0, 1);
    for position in POSITIONS {
        let found = reference_at("bert", position).compare(&other).unwrap();
        assert!(found.forward > 1e-2, "{position}: {found:?}");
        assert!(found.gradient > 1e-3, "{position}: {found:?}");
    }
}

/// Cosines of mean-pooled sentences as the published model gives them.
#[test]
fn minilm_puts_sentences_where_the_published_model_does() {
    let folder = env::var("CONCORD_MINILM").expect(
        "CONCORD_MINILM must name the folder of the MiniLM-L6 backbone; `make test` fetches it and sets the variable",
    );
    let files = BackboneFiles::find(Path::new(&folder))
        .unwrap_or_else(|error| panic!("CONCORD_MINILM={folder}: {error}"));
    let backbone = Backbone::load(Path::new(&folder), Kind::Float)
        .unwrap_or_else(|error| panic!("CONCORD_MINILM={folder}: {error}"));
    let tokenizer = TextTokenizer::load(&files.tokenizer, backbone.config(), 128)
        .unwrap_or_else(|error| panic!("CONCORD_MINILM={folder}: {error}"));

    let rows = tokenizer
        .encode_all(&[
            ("That is a happy person", None),
            ("That is a happy dog", None),
            ("That is a very happy person", None),
        ])
        .unwrap();
    let rows: Vec<_> = rows.iter().collect();
    let batch = pad(&rows, backbone.config().pad_id).unwrap();
    let hidden = backbone.forward(&batch, &mut NoHook::default()).unwrap();
    let pooled = mean_pool(&hidden, &batch.mask).unwrap();
    let cosine = |other: i64| {
        Tensor::cosine_similarity(&pooled.get(0), &pooled.get(other), 0, 1e-8).double_value(&[])
    };
    assert!((cosine(1) - 0.6946).abs() < 1e-4, "{}", cosine(1));
    assert!((cosine(2) - 0.9429).abs() < 1e-4, "{}", cosine(2));
}
