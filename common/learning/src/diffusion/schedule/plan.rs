//! A sampler's numbers, and the walk along them.

use serde::{Deserialize, Serialize};
use tch::Tensor;

use super::{NoiseTable, Prediction, Spacing};
use crate::{diffusion::files, error::LearningError};

/// The ways to solve the equation from noise to data.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Sampler {
    /// First order, in the variance-preserving form; eta 0.
    Ddim,
    /// DPM-Solver++ of second order, from two estimates.
    Dpm,
    /// First order, in the variance-exploding form.
    Euler,
}

/// One step's numbers; the module's head says what they mean.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Step {
    /// What the model is told.
    pub time: f64,
    /// The model reads the sample times this.
    pub input_scale: f64,
    /// The sample's part in the estimate of the clean sample.
    pub x0_sample: f64,
    /// The output's part in it.
    pub x0_output: f64,
    /// The sample's part in the next sample.
    pub keep: f64,
    /// The estimate's part in it.
    pub now: f64,
    /// The part of the estimate of the step before; 0 for the first.
    pub before: f64,
}

/// All steps.
#[derive(Debug, Clone, PartialEq)]
pub struct Plan {
    /// A run starts from standard normal noise times this.
    pub start_scale: f64,
    /// From noise to image.
    pub steps: Vec<Step>,
}

/// A run on its way: the sample, the last estimate and how many steps are done. All that a resumed run needs.
#[derive(Debug)]
pub struct Walk {
    /// The sample, `[n, c, h, w]`.
    pub sample: Tensor,
    /// The estimate of the clean sample that the last step made.
    pub estimate: Option<Tensor>,
    /// Steps done.
    pub done: usize,
}

impl Walk {
    /// The start of a run from standard normal noise.
    ///
    /// # Errors
    /// [`LearningError::Torch`] if the noise cannot be scaled.
    pub fn start(plan: &Plan, noise: &Tensor) -> Result<Self, LearningError> {
        Ok(Self {
            sample: noise.f_mul_scalar(plan.start_scale)?,
            estimate: None,
            done: 0,
        })
    }

    /// What the model reads next, and its time; `None` at the end.
    ///
    /// # Errors
    /// [`LearningError::Torch`] if the sample cannot be scaled.
    pub fn next(&self, plan: &Plan) -> Result<Option<(Tensor, f64)>, LearningError> {
        let Some(step) = plan.steps.get(self.done) else {
            return Ok(None);
        };
        Ok(Some((
            self.sample.f_mul_scalar(step.input_scale)?,
            step.time,
        )))
    }

    /// Takes the step with the model's output.
    ///
    /// # Errors
    /// [`LearningError::Config`] if the run has ended, [`LearningError::State`] if a resumed run lacks its last estimate.
    pub fn advance(&mut self, plan: &Plan, output: &Tensor) -> Result<(), LearningError> {
        let step = plan.steps.get(self.done).ok_or_else(|| {
            LearningError::Config(format!("the run of {} steps has ended", plan.steps.len()))
        })?;
        let estimate = self
            .sample
            .f_mul_scalar(step.x0_sample)?
            .f_add(&output.f_mul_scalar(step.x0_output)?)?;
        let mut next = estimate.f_mul_scalar(step.now)?;
        // A factor of 0 is left out: the last step of every sampler forgets the sample, which may be large.
        if step.keep != 0.0 {
            next = next.f_add(&self.sample.f_mul_scalar(step.keep)?)?;
        }
        if step.before != 0.0 {
            let before = self.estimate.as_ref().ok_or_else(|| {
                LearningError::State(format!(
                    "step {} needs the estimate of the step before",
                    self.done
                ))
            })?;
            next = next.f_add(&before.f_mul_scalar(step.before)?)?;
        }
        self.sample = next;
        self.estimate = Some(estimate);
        self.done += 1;
        Ok(())
    }
}

/// Rounds halves to even, as numpy does.
fn round(value: f64) -> i64 {
    value.round_ties_even() as i64
}

impl NoiseTable {
    pub(super) fn plan(&self, sampler: Sampler, steps: usize) -> Result<Plan, String> {
        files::within("sampling steps", steps as i64, self.alphas.len() as i64)?;
        let times = self.times(sampler, steps);
        let last = (self.alphas.len() - 1) as f64;
        if let Some(time) = times.iter().find(|&&time| time < 0.0 || time > last) {
            return Err(format!(
                "{steps} sampling steps would visit time {time}, outside 0..={last}"
            ));
        }
        // Between equal times a step of second order divides by zero.
        if times.windows(2).any(|pair| pair[0] <= pair[1]) {
            return Err(format!(
                "{steps} sampling steps of {sampler:?} would visit a time twice; ask for fewer than {}",
                self.alphas.len()
            ));
        }
        Ok(match sampler {
            Sampler::Ddim => self.ddim(&times),
            Sampler::Dpm => self.dpm(&times),
            Sampler::Euler => self.euler(&times),
        })
    }

