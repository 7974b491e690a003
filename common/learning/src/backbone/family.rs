//! What the families call their tensors, and how each makes its first hidden state.

use std::collections::HashMap;

use tch::{Kind, Tensor};

use super::{BackboneConfig, Batch, Family, layer::Norm};
use crate::{
    error::LearningError,
    weights::{Expected, Ignored, Naming},
};

const POSITION_IDS: Ignored = Ignored {
    start: "embeddings.position_ids",
    reason: "the constants 0, 1, 2, ... that older exports stored",
};
const POOLER: Ignored = Ignored {
    start: "pooler.",
    reason: "a dense layer on the first token; Concord pools by itself and trains a head of its own",
};

/// What a file of each family may hold besides the backbone. Everything else that is not expected is an error.
pub(super) fn naming(family: Family) -> Naming {
    match family {
        Family::Bert => Naming {
            prefix: "bert.",
            ignored: &[
                POSITION_IDS,
                POOLER,
                Ignored {
                    start: "cls.",
                    reason: "the pretraining heads (masked words, next sentence)",
                },
            ],
        },
        Family::Roberta | Family::XlmRoberta => Naming {
            prefix: "roberta.",
            ignored: &[
                POSITION_IDS,
                POOLER,
                Ignored {
                    start: "lm_head.",
                    reason: "the pretraining head (masked words)",
                },
            ],
        },
        Family::DistilBert => Naming {
            prefix: "distilbert.",
            ignored: &[
                POSITION_IDS,
                Ignored {
                    start: "vocab_transform.",
                    reason: "the pretraining head (masked words), its dense layer",
                },
                Ignored {
                    start: "vocab_layer_norm.",
                    reason: "the pretraining head, its LayerNorm",
                },
                Ignored {
                    start: "vocab_projector.",
                    reason: "the pretraining head, its output layer",
                },
            ],
        },
    }
}

/// Names of the parts of one layer, without the trailing `.weight` and `.bias`.
pub(super) struct LayerNames {
    pub(super) query: String,
    pub(super) key: String,
    pub(super) value: String,
    pub(super) attention_out: String,
    pub(super) attention_norm: String,
    pub(super) up: String,
    pub(super) down: String,
    pub(super) norm: String,
}

impl LayerNames {
    pub(super) fn new(family: Family, layer: usize) -> Self {
        if family == Family::DistilBert {
            let part = |name: &str| format!("transformer.layer.{layer}.{name}");
            return Self {
                query: part("attention.q_lin"),
                key: part("attention.k_lin"),
                value: part("attention.v_lin"),
                attention_out: part("attention.out_lin"),
                attention_norm: part("sa_layer_norm"),
                up: part("ffn.lin1"),
                down: part("ffn.lin2"),
                norm: part("output_layer_norm"),
            };
        }
        let part = |name: &str| format!("encoder.layer.{layer}.{name}");
        Self {
            query: part("attention.self.query"),
            key: part("attention.self.key"),
            value: part("attention.self.value"),
            attention_out: part("attention.output.dense"),
            attention_norm: part("attention.output.LayerNorm"),
            up: part("intermediate.dense"),
            down: part("output.dense"),
            norm: part("output.LayerNorm"),
        }
    }
}

/// Every tensor that a backbone of these sizes consists of.
pub(super) fn expected(config: &BackboneConfig) -> Vec<Expected> {
    let d = config.hidden as i64;
    let inner = config.intermediate as i64;
    let mut list = vec![
        tensor(WORDS, &[config.vocab as i64, d]),
        tensor(POSITIONS, &[config.position_rows as i64, d]),
    ];
    if config.type_vocab > 0 {
        list.push(tensor(TYPES, &[config.type_vocab as i64, d]));
    }
    let mut pair = |part: &str, weight: &[i64]| {
        list.push(tensor(&format!("{part}.weight"), weight));
        list.push(tensor(&format!("{part}.bias"), &weight[..1]));
    };
    pair(EMBEDDING_NORM, &[d]);
    for layer in 0..config.layers {
        let names = LayerNames::new(config.family, layer);
        for square in [&names.query, &names.key, &names.value, &names.attention_out] {
            pair(square, &[d, d]);
        }
        pair(&names.attention_norm, &[d]);
        pair(&names.up, &[inner, d]);
        pair(&names.down, &[d, inner]);
        pair(&names.norm, &[d]);
    }
    list
}

fn tensor(name: &str, shape: &[i64]) -> Expected {
    Expected {
        name: name.to_owned(),
        shape: shape.to_vec(),
    }
}

const WORDS: &str = "embeddings.word_embeddings.weight";
const POSITIONS: &str = "embeddings.position_embeddings.weight";
const TYPES: &str = "embeddings.token_type_embeddings.weight";
const EMBEDDING_NORM: &str = "embeddings.LayerNorm";

/// Takes a loaded tensor out of the map.
pub(super) fn take(tensors: &mut HashMap<String, Tensor>, name: &str) -> Tensor {
    tensors.remove(name).expect(
        "`expected` lists every tensor that is taken, and the strict loader returns all of them",
    )
}

/// Words, positions and types to the hidden state that enters layer 0.
#[derive(Debug)]
pub(super) struct Embeddings {
    words: Tensor,
    positions: Tensor,
    types: Option<Tensor>,
    norm: Norm,
    /// The padding id, where positions are counted from it.
    count_from: Option<i64>,
}

impl Embeddings {
    pub(super) fn take(
        config: &BackboneConfig,
        tensors: &mut HashMap<String, Tensor>,
    ) -> Result<Self, LearningError> {
        let words = take(tensors, WORDS);
        let mut positions = take(tensors, POSITIONS);
        let mut types = (config.type_vocab > 0).then(|| take(tensors, TYPES));
        if config.type_vocab == 1 {
            // The only type is added at every position, so it can be added once for all.
            if let Some(only) = types.take() {
                positions = positions.f_add(&only)?;
            }
        }
        Ok(Self {
            words,
            positions,
            types,
            norm: Norm::take(tensors, EMBEDDING_NORM, config.layer_norm_eps),
            count_from: config.family.counts_from_padding().then_some(config.pad_id),
        })
    }

    pub(super) fn kind(&self) -> Kind {
        self.words.kind()
    }

    pub(super) fn run(&self, batch: &Batch) -> Result<Tensor, LearningError> {
        let ids = &batch.input_ids;
        let words = lookup(&self.words, ids)?;
        let positions = match self.count_from {
            // The first token has position pad_id + 1, padding has position pad_id (as `transformers` counts them).
            Some(pad_id) => {
                let real = ids.f_ne(pad_id)?.f_to_kind(Kind::Int64)?;
                let places = real.f_cumsum(1, Kind::Int64)?.f_mul(&real)?;
                lookup(&self.positions, &places.f_add_scalar(pad_id)?)?
            }
            None => self.positions.f_narrow(0, 0, ids.size()[1])?,
        };
        let mut sum = words.f_add(&positions)?;
        if let Some(types) = &self.types {
            sum = sum.f_add(&lookup(types, &batch.token_types)?)?;
        }
        self.norm.run(&sum)
    }
}

fn lookup(table: &Tensor, ids: &Tensor) -> Result<Tensor, LearningError> {
    Ok(Tensor::f_embedding(table, ids, -1, false, false)?)
}
