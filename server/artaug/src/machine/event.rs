//! What can happen in a job, as it stands in the journal.

use concord_common::Digest;
use serde::{Deserialize, Serialize};

use super::{Arm, Decision, Ingredients, Training};
use crate::{
    advisor::{Advice, Usage},
    photometry::Nearest,
    scorer::{Failure, ForEvaluation, ForFilter, Scores},
    stats::Interval,
};

/// Something that is done and need not be done again.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(tag = "event", rename_all = "kebab-case", deny_unknown_fields)]
pub enum Event {
    /// The job began; the first line of its journal.
    Began {
        /// Digest of the specification.
        specification: Digest,
        /// Version of the worker.
        version: String,
        /// What the job is made from beside its specification.
        #[serde(default, skip_serializing_if = "Ingredients::is_empty")]
        ingredients: Ingredients,
    },
    /// A base image was made.
    Generated {
        /// The iteration, from 1.
        iteration: u32,
        /// The item, from 0.
        item: u32,
        /// What was made.
        result: Generated,
    },
    /// The advisor was asked.
    Advised {
        /// The iteration.
        iteration: u32,
        /// The item.
        item: u32,
        /// What it said.
        result: Advised,
    },
    /// An enhanced image was made.
    Regenerated {
        /// The iteration.
        iteration: u32,
        /// The item.
        item: u32,
        /// What was made.
        result: Regenerated,
    },
    /// Both images were scored for the filter.
    Scored {
        /// The iteration.
        iteration: u32,
        /// The item.
        item: u32,
        /// The scores that there are.
        result: Scored,
    },
    /// The filter judged all pairs. Every verdict follows from what is recorded and stands in the manifest.
    Filtered {
        /// The iteration.
        iteration: u32,
        /// The items that it keeps, ascending.
        kept: Vec<u32>,
        /// Gain before the filter; none for fewer than two scored pairs.
        raw_gain: Option<Interval>,
    },
    /// An operator judged a pair.
    Reviewed {
        /// The iteration.
        iteration: u32,
        /// The item.
        item: u32,
        /// The operator's word.
        accepted: bool,
    },
    /// A training saved its state.
    Checkpointed {
        /// The iteration.
        iteration: u32,
        /// Which training.
        training: Training,
        /// The state.
        result: Checkpoint,
    },
    /// A training under way drew samples.
    Sampled {
        /// The iteration.
        iteration: u32,
        /// Which training.
        training: Training,
        /// The samples.
        result: Sampled,
    },
    /// A training ended.
    Trained {
        /// The iteration.
        iteration: u32,
        /// Which training.
        training: Training,
        /// What came out.
        result: Trained,
    },
    /// `LoRA_2` went into the model.
    Fused {
        /// The iteration.
        iteration: u32,
        /// What came out.
        result: Fused,
    },
    /// A held-out image was made and scored.
    Evaluated {
        /// The iteration.
        iteration: u32,
        /// Which model and prompt.
        arm: Arm,
        /// The held-out prompt, from 0.
        item: u32,
        /// What came out.
        result: Evaluated,
    },
    /// An arm's images were compared with each other and with those of training.
    Diversity {
        /// The iteration.
        iteration: u32,
        /// Which arm.
        arm: Arm,
        /// See [`crate::photometry::Thumbnails::diversity`].
        value: f64,
        /// How near they come to the images of training; none where nothing was trained.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        nearest: Option<Nearest>,
    },
    /// The iteration was judged.
    Decided {
        /// The iteration.
        iteration: u32,
        /// What follows.
        decision: Decision,
    },
}

/// A base image.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Generated {
    /// The prompt P.
    pub prompt: String,
    /// Seed of the noise.
    pub seed: u64,
    /// The stored PNG file.
    pub image: Digest,
    /// How many of the texts that it was drawn from are longer than the model reads of them.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub cut: usize,
    /// Rows of the forward passes of the denoiser.
    pub forwards: u64,
    /// Time spent.
    pub seconds: f64,
}

/// Advice on an image.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Advised {
    /// Name and version of the advisor.
    pub advisor: String,
    /// Raw answer, regions, rejected answers, cost.
    pub advice: Advice,
    /// Why there is no usable advice, if so.
    #[serde(default)]
    pub error: Option<String>,
    /// Time spent.
    pub seconds: f64,
}

