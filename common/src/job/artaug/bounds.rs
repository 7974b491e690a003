//! How much a job makes, how it is judged, and what it may use.

use std::time::Duration;

use serde::{Deserialize, Serialize};

use crate::config::ByteSize;

/// How much is made.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct CountsSpec {
    /// Most iterations.
    pub iterations: u32,
    /// Pairs made in each.
    pub pairs: u32,
    /// Most pairs trained on.
    pub kept: u32,
    /// Fewer pairs are not trained on: the job stops.
    #[serde(default = "default_least_kept")]
    pub least_kept: u32,
    /// Held-out images of each arm; the prompts are gone through in order, again and again with other seeds.
    pub held_out: u32,
}

/// How an iteration is judged.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct EvaluationSpec {
    /// Whether the control arms run: plain LoRA on the enhanced images, and prompt rewriting alone.
    pub control: bool,
    /// Confidence of the intervals.
    pub confidence: f64,
    /// Samples of the bootstrap.
    pub resamples: u32,
    /// Differences of the judging score up to this are ties.
    pub tie: f64,
}

/// Bounds on the job.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct ArtaugLimits {
    /// How far the mean alignment may fall below the base's before the iteration is rolled back.
    pub alignment_loss: f64,
    /// Least diversity, as a part of the base's.
    pub least_diversity: f64,
    /// Longest time of the whole job.
    #[serde(with = "humantime_serde")]
    pub time: Duration,
    /// Bytes that the job may keep on the worker's disk.
    pub disk: ByteSize,
    /// Threads of the engine; the worker's own limit if absent.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub threads: Option<u32>,
}

/// What is written at the end, beside LoRA files, metrics, gallery and model card.
#[derive(Clone, PartialEq, Debug, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct OutputSpec {
    /// The fused checkpoint in the diffusers layout.
    pub fused: bool,
}

impl Default for EvaluationSpec {
    fn default() -> Self {
        Self {
            control: true,
            confidence: 0.95,
            resamples: 2000,
            tie: 0.0,
        }
    }
}

impl Default for ArtaugLimits {
    fn default() -> Self {
        Self {
            alignment_loss: 0.02,
            least_diversity: 0.8,
            time: Duration::from_hours(24),
            disk: ByteSize(10 << 30),
            threads: None,
        }
    }
}

fn default_least_kept() -> u32 {
    8
}
