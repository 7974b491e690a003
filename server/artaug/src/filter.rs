//! Which pairs of base and enhanced images are worth training on.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use crate::scorer::{ForFilter, Scores};

/// One pair as the filter sees it: no evaluation score can come in, by type.
#[derive(Debug, Clone, PartialEq)]
pub struct Candidate {
    /// Number of the item.
    pub item: u32,
    /// Regions of the advice; none if the advice failed.
    pub regions: Option<usize>,
    /// Whether the enhanced image differs from the base image at all.
    pub changed: bool,
    /// Scores of the base image; empty while there are none.
    pub base: Scores<ForFilter>,
    /// Scores of the enhanced image.
    pub enhanced: Scores<ForFilter>,
}

/// The bounds of the filter.
#[derive(Clone, PartialEq, Debug)]
pub struct FilterRules {
    /// The names of all filter scorers with the gain that a pair must have in each; below 0 allows a loss.
    pub least_gain: BTreeMap<String, f64>,
    /// Most pairs kept; the best by mean gain, each scorer's gains divided by their spread.
    pub most_kept: usize,
}

/// What became of a pair.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
#[serde(tag = "verdict", rename_all = "kebab-case")]
pub enum Verdict {
    /// It is trained on.
    Kept {
        /// Mean gain in spreads.
        gain: f64,
    },
    /// It is not, and why.
    Rejected {
        /// The reason.
        #[serde(flatten)]
        reason: Reason,
    },
}

/// Why a pair is not trained on.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize, thiserror::Error)]
#[serde(tag = "reason", rename_all = "kebab-case")]
pub enum Reason {
    /// No usable advice.
    #[error("no usable advice")]
    NoAdvice,
    /// The advisor found nothing to improve.
    #[error("nothing to improve")]
    NoRegions,
    /// The advice made no difference.
    #[error("the image did not change")]
    Unchanged,
    /// A scorer gave no score.
    #[error("no score of {scorer}")]
    NoScore {
        /// Which scorer.
        scorer: String,
    },
    /// Not enough better, or too much worse.
    #[error("{scorer} gained {gain:.4}, at least {least:.4} is wanted")]
    LittleGain {
        /// Which scorer.
        scorer: String,
        /// What it gained.
        gain: f64,
        /// What it had to.
        least: f64,
    },
    /// Good, but others are better.
    #[error("{place} of {good} good pairs, {most} are kept")]
    BelowTheBest {
        /// Its place among the good ones, from 1.
        place: usize,
        /// How many are good.
        good: usize,
        /// How many are kept.
        most: usize,
    },
    /// An operator rejected it in the review.
    #[error("rejected in the review")]
    Review,
}

impl Reason {
    /// Short name, for counting.
    pub fn code(&self) -> &'static str {
        match self {
            Self::NoAdvice => "no-advice",
            Self::NoRegions => "no-regions",
            Self::Unchanged => "unchanged",
            Self::NoScore { .. } => "no-score",
            Self::LittleGain { .. } => "little-gain",
            Self::BelowTheBest { .. } => "below-the-best",
            Self::Review => "review",
        }
    }
}

impl Verdict {
    /// Whether the pair is trained on.
    pub fn is_kept(&self) -> bool {
        matches!(self, Self::Kept { .. })
    }
}

/// Rejections that need no scoring, so that nothing is spent on these pairs.
pub fn reject_early(regions: Option<usize>, changed: bool) -> Option<Reason> {
    match regions {
        None => Some(Reason::NoAdvice),
        Some(0) => Some(Reason::NoRegions),
        Some(_) if !changed => Some(Reason::Unchanged),
        Some(_) => None,
    }
}