impl Advised {
    /// Number of regions; none if there is no usable advice.
    pub fn regions(&self) -> Option<usize> {
        self.error.is_none().then_some(self.advice.regions.len())
    }
}

/// An enhanced image.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Regenerated {
    /// The stored PNG file.
    pub image: Digest,
    /// How many of the texts that it was drawn from are longer than the model reads of them.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub cut: usize,
    /// Rows of the forward passes of the denoiser.
    pub forwards: u64,
    /// Time spent.
    pub seconds: f64,
}

/// Filter scores of a pair.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Scored {
    /// Of the base image.
    pub base: Scores<ForFilter>,
    /// Of the enhanced image.
    pub enhanced: Scores<ForFilter>,
    /// Scores that are missing, of both images, with the reason.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub failures: Vec<Failure>,
    /// What scorers elsewhere cost.
    #[serde(default)]
    pub usage: Usage,
}

/// A training's state, from which it goes on exactly.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Checkpoint {
    /// Steps done.
    pub step: u64,
    /// The stored file with weights, moments and all losses so far.
    pub state: Digest,
    /// Where each pair has its own `LoRA`: how many of the finished pairs that the checkpoint before named are still meant.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub before: usize,
    /// The stored `LoRA` of every pair that was finished after those, in order. A line names each only once.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub finished: Vec<Digest>,
    /// Mean loss since the checkpoint before.
    pub loss: f64,
    /// Time spent up to here, over all resumptions.
    pub seconds: f64,
}

#[expect(
    clippy::trivially_copy_pass_by_ref,
    reason = "the shape that serde wants"
)]
fn is_zero(count: &usize) -> bool {
    *count == 0
}

impl Checkpoint {
    /// The stored objects that it names.
    pub fn objects(&self) -> impl Iterator<Item = Digest> + '_ {
        std::iter::once(self.state).chain(self.finished.iter().copied())
    }

    /// The same with the names of all finished pairs, after a checkpoint that named these.
    pub(super) fn after(mut self, mut named: Vec<Digest>) -> Self {
        named.truncate(self.before);
        named.append(&mut self.finished);
        Self {
            before: 0,
            finished: named,
            ..self
        }
    }
}

/// Images drawn in the middle of a training, of the first held-out prompts at their seeds.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Sampled {
    /// Steps done.
    pub step: u64,
    /// The stored PNG files, by held-out prompt.
    pub images: Vec<Digest>,
    /// Rows of the forward passes of the denoiser. The time is the training's.
    pub forwards: u64,
}

/// A finished training.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Trained {
    /// The stored `LoRA`; one for every pair in one file where each pair has its own.
    pub lora: Digest,
    /// The stored list of losses, one number a step; see [`crate::losses`].
    pub losses: Digest,
    /// Steps done.
    pub steps: u64,
    /// Mean loss of the last tenth of the steps.
    pub final_loss: f64,
    /// Time spent, over all resumptions.
    pub seconds: f64,
}

/// A model after an iteration.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Fused {
    /// The stored file of all `LoRA_2` up to here, joined.
    pub merged: Digest,
    /// The same, reduced by SVD.
    #[serde(default)]
    pub reduced: Option<Digest>,
    /// The stored file of all plain `LoRA` of the control arm up to here, joined; none without control arms.
    #[serde(default)]
    pub control: Option<Digest>,
}

/// A held-out image and its scores.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Evaluated {
    /// The prompt as used (rewritten for [`Arm::Rewriting`]).
    pub prompt: String,
    /// Seed of the noise; none in the journals of older workers.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub seed: Option<u64>,
    /// The stored PNG file.
    pub image: Digest,
    /// How many of the texts that it was drawn from are longer than the model reads of them.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub cut: usize,
    /// What the evaluation scorers say.
    pub scores: Scores<ForEvaluation>,
    /// What the filter scorers say, to notice when only those are pleased.
    pub filter_scores: Scores<ForFilter>,
    /// Scores that are missing, with the reason.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub failures: Vec<Failure>,
    /// The advice that rewrote the prompt, for [`Arm::Rewriting`].
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub advice: Option<Advised>,
    /// Rows of the forward passes of the denoiser.
    pub forwards: u64,
    /// Time spent on the image.
    pub seconds: f64,
    /// What scorers elsewhere cost.
    #[serde(default)]
    pub usage: Usage,
}

