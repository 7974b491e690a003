//! A model as it runs: adapters fused, a head on top. Training and use go through the same fusion.

use std::collections::BTreeMap;

use concord_common::job::Pool;
use tch::{Kind, Tensor};

use crate::{
    backbone::Backbone,
    batch::evaluation_batches,
    data::{Problem, Split, Targets},
    error::LearningError,
    fusion::{Fusion, Stacked},
    head::{Linear, pooled},
    metric::{Confusion, Evaluation, spearman},
    task::{Inputs, PreparedTask, TargetScale},
};

/// Rows that are evaluated together.
pub(crate) const EVALUATION_ROWS: usize = 64;

/// What a forward pass needs besides the backbone.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Network<'a> {
    pub(crate) stacks: &'a [Stacked],
    pub(crate) head: &'a Linear,
    pub(crate) pool: Pool,
    pub(crate) outputs: usize,
}

impl Network<'_> {
    /// Logits of a batch, `[n, outputs]`, without gradients.
    pub(crate) fn logits(
        &self,
        backbone: &Backbone,
        inputs: &Inputs,
    ) -> Result<Tensor, LearningError> {
        let _frozen = tch::no_grad_guard();
        let mut hook = Fusion::new(self.stacks);
        let hidden = backbone.run_from_prefix(&inputs.prefix, &inputs.mask, &mut hook)?;
        self.head
            .forward(&pooled(self.pool, &hidden, &inputs.weights)?, self.outputs)
    }

    /// Outputs for every row of a split, in its order: `rows * outputs` numbers.
    pub(crate) fn outputs_of(
        &self,
        backbone: &Backbone,
        task: &PreparedTask,
        split: Split,
    ) -> Result<Vec<f64>, LearningError> {
        let mut all = vec![0.0; task.rows(split) * self.outputs];
        for rows in evaluation_batches(task.lengths(split), EVALUATION_ROWS) {
            let inputs = task.inputs(backbone, split, &rows)?;
            let logits = flat(&self.logits(backbone, &inputs)?)?;
            for (row, values) in rows.iter().zip(logits.chunks(self.outputs)) {
                all[row * self.outputs..(row + 1) * self.outputs].copy_from_slice(values);
            }
        }
        Ok(all)
    }

    /// Loss and metrics on a split.
    pub(crate) fn evaluate(
        &self,
        backbone: &Backbone,
        task: &PreparedTask,
        split: Split,
    ) -> Result<Evaluation, LearningError> {
        let targets = task.targets(split)?;
        let outputs = self.outputs_of(backbone, task, split)?;
        score(task.problem(), targets, task.scale(), &outputs)
    }
}

/// All elements, as f64.
pub(crate) fn flat(tensor: &Tensor) -> Result<Vec<f64>, LearningError> {
    let tensor = tensor
        .f_to_kind(Kind::Double)?
        .f_contiguous()?
        .f_view([-1])?;
    let mut values = vec![0.0; tensor.numel()];
    let count = values.len();
    tensor.f_copy_data(&mut values, count)?;
    Ok(values)
}

/// Softmax of one row's logits.
pub(crate) fn softmax(logits: &[f64]) -> Vec<f64> {
    let top = logits.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    let powers: Vec<f64> = logits.iter().map(|logit| (logit - top).exp()).collect();
    let sum: f64 = powers.iter().sum();
    powers.into_iter().map(|power| power / sum).collect()
}

/// The place of the largest value, the first of several.
pub(crate) fn best_place(values: &[f64]) -> usize {
    let mut best = 0;
    for (place, value) in values.iter().enumerate() {
        if *value > values[best] {
            best = place;
        }
    }
    best
}

