//! Training a text-to-image model from nothing: UNet and text encoder together, by the whole graph, with a running average of the weights.
//!
//! Unlike the fits of adapters ([`super::train`]) the text encoder is trained too, so captions are encoded anew in every step. The whole state can be
//! saved after any step; a run that goes on from it ends in the same bytes as one that was never interrupted, on the same machine with the same number
//! of threads.

use std::collections::BTreeMap;

use concord_common::seed::Seed;
use serde::{Deserialize, Serialize};
use tch::{Kind, Reduction, Tensor};

use super::{
    denoiser::Denoiser,
    pipeline::{TextToImage, from_bytes},
    seeds,
};
use crate::{
    error::LearningError,
    named::{self, HostTensor, NamedTensors, Taker, deep_copy},
    optimiser::{AdamW, AdamWSettings, Counters, Parameter},
};

/// How the steps go. The length of the run is no part of it: a run can be prolonged at any time.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Course {
    /// Learning rate after warm-up.
    pub learning_rate: f64,
    /// From this step on the rate falls with the square root of the step.
    pub decay_from: u64,
    /// The optimiser's settings.
    pub adamw: AdamWSettings,
    /// The average's memory: each step leaves this part of it, less in the first steps.
    pub average: f64,
}

impl Course {
    /// The learning rate of a step (from 0), warm-up aside.
    pub fn rate(&self, step: u64) -> f64 {
        let late = self.decay_from as f64 / (step + 1) as f64;
        self.learning_rate * late.sqrt().min(1.0)
    }

    /// The part of the average that a step (from 0) leaves. A short run's average does not remember where it began.
    pub fn keep(&self, step: u64) -> f64 {
        let early = (step + 1) as f64 / (step + 10) as f64;
        self.average.min(early)
    }
}

/// Captioned images of one step.
#[derive(Debug)]
pub struct Batch {
    /// 8 bits a channel, `[n, side, side, 3]`.
    pub images: Vec<u8>,
    /// Height and width of an image.
    pub side: i64,
    /// One of each; an empty one teaches what guidance leads away from.
    pub captions: Vec<String>,
    /// Of noise and times.
    pub seed: Seed,
}

/// What stands beside the tensors of a saved state.
#[derive(Debug, Serialize, Deserialize)]
struct Facts {
    step: u64,
    seconds: f64,
    fingerprint: BTreeMap<String, String>,
    counters: BTreeMap<String, Counters>,
}

/// A model's weights in training, their optimiser and their average.
#[derive(Debug)]
pub struct Pretrainer {
    course: Course,
    fingerprint: BTreeMap<String, String>,
    leaves: Vec<Tensor>,
    /// Share memory with the leaves.
    parameters: Vec<Parameter>,
    average: Vec<Tensor>,
    optimiser: AdamW,
    step: u64,
    /// Of the runs before.
    seconds: f64,
}

impl Pretrainer {
    /// Training of a model's UNet and text encoder, both in f32 on the CPU. `fingerprint` says by name what else the run depends on (recipe, data,
    /// threads): a state with another one is refused.
    ///
    /// # Errors
    /// [`LearningError::Config`] if the model computes in something else.
    pub fn new(
        model: &TextToImage,
        course: Course,
        fingerprint: BTreeMap<String, String>,
    ) -> Result<Self, LearningError> {
        if model.compute() != super::params::Compute::CPU {
            return Err(LearningError::Config(
                "a model is trained from nothing in f32 on the CPU only".to_owned(),
            ));
        }
        let mut parameters = Vec::new();
        let mut average = Vec::new();
        let mut leaves = Vec::new();
        for (name, leaf) in model.leaves() {
            average.push(deep_copy(&leaf)?);
            parameters.push(Parameter {
                name,
                tensor: leaf.f_detach()?,
                learning_rate: course.learning_rate,
            });
            leaves.push(leaf);
        }
        Ok(Self {
            optimiser: AdamW::new(course.adamw),
            course,
            fingerprint,
            leaves,
            parameters,
            average,
            step: 0,
            seconds: 0.0,
        })
    }

