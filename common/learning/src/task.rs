//! A silo's task made ready: texts as tokens, labels as numbers, and the prefix cache.

use std::sync::{Mutex, PoisonError};

use concord_common::Digest;
use tch::{Kind, Tensor};

use crate::{
    backbone::{Backbone, Place, Prefix},
    cache::{CacheSettings, CacheStats, PrefixCache},
    data::{InputKind, Problem, Row, Split, Targets, TaskData},
    error::LearningError,
    head::token_weights,
    loss::BatchTargets,
    pulse::Pulse,
    tokenize::{Encoded, TextTokenizer},
};

/// Texts that are tokenised between two signs of life.
const TEXTS_AT_ONCE: usize = 4096;

/// A task made ready for one backbone and one place of the first adapter. Jobs that agree in these and in `max_length` can share it, and with it
/// the prefix cache.
#[derive(Debug)]
pub struct PreparedTask {
    kind: InputKind,
    problem: Problem,
    backbone: Digest,
    max_length: usize,
    first: Place,
    splits: [PreparedSplit; 3],
    scale: TargetScale,
    cache: Mutex<PrefixCache>,
}

/// How numbers are standardised: (value − mean) / std, over the training rows.
#[derive(Clone, Copy, PartialEq, Debug)]
pub(crate) struct TargetScale {
    pub(crate) mean: f64,
    pub(crate) std: f64,
}

impl TargetScale {
    const NONE: Self = Self {
        mean: 0.0,
        std: 1.0,
    };

    fn of(values: &[f64]) -> Self {
        let n = values.len().max(1) as f64;
        let mean = values.iter().sum::<f64>() / n;
        let variance = values
            .iter()
            .map(|value| (value - mean).powi(2))
            .sum::<f64>()
            / n;
        // Equal targets have nothing to scale by; the mean of equal numbers may differ from them in the last bit.
        let std = variance.sqrt();
        let std = if std > 1e-12 * mean.abs() { std } else { 1.0 };
        Self { mean, std }
    }
}

#[derive(Debug)]
struct PreparedSplit {
    encoded: Vec<Encoded>,
    lengths: Vec<usize>,
    /// Or why the split's labels cannot be used.
    targets: Result<Targets, String>,
}

/// A batch below the first adapter, with what pooling needs.
#[derive(Debug)]
pub(crate) struct Inputs {
    pub(crate) prefix: Prefix,
    /// `[n, t]`, i64.
    pub(crate) mask: Tensor,
    /// Token weights, `[n, t]`.
    pub(crate) weights: Tensor,
}

impl Inputs {
    /// The batch in pieces of whole rows, in their order, with at most `tokens` tokens each (padding counts; a longer row is a piece of its own).
    /// The pieces are views: they share the batch's memory.
    ///
    /// # Errors
    /// [`LearningError::Torch`] if libtorch cannot make a view.
    pub(crate) fn pieces(&self, tokens: usize) -> Result<Vec<Self>, LearningError> {
        let (n, t) = self.mask.size2()?;
        let (n, t) = (n as usize, t as usize);
        let most = (tokens / t.max(1)).max(1);
        // Even pieces: 33 rows of which 32 fit make 17 and 16, not 32 and 1.
        let rows = n.div_ceil(n.div_ceil(most).max(1)).max(1);
        (0..n)
            .step_by(rows)
            .map(|start| {
                let length = rows.min(n - start) as i64;
                let cut = |x: &Tensor| x.f_narrow(0, start as i64, length);
                Ok(Self {
                    prefix: Prefix {
                        place: self.prefix.place,
                        output: cut(&self.prefix.output)?,
                        residual: cut(&self.prefix.residual)?,
                    },
                    mask: cut(&self.mask)?,
                    weights: cut(&self.weights)?,
                })
            })
            .collect()
    }
}

impl PreparedTask {
    /// Tokenises all rows and reads all labels. `first` is the place of the first adapter; `max_length` the length that
    /// `tokenizer` was loaded with. `pulse` beats while the rows are tokenised.
    ///
    /// # Errors
    /// [`LearningError::Data`] for no training rows, a row with one text where two are due or the reverse, a class without training rows, or a
    /// label in the training or validation rows that cannot be used (a bad one in the test rows is an error when they are evaluated);
    /// [`LearningError::Config`] for an impossible layer; the tokeniser's.
    pub fn new(
        data: &TaskData,
        backbone: &Backbone,
        tokenizer: &TextTokenizer,
        max_length: usize,
        first: Place,
        cache: CacheSettings,
        pulse: &Pulse,
    ) -> Result<Self, LearningError> {
        if data.train.is_empty() {
            return Err(LearningError::Data("there are no training rows".to_owned()));
        }
        if first.layer >= backbone.config().layers {
            return Err(LearningError::Config(format!(
                "there is no layer {}: the backbone has {}, counted from 0",
                first.layer,
                backbone.config().layers
            )));
        }
        let prepared = |split| PreparedSplit::new(data, split, tokenizer, pulse);
        let splits = [
            prepared(Split::Train)?,
            prepared(Split::Validation)?,
            prepared(Split::Test)?,
        ];
        for split in &splits[..2] {
            if let Err(reason) = &split.targets {
                return Err(LearningError::Data(reason.clone()));
            }
        }
        let scale = match &splits[0].targets {
            Ok(Targets::Values(values)) => TargetScale::of(values),
            _ => TargetScale::NONE,
        };
        let task = Self {
            kind: data.kind,
            problem: data.problem.clone(),
            backbone: *backbone.digest(),
            max_length,
            first,
            splits,
            scale,
            cache: Mutex::new(PrefixCache::new(first, cache)),
        };
        task.check_classes()?;
        Ok(task)
    }

