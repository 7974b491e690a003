//! Paired comparisons: interval of a mean difference, and win rate.

use std::collections::BTreeMap;

use concord_common::seed::Seed;
use serde::{Deserialize, Serialize};

/// A mean difference with its confidence interval.
#[derive(Clone, Copy, PartialEq, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Interval {
    /// Mean of after - before.
    pub mean: f64,
    /// Lower end.
    pub low: f64,
    /// Upper end.
    pub high: f64,
    /// Pairs behind it.
    pub pairs: usize,
}

impl Interval {
    /// Whether no difference at all is among what the data allow.
    pub fn includes_zero(&self) -> bool {
        self.low <= 0.0 && self.high >= 0.0
    }

    /// Whether the data allow improvement only.
    pub fn is_gain(&self) -> bool {
        self.low > 0.0
    }
}

/// How often the second of a pair is better.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Wins {
    /// Pairs whose second is better.
    pub wins: usize,
    /// Pairs without a difference.
    pub ties: usize,
    /// Pairs whose first is better.
    pub losses: usize,
}

impl Wins {
    /// Wins over all pairs, a tie counting half; 0.5 without pairs.
    pub fn rate(&self) -> f64 {
        let pairs = self.wins + self.ties + self.losses;
        if pairs == 0 {
            0.5
        } else {
            (self.wins as f64 + 0.5 * self.ties as f64) / pairs as f64
        }
    }
}

/// How an interval is made.
#[derive(Clone, Copy, PartialEq, Debug)]
pub struct Bootstrap {
    /// Probability that the interval is to cover, such as 0.95.
    pub confidence: f64,
    /// Samples drawn.
    pub resamples: u32,
    /// Seed of the draws: the same data and seed give the same interval.
    pub seed: Seed,
}

/// Why no comparison can be made.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum CompareError {
    /// Both sides must have the same items.
    #[error("{before} scores before and {after} after are no pairs")]
    Unpaired {
        /// Scores before.
        before: usize,
        /// Scores after.
        after: usize,
    },
    /// One pair says nothing of its spread.
    #[error("{0} pairs are too few for an interval")]
    Few(usize),
    /// Not a number.
    #[error("the scores of pair {0} are no finite numbers")]
    NotFinite(usize),
}

impl Bootstrap {
    /// The percentile bootstrap interval (Efron and Tibshirani, 1993) of the mean of after - before, pairs drawn whole.
    ///
    /// `groups` has a number for every pair. Pairs of one group, such as images of the same prompt, say less of other prompts than pairs of as many groups.
    /// So where groups have several pairs, the ends are the outer ones of two draws: of pairs, and of groups with all their pairs (a cluster bootstrap,
    /// Davison and Hinkley, 1997), which by itself is far too narrow for few groups.
    ///
    /// # Errors
    /// If the scores are no pairs, fewer than two, or not finite.
    pub fn interval(
        &self,
        before: &[f64],
        after: &[f64],
        groups: &[u32],
    ) -> Result<Interval, CompareError> {
        let differences = differences(before, after)?;
        let pairs = differences.len();
        if pairs < 2 {
            return Err(CompareError::Few(pairs));
        }
        let alone: Vec<(f64, usize)> = differences.iter().map(|one| (*one, 1)).collect();
        let (mut low, mut high) = self.ends(&alone);
        let together = together(&differences, groups);
        if together.len() < pairs {
            let (outer_low, outer_high) = self.ends(&together);
            low = low.min(outer_low);
            high = high.max(outer_high);
        }
        Ok(Interval {
            mean: differences.iter().sum::<f64>() / pairs as f64,
            low,
            high,
            pairs,
        })
    }

    /// The ends of the interval of a mean whose parts (sum and number) are drawn with replacement.
    fn ends(&self, parts: &[(f64, usize)]) -> (f64, f64) {
        let mut rng = self.seed.rng();
        let mut means: Vec<f64> = (0..self.resamples.max(1))
            .map(|_| {
                let (mut sum, mut count) = (0.0, 0);
                for _ in 0..parts.len() {
                    let (more, pairs) = parts[rng.below(parts.len() as u64) as usize];
                    sum += more;
                    count += pairs;
                }
                sum / count as f64
            })
            .collect();
        means.sort_unstable_by(f64::total_cmp);
        let tail = (1.0 - self.confidence.clamp(0.0, 1.0)) / 2.0;
        let last = (means.len() - 1) as f64;
        (
            means[(tail * last).floor() as usize],
            means[((1.0 - tail) * last).ceil() as usize],
        )
    }
}

/// Sum and number of the differences of every group.
fn together(differences: &[f64], groups: &[u32]) -> Vec<(f64, usize)> {
    let mut sums: BTreeMap<u32, (f64, usize)> = BTreeMap::new();
    for (difference, group) in differences.iter().zip(groups) {
        let (sum, count) = sums.entry(*group).or_default();
        *sum += difference;
        *count += 1;
    }
    sums.into_values().collect()
}

/// Counts the pairs by which side is better; differences up to `tie` are none.
///
/// # Errors
/// If the scores are no pairs or not finite.
pub fn wins(before: &[f64], after: &[f64], tie: f64) -> Result<Wins, CompareError> {
    let mut count = Wins::default();
    for difference in differences(before, after)? {
        if difference.abs() <= tie {
            count.ties += 1;
        } else if difference > 0.0 {
            count.wins += 1;
        } else {
            count.losses += 1;
        }
    }
    Ok(count)
}

