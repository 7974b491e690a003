//! Using a personal model on new texts.

use std::sync::Arc;

use serde::Serialize;

use super::{Loaded, PersonalModel};
use crate::{
    backbone::{Backbone, Place},
    batch::evaluation_batches,
    data::{InputKind, Problem, Row, Split, Targets},
    error::LearningError,
    head::token_weights,
    metric::Evaluation,
    network::{EVALUATION_ROWS, Network, best_place, flat, score, softmax},
    pulse::Pulse,
    task::{Inputs, PreparedTask, TargetScale},
    tokenize::{Encoded, TextTokenizer, pad},
};

/// What a model says about one input.
#[derive(Clone, PartialEq, Debug, Serialize)]
#[serde(untagged)]
pub enum Prediction {
    /// For classification.
    Class {
        /// The likeliest class.
        label: String,
        /// Of every class, in the model's order; they sum to 1.
        probabilities: Vec<f64>,
    },
    /// For regression.
    Number {
        /// On the scale of the training labels.
        value: f64,
    },
}

/// A personal model on its backbone.
#[derive(Debug)]
pub struct Predictor {
    model: PersonalModel,
    loaded: Loaded,
    backbone: Arc<Backbone>,
    /// Where prefix and adapters meet.
    first: Place,
    pulse: Pulse,
}

impl Predictor {
    /// Binds a model to its backbone.
    ///
    /// # Errors
    /// [`LearningError::State`] if the backbone is not the one that it was trained on.
    pub fn new(model: PersonalModel, backbone: Arc<Backbone>) -> Result<Self, LearningError> {
        if model.facts.backbone != *backbone.digest() {
            return Err(LearningError::State(format!(
                "the model was trained on a backbone with digest {}, this one has {}",
                model.facts.backbone,
                backbone.digest()
            )));
        }
        let loaded = model.load(backbone.kind())?;
        let first = Place {
            layer: loaded
                .stacks
                .iter()
                .map(|stack| stack.layer)
                .min()
                .unwrap_or(0),
            position: model.facts.adapter_position,
        };
        Ok(Self {
            model,
            loaded,
            backbone,
            first,
            pulse: Pulse::default(),
        })
    }

    /// Beats once for every batch of the evaluations and predictions from now on.
    pub fn set_pulse(&mut self, pulse: Pulse) {
        self.pulse = pulse;
    }

    /// The model.
    pub fn model(&self) -> &PersonalModel {
        &self.model
    }

    /// Predictions for some texts or pairs, in their order. The tokeniser must have been loaded with the model's `max_length`.
    ///
    /// # Errors
    /// [`LearningError::Data`] for a pair where single texts are due or the reverse, the tokeniser's, and libtorch's.
    pub fn predict(
        &self,
        tokenizer: &TextTokenizer,
        texts: &[(&str, Option<&str>)],
    ) -> Result<Vec<Prediction>, LearningError> {
        let outputs = self.outputs(tokenizer, texts)?;
        Ok(outputs
            .chunks(self.network().outputs)
            .map(|row| self.prediction(row))
            .collect())
    }

    /// Loss and metrics on labelled rows. The tokeniser must have been loaded with the model's `max_length`.
    ///
    /// # Errors
    /// As [`Predictor::predict`], and [`LearningError::Data`] that names a label which did not occur in training.
    pub fn evaluate_rows(
        &self,
        tokenizer: &TextTokenizer,
        rows: &[Row],
    ) -> Result<Evaluation, LearningError> {
        let facts = &self.model.facts;
        let targets = Targets::read(&facts.problem, Split::Test, rows)?;
        let texts: Vec<(&str, Option<&str>)> = rows
            .iter()
            .map(|row| (row.text.as_str(), row.pair.as_deref()))
            .collect();
        let scale = TargetScale {
            mean: facts.target_mean,
            std: facts.target_std,
        };
        score(
            &facts.problem,
            &targets,
            scale,
            &self.outputs(tokenizer, &texts)?,
        )
    }

    /// The head's outputs before softmax or scaling, row after row: one for each class, or one.
    ///
    /// # Errors
    /// As [`Predictor::predict`].
    pub fn outputs(
        &self,
        tokenizer: &TextTokenizer,
        texts: &[(&str, Option<&str>)],
    ) -> Result<Vec<f64>, LearningError> {
        let pairs = self.model.facts.input == InputKind::Pair;
        if let Some(index) = texts
            .iter()
            .position(|(_, second)| second.is_some() != pairs)
        {
            return Err(LearningError::Data(format!(
                "input {index} is {}, but the model takes {}",
                if pairs { "a single text" } else { "a pair" },
                if pairs { "pairs" } else { "single texts" }
            )));
        }
        let encoded = tokenizer.encode_all(texts)?;
        let lengths: Vec<usize> = encoded.iter().map(|row| row.ids.len()).collect();
        let network = self.network();
        let width = network.outputs;
        let mut all = vec![0.0; texts.len() * width];
        for rows in evaluation_batches(&lengths, EVALUATION_ROWS) {
            let chosen: Vec<&Encoded> = rows.iter().map(|&row| &encoded[row]).collect();
            let batch = pad(&chosen, self.backbone.config().pad_id)?;
            let inputs = Inputs {
                prefix: self.backbone.run_prefix(&batch, self.first)?,
                weights: token_weights(&batch.mask, self.backbone.kind())?,
                mask: batch.mask,
            };
            let logits = flat(&network.logits(&self.backbone, &inputs)?)?;
            for (row, outputs) in rows.iter().zip(logits.chunks(width)) {
                all[row * width..(row + 1) * width].copy_from_slice(outputs);
            }
            self.pulse.beat();
        }
        Ok(all)
    }

    /// Loss and metrics on a split of a prepared task.
    ///
    /// # Errors
    /// [`LearningError::Data`] if the task is of another kind or has other classes than the model, or a label is unseen in training.
    pub fn evaluate(&self, task: &PreparedTask, split: Split) -> Result<Evaluation, LearningError> {
        let facts = &self.model.facts;
        if task.problem() != &facts.problem || task.kind() != facts.input {
            return Err(LearningError::Data(
                "the task's kind or classes are not those that the model was trained on".to_owned(),
            ));
        }
        if task.backbone() != self.backbone.digest()
            || task.first() != self.first
            || task.max_length() != facts.max_length
        {
            return Err(LearningError::Config(
                "the task was prepared for another backbone, place of the first adapter or length than the model's"
                    .to_owned(),
            ));
        }
        self.network().evaluate(&self.backbone, task, split)
    }

    fn network(&self) -> Network<'_> {
        Network {
            stacks: &self.loaded.stacks,
            head: &self.loaded.head,
            pool: self.model.facts.pool,
            outputs: self.model.facts.problem.outputs(),
            pulse: &self.pulse,
        }
    }

    fn prediction(&self, outputs: &[f64]) -> Prediction {
        match &self.model.facts.problem {
            Problem::Classification { classes } => Prediction::Class {
                label: classes[best_place(outputs)].clone(),
                probabilities: softmax(outputs),
            },
            Problem::Regression => Prediction::Number {
                value: outputs[0] * self.model.facts.target_std + self.model.facts.target_mean,
            },
        }
    }
}
