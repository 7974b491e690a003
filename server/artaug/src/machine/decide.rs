//! Whether the job goes on, stops, or rolls back to the last good iteration.

use serde::{Deserialize, Serialize};

use super::{Arm, Judged, Machine};
use crate::{filter::Candidate, stats::Interval};

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
        /// The gain; none if the advisor found something to improve in fewer than two images.
        gain: Option<Interval>,
    },
    /// The advisor or a scorer was of no use for most pairs, so nothing is known about the gain.
    #[error(
        "of {pairs} pairs {advised} got usable advice, and of {changed} that changed {scored} got all scores: at least half are needed; look at the \
         unusable answers in the manifest and at the endpoints"
    )]
    NoPairs {
        /// Pairs made.
        pairs: usize,
        /// Those with usable advice, also if there was nothing to improve.
        advised: usize,
        /// Those whose enhanced image differs.
        changed: usize,
        /// Those of them with every filter score.
        scored: usize,
    },
    /// `limits.time` is used up.
    #[error("the job's time of {seconds} s is used up")]
    Time {
        /// The limit.
        seconds: u64,
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

    /// Whether the job has failed: what it was to find out was not measured.
    pub fn is_failure(&self) -> bool {
        matches!(self, Self::NoPairs { .. } | Self::NoEvaluation { .. })
    }
}

impl Judged {
    pub(super) fn score(&self, item: u32, name: &str) -> Option<f64> {
        self.items.get(&item)?.scores.get(name)
    }

    pub(super) fn filter_score(&self, item: u32, name: &str) -> Option<f64> {
        self.items.get(&item)?.filter_scores.get(name)
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
        if let Some(reason) = &self.lack {
            return Some(reason.clone());
        }
        if !self.raw_gain.is_some_and(|gain| gain.is_gain()) {
            return Some(StopReason::NoRawGain {
                gain: self.raw_gain,
            });
        }
        if self.has_too_few() {
            return Some(StopReason::FewPairs {
                kept: self.kept().len(),
                least: self.plan.stop.least_kept,
            });
        }
        self.evaluation().err()
    }

    /// Whether most pairs lack advice or scores, so that the raw gain would say nothing.
    pub(super) fn lack_of_pairs(&self) -> Option<StopReason> {
        let candidates = self.candidates();
        let has_all = |candidate: &Candidate| {
            self.plan.filter.least_gain.keys().all(|name| {
                candidate.base.get(name).is_some() && candidate.enhanced.get(name).is_some()
            })
        };
        let pairs = candidates.len();
        let advised = candidates
            .iter()
            .filter(|candidate| candidate.regions.is_some())
            .count();
        let changed = candidates
            .iter()
            .filter(|candidate| candidate.changed)
            .count();
        let scored = candidates
            .iter()
            .filter(|candidate| candidate.changed && has_all(candidate))
            .count();
        (2 * advised < pairs || 2 * scored < changed).then_some(StopReason::NoPairs {
            pairs,
            advised,
            changed,
            scored,
        })
    }

    /// Whether the evaluation lets the job go on; if not, why.
    fn evaluation(&self) -> Result<(), StopReason> {
        let rules = &self.plan.stop;
        let missing = |what: &str| StopReason::NoEvaluation {
            what: what.to_owned(),
        };
        let (Some(base), Some(now)) = (self.arms.get(&Arm::Base), self.arms.get(&Arm::Enhanced))
        else {
            return Err(missing("the base or the enhanced model was not evaluated"));
        };
        if let Some(name) = &rules.alignment {
            let paired = self
                .paired(base, now, name)
                .enough(&format!("the score `{name}`"))?;
            let (base, now) = paired.means().ok_or_else(|| missing(name))?;
            // A score that is no number does not hold, and stops too.
            let holds = now >= base - rules.alignment_loss;
            if !holds {
                return Err(StopReason::Alignment {
                    base,
                    now,
                    limit: rules.alignment_loss,
                });
            }
        }
        let (Some(diverse), Some(diverse_now)) = (base.diversity, now.diversity) else {
            return Err(missing("diversity"));
        };
        let holds = diverse_now >= rules.least_diversity * diverse;
        if !holds {
            return Err(StopReason::Diversity {
                base: diverse,
                now: diverse_now,
                limit: rules.least_diversity,
            });
        }
        let previous = self.previous.as_ref().unwrap_or(base);
        let evaluation = self
            .paired(previous, now, &rules.judge)
            .enough(&format!("the score `{}`", rules.judge))?
            .interval(&self.plan.bootstrap, "evaluation gain")
            .ok_or_else(|| missing(&rules.judge))?;
        if evaluation.high < 0.0 {
            return Err(StopReason::Worse { evaluation });
        }
        let what = "the filter's score";
        let filter = self
            .paired_by_filter(base, previous, now)
            .enough(what)?
            .interval(&self.plan.bootstrap, "filter gain")
            .ok_or_else(|| missing(what))?;
        if filter.is_gain() && !evaluation.is_gain() {
            return Err(StopReason::RewardHacking { filter, evaluation });
        }
        Ok(())
    }
}
