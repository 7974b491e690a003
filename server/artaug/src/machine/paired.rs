//! Scores of the same items side by side.

use std::collections::BTreeMap;

use super::{Arm, Judged, Machine, StopReason};
use crate::{
    photometry::moments,
    stats::{Bootstrap, Interval},
};

/// Least part of the held-out prompts, in hundredths, that must have a score under both models for a decision by it. A few missing
/// answers of a judge elsewhere are left out of the comparison; many would make it another comparison.
const LEAST_PAIRED: usize = 90;

/// Spreads up to this are rounding.
const NO_SPREAD: f64 = 1e-9;

/// Scores of the same prompts under two models.
pub(super) struct Paired {
    pub(super) before: Vec<f64>,
    pub(super) after: Vec<f64>,
    /// Of each pair the group of its prompt; see [`Bootstrap::interval`].
    groups: Vec<u32>,
    pub(super) left_out: usize,
}

impl Paired {
    /// The items that have both scores, and how many do not. `groups` has a number for every item.
    fn of(
        groups: &[u32],
        before: impl Fn(u32) -> Option<f64>,
        after: impl Fn(u32) -> Option<f64>,
    ) -> Self {
        let mut paired = Self {
            before: Vec::new(),
            after: Vec::new(),
            groups: Vec::new(),
            left_out: 0,
        };
        for (item, group) in (0..).zip(groups) {
            let Some((before, after)) = before(item).zip(after(item)) else {
                paired.left_out += 1;
                continue;
            };
            paired.before.push(before);
            paired.after.push(after);
            paired.groups.push(*group);
        }
        paired
    }

    /// Whether there are enough for a decision.
    pub(super) fn is_enough(&self) -> bool {
        let (pairs, all) = (self.before.len(), self.before.len() + self.left_out);
        pairs >= 2 && pairs * 100 >= all * LEAST_PAIRED
    }

    /// Itself if there are enough for a decision; if not, why.
    pub(super) fn enough(self, what: &str) -> Result<Self, StopReason> {
        if self.is_enough() {
            return Ok(self);
        }
        let (pairs, all) = (self.before.len(), self.before.len() + self.left_out);
        Err(StopReason::NoEvaluation {
            what: format!(
                "{what} is there for {pairs} of {all} held-out prompts under both models, at least {LEAST_PAIRED} % are needed"
            ),
        })
    }

    pub(super) fn means(&self) -> Option<(f64, f64)> {
        let mean = |scores: &[f64]| scores.iter().sum::<f64>() / scores.len() as f64;
        (!self.before.is_empty()).then(|| (mean(&self.before), mean(&self.after)))
    }

    pub(super) fn interval(&self, bootstrap: &Bootstrap, purpose: &str) -> Option<Interval> {
        let own = Bootstrap {
            seed: bootstrap.seed.derive(purpose),
            ..*bootstrap
        };
        own.interval(&self.before, &self.after, &self.groups).ok()
    }
}

impl Machine {
    /// The gain of the enhanced images over the base images of all pairs that were advised on, changed and have every score: each scorer's
    /// gain in spreads of its base scores, averaged over the scorers.
    pub(super) fn measured_raw_gain(&self) -> Option<Interval> {
        let candidates = self.candidates();
        let names: Vec<&String> = self.plan.filter.least_gain.keys().collect();
        let scores = |item: u32| -> Option<Vec<(f64, f64)>> {
            let candidate = &candidates[item as usize];
            let both = |name: &&String| candidate.base.get(name).zip(candidate.enhanced.get(name));
            names.iter().map(both).collect()
        };
        let scored: Vec<Vec<(f64, f64)>> =
            (0..candidates.len() as u32).filter_map(scores).collect();
        let spreads: Vec<f64> = (0..names.len())
            .map(|scorer| {
                let of = |pair: &Vec<(f64, f64)>| pair[scorer];
                let before = scored.iter().map(|pair| of(pair).0);
                spread(before, scored.iter().map(|pair| of(pair).1))
            })
            .collect();
        let gain = |item: u32| {
            let pairs = scores(item)?.into_iter().zip(&spreads);
            let sum: f64 = pairs
                .map(|((before, after), spread)| (after - before) / spread)
                .sum();
            Some(sum / spreads.len().max(1) as f64)
        };
        let prompts = self.items.values().map(|item| {
            let generated = item.generated.as_ref();
            generated.map_or("", |made| made.prompt.as_str())
        });
        let paired = Paired::of(&groups(prompts), |_| Some(0.0), gain);
        paired.interval(&self.plan.bootstrap, "raw gain")
    }

    pub(super) fn paired(&self, before: &Judged, after: &Judged, name: &str) -> Paired {
        Paired::of(
            &self.held_out_groups(),
            |item| before.score(item, name),
            |item| after.score(item, name),
        )
    }

    /// The filter's scores of held-out images, in spreads of those of `reference`, averaged over the scorers.
    pub(super) fn paired_by_filter(
        &self,
        reference: &Judged,
        before: &Judged,
        after: &Judged,
    ) -> Paired {
        let scorers: Vec<(&String, f64)> = self
            .plan
            .filter
            .least_gain
            .keys()
            .map(|name| {
                let of = |judged: &Judged| -> Vec<f64> {
                    let items = 0..self.plan.held_out;
                    items
                        .filter_map(|item| judged.filter_score(item, name))
                        .collect()
                };
                let others = of(before).into_iter().chain(of(after));
                (name, spread(of(reference).into_iter(), others))
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
            &self.held_out_groups(),
            |item| scaled(before, item),
            |item| scaled(after, item),
        )
    }

    fn held_out_groups(&self) -> Vec<u32> {
        let base = self.arms.get(&Arm::Base);
        groups((0..self.plan.held_out).map(|item| {
            let drawn = base.and_then(|base| base.items.get(&item));
            drawn.map_or("", |result| result.prompt.as_str())
        }))
    }
}

/// The spread that gains of a scorer are measured in: of the scores before or, where these do not vary, of all of them together. Equal scores
/// have none, and a difference between them is none either.
fn spread(
    before: impl Iterator<Item = f64> + Clone,
    others: impl Iterator<Item = f64> + Clone,
) -> f64 {
    let own = moments(before.clone()).1;
    if own > NO_SPREAD {
        return own;
    }
    moments(before.chain(others)).1.max(NO_SPREAD)
}

/// A number for every prompt, the same for the same one, in the order in which they first come.
fn groups<'a>(prompts: impl Iterator<Item = &'a str>) -> Vec<u32> {
    let mut known = BTreeMap::new();
    prompts
        .map(|prompt| {
            let next = known.len() as u32;
            *known.entry(prompt).or_insert(next)
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_score_that_does_not_vary_before_is_measured_in_the_spread_of_all() {
        let spread =
            |before: &[f64], after: &[f64]| spread(before.iter().copied(), after.iter().copied());
        assert_eq!(spread(&[0.0, 2.0], &[5.0, 9.0]), 1.0);
        assert_eq!(spread(&[8.0; 4], &[8.0, 8.0, 8.0, 0.0]), 7.0_f64.sqrt());
        // No difference counts as none, whatever it is divided by.
        assert_eq!(spread(&[8.0; 4], &[8.0; 4]), NO_SPREAD);
    }

    #[test]
    fn items_of_the_same_prompt_are_one_group() {
        assert_eq!(
            groups(["a", "b", "a", "c", "b"].into_iter()),
            [0, 1, 0, 2, 1]
        );
    }
}
