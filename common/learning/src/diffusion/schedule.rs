//! From noise to image in a few steps: noise tables and samplers, as plain numbers.
//!
//! Every deterministic sampler here has one form. With the sample x, the model's output m at x, and the estimate of the clean sample that both
//! give, x0 = a x + b m, a step is
//!
//! ```text
//! x  <-  keep x + now x0 + before x0'        (x0' is the estimate of the step before)
//! ```
//!
//! so that a [`Plan`] is a list of numbers, worked out in f64 before the first step, without any state between steps but x and x0'.
//! The numbers agree with the schedulers of Python's `diffusers` for the same `scheduler_config.json`:
//! DDIM with eta 0 (Song et al. 2020, arXiv 2010.02502), DPM-Solver++ 2M (Lu et al. 2022, arXiv 2211.01095), Euler (Karras et al. 2022,
//! arXiv 2206.00364) and the Euler step of flow matching (Lipman et al. 2022, arXiv 2210.02747; Esser et al. 2024, arXiv 2403.03206).

mod flow;
mod noise;
mod plan;

pub use self::{
    flow::Flow,
    noise::{NoiseTable, Prediction, Spacing},
    plan::{Plan, Sampler, Step, Walk},
};
use std::path::Path;

use serde::Deserialize;
use tch::Tensor;

use super::files;
use crate::error::LearningError;

/// What a model was trained to do, read from `scheduler/scheduler_config.json`.
#[derive(Debug, Clone, PartialEq)]
pub enum Objective {
    /// To predict the noise in a sample, or v (Salimans and Ho 2022, arXiv 2202.00512).
    Noise(NoiseTable),
    /// To predict the direction from data to noise along a straight line.
    Flow(Flow),
}

#[derive(Deserialize)]
struct Class {
    #[serde(rename = "_class_name")]
    class: String,
}

/// A time drawn for training: where a sample is put between data and noise.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct TrainingTime {
    /// What the model is told.
    pub time: f64,
    /// Part of the clean sample in the noisy one.
    pub data: f64,
    /// Part of the noise in it.
    pub noise: f64,
    /// Part of the clean sample in the target.
    pub target_data: f64,
    /// Part of the noise in the target.
    pub target_noise: f64,
}

impl Objective {
    /// Reads a `scheduler_config.json`.
    ///
    /// # Errors
    /// [`LearningError::Io`], or [`LearningError::Config`] that says which field asks for what cannot be done.
    pub fn read(file: &Path) -> Result<Self, LearningError> {
        files::read_config(file, Self::parse)
    }

    pub(crate) fn parse(text: &[u8]) -> Result<Self, String> {
        let text = &plain_json(text);
        let Class { class } = serde_json::from_slice(text).map_err(|error| error.to_string())?;
        if class == "FlowMatchEulerDiscreteScheduler" {
            return Flow::parse(text).map(Self::Flow);
        }
        // Stable Diffusion's samplers share their fields, and any of them can be used with a model.
        if class.ends_with("Scheduler") {
            return NoiseTable::parse(text).map(Self::Noise);
        }
        Err(format!("_class_name {class:?} is no scheduler"))
    }

    /// The numbers of `steps` steps. A flow has one sampler, whatever is asked for.
    ///
    /// # Errors
    /// [`LearningError::Config`] if there cannot be that many steps.
    pub fn plan(&self, sampler: Sampler, steps: usize) -> Result<Plan, LearningError> {
        match self {
            Self::Noise(table) => table.plan(sampler, steps),
            Self::Flow(flow) => flow.plan(steps),
        }
        .map_err(LearningError::Config)
    }

    /// The time for training that a uniform number in 0..1 stands for.
    pub fn training_time(&self, uniform: f64) -> TrainingTime {
        match self {
            Self::Noise(table) => table.training_time(uniform),
            Self::Flow(flow) => flow.training_time(uniform),
        }
    }
}

/// Python writes the bound that bounds nothing, `lambda_min_clipped` of DPM-Solver++, as `-Infinity`, which is no JSON; here it is null.
fn plain_json(text: &[u8]) -> Vec<u8> {
    String::from_utf8_lossy(text)
        .replace(": -Infinity", ": null")
        .replace(":-Infinity", ":null")
        .into_bytes()
}

/// A noisy sample and what the model should say to it.
#[derive(Debug)]
pub struct TrainingPair {
    /// What the model reads, `[n, c, h, w]`.
    pub noisy: Tensor,
    /// What it is told about time, `[n]`, f64.
    pub times: Tensor,
    /// What it should answer, `[n, c, h, w]`.
    pub target: Tensor,
}

/// Mixes clean samples and noise, `[n, c, h, w]` each, every sample at its own time.
///
/// # Errors
/// [`LearningError::Data`] if the times are not as many as the samples.
pub fn training_pair(
    clean: &Tensor,
    noise: &Tensor,
    times: &[TrainingTime],
) -> Result<TrainingPair, LearningError> {
    if clean.size().first() != Some(&(times.len() as i64)) {
        return Err(LearningError::Data(format!(
            "{} times for samples of shape {:?}",
            times.len(),
            clean.size()
        )));
    }
    let column = |value: fn(&TrainingTime) -> f64| -> Result<Tensor, LearningError> {
        let values: Vec<f64> = times.iter().map(value).collect();
        Ok(Tensor::f_from_slice(&values)?
            .f_to_kind(clean.kind())?
            .f_to_device(clean.device())?
            .f_view([-1, 1, 1, 1])?)
    };
    let mix = |data: &Tensor, random: &Tensor| -> Result<Tensor, LearningError> {
        Ok(clean.f_mul(data)?.f_add(&noise.f_mul(random)?)?)
    };
    let told: Vec<f64> = times.iter().map(|time| time.time).collect();
    Ok(TrainingPair {
        noisy: mix(&column(|time| time.data)?, &column(|time| time.noise)?)?,
        times: Tensor::f_from_slice(&told)?.f_to_device(clean.device())?,
        target: mix(
            &column(|time| time.target_data)?,
            &column(|time| time.target_noise)?,
        )?,
    })
}

#[cfg(test)]
mod tests;