    /// Steps done.
    pub fn step(&self) -> u64 {
        self.step
    }

    /// Seconds that the runs before took, as they were saved.
    pub fn seconds(&self) -> f64 {
        self.seconds
    }

    /// Trained values.
    pub fn size(&self) -> usize {
        self.leaves.iter().map(Tensor::numel).sum()
    }

    /// One step. Gives the loss: the mean squared error of the model's answer.
    ///
    /// # Errors
    /// [`LearningError::Training`] if a weight gets no gradient or a number is not finite, [`LearningError::Data`] if images and captions are not
    /// as many.
    pub fn train(&mut self, model: &TextToImage, batch: &Batch) -> Result<f64, LearningError> {
        let rows = batch.captions.len();
        let compute = model.compute();
        let images = from_bytes(
            &batch.images,
            (rows as i64, batch.side, batch.side),
            compute,
        )?;
        let clean = model.codec().encode(&images)?;
        let (_, c, h, w) = clean.size4()?;
        let noises: Vec<Seed> = (0..rows)
            .map(|row| batch.seed.derive(&format!("noise {row}")))
            .collect();
        let noise = seeds::noise(&noises, [c, h, w], compute)?;
        // Spread evenly over the batch with one random shift, which leaves less to chance.
        let shift = batch.seed.derive("times").rng().uniform();
        let times: Vec<_> = (0..rows)
            .map(|row| {
                let place = (row as f64 + shift) / rows as f64;
                model.objective().training_time(place)
            })
            .collect();
        let pair = model.training_pair(&clean, &noise, &times)?;
        let captions: Vec<&str> = batch.captions.iter().map(String::as_str).collect();
        let condition = model.encode_text(&captions)?;
        let output = model.predict(&pair.noisy, &pair.times, &condition)?;
        let loss = output.f_mse_loss(&pair.target, Reduction::Mean)?;
        let value = loss.f_double_value(&[])?;
        if !value.is_finite() {
            return Err(LearningError::Training(format!(
                "the loss of step {} is not finite; lower the learning rate",
                self.step
            )));
        }
        let gradients = Tensor::f_run_backward(&[loss], &self.leaves, false, false)?;
        if let Some((_, parameter)) = gradients
            .iter()
            .zip(&self.parameters)
            .find(|(gradient, _)| !gradient.defined())
        {
            return Err(LearningError::Training(format!(
                "the loss does not depend on {}: it would stay as it began",
                parameter.name
            )));
        }
        let rate = self.course.rate(self.step);
        for parameter in &mut self.parameters {
            parameter.learning_rate = rate;
        }
        self.optimiser.step(&mut self.parameters, &gradients)?;
        let _frozen = tch::no_grad_guard();
        let change = 1.0 - self.course.keep(self.step);
        for (average, parameter) in self.average.iter_mut().zip(&self.parameters) {
            let _ = average.f_lerp_(&parameter.tensor, change)?;
        }
        self.step += 1;
        Ok(value)
    }

    /// The whole state, with the seconds that all runs took. Equal states give equal bytes.
    ///
    /// # Errors
    /// [`LearningError::State`] if it cannot be written.
    pub fn save(&self, seconds: f64) -> Result<Vec<u8>, LearningError> {
        let mut tensors = self.optimiser.moments("moments.")?;
        for (parameter, average) in self.parameters.iter().zip(&self.average) {
            let name = &parameter.name;
            for (part, tensor) in [("parameters", &parameter.tensor), ("average", average)] {
                tensors.insert(format!("{part}.{name}"), HostTensor::from_tensor(tensor)?);
            }
        }
        let facts = Facts {
            step: self.step,
            seconds,
            fingerprint: self.fingerprint.clone(),
            counters: self.optimiser.counters(),
        };
        let facts = serde_json::to_string(&facts)
            .map_err(|error| LearningError::State(error.to_string()))?;
        named::to_safetensors(&tensors, &facts)
    }

