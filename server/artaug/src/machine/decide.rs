//! Whether the job goes on, stops, or rolls back to the last good iteration.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use super::{Arm, ArmSummary, Judged, Machine, Plan};
use crate::{
    filter::Candidate,
    photometry::moments,
    stats::{Bootstrap, Interval, wins},
};

/// Least part of the held-out prompts, in hundredths, that must have a score under both models for a decision by it. A few missing
/// answers of a judge elsewhere are left out of the comparison; many would make it another comparison.
const LEAST_PAIRED: usize = 90;

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

/// The gain of the enhanced images over the base images of all pairs that were advised on, changed and have every score: each scorer's gain in spreads of its base scores,
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

/// Scores of the same prompts under two models.
struct Paired {
    before: Vec<f64>,
    after: Vec<f64>,
    left_out: usize,
}

impl Paired {
    /// The prompts that have both scores, and how many do not.
    fn of(
        held_out: u32,
        before: impl Fn(u32) -> Option<f64>,
        after: impl Fn(u32) -> Option<f64>,
    ) -> Self {
        let (before, after): (Vec<f64>, Vec<f64>) = (0..held_out)
            .filter_map(|item| before(item).zip(after(item)))
            .unzip();
        Self {
            left_out: held_out as usize - before.len(),
            before,
            after,
        }
    }

    /// Whether there are enough for a decision; if not, why.
    fn enough(self, what: &str) -> Result<Self, StopReason> {
        let (pairs, all) = (self.before.len(), self.before.len() + self.left_out);
        if pairs >= 2 && pairs * 100 >= all * LEAST_PAIRED {
            return Ok(self);
        }
        Err(StopReason::NoEvaluation {
            what: format!(
                "{what} is there for {pairs} of {all} held-out prompts under both models, at least {LEAST_PAIRED} % are needed"
            ),
        })
    }

    fn means(&self) -> Option<(f64, f64)> {
        let mean = |scores: &[f64]| scores.iter().sum::<f64>() / scores.len() as f64;
        (!self.before.is_empty()).then(|| (mean(&self.before), mean(&self.after)))
    }

    fn interval(&self, bootstrap: &Bootstrap, purpose: &str) -> Option<Interval> {
        interval(bootstrap, purpose, &self.before, &self.after)
    }
}

impl Judged {
    fn score(&self, item: u32, name: &str) -> Option<f64> {
        self.items.get(&item)?.scores.get(name)
    }

    fn filter_score(&self, item: u32, name: &str) -> Option<f64> {
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

    fn paired(&self, before: &Judged, after: &Judged, name: &str) -> Paired {
        Paired::of(
            self.plan.held_out,
            |item| before.score(item, name),
            |item| after.score(item, name),
        )
    }

    /// The filter's scores of held-out images, in spreads of those of `reference`, averaged over the scorers.
    fn paired_by_filter(&self, reference: &Judged, before: &Judged, after: &Judged) -> Paired {
        let scorers: Vec<(&String, f64)> = self
            .plan
            .filter
            .least_gain
            .keys()
            .map(|name| {
                let scores =
                    (0..self.plan.held_out).filter_map(|item| reference.filter_score(item, name));
                (name, moments(scores).1.max(1e-9))
            })
            .collect();
        let scaled = |judged: &Judged, item: u32| -> Option<f64> {
            let scores: Option<Vec<f64>> = scorers
                .iter()
                .map(|(name, spread)| Some(judged.filter_score(item, name)? / spread))
                .collect();
            Some(scores?.iter().sum::<f64>() / scorers.len().max(1) as f64)
        };
        Paired::of(
            self.plan.held_out,
            |item| scaled(before, item),
            |item| scaled(after, item),
        )
    }

    /// Every arm against the base, by the prompts that have the judging score under both.
    pub(super) fn arm_summaries(&self) -> BTreeMap<Arm, ArmSummary> {
        let Some(base) = self.arms.get(&Arm::Base) else {
            return BTreeMap::new();
        };
        self.arms
            .iter()
            .filter_map(|(arm, judged)| Some((*arm, self.arm_summary(base, judged)?)))
            .collect()
    }

    fn arm_summary(&self, base: &Judged, judged: &Judged) -> Option<ArmSummary> {
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
        })
    }
}
