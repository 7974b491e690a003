//! The personal model: all that is needed to use what was trained, beside the backbone.

mod predict;
#[cfg(test)]
mod tests;

use std::fmt::Display;

use concord_common::{
    Digest,
    adapter::AdapterShape,
    job::{AdapterPosition, Combine, Pool},
};
use serde::{Deserialize, Serialize};
use tch::{Kind, Tensor};

pub use self::predict::{Prediction, Predictor};
use crate::{
    adapter::{Adapter, Private},
    data::{InputKind, Problem},
    error::LearningError,
    fusion::{FusionRule, Parts, Stacked},
    head::Linear,
    named::{HostTensor, NamedTensors, Taker, from_safetensors, to_safetensors},
};

const FORMAT: u32 = 1;

/// The facts of a personal model. They hold no rows of the silo's, but the names of its classes.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ModelFacts {
    /// Version of this format.
    pub format: u32,
    /// Name of the job.
    pub job: String,
    /// Name of the job's task.
    pub task: String,
    /// Silo that trained it.
    pub silo: String,
    /// Algorithm that trained it.
    pub algorithm: String,
    /// Last round that went into it; 0 for none.
    pub round: u32,
    /// Name of the backbone in the job.
    pub backbone_name: String,
    /// BLAKE3 of the backbone's weights file.
    pub backbone: Digest,
    /// Width d.
    pub hidden: u64,
    /// Layers that carry adapters, ascending.
    pub adapter_layers: Vec<u32>,
    /// Where in a layer they stand.
    #[serde(default, skip_serializing_if = "AdapterPosition::is_default")]
    pub adapter_position: AdapterPosition,
    /// Bottleneck of the global adapter, if the model uses one.
    pub global_bottleneck: Option<u64>,
    /// Bottleneck of the private adapter, if the model uses one.
    pub private_bottleneck: Option<u64>,
    /// How the two are joined.
    pub combine: Combine,
    /// s_g
    pub scale_global: f64,
    /// s_p
    pub scale_private: f64,
    /// Pooling of the last hidden states.
    pub pool: Pool,
    /// Single texts or pairs.
    pub input: InputKind,
    /// Classes, or a number.
    pub problem: Problem,
    /// Longest input in tokens.
    pub max_length: usize,
    /// For numbers: prediction = output · std + mean.
    pub target_mean: f64,
    /// See `target_mean`.
    pub target_std: f64,
    /// The metric by which it was chosen and its value on the validation rows, if there were any.
    pub validation: Option<(String, f64)>,
}

/// A trained model: `global.layer.<i>.…`, `private.layer.<i>.…`, `gate`, `head.weight`, `head.bias`, and the facts.
///
/// It holds private tensors. It is for the vault and for exports that the silo makes for itself; nothing that travels is made of it.
#[derive(Clone, PartialEq, Debug)]
pub struct PersonalModel {
    /// What it is.
    pub facts: ModelFacts,
    /// Its weights.
    pub tensors: NamedTensors,
}

/// One layer's adapters as exactly one bottleneck: h' = h + up · GELU(down · h + down_bias) + up_bias.
#[derive(Clone, PartialEq, Debug)]
pub struct FusedBottleneck {
    /// `[r, d]`, r = r_g + r_p: the global adapter's rows first.
    pub down_weight: HostTensor,
    /// `[r]`
    pub down_bias: HostTensor,
    /// `[d, r]`, with scales and gate folded in.
    pub up_weight: HostTensor,
    /// `[d]`, likewise.
    pub up_bias: HostTensor,
}

/// The tensors of a model as libtorch's own.
#[derive(Debug)]
pub(crate) struct Loaded {
    pub(crate) stacks: Vec<Stacked>,
    pub(crate) head: Linear,
}

impl ModelFacts {
    pub(crate) const FORMAT: u32 = FORMAT;

    fn shape(&self, bottleneck: u64) -> AdapterShape {
        AdapterShape {
            hidden: self.hidden,
            bottleneck,
            layers: self.adapter_layers.clone(),
            shared_head: None,
        }
    }

    fn rule(&self) -> FusionRule {
        FusionRule {
            combine: self.combine,
            scale_global: self.scale_global,
            scale_private: self.scale_private,
        }
    }
}