    /// Goes on from a saved state: the model's weights are overwritten.
    ///
    /// # Errors
    /// [`LearningError::State`] that names in what the state's fingerprint differs (nothing has been overwritten then), or what is missing, left over
    /// or of another shape.
    pub fn restore(&mut self, bytes: &[u8]) -> Result<(), LearningError> {
        let _frozen = tch::no_grad_guard();
        let (tensors, facts) = read(bytes)?;
        let apart = differences(&facts.fingerprint, &self.fingerprint);
        if !apart.is_empty() {
            return Err(LearningError::State(format!(
                "it belongs to another run: {}",
                apart.join("; ")
            )));
        }
        let mut taker = Taker::new("a training from nothing", tensors);
        let shapes: BTreeMap<String, Vec<usize>> = self
            .parameters
            .iter()
            .map(|parameter| {
                let shape = parameter.tensor.size();
                (
                    parameter.name.clone(),
                    shape.into_iter().map(|size| size as usize).collect(),
                )
            })
            .collect();
        for (parameter, average) in self.parameters.iter_mut().zip(&mut self.average) {
            let name = &parameter.name;
            let shape = &shapes[name];
            let mut take = |part: &str| taker.tensor(&format!("{part}.{name}"), shape, Kind::Float);
            let (value, kept) = (take("parameters")?, take("average")?);
            parameter.tensor.f_copy_(&value)?;
            average.f_copy_(&kept)?;
        }
        self.optimiser = AdamW::restore(
            self.course.adamw,
            &facts.counters,
            "moments.",
            &mut taker,
            Kind::Float,
            |name| shapes.get(name).cloned(),
        )?;
        taker.finish()?;
        self.step = facts.step;
        self.seconds = facts.seconds;
        Ok(())
    }
}

/// What a saved state says of itself.
#[derive(Debug, Clone, PartialEq)]
pub struct StateFacts {
    /// Steps done.
    pub step: u64,
    /// Seconds that all runs took.
    pub seconds: f64,
    /// What the run depends on, by name.
    pub fingerprint: BTreeMap<String, String>,
}

impl From<Facts> for StateFacts {
    fn from(facts: Facts) -> Self {
        Self {
            step: facts.step,
            seconds: facts.seconds,
            fingerprint: facts.fingerprint,
        }
    }
}

/// Reads what a saved state says of itself and gives the model its averaged weights.
///
/// # Errors
/// [`LearningError::State`] if the bytes are no state, or not one of such a model.
pub fn load_average(model: &TextToImage, bytes: &[u8]) -> Result<StateFacts, LearningError> {
    let _frozen = tch::no_grad_guard();
    let (tensors, facts) = read(bytes)?;
    let mut taker = Taker::new("a training from nothing", tensors);
    for (name, mut leaf) in model.weights() {
        let shape: Vec<usize> = leaf.size().into_iter().map(|size| size as usize).collect();
        leaf.f_copy_(&taker.tensor(&format!("average.{name}"), &shape, Kind::Float)?)?;
    }
    Ok(facts.into())
}

/// What a saved state says of itself.
///
/// # Errors
/// [`LearningError::State`] if the bytes are no whole state.
pub fn read_facts(bytes: &[u8]) -> Result<StateFacts, LearningError> {
    Ok(read(bytes)?.1.into())
}

fn read(bytes: &[u8]) -> Result<(NamedTensors, Facts), LearningError> {
    let (tensors, facts) = named::from_safetensors(bytes)?;
    let facts = serde_json::from_str(&facts)
        .map_err(|error| LearningError::State(format!("a training's facts: {error}")))?;
    Ok((tensors, facts))
}

/// Entries that are not the same on both sides, in words.
fn differences(theirs: &BTreeMap<String, String>, ours: &BTreeMap<String, String>) -> Vec<String> {
    let names: std::collections::BTreeSet<&String> = theirs.keys().chain(ours.keys()).collect();
    names
        .into_iter()
        .filter(|name| theirs.get(*name) != ours.get(*name))
        .map(|name| {
            let value = |side: &BTreeMap<String, String>| {
                side.get(name).map_or("nothing", String::as_str).to_owned()
            };
            format!("{name} was {}, now it is {}", value(theirs), value(ours))
        })
        .collect()
}

#[cfg(test)]
mod tests;