impl Event {
    /// Its name as in the journal.
    pub fn name(&self) -> &'static str {
        match self {
            Self::Began { .. } => "began",
            Self::Generated { .. } => "generated",
            Self::Advised { .. } => "advised",
            Self::Regenerated { .. } => "regenerated",
            Self::Scored { .. } => "scored",
            Self::Filtered { .. } => "filtered",
            Self::Reviewed { .. } => "reviewed",
            Self::Checkpointed { .. } => "checkpointed",
            Self::Sampled { .. } => "sampled",
            Self::Trained { .. } => "trained",
            Self::Fused { .. } => "fused",
            Self::Evaluated { .. } => "evaluated",
            Self::Diversity { .. } => "diversity",
            Self::Decided { .. } => "decided",
        }
    }

    /// Whether every number in it is one: JSON has no other, so the journal could not be read back.
    pub fn is_finite(&self) -> bool {
        let finite = |value: &f64| value.is_finite();
        match self {
            Self::Generated { result, .. } => finite(&result.seconds),
            Self::Advised { result, .. } => finite(&result.seconds),
            Self::Regenerated { result, .. } => finite(&result.seconds),
            Self::Scored { result, .. } => {
                let scores = result.base.iter().chain(result.enhanced.iter());
                scores.into_iter().all(|(_, value)| finite(&value))
            }
            Self::Checkpointed { result, .. } => finite(&result.loss) && finite(&result.seconds),
            Self::Trained { result, .. } => finite(&result.final_loss) && finite(&result.seconds),
            Self::Evaluated { result, .. } => {
                let advised = result.advice.as_ref();
                finite(&result.seconds)
                    && advised.is_none_or(|advised| finite(&advised.seconds))
                    && result.scores.iter().all(|(_, value)| finite(&value))
                    && result.filter_scores.iter().all(|(_, value)| finite(&value))
            }
            Self::Diversity { value, nearest, .. } => {
                let numbers = nearest.map(|it| [it.arm, it.base, it.near]);
                finite(value) && numbers.is_none_or(|numbers| numbers.iter().all(finite))
            }
            Self::Began { .. }
            | Self::Filtered { .. }
            | Self::Reviewed { .. }
            | Self::Sampled { .. }
            | Self::Fused { .. }
            | Self::Decided { .. } => true,
        }
    }

    /// The stored objects that it names.
    pub fn objects(&self) -> Vec<Digest> {
        match self {
            Self::Generated { result, .. } => vec![result.image],
            Self::Regenerated { result, .. } => vec![result.image],
            Self::Checkpointed { result, .. } => result.objects().collect(),
            Self::Sampled { result, .. } => result.images.clone(),
            Self::Trained { result, .. } => vec![result.lora, result.losses],
            Self::Fused { result, .. } => std::iter::once(result.merged)
                .chain(result.reduced)
                .chain(result.control)
                .collect(),
            Self::Evaluated { result, .. } => vec![result.image],
            Self::Began { .. }
            | Self::Advised { .. }
            | Self::Scored { .. }
            | Self::Filtered { .. }
            | Self::Reviewed { .. }
            | Self::Diversity { .. }
            | Self::Decided { .. } => Vec::new(),
        }
    }

    /// The iteration it belongs to; none for the job's beginning.
    pub fn iteration(&self) -> Option<u32> {
        match self {
            Self::Began { .. } => None,
            Self::Generated { iteration, .. }
            | Self::Advised { iteration, .. }
            | Self::Regenerated { iteration, .. }
            | Self::Scored { iteration, .. }
            | Self::Filtered { iteration, .. }
            | Self::Reviewed { iteration, .. }
            | Self::Checkpointed { iteration, .. }
            | Self::Sampled { iteration, .. }
            | Self::Trained { iteration, .. }
            | Self::Fused { iteration, .. }
            | Self::Evaluated { iteration, .. }
            | Self::Diversity { iteration, .. }
            | Self::Decided { iteration, .. } => Some(*iteration),
        }
    }
}
