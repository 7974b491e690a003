//! A model as it runs: adapters fused, a head on top. Training and use go through the same fusion.
//!
//! Above the prefix a batch runs in pieces of a few rows ([`represent`]), of which only the pooled vectors are put together again. Rows do not
//! see each other inside the backbone, so nothing changes but the last bits (libtorch's kernels block differently at other shapes), and what a
//! step holds for a moment only (the feed-forward network's inner values, gradients of attention) is a piece's instead of the batch's. It also
//! keeps the blocks small that come and go between those that the gradients need: glibc leaves a gap of almost its size for each of them.
//! `docs/benchmarks.md` has the figures.

use std::collections::BTreeMap;

use concord_common::job::Pool;
use tch::{Kind, Tensor};

use crate::{
    adapter::{Adapter, Global},
    backbone::Backbone,
    batch::evaluation_batches,
    data::{Problem, Split, Targets},
    error::LearningError,
    fusion::{Fusion, LayerViews, Parts, Stacked},
    head::{Linear, pooled},
    metric::{Confusion, Evaluation, spearman},
    pulse::Pulse,
    task::{Inputs, PreparedTask, TargetScale},
};

/// Rows that are evaluated together.
pub(crate) const EVALUATION_ROWS: usize = 64;

/// Tokens of a piece, padding counted: large enough for full speed, see `docs/benchmarks.md`.
const PIECE_TOKENS: usize = 1024;

/// What a forward pass needs besides the backbone.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Network<'a> {
    pub(crate) stacks: &'a [Stacked],
    pub(crate) head: &'a Linear,
    pub(crate) pool: Pool,
    pub(crate) outputs: usize,
    pub(crate) pulse: &'a Pulse,
}

impl Network<'_> {
    /// Logits of a batch, `[n, outputs]`, without gradients.
    pub(crate) fn logits(
        &self,
        backbone: &Backbone,
        inputs: &Inputs,
    ) -> Result<Tensor, LearningError> {
        let _frozen = tch::no_grad_guard();
        let (pooled, _) = represent(backbone, self.pool, self.stacks, None, inputs)?;
        self.head.forward(&pooled, self.outputs)
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
            self.pulse.beat();
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

/// The adapters that a pass takes the views of: those in training, both of them, and the global one as received.
pub(crate) type Watched<'a> = (Parts<'a>, &'a Adapter<Global>);

/// The pooled last hidden states of a batch, `[n, d]`, and the views of every adapted layer if `watched`, lowest first.
///
/// # Errors
/// Those of [`Backbone::run_from_prefix`].
pub(crate) fn represent(
    backbone: &Backbone,
    pool: Pool,
    stacks: &[Stacked],
    watched: Option<Watched<'_>>,
    inputs: &Inputs,
) -> Result<(Tensor, Vec<LayerViews>), LearningError> {
    in_pieces(PIECE_TOKENS, backbone, pool, stacks, watched, inputs)
}

fn in_pieces(
    tokens: usize,
    backbone: &Backbone,
    pool: Pool,
    stacks: &[Stacked],
    watched: Option<Watched<'_>>,
    inputs: &Inputs,
) -> Result<(Tensor, Vec<LayerViews>), LearningError> {
    let mut vectors = Vec::new();
    let mut views = Vec::new();
    for piece in inputs.pieces(tokens)? {
        let position = piece.prefix.place.position;
        let mut hook = match watched {
            Some((parts, received)) => {
                Fusion::watching(position, stacks, parts, received, &piece.weights)
            }
            None => Fusion::new(position, stacks),
        };
        let hidden = backbone.run_from_prefix(&piece.prefix, &piece.mask, &mut hook)?;
        views.push(hook.into_views());
        vectors.push(pooled(pool, &hidden, &piece.weights)?);
    }
    Ok((
        Tensor::f_cat(&vectors, 0)?,
        LayerViews::of_all_rows(&views)?,
    ))
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
mod tests;
