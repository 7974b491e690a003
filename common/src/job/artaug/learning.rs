//! How a job trains.

use serde::{Deserialize, Serialize};

/// How the differential LoRA is trained.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct LoraSpec {
    /// Rank; alpha equals it.
    pub rank: u32,
    /// Which linear layers carry one.
    pub targets: LoraTargets,
    /// One pair of LoRAs over all pairs of images, or one for each with averaging.
    pub mode: LoraMode,
    /// Steps of `LoRA_1`. It must fit the base images closely for the difference to be clean.
    pub first_steps: u32,
    /// Steps of `LoRA_2`, and of the control.
    pub second_steps: u32,
    /// Learning rate.
    pub learning_rate: f64,
    /// Decoupled weight decay.
    pub weight_decay: f64,
    /// Gradients are scaled down to this norm; 0 switches it off.
    pub clip_norm: f64,
    /// Images in a batch.
    pub batch: u32,
    /// Batches whose gradients are added before a step.
    pub accumulation: u32,
    /// Whether each level of the `UNet` is computed again on the way back, to save memory.
    pub recompute: bool,
    /// Steps between checkpoints: a crash costs at most these.
    pub checkpoint_every: u32,
    /// Steps between samples: a few held-out prompts, drawn with what is trained so far. 0 switches them off.
    pub sample_every: u32,
    /// Rank of the reduced merged LoRA; it is not written if absent.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub reduced_rank: Option<u32>,
}

/// Which linear layers carry a LoRA.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum LoraTargets {
    /// Queries, keys, values and outputs of attention.
    #[default]
    Attention,
    /// All of them.
    AllLinear,
}

/// How many LoRAs are trained.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum LoraMode {
    /// One `LoRA_1` and one `LoRA_2` over all pairs.
    #[default]
    Joint,
    /// One each for every pair; the `LoRA_2` are averaged.
    PerPair,
}

impl Default for LoraSpec {
    fn default() -> Self {
        Self {
            rank: 8,
            targets: LoraTargets::default(),
            mode: LoraMode::default(),
            first_steps: 120,
            second_steps: 120,
            learning_rate: 1e-3,
            weight_decay: 0.0,
            clip_norm: 1.0,
            batch: 8,
            accumulation: 1,
            recompute: false,
            checkpoint_every: 20,
            sample_every: 0,
            reduced_rank: None,
        }
    }
}
