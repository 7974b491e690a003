//! AdamW (Loshchilov and Hutter 2019, arXiv 1711.05101) over named tensors, with a state that can be saved.
//!
//! One step for a parameter w with gradient g, as `torch.optim.AdamW` does it:
//!
//! ```text
//! w <- w (1 - lr * decay)
//! m <- b1 m + (1 - b1) g          v <- b2 v + (1 - b2) g^2
//! w <- w - lr / (1 - b1^t) * m / (sqrt(v) / sqrt(1 - b2^t) + eps)
//! ```
//!
//! lr rises linearly over the first `warmup_steps` updates of each parameter, counted over the whole job: the k-th update uses k / warmup of it.
//! Gradients of all parameters together are scaled down to the norm `clip_norm` first.
//!
//! Every parameter has two counters: `step`, t of the bias correction, which starts again when its moments are forgotten, and `lifetime`,
//! which never does.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};
use tch::Tensor;

use crate::{
    error::LearningError,
    named::{HostTensor, NamedTensors, Taker},
};

#[cfg(test)]
mod tests;

const BETA1: f64 = 0.9;
const BETA2: f64 = 0.999;
const EPSILON: f64 = 1e-8;

/// Settings that all parameters share.
#[derive(Clone, Copy, PartialEq, Debug)]
pub struct AdamWSettings {
    /// Decoupled weight decay.
    pub weight_decay: f64,
    /// Updates over which a parameter's learning rate rises.
    pub warmup_steps: u32,
    /// Norm that gradients are clipped to; 0 for none.
    pub clip_norm: f64,
}

/// A tensor that is trained. Handles share memory: the optimiser writes to the tensor it is given.
#[derive(Debug)]
pub struct Parameter {
    /// Name under which the state is kept.
    pub name: String,
    /// The leaf.
    pub tensor: Tensor,
    /// Its learning rate after warm-up.
    pub learning_rate: f64,
}

/// Counters of one parameter.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
pub struct Counters {
    /// Updates since the moments began.
    pub step: u64,
    /// Updates in all.
    pub lifetime: u64,
}

#[derive(Debug, Default)]
struct Slot {
    counters: Counters,
    /// m and v; absent before the first update.
    moments: Option<(Tensor, Tensor)>,
}

/// The optimiser and its state.
#[derive(Debug)]
pub struct AdamW {
    settings: AdamWSettings,
    slots: BTreeMap<String, Slot>,
}

impl AdamW {
    /// Without any state.
    pub fn new(settings: AdamWSettings) -> Self {
        Self {
            settings,
            slots: BTreeMap::new(),
        }
    }

    /// Updates every parameter by its gradient (`gradients` in the parameters' order; an undefined one counts as 0 and its parameter is left alone)
    /// and returns the gradients' norm before clipping.
    ///
    /// # Errors
    /// [`LearningError::Training`] if the norm is not finite; nothing has been changed then.
    pub fn step(
        &mut self,
        parameters: &mut [Parameter],
        gradients: &[Tensor],
    ) -> Result<f64, LearningError> {
        let _frozen = tch::no_grad_guard();
        let norm = global_norm(gradients)?;
        if !norm.is_finite() {
            return Err(LearningError::Training(
                "the gradients are not finite; lower the learning rate or set `training.clip_norm`"
                    .to_owned(),
            ));
        }
        let clip = self.settings.clip_norm;
        // As `torch.nn.utils.clip_grad_norm_`.
        let factor = if clip > 0.0 {
            (clip / (norm + 1e-6)).min(1.0)
        } else {
            1.0
        };
        for (parameter, gradient) in parameters.iter_mut().zip(gradients) {
            if gradient.defined() {
                let scaled = (factor < 1.0)
                    .then(|| gradient.f_mul_scalar(factor))
                    .transpose()?;
                self.update(parameter, scaled.as_ref().unwrap_or(gradient))?;
            }
        }
        Ok(norm)
    }