fn differences(before: &[f64], after: &[f64]) -> Result<Vec<f64>, CompareError> {
    if before.len() != after.len() {
        return Err(CompareError::Unpaired {
            before: before.len(),
            after: after.len(),
        });
    }
    let differences: Vec<f64> = before
        .iter()
        .zip(after)
        .map(|(old, new)| new - old)
        .collect();
    match differences
        .iter()
        .position(|difference| !difference.is_finite())
    {
        Some(pair) => Err(CompareError::NotFinite(pair)),
        None => Ok(differences),
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const BOOTSTRAP: Bootstrap = Bootstrap {
        confidence: 0.95,
        resamples: 2000,
        seed: Seed(1),
    };

    /// Every pair in a group of its own.
    fn interval(before: &[f64], after: &[f64]) -> Result<Interval, CompareError> {
        let groups: Vec<u32> = (0..before.len() as u32).collect();
        BOOTSTRAP.interval(before, after, &groups)
    }

    /// Ten images each of twenty prompts, that differ by prompt and hardly otherwise, say as much as twenty.
    #[test]
    fn repeated_prompts_do_not_make_an_interval_narrower() {
        let mut rng = Seed(3).rng();
        let gains: Vec<f64> = (0..20).map(|_| rng.normal()).collect();
        let repeated: Vec<f64> = (0..200).map(|item| gains[item % 20]).collect();
        let groups: Vec<u32> = (0..200).map(|item| item % 20).collect();
        let once = interval(&[0.0; 20], &gains).unwrap();
        let often = BOOTSTRAP.interval(&[0.0; 200], &repeated, &groups).unwrap();
        assert!((once.low - often.low).abs() < 1e-9 && (once.high - often.high).abs() < 1e-9);
        assert_eq!(often.pairs, 200);
        let by_itself = interval(&[0.0; 200], &repeated).unwrap();
        assert!(by_itself.high - by_itself.low < 0.5 * (often.high - often.low));
        let of_one_prompt = BOOTSTRAP.interval(&[0.0; 200], &repeated, &[0; 200]);
        assert_eq!(of_one_prompt, Ok(by_itself));
        // Two prompts that happen to agree give no interval of no width.
        let two: Vec<u32> = (0..200).map(|item| item % 2).collect();
        let agreeing: Vec<f64> = (0..200).map(|_| rng.normal()).collect();
        let few = BOOTSTRAP.interval(&[0.0; 200], &agreeing, &two).unwrap();
        let each = interval(&[0.0; 200], &agreeing).unwrap();
        assert!(few.low <= each.low && few.high >= each.high);
    }

    #[test]
    fn a_constant_difference_has_an_interval_of_no_width() {
        let interval = interval(&[1.0, 2.0, 3.0], &[1.5, 2.5, 3.5]).unwrap();
        assert_eq!(
            (interval.mean, interval.low, interval.high),
            (0.5, 0.5, 0.5)
        );
        assert!(interval.is_gain() && !interval.includes_zero());
    }

    #[test]
    fn the_interval_is_about_that_of_the_normal_distribution() {
        let mut rng = Seed(5).rng();
        let before: Vec<f64> = (0..400).map(|_| rng.normal()).collect();
        let after: Vec<f64> = before
            .iter()
            .map(|value| value + 0.1 + 0.5 * rng.normal())
            .collect();
        let made = interval(&before, &after).unwrap();
        // Standard error of the mean: 0.5 / sqrt(400) = 0.025.
        let half = (made.high - made.low) / 2.0;
        assert!((half - 1.96 * 0.025).abs() < 0.008, "{made:?}");
        assert!((made.mean - 0.1).abs() < 0.08);
        assert_eq!(interval(&before, &after), Ok(made));
    }

    #[test]
    fn noise_around_nothing_includes_zero() {
        let mut rng = Seed(9).rng();
        let before: Vec<f64> = (0..200).map(|_| rng.normal()).collect();
        let after: Vec<f64> = (0..200).map(|_| rng.normal()).collect();
        let interval = interval(&before, &after).unwrap();
        assert!(
            interval.includes_zero() && !interval.is_gain(),
            "{interval:?}"
        );
    }

    #[test]
    fn scores_that_are_no_pairs_are_refused() {
        assert_eq!(
            interval(&[1.0], &[]),
            Err(CompareError::Unpaired {
                before: 1,
                after: 0
            })
        );
        assert_eq!(interval(&[1.0], &[1.0]), Err(CompareError::Few(1)));
        assert_eq!(
            wins(&[0.0, 1.0], &[0.0, f64::NAN], 0.0),
            Err(CompareError::NotFinite(1))
        );
    }

    #[test]
    fn a_tie_counts_half() {
        let count = wins(&[0.0; 4], &[1.0, 0.05, -0.05, -1.0], 0.1).unwrap();
        assert_eq!(
            count,
            Wins {
                wins: 1,
                ties: 2,
                losses: 1
            }
        );
        assert_eq!(count.rate(), 0.5);
        assert_eq!(wins(&[0.0; 2], &[1.0; 2], 0.0).unwrap().rate(), 1.0);
        assert_eq!(Wins::default().rate(), 0.5);
    }

    proptest! {
        #[test]
        fn the_mean_lies_in_its_interval(
            pairs in prop::collection::vec((-1e3_f64..1e3, -1e3_f64..1e3), 2..30), seed: u64,
        ) {
            let (before, after): (Vec<f64>, Vec<f64>) = pairs.into_iter().unzip();
            let bootstrap = Bootstrap { confidence: 0.99, resamples: 400, seed: Seed(seed) };
            let groups: Vec<u32> = (0..before.len() as u32).map(|pair| pair / 2).collect();
            let interval = bootstrap.interval(&before, &after, &groups).unwrap();
            let slack = 1e-9;
            prop_assert!(interval.low <= interval.high);
            prop_assert!(interval.low <= interval.mean + slack && interval.mean <= interval.high + slack);
        }
    }
}