impl PersonalModel {
    /// Fuses the adapters, checking every tensor's name and shape against the facts.
    pub(crate) fn load(&self, kind: Kind) -> Result<Loaded, LearningError> {
        let facts = &self.facts;
        let _frozen = tch::no_grad_guard();
        let mut taker = Taker::new("the personal model", self.tensors.clone());
        // Read as private ones: a model is for use, and nothing of it may be exported as an update.
        let mut adapter = |bottleneck: Option<u64>, prefix: &str| {
            bottleneck
                .map(|r| Adapter::<Private>::from_host(&facts.shape(r), prefix, &mut taker, kind))
                .transpose()
        };
        let global = adapter(facts.global_bottleneck, "global.")?;
        let private = adapter(facts.private_bottleneck, "private.")?;
        let gate: Option<Tensor> = if taker.has("gate") {
            Some(taker.tensor("gate", &[facts.adapter_layers.len()], kind)?)
        } else {
            None
        };
        let head = Linear::from_host(
            "head.",
            facts.problem.outputs(),
            facts.hidden as usize,
            &mut taker,
            kind,
        )?;
        taker.finish()?;
        let stacks = Parts {
            global: global.as_ref().map(Adapter::layers),
            private: private.as_ref().map(Adapter::layers),
            gate: gate.as_ref(),
        }
        .stack(facts.rule())?;
        Ok(Loaded { stacks, head })
    }

    /// One layer's adapters as one bottleneck. It is what the trainer and [`Predictor`] run, for every way of joining: all of them are linear
    /// in the two adapters' outputs.
    ///
    /// # Errors
    /// [`LearningError::Config`] if the layer carries no adapter, [`LearningError::State`] if the tensors do not fit the facts.
    pub fn fused_bottleneck(&self, layer: u32) -> Result<FusedBottleneck, LearningError> {
        let loaded = self.load(Kind::Float)?;
        let stack = loaded
            .stacks
            .iter()
            .find(|stack| stack.layer == layer as usize)
            .ok_or_else(|| {
                LearningError::Config(format!(
                    "layer {layer} carries no adapter; those that do are {:?}",
                    self.facts.adapter_layers
                ))
            })?;
        Ok(FusedBottleneck {
            down_weight: HostTensor::from_tensor(&stack.down_weight)?,
            down_bias: HostTensor::from_tensor(&stack.down_bias)?,
            up_weight: HostTensor::from_tensor(&stack.up_weight)?,
            up_bias: HostTensor::from_tensor(&stack.up_bias)?,
        })
    }

    /// The head: weights `[c, d]` and biases `[c]`.
    ///
    /// # Errors
    /// [`LearningError::State`] if the tensors do not fit the facts.
    pub fn head(&self) -> Result<(HostTensor, HostTensor), LearningError> {
        let head = self.load(Kind::Float)?.head;
        Ok((
            HostTensor::from_tensor(&head.weight)?,
            HostTensor::from_tensor(&head.bias)?,
        ))
    }

    /// Parameters that were trained: all elements of all tensors.
    pub fn parameters(&self) -> usize {
        self.tensors
            .values()
            .map(|tensor| tensor.values.len())
            .sum()
    }

    /// The model as one safetensors file with the facts as JSON in its metadata; equal models give equal bytes.
    ///
    /// # Errors
    /// [`LearningError::State`] if it cannot be written.
    pub fn to_bytes(&self) -> Result<Vec<u8>, LearningError> {
        to_safetensors(&self.tensors, &json(&self.facts)?)
    }

    /// The reverse of [`PersonalModel::to_bytes`].
    ///
    /// # Errors
    /// [`LearningError::State`] if the bytes are no personal model of this version, or its tensors are not those of its facts.
    pub fn from_bytes(bytes: &[u8]) -> Result<Self, LearningError> {
        let (tensors, text) = from_safetensors(bytes)?;
        let facts: ModelFacts = parsed("the personal model", &text)?;
        if facts.format != FORMAT {
            return Err(LearningError::State(format!(
                "the personal model has format {}, this program reads {FORMAT}",
                facts.format
            )));
        }
        let model = Self { facts, tensors };
        model.load(Kind::Float)?;
        Ok(model)
    }
}

pub(crate) fn json<T: Serialize>(facts: &T) -> Result<String, LearningError> {
    serde_json::to_string(facts)
        .map_err(|error| LearningError::State(format!("cannot be written: {error}")))
}

pub(crate) fn parsed<T: for<'a> Deserialize<'a>>(
    what: impl Display,
    text: &str,
) -> Result<T, LearningError> {
    serde_json::from_str(text).map_err(|error| LearningError::State(format!("{what}: {error}")))
}
