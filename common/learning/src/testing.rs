//! A tiny backbone and toy tasks for the tests of this crate.

use std::{
    path::{Path, PathBuf},
    sync::Arc,
};

use concord_common::{
    SiloId,
    job::{JobSpec, TrainingSpec},
    seed::Seed,
};
use tch::{Kind, Tensor};

use crate::{
    backbone::{Backbone, BackboneFiles},
    cache::CacheSettings,
    data::{InputKind, Label, Problem, Row, TaskData},
    error::LearningError,
    named::HostTensor,
    tokenize::TextTokenizer,
    trainer::{Continue, LocalTrainer, Progress, SavedState, TrainerSetup},
};

pub(crate) const MAX_LENGTH: usize = 24;

pub(crate) fn fixture() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("fixtures/bert")
}

/// BERT with 2 layers of width 24 and random weights.
pub(crate) fn backbone(kind: Kind) -> Arc<Backbone> {
    Arc::new(Backbone::load(&fixture(), kind).unwrap())
}

pub(crate) fn tokenizer(backbone: &Backbone) -> TextTokenizer {
    let files = BackboneFiles::find(&fixture()).unwrap();
    TextTokenizer::load(&files.tokenizer, backbone.config(), MAX_LENGTH).unwrap()
}

pub(crate) fn silo(name: &str) -> SiloId {
    name.parse().unwrap()
}

/// A specification for the tiny backbone. `lines` go before the tables.
pub(crate) fn spec_with(
    algorithm: &str,
    adapter: &str,
    head: &str,
    training: &str,
) -> TrainingSpec {
    let text = format!(
        r#"
kind = "federated-training"
name = "toy"
task = "toy"
seed = 7
[backbone]
name = "tiny"
hidden = 24
layers = 2
[adapter]
bottleneck = 4
{adapter}
[head]
{head}
[algorithm]
{algorithm}
[training]
batch_size = 8
learning_rate = 0.02
head_learning_rate = 0.02
max_length = 24
{training}
[rounds]
count = 3
"#
    );
    JobSpec::parse(&text).unwrap().training().clone()
}

pub(crate) fn spec(algorithm: &str) -> TrainingSpec {
    spec_with(&format!("name = \"{algorithm}\""), "", "", "")
}

/// The job's first global adapter.
pub(crate) fn first_payload(spec: &TrainingSpec) -> Vec<u8> {
    spec.adapter_shape()
        .initial_payload(
            spec.initial_scale(),
            Seed(spec.seed).derive("global-adapter"),
        )
        .unwrap()
}

const FILLERS: [&str; 8] = ["the", "old", "town", "at", "an", "letter", "clock", "of"];

/// One to three fillers around one or two of the word.
fn sentence(words: &mut concord_common::seed::Rng, word: &str) -> String {
    let mut parts = vec![word; 1 + words.below(2) as usize];
    for _ in 0..=words.below(3) {
        let place = words.below(parts.len() as u64 + 1) as usize;
        parts.insert(place, FILLERS[words.below(FILLERS.len() as u64) as usize]);
    }
    parts.join(" ")
}

/// Rows whose class is that of their one word out of "rain", "apples" and "boat".
pub(crate) fn classification(train: usize, other: usize) -> TaskData {
    let rows = |n: usize, seed: u64| -> Vec<Row> {
        let mut rng = Seed(seed).rng();
        (0..n)
            .map(|index| {
                let (word, class) =
                    [("rain", "weather"), ("apples", "food"), ("boat", "travel")][index % 3];
                Row {
                    text: sentence(&mut rng, word),
                    pair: None,
                    label: Label::Class(class.to_owned()),
                }
            })
            .collect()
    };
    let train = rows(train, 1);
    TaskData {
        kind: InputKind::Single,
        problem: Problem::Classification {
            classes: TaskData::classes_of(&train).unwrap(),
        },
        train,
        validation: rows(other, 2),
        test: rows(other, 3),
    }
}