    fn update(
        &mut self,
        parameter: &mut Parameter,
        gradient: &Tensor,
    ) -> Result<(), LearningError> {
        let slot = self.slots.entry(parameter.name.clone()).or_default();
        slot.counters.step += 1;
        slot.counters.lifetime += 1;
        let (m, v) = match &mut slot.moments {
            Some(moments) => moments,
            empty => empty.insert((gradient.f_zeros_like()?, gradient.f_zeros_like()?)),
        };
        let t = slot.counters.step as f64;
        let warmup = f64::from(self.settings.warmup_steps);
        let warm = if warmup > 0.0 {
            (slot.counters.lifetime as f64 / warmup).min(1.0)
        } else {
            1.0
        };
        let rate = parameter.learning_rate * warm;

        let w = &mut parameter.tensor;
        let _ = w.f_mul_scalar_(1.0 - rate * self.settings.weight_decay)?;
        let _ = m.f_lerp_(gradient, 1.0 - BETA1)?;
        let _ = v
            .f_mul_scalar_(BETA2)?
            .f_add_(&gradient.f_square()?.f_mul_scalar_(1.0 - BETA2)?)?;
        let denominator = v
            .f_sqrt()?
            .f_div_scalar_((1.0 - BETA2.powf(t)).sqrt())?
            .f_add_scalar_(EPSILON)?;
        let change = m
            .f_div(&denominator)?
            .f_mul_scalar_(rate / (1.0 - BETA1.powf(t)))?;
        let _ = w.f_sub_(&change)?;
        Ok(())
    }

    /// Forgets the moments of the parameters whose names start with `prefix`; their warm-up goes on.
    pub fn forget_moments(&mut self, prefix: &str) {
        for (name, slot) in &mut self.slots {
            if name.starts_with(prefix) {
                slot.moments = None;
                slot.counters.step = 0;
            }
        }
    }

    /// Counters by parameter, to save.
    pub fn counters(&self) -> BTreeMap<String, Counters> {
        self.slots
            .iter()
            .map(|(name, slot)| (name.clone(), slot.counters))
            .collect()
    }

    /// Moments as `<prefix>m.<parameter>` and `<prefix>v.<parameter>`, to save.
    ///
    /// # Errors
    /// [`LearningError::Torch`] if a tensor cannot be copied.
    pub fn moments(&self, prefix: &str) -> Result<NamedTensors, LearningError> {
        let mut tensors = NamedTensors::new();
        for (name, slot) in &self.slots {
            if let Some((m, v)) = &slot.moments {
                tensors.insert(format!("{prefix}m.{name}"), HostTensor::from_tensor(m)?);
                tensors.insert(format!("{prefix}v.{name}"), HostTensor::from_tensor(v)?);
            }
        }
        Ok(tensors)
    }

    /// Restores what [`AdamW::counters`] and [`AdamW::moments`] gave. A parameter with `step > 0` must have both moments.
    ///
    /// # Errors
    /// [`LearningError::State`] that names a moment which is missing or of another shape than its pair.
    pub(crate) fn restore(
        settings: AdamWSettings,
        counters: &BTreeMap<String, Counters>,
        prefix: &str,
        taker: &mut Taker,
        kind: tch::Kind,
        shape_of: impl Fn(&str) -> Option<Vec<usize>>,
    ) -> Result<Self, LearningError> {
        let mut slots = BTreeMap::new();
        for (name, &counters) in counters {
            let moments = if counters.step > 0 {
                let shape = shape_of(name).ok_or_else(|| {
                    LearningError::State(format!(
                        "the optimiser's state has a parameter `{name}` that this job does not train"
                    ))
                })?;
                let m = taker.tensor(&format!("{prefix}m.{name}"), &shape, kind)?;
                let v = taker.tensor(&format!("{prefix}v.{name}"), &shape, kind)?;
                Some((m, v))
            } else {
                None
            };
            slots.insert(name.clone(), Slot { counters, moments });
        }
        Ok(Self { settings, slots })
    }
}

/// The Euclidean norm of all gradients as one vector.
fn global_norm(gradients: &[Tensor]) -> Result<f64, LearningError> {
    let norms = gradients
        .iter()
        .filter(|gradient| gradient.defined())
        .map(Tensor::f_norm)
        .collect::<Result<Vec<_>, _>>()?;
    if norms.is_empty() {
        return Ok(0.0);
    }
    Ok(Tensor::f_stack(&norms, 0)?.f_norm()?.f_double_value(&[])?)
}
