//! Flow matching on straight lines: x_s = (1 - s) x0 + s z, and the model says z - x0.
//!
//! The loss is the plain mean of squares: the weight w(t) of ArtAug's formula (arXiv 2412.12888) is 1 here, as the times are drawn shifted already.

use serde::Deserialize;
use serde_json::{Map, Value};

use super::{
    TrainingTime,
    plan::{Plan, Step},
};
use crate::diffusion::files;

const NEUTRAL: [(&str, &str); 7] = [
    ("use_dynamic_shifting", "false"),
    ("use_karras_sigmas", "false"),
    ("use_exponential_sigmas", "false"),
    ("use_beta_sigmas", "false"),
    ("invert_sigmas", "false"),
    ("shift_terminal", "null"),
    ("stochastic_sampling", "false"),
];

#[derive(Deserialize)]
struct Fields {
    #[serde(default = "thousand")]
    num_train_timesteps: i64,
    #[serde(default = "one")]
    shift: f64,
}

fn thousand() -> i64 {
    1000
}
fn one() -> f64 {
    1.0
}

/// A straight flow whose times are shifted towards noise: s' = shift s / (1 + (shift - 1) s), with shift 3 in SD3.5.
#[derive(Debug, Clone, PartialEq)]
pub struct Flow {
    times: f64,
    shift: f64,
}

impl Flow {
    /// A flow over `times` (1000 in all published models).
    ///
    /// # Errors
    /// Which number is out of range.
    pub fn new(times: i64, shift: f64) -> Result<Self, String> {
        files::within("num_train_timesteps", times, 100_000)?;
        if !(0.01..=100.0).contains(&shift) {
            return Err(format!("shift {shift} is not in 0.01..=100"));
        }
        Ok(Self {
            times: times as f64,
            shift,
        })
    }

    pub(super) fn parse(text: &[u8]) -> Result<Self, String> {
        let all: Map<String, Value> =
            serde_json::from_slice(text).map_err(|error| error.to_string())?;
        files::neutral(&all, &NEUTRAL)?;
        let fields: Fields = serde_json::from_slice(text).map_err(|error| error.to_string())?;
        Self::new(fields.num_train_timesteps, fields.shift)
    }

    /// s' of s.
    pub fn shifted(&self, s: f64) -> f64 {
        self.shift * s / (1.0 + (self.shift - 1.0) * s)
    }

    /// The parts of noise that `steps` steps start from, and 0 at the end. Like `diffusers`, which spaces the times between two numbers that are
    /// shifted already and then shifts them again.
    pub fn sigmas(&self, steps: usize) -> Vec<f64> {
        let least = self.shifted(1.0 / self.times);
        let stride = if steps > 1 {
            (1.0 - least) / (steps - 1) as f64
        } else {
            0.0
        };
        (0..steps)
            .map(|step| self.shifted(1.0 - stride * step as f64))
            .chain([0.0])
            .collect()
    }

    pub(super) fn plan(&self, steps: usize) -> Result<Plan, String> {
        files::within("sampling steps", steps as i64, self.times as i64)?;
        let sigmas = self.sigmas(steps);
        let steps = sigmas
            .windows(2)
            .map(|pair| {
                let (sigma, next) = (pair[0], pair[1]);
                let keep = next / sigma;
                Step {
                    time: sigma * self.times,
                    input_scale: 1.0,
                    x0_sample: 1.0,
                    x0_output: -sigma,
                    keep,
                    now: 1.0 - keep,
                    before: 0.0,
                }
            })
            .collect();
        Ok(Plan {
            start_scale: 1.0,
            steps,
        })
    }

    pub(super) fn training_time(&self, uniform: f64) -> TrainingTime {
        let s = self.shifted(uniform);
        TrainingTime {
            time: s * self.times,
            data: 1.0 - s,
            noise: s,
            target_data: -1.0,
            target_noise: 1.0,
        }
    }
}
