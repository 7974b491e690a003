//! Whether the job goes on, stops, or rolls back to the last good iteration.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use super::{Arm, ArmSummary, Judged, Machine, Plan};
use crate::{
    filter::Candidate,
    photometry::moments,
    stats::{Bootstrap, Interval, wins},
};

/// When a job stops.
#[derive(Debug, Clone, PartialEq)]
pub struct StopRules {
    /// The evaluation score that judges.
    pub judge: String,
    /// Differences up to this are ties.
    pub tie: f64,
    /// The evaluation score that measures how well images fit their prompts, if there is one.
    pub alignment: Option<String>,
    /// How far its mean may fall below the base's.
    pub alignment_loss: f64,
    /// Least diversity, as a part of the base's.
    pub least_diversity: f64,
    /// Fewer kept pairs are not trained on.
    pub least_kept: u32,
}

/// What follows an iteration.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(tag = "decision", rename_all = "kebab-case")]
pub enum Decision {
    /// Another iteration from the new model.
    Continue,
    /// The job is over.
    Stop {
        /// The iteration whose model is the result; 0 is the base model, an earlier one than the last a roll-back.
        keep: u32,
        /// Why.
        #[serde(flatten)]
        reason: StopReason,
    },
}

/// Why a job is over.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, thiserror::Error)]
#[serde(tag = "reason", rename_all = "kebab-case")]
pub enum StopReason {
    /// Interaction stopped helping.
    #[error(
        "the enhanced images are not better before the filter: the gain's interval is not above zero"
    )]
    NoRawGain {
        /// The gain; none for fewer than two scored pairs.
        gain: Option<Interval>,
    },
    /// Too little to train on.
    #[error("{kept} pairs were kept, at least {least} are needed")]
    FewPairs {
        /// Pairs kept.
        kept: usize,
        /// Least number.
        least: u32,
    },
    /// Images fit their prompts less.
    #[error("alignment fell from {base:.4} to {now:.4}, more than {limit:.4}")]
    Alignment {
        /// The base's mean.
        base: f64,
        /// The new model's.
        now: f64,
        /// The loss allowed.
        limit: f64,
    },
    /// Images become alike.
    #[error("diversity is {now:.4}, less than {limit:.2} of the base's {base:.4}")]
    Diversity {
        /// The base's.
        base: f64,
        /// The new model's.
        now: f64,
        /// The part that must be left.
        limit: f64,
    },
    /// The filter's scorers are pleased and the judge is not.
    #[error("reward hacking: the filter's scores rose and the evaluation's did not")]
    RewardHacking {
        /// Gain of the filter's scores over the iteration before, in spreads.
        filter: Interval,
        /// Gain of the judging score.
        evaluation: Interval,
    },
    /// The judge finds the model worse than the one before.
    #[error("the evaluation score fell")]
    Worse {
        /// Gain over the iteration before.
        evaluation: Interval,
    },
    /// As many iterations as allowed.
    #[error("the last of the allowed iterations is done")]
    Maximum,
    /// The evaluation lacks what a decision needs.
    #[error("the evaluation gave no scores to decide by: {what}")]
    NoEvaluation {
        /// What is missing.
        what: String,
    },
}

impl StopReason {
    /// Whether it throws the iteration's model away.
    pub fn rolls_back(&self) -> bool {
        !matches!(self, Self::Maximum)
    }
}

/// The gain of the enhanced images over the base images of all scored pairs: each scorer's gain in spreads of its base scores,
/// averaged over the scorers.
pub(super) fn raw_gain(candidates: &[Candidate], plan: &Plan) -> Option<Interval> {
    let scorers: Vec<&String> = plan.filter.least_gain.keys().collect();
    let scored: Vec<Vec<(f64, f64)>> = candidates
        .iter()
        .filter_map(|candidate| {
            scorers
                .iter()
                .map(|name| Some((candidate.base.get(name)?, candidate.enhanced.get(name)?)))
                .collect()
        })
        .collect();
    let spreads: Vec<f64> = (0..scorers.len())
        .map(|scorer| {
            moments(scored.iter().map(|pair| pair[scorer].0))
                .1
                .max(1e-9)
        })
        .collect();
    let gains: Vec<f64> = scored
        .iter()
        .map(|pair| {
            let sum: f64 = pair
                .iter()
                .zip(&spreads)
                .map(|((before, after), spread)| (after - before) / spread)
                .sum();
            sum / spreads.len().max(1) as f64
        })
        .collect();
    interval(&plan.bootstrap, "raw gain", &vec![0.0; gains.len()], &gains)
}

fn interval(
    bootstrap: &Bootstrap,
    purpose: &str,
    before: &[f64],
    after: &[f64],
) -> Option<Interval> {
    let own = Bootstrap {
        seed: bootstrap.seed.derive(purpose),
        ..*bootstrap
    };
    own.interval(before, after).ok()
}

impl Judged {
    /// A score of every held-out prompt, in their order.
    fn scores(&self, name: &str) -> Option<Vec<f64>> {
        self.items
            .values()
            .map(|result| result.scores.get(name))
            .collect()
    }