/// Judges all pairs of an iteration; the answers stand in the order of the candidates and do not depend on it.
pub fn judge(candidates: &[Candidate], rules: &FilterRules) -> Vec<Verdict> {
    let gains: Vec<Result<Vec<f64>, Reason>> = candidates
        .iter()
        .map(|candidate| gains(candidate, rules))
        .collect();
    let spreads: Vec<f64> = (0..rules.least_gain.len())
        .map(|scorer| {
            let good = gains
                .iter()
                .filter_map(|gains| Some(gains.as_ref().ok()?[scorer]));
            // Where all gain the same there is no spread to measure in, and no pair's place depends on it.
            let spread = crate::photometry::moments(good).1;
            if spread > 1e-9 { spread } else { 1.0 }
        })
        .collect();
    let total = |gains: &[f64]| {
        let sum: f64 = gains
            .iter()
            .zip(&spreads)
            .map(|(gain, spread)| gain / spread)
            .sum();
        sum / gains.len().max(1) as f64
    };
    let mut ranking: Vec<(f64, u32)> = candidates
        .iter()
        .zip(&gains)
        .filter_map(|(candidate, gains)| Some((total(gains.as_ref().ok()?), candidate.item)))
        .collect();
    ranking.sort_unstable_by(|(first, one), (second, other)| {
        second.total_cmp(first).then(one.cmp(other))
    });
    let places: BTreeMap<u32, usize> = ranking
        .iter()
        .enumerate()
        .map(|(place, (_, item))| (*item, place + 1))
        .collect();
    candidates
        .iter()
        .zip(gains)
        .map(|(candidate, gains)| {
            let gains = match gains {
                Ok(gains) => gains,
                Err(reason) => return Verdict::Rejected { reason },
            };
            let place = places[&candidate.item];
            if place <= rules.most_kept {
                Verdict::Kept {
                    gain: total(&gains),
                }
            } else {
                let reason = Reason::BelowTheBest {
                    place,
                    good: ranking.len(),
                    most: rules.most_kept,
                };
                Verdict::Rejected { reason }
            }
        })
        .collect()
}