/// Pairs whose number follows from the same word in both.
pub(crate) fn regression(train: usize, other: usize) -> TaskData {
    let rows = |n: usize, seed: u64| -> Vec<Row> {
        let mut rng = Seed(seed).rng();
        (0..n)
            .map(|index| {
                let (word, value) = [("rain", 5.0), ("apples", 3.0), ("boat", 1.0)][index % 3];
                Row {
                    text: sentence(&mut rng, word),
                    pair: Some(sentence(&mut rng, word)),
                    label: Label::Value(value),
                }
            })
            .collect()
    };
    TaskData {
        kind: InputKind::Pair,
        problem: Problem::Regression,
        train: rows(train, 1),
        validation: rows(other, 2),
        test: rows(other, 3),
    }
}

pub(crate) fn try_trainer(
    spec: &TrainingSpec,
    silo_name: &str,
    data: &TaskData,
    cache: CacheSettings,
    saved: Option<SavedState>,
) -> Result<LocalTrainer, LearningError> {
    let backbone = backbone(Kind::Float);
    let tokenizer = tokenizer(&backbone);
    LocalTrainer::new(
        TrainerSetup {
            spec,
            silo: &silo(silo_name),
            backbone,
            tokenizer: &tokenizer,
            data,
            cache,
        },
        saved,
    )
}

pub(crate) fn trainer(spec: &TrainingSpec, data: &TaskData) -> LocalTrainer {
    try_trainer(spec, "north", data, CacheSettings::default(), None).unwrap()
}

/// Never stops a round.
pub(crate) fn go_on(_: Progress) -> Continue {
    Continue::Yes
}

/// The adapter that results from one silo's update alone.
pub(crate) fn applied(payload: &[u8], update: &[u8]) -> Vec<u8> {
    let base = concord_common::adapter::decode_f32(payload).unwrap();
    let delta = concord_common::adapter::decode_f32(update).unwrap();
    assert_eq!(base.len(), delta.len());
    let sum: Vec<f32> = base.iter().zip(&delta).map(|(x, d)| x + d).collect();
    concord_common::adapter::encode_f32(&sum)
}

/// Standard normal draws of our own generator, `[n, d]`.
pub(crate) fn normal(seed: u64, shape: &[usize], kind: Kind) -> Tensor {
    let mut rng = Seed(seed).rng();
    let values = (0..shape.iter().product())
        .map(|_| rng.normal() as f32)
        .collect();
    HostTensor {
        shape: shape.to_vec(),
        values,
    }
    .to_tensor(kind)
    .unwrap()
}

pub(crate) fn number(tensor: &Tensor) -> f64 {
    tensor.f_double_value(&[]).unwrap()
}

/// Checks the gradient of a scalar function of f64 leaves against central differences.
pub(crate) fn check_gradient(leaves: &[Tensor], tolerance: f64, f: impl Fn(&[Tensor]) -> Tensor) {
    let tracked: Vec<Tensor> = leaves
        .iter()
        .map(|leaf| leaf.copy().set_requires_grad(true))
        .collect();
    let value = f(&tracked);
    let gradients = Tensor::f_run_backward(&[value], &tracked, false, false).unwrap();
    let step = 1e-5;
    let _frozen = tch::no_grad_guard();
    for (which, (leaf, gradient)) in leaves.iter().zip(&gradients).enumerate() {
        assert_eq!(leaf.kind(), Kind::Double);
        // A dozen elements of every leaf: enough to see a wrong factor or a lost path.
        for place in (0..leaf.numel()).step_by(1 + leaf.numel() / 12) {
            let place = place as i64;
            let shifted = |by: f64| {
                let moved: Vec<Tensor> = leaves.iter().map(Tensor::copy).collect();
                let mut element = moved[which].view([-1]).narrow(0, place, 1);
                let _ = element.f_add_scalar_(by).unwrap();
                number(&f(&moved))
            };
            let numeric = (shifted(step) - shifted(-step)) / (2.0 * step);
            // Undefined where the value does not depend on the leaf.
            let exact = if gradient.defined() {
                gradient.reshape([-1]).double_value(&[place])
            } else {
                0.0
            };
            assert!(
                (numeric - exact).abs() <= tolerance * (1.0 + numeric.abs()),
                "leaf {which}, element {place}: backward gives {exact}, differences give {numeric}"
            );
        }
    }
}
