//! How good predictions are.

use std::collections::BTreeMap;

use concord_common::job::MetricName;
use serde::{Deserialize, Serialize};

use crate::{data::Problem, error::LearningError};

#[cfg(test)]
mod tests;

/// How often each class was taken for each: `[truth][prediction]`.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Confusion {
    classes: usize,
    counts: Vec<u64>,
}

impl Confusion {
    /// Counts pairs of class indices.
    ///
    /// # Errors
    /// [`LearningError::Data`] if the lists differ in length or an index is not below `classes`.
    pub fn count(classes: usize, truth: &[i64], predicted: &[i64]) -> Result<Self, LearningError> {
        if truth.len() != predicted.len() {
            return Err(LearningError::Data(format!(
                "there are {} labels and {} predictions",
                truth.len(),
                predicted.len()
            )));
        }
        let mut counts = vec![0; classes * classes];
        for (&t, &p) in truth.iter().zip(predicted) {
            let place = usize::try_from(t)
                .ok()
                .zip(usize::try_from(p).ok())
                .filter(|&(t, p)| t < classes && p < classes)
                .map(|(t, p)| t * classes + p)
                .ok_or_else(|| {
                    LearningError::Data(format!(
                        "class {t} taken for {p}, but there are only {classes} classes"
                    ))
                })?;
            counts[place] += 1;
        }
        Ok(Self { classes, counts })
    }

    /// Rows of class `truth` taken for `predicted`.
    pub fn at(&self, truth: usize, predicted: usize) -> u64 {
        self.counts[truth * self.classes + predicted]
    }

    fn total(&self) -> u64 {
        self.counts.iter().sum()
    }

    fn right(&self) -> u64 {
        (0..self.classes).map(|class| self.at(class, class)).sum()
    }

    fn of_truth(&self, class: usize) -> u64 {
        (0..self.classes).map(|other| self.at(class, other)).sum()
    }

    fn of_prediction(&self, class: usize) -> u64 {
        (0..self.classes).map(|other| self.at(other, class)).sum()
    }

    /// Share of right predictions; 0 without rows.
    pub fn accuracy(&self) -> f64 {
        ratio(self.right() as f64, self.total() as f64)
    }

    /// Unweighted mean of F1 = 2 right / (true + predicted) over the classes that occur among labels or predictions, as scikit-learn's
    /// `f1_score(average="macro")`; 0 without rows.
    pub fn macro_f1(&self) -> f64 {
        let scores: Vec<f64> = (0..self.classes)
            .filter_map(|class| {
                let seen = self.of_truth(class) + self.of_prediction(class);
                (seen > 0).then(|| 2.0 * self.at(class, class) as f64 / seen as f64)
            })
            .collect();
        ratio(scores.iter().sum(), scores.len() as f64)
    }

    /// Matthews correlation coefficient, for any number of classes (Gorodkin 2004, R_K), as scikit-learn's `matthews_corrcoef`; 0 where a
    /// side has one class only.
    pub fn mcc(&self) -> f64 {
        let n = self.total() as f64;
        let (mut agreement, mut truths, mut predictions) = (self.right() as f64 * n, n * n, n * n);
        for class in 0..self.classes {
            let (t, p) = (
                self.of_truth(class) as f64,
                self.of_prediction(class) as f64,
            );
            agreement -= t * p;
            truths -= t * t;
            predictions -= p * p;
        }
        ratio(agreement, (truths * predictions).sqrt())
    }
}

fn ratio(part: f64, whole: f64) -> f64 {
    if whole > 0.0 { part / whole } else { 0.0 }
}

/// Spearman's rank correlation: Pearson's over ranks, equal values sharing the mean of their ranks; 0 where a side is constant.
pub fn spearman(x: &[f64], y: &[f64]) -> f64 {
    let (x, y) = (ranks(x), ranks(y));
    let mean = |ranks: &[f64]| ratio(ranks.iter().sum(), ranks.len() as f64);
    let (mean_x, mean_y) = (mean(&x), mean(&y));
    let (mut xy, mut xx, mut yy) = (0.0, 0.0, 0.0);
    for (a, b) in x.iter().zip(&y) {
        let (a, b) = (a - mean_x, b - mean_y);
        xy += a * b;
        xx += a * a;
        yy += b * b;
    }
    ratio(xy, (xx * yy).sqrt())
}

/// Ranks from 1, ties averaged.
fn ranks(values: &[f64]) -> Vec<f64> {
    // 0 and -0 are equal.
    let values: Vec<f64> = values.iter().map(|value| value + 0.0).collect();
    let mut order: Vec<usize> = (0..values.len()).collect();
    order.sort_by(|&a, &b| values[a].total_cmp(&values[b]));
    let mut ranks = vec![0.0; values.len()];
    let mut start = 0;
    for group in order.chunk_by(|&a, &b| values[a].total_cmp(&values[b]).is_eq()) {
        // The mean of start + 1 ..= start + n.
        let rank = f64::midpoint((start + 1) as f64, (start + group.len()) as f64);
        for &place in group {
            ranks[place] = rank;
        }
        start += group.len();
    }
    ranks
}

/// The numbers of one model on one split.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
pub struct Evaluation {
    /// Rows.
    pub rows: u64,
    /// By name: `loss`; `accuracy`, `macro_f1` and `mcc` for classes; `spearman` for numbers.
    pub metrics: BTreeMap<String, f64>,
}

impl Evaluation {
    /// The metric that a job chooses the best model by.
    ///
    /// # Errors
    /// [`LearningError::Config`] if the job asks for a metric that this kind of task does not have.
    pub fn chosen(&self, name: MetricName, problem: &Problem) -> Result<f64, LearningError> {
        let key = metric_key(name, problem)?;
        self.metrics
            .get(key)
            .copied()
            .ok_or_else(|| LearningError::Data(format!("there is no metric `{key}` without rows")))
    }
}

/// The name that the chosen metric has in an [`Evaluation`].
///
/// # Errors
/// [`LearningError::Config`] if this kind of task does not have it.
pub fn metric_key(name: MetricName, problem: &Problem) -> Result<&'static str, LearningError> {
    Ok(match (name, problem) {
        (MetricName::Auto | MetricName::Accuracy, Problem::Classification { .. }) => "accuracy",
        (MetricName::MacroF1, Problem::Classification { .. }) => "macro_f1",
        (MetricName::Mcc, Problem::Classification { .. }) => "mcc",
        (MetricName::Auto | MetricName::Spearman, Problem::Regression) => "spearman",
        (MetricName::Spearman, Problem::Classification { .. }) => {
            return Err(LearningError::Config(
                "`training.metric` is spearman, but the task is a classification".to_owned(),
            ));
        }
        (MetricName::Accuracy | MetricName::MacroF1 | MetricName::Mcc, Problem::Regression) => {
            return Err(LearningError::Config(
                "`training.metric` is one for classes, but the task is a regression; use spearman or auto"
                    .to_owned(),
            ));
        }
    })
}