    fn mean(&self, name: &str) -> Option<f64> {
        let scores = self.scores(name)?;
        (!scores.is_empty()).then(|| scores.iter().sum::<f64>() / scores.len() as f64)
    }

    /// The filter's scores of every held-out prompt, in spreads of those of `reference`, averaged over the scorers.
    fn filter_scores(&self, reference: &Self, plan: &Plan) -> Option<Vec<f64>> {
        let names: Vec<&String> = plan.filter.least_gain.keys().collect();
        let spreads: Vec<f64> = names
            .iter()
            .map(|name| {
                let scores: Option<Vec<f64>> = reference
                    .items
                    .values()
                    .map(|result| result.filter_scores.get(name))
                    .collect();
                Some(moments(scores?.into_iter()).1.max(1e-9))
            })
            .collect::<Option<_>>()?;
        self.items
            .values()
            .map(|result| {
                let scaled: Option<Vec<f64>> = names
                    .iter()
                    .zip(&spreads)
                    .map(|(name, spread)| Some(result.filter_scores.get(name)? / spread))
                    .collect();
                Some(scaled?.iter().sum::<f64>() / names.len().max(1) as f64)
            })
            .collect()
    }
}

impl Machine {
    pub(super) fn decision(&self) -> Decision {
        let before = self.iteration - 1;
        match self.stop_reason() {
            None if self.iteration < self.plan.iterations => Decision::Continue,
            None => Decision::Stop {
                keep: self.iteration,
                reason: StopReason::Maximum,
            },
            Some(reason) => Decision::Stop {
                keep: before,
                reason,
            },
        }
    }

    fn stop_reason(&self) -> Option<StopReason> {
        let rules = &self.plan.stop;
        if !self.raw_gain.is_some_and(|gain| gain.is_gain()) {
            return Some(StopReason::NoRawGain {
                gain: self.raw_gain,
            });
        }
        if self.has_too_few() {
            return Some(StopReason::FewPairs {
                kept: self.kept().len(),
                least: rules.least_kept,
            });
        }
        let missing = |what: &str| {
            Some(StopReason::NoEvaluation {
                what: what.to_owned(),
            })
        };
        let (Some(base), Some(now)) = (self.arms.get(&Arm::Base), self.arms.get(&Arm::Enhanced))
        else {
            return missing("the base or the enhanced model was not evaluated");
        };
        if let Some(name) = &rules.alignment {
            let (Some(base), Some(now)) = (base.mean(name), now.mean(name)) else {
                return missing(name);
            };
            // A score that is no number does not hold, and stops too.
            let holds = now >= base - rules.alignment_loss;
            if !holds {
                return Some(StopReason::Alignment {
                    base,
                    now,
                    limit: rules.alignment_loss,
                });
            }
        }
        let (Some(diverse), Some(diverse_now)) = (base.diversity, now.diversity) else {
            return missing("diversity");
        };
        let holds = diverse_now >= rules.least_diversity * diverse;
        if !holds {
            return Some(StopReason::Diversity {
                base: diverse,
                now: diverse_now,
                limit: rules.least_diversity,
            });
        }
        let previous = self.previous.as_ref().unwrap_or(base);
        let Some(evaluation) = self.judged_gain(previous, now) else {
            return missing(&rules.judge);
        };
        if evaluation.high < 0.0 {
            return Some(StopReason::Worse { evaluation });
        }
        let Some(filter) = self.filter_gain(previous, now) else {
            return missing("the filter's scores of the held-out images");
        };
        if filter.is_gain() && !evaluation.is_gain() {
            return Some(StopReason::RewardHacking { filter, evaluation });
        }
        None
    }

    fn judged_gain(&self, before: &Judged, after: &Judged) -> Option<Interval> {
        let judge = &self.plan.stop.judge;
        let (before, after) = (before.scores(judge)?, after.scores(judge)?);
        interval(&self.plan.bootstrap, "evaluation gain", &before, &after)
    }

    fn filter_gain(&self, before: &Judged, after: &Judged) -> Option<Interval> {
        let base = self.arms.get(&Arm::Base)?;
        let (before, after) = (
            before.filter_scores(base, &self.plan)?,
            after.filter_scores(base, &self.plan)?,
        );
        interval(&self.plan.bootstrap, "filter gain", &before, &after)
    }

    /// Every fully evaluated arm against the base.
    pub(super) fn arm_summaries(&self) -> BTreeMap<Arm, ArmSummary> {
        let rules = &self.plan.stop;
        let Some((base, base_scores)) = self
            .arms
            .get(&Arm::Base)
            .and_then(|base| Some((base, base.scores(&rules.judge)?)))
        else {
            return BTreeMap::new();
        };
        self.arms
            .iter()
            .filter_map(|(arm, judged)| {
                let scores = judged.scores(&rules.judge)?;
                let summary = ArmSummary {
                    score: judged.mean(&rules.judge)?,
                    gain: self.judged_gain(base, judged)?,
                    wins: wins(&base_scores, &scores, rules.tie).ok()?,
                    alignment: rules.alignment.as_ref().and_then(|name| judged.mean(name)),
                    diversity: judged.diversity,
                };
                Some((*arm, summary))
            })
            .collect()
    }
}