    fn check_classes(&self) -> Result<(), LearningError> {
        let (Problem::Classification { classes }, Ok(Targets::Classes(train))) =
            (&self.problem, &self.splits[0].targets)
        else {
            return Ok(());
        };
        for (index, class) in classes.iter().enumerate() {
            if classes[..index].contains(class) {
                return Err(LearningError::Data(format!(
                    "the class `{class}` is listed twice"
                )));
            }
            if !train.contains(&(index as i64)) {
                return Err(LearningError::Data(format!(
                    "the class `{class}` has no training row"
                )));
            }
        }
        Ok(())
    }

    /// Single texts or pairs.
    pub fn kind(&self) -> InputKind {
        self.kind
    }

    /// What is learnt.
    pub fn problem(&self) -> &Problem {
        &self.problem
    }

    /// Number of rows of a split.
    pub fn rows(&self, split: Split) -> usize {
        self.split(split).encoded.len()
    }

    /// Longest input in tokens.
    pub fn max_length(&self) -> usize {
        self.max_length
    }

    /// What the prefix cache has done so far.
    pub fn cache_stats(&self) -> CacheStats {
        self.cache
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .stats()
    }

    /// Accuracy on a split of the class that is the most frequent in training (the first of several); `None` for numbers or no rows.
    ///
    /// # Errors
    /// [`LearningError::Data`] if the split has a label that is unseen in training.
    pub fn majority_accuracy(&self, split: Split) -> Result<Option<f64>, LearningError> {
        let (Targets::Classes(train), Targets::Classes(truth)) =
            (self.targets(Split::Train)?, self.targets(split)?)
        else {
            return Ok(None);
        };
        let count =
            |labels: &[i64], class: i64| labels.iter().filter(|&&label| label == class).count();
        let majority = (0..self.problem.outputs() as i64)
            .max_by_key(|&class| (count(train, class), -class))
            .unwrap_or(0);
        Ok((!truth.is_empty()).then(|| count(truth, majority) as f64 / truth.len() as f64))
    }

    pub(crate) fn first(&self) -> Place {
        self.first
    }

    pub(crate) fn backbone(&self) -> &Digest {
        &self.backbone
    }

    pub(crate) fn scale(&self) -> TargetScale {
        self.scale
    }

    pub(crate) fn lengths(&self, split: Split) -> &[usize] {
        &self.split(split).lengths
    }

    pub(crate) fn targets(&self, split: Split) -> Result<&Targets, LearningError> {
        self.split(split)
            .targets
            .as_ref()
            .map_err(|reason| LearningError::Data(reason.clone()))
    }

    pub(crate) fn inputs(
        &self,
        backbone: &Backbone,
        split: Split,
        rows: &[usize],
    ) -> Result<Inputs, LearningError> {
        let mut cache = self.cache.lock().unwrap_or_else(PoisonError::into_inner);
        let batch = cache.batch(backbone, split, rows, &self.split(split).encoded)?;
        debug_assert_eq!(cache.first(), self.first);
        let weights = token_weights(&batch.mask, backbone.kind())?;
        Ok(Inputs {
            prefix: batch.prefix,
            mask: batch.mask,
            weights,
        })
    }

    pub(crate) fn batch_targets(
        &self,
        split: Split,
        rows: &[usize],
        kind: Kind,
    ) -> Result<BatchTargets, LearningError> {
        Ok(match self.targets(split)? {
            Targets::Classes(labels) => {
                let chosen: Vec<i64> = rows.iter().map(|&row| labels[row]).collect();
                BatchTargets::Classes(Tensor::f_from_slice(&chosen)?)
            }
            Targets::Values(values) => {
                let scale = self.scale;
                let chosen: Vec<f64> = rows
                    .iter()
                    .map(|&row| (values[row] - scale.mean) / scale.std)
                    .collect();
                BatchTargets::Values(Tensor::f_from_slice(&chosen)?.f_to_kind(kind)?)
            }
        })
    }

    fn split(&self, split: Split) -> &PreparedSplit {
        &self.splits[split as usize]
    }
}

impl PreparedSplit {
    fn new(
        data: &TaskData,
        split: Split,
        tokenizer: &TextTokenizer,
        pulse: &Pulse,
    ) -> Result<Self, LearningError> {
        let rows = data.rows(split);
        let encoded = encode(data.kind, rows, split.name(), tokenizer, pulse)?;
        Ok(Self {
            lengths: encoded.iter().map(|row| row.ids.len()).collect(),
            encoded,
            targets: Targets::read(&data.problem, split, rows).map_err(|error| match error {
                LearningError::Data(reason) => reason,
                other => other.to_string(),
            }),
        })
    }
}

fn encode(
    kind: InputKind,
    rows: &[Row],
    split: &str,
    tokenizer: &TextTokenizer,
    pulse: &Pulse,
) -> Result<Vec<Encoded>, LearningError> {
    let texts = rows
        .iter()
        .enumerate()
        .map(|(index, row)| match (kind, row.pair.as_deref()) {
            (InputKind::Single, None) => Ok((row.text.as_str(), None)),
            (InputKind::Pair, Some(second)) => Ok((row.text.as_str(), Some(second))),
            (InputKind::Single, Some(_)) => Err(LearningError::Data(format!(
                "{split} row {index} has two texts, but the task is one of single texts"
            ))),
            (InputKind::Pair, None) => Err(LearningError::Data(format!(
                "{split} row {index} has one text, but the task is one of pairs"
            ))),
        })
        .collect::<Result<Vec<_>, _>>()?;
    let mut encoded = Vec::with_capacity(texts.len());
    for some in texts.chunks(TEXTS_AT_ONCE) {
        encoded.extend(tokenizer.encode_all(some)?);
        pulse.beat();
    }
    Ok(encoded)
}
