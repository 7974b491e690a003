//! The table of noise of Stable Diffusion: how much of a sample is left at each of a thousand times.

use serde::Deserialize;
use serde_json::{Map, Value};

use super::{Sampler, TrainingTime};
use crate::diffusion::files;

/// Fields of samplers that would change the numbers in ways that are not built, and the value that leaves them alone.
const NEUTRAL: [(&str, &str); 15] = [
    ("thresholding", "false"),
    ("clip_sample", "false"),
    ("trained_betas", "null"),
    ("rescale_betas_zero_snr", "false"),
    ("use_karras_sigmas", "false"),
    ("use_exponential_sigmas", "false"),
    ("use_beta_sigmas", "false"),
    ("use_lu_lambdas", "false"),
    ("use_flow_sigmas", "false"),
    ("interpolation_type", "\"linear\""),
    ("timestep_type", "\"discrete\""),
    ("euler_at_final", "false"),
    ("solver_order", "2"),
    ("algorithm_type", "\"dpmsolver++\""),
    ("final_sigmas_type", "\"zero\""),
];

/// The same for fields that mean something else to other classes.
const NEUTRAL_FOR_DPM: [(&str, &str); 2] = [
    ("solver_type", "\"midpoint\""),
    ("lambda_min_clipped", "null"),
];

/// What a model says about a noisy sample.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
pub enum Prediction {
    /// The noise in it.
    #[serde(rename = "epsilon")]
    Noise,
    /// v = a noise - s data, where a and s are their parts.
    #[serde(rename = "v_prediction")]
    Velocity,
}

/// Which of the training times a sampler visits.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Spacing {
    /// From 0 (plus an offset) upwards in equal strides.
    Leading,
    /// From the last downwards in equal strides.
    Trailing,
    /// The last, the first and equally many between.
    Linspace,
}

#[derive(Deserialize)]
struct Fields {
    #[serde(default = "thousand")]
    num_train_timesteps: i64,
    beta_start: f64,
    beta_end: f64,
    beta_schedule: String,
    #[serde(default = "yes")]
    set_alpha_to_one: bool,
    #[serde(default)]
    steps_offset: i64,
    #[serde(default = "noise")]
    prediction_type: Prediction,
    timestep_spacing: Option<Spacing>,
}

fn thousand() -> i64 {
    1000
}
fn yes() -> bool {
    true
}
fn noise() -> Prediction {
    Prediction::Noise
}

/// The table.
#[derive(Debug, Clone, PartialEq)]
pub struct NoiseTable {
    /// Variance that is left of the data, by time.
    pub(super) alphas: Vec<f64>,
    pub(super) prediction: Prediction,
    /// What the file says; absent, every sampler has its own.
    spacing: Option<Spacing>,
    pub(super) offset: i64,
    /// What is left at the end of DDIM.
    pub(super) final_alpha: f64,
}

impl NoiseTable {
    pub(super) fn parse(text: &[u8]) -> Result<Self, String> {
        let all: Map<String, Value> =
            serde_json::from_slice(text).map_err(|error| error.to_string())?;
        files::neutral(&all, &NEUTRAL)?;
        let class = all.get("_class_name").and_then(Value::as_str);
        if class == Some("DPMSolverMultistepScheduler") {
            files::neutral(&all, &NEUTRAL_FOR_DPM)?;
        }
        if class == Some("DDIMScheduler") && !all.contains_key("clip_sample") {
            return Err("clip_sample is not given, which means true to this scheduler; only false is supported".to_owned());
        }
        let fields: Fields = serde_json::from_slice(text).map_err(|error| error.to_string())?;
        let times = fields.num_train_timesteps;
        files::within("num_train_timesteps", times, 100_000)?;
        if times < 2 {
            return Err("num_train_timesteps 1 is too few".to_owned());
        }
        let (start, end) = (fields.beta_start, fields.beta_end);
        if !(start > 0.0 && start <= end && end < 1.0) {
            return Err(format!(
                "beta_start {start} and beta_end {end} are not 0 < start <= end < 1"
            ));
        }
        if !(0..times).contains(&fields.steps_offset) {
            return Err(format!(
                "steps_offset {} is out of range",
                fields.steps_offset
            ));
        }
        let betas: Vec<f32> = match fields.beta_schedule.as_str() {
            "linear" => even(start as f32, end as f32, times as usize),
            "scaled_linear" => even(start.sqrt() as f32, end.sqrt() as f32, times as usize)
                .into_iter()
                .map(|root| root * root)
                .collect(),
            other => {
                return Err(format!(
                    "beta_schedule {other:?} is neither \"linear\" nor \"scaled_linear\""
                ));
            }
        };
        let alphas = left(&betas);
        Ok(Self {
            final_alpha: if fields.set_alpha_to_one {
                1.0
            } else {
                alphas[0]
            },
            alphas,
            prediction: fields.prediction_type,
            spacing: fields.timestep_spacing,
            offset: fields.steps_offset,
        })
    }

    /// Variance of the data that is left, by time.
    pub fn alphas(&self) -> &[f64] {
        &self.alphas
    }

    /// What the model predicts.
    pub fn prediction(&self) -> Prediction {
        self.prediction
    }

    /// The same table, its times visited in another way.
    #[must_use]
    pub fn spaced(self, spacing: Spacing) -> Self {
        Self {
            spacing: Some(spacing),
            ..self
        }
    }

    /// How a sampler visits the times: as the file says, or as `diffusers` has it where it says nothing. There such a value is the sampler's own, also
    /// in a file of another class.
    pub(super) fn spacing(&self, sampler: Sampler) -> Spacing {
        self.spacing.unwrap_or(match sampler {
            Sampler::Ddim => Spacing::Leading,
            Sampler::Dpm | Sampler::Euler => Spacing::Linspace,
        })
    }

    pub(super) fn training_time(&self, uniform: f64) -> TrainingTime {
        let count = self.alphas.len();
        let time = ((uniform * count as f64) as usize).min(count - 1);
        let (data, noise) = (self.alphas[time].sqrt(), (1.0 - self.alphas[time]).sqrt());
        let (target_data, target_noise) = match self.prediction {
            Prediction::Noise => (0.0, 1.0),
            Prediction::Velocity => (-noise, data),
        };
        TrainingTime {
            time: time as f64,
            data,
            noise,
            target_data,
            target_noise,
        }
    }
}

/// Equally spaced f32 numbers, each counted from the nearer end, as libtorch's `linspace` does it.
fn even(start: f32, end: f32, count: usize) -> Vec<f32> {
    let step = (end - start) / (count - 1) as f32;
    (0..count)
        .map(|place| {
            if place < count / 2 {
                step.mul_add(place as f32, start)
            } else {
                (-step).mul_add((count - 1 - place) as f32, end)
            }
        })
        .collect()
}

/// The running product of 1 - beta. Published models were trained with the f32 values, so those are the true ones; the product is kept in f64
/// and rounded for every entry, as libtorch's `cumprod` does it.
fn left(betas: &[f32]) -> Vec<f64> {
    let mut product = 1.0_f64;
    betas
        .iter()
        .map(|beta| {
            product *= f64::from(1.0 - beta);
            f64::from(product as f32)
        })
        .collect()
}