    fn times(&self, sampler: Sampler, steps: usize) -> Vec<f64> {
        let all = self.alphas.len() as i64;
        let n = steps as i64;
        // DPM-Solver++ counts one more time, the one at the end, and leaves it out.
        let extra = i64::from(sampler == Sampler::Dpm);
        match self.spacing(sampler) {
            Spacing::Leading => {
                let stride = all / (n + extra);
                (extra..n + extra)
                    .rev()
                    .map(|place| (place * stride + self.offset) as f64)
                    .collect()
            }
            Spacing::Trailing => (0..n)
                .map(|place| {
                    round(all as f64 - place as f64 * (all as f64 / n as f64)) as f64 - 1.0
                })
                .collect(),
            Spacing::Linspace => {
                let points = n + extra;
                let stride = if points > 1 {
                    (all - 1) as f64 / (points - 1) as f64
                } else {
                    0.0
                };
                (extra..points)
                    .rev()
                    .map(|place| {
                        let time = place as f64 * stride;
                        if sampler == Sampler::Euler {
                            time
                        } else {
                            round(time) as f64
                        }
                    })
                    .collect()
            }
        }
    }

    /// Parts of sample and output in the estimate, for a sample of data part `a` and noise part `s`.
    fn estimate(&self, a: f64, s: f64) -> (f64, f64) {
        match self.prediction {
            Prediction::Noise => (1.0 / a, -s / a),
            Prediction::Velocity => (a, -s),
        }
    }

    fn ddim(&self, times: &[f64]) -> Plan {
        let stride = (self.alphas.len() / times.len()) as f64;
        let steps = times
            .iter()
            .map(|&time| {
                let alpha = self.alphas[time as usize];
                let next = time - stride;
                let next_alpha = if next >= 0.0 {
                    self.alphas[next as usize]
                } else {
                    self.final_alpha
                };
                let (x0_sample, x0_output) = self.estimate(alpha.sqrt(), (1.0 - alpha).sqrt());
                let keep = ((1.0 - next_alpha) / (1.0 - alpha)).sqrt();
                Step {
                    time,
                    input_scale: 1.0,
                    x0_sample,
                    x0_output,
                    keep,
                    now: next_alpha.sqrt() - alpha.sqrt() * keep,
                    before: 0.0,
                }
            })
            .collect();
        Plan {
            start_scale: 1.0,
            steps,
        }
    }

    /// Noise over data at a time between two of the table's.
    fn sigma(&self, time: f64) -> f64 {
        let at = |place: usize| ((1.0 - self.alphas[place]) / self.alphas[place]).sqrt();
        let below = time.floor() as usize;
        let above = (below + 1).min(self.alphas.len() - 1);
        let part = time - time.floor();
        at(below) * (1.0 - part) + at(above) * part
    }

    fn dpm(&self, times: &[f64]) -> Plan {
        // Data and noise parts and half the log of their ratio squared; at the end there is no noise.
        let parts = |sigma: f64| {
            let data = 1.0 / (1.0 + sigma * sigma).sqrt();
            (data, data * sigma, -sigma.ln())
        };
        let sigmas: Vec<f64> = times.iter().map(|&time| self.sigma(time)).collect();
        let steps = (0..times.len())
            .map(|place| {
                let (data, noise, log) = parts(sigmas[place]);
                let (x0_sample, x0_output) = self.estimate(data, noise);
                let mut step = Step {
                    time: times[place],
                    input_scale: 1.0,
                    x0_sample,
                    x0_output,
                    keep: 0.0,
                    now: 1.0,
                    before: 0.0,
                };
                let Some(&next) = sigmas.get(place + 1) else {
                    return step;
                };
                let (next_data, next_noise, next_log) = parts(next);
                let h = next_log - log;
                step.keep = next_noise / noise;
                let gain = -next_data * (-h).exp_m1();
                step.now = gain;
                if place > 0 {
                    let ratio = (log - parts(sigmas[place - 1]).2) / h;
                    let slope = 0.5 * gain / ratio;
                    step.now += slope;
                    step.before = -slope;
                }
                step
            })
            .collect();
        Plan {
            start_scale: 1.0,
            steps,
        }
    }

    fn euler(&self, times: &[f64]) -> Plan {
        let sigmas: Vec<f64> = times.iter().map(|&time| self.sigma(time)).collect();
        let steps = times
            .iter()
            .enumerate()
            .map(|(place, &time)| {
                let sigma = sigmas[place];
                let next = sigmas.get(place + 1).copied().unwrap_or(0.0);
                // In this form the sample is data + sigma noise.
                let scale = 1.0 / (sigma * sigma + 1.0).sqrt();
                let (x0_sample, x0_output) = match self.prediction {
                    Prediction::Noise => (1.0, -sigma),
                    Prediction::Velocity => (scale * scale, -sigma * scale),
                };
                let keep = next / sigma;
                Step {
                    time,
                    input_scale: scale,
                    x0_sample,
                    x0_output,
                    keep,
                    now: 1.0 - keep,
                    before: 0.0,
                }
            })
            .collect();
        let largest = sigmas.iter().copied().fold(0.0, f64::max);
        Plan {
            start_scale: match self.spacing(Sampler::Euler) {
                Spacing::Leading => (largest * largest + 1.0).sqrt(),
                Spacing::Trailing | Spacing::Linspace => largest,
            },
            steps,
        }
    }
}
