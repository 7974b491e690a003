//! What an iteration came to, and what stays of it.

use std::collections::{BTreeMap, BTreeSet};

use concord_common::Digest;
use serde::{Deserialize, Serialize};

use super::{Arm, Decision, Fused, Judged, Machine, Sampled, Trained, Training};
use crate::{
    filter::Verdict,
    photometry::Nearest,
    stats::{Interval, Wins, wins},
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
    /// How near they come to the images of training, for the arms that were trained.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub nearest: Option<Nearest>,
    /// Of a control arm: how far it is behind the enhanced model, from the prompts that have the judging score under both.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub behind: Option<Interval>,
    /// What the evaluation scorers say that decide nothing, by name.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub others: BTreeMap<String, OtherScore>,
}

/// What an evaluation scorer that is not the judge says of an arm.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct OtherScore {
    /// Mean score, where the base has it too.
    pub score: f64,
    /// Gain over the base.
    pub gain: Interval,
}

/// What a finished iteration made.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct Made {
    /// The stored images X' that it was trained on.
    pub taught: Vec<Digest>,
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

    /// Every arm that was evaluated to its end against the base, by the prompts that have the judging score under both.
    fn arm_summaries(&self) -> BTreeMap<Arm, ArmSummary> {
        let Some(base) = self.whole_arm(Arm::Base) else {
            return BTreeMap::new();
        };
        self.arms
            .keys()
            .filter_map(|arm| Some((arm, self.whole_arm(*arm)?)))
            .filter_map(|(arm, judged)| Some((*arm, self.arm_summary(*arm, base, judged)?)))
            .collect()
    }

    /// An arm if all of its images were made: of one that the time ran out for the first prompts alone would count.
    fn whole_arm(&self, arm: Arm) -> Option<&Judged> {
        let judged = self.arms.get(&arm)?;
        (judged.items.len() == self.plan.held_out as usize).then_some(judged)
    }

    /// The enhanced model's scores less those of a control, over the prompts that have both; none if they are too few.
    fn behind(&self, control: &Judged) -> Option<Interval> {
        let enhanced = self.whole_arm(Arm::Enhanced)?;
        let paired = self.paired(control, enhanced, &self.plan.stop.judge);
        let enough = paired.is_enough().then_some(paired)?;
        enough.interval(&self.plan.bootstrap, "enhanced less control")
    }

    fn arm_summary(&self, arm: Arm, base: &Judged, judged: &Judged) -> Option<ArmSummary> {
        let rules = &self.plan.stop;
        let paired = self.paired(base, judged, &rules.judge);
        let alignment = rules
            .alignment
            .as_ref()
            .and_then(|name| self.paired(base, judged, name).means());
        Some(ArmSummary {
            score: paired.means()?.1,
            gain: paired.interval(&self.plan.bootstrap, "evaluation gain")?,
            wins: wins(&paired.before, &paired.after, rules.tie).ok()?,
            left_out: paired.left_out,
            cut: judged.items.values().filter(|made| made.cut > 0).count(),
            alignment: alignment.map(|(_, after)| after),
            diversity: judged.diversity,
            nearest: judged.nearest,
            others: self.others(base, judged),
            behind: match arm {
                Arm::Base | Arm::Enhanced => None,
                Arm::PlainLora | Arm::Rewriting => self.behind(judged),
            },
        })
    }

    /// What the evaluation scorers say that decide nothing: neither the judge nor the guard.
    fn others(&self, base: &Judged, judged: &Judged) -> BTreeMap<String, OtherScore> {
        let rules = &self.plan.stop;
        let decides = |name: &str| *name == rules.judge || rules.alignment.as_deref() == Some(name);
        let results = base.items.values();
        let names: BTreeSet<&str> = results
            .flat_map(|result| result.scores.iter().map(|(name, _)| name))
            .filter(|name| !decides(name))
            .collect();
        let other = |name: &str| {
            let paired = self.paired(base, judged, name);
            Some(OtherScore {
                score: paired.means()?.1,
                gain: paired.interval(&self.plan.bootstrap, &format!("gain of {name}"))?,
            })
        };
        names
            .into_iter()
            .filter_map(|name| Some((name.to_owned(), other(name)?)))
            .collect()
    }
}
