//! What an iteration came to, and what stays of it.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use super::{Arm, Decision, Fused, Machine, Sampled, Trained, Training};
use crate::{
    filter::Verdict,
    stats::{Interval, Wins},
};

/// What an iteration came to.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Summary {
    /// Its number, from 1.
    pub iteration: u32,
    /// Gain of the enhanced images over the base images before the filter, in spreads of the base scores.
    pub raw_gain: Option<Interval>,
    /// Pairs trained on.
    pub kept: usize,
    /// Pairs not trained on, by reason.
    pub rejected: BTreeMap<String, usize>,
    /// Answers of the advisor that could not be used.
    pub rejected_replies: usize,
    /// The arms that were evaluated.
    pub arms: BTreeMap<Arm, ArmSummary>,
    /// What followed.
    pub decision: Decision,
}

/// An arm against the base on the held-out prompts.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct ArmSummary {
    /// Mean of the judging score.
    pub score: f64,
    /// Gain over the base.
    pub gain: Interval,
    /// Wins over the base.
    pub wins: Wins,
    /// Held-out prompts left out of all of this because the arm or the base has no judging score there.
    pub left_out: usize,
    /// Held-out images whose prompt is longer than the model reads of it.
    #[serde(default)]
    pub cut: usize,
    /// Mean alignment of image and prompt, if it is measured, where both have it.
    pub alignment: Option<f64>,
    /// Diversity of the images.
    pub diversity: Option<f64>,
}

/// What a finished iteration made.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct Made {
    /// Its trainings.
    pub trained: BTreeMap<Training, Trained>,
    /// What they drew on their way, by step.
    pub samples: BTreeMap<Training, Vec<Sampled>>,
    /// The joined `LoRA` up to it; none if it ended before.
    pub fused: Option<Fused>,
}

impl Machine {
    pub(super) fn summary(&self, decision: Decision) -> Summary {
        let mut rejected = BTreeMap::new();
        let mut rejected_replies = 0;
        for item in self.items.values() {
            if let Some(Verdict::Rejected { reason }) = &item.verdict {
                *rejected.entry(reason.code().to_owned()).or_insert(0) += 1;
            }
            if let Some(advised) = &item.advised {
                rejected_replies += advised.advice.rejected_replies.len();
            }
        }
        Summary {
            iteration: self.iteration,
            raw_gain: self.raw_gain,
            kept: self.kept().len(),
            rejected,
            rejected_replies,
            arms: self.arm_summaries(),
            decision,
        }
    }
}