/// Loss and metrics of a model's outputs. Without rows there are no metrics.
pub(crate) fn score(
    problem: &Problem,
    targets: &Targets,
    scale: TargetScale,
    outputs: &[f64],
) -> Result<Evaluation, LearningError> {
    let width = problem.outputs();
    let rows = outputs.len() / width;
    let mut metrics = BTreeMap::new();
    if outputs.iter().any(|output| !output.is_finite()) {
        return Err(LearningError::Training(
            "the model's outputs are not finite; lower the learning rate".to_owned(),
        ));
    }
    if rows > 0 {
        match targets {
            Targets::Classes(truth) => {
                let mut loss = 0.0;
                let mut predicted = Vec::with_capacity(rows);
                for (logits, &class) in outputs.chunks(width).zip(truth) {
                    loss -= softmax(logits)[class as usize].max(f64::MIN_POSITIVE).ln();
                    predicted.push(best_place(logits) as i64);
                }
                let counts = Confusion::count(width, truth, &predicted)?;
                metrics.insert("loss".to_owned(), loss / rows as f64);
                metrics.insert("accuracy".to_owned(), counts.accuracy());
                metrics.insert("macro_f1".to_owned(), counts.macro_f1());
                metrics.insert("mcc".to_owned(), counts.mcc());
            }
            Targets::Values(truth) => {
                let squares = outputs
                    .iter()
                    .zip(truth)
                    .map(|(output, value)| (output - (value - scale.mean) / scale.std).powi(2));
                metrics.insert("loss".to_owned(), squares.sum::<f64>() / rows as f64);
                metrics.insert("spearman".to_owned(), spearman(outputs, truth));
            }
        }
    }
    Ok(Evaluation {
        rows: rows as u64,
        metrics,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn close(got: f64, want: f64) {
        assert!((got - want).abs() < 1e-12, "{got} is not {want}");
    }

    #[test]
    fn classes_are_scored_by_loss_and_the_largest_output() {
        let problem = Problem::Classification {
            classes: vec!["a".into(), "b".into()],
        };
        let outputs = [0.0, 0.0, 2.0, 1.0];
        let evaluation = score(
            &problem,
            &Targets::Classes(vec![0, 1]),
            TargetScale {
                mean: 0.0,
                std: 1.0,
            },
            &outputs,
        )
        .unwrap();
        assert_eq!(evaluation.rows, 2);
        close(evaluation.metrics["accuracy"], 0.5);
        close(
            evaluation.metrics["loss"],
            f64::midpoint(2.0_f64.ln(), (1.0 + 1.0_f64.exp()).ln()),
        );
    }

    #[test]
    fn numbers_are_scored_on_the_standard_scale() {
        let scale = TargetScale {
            mean: 10.0,
            std: 2.0,
        };
        let evaluation = score(
            &Problem::Regression,
            &Targets::Values(vec![10.0, 12.0]),
            scale,
            &[1.0, 2.0],
        )
        .unwrap();
        close(evaluation.metrics["loss"], 1.0);
        close(evaluation.metrics["spearman"], 1.0);
    }

    #[test]
    fn a_split_without_rows_has_no_metrics() {
        let evaluation = score(
            &Problem::Regression,
            &Targets::Values(Vec::new()),
            TargetScale {
                mean: 0.0,
                std: 1.0,
            },
            &[],
        )
        .unwrap();
        assert_eq!(evaluation.rows, 0);
        assert!(evaluation.metrics.is_empty());
    }

    #[test]
    fn outputs_that_are_no_numbers_are_an_error() {
        let problem = Problem::Classification {
            classes: vec!["a".into(), "b".into()],
        };
        let scale = TargetScale {
            mean: 0.0,
            std: 1.0,
        };
        assert!(
            score(
                &problem,
                &Targets::Classes(vec![0]),
                scale,
                &[f64::NAN, 1.0]
            )
            .is_err()
        );
    }

    #[test]
    fn softmax_survives_large_logits() {
        let p = softmax(&[1000.0, 1000.0, -1000.0]);
        close(p[0], 0.5);
        close(p.iter().sum(), 1.0);
    }
}
