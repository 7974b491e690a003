//! A silo's local optimisation, the same for every algorithm.

use serde::{Deserialize, Serialize};

/// Local optimisation: AdamW with linear warm-up and clipping by the global norm.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct LocalTrainingSpec {
    /// Passes over the training split in each round.
    pub epochs: u32,
    /// Rows in a batch.
    pub batch_size: u32,
    /// Learning rate of adapters.
    pub learning_rate: f64,
    /// Learning rate of the head.
    pub head_learning_rate: f64,
    /// Decoupled weight decay.
    pub weight_decay: f64,
    /// Steps over which the learning rate rises from 0, counted over the whole job.
    pub warmup_steps: u32,
    /// Gradients are scaled down to this norm; 0 switches it off.
    pub clip_norm: f64,
    /// Longest input in tokens; longer ones are cut.
    pub max_length: u32,
    /// Number by which the best personal model is chosen.
    pub metric: MetricName,
    /// Most training rows that are used, the first ones of a seeded shuffle; all if absent.
    pub max_examples: Option<u64>,
}

impl Default for LocalTrainingSpec {
    fn default() -> Self {
        Self {
            epochs: 1,
            batch_size: 32,
            learning_rate: 1e-3,
            head_learning_rate: 1e-3,
            weight_decay: 0.01,
            warmup_steps: 0,
            clip_norm: 1.0,
            max_length: 128,
            metric: MetricName::Auto,
            max_examples: None,
        }
    }
}

/// The number by which the best personal model is chosen, on the validation split.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum MetricName {
    /// Accuracy for classification, Spearman for regression.
    #[default]
    Auto,
    /// Share of right answers.
    Accuracy,
    /// Unweighted mean of the classes' F1.
    MacroF1,
    /// Matthews correlation coefficient.
    Mcc,
    /// Spearman's rank correlation.
    Spearman,
}