/// The gain in every scorer, or why the pair is out.
fn gains(candidate: &Candidate, rules: &FilterRules) -> Result<Vec<f64>, Reason> {
    if let Some(reason) = reject_early(candidate.regions, candidate.changed) {
        return Err(reason);
    }
    rules
        .least_gain
        .iter()
        .map(|(scorer, least)| {
            let gain = candidate
                .enhanced
                .get(scorer)
                .zip(candidate.base.get(scorer))
                .map(|(after, before)| after - before)
                .filter(|gain| gain.is_finite())
                .ok_or_else(|| Reason::NoScore {
                    scorer: scorer.clone(),
                })?;
            if gain < *least {
                return Err(Reason::LittleGain {
                    scorer: scorer.clone(),
                    gain,
                    least: *least,
                });
            }
            Ok(gain)
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn scores(light: f64, alignment: f64) -> Scores<ForFilter> {
        [
            ("alignment".to_owned(), alignment),
            ("light".to_owned(), light),
        ]
        .into_iter()
        .collect()
    }

    fn candidate(item: u32, light: f64, alignment: f64) -> Candidate {
        Candidate {
            item,
            regions: Some(1),
            changed: true,
            base: scores(0.0, 0.0),
            enhanced: scores(light, alignment),
        }
    }

    fn rules(most_kept: usize) -> FilterRules {
        FilterRules {
            least_gain: [("light".to_owned(), 0.1), ("alignment".to_owned(), -0.05)].into(),
            most_kept,
        }
    }

    fn reason(verdict: &Verdict) -> &Reason {
        match verdict {
            Verdict::Rejected { reason } => reason,
            Verdict::Kept { .. } => panic!("kept"),
        }
    }

    #[test]
    fn one_pair_has_its_plain_gain_and_not_one_in_spreads_of_nothing() {
        let verdicts = judge(&[candidate(1, 0.3, 0.1)], &rules(2));
        let Verdict::Kept { gain } = verdicts[0] else {
            panic!("{verdicts:?}");
        };
        assert!((gain - 0.2).abs() < 1e-12, "{gain}");
    }

    #[test]
    fn the_best_good_pairs_are_kept() {
        let candidates = [
            candidate(0, 0.2, 0.0),
            candidate(1, 0.9, 0.0),
            candidate(2, 0.5, 0.0),
            candidate(3, 0.05, 0.0),
        ];
        let verdicts = judge(&candidates, &rules(2));
        let kept: Vec<bool> = verdicts.iter().map(Verdict::is_kept).collect();
        assert_eq!(kept, [false, true, true, false]);
        assert_eq!(
            reason(&verdicts[0]),
            &Reason::BelowTheBest {
                place: 3,
                good: 3,
                most: 2
            }
        );
        assert_eq!(reason(&verdicts[3]).code(), "little-gain");
    }

    #[test]
    fn lost_alignment_rejects_however_good_the_light() {
        let verdicts = judge(
            &[candidate(0, 9.0, -0.06), candidate(1, 0.2, -0.04)],
            &rules(5),
        );
        assert_eq!(
            reason(&verdicts[0]),
            &Reason::LittleGain {
                scorer: "alignment".to_owned(),
                gain: -0.06,
                least: -0.05
            }
        );
        assert!(verdicts[1].is_kept());
    }

    #[test]
    fn cheap_reasons_come_first() {
        for (regions, changed, expected) in [
            (None, true, Some("no-advice")),
            (Some(0), true, Some("no-regions")),
            (Some(2), false, Some("unchanged")),
            (Some(2), true, None),
        ] {
            assert_eq!(
                reject_early(regions, changed).map(|reason| reason.code()),
                expected
            );
        }
        let unscored = Candidate {
            regions: None,
            base: Scores::default(),
            ..candidate(0, 1.0, 1.0)
        };
        assert_eq!(reason(&judge(&[unscored], &rules(1))[0]), &Reason::NoAdvice);
    }

    #[test]
    fn a_missing_score_or_one_that_is_no_number_rejects() {
        let mut missing = candidate(0, 1.0, 1.0);
        missing.base = Scores::default();
        for candidate in [
            missing,
            candidate(1, f64::NAN, 1.0),
            candidate(2, f64::INFINITY, 1.0),
        ] {
            assert_eq!(
                reason(&judge(&[candidate], &rules(1))[0]).code(),
                "no-score"
            );
        }
    }

    #[test]
    fn the_scorer_without_a_score_is_named_and_no_other() {
        let mut lacks = candidate(0, 1.0, 1.0);
        lacks.enhanced = [("alignment".to_owned(), 1.0)].into_iter().collect();
        let verdict = judge(&[lacks], &rules(1)).swap_remove(0);
        let scorer = "light".to_owned();
        assert_eq!(reason(&verdict), &Reason::NoScore { scorer });
    }

    #[test]
    fn a_scorer_of_large_numbers_does_not_outweigh_the_others() {
        let mut candidates = vec![candidate(0, 0.5, 0.4), candidate(1, 0.4, 0.0)];
        for candidate in &mut candidates {
            let light = candidate.enhanced.get("light").unwrap();
            candidate.enhanced.insert("light", light * 1000.0);
        }
        let first = judge(&candidates, &rules(1));
        assert!(first[0].is_kept() && !first[1].is_kept());
        candidates[0].enhanced.insert("light", 390.0);
        // One spread better in alignment, hardly worse in light.
        assert!(judge(&candidates, &rules(1)).iter().any(Verdict::is_kept));
    }

    #[test]
    fn a_verdict_survives_its_text_form() {
        let verdicts = judge(
            &[
                candidate(0, 0.2, 0.0),
                candidate(1, 0.01, 0.0),
                candidate(2, 0.5, 0.0),
            ],
            &rules(1),
        );
        let text = serde_json::to_string(&verdicts).unwrap();
        assert!(
            text.contains(r#""verdict":"rejected","reason":"little-gain""#),
            "{text}"
        );
        assert_eq!(
            serde_json::from_str::<Vec<Verdict>>(&text).unwrap(),
            verdicts
        );
    }

    proptest! {
        #[test]
        fn no_more_than_allowed_are_kept_in_any_order(
            lights in prop::collection::vec(-1.0_f64..1.0, 0..20), most in 0_usize..10,
        ) {
            let candidates: Vec<Candidate> = lights.iter().enumerate().map(|(item, light)| candidate(item as u32, *light, 0.0)).collect();
            let verdicts = judge(&candidates, &rules(most));
            let good = lights.iter().filter(|light| **light >= 0.1).count();
            prop_assert_eq!(verdicts.iter().filter(|verdict| verdict.is_kept()).count(), good.min(most));
            let reversed: Vec<Candidate> = candidates.into_iter().rev().collect();
            let mut turned = judge(&reversed, &rules(most));
            turned.reverse();
            prop_assert_eq!(
                turned.iter().map(Verdict::is_kept).collect::<Vec<_>>(),
                verdicts.iter().map(Verdict::is_kept).collect::<Vec<_>>()
            );
        }
    }
}
